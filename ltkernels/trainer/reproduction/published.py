"""Accuracies that others report for long-tailed CIFAR, each with its source and the conditions it was measured under.

A method is named as in ``METHODS``; ``ce+NAME`` is the post-hoc method NAME on a network trained with cross-entropy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Setting(NamedTuple):
    """A long-tailed data set."""

    dataset: str
    profile: str
    imbalance_factor: float


@dataclass(frozen=True)
class Source:
    """Where numbers were reported.

    Args:
        letter: Marks its numbers in a table.
        name: Of the code or the paper.
        link: Where the numbers were read.
        conditions: What the numbers were measured with, and what the source does not say.
        unsaid: What has to be said where numbers of it stand beside those of this library.
    """

    letter: str
    name: str
    link: str
    conditions: str
    unsaid: str = ""


@dataclass(frozen=True)
class Reported:
    """A top-1 accuracy in percent; ``std`` is None where the source gives none.

    ``other`` says how the method of this number differs from the one of that name here.
    """

    source: Source
    mean: float
    std: float | None = None
    other: str = ""

    @property
    def cell(self) -> str:
        spread = "" if self.std is None else f" ±{self.std:.2f}"
        return f"{self.mean:.2f}{spread} ({', '.join(filter(None, (self.source.letter, self.other)))})"

    @property
    def tolerance(self) -> float | None:
        """The goal of a reproduction: two standard deviations, at least one point. None without a deviation."""
        return None if self.std is None else max(2 * self.std, 1.0)


CIFAR100_EXP100 = Setting("cifar100", "exp", 100.0)
CIFAR10_EXP100 = Setting("cifar10", "exp", 100.0)
MAX_COUNTS = {"cifar100": 500, "cifar10": 5000}
"""Images of the largest class in every setting of this module."""
NETWORK = "resnet32"
"""Of every number of this module."""
EPOCHS = 200
"""Of the numbers with a standard deviation."""

DDC = Source(
    "a",
    "DDC repository",
    "https://github.com/wang22ti/DDC",
    "ResNet-32, 200 epochs, weight decay 2e-4, crop and flip; mean ± standard deviation",
    "does not say whether its numbers are of the last or of the best epoch (its code logs the best on the test "
    "set), nor how many runs they are means of, nor gamma and tau of VS at 200 epochs.",
)
TRICKS = Source(
    "b",
    "repository of Bag of Tricks for Long-Tailed Visual Recognition",
    "https://github.com/zhangyongshun/BagofTricks-LT/blob/main/documents/trick_gallery.md",
    "a close protocol; converted here to accuracy, 100 minus the error rate that is reported; no standard deviation; "
    "CE is that of its README, where the gallery of tricks has 70.36 for CIFAR-10 and 38.32 for CIFAR-100",
    "does not say whether its numbers are of the last or of the best epoch (its code keeps the network of the best one "
    "on the test set, and tau-normalisation uses that one), nor how many runs they are of.",
)
ADJUSTMENT = Source(
    "c",
    "official code of logit adjustment",
    "https://github.com/google-research/google-research/tree/master/logit_adjustment",
    "1,419 epochs on CIFAR-100, 1,241 on CIFAR-10, with a schedule of its own, Nesterov momentum and "
    "random crops of images padded by 2; the last epoch; no standard deviation",
)
SOURCES = (DDC, TRICKS, ADJUSTMENT)

_DDC_SETTINGS = (
    CIFAR100_EXP100,
    Setting("cifar100", "exp", 10.0),
    Setting("cifar100", "step", 100.0),
    CIFAR10_EXP100,
    Setting("cifar10", "exp", 10.0),
    Setting("cifar10", "step", 100.0),
)
_DDC: dict[str, tuple[tuple[float, float], ...]] = {
    "ce": ((38.06, 1.03), (56.73, 0.12), (38.74, 0.13), (71.25, 0.10), (86.74, 0.19), (64.81, 1.22)),
    "ldam-drw": ((42.73, 0.28), (57.75, 0.54), (46.01, 0.16), (77.97, 0.17), (87.96, 0.16), (78.27, 0.44)),
    "vs": ((42.67, 0.48), (58.50, 0.21), (46.74, 0.47), (80.29, 0.23), (88.74, 0.24), (80.19, 0.09)),
}
# Error rates on CIFAR-10 and CIFAR-100.
_TRICKS_ERRORS: dict[str, tuple[float, float]] = {
    "ce": (28.05, 62.27),
    "ldam-drw": (22.27, 57.53),
    "cdt": (22.90, 60.41),
    "balanced-softmax": (22.46, 57.01),
    "class-balanced": (29.52, 61.03),
    "focal": (28.44, 62.78),
    "ldam": (26.34, 61.12),
    "ce-mixup": (25.94, 59.18),
    "ce+tau-norm": (27.30, 59.04),
    "ce+crt": (25.01, 59.74),
    "ce+lws": (27.37, 59.84),
}
_TRICKS_OTHER: dict[tuple[Setting, str], str] = {
    (CIFAR100_EXP100, "class-balanced"): "beta 0.9",
    **{(setting, "focal"): "sigmoids, gamma 2" for setting in (CIFAR10_EXP100, CIFAR100_EXP100)},
    **{(setting, "ce+tau-norm"): "bias kept" for setting in (CIFAR10_EXP100, CIFAR100_EXP100)},
    **{(setting, "ce-mixup"): "400 epochs" for setting in (CIFAR10_EXP100, CIFAR100_EXP100)},
}
# Accuracies on CIFAR-10 and CIFAR-100.
_ADJUSTMENT: dict[str, tuple[float, float]] = {
    "ce": (71.36, 39.87),
    "ce+logit-adjustment": (77.32, 44.07),
    "logit-adjustment": (77.89, 44.06),
}


def _entries() -> Iterator[tuple[tuple[Setting, str], Reported]]:
    for method, cells in _DDC.items():
        for setting, (mean, std) in zip(_DDC_SETTINGS, cells, strict=True):
            yield (setting, method), Reported(DDC, mean, std)
    for setting, index in ((CIFAR10_EXP100, 0), (CIFAR100_EXP100, 1)):
        for method, errors in _TRICKS_ERRORS.items():
            yield (
                (setting, method),
                Reported(TRICKS, round(100 - errors[index], 2), other=_TRICKS_OTHER.get((setting, method), "")),
            )
        for method, accuracies in _ADJUSTMENT.items():
            yield (setting, method), Reported(ADJUSTMENT, accuracies[index])


def reported(setting: Setting, method: str) -> tuple[Reported, ...]:
    """What is reported for a method on a long-tailed data set, in the order of the sources."""
    return tuple(number for key, number in _entries() if key == (setting, method))


def settings() -> tuple[Setting, ...]:
    """All long-tailed data sets that something is reported for."""
    return tuple(dict.fromkeys(setting for (setting, _), _ in _entries()))


def methods(setting: Setting) -> tuple[str, ...]:
    """All methods that something is reported for on a long-tailed data set."""
    return tuple(dict.fromkeys(method for (found, method), _ in _entries() if found == setting))
