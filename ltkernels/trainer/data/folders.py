"""The user's own images: a folder a class, or list files as ImageNet-LT has them (Liu et al., arXiv:1904.05160).

``folder``: ``root/train/CLASS/IMAGE`` and ``root/test/CLASS/IMAGE``. ``list``: ``root/train.txt`` and
``root/test.txt`` with ``path label`` a line, paths relative to ``root``.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ltkernels.trainer import TrainerError
from ltkernels.trainer.data.images import ImageDataset, LabelledImages, MissingDataError

SIDE = 32
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
PARTS = ("train", "test")
FOLDER_LAYOUT = (
    "Make {root}/train/CLASS and {root}/test/CLASS for each class and put its images there; another folder is named by "
    "--data-root or LTKERNELS_DATA"
)
LIST_LAYOUT = (
    "Write {root}/train.txt and {root}/test.txt with 'path label' a line: an image relative to {root} and its class, "
    "0 the first; another folder is named by --data-root or LTKERNELS_DATA"
)

# Images with class indices, not yet decoded.
Listing = tuple[list[Path], list[int]]


def load_folder(root: Path, side: int = SIDE) -> ImageDataset:
    """The images of ``root/train`` and ``root/test``, a folder a class, as (N, side, side, 3).

    Classes are the folders of ``root/train``, in alphabetical order. Images are turned as their EXIF data say, cut to
    their centre square, resized and converted to RGB: grey values of 16 bits are scaled to 8, transparency is dropped.

    Raises:
        MissingDataError: one of the folders is not there.
        TrainerError: a class without training or test images, a test class that is not trained, a file with the name
            of an image that is none or whose pixels have no known range, or fewer than two classes.
    """
    for part in PARTS:
        if not (root / part).is_dir():
            raise MissingDataError(f"{root / part}: no such folder. {FOLDER_LAYOUT.format(root=root)}")
    names = _subfolders(root / "train")
    unknown = sorted(set(_subfolders(root / "test")) - set(names))
    if unknown:
        raise TrainerError(f"{root / 'test' / unknown[0]}: no class of this name in {root / 'train'}")
    if len(names) < 2:
        raise TrainerError(f"{root / 'train'}: expected a folder for each of at least 2 classes, got {len(names)}")
    train, test = (_listing_of_folder(root / part, names) for part in PARTS)
    return _dataset("folder", root, train, test, tuple(names), side)


def load_list(root: Path, side: int = SIDE) -> ImageDataset:
    """The images that ``root/train.txt`` and ``root/test.txt`` list, as :func:`load_folder` has them.

    Raises:
        MissingDataError: one of the lists is not there.
        TrainerError: a line that is not ``path label``, an image that is not there, a label out of range, fewer than
            two classes, or a class without training or test images.
    """
    for part in PARTS:
        if not (root / f"{part}.txt").is_file():
            raise MissingDataError(f"{root / part}.txt: no such file. {LIST_LAYOUT.format(root=root)}")
    train, test = (_listing_of_file(root / f"{part}.txt") for part in PARTS)
    num_classes = max(train[1]) + 1
    if num_classes < 2:
        raise TrainerError(f"{root / 'train'}.txt: expected labels of at least 2 classes, got {num_classes}")
    for part, (files, labels) in zip(PARTS, (train, test), strict=True):
        present = set(labels)
        # The first gap comes before the number of labels, however large the largest is.
        gap = next((label for label in range(min(num_classes, len(present) + 1)) if label not in present), None)
        if gap is not None:
            largest = train[0][train[1].index(num_classes - 1)]
            raise TrainerError(
                f"{root / part}.txt: no image of class {gap}, but labels of train.txt go to {num_classes - 1} "
                f"({largest.name})"
            )
        if max(present) >= num_classes:
            raise TrainerError(
                f"{root / part}.txt: expected labels in 0..{num_classes - 1} as in train.txt, got {max(present)} "
                f"({files[labels.index(max(present))].name})"
            )
    return _dataset("list", root, train, test, (), side)


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _listing_of_folder(folder: Path, names: Sequence[str]) -> Listing:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        inside = folder / name
        found = sorted(file for file in inside.iterdir() if _is_image(file)) if inside.is_dir() else []
        if not found:
            raise TrainerError(f"{inside}: no images ({', '.join(sorted(SUFFIXES))})")
        files += found
        labels += [label] * len(found)
    return files, labels


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()


def _listing_of_file(file: Path) -> Listing:
    files: list[Path] = []
    labels: list[int] = []
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()  # editors may write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise TrainerError(f"{file}: not readable as text ({error})") from error
    for number, line in enumerate(lines, start=1):
        words = line.rsplit(maxsplit=1)  # a path may have spaces
        if not words:
            continue
        if len(words) != 2 or not (words[1].isascii() and words[1].isdigit()):
            raise TrainerError(f"{file}, line {number}: expected 'path label' with a label 0, 1, ..., got {line!r:.80}")
        image = file.parent / words[0].strip()
        if not image.is_file():
            raise TrainerError(f"{file}, line {number}: {image}: no such image")
        files.append(image)
        labels.append(int(words[1]))
    if not files:
        raise TrainerError(f"{file}: lists no image")
    return files, labels


def _dataset(
    name: str, root: Path, train: Listing, test: Listing, class_names: tuple[str, ...], side: int
) -> ImageDataset:
    num_classes = max(train[1]) + 1

    def images(listing: Listing) -> LabelledImages:
        files, labels = listing
        return LabelledImages(
            source=str(root),
            images=_decode_all(files, side),
            labels=np.array(labels, dtype=np.int64),
            num_classes=num_classes,
            max_value=255,
            class_names=class_names,
        )

    training = images(train)
    mean, std = channel_statistics(training.images)
    return ImageDataset(name, training, images(test), mean, std)


def _decode_all(files: Sequence[Path], side: int) -> np.ndarray:
    pixels = np.empty((len(files), side, side, 3), dtype=np.uint8)
    with ThreadPoolExecutor() as pool:  # Pillow decodes without the interpreter's lock
        for index, image in enumerate(pool.map(partial(_decode, side=side), files)):
            pixels[index] = image
    return pixels


def _decode(file: Path, side: int) -> np.ndarray:
    try:
        with Image.open(file) as image:
            # A JPEG is decoded at a half, a quarter or an eighth of its size where that leaves twice the side: faster.
            image.draft("RGB", (2 * side, 2 * side))
            square = ImageOps.fit(_rgb(_upright(image), image.format), (side, side), method=Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise TrainerError(f"{file}: cannot be read as an image ({error})") from error
    return np.asarray(square)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data, which may fail in any way: the pixels decide whether it is an image
        return image


def _rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    """With 8 bits a channel. Pillow's own conversion cuts larger values off instead of scaling them.

    Raises:
        ValueError: the pixels are of 32 bits, which may be of any range.
    """
    # Of these formats Pillow 10 has 16 bits in mode I, Pillow 11 in I;16.
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        grey = np.asarray(image).astype(np.int64)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"pixels of 32 bits, mode {image.mode}, have no range that is known: save it with 8 or 16 bits"
        )
    return image.convert("RGB")


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of images (N, H, W, C) uint8, pixels in [0, 1].

    The deviation is at least one step of a pixel: a constant channel is divided by it.
    """
    values = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(images.shape[-1]):
        frequencies = np.zeros(256)
        for start in range(0, len(images), 4096):  # a histogram takes its values as 64-bit integers
            frequencies += np.bincount(images[start : start + 4096, ..., channel].ravel(), minlength=256)
        frequencies /= frequencies.sum()
        mean = float(frequencies @ values)
        means.append(mean)
        deviations.append(max(float(frequencies @ (values - mean) ** 2) ** 0.5, 1 / 255))
    return tuple(means), tuple(deviations)
