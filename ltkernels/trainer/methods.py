"""The methods of the supervised table. A new method is one entry in ``METHODS``; a new loss is a settings class.

The command line shows every field of the settings: the text below a field is its help.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ltkernels import margins
from ltkernels.nn import BalancedSoftmaxLoss, CDTLoss, LDAMLoss, LogitAdjustedLoss, MarginCrossEntropyLoss, VSLoss
from ltkernels.trainer import TrainerError
from ltkernels.trainer.data.mixing import Mixing
from ltkernels.trainer.models.network import ImageNetwork
from ltkernels.trainer.models.small import Classifier
from ltkernels.trainer.papers.elm import WITH_PRIOR, ELMLoss, EmbeddingMarginLoss, Form

# LDAM's repository trains 200 epochs and re-weights from epoch 160 on.
DRW_START = 160 / 200
BETA = 0.9999


def _at_least(name: str, value: float, minimum: float, *, exclusive: bool = False) -> None:
    if not (math.isfinite(value) and (value > minimum if exclusive else value >= minimum)):
        raise TrainerError(f"{name}: expected a number {'>' if exclusive else '>='} {minimum:g}, got {value:g}")


def _share(name: str, value: float, *, below_one: bool = False) -> None:
    if not (0 <= value < 1 if below_one else 0 <= value <= 1):
        raise TrainerError(f"{name}: expected a number in [0, 1{')' if below_one else ']'}, got {value:g}")


class Objective(nn.Module):
    """Network and loss in one module: distributed training, compilation and captured graphs see the whole step.

    Args:
        network: Gives logits (N, C).
        loss: Of logits and class indices, a mean over the samples.

    Shape: images (N, ...), ``target`` and ``other`` (N,) int64; the loss is 0-d, with ``other`` the losses are (2,).
    """

    def __init__(self, network: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.loss = loss

    @property
    def criterion(self) -> MarginCrossEntropyLoss:
        """The loss of the logits: its scale, weights and schedule."""
        return self.loss

    def forward(self, images: Tensor, target: Tensor, other: Tensor | None = None) -> Tensor:
        """The loss for ``target``, or those for ``target`` and ``other``."""
        logits = self.network(images)
        loss = self.loss(logits, target)
        return loss if other is None else torch.stack([loss, self.loss(logits, other)])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimiser updates; a group may have a weight decay of its own."""
        return [{"params": list(self.parameters())}]


