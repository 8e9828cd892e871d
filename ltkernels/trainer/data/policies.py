"""AutoAugment and RandAugment of whole batches of uint8 images, on their device.

Each image has operations of its own. They are those of Pillow, to the bit but for ties of rounding, with the ranges
that long-tailed CIFAR recipes use. Kornia 0.9 draws one policy for the whole batch, maps levels to one sign, shears by
angles of up to 54 degrees for slopes of 0.3, and takes no generator.

There is no branch on the data: every image goes through a warp, a table of 256 values for each channel and a blend,
each of which leaves images alone that are not meant. Nothing waits for the host, and a step can be captured.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor, nn

# Pixels that a warp leaves empty: grey.
FILL = 128


class Operation(IntEnum):
    """The operations of the policies."""

    IDENTITY = 0
    SHEAR_X = 1
    SHEAR_Y = 2
    TRANSLATE_X = 3
    TRANSLATE_Y = 4
    ROTATE = 5
    BRIGHTNESS = 6
    COLOR = 7
    CONTRAST = 8
    SHARPNESS = 9
    POSTERIZE = 10
    SOLARIZE = 11
    AUTO_CONTRAST = 12
    EQUALIZE = 13
    INVERT = 14


# Largest magnitudes of operations that go either way: slopes, shares of the side, degrees, and distance of the
# factor from 1.
_LARGEST = {
    Operation.SHEAR_X: 0.3,
    Operation.SHEAR_Y: 0.3,
    Operation.TRANSLATE_X: 150 / 331,
    Operation.TRANSLATE_Y: 150 / 331,
    Operation.ROTATE: 30.0,
    Operation.BRIGHTNESS: 0.9,
    Operation.COLOR: 0.9,
    Operation.CONTRAST: 0.9,
    Operation.SHARPNESS: 0.9,
}


def magnitude_of(operation: Operation, strength: float) -> float:
    """Magnitude at a strength in [0, 1]; bits that stay for posterize, the threshold for solarize, 0 without any."""
    if operation == Operation.POSTERIZE:
        return 8 - round(4 * strength)
    if operation == Operation.SOLARIZE:
        return 256 * (1 - strength)
    return _LARGEST.get(operation, 0.0) * strength


def integers(uniforms: Tensor, count: int) -> Tensor:
    """Integers 0 .. count - 1 from numbers of [0, 1).

    A float32 below 1 is at most 1 - 2^-24, and its product with a count rounds to less than the count.
    """
    return (uniforms * count).long()


_O = Operation
# Cubuk et al., arXiv:1805.09501, CIFAR-10: two operations each, with probability and level 0 to 9.
CIFAR10_POLICY: tuple[tuple[tuple[Operation, float, int], tuple[Operation, float, int]], ...] = (
    ((_O.INVERT, 0.1, 0), (_O.CONTRAST, 0.2, 6)),
    ((_O.ROTATE, 0.7, 2), (_O.TRANSLATE_X, 0.3, 9)),
    ((_O.SHARPNESS, 0.8, 1), (_O.SHARPNESS, 0.9, 3)),
    ((_O.SHEAR_Y, 0.5, 8), (_O.TRANSLATE_Y, 0.7, 9)),
    ((_O.AUTO_CONTRAST, 0.5, 0), (_O.EQUALIZE, 0.9, 0)),
    ((_O.SHEAR_Y, 0.2, 7), (_O.POSTERIZE, 0.3, 7)),
    ((_O.COLOR, 0.4, 3), (_O.BRIGHTNESS, 0.6, 7)),
    ((_O.SHARPNESS, 0.3, 9), (_O.BRIGHTNESS, 0.7, 9)),
    ((_O.EQUALIZE, 0.6, 0), (_O.EQUALIZE, 0.5, 0)),
    ((_O.CONTRAST, 0.6, 7), (_O.SHARPNESS, 0.6, 5)),
    ((_O.COLOR, 0.7, 7), (_O.TRANSLATE_X, 0.5, 8)),
    ((_O.EQUALIZE, 0.3, 0), (_O.AUTO_CONTRAST, 0.4, 0)),
    ((_O.TRANSLATE_Y, 0.4, 3), (_O.SHARPNESS, 0.2, 6)),
    ((_O.BRIGHTNESS, 0.9, 6), (_O.COLOR, 0.2, 8)),
    ((_O.SOLARIZE, 0.5, 2), (_O.INVERT, 0.0, 0)),
    ((_O.EQUALIZE, 0.2, 0), (_O.AUTO_CONTRAST, 0.6, 0)),
    ((_O.EQUALIZE, 0.2, 0), (_O.EQUALIZE, 0.6, 0)),
    ((_O.COLOR, 0.9, 9), (_O.EQUALIZE, 0.6, 0)),
    ((_O.AUTO_CONTRAST, 0.8, 0), (_O.SOLARIZE, 0.2, 8)),
    ((_O.BRIGHTNESS, 0.1, 3), (_O.COLOR, 0.7, 0)),
    ((_O.SOLARIZE, 0.4, 5), (_O.AUTO_CONTRAST, 0.9, 0)),
    ((_O.TRANSLATE_Y, 0.9, 9), (_O.TRANSLATE_Y, 0.7, 9)),
    ((_O.AUTO_CONTRAST, 0.9, 0), (_O.SOLARIZE, 0.8, 3)),
    ((_O.EQUALIZE, 0.8, 0), (_O.INVERT, 0.1, 0)),
    ((_O.TRANSLATE_Y, 0.7, 9), (_O.AUTO_CONTRAST, 0.9, 0)),
)


class AutoAugment(nn.Module):
    """The policy found on CIFAR-10: one of 25 pairs of operations for each image, each done with its probability.

    Shape: images (B, C, H, W) uint8 with C 1 or 3, uniform numbers (5, B) in [0, 1); output like the images.
    """

    LARGEST_LEVEL = 9
    operation: Tensor
    probability: Tensor
    magnitude: Tensor
    either_way: Tensor

    def __init__(self) -> None:
        super().__init__()
        steps = list(zip(*CIFAR10_POLICY, strict=True))  # first operations, second operations
        table = [[(o, p, magnitude_of(o, level / self.LARGEST_LEVEL)) for o, p, level in step] for step in steps]
        columns = torch.tensor(table, dtype=torch.float64).unbind(2)
        self.register_buffer("operation", columns[0].long(), persistent=False)  # (2, 25), like the others
        self.register_buffer("probability", columns[1].float(), persistent=False)
        self.register_buffer("magnitude", columns[2].float(), persistent=False)
        either_way = torch.tensor([[o in _LARGEST for o, _, _ in step] for step in steps])
        self.register_buffer("either_way", either_way, persistent=False)

    @property
    def draws(self) -> int:
        """Uniform numbers for an image: the pair, and for each operation whether it is done and its direction."""
        return 5

    def forward(self, images: Tensor, uniforms: Tensor) -> Tensor:
        pair = integers(uniforms[0], len(CIFAR10_POLICY))
        for step in range(2):
            done, direction = uniforms[1 + 2 * step : 3 + 2 * step]
            operation = torch.where(done < self.probability[step, pair], self.operation[step, pair], _O.IDENTITY)
            magnitude = self.magnitude[step, pair]
            magnitude = torch.where(self.either_way[step, pair] & (direction < 0.5), -magnitude, magnitude)
            images = apply(images, operation, magnitude)
        return images


class RandAugment(nn.Module):
    """Operations drawn with replacement from all 14 but inversion, all of one strength. Cubuk et al., arXiv:1909.13719.

    Args:
        operations: For each image.
        magnitude: Strength, 0 to 30.

    Shape: images (B, C, H, W) uint8 with C 1 or 3, uniform numbers (2 * operations, B) in [0, 1); output like the
    images.
    """

    LARGEST_MAGNITUDE = 30
    CHOICES = tuple(operation for operation in Operation if operation != Operation.INVERT)
    magnitude: Tensor
    either_way: Tensor

    def __init__(self, operations: int, magnitude: int) -> None:
        super().__init__()
        self.operations = operations
        magnitudes = [magnitude_of(operation, magnitude / self.LARGEST_MAGNITUDE) for operation in self.CHOICES]
        self.register_buffer("magnitude", torch.tensor(magnitudes, dtype=torch.float32), persistent=False)
        either_way = torch.tensor([operation in _LARGEST for operation in self.CHOICES])
        self.register_buffer("either_way", either_way, persistent=False)

    @property
    def draws(self) -> int:
        """Uniform numbers for an image: for each operation which one and its direction."""
        return 2 * self.operations

    def forward(self, images: Tensor, uniforms: Tensor) -> Tensor:
        for which, direction in uniforms.view(self.operations, 2, len(images)):
            operation = integers(which, len(self.CHOICES))  # inversion is the last
            magnitude = self.magnitude[operation]
            magnitude = torch.where(self.either_way[operation] & (direction < 0.5), -magnitude, magnitude)
            images = apply(images, operation, magnitude)
        return images


def apply(images: Tensor, operation: Tensor, magnitude: Tensor) -> Tensor:
    """One operation on each image.

    Args:
        images: (B, C, H, W) uint8, C 1 or 3.
        operation: (B,) int64, :class:`Operation`.
        magnitude: (B,) float32, as :func:`magnitude_of` gives it, negative for the other direction.
    """
    images = _warp(images, operation, magnitude)
    images = _look_up(images, operation, magnitude)
    return _blend(images, operation, magnitude)


def _warp(images: Tensor, operation: Tensor, magnitude: Tensor) -> Tensor:
    """Shears about the upper left corner, translations and rotations about the centre, to the nearest pixel."""
    height, width = images.shape[2:]

    def only(kind: Operation, value: Tensor) -> Tensor:
        return torch.where(operation == kind, value, 0.0)[:, None, None]

    angle = only(Operation.ROTATE, magnitude * (math.pi / 180))
    # Centres of the pixels, so that the nearest pixel is the one a point lies in.
    x = torch.arange(width, device=images.device)[None, None, :] + 0.5
    y = torch.arange(height, device=images.device)[None, :, None] + 0.5
    from_x, from_y = x - width / 2, y - height / 2
    source_x = angle.cos() * from_x - angle.sin() * from_y + width / 2
    source_y = angle.sin() * from_x + angle.cos() * from_y + height / 2
    source_x = source_x + only(Operation.SHEAR_X, magnitude) * y + only(Operation.TRANSLATE_X, magnitude * width)
    source_y = source_y + only(Operation.SHEAR_Y, magnitude) * x + only(Operation.TRANSLATE_Y, magnitude * height)
    column, row = source_x.floor().long(), source_y.floor().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    pixels = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).flatten(1)[:, None]
    warped = images.flatten(2).gather(2, pixels.expand(-1, images.shape[1], -1)).view(images.shape)
    return torch.where(inside[:, None], warped, FILL)


def _look_up(images: Tensor, operation: Tensor, magnitude: Tensor) -> Tensor:
    """The operations that send each value of a channel to another one."""
    pixels = images.flatten(2).long()
    values = torch.arange(256, device=images.device)
    bits_lost = torch.where(operation == Operation.POSTERIZE, 8 - magnitude.long(), 0)[:, None, None]
    table = (
        (Operation.POSTERIZE, (values >> bits_lost) << bits_lost),
        (Operation.SOLARIZE, torch.where(values < magnitude[:, None, None], values, 255 - values)),
        (Operation.INVERT, 255 - values),
        (Operation.AUTO_CONTRAST, _stretched(pixels, values)),
        (Operation.EQUALIZE, _equalised(pixels, values)),
    )
    chosen = values
    for kind, of_kind in table:
        chosen = torch.where((operation == kind)[:, None, None], of_kind, chosen)
    return chosen.to(torch.uint8).expand(*pixels.shape[:2], -1).gather(2, pixels).view(images.shape)


def _stretched(pixels: Tensor, values: Tensor) -> Tensor:
    """(B, C, 256): the darkest value of a channel becomes 0, the brightest 255; a flat channel stays."""
    darkest, brightest = pixels.amin(2, keepdim=True), pixels.amax(2, keepdim=True)
    stretched = ((values - darkest) * 255 // (brightest - darkest).clamp(min=1)).clamp(0, 255)
    return torch.where(brightest > darkest, stretched, values)


def _equalised(pixels: Tensor, values: Tensor) -> Tensor:
    """(B, C, 256): values of a channel become equally frequent, as far as their histogram can be levelled."""
    histogram = pixels.new_zeros(*pixels.shape[:2], 256)
    histogram.scatter_add_(2, pixels, torch.ones_like(pixels))
    last = histogram.gather(2, pixels.amax(2, keepdim=True))
    step = (pixels.shape[2] - last) // 255
    below = histogram.cumsum(2) - histogram
    equalised = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, equalised, values)


def _blend(images: Tensor, operation: Tensor, magnitude: Tensor) -> Tensor:
    """The enhancements: from a degenerate image to this one and beyond, by a factor of 1 + magnitude."""
    kind = operation[:, None, None, None]
    grey = _luma(images)
    # The mean, rounded: as integers, because a float32 sum of many pixels would round.
    count = grey[0].numel()
    mean = (2 * grey.long().sum((1, 2, 3), keepdim=True) + count) // (2 * count)
    degenerate = torch.where(kind == Operation.COLOR, grey, 0)
    degenerate = torch.where(kind == Operation.CONTRAST, mean.to(grey.dtype), degenerate)
    degenerate = torch.where(kind == Operation.SHARPNESS, _smooth(images), degenerate).float()
    enhanced = (operation >= Operation.BRIGHTNESS) & (operation <= Operation.SHARPNESS)
    factor = torch.where(enhanced, 1 + magnitude, 1.0)[:, None, None, None]
    blended = degenerate + factor * (images - degenerate)
    return blended.clamp(0, 255).to(torch.uint8)


def _luma(images: Tensor) -> Tensor:
    """(B, 1, H, W) int32: luma of ITU-R 601 in the fixed-point form of Pillow."""
    if images.shape[1] == 1:
        return images.int()
    red, green, blue = images.int().split(1, 1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _smooth(images: Tensor) -> Tensor:
    """(B, C, H, W) int32: mean of 3 x 3 pixels with the middle one counted five times; the border stays."""
    smooth = images.int()
    inner = smooth[:, :, 1:-1, 1:-1]
    rows = smooth[:, :, :-2] + smooth[:, :, 1:-1] + smooth[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner
    smooth[:, :, 1:-1, 1:-1] = (2 * total + 13) // 26  # total / 13, rounded
    return smooth
