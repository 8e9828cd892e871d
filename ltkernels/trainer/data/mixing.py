"""Mixtures of training images: mixup and cutmix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from scipy.special import betaincinv
from torch import Tensor

from ltkernels.trainer import TrainerError

MixingKind: TypeAlias = Literal["none", "mixup", "cutmix"]


@dataclass(frozen=True)
class Mixing:
    """How the images of a batch are mixed with each other."""

    kind: MixingKind = "none"
    """Mixup (arXiv:1710.09412), cutmix (arXiv:1905.04899) or none."""
    alpha: float = 1.0
    """The share of the first image is drawn from Beta(alpha, alpha)."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(MixingKind):
            raise TrainerError(f"kind: expected one of {', '.join(get_args(MixingKind))}, got {self.kind!r}")
        if not 0 < self.alpha < math.inf:
            raise TrainerError(f"alpha: expected a positive number, got {self.alpha}")


def mix(
    images: Tensor, target: Tensor, generator: torch.Generator, mixing: Mixing
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Mix every image with another one of the batch, all in the same proportion.

    The loss is ``lam * loss(logits, target_a) + (1 - lam) * loss(logits, target_b)``.

    Args:
        images: (B, C, H, W) floating point.
        target: (B,) int64.
        generator: Source of every random number, on any device.
        mixing: What is done; with ``"none"`` the images come back and no random number is drawn.

    Returns:
        Images, target_a, target_b and lam, the share of the first image: for cutmix the share of the area it kept.
    """
    if mixing.kind == "none":
        return images, target, target, 1.0
    device = generator.device
    share, row, column = torch.rand(3, dtype=torch.float64, generator=generator, device=device).tolist()
    partner = torch.randperm(len(images), generator=generator, device=device)
    partner = partner.to(images.device, non_blocking=images.is_cuda)  # other devices read it later
    # The quantile of a uniform number: torch's Beta distribution takes no generator.
    lam = float(betaincinv(mixing.alpha, mixing.alpha, share))
    if mixing.kind == "mixup":
        return torch.lerp(images[partner], images, lam), target, target[partner], lam
    height, width = images.shape[2:]
    rows = _stretch(height, math.sqrt(1 - lam), row)
    columns = _stretch(width, math.sqrt(1 - lam), column)
    mixed = images.clone()
    mixed[:, :, rows, columns] = images[partner, :, rows, columns]
    pasted = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, target, target[partner], 1 - pasted / (height * width)


def _stretch(length: int, share: float, position: float) -> slice:
    """``share`` of a side around ``position`` in [0, 1), rounded down and cut off at the border."""
    size, centre = int(length * share), int(length * position)
    return slice(max(0, centre - size // 2), min(length, centre + size // 2))
