"""Neighbour maps against sets and dicts."""

from __future__ import annotations

import copy
import csv
import math
import os
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ltkernels.functional as LF
from ltkernels import _neighbor_pairs
from ltkernels.neighbors import MODES, NeighborMap, NeighborStatistics

pytestmark = pytest.mark.usefixtures("one_thread")

Pairs = list[tuple[int, int]]
SMALL = [(0, 3), (0, 4), (2, 4), (2, 6)]  # of 3 target and 4 auxiliary classes; 1 and 5 have none


def small() -> NeighborMap:
    return NeighborMap.from_pairs(SMALL, num_classes=3, num_auxiliary=4)


def imagenet_pairs() -> Pairs:
    """As many classes and pairs as ImageNet-LT's map, every auxiliary class with an anchor, at most 8 a target."""
    rng = random.Random(0)
    slots = [target for target in range(1000) for _ in range(8)]
    rng.shuffle(slots)
    pairs = {(slots.pop(), auxiliary) for auxiliary in range(1000, 6012)}
    while len(pairs) < 6851:
        pairs.add((slots.pop(), rng.randrange(1000, 6012)))
    return sorted(pairs)


def real_pairs() -> Pairs:
    path = os.environ.get("LTKERNELS_TEST_NEIGHBORS")
    if path is None:
        pytest.skip("LTKERNELS_TEST_NEIGHBORS: no table of ImageNet-LT's neighbours (target_class, auxiliary_class)")
    with open(path, newline="") as table:
        return [(int(row["target_class"]), int(row["auxiliary_class"])) for row in csv.DictReader(table)]


@st.composite
def problems(draw) -> tuple[Pairs, int, int]:
    """Pairs in any order, with duplicates, and the numbers of classes."""
    classes, auxiliary = draw(st.integers(1, 6)), draw(st.integers(0, 6))
    if auxiliary == 0:
        return [], classes, auxiliary
    pair = st.tuples(st.integers(0, classes - 1), st.integers(classes, classes + auxiliary - 1))
    return draw(st.lists(pair, max_size=20)), classes, auxiliary


def silenced(pairs: Pairs, mode: str, y: int, classes: int, auxiliary: int) -> set[int]:
    """What class y silences, from the definition of the modes."""
    if y < classes:
        return set() if mode == "auxiliary_only" else {j for k, j in pairs if k == y}
    anchors = set() if mode == "target_only" else {k for k, j in pairs if j == y}
    others = set(range(classes, classes + auxiliary)) - {y} if mode == "back" else set()
    return anchors | others


def read_rows(neighbors: NeighborMap, mode: str) -> list[set[int]]:
    offsets, classes, back_from = neighbors.rows(mode)
    assert offsets.dtype == classes.dtype == torch.int32
    sets = []
    for y in range(len(offsets) - 1):
        row = classes[offsets[y] : offsets[y + 1]].tolist()
        assert row == sorted(set(row))
        others = set(range(back_from, len(offsets) - 1)) - {y} if 0 <= back_from <= y else set()
        sets.append(set(row) | others)
    return sets


# What a map holds


@given(problems())
def test_map_is_its_pairs(problem: tuple[Pairs, int, int]) -> None:
    pairs, classes, auxiliary = problem
    neighbors = NeighborMap.from_pairs(pairs, num_classes=classes, num_auxiliary=auxiliary)
    assert (neighbors.num_classes, neighbors.num_auxiliary) == (classes, auxiliary)
    assert neighbors.num_pairs == len(set(pairs))
    assert neighbors.pairs().dtype == torch.int64 and neighbors.pairs().shape == (len(set(pairs)), 2)
    assert [tuple(pair) for pair in neighbors.pairs().tolist()] == sorted(set(pairs))
    for mode in MODES:
        expected = [silenced(pairs, mode, y, classes, auxiliary) for y in range(classes + auxiliary)]
        assert read_rows(neighbors, mode) == expected
    for y in range(classes + auxiliary):
        assert neighbors.neighbors_of(y).tolist() == sorted(silenced(pairs, "plain", y, classes, auxiliary))
    counts = [[sum(pair[side] == k for pair in set(pairs)) for k in numbers] for side, numbers in numbers_of(problem)]
    assert neighbors.statistics() == NeighborStatistics(
        len(set(pairs)),
        sum(count > 0 for count in counts[0]),
        sum(count == 0 for count in counts[1]),
        *(f(counts[0]) for f in (min, mean, max)),
        *(f(counts[1]) if counts[1] else 0 for f in (min, mean, max)),
        4 * (classes + auxiliary + 1 + 2 * len(set(pairs))),
    )


def numbers_of(problem: tuple[Pairs, int, int]) -> list[tuple[int, range]]:
    _, classes, auxiliary = problem
    return [(0, range(classes)), (1, range(classes, classes + auxiliary))]


