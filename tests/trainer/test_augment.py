"""Augmentation of batches against image by image, its distribution, and that the generator determines it."""

import pytest
import torch

from ltkernels.trainer import TrainerError
from ltkernels.trainer.data.augment import Augmentation, BatchAugment, crop_and_flip, square

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
EVERYTHING = [
    Augmentation(policy=policy, cutout=cutout)
    for policy in ("none", "crop-flip", "autoaugment", "randaugment")
    for cutout in (0, 16)
]


def augment(augmentation, side=32, channels=3):
    return BatchAugment(augmentation, side, channels, MEAN[:channels], STD[:channels])


def noise(count, channels=3, height=32, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)


def by_hand(image, padding, row, column, flip):
    """Pixel by pixel: (C, H, W) padded with zeros, cut out at (row, column), flipped."""
    channels, height, width = image.shape
    result = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            from_y = y + row - padding
            from_x = (width - 1 - x if flip else x) + column - padding
            if 0 <= from_y < height and 0 <= from_x < width:
                result[:, y, x] = image[:, from_y, from_x]
    return result


@pytest.mark.parametrize(("channels", "height", "width", "padding"), [(3, 9, 9, 4), (1, 6, 8, 2), (2, 5, 5, 0)])
def test_crop_and_flip_against_pixel_by_pixel(channels, height, width, padding):
    side = 2 * padding + 1
    count = 2 * side * side
    cases = torch.arange(count)
    rows, columns, flip = cases % side, cases // side % side, cases >= side * side
    images = noise(count, channels, height, width)
    results = crop_and_flip(images, padding, rows, columns, flip)
    for k in range(count):
        assert torch.equal(results[k], by_hand(images[k], padding, int(rows[k]), int(columns[k]), bool(flip[k])))


def test_the_memory_format_of_the_images_does_not_matter():
    images = noise(7)
    other = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for augmentation in EVERYTHING:
        results = [augment(augmentation)(x, torch.Generator().manual_seed(1)) for x in (images, other)]
        assert torch.equal(*results) and results[1].is_contiguous()


def test_offsets_and_flips_are_uniform_and_independent():
    # Every pixel tells where it comes from.
    side, count = 32, 20_000
    image = torch.stack(
        [torch.arange(side).repeat(side, 1), torch.arange(side).repeat(side, 1).T, torch.ones(side, side)]
    )
    module = BatchAugment(Augmentation(), side, 3, (0.0,) * 3, (1 / 255,) * 3)
    images = image.to(torch.uint8).expand(count, -1, -1, -1)
    centre = module(images, torch.Generator().manual_seed(0))[:, :, 15:17, 15:17].round().long()
    flip = centre[:, 0, 0, 0] > centre[:, 0, 0, 1]
    column = torch.where(flip, centre[:, 0, 0, 1], centre[:, 0, 0, 0]) - 11
    row = centre[:, 1, 0, 0] - 11
    counts = torch.zeros(2, 9, 9, dtype=torch.long)
    counts.index_put_((flip.long(), row, column), torch.ones(count, dtype=torch.long), accumulate=True)
    assert counts.min() > 0
    expected = count / counts.numel()
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert 161 - 5 * 18 < chi_squared < 161 + 5 * 18  # 161 degrees of freedom, standard deviation 18


def test_the_output_is_normalised():
    images = noise(6)
    module = augment(Augmentation(policy="none"))
    expected = torch.empty(6, 3, 32, 32)
    for channel in range(3):
        expected[:, channel] = (images[:, channel].double() / 255 - MEAN[channel]) / STD[channel]
    for result in (module(images, torch.Generator()), module.normalise(images)):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, expected, atol=2e-6, rtol=1e-5)
    assert module.state_dict() == {}


def test_crop_and_flip_come_before_normalisation():
    images = noise(50)
    module = augment(Augmentation())
    uniforms = module.draw(50, torch.Generator().manual_seed(0))
    result = module.transform(images, uniforms)
    for k in range(50):
        row, column, flip = int(9 * uniforms[0, k]), int(9 * uniforms[1, k]), bool(uniforms[2, k] < 0.5)
        expected = module.normalise(by_hand(images[k], 4, row, column, flip)[None])
        assert torch.equal(result[k : k + 1], expected)


