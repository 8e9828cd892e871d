"""What ELM claims, as numbers of a trained network: how tight classes are, and how much worse it is on test images."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ltkernels.trainer import TrainerError
from ltkernels.trainer.metrics import Outputs, shot_group, thirds

SMALLEST_THIRD = "smallest third"
GROUPS = ("all", "many", "medium", "few", SMALLEST_THIRD)
COINCIDE = 1e-24  # squared distance of two means: the rounding of float64, for embeddings of length 1


@dataclass(frozen=True, eq=False)
class ElmMeasures:
    """Measures of each class, (C,) float64 on the CPU; :func:`measure` says what they are."""

    class_counts: Tensor
    """Training images of each class, int64."""
    spread: Tensor
    """Of embeddings of length 1: from 0, all on the class mean, to 4 n / (n - 1)."""
    relative_spread: Tensor
    """Spread over the squared distance to the nearest other class mean."""
    raw_spread: Tensor
    """Spread of embeddings as they are; shorter ones lower it, so read it beside ``norm``."""
    norm: Tensor
    """Mean length of the test embeddings."""
    error_gap: Tensor
    """Error on test images minus error on training images, in percentage points."""
    loss_gap: Tensor
    """Cross-entropy on test images minus that on training images, in nats."""
    margin_gap: Tensor
    """Margin (logit of the class minus the largest other) on training images minus that on test images."""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The measures, without the counts."""
        return tuple(field.name for field in dataclasses.fields(cls) if field.name != "class_counts")

    def group_means(self) -> dict[str, dict[str, float | None]]:
        """Mean over the classes of each of ``GROUPS``; None for a group without any."""
        counts = self.class_counts.tolist()
        members_of = {"all": list(range(len(counts))), SMALLEST_THIRD: thirds(counts)[2]}
        means = {}
        for group in GROUPS:
            members = members_of.get(group) or [k for k, count in enumerate(counts) if shot_group(count) == group]
            means[group] = {
                name: getattr(self, name)[members].mean().item() if members else None for name in self.names()
            }
        return means

    def to_json(self) -> str:
        """Every number to the last bit, and the group means for the reader."""
        lists = {field.name: getattr(self, field.name).tolist() for field in dataclasses.fields(self)}
        return json.dumps({**lists, "group_means": self.group_means()}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> ElmMeasures:
        """What :meth:`to_json` wrote.

        Raises:
            TrainerError: the text is something else.
        """
        try:
            lists = json.loads(text)
            values = {name: torch.tensor(lists[name], dtype=torch.float64) for name in cls.names()}
            return cls(class_counts=torch.tensor(lists["class_counts"], dtype=torch.int64), **values)
        except (ValueError, KeyError, TypeError) as error:
            raise TrainerError(f"ELM measures: expected the JSON that to_json writes: {error!r}") from error


def measure(train: Outputs, test: Outputs, scale: float = 1.0) -> ElmMeasures:
    r"""The measures of a network, from its outputs in evaluation mode.

    For class y with n test images of embeddings :math:`z_i`, divided by their length, and the mean :math:`\mu_y` of
    its *training* embeddings, divided by theirs:

    .. math:: \mathrm{spread}_y = \frac{n}{n - 1} \operatorname{mean}_i |z_i - \mu_y|^2, \qquad
        \mathrm{relative}_y = \mathrm{spread}_y / \min_{c \ne y} |\mu_c - \mu_y|^2

    The mean of :math:`n_y` training images is itself off by about 1 / :math:`n_y` of their variance, which raises the
    spread of the rarest classes: compare methods class by class, not rare classes with frequent ones.

    Args:
        train: Outputs for all training images, *without* augmentation; they say how many images a class has.
        test: Outputs for the test images, at least two of every class.
        scale: Of the logits in the loss, for cosines. No other margin or prior is part of the gaps.

    Raises:
        TrainerError: wrong shapes, values that are not finite, fewer than two classes, a class without training images
            or with fewer than two test images, class means that coincide.
    """
    classes = train.logits.shape[-1]
    train, test = _checked("train", train, classes, at_least=1), _checked("test", test, classes, at_least=2)
    unit_train, unit_test = F.normalize(train.embedding, dim=1), F.normalize(test.embedding, dim=1)
    means = _class_mean(unit_train, train.target, classes)
    spread = _spread(unit_test, test.target, means)
    gaps = [_class_mean(x, test.target, classes) - _class_mean(y, train.target, classes)
            for x, y in zip(_scores(test, scale), _scores(train, scale), strict=True)]  # fmt: skip
    return ElmMeasures(
        class_counts=torch.bincount(train.target, minlength=classes),
        spread=spread,
        relative_spread=spread / _to_nearest(means),
        raw_spread=_spread(test.embedding, test.target, _class_mean(train.embedding, train.target, classes)),
        norm=_class_mean(test.embedding.norm(dim=1), test.target, classes),
        error_gap=gaps[0],
        loss_gap=gaps[1],
        margin_gap=-gaps[2],
    )


def _scores(outputs: Outputs, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Error in percent, cross-entropy and margin of each image, (N,)."""
    logits, target = scale * outputs.logits, outputs.target
    error = 100 * (logits.argmax(1) != target).double()
    largest_other = logits.scatter(1, target[:, None], -torch.inf).amax(1)
    margin = logits.gather(1, target[:, None])[:, 0] - largest_other
    return error, F.cross_entropy(logits, target, reduction="none"), margin


def _spread(embedding: Tensor, target: Tensor, means: Tensor) -> Tensor:
    classes = len(means)
    images = torch.bincount(target, minlength=classes)
    return images / (images - 1) * _class_mean((embedding - means[target]).square().sum(1), target, classes)


def _to_nearest(means: Tensor) -> Tensor:
    """(C,) squared distance of each mean to the nearest other one."""
    # From differences: in |a|^2 + |b|^2 - 2ab, which cdist uses, close means cancel.
    distance = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist").square()
    nearest, other = distance.fill_diagonal_(torch.inf).min(1)
    if nearest.min() < COINCIDE:
        label = int(nearest.argmin())
        pair = sorted((label, int(other[label])))
        raise TrainerError(
            f"train: the mean embeddings of classes {pair[0]} and {pair[1]} coincide, no relative spread"
        )
    return nearest


def _class_mean(values: Tensor, target: Tensor, classes: int) -> Tensor:
    """Mean of values (N, ...) over the images of each class, (C, ...)."""
    sums = values.new_zeros(classes, *values.shape[1:]).index_add(0, target, values)
    return sums / torch.bincount(target, minlength=classes).view(-1, *[1] * (values.dim() - 1))


def _checked(name: str, outputs: Outputs, classes: int, at_least: int) -> Outputs:
    """The outputs in float64 on the CPU."""
    embedding, logits, target = outputs
    rows = len(target)
    if embedding.dim() != 2 or len(embedding) != rows or logits.shape != (rows, classes) or target.dim() != 1:
        found = ", ".join(str(tuple(x.shape)) for x in outputs)
        raise TrainerError(f"{name}: expected shapes (N, D), (N, {classes}) and (N,), got {found}")
    if classes < 2:
        raise TrainerError(f"{name}: expected two classes or more, got {classes}")
    embedding, logits, target = embedding.double().cpu(), logits.double().cpu(), target.long().cpu()
    for part, x in (("embedding", embedding), ("logits", logits)):
        if not x.isfinite().all():
            raise TrainerError(f"{name}: {part} holds values that are not finite")
    if ((target < 0) | (target >= classes)).any():
        raise TrainerError(f"{name}: expected classes from 0 to {classes - 1}")
    images = torch.bincount(target, minlength=classes)
    if images.min() < at_least:
        label = int(images.argmin())
        raise TrainerError(f"{name}: expected at least {at_least} images of a class, got {images[label]} of {label}")
    return Outputs(embedding, logits, target)