def mean(counts: list[int]) -> float:
    return pytest.approx(sum(counts) / len(counts))


@given(problems(), st.randoms(use_true_random=False))
def test_equal_maps(problem: tuple[Pairs, int, int], rng: random.Random) -> None:
    """Order and duplicates do not matter; a pair or a class more does."""
    pairs, classes, auxiliary = problem
    one = NeighborMap.from_pairs(pairs, num_classes=classes, num_auxiliary=auxiliary)
    again = pairs + pairs[:3]
    rng.shuffle(again)
    same = NeighborMap.from_pairs(again, num_classes=classes, num_auxiliary=auxiliary)
    assert one == same and hash(one) == hash(same) and not one != same
    assert one != NeighborMap.from_pairs(pairs, num_classes=classes, num_auxiliary=auxiliary + 1)
    if pairs:
        other = NeighborMap.from_pairs(set(pairs) - {pairs[0]}, num_classes=classes, num_auxiliary=auxiliary)
        assert one != other and other != one
    assert one != pairs and {one: 1}[same] == 1


@pytest.mark.parametrize(
    "pairs",
    [
        SMALL,
        set(SMALL),
        (pair for pair in SMALL),
        [list(pair) for pair in SMALL],
        [torch.tensor(pair) for pair in SMALL],
        torch.tensor(SMALL),
        torch.tensor(SMALL, dtype=torch.int16),
        torch.tensor(SMALL, dtype=torch.uint8),
        torch.tensor(SMALL).T.contiguous().T,
        np.array(SMALL, dtype=np.uint64),
        np.array(SMALL, order="F")[::-1],
    ],
    ids=lambda pairs: f"{getattr(pairs, 'dtype', '')}{type(pairs).__name__}",
)
def test_forms_of_pairs(pairs) -> None:
    neighbors = NeighborMap.from_pairs(pairs, num_classes=3, num_auxiliary=4)
    assert neighbors == small() and neighbors.num_pairs == 4


@pytest.mark.parametrize("empty", [[], set(), torch.empty(0, 2, dtype=torch.int64), np.empty((0, 2), int)], ids=repr)
@pytest.mark.parametrize("auxiliary", [0, 4])
def test_empty_map(empty, auxiliary: int) -> None:
    neighbors = NeighborMap.from_pairs(empty, num_classes=2, num_auxiliary=auxiliary)
    assert neighbors.num_pairs == 0 and neighbors.pairs().shape == (0, 2)
    logits, target = torch.randn(5, 2 + auxiliary), torch.arange(5) % 2
    for mode in ("plain", "target_only", "auxiliary_only"):
        loss = LF.auxiliary_cross_entropy(logits, target, neighbors, mode=mode)
        torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, target))


def test_map_does_not_share_memory_with_pairs() -> None:
    pairs = torch.tensor(SMALL)
    neighbors = NeighborMap.from_pairs(pairs, num_classes=3, num_auxiliary=4)
    pairs.zero_()
    neighbors.pairs().zero_()
    neighbors.neighbors_of(0).zero_()
    assert neighbors == small()


def test_immutable() -> None:
    neighbors = small()
    for name in ("num_classes", "_offsets", "anything"):
        with pytest.raises(AttributeError):
            setattr(neighbors, name, 3)
        with pytest.raises(AttributeError):
            delattr(neighbors, name)
    assert neighbors == small()


def test_repr() -> None:
    assert repr(small()) == "NeighborMap(num_classes=3, num_auxiliary=4, num_pairs=4)"
    assert repr(small().to("meta")).endswith("num_pairs=4, device='meta')")


def test_to() -> None:
    neighbors = small()
    assert neighbors.to("cpu") is neighbors and neighbors.device == torch.device("cpu")
    moved = neighbors.to("meta")
    assert {x.device.type for x in moved.rows("target_only")[:2]} == {"meta"} and moved.device.type == "meta"
    assert neighbors == small() and moved.num_pairs == 4


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(duplicate: Callable) -> None:
    again = duplicate(small())
    assert again == small() and hash(again) == hash(small()) and read_rows(again, "back") == read_rows(small(), "back")


