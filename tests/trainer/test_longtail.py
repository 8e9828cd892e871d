"""Long-tailed subsets: counts against exact arithmetic, selection against its definition, no leakage."""

import numpy as np
import pytest

from ltkernels.trainer import TrainerError
from ltkernels.trainer.data.images import LabelledImages
from ltkernels.trainer.data.longtail import class_counts, hold_out, long_tailed, shuffled_classes


def some_images(sizes=(9, 7, 8), seed=0):
    """Random 3 x 3 images with the given number in each class, in random order."""
    random = np.random.RandomState(seed)
    labels = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    images = random.randint(0, 256, size=(len(labels), 3, 3)).astype(np.uint8)
    return LabelledImages("random", images, labels, len(sizes), 255)


def permuted(data, seed=1):
    return data.subset(np.random.RandomState(seed).permutation(len(data)))


@pytest.mark.parametrize("num_classes", [2, 3, 5, 10])
@pytest.mark.parametrize("imbalance_factor", [1, 2, 7, 20, 49, 100])
@pytest.mark.parametrize("max_count", [100, 120, 147, 500, 4900])
def test_exponential_counts_are_the_exact_floors(num_classes, imbalance_factor, max_count):
    exponent = num_classes - 1

    def exact(k):
        # The largest m with m <= max_count * IF^(-k / (C - 1)), in integers.
        fits = (m for m in range(max_count, -1, -1) if m**exponent * imbalance_factor**k <= max_count**exponent)
        return next(fits)

    assert class_counts(num_classes, max_count, imbalance_factor) == tuple(exact(k) for k in range(num_classes))


def test_counts_are_the_published_ones_of_cifar():
    # Cao et al., arXiv:1906.07413: CIFAR-10-LT and CIFAR-100-LT at imbalance factor 100.
    assert class_counts(10, 5000, 100) == (5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50)
    assert sum(class_counts(100, 500, 100)) == 10847


@pytest.mark.parametrize("max_count", [1, 49, 98, 103, 107, 161, 187, 196, 197])
def test_counts_as_large_as_the_factor_leave_one_image(max_count):
    # max_count * (1 / max_count) rounds below 1 for some of these.
    for profile in ("exp", "step"):
        assert class_counts(4, max_count, max_count, profile)[-1] == 1


def test_step_counts():
    assert class_counts(4, 100, 10, "step") == (100, 100, 10, 10)
    assert class_counts(5, 100, 10, "step") == (100, 100, 100, 10, 10)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((1, 10, 2.0), "num_classes"),
        ((10, 0, 1.0), "max_count"),
        ((10, 100, 0.5), "imbalance_factor"),
        ((10, 100, float("nan")), "imbalance_factor"),
        ((10, 100, float("inf")), "imbalance_factor"),
        ((10, 100, 101.0), "leaves the last class"),
        ((10, 100, 10.0, "linear"), "profile"),
    ],
)
def test_bad_counts_are_named(arguments, named):
    with pytest.raises(TrainerError, match=named):
        class_counts(*arguments)


def test_selection_is_its_definition():
    data = some_images()
    chosen = long_tailed(data, (5, 3, 2), seed=4)
    expected = []
    for label, count in enumerate((5, 3, 2)):
        hashes = sorted(str(data.hashes[i]) for i in range(len(data)) if data.labels[i] == label)
        order = np.random.RandomState(4).permutation(len(hashes))
        expected += [hashes[i] for i in order[:count]]
    assert chosen.hashes.tolist() == expected
    assert chosen.class_sizes.tolist() == [5, 3, 2]


def test_selection_does_not_depend_on_the_order_of_the_file():
    data = some_images()
    other = permuted(data)
    assert other.hashes.tolist() != data.hashes.tolist()
    assert other.fingerprint == data.fingerprint
    for seed in range(3):
        assert long_tailed(other, (5, 3, 2), seed).hashes.tolist() == long_tailed(data, (5, 3, 2), seed).hashes.tolist()
        held, rest = hold_out(data, 2, seed)
        other_held, other_rest = hold_out(other, 2, seed)
        assert other_held.hashes.tolist() == held.hashes.tolist()
        assert other_rest.fingerprint == rest.fingerprint


def test_seeds_select_different_images():
    data = some_images()
    assert len({long_tailed(data, (5, 3, 2), seed).fingerprint for seed in range(5)}) == 5


def test_smaller_subsets_are_inside_larger_ones():
    data = some_images()
    small, large = long_tailed(data, (4, 2, 1), 0), long_tailed(data, (6, 5, 3), 0)
    assert set(small.hashes) < set(large.hashes)


def test_held_out_images_are_balanced_and_no_longer_in_the_rest():
    data = some_images()
    held, rest = hold_out(data, 3, seed=0)
    assert held.class_sizes.tolist() == [3, 3, 3]
    assert rest.class_sizes.tolist() == [6, 4, 5]
    assert not set(held.hashes) & set(rest.hashes)
    assert set(held.hashes) | set(rest.hashes) == set(data.hashes)


def test_labels_stay_with_their_images():
    data = some_images()
    label_of = dict(zip(data.hashes, data.labels, strict=True))
    chosen = long_tailed(permuted(data), (5, 3, 2), 0)
    assert [label_of[h] for h in chosen.hashes] == chosen.labels.tolist()


@pytest.mark.parametrize("per_class", [0, 7, 100])
def test_impossible_hold_out_is_an_error(per_class):
    with pytest.raises(TrainerError, match="held-out images"):
        hold_out(some_images(), per_class, 0)


def test_too_few_images_name_the_class():
    with pytest.raises(TrainerError, match="class 1 has 7 images to train on, 8 are asked for"):
        long_tailed(some_images(), (9, 8, 2), 0)


def test_shuffled_classes_hold_every_image_once():
    data = some_images()
    assert sorted(np.concatenate(shuffled_classes(data, 0)).tolist()) == list(range(len(data)))


def test_duplicates_are_dropped_whatever_their_order():
    data = some_images()
    twice = permuted(data.subset(np.concatenate([np.arange(len(data)), [0, 3, 3]])))
    assert len(twice) == len(data) + 3
    assert twice.without_duplicates().hashes.tolist() == data.without_duplicates().hashes.tolist()
    assert len(twice.without_duplicates()) == len(data)
