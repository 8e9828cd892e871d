"""Labelled images as every data set hands them over."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ltkernels.trainer import TrainerError


class MissingDataError(TrainerError):
    """A data set is not where it was looked for; the message says what to fetch and where to put it."""


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images with class indices, on the host.

    Args:
        source: Where they come from, for the report.
        images: (N, H, W) or, in colour, (N, H, W, 3) uint8.
        labels: (N,) int64 in [0, num_classes).
        num_classes: C.
        max_value: Brightest possible pixel.
        class_names: C names, or none.

    Raises:
        TrainerError: they are not as said here.
    """

    source: str
    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    max_value: int
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)):
            raise self._mistake("images (N, H, W) or (N, H, W, 3) uint8", f"{images.shape} {images.dtype}")
        if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise self._mistake(f"labels {images.shape[:1]} int64", f"{labels.shape} {labels.dtype}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise self._mistake(f"labels in 0..{self.num_classes - 1}", f"{labels.min()}..{labels.max()}")
        if len(self.class_names) not in (0, self.num_classes):
            raise self._mistake(f"{self.num_classes} class names or none", str(len(self.class_names)))

    def _mistake(self, expected: str, found: str) -> TrainerError:
        return TrainerError(f"{self.source}: expected {expected}, got {found}")

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def hashes(self) -> np.ndarray:
        """(N,) sha256 of each image's pixels: names an image whatever the order of the file it came from.

        The bytes are those of ``images``: row by row, the channels of a pixel side by side.
        """
        rows = np.ascontiguousarray(self.images).reshape(len(self.images), -1)
        return np.array([hashlib.sha256(row).hexdigest() for row in rows])

    @property
    def fingerprint(self) -> str:
        """sha256 of the sorted image hashes: names a set of images, printed with every result."""
        return hashlib.sha256("".join(sorted(self.hashes.tolist())).encode()).hexdigest()

    @property
    def label_fingerprint(self) -> str:
        """The same of images with their labels: names what is learned of them, too."""
        pairs = sorted(f"{name} {label}" for name, label in zip(self.hashes, self.labels.tolist(), strict=True))
        return hashlib.sha256("\n".join(pairs).encode()).hexdigest()

    @property
    def class_sizes(self) -> np.ndarray:
        """(C,) images of each class."""
        return np.bincount(self.labels, minlength=self.num_classes)

    def subset(self, indices: np.ndarray) -> LabelledImages:
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def without_duplicates(self) -> LabelledImages:
        """Each image once: a copy of a test image among the training images would make the test easier."""
        by_hash = np.lexsort((self.labels, self.hashes))  # by label too: which copy stays must not depend on file order
        hashes = self.hashes[by_hash]
        first = np.ones(len(hashes), dtype=bool)
        first[1:] = hashes[1:] != hashes[:-1]
        return self.subset(by_hash[first])

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images (N, 1 or 3, H, W) float32 in [-1, 1] and labels (N,) int64, on the device."""
        images = torch.from_numpy(self.images).to(device=device, dtype=torch.float32)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
        return images * (2.0 / self.max_value) - 1.0, torch.from_numpy(self.labels).to(device)


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A data set with a test set of its own.

    Args:
        name: As in the registry of data sets.
        train: Training images.
        test: Balanced test images of the same size and classes.
        mean: Mean of each channel of the training images, pixels in [0, 1].
        std: Standard deviation of each channel, likewise.

    Raises:
        TrainerError: training and test images differ in size or number of classes, or a channel has no mean.
    """

    name: str
    train: LabelledImages
    test: LabelledImages
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        shape, classes = self.train.images.shape[1:], self.train.num_classes
        if self.test.images.shape[1:] != shape or self.test.num_classes != classes:
            raise TrainerError(
                f"{self.name}: expected test images {shape} of {classes} classes like the training images, "
                f"got {self.test.images.shape[1:]} of {self.test.num_classes}"
            )
        channels = 3 if len(shape) == 3 else 1
        if not len(self.mean) == len(self.std) == channels:
            raise TrainerError(
                f"{self.name}: expected mean and std of {channels} channels, got {len(self.mean)} and {len(self.std)}"
            )


def fingerprints(training: LabelledImages, test: LabelledImages) -> dict[str, str]:
    """Of the images of a run, and of the images with their labels."""
    return {
        "training": training.fingerprint,
        "test": test.fingerprint,
        "training labels": training.label_fingerprint,
        "test labels": test.label_fingerprint,
    }


def check_images(what: str, theirs: dict[str, str], ours: dict[str, str]) -> None:
    """Compare :func:`fingerprints`, as far as ``theirs`` have them: what older versions have written has fewer.

    Raises:
        TrainerError: ``what`` is of other images, or of images with other labels.
    """
    for part, found in theirs.items():
        if found != ours[part]:
            name = part if part.endswith("labels") else f"{part} images"
            raise TrainerError(
                f"{what} is of other {name}, sha256 {found[:12]}, than are there now, {ours[part][:12]}: "
                "name the data root that the run began with"
            )
