"""Cases of the row kernel in Triton, run by interpreter_worker.py; each raises AssertionError if it fails.

A case calls either the public function, whose CPU kernels the worker has replaced by the Triton launchers, or the
launchers themselves.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import ltkernels.functional as LF
from ltkernels.neighbors import NeighborMap

sys.path.insert(0, str(Path(__file__).parents[1]))
from oracle import Problem, check, evaluate, poisoned_memory, same_bits  # noqa: E402

RANDOM_CASES = 200
CASES: dict[str, Callable[[], None]] = {}
INF, NAN = float("inf"), float("nan")


def case(function: Callable[..., None]) -> Callable[..., None]:
    """A case for each of the two kernels of the forward pass."""
    CASES[f"{function.__name__}[whole rows]"] = function
    CASES[f"{function.__name__}[two sweeps]"] = partial(in_two_sweeps, function)
    return function


def in_two_sweeps(function: Callable[[], None]) -> None:
    with limits(whole_row=0):
        function()


@contextmanager
def limits(whole_row: int | None = None, inline_rows: int | None = None) -> Iterator[None]:
    """Lower limits on what the forward pass does in one sweep, and without a kernel for the normaliser."""
    from ltkernels.triton import _launch

    names = ("WHOLE_ROW_CLASSES", "WHOLE_PLAIN_ROW_CLASSES", "INLINE_NORMALIZER_ROWS")
    values = dict(zip(names, (whole_row, whole_row, inline_rows), strict=True))
    with mock.patch.dict(vars(_launch), {name: value for name, value in values.items() if value is not None}):
        yield


# --------------------------------------------------------------------------------------------------------- random calls


def strided(x: Tensor, how: str) -> Tensor:
    """The same values with other strides or alignment; `expanded` repeats the first row."""
    rows, columns = x.shape
    if how == "padded":
        return x.new_zeros(rows, columns + 3)[:, :columns].copy_(x)
    if how == "misaligned":
        return x.new_zeros(rows * columns + 1)[1:].view(rows, columns).copy_(x)
    if how == "transposed":
        return x.new_zeros(columns, rows).t().copy_(x)
    return x[:1].expand_as(x) if how == "expanded" else x


def random_problem(seed: int, two_sweeps: bool) -> Problem:
    pick = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    rows = pick.choice([1, 2, 5] if two_sweeps else [1, 2, 7, 8, 33, 64])
    classes = pick.choice([1, 2, 3, 10, 16, 17, 31, 37, 64, 100, 129, 200, 255, 512])
    dtype = pick.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    layout = partial(pick.choice, ["contiguous", "contiguous", "padded", "misaligned", "transposed", "expanded"])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def chance(probability: float = 0.4) -> bool:
        return pick.random() < probability

    def vector(x: Tensor, fixed: bool = False) -> Tensor:
        # What may get a gradient gets one in its own dtype, which must not be finer than the arithmetic.
        dtypes = [torch.float32, torch.float32, torch.bfloat16]
        x = x.to(pick.choice([*dtypes, torch.float64]) if fixed or dtype == torch.float64 else pick.choice(dtypes))
        return torch.stack([x, -x], dim=-1)[..., 0] if chance(0.2) else x  # stride 2

    # Scale and smoothing are exact in float32: the interpreter passes every number on as float32.
    options: dict = {
        "scale": pick.choice([1.0, 1.0, 0.5, 16.0]),
        "label_smoothing": pick.choice([0.0, 0.0, 0.125, 1.0]),
    }
    options["reduction"] = pick.choice(["none", "mean", "sum"])
    probabilities = chance(0.3)
    if probabilities:
        target = normal(rows, classes).softmax(1) * (torch.rand(rows, classes, generator=generator) < 0.7)
        target = strided(target.to(dtype), layout())
    else:
        target = torch.randint(classes, (rows,), generator=generator)
        if chance():
            options["ignore_index"] = pick.choice([-100, 0, classes - 1])
            target[torch.rand(rows, generator=generator) < 0.3] = options["ignore_index"]
        if target.min() >= 0:
            target = target.to(pick.choice([torch.int64, torch.int32, torch.int16]))
        if chance(0.2):
            target = torch.stack([target, target], dim=1)[:, 0]
    if chance():
        positive = torch.rand(classes, generator=generator) < 0.9
        weight = normal(classes).exp()  # a mean over nothing but zero weights is 0/0
        options["weight"] = vector(weight if options["reduction"] == "mean" else weight * positive, fixed=True)
    if chance():
        options["logit_scale"] = vector(normal(()).exp() if chance(0.3) else normal(classes).exp())
    if chance():
        options["logit_bias"] = vector(2 * normal(classes))
    if chance():
        options["target_margin"] = vector(normal(classes).abs())
    if not probabilities and classes <= 37 and chance(0.5):
        options["pairwise_margin"] = vector(normal(classes, classes))
    if chance():
        mask = torch.rand(rows, classes, generator=generator) < 0.8
        options["mask"] = mask[0] if chance() else strided(mask, layout())
    if chance():
        options["sample_weight"] = vector(normal(rows).exp())
    if classes > 1 and chance(0.3):
        options |= random_silencing(pick, classes, exact=dtype == torch.float64)
        if probabilities:
            options["row_class"] = torch.randint(classes, (rows,), generator=generator)
    options["return_lse"] = chance(0.3)
    learnable = ("logits", "logit_scale", "logit_bias", "target_margin", "pairwise_margin", "sample_weight")
    chosen = tuple(
        name
        for name in learnable
        if name == "logits" or (name in options and options[name].dtype in (dtype, torch.float32) and chance(0.6))
    )
    if dtype == torch.float64:
        chosen = tuple(name for name in chosen if name == "logits" or options[name].dtype == dtype)
    logits = strided((3 * normal(rows, classes)).to(dtype), layout())
    return Problem(logits, target, options, chosen)


def random_silencing(pick: random.Random, classes: int, exact: bool) -> dict:
    """A map with some pairs, none included. `exact`: log(lambda) is, in float32."""
    first = pick.randrange(1, classes + 1)
    pairs = [(pick.randrange(first), pick.randrange(first, classes)) for _ in range(classes) if first < classes]
    neighbors = NeighborMap.from_pairs(pairs[pick.choice([0, 2]) :], num_classes=first, num_auxiliary=classes - first)
    weight = pick.choice([0.0, 0.0, 1.0] if exact else [0.0, 0.0, 0.1, 1.0])
    mode = pick.choice(["plain", "target_only", "auxiliary_only", "back"] if weight == 0.0 else ["plain"])
    return {"neighbors": neighbors, "neighbor_weight": weight, "mode": mode}


def random_case(seed: int) -> None:
    two_sweeps = seed % 2 == 1
    with limits(whole_row=0 if two_sweeps else None, inline_rows=0 if seed % 6 < 2 else None):
        check(random_problem(seed, two_sweeps))


CASES |= {f"random[{seed}]": partial(random_case, seed) for seed in range(RANDOM_CASES)}

# ----------------------------------------------------------------------------------------------------------- edge cases


def example(rows: int = 4, classes: int = 37, **options) -> Problem:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator)
    return Problem(logits, torch.randint(classes, (rows,), generator=generator), options)


REDUCTIONS = ("none", "mean", "sum")
EVERY_TARGET = ({}, {"label_smoothing": 0.125})


def launch(problem: Problem, reduction: int = 0, with_grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """margin_softmax_fwd itself, which has no checks before it."""
    from ltkernels.triton.margin_softmax import margin_softmax_fwd

    smoothing = problem.options.get("label_smoothing", 0.0)
    with poisoned_memory():
        return margin_softmax_fwd(
            problem.logits, problem.target, *arguments(problem), reduction, -100, smoothing, with_grad
        )


def arguments(problem: Problem) -> tuple[object, ...]:
    """What the launchers take between target and reduction."""
    options = problem.options
    names = (
        "weight", "logit_scale", "logit_bias", "target_margin", "pairwise_margin", "mask", "sample_weight", "row_class",
    )  # fmt: skip
    offsets, classes, back_from = None, None, -1
    if "neighbors" in options:
        offsets, classes, back_from = options["neighbors"].rows(options.get("mode", "plain"))
    numbers = options.get("scale", 1.0), options.get("neighbor_weight", 0.0), back_from
    return (*map(options.get, names), offsets, classes, *numbers)


@case
def first_block_is_minus_infinity() -> None:
    for options in EVERY_TARGET:
        problem = example(mask=torch.arange(37) >= 33, **options)
        problem.target[:] = 35
        problem.logits[:, :33] = NAN  # what is masked may hold anything
        check(problem)
    problem = example()
    problem.target[:] = 35
    problem.logits[:, :33] = -INF
    check(problem)


@case
def logits_far_from_zero() -> None:
    for options in EVERY_TARGET:
        for offset in (-120.0, 1e4, -1e4):
            problem = example(**options)
            problem.logits.add_(offset)
            check(problem)


@case
def one_class() -> None:
    for reduction in REDUCTIONS:
        check(example(5, 1, reduction=reduction))


@case
def classes_one_more_than_a_block() -> None:
    for classes in (17, 33, 65, 257):
        check(example(3, classes, logit_bias=torch.linspace(-1, 1, classes), reduction="sum"))


@case
def no_rows() -> None:
    for reduction in REDUCTIONS:
        options = {"logit_bias": torch.ones(37), "pairwise_margin": torch.ones(37, 37), "reduction": reduction}
        problem = example(0, **options)
        for wanted in (("logits",), ("logits", "logit_bias", "pairwise_margin")):
            check(Problem(problem.logits, problem.target, options, wanted), partial(evaluate, LF.margin_cross_entropy))


@case
def all_rows_ignored() -> None:
    for reduction in REDUCTIONS:
        problem = example(reduction=reduction, ignore_index=7, logit_bias=torch.ones(37), return_lse=True)
        problem.target[:] = 7
        problem.logits[:] = NAN
        for wanted in (("logits",), ("logits", "logit_bias")):
            got = check(Problem(problem.logits, problem.target, problem.options, wanted))
            assert not got["dlogits"].any()


@case
def ignored_rows_may_hold_anything() -> None:
    for options in EVERY_TARGET:
        for value in (NAN, INF, -INF):
            problem = example(weight=torch.linspace(0.5, 2, 37), logit_scale=torch.ones(37), **options)
            problem.target[1] = -100
            problem.logits[1] = value
            for wanted in (("logits",), ("logits", "logit_scale")):
                got = check(Problem(problem.logits, problem.target, problem.options, wanted))
                assert not got["dlogits"][1].any()


@case
def minus_infinity_gives_logit_scale_no_gradient() -> None:
    for logit_scale in (torch.ones(37), torch.ones(())):
        problem = example(logit_scale=logit_scale)
        problem.target[:] = 5
        problem.logits[:, 7:9] = -INF
        check(Problem(problem.logits, problem.target, problem.options, ("logits", "logit_scale")))


@case
def minus_infinity_without_a_mask() -> None:
    problem = example(reduction="none")
    problem.target[:] = 5
    problem.logits[0, 5] = -INF  # target: +inf
    problem.logits[1, 6] = -INF
    problem.logits[2] = -INF
    check(problem)
    check(Problem(problem.logits, problem.target, problem.options | {"label_smoothing": 0.125}))
    check(Problem(problem.logits, problem.target, problem.options | {"weight": torch.arange(37.0) - 5}))
    t = torch.zeros(4, 37).scatter_(1, problem.target[:, None], 1.0)
    check(Problem(problem.logits, t, problem.options))


@case
def nan_and_infinite_rows() -> None:
    for options in EVERY_TARGET:
        mask = torch.ones(37, dtype=torch.bool)
        mask[3] = False
        problem = example(reduction="sum", mask=mask, **options)
        problem.target[:] = 8
        problem.logits[0, 5], problem.logits[1, 6], problem.logits[2] = NAN, INF, NAN
        loss, stats, grad = launch(problem)
        assert loss[:3].isnan().all() and stats[:, :3].sum(0).isnan().all() and loss[3].isfinite()
        assert grad[:3][:, mask].isnan().all() and not grad[:, 3].any() and grad[3].isfinite().all()


@case
def masked_target_and_row_without_classes() -> None:
    for options in EVERY_TARGET:
        mask = torch.ones(4, 37, dtype=torch.bool)
        problem = example(reduction="none", mask=mask, logit_bias=torch.ones(37), return_lse=True, **options)
        mask[0, problem.target[0]] = False
        mask[1] = False
        for wanted in (("logits",), ("logits", "logit_bias")):
            got = check(Problem(problem.logits, problem.target, problem.options, wanted))
            assert got["loss"][0] == INF and got["loss"][1].isnan() and not got["dlogits"][~mask].any()


@case
def probability_on_a_masked_class_is_dropped() -> None:
    mask = torch.arange(37) % 3 > 0
    problem = example(reduction="none", mask=mask)
    t = torch.full((4, 37), 1 / 37)
    for smoothing in (0.0, 0.125):
        check(Problem(problem.logits, t, problem.options | {"label_smoothing": smoothing}))


@case
def zero_weight_on_a_masked_target_is_zero_loss() -> None:
    weight, mask = torch.ones(37), torch.ones(37, dtype=torch.bool)
    weight[4], mask[4] = 0.0, False
    problem = example(reduction="none", weight=weight, mask=mask)
    problem.target[:2] = 4
    assert not check(problem)["loss"][:2].any()


@case
def target_out_of_range_is_nan() -> None:
    for options in EVERY_TARGET:
        for label in (37, -1, 2**31 + 1, -(2**40)):
            problem = example(weight=torch.ones(37), target_margin=torch.ones(37), **options)
            problem.target[1] = label
            good = [0, 2, 3]
            loss, stats, grad = launch(problem)
            assert loss[1].isnan() and grad[1].isnan().all() and stats[2, 1].isnan()
            assert loss[good].isfinite().all() and grad[good].isfinite().all()
            assert launch(problem, reduction=1)[0].isnan()
            gradients = backward(problem, stats, torch.ones(4), 7)
            assert gradients[0][1].isnan().all() and gradients[0][good].isfinite().all()
            assert gradients[1].isnan().all(), "sums over the rows hide the NaN"


def backward(problem: Problem, stats: Tensor, grad_loss: Tensor, grads: int, grad_lse: Tensor | None = None):
    from ltkernels.triton.margin_softmax import margin_softmax_bwd

    smoothing = problem.options.get("label_smoothing", 0.0)
    with poisoned_memory():
        return margin_softmax_bwd(
            grad_loss, grad_lse, stats, problem.logits, problem.target, *arguments(problem), 0, -100, smoothing, grads
        )


@case
def only_the_gradients_asked_for() -> None:
    problem = example(6)
    loss, stats, grad = launch(problem, with_grad=False)
    assert grad.shape == (0,) and grad.dtype == torch.float32 and same_bits(loss, launch(problem)[0])
    full = backward(problem, stats, torch.ones(()).expand(6), 7, torch.ones(12)[::2])
    for grads in range(8):
        some = backward(problem, stats, torch.ones(()), grads, torch.ones(()).expand(6))
        for bit, (one, expected) in enumerate(zip(some, full, strict=True)):
            assert same_bits(one, expected) if grads >> bit & 1 else one.shape == (0,)


def parts_of_rows_add_up() -> None:
    options = {"logit_bias": torch.ones(3), "pairwise_margin": torch.ones(3, 3), "weight": torch.ones(3)}
    problem = example(1100, 3, **options)
    check(Problem(problem.logits, problem.target, options, ("logits", "logit_bias", "pairwise_margin")))


@case
def same_bits_twice() -> None:
    problem = random_problem(8, two_sweeps=True)
    with limits(inline_rows=0):
        first, second = check(problem), check(problem)
    assert all(same_bits(first[name], second[name]) for name in first)


def scale_in_place() -> None:
    from ltkernels.triton.margin_softmax import margin_softmax_scale_

    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        factor_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        for shape in ((3, 7), (64, 129), (0, 4)):
            grad = torch.randn(shape).to(dtype)
            if grad.numel():
                grad[0] = 0
            for factor in (1.0, -2.0, INF, NAN):  # the interpreter rounds ties to bfloat16 up
                expected = torch.where(grad == 0, grad, (grad.to(factor_dtype) * factor).to(dtype))
                got = grad.clone()
                margin_softmax_scale_(got, torch.full((), factor, dtype=factor_dtype))
                assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7)), (dtype, shape, factor)


def the_public_function_runs_these_kernels() -> None:
    from ltkernels.triton.margin_softmax import kernel_calls

    before = kernel_calls.copy()
    logits = torch.randn(4, 5, requires_grad=True)
    bias = torch.zeros(5, requires_grad=True)
    LF.margin_cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward()
    LF.margin_cross_entropy(logits, torch.tensor([0, 1, 2, 3]), logit_bias=bias).backward()
    with limits(inline_rows=0):
        pairwise = torch.zeros(5, 5, requires_grad=True)
        LF.margin_cross_entropy(logits, torch.tensor([0, 1, 2, 3]), pairwise_margin=pairwise).backward()
    counts = {name.removeprefix("triton.margin_softmax."): n for name, n in (kernel_calls - before).items()}
    counts.pop("scale", None)  # only where the graph holds the last reference to the gradient
    expected = {"forward": 3, "row_coefficients": 2, "backward": 2, "pairwise_backward": 1, "normalizer": 2}
    assert counts == expected, counts


@case
def rows_far_apart() -> None:
    """By so many elements that their number is 0 in 32 bits. Memory that nobody touches is not there."""
    distance, target = 2**32, torch.tensor([1, 2])
    logits = torch.empty(distance + 8, dtype=torch.bfloat16).as_strided((2, 8), (distance, 1))
    mask = torch.empty(distance + 8, dtype=torch.bool).as_strided((2, 8), (distance, 1))
    logits.copy_(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)))
    mask.copy_(torch.tensor([[1, 1, 1, 1, 1, 0, 0, 1], [0, 1, 1, 1, 1, 1, 1, 1]]))
    near = logits.contiguous().float().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(near.masked_fill(~mask, -INF), target, reduction="none")
    far = logits.requires_grad_()
    loss = LF.margin_cross_entropy(far, target, mask=mask, reduction="none")
    torch.testing.assert_close(loss, wanted)
    (got,), (want,) = torch.autograd.grad(loss.sum(), far), torch.autograd.grad(wanted.sum(), near)
    torch.testing.assert_close(got.float(), want, rtol=1e-2, atol=1e-3)


CASES |= {f.__name__: f for f in (parts_of_rows_add_up, scale_in_place, the_public_function_runs_these_kernels)}
