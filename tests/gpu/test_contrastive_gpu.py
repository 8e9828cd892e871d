"""The contrastive kernels on a GPU: the cases of the interpreter, the public function and every module."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from behaviour import (
    check_backward_takes_the_gradient_as_it_is,
    check_cuda_graph,
    check_no_synchronisation,
    check_same_bits_every_time,
)
from torch import Tensor

import ltkernels.functional as LF
from ltkernels import _ops
from ltkernels import nn as lnn

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "triton")]
import contrastive_cases  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]

CUDA = "cuda"
RANDOM_CASES = 16  # of those of the interpreter: each compiles kernels of its own
CASES = [name for name in contrastive_cases.CASES if not name.startswith("random")]
CASES += [f"random[{seed}]" for seed in range(RANDOM_CASES)]


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive_cases, "DEVICE", CUDA)
    contrastive_cases.CASES[name]()


# ----------------------------------------------------------------------------------------------------- public function


def triton_calls() -> int:
    return sum(n for name, n in _ops.kernel_calls().items() if name.startswith("triton.contrastive"))


def embeddings(rows: int, width: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)))


def inputs(rows: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, temperatures and labels on the CPU."""
    acc = torch.promote_types(dtype, torch.float32)
    return embeddings(rows, width).to(dtype), torch.linspace(0.1, 1, rows, dtype=acc), torch.arange(rows) % 7


def on(device: str, query: Tensor, temperature: Tensor, labels: Tensor, **options) -> tuple[Tensor, ...]:
    """The loss on a device and its gradients, on the CPU."""
    query, temperature = (x.detach().to(device).requires_grad_() for x in (query, temperature))
    loss = LF.contrastive_loss(query, temperature=temperature, labels=labels.to(device), **options)
    gradients = torch.autograd.grad(loss.sum(), (query, temperature))
    return tuple(x.detach().cpu().double() for x in (loss, *gradients))