@pytest.mark.parametrize("source", [imagenet_pairs, real_pairs])
def test_map_of_imagenet_size(source: Callable[[], Pairs], tmp_path: Path) -> None:
    pairs = source()
    neighbors = NeighborMap.from_pairs(pairs, num_classes=1000, num_auxiliary=5012)
    assert len(pairs) == neighbors.num_pairs == 6851
    statistics = neighbors.statistics()
    assert statistics.bytes <= 2**20 and statistics.auxiliaries_without_anchor == 0 and statistics.max_neighbors == 8
    assert len(pickle.dumps(neighbors)) <= 2**20
    expected: dict[int, set[int]] = {k: set() for k in range(6012)}
    for target, auxiliary in pairs:
        expected[target].add(auxiliary)
        expected[auxiliary].add(target)
    assert read_rows(neighbors, "plain") == list(expected.values())
    neighbors.save(tmp_path / "map.npz")
    assert NeighborMap.load(tmp_path / "map.npz") == neighbors
    assert (tmp_path / "map.npz").stat().st_size <= 2**20

    target = torch.tensor([0, 151, 999, 1000, 6011])
    logits = torch.randn(5, 6012, generator=torch.Generator().manual_seed(0))
    rows = [logits[i, sorted(set(range(6012)) - expected[int(y)])] for i, y in enumerate(target)]
    by_hand = torch.stack([x.logsumexp(0) for x in rows]) - logits[range(5), target]
    loss = LF.auxiliary_cross_entropy(logits, target, neighbors, reduction="none")
    torch.testing.assert_close(loss, by_hand)


# Names, superclasses, prototypes

NAMES = {"cat": ["lynx", "dog"], "wolf": ["dog", "fox", "dog"], "tree": []}
CLASSES = ["tree", "cat", "sea", "wolf"]


def test_from_names() -> None:
    neighbors = NeighborMap.from_names(NAMES, class_names=CLASSES)
    expected = [(1, 4), (1, 5), (3, 5), (3, 6)]  # lynx, dog, fox by first appearance
    assert neighbors == NeighborMap.from_pairs(expected, num_classes=4, num_auxiliary=3)
    given_names = NeighborMap.from_names(NAMES, class_names=CLASSES, auxiliary_names=("fox", "cow", "dog", "lynx"))
    expected = [(1, 7), (1, 6), (3, 6), (3, 4)]
    assert given_names == NeighborMap.from_pairs(expected, num_classes=4, num_auxiliary=4)
    assert NeighborMap.from_names({}, class_names=["a"]).num_auxiliary == 0


class Backwards(set):
    """The order of a set of strings changes from process to process; here it is as bad as can be."""

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(set.__iter__(self), reverse=True))


def test_from_names_numbers_sets_alike_in_every_process() -> None:
    neighbors = NeighborMap.from_names({"a": Backwards("zyxwv"), "b": Backwards("yp")}, class_names=["a", "b"])
    # v w x y z, p
    assert neighbors.pairs().tolist() == [[0, 2], [0, 3], [0, 4], [0, 5], [0, 6], [1, 5], [1, 7]]


@given(st.integers(1, 5), st.lists(st.sampled_from(["a", "b", ("c", 1), 7, None]), min_size=5, max_size=12))
def test_from_hierarchy(classes: int, superclasses: list) -> None:
    neighbors = NeighborMap.from_hierarchy(superclasses, num_classes=classes)
    pairs = {
        (k, j) for k in range(classes) for j in range(classes, len(superclasses)) if superclasses[k] == superclasses[j]
    }
    expected = NeighborMap.from_pairs(pairs, num_classes=classes, num_auxiliary=len(superclasses) - classes)
    assert neighbors == expected


@pytest.mark.parametrize("form", [tuple, np.array, torch.tensor])
def test_from_hierarchy_of_numbers(form: Callable) -> None:
    neighbors = NeighborMap.from_hierarchy(form([5, 6, 5, 5, 7]), num_classes=2)
    assert neighbors == NeighborMap.from_pairs([(0, 2), (0, 3)], num_classes=2, num_auxiliary=3)


def most_similar(
    prototypes: Tensor, classes: int, lower: float, upper: float, most: list[int]
) -> tuple[Pairs, list[float]]:
    """By the definition, one pair at a time; and all similarities."""
    pairs, similarities = [], []
    for k in range(classes):
        found = []
        for j in range(classes, len(prototypes)):
            a, b = prototypes[k].tolist(), prototypes[j].tolist()
            cosine = sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
            similarities.append(cosine)
            if lower <= cosine <= upper:
                found.append((-cosine, j))
        pairs += [(k, j) for _, j in sorted(found)[: most[k]]]
    return pairs, similarities


