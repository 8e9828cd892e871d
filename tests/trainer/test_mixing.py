"""Mixup and cutmix against image by image, and the distribution of the shares."""

import pytest
import torch

pytest.importorskip("scipy", reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")

from scipy import stats  # noqa: E402

from ltkernels.trainer import TrainerError  # noqa: E402
from ltkernels.trainer.data.mixing import Mixing, mix  # noqa: E402


def batch(count=12, height=10, width=14):
    """Images whose every value is the number of the image, and targets that are that number."""
    number = torch.arange(count)
    return number[:, None, None, None].expand(-1, 3, height, width).float().clone(), number


def test_none_changes_and_draws_nothing():
    images, target = batch()
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    result = mix(images, target, generator, Mixing())
    assert result[0] is images and result[1] is target and result[2] is target and result[3] == 1.0
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("seed", range(5))
def test_mixup(seed):
    images, target = batch()
    original = images.clone()
    mixed, first, second, lam = mix(images, target, torch.Generator().manual_seed(seed), Mixing("mixup", 1.0))
    assert torch.equal(images, original)
    assert torch.equal(first, target) and torch.equal(second.sort().values, target)
    assert not torch.equal(second, target)
    for k in range(len(target)):
        expected = lam * original[k] + (1 - lam) * original[second[k]]
        torch.testing.assert_close(mixed[k], expected)


@pytest.mark.parametrize("seed", range(30))
def test_cutmix(seed):
    images, target = batch()
    original = images.clone()
    mixed, first, second, lam = mix(images, target, torch.Generator().manual_seed(seed), Mixing("cutmix", 1.0))
    assert torch.equal(images, original)
    assert torch.equal(first, target) and torch.equal(second.sort().values, target)
    changed = [k for k in range(len(target)) if first[k] != second[k]]
    pasted = (mixed != original)[changed]
    assert (pasted == pasted[0]).all()  # the same rectangle of every image and channel
    rectangle = pasted[0, 0]
    rows, columns = rectangle.any(1), rectangle.any(0)
    assert torch.equal(rectangle, rows[:, None] & columns[None, :])
    for side in (rows, columns):
        assert (side.int().diff() != 0).sum() <= 2  # one stretch
    assert lam == pytest.approx(1 - rectangle.sum().item() / (10 * 14))
    for k in range(len(target)):
        assert torch.equal(mixed[k], torch.where(rectangle, original[second[k]], original[k]))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_are_of_a_beta_distribution(alpha):
    images, target = batch(2, 1, 1)
    generator = torch.Generator().manual_seed(0)
    shares = [mix(images, target, generator, Mixing("mixup", alpha))[3] for _ in range(3000)]
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_squares_have_the_drawn_area_and_lie_anywhere():
    side = 64
    images, target = batch(2, side, side)
    generator = torch.Generator().manual_seed(0)
    pasted, kept = [], []
    for _ in range(6000):
        mixed, first, second, lam = mix(images, target, generator, Mixing("cutmix", 1.0))
        kept.append(lam)
        if first[0] != second[0]:
            pasted.append(mixed[0, 0] != images[0, 0])
    share = torch.stack(pasted).float().mean(0)
    # The middle is in most squares, corners in few, and the picture is the same from all sides.
    assert share[0, 0] < 0.6 * share[32, 32]
    for line in (share.mean(0), share.mean(1)):
        torch.testing.assert_close(line, line.flip(0), atol=0.05, rtol=0)
    torch.testing.assert_close(share.mean(0), share.mean(1), atol=0.05, rtol=0)
    # 1 - lam is uniform, the border cuts a part of it off.
    rng = torch.Generator().manual_seed(1)
    root, row, column = torch.rand(3, 20_000, generator=rng)
    root = root.sqrt()

    def inside(centre):
        return (centre + root / 2).clamp(max=1) - (centre - root / 2).clamp(min=0)

    expected = 1 - (inside(row) * inside(column)).mean().item()
    assert sum(kept) / len(kept) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_the_generator_determines_the_mixture(kind):
    images, target = batch()
    results = []
    for seed in (7, 7, 8):
        torch.manual_seed(len(results))
        results.append(mix(images, target, torch.Generator().manual_seed(seed), Mixing(kind, 0.5)))
    for one, other in zip(results[0], results[1], strict=True):
        assert one == other if isinstance(one, float) else torch.equal(one, other)
    assert results[0][3] != results[2][3]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("cutout",), "kind: expected one of none, mixup, cutmix"),
        (("mixup", 0.0), "alpha"),
        (("mixup", float("nan")), "alpha"),
    ],
)
def test_bad_settings_are_named(arguments, named):
    with pytest.raises(TrainerError, match=named):
        Mixing(*arguments)
