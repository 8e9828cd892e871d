"""linear_margin_cross_entropy and its peers: ``(input, linear_weight, target, bias, reduction) -> loss``.

Shapes are N x D x C: N samples with D features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ltkernels.functional as LF
from benchmarks import variants
from benchmarks.interleave import Effort
from benchmarks.problems import Case, Problem, long_tail, random_matrix
from benchmarks.variants import Family, Variant, by_name
from ltkernels import margins

SHAPES = ("256x2048x8142", "2048x512x8142", "4096x512x50304")
LONG = 2e11  # floating-point operations of a pass from which it takes seconds on a CPU


def ours(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor, reduction: str) -> Tensor:
    """The logits exist a chunk of rows at a time."""
    return LF.linear_margin_cross_entropy(x, weight, target, logit_bias=bias, reduction=reduction)


def separate(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor, reduction: str) -> Tensor:
    """All logits by torch, then this library's loss over them."""
    return LF.margin_cross_entropy(F.linear(x, weight), target, logit_bias=bias, reduction=reduction)


def eager(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor, reduction: str) -> Tensor:
    """Classifier and logit adjustment as one writes them in plain torch."""
    return F.cross_entropy(F.linear(x, weight) + bias, target, reduction=reduction)


def torch_whole(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor, reduction: str) -> Tensor:
    """torch's own function, which holds all logits unless it is given options."""
    return F.linear_cross_entropy(x, weight, target, linear_bias=bias, reduction=reduction)


def torch_chunked(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor, reduction: str) -> Tensor:
    """torch's own function in chunks of rows, of the size and by the policy that it chooses itself."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight, target, linear_bias=bias, reduction=reduction, options=options)


def liger(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor, reduction: str) -> Tensor:
    """Liger-Kernel's fused classifier and cross-entropy: the logits exist a chunk of rows at a time."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(x, weight, target, bias, reduction=reduction)


