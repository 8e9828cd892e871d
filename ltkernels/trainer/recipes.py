"""What is trained: typed recipes, and the methods they compare. A new recipe is one entry in ``RECIPES``.

The command line shows every field: the text below a field is its help.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ltkernels import margins
from ltkernels.nn import LDAMLoss, LogitAdjustedLoss, MarginCrossEntropyLoss, VSLoss
from ltkernels.trainer import TrainerError
from ltkernels.trainer.data.longtail import Profile
from ltkernels.trainer.models.small import Classifier

SearchSpace = Mapping[str, Sequence[float]]

# Searched for every method, cross-entropy included; for that alone it is all there is, and 24 configurations.
_OPTIMISER_SPACE: SearchSpace = {
    "lr": (0.02, 0.05, 0.1, 0.2, 0.3, 0.5),
    "weight_decay": (1e-4, 5e-4, 2e-3, 5e-3),
}


@dataclass(frozen=True)
class Method:
    """A loss, the classifier it needs, and the settings chosen for it on the validation split."""

    lr: float
    """Peak learning rate of SGD."""
    weight_decay: float
    """Weight decay of SGD."""

    title: ClassVar[str]
    classifier: ClassVar[Classifier] = "linear"
    search_space: ClassVar[SearchSpace] = _OPTIMISER_SPACE

    def __post_init__(self) -> None:
        _at_least("lr", self.lr, 0, exclusive=True)
        _at_least("weight_decay", self.weight_decay, 0)

    def criterion(self, class_counts: Sequence[int], epochs: int) -> MarginCrossEntropyLoss:
        """The loss for these class counts and this number of epochs."""
        raise NotImplementedError


@dataclass(frozen=True)
class CrossEntropy(Method):
    """Softmax cross-entropy, the baseline."""

    title: ClassVar[str] = "CE"

    def criterion(self, class_counts: Sequence[int], epochs: int) -> MarginCrossEntropyLoss:
        return MarginCrossEntropyLoss()


@dataclass(frozen=True)
class LogitAdjustment(Method):
    """Logit adjustment, arXiv:2007.07314."""

    tau: float
    """Strength of the log-prior added to the logits in training."""

    title: ClassVar[str] = "logit adj."
    search_space: ClassVar[SearchSpace] = {**_OPTIMISER_SPACE, "tau": (0.5, 0.75, 1.0, 1.25, 1.5)}

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("tau", self.tau, 0)

    def criterion(self, class_counts: Sequence[int], epochs: int) -> MarginCrossEntropyLoss:
        return LogitAdjustedLoss(class_counts, self.tau)


@dataclass(frozen=True)
class LDAMDRW(Method):
    """LDAM with deferred re-weighting, arXiv:1906.07413."""

    max_margin: float
    """Margin of the rarest class, on cosines."""
    scale: float
    """Multiplies the cosines."""
    drw_start: float
    """Class-balanced weights begin after this share of the epochs."""
    beta: float
    """Class-balanced weights are (1 - beta) / (1 - beta^n)."""

    title: ClassVar[str] = "LDAM-DRW"
    classifier: ClassVar[Classifier] = "cosine"
    search_space: ClassVar[SearchSpace] = {
        **_OPTIMISER_SPACE,
        "max_margin": (0.1, 0.3, 0.5),
        "scale": (10.0, 20.0, 30.0),
        "drw_start": (0.6, 0.8),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("max_margin", self.max_margin, 0)
        _at_least("scale", self.scale, 0, exclusive=True)
        if not 0 <= self.drw_start <= 1:
            raise TrainerError(f"drw_start: expected a share of the epochs in [0, 1], got {self.drw_start:g}")
        if not 0 <= self.beta < 1:
            raise TrainerError(f"beta: expected a number in [0, 1), got {self.beta:g}")

    def criterion(self, class_counts: Sequence[int], epochs: int) -> MarginCrossEntropyLoss:
        start_epoch = round(self.drw_start * epochs)
        weight = margins.DeferredReweighting(class_counts, start_epoch, self.beta)
        return LDAMLoss(class_counts, self.max_margin, self.scale, weight=weight)


@dataclass(frozen=True)
class VectorScaling(Method):
    """VS, arXiv:2103.01550."""

    gamma: float
    """The logit of class j is multiplied by (n_j / n_max)^gamma in training."""
    tau: float
    """Strength of the log-prior added to the logits in training."""

    title: ClassVar[str] = "VS"
    search_space: ClassVar[SearchSpace] = {
        **_OPTIMISER_SPACE,
        "gamma": (0.05, 0.1, 0.2, 0.3),
        "tau": (0.5, 0.75, 1.0, 1.25),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("gamma", self.gamma, 0)
        _at_least("tau", self.tau, 0)

    def criterion(self, class_counts: Sequence[int], epochs: int) -> MarginCrossEntropyLoss:
        return VSLoss(class_counts, self.gamma, self.tau)


@dataclass(frozen=True)
class Recipe:
    """Data, network, optimisation and the methods compared under them."""

    ce: CrossEntropy
    logit_adjustment: LogitAdjustment
    ldam_drw: LDAMDRW
    vs: VectorScaling

    dataset: Literal["digits"]
    """Data set."""
    max_count: int
    """Training images of the largest class, class 0."""
    tuning_max_count: int
    """The same where a validation split is held out for choosing settings."""
    test_per_class: int
    """Test images of every class, the same for all seeds."""
    validation_per_class: int
    """Validation images of every class, taken from the training images when settings are chosen."""
    hidden: tuple[int, ...]
    """Widths of the hidden layers."""
    epochs: int
    """Passes over the training images."""
    batch_size: int
    """Images of a step."""
    imbalance_factor: float = 20.0
    """Training images of the largest class over those of the smallest."""
    profile: Profile = "exp"
    """How the counts fall from class to class."""
    momentum: float = 0.9
    """Nesterov momentum of SGD."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises; then it falls as a cosine."""
    evaluate_every: int = 10
    """Epochs between evaluations; the last epoch is always evaluated."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Arithmetic, in the words of lightning-fabric."""
    threads: int = 1
    """CPU threads: the steps of a small network are slower with more, and many times slower on a shared machine."""

    def __post_init__(self) -> None:
        counts = ("max_count", "tuning_max_count", "test_per_class", "validation_per_class")
        for name in (*counts, "epochs", "batch_size", "evaluate_every", "threads"):
            _at_least(name, getattr(self, name), 1)
        _at_least("imbalance_factor", self.imbalance_factor, 1)
        if not self.hidden or min(self.hidden) < 1:
            raise TrainerError(f"hidden: expected one width or more, each at least 1, got {self.hidden}")
        for name in ("momentum", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainerError(f"{name}: expected a number in [0, 1), got {getattr(self, name):g}")

    @property
    def methods(self) -> dict[str, Method]:
        """The methods by the name of their field, the baseline first."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if isinstance(value, Method)}

    @property
    def hash(self) -> str:
        """Twelve hex digits over every field: names what was trained, whatever the seeds, machine and data root."""
        resolved = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(resolved.encode()).hexdigest()[:12]


def _at_least(name: str, value: float, minimum: float, *, exclusive: bool = False) -> None:
    if not (math.isfinite(value) and (value > minimum if exclusive else value >= minimum)):
        raise TrainerError(f"{name}: expected a number {'>' if exclusive else '>='} {minimum:g}, got {value:g}")


# Settings of the methods: the best of 24 configurations each on the validation split, docs/digits.md.
RECIPES: dict[str, Recipe] = {
    "digits": Recipe(
        ce=CrossEntropy(lr=0.5, weight_decay=1e-4),
        logit_adjustment=LogitAdjustment(lr=0.3, weight_decay=5e-3, tau=1.0),
        ldam_drw=LDAMDRW(lr=0.1, weight_decay=1e-4, max_margin=0.3, scale=30.0, drw_start=0.6, beta=0.9999),
        vs=VectorScaling(lr=0.3, weight_decay=5e-3, gamma=0.1, tau=0.5),
        dataset="digits",
        max_count=120,
        tuning_max_count=90,
        test_per_class=50,
        validation_per_class=30,
        hidden=(256,),
        epochs=60,
        batch_size=64,
    ),
}
