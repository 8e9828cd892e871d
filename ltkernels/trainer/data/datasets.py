"""The data sets with a test set of their own, by name, and their long-tailed versions.

A new data set is one module with a ``load(root)`` and one entry in ``DATASETS``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ltkernels.trainer import TrainerError
from ltkernels.trainer.data import cifar, folders, idx
from ltkernels.trainer.data.images import ImageDataset, MissingDataError
from ltkernels.trainer.data.longtail import Profile, Selection, Split, class_counts, hold_out, long_tailed

__all__ = ["DATASETS", "ImageDataset", "LongTail", "load_dataset", "long_tailed_split"]

DATA_ROOT_VARIABLE = "LTKERNELS_DATA"
DEFAULT_ROOT = Path("data")
LARGEST_SEED = 2**32 - 1  # of NumPy
# The validation images are the same for every subset. The seed is one that no subset is likely to have: under the same
# seed the images of the smallest classes would be those held out before.
VALIDATION_SEED = LARGEST_SEED

DATASETS: dict[str, Callable[[Path], ImageDataset]] = {
    "cifar10": cifar.load_cifar10,
    "cifar100": cifar.load_cifar100,
    "fashion-mnist": idx.load,
    "folder": folders.load_folder,
    "list": folders.load_list,
}


def data_root_of(data_root: Path | None) -> Path:
    """The folder given, else the one that ``LTKERNELS_DATA`` names, else ``data``."""
    return data_root or Path(os.environ.get(DATA_ROOT_VARIABLE) or DEFAULT_ROOT)


def load_dataset(name: str, data_root: Path | None = None, *, download: bool = False) -> ImageDataset:
    """A data set of ``DATASETS``, from ``data_root``, else the folder ``LTKERNELS_DATA`` names, else ``data``.

    Args:
        name: Key of ``DATASETS``.
        data_root: The folder with the data sets.
        download: Whether torchvision may fetch a data set that is missing, into that folder.

    Raises:
        MissingDataError: the data is missing; the message says what to fetch and where to put it.
        TrainerError: an unknown name, a file that is not of its format, a class without training or test images, or a
            download that is impossible.
    """
    if name not in DATASETS:
        raise TrainerError(f"dataset: expected one of {', '.join(DATASETS)}; got {name!r}")
    root = data_root_of(data_root)
    try:
        return _complete(DATASETS[name](root))
    except MissingDataError:
        if not download:
            raise
    _download(name, root)
    return _complete(DATASETS[name](root))


def _complete(data: ImageDataset) -> ImageDataset:
    for part, images in (("training", data.train), ("test", data.test)):
        if images.class_sizes.min() == 0:  # it would score 0 and so lower the means over classes
            raise TrainerError(f"{images.source}: class {images.class_sizes.argmin()} has no {part} image")
    return data


def _download(name: str, root: Path) -> None:
    """Let torchvision fetch the archive, check its MD5 and unpack it. It reads no pickle."""
    archives = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
    if name not in (*archives, "fashion-mnist"):
        raise TrainerError(f"download: {name} is made of your own images, there is nothing to fetch")
    try:
        from torchvision import datasets
        from torchvision.datasets.utils import download_and_extract_archive
    except ImportError as error:
        raise TrainerError(
            "download: needs torchvision, which is not installed (pip install the one for your torch); or fetch the "
            "files by hand: without download the message says from where"
        ) from error
    try:
        if name in archives:
            source = getattr(datasets, archives[name])  # not called: it would unpickle whatever it finds
            download_and_extract_archive(source.url, root, filename=source.filename, md5=source.tgz_md5)
        else:
            datasets.FashionMNIST(root, download=True)
    except (OSError, RuntimeError) as error:
        raise TrainerError(f"download: torchvision could not fetch {name} into {root} ({error})") from error


@dataclass(frozen=True)
class LongTail:
    """Which images of a data set are trained on, and which it is evaluated on."""

    imbalance_factor: float | None = 100.0
    """Images of the largest class over those of the smallest; None: all images, for a set that has its own tail."""
    profile: Profile = "exp"
    """How the classes get smaller: exponentially, or in one step in the middle."""
    max_count: int | None = None
    """Images of the largest class; None: as many as the largest class has."""
    subset_seed: int = 0
    """Seed of the selection inside the classes."""
    selection: Selection = "hash"
    """hash: independent of the order of the files; archive: the rule of LDAM's code, on the order of the files."""
    validation_per_class: int = 0
    """Training images held out of each class and evaluated on instead of the test set; for all choices."""

    def __post_init__(self) -> None:
        if not 0 <= self.subset_seed < VALIDATION_SEED:
            raise TrainerError(f"subset_seed: expected 0..{VALIDATION_SEED - 1}, got {self.subset_seed}")
        if self.validation_per_class < 0:
            raise TrainerError(f"validation_per_class: expected 0 or more, got {self.validation_per_class}")


def long_tailed_split(dataset: ImageDataset, tail: LongTail) -> Split:
    """The long-tailed training images, and the test set, or the held-out validation images if there are any.

    Validation images are held out first, the same for every subset, so no image is in both. ``counts`` are the
    training images of each class.

    Raises:
        TrainerError: the data set has too few images for it, or an option is out of range.
    """
    pool, evaluate = dataset.train, dataset.test
    if tail.validation_per_class:
        evaluate, pool = hold_out(pool, tail.validation_per_class, VALIDATION_SEED)
    if tail.imbalance_factor is None:
        if tail.selection == "hash":
            pool = pool.subset(np.lexsort((pool.hashes, pool.labels)))  # a run does not depend on the order of files
        return Split(pool, evaluate, tuple(pool.class_sizes.tolist()))
    largest = int(pool.class_sizes.max()) if tail.max_count is None else tail.max_count
    counts = class_counts(pool.num_classes, largest, tail.imbalance_factor, tail.profile)
    return Split(long_tailed(pool, counts, tail.subset_seed, tail.selection), evaluate, counts)
