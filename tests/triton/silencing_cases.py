"""Cases of neighbour silencing in the row kernel, run by interpreter_worker.py with those of row_cases.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from row_cases import INF, NAN, backward, case, example, launch
from torch import Tensor

from ltkernels.neighbors import NeighborMap

sys.path.insert(0, str(Path(__file__).parents[1]))
from oracle import Problem, check, run_kernel, same_bits, silencing  # noqa: E402

# Class 0 has all auxiliary classes as neighbours, class 1 none; 35 has two anchors, 36 none.
PAIRS = [(0, a) for a in range(25, 36)] + [(2, 25), (3, 26), (24, 35)]
MAP = NeighborMap.from_pairs(PAIRS, num_classes=25, num_auxiliary=12)
CLASSES = [0, 1, 2, 25, 35, 36]

VECTORS = ("logit_scale", "logit_bias", "target_margin")


def silenced_example(**options) -> Problem:
    """A row for each kind of class in MAP. A mean, as under "none" the forward pass writes no gradient."""
    problem = example(len(CLASSES), 37, **({"neighbors": MAP} | options))
    return replace(problem, target=torch.tensor(CLASSES))


def every_target(**options) -> Iterator[Problem]:
    """Class indices, smoothed ones, and probabilities on silenced classes too."""
    problem = silenced_example(**options)
    yield problem
    yield replace(problem, options=problem.options | {"label_smoothing": 0.125})
    t = torch.full((len(CLASSES), 37), 1 / 74).scatter_(1, problem.target[:, None], 0.5)
    for smoothing in (0.0, 0.125):
        more = {"row_class": problem.target.int(), "label_smoothing": smoothing}
        yield replace(problem, target=t, options=problem.options | more)


def vectors() -> dict[str, Tensor]:
    names = ("weight", *VECTORS)
    return {name: torch.linspace(0.5, 1.5 + i, 37) for i, name in enumerate(names)}


def check_silenced(problem: Problem) -> None:
    """The gradient of the logits from the forward pass, then all gradients from the backward kernels."""
    out = silencing(problem)[0] if problem.options.get("neighbor_weight", 0.0) == 0 else False
    got = check(problem)
    assert not got["dlogits"][out].any()
    wanted = ("logits", *(name for name in (*VECTORS, "pairwise_margin") if name in problem.options))
    got = check(replace(problem, requires_grad=wanted))
    assert not got["dlogits"][out].any()


@case
def every_mode() -> None:
    for mode in ("plain", "back", "target_only", "auxiliary_only"):
        for problem in every_target(mode=mode, **vectors()):
            check_silenced(problem)


@case
def every_neighbor_weight() -> None:
    for weight in (0.1, 1.0):
        for problem in every_target(neighbor_weight=weight, return_lse=True):
            check_silenced(problem)


@case
def silencing_with_a_pairwise_margin() -> None:
    delta = torch.linspace(-2, 2, 37 * 37).view(37, 37)
    for weight in (0.0, 0.1):
        for problem in every_target(neighbor_weight=weight, pairwise_margin=delta, **vectors()):
            if not problem.target.is_floating_point():
                check_silenced(problem)


@case
def silencing_with_a_mask() -> None:
    """The share of smoothing counts the classes that the mask allows, silenced ones too."""
    mask = (torch.arange(37) + torch.arange(len(CLASSES))[:, None]) % 3 > 0
    for weight, reduction in ((0.0, "mean"), (0.0, "none"), (0.1, "mean")):
        for problem in every_target(neighbor_weight=weight, mask=mask, reduction=reduction):
            got = check(problem)
            assert not got["dlogits"][~mask].any()


@case
def silenced_logits_are_not_there() -> None:
    for mode in ("plain", "back"):
        for problem in every_target(mode=mode, return_lse=True, **vectors()):
            out = silencing(problem)[0]
            for wanted in (("logits",), ("logits", *VECTORS)):
                problem = replace(problem, requires_grad=wanted)
                expected = check(problem)
                for value in (25.0, INF, NAN):
                    got = run_kernel(replace(problem, logits=problem.logits.masked_fill(out, value)))
                    assert all(same_bits(got[name], expected[name]) for name in got), (mode, value)


@case
def ignored_rows_silence_nothing() -> None:
    for mode in ("plain", "back"):
        for label in (-100, 25):
            problem = silenced_example(mode=mode, ignore_index=label, reduction="mean")
            problem.target[1::3] = label
            problem.logits[1::3] = NAN
            for wanted in (("logits",), ("logits", *VECTORS)):
                got = check(replace(problem, options=problem.options | vectors(), requires_grad=wanted))
                assert not got["dlogits"][1::3].any()


@case
def classes_out_of_range_are_nan() -> None:
    for problem in list(every_target(mode="back", **vectors()))[::2]:
        y = problem.options.get("row_class", problem.target)
        for label in (37, -1, 2**31 - 1, -(2**31)):
            y[1] = label
            good = [0, *range(2, len(CLASSES))]
            loss, stats, grad = launch(problem)
            assert loss[1].isnan() and grad[1].isnan().all() and stats[2, 1].isnan()
            assert loss[good].isfinite().all() and grad[good].isfinite().all()
            gradient, sums, _ = backward(problem, stats, torch.ones(len(CLASSES)), 3)
            assert gradient[1].isnan().all() and gradient[good].isfinite().all() and sums[:2].isnan().all()


@case
def an_empty_map_silences_nothing() -> None:
    for first in (36, 37):
        empty = NeighborMap.from_pairs([], num_classes=first, num_auxiliary=37 - first)
        check_silenced(silenced_example(neighbors=empty))


@case
def more_neighbors_than_a_block() -> None:
    """Blocks in which everything is silenced, the first one included, and rows whose neighbours are in each."""
    pairs = [(a % 2, a) for a in range(2, 297)]
    neighbors = NeighborMap.from_pairs(pairs, num_classes=2, num_auxiliary=298)
    for mode in ("plain", "back"):
        problem = example(5, 300, neighbors=neighbors, mode=mode, logit_bias=torch.linspace(-1, 1, 300))
        problem.target[:] = torch.tensor([0, 1, 2, 150, 299])
        check_silenced(problem)


@case
def row_classes_of_any_dtype_and_stride() -> None:
    problem = list(every_target())[2]
    for dtype in (torch.int64, torch.int16, torch.uint8):
        row_class = torch.tensor(CLASSES, dtype=dtype).repeat_interleave(2)[::2]
        check(replace(problem, options=problem.options | {"row_class": row_class}))
