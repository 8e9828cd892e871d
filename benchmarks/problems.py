"""What is measured: shapes, upstream gradients, inputs, and the exact answer that every variant has to give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ltkernels import margins, reference

SHAPES = ("128x10", "128x100", "512x1000", "4096x1000", "8192x1000", "2048x8142", "2048x8192", "4096x8142")
GPU_SHAPES = ("8192x32000", "8192x8192")  # 128x100 is all launch overhead on a GPU; these are all memory traffic
QUICK_SHAPES = ("128x10",)
DTYPES = ("float32", "bfloat16")
# Upstream gradient 1, as in `loss.backward()`; a scaled loss, as in gradient accumulation; one value for each row.
UPSTREAMS = ("upstream1", "half", "none")

LDAM_SCALE = 30.0
IMBALANCE = 100.0
FEATURES = 256  # of the linear classifier in front of the loss, for peers that fuse it
CHUNK = 1 << 16  # float64 elements that are compared at a time: the temporaries stay in the cache


@dataclass(frozen=True)
class Case:
    """One row of the results: a shape, a dtype and an upstream gradient."""

    shape: str
    dtype: str
    upstream: str

    def __str__(self) -> str:
        return f"{self.shape}-{self.dtype}-{self.upstream}"

    @property
    def rows(self) -> int:
        return int(self.shape.split("x")[0])

    @property
    def classes(self) -> int:
        return int(self.shape.split("x")[1])

    @property
    def bytes(self) -> int:
        """The least that forward and backward have to move: the logits in, the gradient out."""
        return 2 * self.rows * self.classes * getattr(torch, self.dtype).itemsize

    @property
    def reduction(self) -> str:
        return "none" if self.upstream == "none" else "mean"


class Problem:
    """Logits, cosines (LDAM takes those) or features, targets drawn from a long-tailed distribution, and its margins.

    ``blank`` leaves the values out: the memory that a variant takes does not depend on them.
    """

    def __init__(self, case: Case, device: str = "cpu", blank: bool = False) -> None:
        rows, classes, dtype = case.rows, case.classes, getattr(torch, case.dtype)
        generator, on_device = torch.Generator().manual_seed(0), torch.Generator(device).manual_seed(0)
        exponent = torch.arange(classes, dtype=torch.float64) / (classes - 1)
        counts = 500.0 * IMBALANCE**-exponent
        if blank:
            logits = cosines = torch.zeros(rows, classes, dtype=dtype, device=device)
        else:
            logits = torch.randn(rows, classes, generator=on_device, device=device).to(dtype)
            cosines = (logits / 3).clamp(-1, 1)
        features = torch.randn(rows, FEATURES, generator=on_device, device=device).to(dtype)
        classifier = torch.randn(classes, FEATURES, generator=on_device, device=device) / FEATURES**0.5
        self.classifier = classifier.to(dtype).requires_grad_()
        self._leaves = {
            "bias": logits.requires_grad_(),
            "ldam": cosines.detach().requires_grad_(),
            "linear": features.requires_grad_(),
        }
        self.target = torch.multinomial(counts, rows, replacement=True, generator=generator).to(device)
        self.bias = margins.logit_adjustment(counts).logit_bias.to(device)
        self.margin = margins.ldam(counts).target_margin.to(device)
        self.row_upstream = ((torch.arange(rows) % 7 + 1) * 0.375).to(device)  # exact in bfloat16

    @property
    def logits(self) -> Tensor:
        return self._leaves["bias"]

    def leaf(self, method: str) -> Tensor:
        """What the loss is computed from, and differentiated with respect to."""
        return self._leaves[method]


# ----------------------------------------------------------------------------------------------------------- exactness


@dataclass(frozen=True)
class Exact:
    """Loss of each row and its gradient by the definition in float64."""

    row_loss: Tensor  # (N,)
    row_gradient: Tensor  # (N, C), or (N, features)


def exact_answer(problem: Problem, method: str) -> Exact:
    """The definition of the library, in float64, a few rows at a time."""
    x, target = problem.leaf(method).detach(), problem.target
    classifier = problem.classifier.detach().double() if method == "linear" else None
    losses, gradient = [], torch.empty_like(x, dtype=torch.float64)
    bias = problem.bias.double() if method != "ldam" else None
    margin = problem.margin.double() if method == "ldam" else None
    scale = LDAM_SCALE if method == "ldam" else 1.0
    with _one_thread():
        for rows in _row_blocks(problem.logits):
            block = x[rows].double().requires_grad_()
            logits = block if classifier is None else block @ classifier.T
            loss, _ = reference.margin_softmax(
                logits, target[rows], None, None, bias, margin, None, None, None, scale, "none", -100, 0.0
            )
            (gradient[rows],) = torch.autograd.grad(loss.sum(), block)
            losses.append(loss.detach())
    return Exact(torch.cat(losses), gradient)


def errors(case: Case, problem: Problem, exact: Exact, loss: Tensor, gradient: Tensor) -> tuple[float, float]:
    """The largest errors of loss and gradient, relative to the largest loss and the largest gradient."""
    n = case.rows
    upstream = problem.row_upstream.double() if case.upstream == "none" else torch.ones_like(exact.row_loss) / n
    if case.upstream == "half":
        upstream = upstream / 2
    wanted = exact.row_loss if case.reduction == "none" else exact.row_loss.mean()
    loss_error = (loss.double() - wanted).abs().max() / wanted.abs().max()
    worst, largest = torch.zeros(2, dtype=torch.float64, device=gradient.device)
    with _one_thread():
        for rows in _row_blocks(gradient):
            answer = exact.row_gradient[rows] * upstream[rows, None]
            worst = torch.maximum(worst, (gradient[rows].double() - answer).abs().max())  # NaN stays NaN
            largest = torch.maximum(largest, answer.abs().max())
    return loss_error.item(), (worst / largest).item()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Blocks that fit the cache are too small to share: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _row_blocks(x: Tensor) -> list[slice]:
    # On a GPU a block has to fill the device; on a CPU it has to fit the cache.
    rows = max(1, CHUNK * (1 if x.device.type == "cpu" else 64) // x.shape[1])
    return [slice(i, i + rows) for i in range(0, x.shape[0], rows)]