class EmbeddingObjective(Objective):
    """Network and a loss of its logits and embeddings.

    Args:
        network: Gives embeddings (N, D) and from them logits (N, C).
        loss: Of logits, embeddings and class indices.
    """

    def __init__(self, network: ImageNetwork, loss: ELMLoss) -> None:
        super().__init__(network, loss)

    @property
    def criterion(self) -> MarginCrossEntropyLoss:
        return self.loss.logit_loss

    def forward(self, images: Tensor, target: Tensor, other: Tensor | None = None) -> Tensor:
        """The loss; an image's part of it depends on the whole batch.

        Raises:
            ValueError: ``other`` is given.
        """
        if other is not None:
            raise ValueError("other: the embedding loss is that of a whole batch and cannot be mixed")
        embedding = self.network.features(images)
        return self.loss(self.network.classifier(embedding), embedding, target)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Prototypes without weight decay: only their directions count, and it would change how fast they turn."""
        prototypes = list(self.loss.embedding_loss.parameters())
        known = {id(parameter) for parameter in prototypes}
        rest = [parameter for parameter in self.parameters() if id(parameter) not in known]
        return [{"params": rest}, {"params": prototypes, "weight_decay": 0.0}]


class FocalLoss(MarginCrossEntropyLoss):
    r"""Focal loss :math:`-(1 - p_y)^\gamma \log p_y`, the mean over the samples, as the code of LDAM has it.

    Lin et al., arXiv:1708.02002, have sigmoids, a weight alpha and gamma 2.
    """

    def __init__(self, gamma: float) -> None:
        super().__init__(reduction="none")
        self.gamma = gamma

    def forward(
        self, input: Tensor, target: Tensor, *, mask: Tensor | None = None, sample_weight: Tensor | None = None
    ) -> Tensor:
        loss = super().forward(input, target, mask=mask, sample_weight=sample_weight)
        return ((-torch.expm1(-loss)) ** self.gamma * loss).mean()


@dataclass(frozen=True)
class MethodSettings:
    """A loss with its settings, and the classifier it needs."""

    classifier: ClassVar[Classifier] = "linear"
    contrasts_the_batch: ClassVar[bool] = False
    """Whether the loss of an image depends on the others: then a batch can be neither divided nor mixed."""

    def criterion(self, class_counts: Sequence[int], epochs: float) -> MarginCrossEntropyLoss:
        """The loss for these training images of each class and this number of epochs, which need not be whole."""
        raise NotImplementedError

    def objective(self, network: nn.Module, class_counts: Sequence[int], epochs: float) -> Objective:
        """What one step minimises; a method that needs more than the logits overrides this."""
        return Objective(network, self.criterion(class_counts, epochs))


@dataclass(frozen=True)
class CrossEntropy(MethodSettings):
    """Softmax cross-entropy."""

    def criterion(self, class_counts: Sequence[int], epochs: float) -> MarginCrossEntropyLoss:
        return MarginCrossEntropyLoss()


@dataclass(frozen=True)
class ClassBalanced(MethodSettings):
    """Cross-entropy with the weights of arXiv:1901.05555."""

    beta: float = BETA
    """Class weights are (1 - beta) / (1 - beta^n)."""

    def __post_init__(self) -> None:
        _share("beta", self.beta, below_one=True)

    def criterion(self, class_counts: Sequence[int], epochs: float) -> MarginCrossEntropyLoss:
        return MarginCrossEntropyLoss(weight=margins.class_balanced_weight(class_counts, self.beta))


@dataclass(frozen=True)
class Focal(MethodSettings):
    """Focal loss, arXiv:1708.02002."""

    gamma: float = 1.0
    """Samples count (1 - p)^gamma; at least 1."""

    def __post_init__(self) -> None:
        # Below 1 the gradient of a sample that is predicted with certainty is infinite.
        _at_least("gamma", self.gamma, 1)

    def criterion(self, class_counts: Sequence[int], epochs: float) -> MarginCrossEntropyLoss:
        return FocalLoss(self.gamma)


@dataclass(frozen=True)
class BalancedSoftmax(MethodSettings):
    """Balanced softmax, arXiv:2007.10740."""

    def criterion(self, class_counts: Sequence[int], epochs: float) -> MarginCrossEntropyLoss:
        return BalancedSoftmaxLoss(class_counts)


@dataclass(frozen=True)
class LogitAdjustment(MethodSettings):
    """Logit adjustment, arXiv:2007.07314."""

    tau: float = 1.0
    """Strength of the log-prior added to the logits in training."""

    def __post_init__(self) -> None:
        _at_least("tau", self.tau, 0)

    def criterion(self, class_counts: Sequence[int], epochs: float) -> MarginCrossEntropyLoss:
        return LogitAdjustedLoss(class_counts, self.tau)


@dataclass(frozen=True)
class ClassDependentTemperatures(MethodSettings):
    """CDT, arXiv:2001.01385."""

    gamma: float = 0.2
    """The logit of class j is multiplied by (n_j / n_max)^gamma in training."""

    def __post_init__(self) -> None:
        _at_least("gamma", self.gamma, 0)

    def criterion(self, class_counts: Sequence[int], epochs: float) -> MarginCrossEntropyLoss:
        return CDTLoss(class_counts, self.gamma)


@dataclass(frozen=True)
class LDAM(MethodSettings):
    """LDAM, with or without deferred re-weighting (DRW), arXiv:1906.07413."""

    max_margin: float = 0.5
    """Margin of the rarest class, on cosines."""
    scale: float = 30.0
    """Multiplies the cosines."""
    drw_start: float | None = None
    """Class weights begin after this share of the training, at the nearest epoch; None: never."""
    beta: float = BETA
    """Class weights of DRW are (1 - beta) / (1 - beta^n)."""

    classifier: ClassVar[Classifier] = "cosine"

    def __post_init__(self) -> None:
        _at_least("max_margin", self.max_margin, 0)
        _at_least("scale", self.scale, 0, exclusive=True)
        _share("beta", self.beta, below_one=True)
        if self.drw_start is not None:
            _share("drw_start", self.drw_start)

    def criterion(self, class_counts: Sequence[int], epochs: float) -> MarginCrossEntropyLoss:
        weight = None
        if self.drw_start is not None:
            weight = margins.DeferredReweighting(class_counts, round(self.drw_start * epochs), self.beta)
        return LDAMLoss(class_counts, self.max_margin, self.scale, weight=weight)


@dataclass(frozen=True)
class VectorScaling(MethodSettings):
    """VS, arXiv:2103.01550."""

    gamma: float
    """The logit of class j is multiplied by (n_j / n_max)^gamma in training."""
    tau: float
    """Strength of the log-prior added to the logits in training."""

    def __post_init__(self) -> None:
        _at_least("gamma", self.gamma, 0)
        _at_least("tau", self.tau, 0)

    def criterion(self, class_counts: Sequence[int], epochs: float) -> MarginCrossEntropyLoss:
        return VSLoss(class_counts, self.gamma, self.tau)


@dataclass(frozen=True)
class CosFace(MethodSettings):
    """CosFace: one margin for all classes, arXiv:1801.09414."""

    margin: float = 0.35
    """Margin on cosines."""
    scale: float = 30.0
    """Multiplies the cosines; 64 in the paper, for faces; here as in LDAM."""

    classifier: ClassVar[Classifier] = "cosine"

    def __post_init__(self) -> None:
        _at_least("margin", self.margin, 0)
        _at_least("scale", self.scale, 0, exclusive=True)

    def criterion(self, class_counts: Sequence[int], epochs: float) -> MarginCrossEntropyLoss:
        return MarginCrossEntropyLoss(margins.cosface(self.margin, self.scale, num_classes=len(class_counts)))


@dataclass(frozen=True)
class EmbeddingAndLogitMargins(MethodSettings):
    """ELM, arXiv:2204.13208: logit adjustment plus a loss of embeddings. The embedding loss is a reconstruction."""

    form: Form = "A"
    """Embedding loss: A mirror of the logit loss, B weighted supervised contrast, C class-pooled, D attraction only."""
    weight: float = 0.1
    """lambda, what the embedding loss is multiplied by."""
    tau: float = 1.0
    """Strength of the log-prior added to the logits in training."""
    temperature: float = 0.1
    """Of the similarities of embeddings."""
    tau_e: float = 1.0
    """Strength of the prior in the embedding loss; has to be 0 for forms B and D, which have none."""
    g: float = 0.0
    """Anchors of class y count (n_max / n_y)^g in the embedding loss."""

    contrasts_the_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("weight", "tau", "tau_e", "g"):
            _at_least(name, getattr(self, name), 0)
        _at_least("temperature", self.temperature, 0, exclusive=True)
        if self.tau_e and self.form not in WITH_PRIOR:
            raise TrainerError(f"tau_e: form {self.form} has no prior, expected 0, got {self.tau_e:g}")

    def criterion(self, class_counts: Sequence[int], epochs: float) -> MarginCrossEntropyLoss:
        return LogitAdjustedLoss(class_counts, self.tau)

    def objective(self, network: ImageNetwork, class_counts: Sequence[int], epochs: float) -> Objective:
        embedding_loss = EmbeddingMarginLoss(
            class_counts, network.embedding_dim, self.form, self.temperature, self.tau_e, self.g
        )
        return EmbeddingObjective(network, ELMLoss(self.criterion(class_counts, epochs), embedding_loss, self.weight))


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        title: Its name in tables.
        settings: The loss with the settings fixed before any run.
        for_task: Other settings for some tasks, as recipes name them: a data set, its tail and a network.
        mixing: Mixing of images, where that is what the method is about.
        views: Augmented copies of every image in its batch.
    """

    title: str
    settings: MethodSettings
    for_task: Mapping[str, MethodSettings] = field(default_factory=dict)
    mixing: Mixing = field(default_factory=Mixing)
    views: int = 1

    def settings_for(self, task: str) -> MethodSettings:
        return self.for_task.get(task, self.settings)


