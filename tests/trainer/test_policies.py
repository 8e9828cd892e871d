"""AutoAugment and RandAugment against Pillow, image by image, and the distribution of what they draw."""

import pytest
import torch

pytest.importorskip("PIL", reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")

import numpy as np  # noqa: E402
from PIL import Image, ImageEnhance, ImageOps  # noqa: E402

from ltkernels.trainer.data.policies import (  # noqa: E402
    CIFAR10_POLICY,
    AutoAugment,
    Operation,
    RandAugment,
    apply,
    integers,
    magnitude_of,
)

AFFINE = Image.Transform.AFFINE
GREY = (128, 128, 128)
WARPS = (Operation.SHEAR_X, Operation.SHEAR_Y, Operation.TRANSLATE_X, Operation.TRANSLATE_Y, Operation.ROTATE)


# Appendix of arXiv:1805.09501: operation, probability, level.
PUBLISHED_POLICY = """
invert 0.1 0, contrast 0.2 6
rotate 0.7 2, translate-x 0.3 9
sharpness 0.8 1, sharpness 0.9 3
shear-y 0.5 8, translate-y 0.7 9
auto-contrast 0.5 0, equalize 0.9 0
shear-y 0.2 7, posterize 0.3 7
color 0.4 3, brightness 0.6 7
sharpness 0.3 9, brightness 0.7 9
equalize 0.6 0, equalize 0.5 0
contrast 0.6 7, sharpness 0.6 5
color 0.7 7, translate-x 0.5 8
equalize 0.3 0, auto-contrast 0.4 0
translate-y 0.4 3, sharpness 0.2 6
brightness 0.9 6, color 0.2 8
solarize 0.5 2, invert 0.0 0
equalize 0.2 0, auto-contrast 0.6 0
equalize 0.2 0, equalize 0.6 0
color 0.9 9, equalize 0.6 0
auto-contrast 0.8 0, solarize 0.2 8
brightness 0.1 3, color 0.7 0
solarize 0.4 5, auto-contrast 0.9 0
translate-y 0.9 9, translate-y 0.7 9
auto-contrast 0.9 0, solarize 0.8 3
equalize 0.8 0, invert 0.1 0
translate-y 0.7 9, auto-contrast 0.9 0
"""


def photos(count, height=32, width=32, channels=3, seed=0):
    """Smooth random images of different contrast, with a flat one and one of two values."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 5, 5, generator=generator) * torch.rand(count, 1, 1, 1, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    images = (255 * images + 20 * torch.randn(images.shape, generator=generator)).clamp(0, 255).to(torch.uint8)
    images[0] = 77
    images[1] = torch.where(images[1] > 60, 200, 30)
    return images


def with_pillow(image, operation, magnitude):
    """One operation on a (C, H, W) image with Pillow, as the published policies call it."""
    picture = Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())
    fill = GREY if len(image) == 3 else 128
    width, height = picture.size
    matrices = {
        Operation.SHEAR_X: (1, magnitude, 0, 0, 1, 0),
        Operation.SHEAR_Y: (1, 0, 0, magnitude, 1, 0),
        Operation.TRANSLATE_X: (1, 0, magnitude * width, 0, 1, 0),
        Operation.TRANSLATE_Y: (1, 0, 0, 0, 1, magnitude * height),
    }
    enhancers = {
        Operation.BRIGHTNESS: ImageEnhance.Brightness,
        Operation.COLOR: ImageEnhance.Color,
        Operation.CONTRAST: ImageEnhance.Contrast,
        Operation.SHARPNESS: ImageEnhance.Sharpness,
    }
    others = {
        Operation.IDENTITY: lambda: picture,
        Operation.ROTATE: lambda: picture.rotate(magnitude, fillcolor=fill),
        Operation.POSTERIZE: lambda: ImageOps.posterize(picture, int(magnitude)),
        Operation.SOLARIZE: lambda: ImageOps.solarize(picture, magnitude),
        Operation.AUTO_CONTRAST: lambda: ImageOps.autocontrast(picture),
        Operation.EQUALIZE: lambda: ImageOps.equalize(picture),
        Operation.INVERT: lambda: ImageOps.invert(picture),
    }
    if operation in matrices:
        result = picture.transform(picture.size, AFFINE, matrices[operation], fillcolor=fill)
    elif operation in enhancers:
        result = enhancers[operation](picture).enhance(1 + magnitude)
    else:
        result = others[operation]()
    return torch.from_numpy(np.array(result)).reshape(height, width, len(image)).permute(2, 0, 1)


@pytest.mark.parametrize("operation", Operation)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 24, 36)], ids=str)
def test_operations_are_those_of_pillow(operation, shape):
    channels, height, width = shape
    images = photos(31, height, width, channels)
    magnitudes = torch.tensor([magnitude_of(operation, k / 30) for k in range(31)])
    if operation in WARPS or Operation.BRIGHTNESS <= operation <= Operation.SHARPNESS:
        magnitudes[::2] *= -1
    results = apply(images, torch.full((31,), int(operation)), magnitudes)
    assert results.dtype == torch.uint8 and results.shape == images.shape
    for image, magnitude, result in zip(images, magnitudes.tolist(), results, strict=True):
        difference = (result.int() - with_pillow(image, operation, magnitude).int()).abs()
        if operation in WARPS:  # a point on the border of two pixels falls to either
            assert (difference > 0).float().mean() < 0.01
        else:  # Pillow stretches contrast in floating point, which rounds some whole values down
            assert difference.max() <= (1 if operation == Operation.AUTO_CONTRAST else 0)


def test_each_image_has_its_own_operation():
    images = photos(60, seed=1)
    generator = torch.Generator().manual_seed(2)
    operation = torch.randint(len(Operation), (60,), generator=generator)
    magnitude = torch.tensor([magnitude_of(Operation(o), 0.6) for o in operation.tolist()])
    together = apply(images, operation, magnitude)
    for k in range(60):
        alone = apply(images[k : k + 1], operation[k : k + 1], magnitude[k : k + 1])
        assert torch.equal(together[k : k + 1], alone)


def test_autoaugment_is_two_operations_of_a_pair():
    images = photos(100, seed=3)
    generator = torch.Generator().manual_seed(4)
    uniforms = torch.rand(5, 100, generator=generator)
    results = AutoAugment()(images, uniforms)
    for k in range(100):
        expected = images[k]
        pair = CIFAR10_POLICY[int(25 * uniforms[0, k])]
        for (operation, probability, level), (done, direction) in zip(
            pair, ((uniforms[1, k], uniforms[2, k]), (uniforms[3, k], uniforms[4, k])), strict=True
        ):
            if done >= probability:
                continue
            magnitude = magnitude_of(operation, level / 9)
            if operation in WARPS or Operation.BRIGHTNESS <= operation <= Operation.SHARPNESS:
                magnitude *= -1 if direction < 0.5 else 1
            expected = with_pillow(expected, operation, magnitude)
        # Equalisation after a pixel that differs by one may differ more, but in few pixels.
        assert (results[k].int() - expected.int()).abs().float().mean() < 1.0


def test_randaugment_draws_every_operation_and_both_directions():
    policy = RandAugment(operations=1, magnitude=30)
    count = 14 * 40
    image = photos(3, seed=5)[2:]
    grid = torch.stack([(torch.arange(count) + 0.5) / count, torch.arange(count) % 2 * 0.5])
    results = policy(image.expand(count, -1, -1, -1).contiguous(), grid)
    different = {tuple(result.flatten().tolist()) for result in results}
    # 14 operations without inversion; nine of them go either way.
    assert len(different) == 14 + 9
    assert torch.equal(results[0], image[0])


def test_published_ranges():
    assert magnitude_of(Operation.SHEAR_X, 1) == 0.3
    assert magnitude_of(Operation.ROTATE, 2 / 9) == pytest.approx(30 * 2 / 9)
    assert magnitude_of(Operation.TRANSLATE_Y, 1) == pytest.approx(150 / 331)
    assert [magnitude_of(Operation.POSTERIZE, k / 9) for k in range(10)] == np.round(np.linspace(8, 4, 10)).tolist()
    assert magnitude_of(Operation.SOLARIZE, 0) == 256 and magnitude_of(Operation.SOLARIZE, 1) == 0
    assert magnitude_of(Operation.EQUALIZE, 1) == 0


def test_published_policy():
    lines = [
        ", ".join(f"{operation.name.lower().replace('_', '-')} {p} {level}" for operation, p, level in pair)
        for pair in CIFAR10_POLICY
    ]
    assert lines == PUBLISHED_POLICY.split("\n")[1:-1]


@pytest.mark.parametrize("count", [1, 9, 25, 32, 33, 1000, 65537])
def test_the_largest_uniform_number_gives_the_largest_integer(count):
    largest = torch.tensor([0.0, 1 - 2**-24])
    assert integers(largest, count).tolist() == [0, count - 1]
