"""Neighbour maps: bad input."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ltkernels import _neighbor_pairs
from ltkernels.neighbors import NeighborMap

SMALL = [(0, 3), (0, 4), (2, 4), (2, 6)]
NAMES = {"cat": ["lynx", "dog"], "wolf": ["dog", "fox"]}
CLASSES = ["tree", "cat", "sea", "wolf"]


def small() -> NeighborMap:
    return NeighborMap.from_pairs(SMALL, num_classes=3, num_auxiliary=4)


def of(pairs, classes=3, auxiliary=4):
    return lambda: NeighborMap.from_pairs(pairs, num_classes=classes, num_auxiliary=auxiliary)


def named(neighbors, **options):
    return lambda: NeighborMap.from_names(neighbors, **({"class_names": CLASSES} | options))


def prototypes(x=None, classes=2, **options):
    x = torch.eye(4) if x is None else x
    return lambda: NeighborMap.from_prototypes(x, num_classes=classes, **options)


def csr(offsets, classes, **sizes):
    sizes = {"num_classes": 1, "num_auxiliary": 2} | sizes
    offsets, classes = (x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.int32) for x in (offsets, classes))
    return lambda: NeighborMap(offsets, classes, **sizes)


BAD = [
    (of([(0, 3), (3, 4)]), IndexError, r"^pairs: expected target classes in \[0, 3\), got 3 in pair 1, \(3, 4\)"),
    (of([(-1, 3)]), IndexError, r"^pairs: expected target classes in \[0, 3\), got -1"),
    (of([(0, 7)]), IndexError, r"^pairs: expected auxiliary classes in \[3, 7\), got 7 in pair 0"),
    (of([(0, 2)]), IndexError, r"^pairs: expected auxiliary classes in \[3, 7\), got 2"),
    (of(np.array([[0, 2**64 - 1]], dtype=np.uint64)), IndexError, "^pairs: .*got 18446744073709551615"),
    (of([(0, 3)], auxiliary=0), IndexError, r"^pairs: expected auxiliary classes in \[3, 3\), got 3"),
    (of([(0, 3), (2, 2)]), ValueError, "^pairs: class 2 is its own neighbour, in pair 1"),
    (of([(5, 5)]), ValueError, "^pairs: class 5 is its own neighbour"),
    (of([(0, 3, 4)]), ValueError, r"^pairs: expected shape \(P, 2\), got \(1, 3\)"),
    (of([0, 3]), ValueError, r"^pairs: expected shape \(P, 2\), got \(2,\)"),
    (of([(0, 3), (1,)]), ValueError, "^pairs: expected shape .*different lengths"),
    (of(torch.zeros(1, 2)), TypeError, "^pairs: expected pairs of integers, got torch.float32"),
    (of(torch.zeros(1, 2, dtype=torch.bool)), TypeError, "^pairs: expected pairs of integers, got torch.bool"),
    (of(torch.zeros(1, 2, dtype=torch.bfloat16)), TypeError, "^pairs: expected pairs of integers, got torch.bfloat16"),
    (of([(0, 3.0)]), TypeError, "^pairs: expected pairs of integers, got list of float64"),
    (of([("a", "b")]), TypeError, "^pairs: expected pairs of integers"),
    (of({0: 3}), TypeError, "^pairs: expected pairs of class numbers, got dict"),
    (of(3), TypeError, "^pairs: expected pairs of class numbers, got int"),
    (of([], classes=0), ValueError, "^num_classes: expected at least 1, got 0"),
    (of([], classes=2.0), TypeError, "^num_classes: expected an integer, got float"),
    (of([], auxiliary=-1), ValueError, "^num_auxiliary: expected at least 0, got -1"),
    (of([], auxiliary=2**31), ValueError, r"^expected fewer than 2\^31 classes"),
    (named({"cow": []}), ValueError, "^neighbors: expected names of class_names as keys, got 'cow'"),
    (named({"cat": ["fox", "cat"]}), ValueError, "^neighbors: class 'cat' is its own neighbour"),
    (named({"cat": ["wolf"]}), ValueError, "^neighbors: expected auxiliary classes of 'cat', got target class 'wolf'"),
    (named(NAMES, class_names=["cat", "wolf", "tree", "cat"]), ValueError, "^class_names: .*got 'cat' twice"),
    (named({}, class_names=[]), ValueError, "^class_names: expected at least one name"),
    (named(NAMES, class_names="cat"), TypeError, "^class_names: expected a sequence of names, got str"),
    (named(NAMES, class_names=["cat", 3]), TypeError, "^class_names: expected names, got int"),
    (named(NAMES, auxiliary_names=["fox", "fox"]), ValueError, "^auxiliary_names: .*got 'fox' twice"),
    (named(NAMES, auxiliary_names=["fox", "dog"]), ValueError, "^neighbors: .*auxiliary_names for 'cat', got 'lynx'"),
    (named(NAMES, auxiliary_names=["fox", "sea"]), ValueError, "^auxiliary_names: .*no name of class_names, got 'sea'"),
    (named([("cat", "fox")]), TypeError, "^neighbors: expected a mapping from names to names, got list"),
    (named({"cat": "fox"}), TypeError, "^neighbors: expected a list of names for 'cat', got str"),
    (named({"cat": [7]}), TypeError, "^neighbors: expected names for 'cat', got int"),
    (lambda: NeighborMap.from_hierarchy("aab", num_classes=2), TypeError, "^superclasses: .*got str"),
    (lambda: NeighborMap.from_hierarchy(3, num_classes=2), TypeError, "^superclasses: .*got int"),
    (lambda: NeighborMap.from_hierarchy(["a"], num_classes=2), ValueError, "^superclasses: .*num_classes=2.*got 1"),
    (lambda: NeighborMap.from_hierarchy(["a", []], num_classes=1), TypeError, "^superclasses: .*list for class 1"),
    (prototypes(torch.tensor([[1.0, 0], [0, 1], [0, 0]])), ValueError, "^prototypes: .*longer than 0.*for class 2"),
    (prototypes(torch.tensor([[1.0, 0], [0, math.nan]])), ValueError, "^prototypes: .*finite.*for class 1"),
    (prototypes(np.array([[1.0, 0], [0, -math.inf]])), ValueError, "^prototypes: .*finite.*for class 1"),
    (prototypes(torch.eye(4).long()), TypeError, "^prototypes: expected a floating Tensor or array, got torch.int64"),
    (prototypes([[1.0]]), TypeError, "^prototypes: .*got list"),
    (prototypes(torch.ones(4)), ValueError, r"^prototypes: expected shape \(K, D\).*got \(4,\)"),
    (prototypes(torch.ones(2, 0)), ValueError, r"^prototypes: expected shape \(K, D\).*got \(2, 0\)"),
    (prototypes(classes=5), ValueError, r"^prototypes: .*num_classes=5.*got \(4, 4\)"),
    (prototypes(lower=-1.1), ValueError, r"^lower: expected a cosine similarity in \[-1, 1\], got -1.1"),
    (prototypes(upper=math.nan), ValueError, "^upper: .*got nan"),
    (prototypes(upper=True), TypeError, "^upper: expected a number, got bool"),
    (prototypes(lower=0.9, upper=0.8), ValueError, "^lower, upper: expected lower <= upper, got 0.9 and 0.8"),
    (prototypes(max_neighbors=0), ValueError, "^max_neighbors: expected at least 1, got 0"),
    (prototypes(class_counts=[1, 2, 3]), ValueError, r"^class_counts: expected shape \(2,\), got \(3,\)"),
    (prototypes(class_counts=[1, 0]), ValueError, "^class_counts: expected positive finite counts"),
    (lambda: small().neighbors_of(7), IndexError, r"^k: expected a class in \[0, 7\), got 7"),
    (lambda: small().neighbors_of(-1), IndexError, r"^k: expected a class in \[0, 7\), got -1"),
    (lambda: small().neighbors_of("cat"), TypeError, "^k: expected an integer, got str"),
    (lambda: small().rows("forward"), ValueError, "^mode: expected one of plain, back, .*got 'forward'"),
    (csr([0, 2, 3, 4], [1, 2, 0, 1]), ValueError, "^offsets, classes: not a map of 1 target and 2 auxiliary"),
    (csr([0, 2, 3, 4], [2, 1, 0, 0]), ValueError, "^offsets, classes: not a map"),  # not ascending
    (csr([0, 1, 3, 4], [1, 2, 0, 0]), ValueError, "^offsets, classes: not a map"),
    (csr([0, 2, 1, 4], [1, 2, 0, 0]), ValueError, "^offsets, classes: not a map"),
    (csr([0, 3, 2, 4], [0, 1, 1, 2, 0, 0], num_classes=2, num_auxiliary=1), ValueError, "^offsets, classes: not a map"),
    (csr([1, 2, 3, 4], [1, 2, 0, 0]), ValueError, "^offsets, classes: not a map"),
    (csr([0, 2, 3, 4], [1, 9, 0, 0]), IndexError, "expected auxiliary classes"),
    (csr([0, 2, 4], [1, 2, 0, 0]), ValueError, r"^offsets, classes: expected shapes \(4,\)"),
    (csr(torch.tensor([0, 2, 3, 4]), [1, 2, 0, 0]), TypeError, "^offsets: expected an int32 Tensor, got torch.int64"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_errors(make: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_too_many_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_neighbor_pairs, "INT32_MAX", 8)
    assert small().num_pairs == 4
    with pytest.raises(ValueError, match="at most 2.30 pairs, got 7 and 5"):
        of([*SMALL, (1, 3)])()


def test_tensors_of_a_map_make_it_again() -> None:
    for pairs, classes, auxiliary in ((SMALL, 3, 4), ([], 1, 0), ([], 2, 3)):
        neighbors = NeighborMap.from_pairs(pairs, num_classes=classes, num_auxiliary=auxiliary)
        assert NeighborMap(*neighbors.rows()[:2], num_classes=classes, num_auxiliary=auxiliary) == neighbors
