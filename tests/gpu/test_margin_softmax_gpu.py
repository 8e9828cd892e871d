"""The row kernel on a GPU, through the public function: values, sizes, streams and graphs."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from behaviour import (
    check_backward_takes_the_gradient_as_it_is,
    check_cuda_graph,
    check_no_synchronisation,
    check_same_bits_every_time,
)
from torch import Tensor

import ltkernels.functional as LF
from ltkernels import _ops
from ltkernels.neighbors import NeighborMap

sys.path.insert(0, str(Path(__file__).parents[1]))
from oracle import Problem, check, evaluate, public, same_bits, silencing  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]

CUDA = "cuda"


def on_gpu(problem: Problem) -> Problem:
    moved = (Tensor, NeighborMap)
    options = {name: x.to(CUDA) if isinstance(x, moved) else x for name, x in problem.options.items()}
    return Problem(problem.logits.to(CUDA), problem.target.to(CUDA), options, problem.requires_grad)


def run_on_gpu(problem: Problem) -> dict[str, Tensor]:
    """Results of the Triton kernels, on the CPU, where the definition is evaluated."""
    before = triton_calls()
    results = evaluate(public, on_gpu(problem))
    assert len(problem.logits) == 0 or triton_calls() > before, "no Triton kernel ran"
    return {name: x.cpu() for name, x in results.items()}


def triton_calls() -> int:
    return sum(n for name, n in _ops.kernel_calls().items() if name.startswith("triton."))


gpu_check = partial(check, function=run_on_gpu)


def problem(
    rows: int, classes: int, dtype: torch.dtype = torch.float32, requires_grad: tuple[str, ...] = ("logits",), **options
) -> Problem:
    generator = torch.Generator().manual_seed(rows * 31 + classes)
    logits = (3 * torch.randn(rows, classes, generator=generator)).to(dtype)
    return Problem(logits, torch.randint(classes, (rows,), generator=generator), options, requires_grad)


def adjusted(classes: int) -> dict[str, Tensor]:
    """Scale, bias, margin and weight for each class."""
    return {
        "logit_scale": torch.linspace(0.5, 1.5, classes),
        "logit_bias": torch.linspace(-3, 3, classes),
        "target_margin": torch.linspace(0, 0.5, classes),
        "weight": torch.linspace(0.5, 2, classes),
    }


# -------------------------------------------------------------------------------------------------------------- values


# 1: one lane; 10, 100: several rows a program; 257: one more than a block; 1000: not a multiple of 16; 4096 and 8192:
# the last whole rows; 8142: rows 4-byte aligned; 50304: two sweeps.
@pytest.mark.parametrize("classes", [1, 10, 100, 257, 1000, 1024, 4096, 8142, 8192, 50304])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_class_counts(classes: int, dtype: torch.dtype) -> None:
    gpu_check(problem(37, classes, dtype))
    gpu_check(problem(37, classes, dtype, **adjusted(classes), label_smoothing=0.1, scale=2.0))


@pytest.mark.parametrize("rows", [0, 1, 128, 512, 513, 4096, 70_001])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_row_counts(rows: int, reduction: str) -> None:
    u = torch.rand(rows, generator=torch.Generator().manual_seed(0)) + 0.5
    options = {"sample_weight": u, "reduction": reduction}
    gpu_check(problem(rows, 33, requires_grad=("logits", "sample_weight"), **options))
    wanted = ("logits", "logit_scale", "logit_bias", "target_margin")
    gpu_check(problem(rows, 33, torch.bfloat16, wanted, **adjusted(33), **options))


@pytest.mark.parametrize("classes", [10, 365, 1000, 5000])
@pytest.mark.parametrize("probabilities", [False, True], ids=["index", "probabilities"])
def test_everything_at_once(classes: int, probabilities: bool) -> None:
    wanted = ("logits", "logit_scale", "logit_bias", "target_margin")
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(600, classes, generator=generator) < 0.9
    call = problem(600, classes, torch.float32, wanted, **adjusted(classes), mask=mask, label_smoothing=0.1)
    if probabilities:
        target = torch.rand(600, classes, generator=generator).softmax(1)
        call = Problem(call.logits, target, call.options, wanted)
    elif classes <= 1000:
        call.options["pairwise_margin"] = torch.randn(classes, classes, generator=generator)
        call = Problem(call.logits, call.target, call.options, (*wanted, "pairwise_margin"))
    gpu_check(call)
    gpu_check(Problem(call.logits, call.target, call.options | {"return_lse": True}, call.requires_grad))


def neighbors_of(classes: int) -> NeighborMap:
    """Two thirds are target classes; class 0 has 40 neighbours, others up to two."""
    first = 2 * classes // 3
    pairs = [(a % min(first, 97), a) for a in range(first, classes)] + [
        (0, a) for a in range(first, min(first + 40, classes))
    ]
    return NeighborMap.from_pairs(pairs, num_classes=first, num_auxiliary=classes - first)


# 30: several rows a program; 1000: whole rows; 6012: two sweeps.
@pytest.mark.parametrize("classes", [30, 1000, 6012])
@pytest.mark.parametrize("silencing_of", [("plain", 0.0), ("back", 0.0), ("plain", 0.1), ("plain", 1.0)], ids=str)
@pytest.mark.parametrize("kind", ["index", "smoothed", "probabilities"])
def test_auxiliary_classes(classes: int, silencing_of: tuple[str, float], kind: str) -> None:
    mode, weight = silencing_of
    options = {"neighbors": neighbors_of(classes), "mode": mode, "neighbor_weight": weight, "reduction": "sum"}
    wanted = ("logits", "logit_scale", "logit_bias", "target_margin")
    call = problem(130, classes, torch.bfloat16, wanted, **adjusted(classes), **options)
    call.target[:4] = torch.tensor([0, 0, classes - 1, -100])
    if kind == "smoothed":
        call.options["label_smoothing"] = 0.1
    elif kind == "probabilities":
        row_class = call.target.clamp(min=0)
        t = torch.rand(130, classes, generator=torch.Generator().manual_seed(1)).softmax(1).bfloat16()
        call = Problem(call.logits, t, call.options | {"row_class": row_class}, wanted)
    for gradients in (("logits",), wanted):
        call = Problem(call.logits, call.target, call.options, gradients)
        got = gpu_check(call)
        if weight == 0:
            out = silencing(call)[0]
            assert not got["dlogits"][out].any()
            filled = call.logits.masked_fill(out, torch.nan)
            again = run_on_gpu(Problem(filled, call.target, call.options, gradients))
            assert all(same_bits(again[name], got[name]) for name in got)


@pytest.mark.parametrize("classes", [1000, 10_000])
def test_strides_and_alignment(classes: int) -> None:
    wide = torch.randn(64, classes + 3, device=CUDA, dtype=torch.bfloat16)
    target = torch.randint(classes, (64,), device=CUDA)
    padded, misaligned = wide[:, :classes], wide[:, 1 : classes + 1]
    for logits in (
        padded,
        misaligned,
        padded.t().contiguous().t(),
        padded[:1].expand(64, -1),
        padded[::2].repeat(2, 1),
    ):
        logits, dense = logits.detach().requires_grad_(), logits.contiguous().requires_grad_()
        losses = [LF.margin_cross_entropy(x, target) for x in (logits, dense)]
        gradients = [torch.autograd.grad(loss, x)[0] for loss, x in zip(losses, (logits, dense), strict=True)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-2, atol=1e-8)


def test_edge_cases() -> None:
    call = problem(8, 5000, reduction="none")
    call.logits[0, :4999] = -torch.inf  # whole blocks of -inf
    call.target[0] = 4999
    call.logits[1] -= 120
    call.logits[2] += 1e4
    call.logits[3] = -torch.inf
    call.logits[4, 7] = torch.nan
    mask = torch.ones(8, 5000, dtype=torch.bool)
    mask[5, call.target[5]] = False
    mask[6] = False
    call.options["mask"] = mask
    got = gpu_check(call)
    assert not got["dlogits"][~mask].any()
    ignored = problem(300, 100, ignore_index=7)
    ignored.target[::3] = 7
    ignored.logits[::3] = torch.nan
    assert not gpu_check(ignored)["dlogits"][::3].any()


def test_targets_out_of_range_are_nan() -> None:
    logits = torch.randn(4, 1000, device=CUDA, requires_grad=True)
    target = torch.tensor([3, 1000, -1, 2**40], device=CUDA)
    loss = LF.margin_cross_entropy(logits, target, reduction="none")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, True, True]
    assert logits.grad.isnan().any(1).tolist() == [False, True, True, True]
    assert LF.margin_cross_entropy(logits, target).isnan()
    problems = torch.stack([target, target.clamp(0, 999)])
    each = torch.vmap(lambda t: LF.margin_cross_entropy(logits, t, torch.ones(1000, device=CUDA)))(problems)
    assert each.isnan().tolist() == [True, False]


@pytest.mark.large
def test_more_than_two_to_the_31_logits() -> None:
    rows, classes = 2**16 + 8, 2**15 + 8
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16, device=CUDA)
    logits[-1] = torch.linspace(-4, 4, classes, device=CUDA)
    logits.requires_grad_()
    target = torch.full((rows,), classes - 1, device=CUDA)
    loss = LF.margin_cross_entropy(logits, target, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    last = logits.detach()[-1:].double().requires_grad_()
    last_loss = torch.nn.functional.cross_entropy(last, target[-1:], reduction="sum")
    (expected,) = torch.autograd.grad(last_loss, last)
    torch.testing.assert_close(gradient[-1:].double(), expected, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(loss.double(), last_loss + (rows - 1) * torch.tensor(classes).log(), rtol=1e-5, atol=0)


@pytest.mark.large
def test_rows_that_are_2_to_the_32_elements_apart() -> None:
    memory = torch.empty(2**32 + 64, dtype=torch.bfloat16, device=CUDA)
    far = memory.as_strided((2, 64), (2**32, 1)).copy_(torch.randn(2, 64)).requires_grad_()
    near = far.detach().contiguous().requires_grad_()
    target = torch.tensor([3, 40], device=CUDA)
    losses = [LF.margin_cross_entropy(x, target, reduction="none") for x in (far, near)]
    assert same_bits(*losses)
    assert same_bits(*(torch.autograd.grad(loss.sum(), x)[0] for loss, x in zip(losses, (far, near), strict=True)))


# ---------------------------------------------------------------------------------------------------------- behaviour


def training_call(classes: int = 1000, rows: int = 600):
    """A call with gradients of every kind, and its inputs on the device."""
    call = on_gpu(problem(rows, classes, **adjusted(classes)))
    leaves = [call.logits, *call.options.values()]
    leaves = [x.requires_grad_() for name, x in zip(("logits", *call.options), leaves, strict=True) if name != "weight"]
    delta = torch.zeros(classes, classes, device=CUDA, requires_grad=True)

    def step() -> tuple[Tensor, ...]:
        loss = LF.margin_cross_entropy(call.logits, call.target, pairwise_margin=delta, **call.options)
        return (loss, *torch.autograd.grad(loss, [*leaves, delta]))

    return step


def test_same_bits_every_time() -> None:
    check_same_bits_every_time(training_call())


def test_no_synchronisation() -> None:
    step = training_call()
    logits, target = torch.randn(128, 100, device=CUDA, requires_grad=True), torch.zeros(128, device=CUDA).long()

    def both() -> tuple[Tensor, ...]:
        loss = LF.margin_cross_entropy(logits, target)
        return (*step(), *torch.autograd.grad(loss / 4, logits))

    check_no_synchronisation(both)


def test_cuda_graph() -> None:
    check_cuda_graph(training_call())


def test_torch_compile() -> None:
    call = on_gpu(problem(128, 100))
    bias = torch.linspace(-1, 1, 100, device=CUDA)

    def loss(logits: Tensor) -> Tensor:
        return LF.margin_cross_entropy(2 * logits, call.target, logit_bias=bias)

    expected = torch.autograd.grad(loss(call.logits.requires_grad_()), call.logits)[0]
    compiled = torch.compile(loss, fullgraph=True)
    before = triton_calls()
    got = torch.autograd.grad(compiled(call.logits), call.logits)[0]
    assert triton_calls() > before
    torch.testing.assert_close(got, expected)


def test_a_scaled_and_a_retained_gradient() -> None:
    call = on_gpu(problem(128, 100))
    logits = call.logits.requires_grad_()
    once = torch.autograd.grad(LF.margin_cross_entropy(logits, call.target), logits)[0]
    loss = LF.margin_cross_entropy(logits, call.target)
    assert same_bits(torch.autograd.grad(4 * loss, logits, retain_graph=True)[0], 4 * once)
    assert same_bits(torch.autograd.grad(loss, logits)[0], once)


def test_backward_takes_the_gradient_as_it_is() -> None:
    logits, target = torch.randn(1024, 1000, device=CUDA, requires_grad=True), torch.zeros(1024, device=CUDA).long()
    check_backward_takes_the_gradient_as_it_is(lambda: LF.margin_cross_entropy(logits, target), logits)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current() -> None:
    call = problem(64, 100)
    loss = LF.margin_cross_entropy(call.logits.to("cuda:1"), call.target.to("cuda:1"))
    expected = LF.margin_cross_entropy(call.logits, call.target)
    assert loss.device == torch.device("cuda:1")
    torch.testing.assert_close(loss.cpu(), expected)
