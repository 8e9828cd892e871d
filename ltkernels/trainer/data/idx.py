"""Fashion-MNIST (Xiao et al., arXiv:1708.07747) in the IDX format of MNIST, plain or compressed by gzip.

An IDX file is two zero bytes, the type of a value (8: uint8), the number of dimensions, their sizes as big-endian
32-bit integers, and the values.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from ltkernels.trainer import TrainerError
from ltkernels.trainer.data.images import ImageDataset, LabelledImages, MissingDataError

UINT8 = 8
SIDE = 28
CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
MEAN, STD = (0.2860,), (0.3530,)
# Where the files may be below a data root: unpacked by hand, or by torchvision.
FOLDERS = ("fashion-mnist", "FashionMNIST/raw", ".")
# The Debian package dataset-fashion-mnist.
SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SUFFIXES = ("", ".gz")

HOW_TO_GET_IT = (
    "Fetch {names} from http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/ and put them into {folder}, "
    "compressed or not; or install the Debian package dataset-fashion-mnist. Another folder is named by --data-root or "
    "LTKERNELS_DATA"
)
FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


def load(root: Path) -> ImageDataset:
    """Fashion-MNIST from ``root/fashion-mnist``, ``root/FashionMNIST/raw`` or ``root``, else from Debian's package.

    Raises:
        MissingDataError: the four files are in none of them.
        TrainerError: a file is not of the format.
    """
    for folder in (*(root / name for name in FOLDERS), SYSTEM_FOLDER):
        files = [_find(folder, name) for name in FILES]
        if all(files):
            train_images, train_labels, test_images, test_labels = files
            train, test = _images(train_images, train_labels), _images(test_images, test_labels)
            return ImageDataset("fashion-mnist", train, test, MEAN, STD)
    names = ", ".join(f"{name}.gz" for name in FILES)
    folder = root / FOLDERS[0]
    raise MissingDataError(f"{folder}: not all of the files. {HOW_TO_GET_IT.format(names=names, folder=folder)}")


def _find(folder: Path, name: str) -> Path | None:
    return next((folder / f"{name}{suffix}" for suffix in SUFFIXES if (folder / f"{name}{suffix}").is_file()), None)


def _images(images_file: Path, labels_file: Path) -> LabelledImages:
    images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if images.shape[1:] != (SIDE, SIDE) or len(images) == 0:
        raise TrainerError(f"{images_file}: expected images of {SIDE} x {SIDE} pixels, got shape {images.shape}")
    if len(labels) != len(images):
        raise TrainerError(f"{labels_file}: {len(labels)} labels, but {len(images)} images in {images_file.name}")
    if labels.max() >= len(CLASS_NAMES):
        raise TrainerError(f"{labels_file}: expected labels in 0..{len(CLASS_NAMES) - 1}, got {labels.max()}")
    return LabelledImages(
        source=str(images_file.parent),
        images=images,
        labels=labels.astype(np.int64),
        num_classes=len(CLASS_NAMES),
        max_value=255,
        class_names=CLASS_NAMES,
    )


def read_idx(file: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file, compressed if the name ends in ``.gz``.

    Raises:
        TrainerError: no such file, not compressed as its name says, another magic number, another number of
            dimensions, or more or fewer values than the sizes say.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise TrainerError(f"{file}: truncated or not readable ({error})") from error
    magic, header = bytes([0, 0, UINT8, dimensions]), 4 + 4 * dimensions
    if len(content) < header:
        raise TrainerError(f"{file}: truncated, {len(content)} bytes are less than the header of an IDX file")
    if content[:4] != magic:
        raise TrainerError(
            f"{file}: expected the magic number {magic.hex()} (uint8, {dimensions} dimensions), got {content[:4].hex()}"
        )
    sizes = tuple(int(size) for size in np.frombuffer(content, dtype=">u4", count=dimensions, offset=4))
    if math.prod(sizes) != len(content) - header:
        raise TrainerError(
            f"{file}: sizes {sizes} need {math.prod(sizes)} values, the file has {len(content) - header}: truncated or "
            "damaged"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(sizes).copy()