def cut(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor, reduction: str) -> Tensor:
    """Apple's cut-cross-entropy: the logits never exist. It leaves out gradients below the precision of bfloat16."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, weight, target, bias, reduction=reduction)


# torch 2.11 has none.
LINEAR_OF_TORCH = "torch.nn.functional.linear_cross_entropy"


def _variant(name: str, loss, **options: Any) -> Variant:
    # Each of them multiplies in the inputs' dtype, which rounds 16-bit logits or their gradient.
    return Variant(name, loss, leaves=("x", "weight"), **{"rounds": True} | options)


VARIANTS = by_name(
    (
        _variant("ours", ours),
        _variant("separate", separate),
        _variant("eager", eager),
        _variant("eager-compiled", eager, compiled=True),
        _variant("torch", torch_whole, package=LINEAR_OF_TORCH),
        _variant("torch-chunked", torch_chunked, package=LINEAR_OF_TORCH),
        _variant("liger", liger, package="liger_kernel", gpu_only=True),
        # It takes 16-bit types only.
        _variant("cut", cut, package="cut_cross_entropy", gpu_only=True, dtypes=("bfloat16",)),
    )
)


# ------------------------------------------------------------------------------------------------------------- problem


@dataclass(frozen=True)
class ExactLinear:
    """By the definition in float64, upstream gradient 1: the mean loss, and some rows of the gradient of each leaf."""

    loss: Tensor
    rows: tuple[Tensor, Tensor]  # samples, classes
    gradients: tuple[Tensor, Tensor]  # of those rows


class LinearProblem(Problem):
    """Features, a classifier that makes logits of unit variance of them, and targets from a long tail."""

    unit = "gflop_per_s"
    COMPARED = 512  # rows of each gradient, evenly spread: all of them would take longer than the measurement

    def __init__(self, case: Case, device: str = "cpu", blank: bool = False) -> None:
        counts = long_tail(case.classes)
        super().__init__(case, device, counts)
        n, d, c = case.sizes
        self.x = random_matrix(case, n, d, device, blank).requires_grad_()
        self.weight = (random_matrix(case, c, d, device, blank, seed=1) / d**0.5).requires_grad_()
        self.bias = margins.logit_adjustment(counts).logit_bias.to(device)

    def work(self) -> float:
        """Three matrix products: the logits, and the gradients of features and classifier."""
        n, d, c = self.case.sizes
        return 6e-9 * n * d * c

    def roofline(self) -> dict[str, Any]:
        long = self.x.device.type == "cpu" and (
            self.work() * 1e9 >= LONG or (self.case.dtype == "bfloat16" and slow_in_bfloat16("eager"))
        )
        return {} if long else {"products": Products(self.x.detach(), self.weight.detach())}

    def exact(self, method: str) -> ExactLinear:
        n, _, c = self.case.sizes
        x, weight, target = self.x.detach().double(), self.weight.detach().double(), self.target
        bias = self.bias.double()
        samples = torch.arange(0, n, max(1, n // self.COMPARED), device=x.device)
        classes = torch.arange(0, c, max(1, c // self.COMPARED), device=x.device)
        logits, lse = torch.empty(n, dtype=x.dtype, device=x.device), torch.empty(n, dtype=x.dtype, device=x.device)
        for rows in range(0, n, 256):
            block = slice(rows, rows + 256)
            v = torch.addmm(bias, x[block], weight.T)
            lse[block] = v.logsumexp(1)
            logits[block] = v.gather(1, target[block, None]).squeeze(1)
        every = torch.arange(n, device=x.device)
        return ExactLinear(
            (lse - logits).mean(),
            (samples, classes),
            (
                self._logit_gradient(x, weight, bias, lse, samples, torch.arange(c, device=x.device)) @ weight,
                self._logit_gradient(x, weight, bias, lse, every, classes).T @ x,
            ),
        )

    def _logit_gradient(self, x, weight, bias, lse, samples: Tensor, classes: Tensor) -> Tensor:
        """(softmax - one-hot) / N at some samples and classes."""
        v = torch.addmm(bias[classes], x[samples], weight[classes].T)
        probability = (v - lse[samples, None]).exp_()
        return (probability - (classes == self.target[samples, None]).to(v.dtype)) / len(x)

    def errors(self, case: Case, exact: ExactLinear, loss: Tensor, gradients: Sequence[Tensor]) -> tuple[float, float]:
        loss_error = (loss.double() - exact.loss).abs() / exact.loss.abs()
        worst = [
            (gradient[rows].double() - answer).abs().max() / answer.abs().max()
            for gradient, rows, answer in zip(gradients, exact.rows, exact.gradients, strict=True)
        ]
        return loss_error.item(), torch.stack(worst).max().item()  # NaN stays NaN


class Products:
    """The three matrix products alone, into memory that has been written before: no classifier can be faster."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self._x, self._weight = x, weight
        self._logits = x @ weight.T
        self._gradients = torch.zeros_like(x), torch.zeros_like(weight)

    def reset(self) -> None:
        pass

    def run(self) -> None:
        torch.mm(self._x, self._weight.T, out=self._logits)
        torch.mm(self._logits, self._weight, out=self._gradients[0])
        torch.mm(self._logits.T, self._x, out=self._gradients[1])


def slow_in_bfloat16(name: str) -> bool:
    return variants.slow_in_bfloat16(VARIANTS[name.removesuffix("-compiled")], LinearProblem, "64x512x1024", "linear")


def _operations(case: Case) -> int:
    n, d, c = case.sizes
    return 6 * n * d * c


def _leave_out(case: Case, variant: Variant, device: str, quick: bool) -> bool:
    if quick:
        return variant.compiled and case.dtype != "float32"
    if device == "cuda":
        return False
    if _operations(case) >= LONG:
        # A pass takes some ten seconds. Without options torch does what the eager variant does.
        return case.dtype == "bfloat16" or variant.name in ("torch", "eager-compiled")
    return case.dtype == "bfloat16" and slow_in_bfloat16(variant.name)


def _effort(case: Case, effort: Effort, device: str) -> Effort:
    """By rounds, not by time: a pass takes half a second on a CPU, of which few fit, or ten."""
    if device == "cuda":
        return effort
    return replace(effort, min_rounds=min(effort.min_rounds, 3) if _operations(case) >= LONG else 11)


FAMILY = Family(
    "linear",
    LinearProblem,
    VARIANTS,
    shapes=SHAPES,
    gpu_shapes=(*reversed(SHAPES),),
    quick_shapes=("64x32x100",),
    small_shape="64x32x48",
    leave_out=_leave_out,
    effort=_effort,
)