@pytest.mark.parametrize("chunk", [1, 40, _neighbor_pairs.CHUNK])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("lower", "upper", "most"), [(0.7, 0.98, 8), (-0.2, 0.5, 3), (-1, 1, 100), (0.95, 1, 1)])
def test_from_prototypes(
    monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype, lower: float, upper: float, most: int
) -> None:
    held = []

    def watched(similarity: Tensor, *rest) -> Tensor:
        held.append(similarity.numel())
        return chosen(similarity, *rest)

    chosen = _neighbor_pairs._most_similar
    monkeypatch.setattr(_neighbor_pairs, "_most_similar", watched)
    monkeypatch.setattr(_neighbor_pairs, "CHUNK", chunk)
    prototypes = (torch.randn(45, 3, generator=torch.Generator().manual_seed(0)) * 7).to(dtype)
    neighbors = NeighborMap.from_prototypes(prototypes, num_classes=12, lower=lower, upper=upper, max_neighbors=most)
    pairs, similarities = most_similar(prototypes, 12, lower, upper, [most] * 12)
    assert len(pairs) > 3 and min(abs(x - bound) for x in similarities for bound in (lower, upper)) > 1e-9
    assert neighbors == NeighborMap.from_pairs(pairs, num_classes=12, num_auxiliary=33)
    assert max(held) <= max(chunk, 33) and sum(held) == 12 * 33


def test_from_prototypes_bounds_are_inclusive() -> None:
    """Along axes similarities are exact: equal prototypes 1, orthogonal ones 0, opposite ones -1."""
    prototypes = np.array([[2.0, 0], [0, 3], [5, 0], [-1, 0]])
    for bounds, expected in {
        (1, 1): [(0, 2)],
        (0, 0): [(1, 2), (1, 3)],
        (-1, -1): [(0, 3)],
        (-1, 1): [(0, 2), (0, 3), (1, 2), (1, 3)],
        (0.5, 0.9): [],
    }.items():
        neighbors = NeighborMap.from_prototypes(prototypes, num_classes=2, lower=bounds[0], upper=bounds[1])
        assert neighbors == NeighborMap.from_pairs(expected, num_classes=2, num_auxiliary=2)


def test_from_prototypes_rounding_takes_no_similarity_past_1() -> None:
    targets = torch.randn(500, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options = {"num_classes": 500, "lower": 0.9999999, "upper": 1, "max_neighbors": 1}
    neighbors = NeighborMap.from_prototypes(torch.cat([targets, targets]), **options)
    assert neighbors.pairs().tolist() == [[k, 500 + k] for k in range(500)]


def test_from_prototypes_takes_the_first_of_equals() -> None:
    prototypes = torch.ones(50, 4)
    neighbors = NeighborMap.from_prototypes(prototypes, num_classes=2, upper=1.0, max_neighbors=3)
    assert neighbors.pairs().tolist() == [[0, 2], [0, 3], [0, 4], [1, 2], [1, 3], [1, 4]]


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_from_prototypes_of_any_length(scale: float) -> None:
    prototypes = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = NeighborMap.from_prototypes(prototypes, num_classes=5)
    scales = torch.ones(20, 1, dtype=torch.float64)
    scales[::3] = scale
    assert NeighborMap.from_prototypes(prototypes * scales, num_classes=5) == expected
    assert expected.num_pairs > 0
    assert NeighborMap.from_prototypes(prototypes.clone().requires_grad_(), num_classes=5) == expected


@pytest.mark.parametrize(
    ("counts", "most"),
    [
        ([1000, 100, 10, 1], [1, 4, 7, 10]),
        ([3, 300, 20, 7], [10, 1, 6, 8]),  # 1 + 9 * 0.588 = 6.3 and 1 + 9 * 0.816 = 8.3
        ([7, 7, 7, 7], [10] * 4),
        (None, [10] * 4),
    ],
)
@pytest.mark.parametrize("chunk", [40, _neighbor_pairs.CHUNK])
def test_from_prototypes_gives_rare_classes_more(
    monkeypatch: pytest.MonkeyPatch, chunk: int, counts: list[int] | None, most: list[int]
) -> None:
    monkeypatch.setattr(_neighbor_pairs, "CHUNK", chunk)
    prototypes = torch.rand(40, 5, generator=torch.Generator().manual_seed(0))  # all alike: nothing else limits them
    neighbors = NeighborMap.from_prototypes(
        prototypes, num_classes=4, lower=0, upper=1, max_neighbors=10, class_counts=counts
    )
    assert [len(neighbors.neighbors_of(k)) for k in range(4)] == most
    pairs, _ = most_similar(prototypes, 4, 0, 1, most)
    assert neighbors == NeighborMap.from_pairs(pairs, num_classes=4, num_auxiliary=36)


def test_from_prototypes_without_auxiliary_classes() -> None:
    assert NeighborMap.from_prototypes(torch.ones(3, 2), num_classes=3).num_auxiliary == 0


def test_default_device_does_not_matter() -> None:
    with torch.device("meta"):
        neighbors = small()
        assert neighbors.device.type == "cpu" and neighbors.pairs().tolist() == [list(pair) for pair in SMALL]
        assert NeighborMap.from_hierarchy([*"abcda"], num_classes=3).pairs().tolist() == [[0, 4]]
        assert NeighborMap.from_prototypes(np.eye(4), num_classes=2, lower=-1).num_pairs == 4
