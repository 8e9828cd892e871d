"""Long-tailed subsets of a balanced data set, the same whatever the order of its files.

Inside a class the images are sorted by the sha256 of their pixels and shuffled with ``RandomState(seed)``; a subset
takes the first ones. The order of the files can be asked for instead. Classes keep the order of their labels: class 0
is the largest, the last class the smallest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from ltkernels.trainer import TrainerError
from ltkernels.trainer.data.images import LabelledImages

Profile: TypeAlias = Literal["exp", "step"]
Selection: TypeAlias = Literal["hash", "archive"]


@dataclass(frozen=True, eq=False)
class Split:
    """Long-tailed training images, the balanced images they are evaluated on, and the training images of each class."""

    train: LabelledImages
    evaluate: LabelledImages
    counts: tuple[int, ...]


def class_counts(
    num_classes: int, max_count: int, imbalance_factor: float, profile: Profile = "exp"
) -> tuple[int, ...]:
    r"""Images of each class, from ``max_count`` down to ``max_count / imbalance_factor``, rounded down.

    ``exp``: :math:`n_k = n_{\max} \mu^{-k / (C - 1)}` with :math:`\mu` the imbalance factor (Cao et al.,
    arXiv:1906.07413). ``step``: the first half of the classes (rounded up) has ``max_count``, the rest the minimum
    (Buda et al., arXiv:1710.05381).

    Raises:
        TrainerError: a value out of range, an unknown profile, or a class that would have no image.
    """
    if num_classes < 2:
        raise TrainerError(f"num_classes: a long tail needs at least 2 classes, got {num_classes}")
    if max_count < 1:
        raise TrainerError(f"max_count: expected at least 1 image, got {max_count}")
    if not (math.isfinite(imbalance_factor) and imbalance_factor >= 1):
        raise TrainerError(f"imbalance_factor: expected a finite number >= 1, got {imbalance_factor:g}")
    # Rounded down a hair above: 49 * (1 / 49) is below 1 in floating point.
    rounding = 1 + 1e-12
    last = int(max_count / imbalance_factor * rounding)
    if profile == "exp":
        ratios = [imbalance_factor ** (-k / (num_classes - 1)) for k in range(num_classes)]
        counts = [int(max_count * ratio * rounding) for ratio in ratios]
    elif profile == "step":
        counts = [max_count if k < (num_classes + 1) // 2 else last for k in range(num_classes)]
    else:
        raise TrainerError(f"profile: expected 'exp' or 'step', got {profile!r}")
    if last < 1:
        raise TrainerError(
            f"imbalance_factor: {imbalance_factor:g} leaves the last class {max_count / imbalance_factor:.2g} images, "
            "fewer than one; lower it or raise max_count"
        )
    return tuple(counts)


def shuffled_classes(data: LabelledImages, seed: int) -> list[np.ndarray]:
    """Indices of each class, sorted by image hash and shuffled with ``RandomState(seed)``."""
    shuffled = []
    for label in range(data.num_classes):
        indices = np.flatnonzero(data.labels == label)
        indices = indices[np.argsort(data.hashes[indices], kind="stable")]
        # A fresh generator for each class: a class's order does not depend on how many images others have.
        shuffled.append(indices[np.random.RandomState(seed).permutation(len(indices))])
    return shuffled


def archive_classes(data: LabelledImages, seed: int) -> list[np.ndarray]:
    """Indices of each class, in the order of the files and shuffled one class after the other by one generator.

    The rule of the code of Cao et al. (arXiv:1906.07413). It depends on the order of the files: with seed 0 and the
    archive's own order it gives the published subsets.
    """
    random = np.random.RandomState(seed)
    classes = [np.flatnonzero(data.labels == label) for label in range(data.num_classes)]
    for indices in classes:
        random.shuffle(indices)
    return classes


def hold_out(data: LabelledImages, per_class: int, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """A balanced set of ``per_class`` images a class, the first by hash order, and the rest in its order.

    An image that the data set holds twice (14 of CIFAR-100's training images) stays in the rest with its copy.

    Raises:
        TrainerError: ``per_class`` is below 1, or a class has no more images than that.
    """
    if per_class < 1:
        raise TrainerError(f"held-out images: expected at least 1 a class, got {per_class}")
    _, which, copies = np.unique(data.hashes, return_inverse=True, return_counts=True)
    single = copies[which] == 1
    sizes = np.bincount(data.labels[single], minlength=data.num_classes)
    if sizes.min() <= per_class:
        raise TrainerError(
            f"held-out images: class {sizes.argmin()} has {sizes.min()} images, so {per_class} a class leave none to "
            f"train on; hold out fewer than {sizes.min()}"
        )
    held = np.concatenate([indices[single[indices]][:per_class] for indices in shuffled_classes(data, seed)])
    is_held = np.zeros(len(data), dtype=bool)
    is_held[held] = True
    return data.subset(held), data.subset(np.flatnonzero(~is_held))


def long_tailed(
    data: LabelledImages, counts: tuple[int, ...], seed: int, selection: Selection = "hash"
) -> LabelledImages:
    """The first ``counts[k]`` images of each class k, in the order of :func:`shuffled_classes` (``selection="hash"``)
    or :func:`archive_classes` (``"archive"``).

    Raises:
        TrainerError: a class has fewer images than its count, or an unknown selection.
    """
    for label, (size, count) in enumerate(zip(data.class_sizes, counts, strict=True)):
        if size < count:
            raise TrainerError(
                f"max_count: class {label} has {size} images to train on, {count} are asked for, as classes get "
                "smaller in the order of their labels; lower max_count, hold out fewer images, or take all images with "
                "imbalance_factor None"
            )
    if selection not in ("hash", "archive"):
        raise TrainerError(f"selection: expected 'hash' or 'archive', got {selection!r}")
    classes = shuffled_classes(data, seed) if selection == "hash" else archive_classes(data, seed)
    return data.subset(np.concatenate([indices[:n] for indices, n in zip(classes, counts, strict=True)]))
