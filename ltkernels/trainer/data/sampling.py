"""Which images an epoch trains on, and in which order. Kang et al., arXiv:1910.09217."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ltkernels.trainer import TrainerError

Sampling: TypeAlias = Literal["instance", "class-balanced", "square-root", "progressive"]


def epoch_order(
    kind: Sampling,
    labels: Tensor,
    num_classes: int,
    epoch: int,
    epochs: int,
    generator: torch.Generator,
    size: int | None = None,
) -> Tensor:
    """Indices of the images of an epoch.

    ``"instance"`` takes every image once; with a larger ``size`` it goes through all of them again, with a smaller one
    it leaves images out. The others draw with replacement, a class first and then one of its images:
    ``"class-balanced"`` every class alike, ``"square-root"`` in proportion to the root of its size, ``"progressive"``
    in proportion to its size in epoch 0 and moving to every class alike by 1 / epochs an epoch.

    Args:
        kind: How images are drawn.
        labels: (N,) int64 in [0, num_classes); a class without images is never drawn.
        num_classes: C.
        epoch: Counts from 0.
        epochs: Of the whole run.
        generator: Source of every random number, on any device.
        size: Images to draw; N if not given.

    Returns:
        (size,) int64 on the device of the labels.

    Raises:
        TrainerError: there is no such kind, no image, or ``size`` is below 1.
    """
    if kind not in get_args(Sampling):
        raise TrainerError(f"sampling: expected one of {', '.join(get_args(Sampling))}, got {kind!r}")
    total = len(labels)
    size = total if size is None else size
    if total == 0 or size < 1:
        raise TrainerError(f"sampling: expected images to draw from and a size of at least 1, got {total} and {size}")
    device = generator.device
    if kind == "instance":
        passes = [torch.randperm(total, generator=generator, device=device) for _ in range(-(-size // total))]
        return torch.cat(passes)[:size].to(labels.device)

    there = labels.to(device)
    counts = torch.bincount(there, minlength=num_classes)
    shares = class_shares(kind, counts, epoch / epochs)
    classes = torch.multinomial(shares, size, replacement=True, generator=generator)
    position = torch.rand(size, dtype=torch.float64, generator=generator, device=device)
    by_class = torch.argsort(there, stable=True)
    first = counts.cumsum(0) - counts
    return by_class[first[classes] + (position * counts[classes]).long()].to(labels.device)


def class_shares(kind: Sampling, counts: Tensor, progress: float) -> Tensor:
    """(C,) float64: probability of each class, from its number of images and the share of the run that is done."""
    power = {"instance": 1.0, "class-balanced": 0.0, "square-root": 0.5, "progressive": 1.0}[kind]
    present = counts > 0
    shares = torch.where(present, counts.double() ** power, 0.0)
    shares = shares / shares.sum()
    if kind == "progressive":
        return (1 - progress) * shares + progress * present / present.sum()
    return shares