METHODS: dict[str, Method] = {
    "ce": Method("CE", CrossEntropy()),
    "class-balanced": Method("class-balanced CE", ClassBalanced()),
    "focal": Method("focal", Focal()),
    "balanced-softmax": Method("balanced softmax", BalancedSoftmax()),
    "logit-adjustment": Method("logit adj.", LogitAdjustment()),
    "cdt": Method("CDT", ClassDependentTemperatures()),
    "ldam": Method("LDAM", LDAM()),
    "ldam-drw": Method("LDAM-DRW", LDAM(drw_start=DRW_START)),
    # Pairs that somebody has used: an example in the authors' README for CIFAR-10, DDC's command for CIFAR-100.
    "vs": Method("VS", VectorScaling(gamma=0.05, tau=1.0), {"cifar10-lt": VectorScaling(gamma=0.2, tau=1.2)}),
    "cosface": Method("CosFace", CosFace()),
    "ce-mixup": Method("CE + mixup", CrossEntropy(), mixing=Mixing(kind="mixup", alpha=1.0)),
    "ce-cutmix": Method("CE + cutmix", CrossEntropy(), mixing=Mixing(kind="cutmix", alpha=1.0)),
    "logit-adjustment-mixup": Method("logit adj. + mixup", LogitAdjustment(), mixing=Mixing(kind="mixup", alpha=1.0)),
    # ELM, and what it is compared with at the same number of views and steps.
    "two-view-ce": Method("CE, two views", CrossEntropy(), views=2),
    "two-view-logit-adjustment": Method("logit adj., two views", LogitAdjustment(), views=2),
    # Where another lambda is best on validation images (tables elm-tuning-...).
    "elm": Method("ELM (A)", EmbeddingAndLogitMargins(), {"fashion-lt": EmbeddingAndLogitMargins(weight=0.3)}, views=2),
}