@pytest.mark.parametrize("side", [1, 4, 7, 16])
def test_cutout_squares(side):
    height, width = 12, 16
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    masks = square((height, width), side, *places.T)
    for (row, column), mask in zip(places.tolist(), masks, strict=True):
        expected = torch.zeros(height, width, dtype=torch.bool)
        top, left = row - side // 2, column - side // 2
        expected[max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = True
        assert torch.equal(mask, expected)


def test_cutout_is_mean_colour_anywhere():
    images = noise(4000)
    plain = augment(Augmentation(policy="none")).normalise(images)
    result = augment(Augmentation(policy="none", cutout=8))(images, torch.Generator().manual_seed(0))
    cut = (result == 0).all(1)
    assert torch.equal(result, torch.where(cut[:, None], 0.0, plain))
    area = cut.sum((1, 2))
    assert area.max() == 64 and area.min() == 16  # a corner leaves 4 x 4 of 8 x 8
    shares = cut.float().mean(0)
    # A pixel away from the border is cut by 64 of 32 * 32 places.
    torch.testing.assert_close(shares[8:24, 8:24].mean(), torch.tensor(64 / 1024), atol=0.004, rtol=0)


@pytest.mark.parametrize("policy", ["none", "crop-flip", "autoaugment", "randaugment"])
def test_cutout_comes_last_and_has_numbers_of_its_own(policy):
    images = noise(40)
    module, without = augment(Augmentation(policy, cutout=8)), augment(Augmentation(policy))
    uniforms = module.draw(40, torch.Generator().manual_seed(2))
    assert module.draws == without.draws + 2
    cut = square((32, 32), 8, *(32 * uniforms[-2:]).long())
    expected = torch.where(cut[:, None], 0.0, without.transform(images, uniforms[:-2]))
    assert torch.equal(module.transform(images, uniforms), expected)


@pytest.mark.parametrize("augmentation", EVERYTHING, ids=str)
def test_the_generator_determines_the_output(augmentation):
    images = noise(16)
    module = augment(augmentation)
    generator = torch.Generator().manual_seed(5)
    module(images, generator)
    state = generator.get_state()
    torch.manual_seed(0)
    once = module(images, generator)
    generator.set_state(state)
    torch.manual_seed(1)
    again = module(images, generator)
    assert torch.equal(once, again)
    if module.draws:
        assert not torch.equal(once, module(images, generator))
    assert once.dtype == torch.float32 and once.shape == images.shape


@pytest.mark.parametrize("augmentation", EVERYTHING, ids=str)
def test_images_are_augmented_apart(augmentation):
    module = augment(augmentation)
    images = noise(1).expand(64, -1, -1, -1)
    uniforms = module.draw(64, torch.Generator().manual_seed(0))
    together = module.transform(images, uniforms)
    for k in range(64):
        assert torch.equal(together[k : k + 1], module.transform(images[k : k + 1], uniforms[:, k : k + 1]))
    if module.draws:
        assert len({tuple(image.flatten().tolist()) for image in together}) > 50


@pytest.mark.parametrize("augmentation", EVERYTHING, ids=str)
def test_no_value_is_read_by_the_host(augmentation):
    # Meta tensors have no values: a branch on one, or a tensor made on another device, is an error.
    module = augment(augmentation).to("meta")
    result = module.transform(noise(8).to("meta"), torch.empty(module.draws, 8, device="meta"))
    assert result.device.type == "meta" and result.shape == (8, 3, 32, 32)


def test_grey_images_and_other_sizes():
    for augmentation in EVERYTHING:
        module = BatchAugment(augmentation, (28, 20), 1, (0.3,), (0.3,))
        images = noise(5, 1, 28, 20)
        assert module(images, torch.Generator().manual_seed(0)).shape == images.shape


def test_settings_change_what_is_done():
    images = noise(200)

    def moved(**changes):
        result = augment(Augmentation(**changes))(images, torch.Generator().manual_seed(0))
        return (result != augment(Augmentation(policy="none")).normalise(images)).flatten(1).any(1).float().mean()

    assert moved() > 0.95
    assert 0.4 < moved(padding=0) < 0.6  # flips only
    assert moved(policy="randaugment", padding=0, operations=0) == moved(padding=0)
    assert moved(policy="randaugment", padding=0, operations=3) > moved(policy="randaugment", padding=0, operations=1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"policy": "trivial"}, "policy: expected one of none, crop-flip, autoaugment, randaugment"),
        ({"cutout": -1}, "cutout"),
        ({"padding": -1}, "padding"),
        ({"operations": -1}, "operations"),
        ({"magnitude": 31}, "magnitude"),
    ],
)
def test_bad_settings_are_named(changes, named):
    with pytest.raises(TrainerError, match=named):
        Augmentation(**changes)


def test_settings_that_do_not_fit_the_images_are_named():
    with pytest.raises(TrainerError, match="mean and std: expected 3 values"):
        BatchAugment(Augmentation(), 32, 3, (0.5,), (0.5,))
    with pytest.raises(TrainerError, match="std: expected positive"):
        BatchAugment(Augmentation(), 32, 1, (0.5,), (0.0,))
    with pytest.raises(TrainerError, match="1 or 3 channels"):
        BatchAugment(Augmentation("autoaugment"), 32, 2, (0.5,) * 2, (0.5,) * 2)
    with pytest.raises(TrainerError, match="cutout: expected at most 28"):
        BatchAugment(Augmentation(cutout=29), 28, 1, (0.5,), (0.5,))
    with pytest.raises(ValueError, match="expected uint8"):
        augment(Augmentation())(noise(2).float(), torch.Generator())
    with pytest.raises(ValueError, match="expected uint8"):
        augment(Augmentation())(noise(2, 3, 28, 28), torch.Generator())
