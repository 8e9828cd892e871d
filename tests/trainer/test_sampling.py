"""The order of an epoch: shares of the classes, reproducible draws."""

import pytest
import torch

from ltkernels.trainer import TrainerError
from ltkernels.trainer.data.sampling import epoch_order

COUNTS = (500, 100, 25, 4)
MANY = 200_000


def labels(counts=COUNTS):
    ordered = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return ordered[torch.randperm(len(ordered), generator=torch.Generator().manual_seed(9))]


def order(kind, of=None, epoch=0, epochs=10, seed=0, size=None):
    of = labels() if of is None else of
    return epoch_order(kind, of, len(COUNTS), epoch, epochs, torch.Generator().manual_seed(seed), size)


def test_instance_is_a_permutation():
    indices = order("instance")
    assert indices.dtype == torch.int64
    assert torch.equal(indices.sort().values, torch.arange(sum(COUNTS)))
    assert not torch.equal(indices, indices.sort().values)


def test_instance_of_another_size_repeats_or_leaves_out():
    total = sum(COUNTS)
    assert len(order("instance", size=10).unique()) == 10
    times = torch.bincount(order("instance", size=2 * total + 5), minlength=total)
    assert times.sum() == 2 * total + 5 and set(times.tolist()) == {2, 3}
    longer = order("instance", size=2 * total)
    assert not torch.equal(longer[:total], longer[total:])
    assert order("instance", of=torch.zeros(1, dtype=torch.int64), size=1).tolist() == [0]


def shares_of(kind, epoch):
    sizes = torch.tensor(COUNTS, dtype=torch.float64)
    by_instance, by_class = sizes / sizes.sum(), torch.full((4,), 0.25, dtype=torch.float64)
    return {
        "class-balanced": by_class,
        "square-root": sizes.sqrt() / sizes.sqrt().sum(),
        "progressive": (1 - epoch / 10) * by_instance + epoch / 10 * by_class,
    }[kind]


@pytest.mark.parametrize(
    ("kind", "epoch"),
    [("class-balanced", 0), ("square-root", 3), ("progressive", 0), ("progressive", 4), ("progressive", 9)],
)
def test_shares_of_classes_and_of_their_images(kind, epoch):
    of = labels()
    indices = order(kind, of, epoch, size=MANY)
    assert indices.dtype == torch.int64 and indices.shape == (MANY,)
    shares = torch.bincount(of[indices], minlength=4) / MANY
    expected = shares_of(kind, epoch)
    error = (expected * (1 - expected) / MANY).sqrt()
    assert ((shares - expected).abs() < 4.5 * error).all()
    times = torch.bincount(indices, minlength=len(of)).double()
    for label in range(4):  # images of a class alike
        of_class = times[of == label]
        chi_squared = ((of_class - of_class.mean()) ** 2 / of_class.mean()).sum().item()
        freedom = len(of_class) - 1
        assert abs(chi_squared - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("kind", ["class-balanced", "square-root", "progressive"])
def test_classes_without_images_are_not_drawn(kind):
    of = torch.tensor([0, 0, 0, 2, 4])
    indices = epoch_order(kind, of, 6, 5, 10, torch.Generator().manual_seed(0), 3000)
    shares = torch.bincount(of[indices], minlength=6) / 3000
    assert (shares[[1, 3, 5]] == 0).all() and (shares[[0, 2, 4]] > 0.15).all()
    if kind == "class-balanced":
        torch.testing.assert_close(shares[[0, 2, 4]], torch.full((3,), 1 / 3), atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", ["instance", "class-balanced", "square-root", "progressive"])
def test_the_generator_determines_the_order(kind):
    torch.manual_seed(0)
    once = order(kind, epoch=2)
    torch.manual_seed(1)
    assert torch.equal(once, order(kind, epoch=2))
    assert not torch.equal(once, order(kind, epoch=2, seed=1))
    assert len(once) == sum(COUNTS)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kind": "reversed"}, "expected one of instance, class-balanced, square-root, progressive"),
        ({"kind": "instance", "size": 0}, "size of at least 1"),
        ({"kind": "class-balanced", "of": torch.zeros(0, dtype=torch.int64)}, "images to draw from"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(TrainerError, match=named):
        order(**arguments)