# 128: one part of the width; 256, 512 and 1024: several; 37: neither a multiple of 16 nor aligned.
@pytest.mark.parametrize("width", [37, 128, 256, 512, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_function_in_every_width(width: int, dtype: torch.dtype) -> None:
    query, temperature, labels = inputs(515, width, dtype)
    before = triton_calls()
    got = on(CUDA, query, temperature, labels, reduction="none")
    assert triton_calls() > before
    want = on("cpu", query.double(), temperature.double(), labels, reduction="none")
    unit = {torch.float64: 1e-12, torch.float32: 1e-4}.get(dtype, 1e-2)
    for x, y in zip(got, want, strict=True):
        assert (x - y).abs().amax() <= unit * y.abs().amax()


@pytest.mark.parametrize("width", [128, 200, 256, 512])
def test_tf32_is_a_choice(width: int) -> None:
    query, temperature, labels = inputs(300, width)
    exact = on("cpu", query.double(), temperature.double(), labels)
    float32 = on(CUDA, query, temperature, labels)
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "tf32"
    try:
        tf32 = on(CUDA, query, temperature, labels)
    finally:
        switch.fp32_precision = before
    errors = [float((found[1] - exact[1]).norm() / exact[1].norm()) for found in (float32, tf32)]
    assert errors[0] < 1e-5 < errors[1] < 1e-2


def call(rows: int = 700, width: int = 96) -> Callable[[], tuple[Tensor, ...]]:
    """A call with gradients of every kind, on the device."""
    g = torch.Generator().manual_seed(0)
    query, key, extra = (embeddings(n, width, n).to(CUDA).requires_grad_() for n in (rows, 901, rows + 1))
    temperature, bias = (torch.rand(n, generator=g).add(0.1).to(CUDA).requires_grad_() for n in (rows, 901))
    margin = torch.randn(5, 5, generator=g).to(CUDA).requires_grad_()
    labels, key_labels = (torch.randint(-1, 5, (n,), generator=g).to(CUDA) for n in (rows, 901))

    def step() -> tuple[Tensor, ...]:
        loss = LF.contrastive_loss(
            query, key, temperature=temperature, labels=labels, key_labels=key_labels, key_bias=bias,
            pair_margin=margin, extra_positive=extra[:rows],
        )  # fmt: skip
        return loss, *torch.autograd.grad(loss, (query, key, extra, temperature, bias, margin))

    return step


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_a_cpu_refuses_is_nan(compiled: bool) -> None:
    """Loss and gradient, without a read of the values: no row looks as if it had no positive, or another label."""
    query = embeddings(300, 64).to(CUDA).requires_grad_()
    pairs, labels = LF.view_pairs(300, device=CUDA), torch.arange(300, device=CUDA) % 7
    for change, value in (("positive_index", 300), ("positive_index", -1), ("positive_index", 5), ("labels", -2)):
        options = {change: (pairs if change == "positive_index" else labels).clone()}
        options[change][5] = value

        def loss(query: Tensor, options: dict = options) -> Tensor:
            return LF.contrastive_loss(query, temperature=0.1, normalize=True, **options)

        found = (torch.compile(loss, fullgraph=True) if compiled else loss)(query)
        assert found.isnan() and torch.autograd.grad(found, query)[0].isnan().any(), (change, value)
    margin = torch.zeros(6, 6, device=CUDA)  # label 6 has none
    assert LF.contrastive_loss(query, temperature=0.1, labels=labels, pair_margin=margin).isnan()


def test_same_bits_every_time() -> None:
    check_same_bits_every_time(call())


def balanced() -> Callable[[], tuple[Tensor, ...]]:
    """The module that sums the rows of each class besides."""
    z, prototypes = embeddings(700, 96).to(CUDA).requires_grad_(), embeddings(7, 96, 3).to(CUDA).requires_grad_()
    loss, labels = lnn.BalancedContrastiveLoss(count_anchor=False), torch.arange(700, device=CUDA) % 7

    def step() -> tuple[Tensor, ...]:
        value = loss(z, labels, prototypes)
        return value, *torch.autograd.grad(value, (z, prototypes))

    return step


def test_balanced_loss_has_the_same_bits_every_time() -> None:
    check_same_bits_every_time(balanced())


def test_no_synchronisation() -> None:
    check_no_synchronisation(call())
    check_no_synchronisation(balanced())


def test_cuda_graph() -> None:
    check_cuda_graph(call())


def test_backward_takes_the_gradient_as_it_is() -> None:
    query, temperature, labels = (x.to(CUDA) for x in inputs(4096, 256))
    query.requires_grad_()
    check_backward_takes_the_gradient_as_it_is(
        lambda: LF.contrastive_loss(query, temperature=temperature, labels=labels), query
    )


def test_torch_compile() -> None:
    query, temperature, labels = (x.to(CUDA) for x in inputs(300, 64))
    query.requires_grad_()

    def loss(query: Tensor) -> Tensor:
        return LF.contrastive_loss(2 * query, temperature=temperature, labels=labels)

    compiled = torch.compile(loss, fullgraph=True)
    got, want = (torch.autograd.grad(function(query), query)[0] for function in (compiled, loss))
    torch.testing.assert_close(got, want)


# ------------------------------------------------------------------------------------------------------------- modules

ROWS, WIDTH, CLASSES = 64, 24, 5
LABELS = torch.arange(ROWS) % CLASSES
INDEX = torch.arange(ROWS // 2)
MODULES: dict[str, tuple[Callable[[], torch.nn.Module], tuple[Tensor, ...]]] = {
    "NTXent": (lambda: lnn.NTXentLoss(0.2), ()),
    "NTXent, pairs": (lambda: lnn.NTXentLoss(0.2, "pairs"), (LABELS,)),
    "SupCon": (lambda: lnn.SupConLoss(0.1, base_temperature=0.07), (LABELS,)),
    "TS": (lambda: lnn.TemperatureScheduledLoss(t_max=10), ()),
    "TASE": (
        lambda: lnn.TemperatureContrastiveLoss(torch.linspace(0.1, 1, 32), torch.linspace(1, 2, 32)),
        (INDEX,),
    ),
    "Balanced": (lambda: lnn.BalancedContrastiveLoss(0.1), (LABELS, embeddings(CLASSES, WIDTH, 3))),
    "MACL": (lambda: lnn.MACLLoss(0.1), ()),
    "iSogCLR": (lambda: lnn.ISogCLRLoss(32, 0.1), (INDEX,)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    """Loss, gradient and buffers as on the CPU."""
    make, arguments = MODULES[name]
    found, before = [], triton_calls()
    for device in (CUDA, "cpu"):
        module = make().to(device)
        x = embeddings(ROWS, WIDTH).to(device).requires_grad_()
        loss = module(x, *(argument.to(device) for argument in arguments))
        loss.backward()
        found.append({"loss": loss.detach(), "gradient": x.grad, **dict(module.named_buffers())})
    assert triton_calls() > before
    torch.testing.assert_close(*({name: x.cpu() for name, x in of.items()} for of in found), rtol=1e-4, atol=1e-6)


def test_moco_and_its_queue() -> None:
    found = []
    for device in (CUDA, "cpu"):
        torch.manual_seed(0)
        module = lnn.MoCoLoss(WIDTH, 100)
        module = module.to(device)
        losses = []
        for step in range(4):
            query, key = (embeddings(40, WIDTH, 2 * step + i).to(device) for i in range(2))
            query.requires_grad_()
            loss = module(query, key)
            loss.backward()
            module.enqueue(key)
            losses += [loss.detach().cpu(), query.grad.cpu()]
        found.append((losses, [x.cpu() for x in module.buffers()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
