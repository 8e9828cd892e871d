"""Scores of a classifier on a balanced set, in percent, and paired differences between methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

# Shot groups of the long-tailed literature (Liu et al., arXiv:1904.05160): many > 100, medium 20..100, few < 20.
MANY_ABOVE = 100
FEW_BELOW = 20
CALIBRATION_BINS = 15

# Columns of every table, in order: attribute of Scores and heading.
COLUMNS: tuple[tuple[str, str], ...] = (
    ("overall", "overall"),
    ("many", "many"),
    ("medium", "medium"),
    ("few", "few"),
    ("worst_class", "worst class"),
    ("harmonic_mean", "harm. mean"),
    ("ece", "ECE"),
)


class Outputs(NamedTuple):
    """What a network gives for N images, of any floating dtype and on any device."""

    embedding: Tensor  # (N, D) what the classifier sees
    logits: Tensor  # (N, C)
    target: Tensor  # (N,) classes, integers


@dataclass(frozen=True)
class Scores:
    """Accuracies and expected calibration error, all in percent; None for a group without classes."""

    overall: float
    many: float | None
    medium: float | None
    few: float | None
    worst_class: float
    harmonic_mean: float
    ece: float
    per_class: tuple[float, ...]


def shot_group(count: int) -> str:
    """``"many"``, ``"medium"`` or ``"few"``, by the training images of a class."""
    if count > MANY_ABOVE:
        return "many"
    return "few" if count < FEW_BELOW else "medium"


def thirds(class_counts: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """The classes with most training images, those in the middle and those with fewest: 3, 3 and 4 of 10 classes."""
    order = sorted(range(len(class_counts)), key=lambda label: -class_counts[label])
    third = len(order) // 3
    return order[:third], order[third : 2 * third], order[2 * third :]


def harmonic_mean(values: Sequence[float]) -> float:
    """Harmonic mean of values >= 0; 0 if one of them is 0, its limit."""
    if min(values) == 0:
        return 0.0
    return len(values) / sum(1 / value for value in values)


def score(probabilities: Tensor, target: Tensor, class_counts: Sequence[int]) -> Scores:
    """Scores of predicted probabilities (N, C) for classes (N,) that had ``class_counts`` training images.

    Every class must occur in ``target``. ECE has 15 equal bins of the largest probability (Guo et al.,
    arXiv:1706.04599).
    """
    classes = len(class_counts)
    # On the host: a few hundred rows, and torchmetrics checks its arguments by value.
    probabilities, target = probabilities.float().cpu(), target.cpu()
    predicted = probabilities.argmax(dim=1)
    per_class = (100 * multiclass_accuracy(predicted, target, classes, average=None)).tolist()
    groups = {
        group: [accuracy for accuracy, n in zip(per_class, class_counts, strict=True) if shot_group(n) == group]
        for group in ("many", "medium", "few")
    }
    # torchmetrics puts a confidence of exactly 1 into a bin of its own, the sixteenth.
    below_one = probabilities.clamp(max=1 - 2**-24)
    ece = multiclass_calibration_error(below_one, target, classes, n_bins=CALIBRATION_BINS, norm="l1")
    return Scores(
        overall=100 * multiclass_accuracy(predicted, target, classes, average="micro").item(),
        **{group: sum(values) / len(values) if values else None for group, values in groups.items()},
        worst_class=min(per_class),
        harmonic_mean=harmonic_mean(per_class),
        ece=100 * ece.item(),
        per_class=tuple(per_class),
    )


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a method's value minus the baseline's over the same seeds, its standard error and 95 % t-interval."""

    mean: float
    standard_error: float
    low: float
    high: float
    pairs: int

    @property
    def above_two_standard_errors(self) -> bool:
        return self.mean > 2 * self.standard_error

    @property
    def claim(self) -> str:
        """The 95 % interval in a word; half a point is the margin of "not worse", also of a difference below 0."""
        if self.pairs < 6:
            return "too few pairs"
        if self.low > -0.5:
            return "supported" if self.low > 0 else "not worse"
        return "worse" if self.high < 0 else "inconclusive"


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> PairedDifference | None:
    """Difference of values that belong together pair by pair; None for fewer than two pairs, which have no error."""
    differences = np.asarray(values, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    pairs = len(differences)
    if pairs < 2:
        return None
    mean = float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(pairs)
    half = float(stdtrit(pairs - 1, 0.975)) * error
    return PairedDifference(mean, error, mean - half, mean + half, pairs)


def probabilities_of(logits: Tensor, scale: float | Tensor) -> Tensor:
    """Softmax of the logits (N, C) in the unit the loss trained them in: cosines are meant to be scaled."""
    return torch.softmax(logits.float() * scale, dim=1)
