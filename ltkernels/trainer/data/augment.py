"""Augmentation of whole batches on the device of the images.

Every random number of a batch is one tensor of uniform numbers from the caller's generator: a run that is resumed with
the state of its generator repeats each batch bit for bit, and what is done with the numbers never waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltkernels.trainer import TrainerError
from ltkernels.trainer.data.policies import AutoAugment, RandAugment, integers

Policy: TypeAlias = Literal["none", "crop-flip", "autoaugment", "randaugment"]
# Uniform numbers for an image: row offset, column offset, flip; row and column of the square.
_CROP_FLIP_DRAWS = 3
_CUTOUT_DRAWS = 2


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images, in this order: crop and flip, operations of the policy, cutout."""

    policy: Policy = "crop-flip"
    """Random crop and horizontal flip, alone or followed by AutoAugment (policy of CIFAR-10) or RandAugment."""
    padding: int = 4
    """Black pixels around an image before the random crop."""
    operations: int = 2
    """RandAugment: operations for each image."""
    magnitude: int = 9
    """RandAugment: strength of the operations, 0 to 30."""
    cutout: int = 0
    """Side of the square of mean colour that is put at a random place; 0: none."""

    def __post_init__(self) -> None:
        if self.policy not in get_args(Policy):
            raise TrainerError(f"policy: expected one of {', '.join(get_args(Policy))}, got {self.policy!r}")
        for name in ("padding", "operations", "magnitude", "cutout"):
            if getattr(self, name) < 0:
                raise TrainerError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if self.magnitude > RandAugment.LARGEST_MAGNITUDE:
            raise TrainerError(f"magnitude: expected 0..{RandAugment.LARGEST_MAGNITUDE}, got {self.magnitude}")


class BatchAugment(nn.Module):
    """Augments and normalises images of one size, each image in its own way.

    Args:
        augmentation: What is done.
        image_size: Side of the images, or their height and width.
        channels: C.
        mean, std: C values each, of pixels divided by 255.

    Shape: images (B, C, H, W) uint8 and a generator, on any device; output (B, C, H, W) float32, contiguous, on the
    device of the images.

    Raises:
        TrainerError: the constants do not fit the channels, a policy is asked for of images that are neither grey nor
            RGB, or the square is larger than the image.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        augmentation: Augmentation,
        image_size: int | tuple[int, int],
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.augmentation = augmentation
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if not len(mean) == len(std) == channels:
            raise TrainerError(f"mean and std: expected {channels} values each, got {len(mean)} and {len(std)}")
        if min(std) <= 0:
            raise TrainerError(f"std: expected positive values, got {tuple(std)}")
        if augmentation.cutout > min(self.image_size):
            raise TrainerError(f"cutout: expected at most {min(self.image_size)}, got {augmentation.cutout}")
        self.channels = channels
        # (x / 255 - mean) / std is x * scale + shift. Settings, not state: a checkpoint does not hold them.
        scale = [1 / (255 * of_channel) for of_channel in std]
        shift = [-of_mean / of_std for of_mean, of_std in zip(mean, std, strict=True)]
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.policy: AutoAugment | RandAugment | None = None
        if augmentation.policy in ("autoaugment", "randaugment"):
            if channels not in (1, 3):
                raise TrainerError(f"policy {augmentation.policy}: needs 1 or 3 channels, the images have {channels}")
            randaugment = augmentation.policy == "randaugment"
            self.policy = RandAugment(augmentation.operations, augmentation.magnitude) if randaugment else AutoAugment()

    def forward(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return self.transform(images, self.draw(len(images), generator))

    @property
    def draws(self) -> int:
        """Uniform numbers for an image."""
        crop_flip = 0 if self.augmentation.policy == "none" else _CROP_FLIP_DRAWS
        cutout = _CUTOUT_DRAWS if self.augmentation.cutout else 0
        return crop_flip + (self.policy.draws if self.policy else 0) + cutout

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """The random numbers for ``count`` images: (draws, count) in [0, 1), on the device of the generator."""
        return torch.rand(self.draws, count, generator=generator, device=generator.device)

    def transform(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """What :meth:`forward` makes of the images with the random numbers of :meth:`draw`; can be captured."""
        expected = (self.channels, *self.image_size)
        if images.dtype != torch.uint8 or images.shape[1:] != expected:
            raise ValueError(f"images: expected uint8 (B, *{expected}), got {images.dtype} {tuple(images.shape)}")
        uniforms = uniforms.to(images.device, non_blocking=True)
        if self.augmentation.policy != "none":
            offsets, uniforms = uniforms[:_CROP_FLIP_DRAWS], uniforms[_CROP_FLIP_DRAWS:]
            rows, columns = integers(offsets[:2], 2 * self.augmentation.padding + 1)
            images = crop_and_flip(images, self.augmentation.padding, rows, columns, offsets[2] < 0.5)
        if self.policy is not None:
            images, uniforms = self.policy(images, uniforms[: self.policy.draws]), uniforms[self.policy.draws :]
        normalised = self.normalise(images)
        if self.augmentation.cutout:
            height, width = self.image_size
            rows, columns = integers(uniforms[0], height), integers(uniforms[1], width)
            normalised.masked_fill_(square(self.image_size, self.augmentation.cutout, rows, columns)[:, None], 0.0)
        return normalised

    def normalise(self, images: Tensor) -> Tensor:
        """Images of an evaluation: (B, C, H, W) uint8 to float32 of mean 0 and standard deviation 1 a channel."""
        return torch.addcmul(self.shift, images.contiguous().float(), self.scale)


def crop_and_flip(images: Tensor, padding: int, rows: Tensor, columns: Tensor, flip: Tensor) -> Tensor:
    """Pad with zeros, cut out the original size, flip left to right: each image with its own offsets.

    Args:
        images: (B, C, H, W).
        padding: Pixels on each side.
        rows, columns: (B,) int64, corner of the cut in the padded image, 0 to 2 * padding.
        flip: (B,) bool.
    """
    batch, channels, height, width = images.shape
    padded = F.pad(images.contiguous(), (padding,) * 4)
    x = torch.arange(width, device=images.device)
    x = torch.where(flip[:, None], width - 1 - x, x) + columns[:, None]
    y = torch.arange(height, device=images.device) + rows[:, None]
    pixels = (y[:, :, None] * padded.shape[3] + x[:, None, :]).view(batch, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, pixels).view_as(images)


def square(image_size: tuple[int, int], side: int, rows: Tensor, columns: Tensor) -> Tensor:
    """(B, H, W) bool: a square around (rows, columns), each (B,) int64; parts beyond the border are lost.

    DeVries and Taylor, arXiv:1708.04552.
    """

    def inside(length: int, centre: Tensor) -> Tensor:
        distance = torch.arange(length, device=centre.device) - centre[:, None] + side // 2
        return (distance >= 0) & (distance < side)

    height, width = image_size
    return inside(height, rows)[:, :, None] & inside(width, columns)[:, None, :]
