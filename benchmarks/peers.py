"""The variants that are compared, each as one function ``(logits, target, adjustment, reduction) -> loss``.

``adjustment`` is the logit bias (C,) of logit adjustment, or the LDAM margins (C,).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor

import ltkernels.functional as LF
from benchmarks.problems import LDAM_SCALE, Case, Problem

Loss = Callable[[Tensor, Tensor, Tensor, str], Tensor]


def ours(logits: Tensor, target: Tensor, bias: Tensor, reduction: str) -> Tensor:
    """Logit adjustment by this library."""
    return LF.margin_cross_entropy(logits, target, logit_bias=bias, reduction=reduction)


def eager(logits: Tensor, target: Tensor, bias: Tensor, reduction: str) -> Tensor:
    """Logit adjustment as one writes it in plain torch."""
    return F.cross_entropy(logits + bias, target, reduction=reduction)


def liger(logits: Tensor, target: Tensor, bias: Tensor, reduction: str) -> Tensor:
    """Liger-Kernel's Triton cross-entropy, which has no logit bias: the addition stays outside."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits + bias, target, reduction=reduction)


def ldam_ours(cosines: Tensor, target: Tensor, margin: Tensor, reduction: str) -> Tensor:
    """LDAM by this library."""
    return LF.margin_cross_entropy(cosines, target, target_margin=margin, scale=LDAM_SCALE, reduction=reduction)


def ldam_authors(cosines: Tensor, target: Tensor, margin: Tensor, reduction: str) -> Tensor:
    """LDAM by the formula of its authors' code (Cao et al., arXiv:1906.07413), mask, matrix product and all.

    Their mask is uint8, which torch.where no longer takes: here it is bool.
    """
    index = torch.zeros_like(cosines, dtype=torch.bool)
    index.scatter_(1, target.view(-1, 1), True)
    batch_margin = torch.matmul(margin[None, :], index.float().transpose(0, 1)).view(-1, 1)
    shifted = cosines - batch_margin
    output = torch.where(index, shifted, cosines)
    return F.cross_entropy(LDAM_SCALE * output, target, reduction=reduction)


@dataclass(frozen=True)
class Variant:
    """``method`` names the definition that the variant has to equal; ``rounds``: it computes in the logits' dtype."""

    name: str
    label: str
    loss: Loss
    method: str = "bias"
    compiled: bool = False
    rounds: bool = False

    def tolerances(self, dtype: torch.dtype) -> tuple[float, float]:
        """Largest relative error of loss and gradient that counts as right."""
        if self.rounds and dtype != torch.float32:
            return 5e-2, 5e-2  # bfloat16 logits near 10 are 0.03 apart: this is what users of plain torch get
        return 1e-5, 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps

    def adjustment(self, problem: Problem) -> Tensor:
        adjustment = problem.adjustment(self.method)
        # A float32 bias would turn the whole computation into float32.
        return adjustment.to(problem.logits.dtype) if self.rounds else adjustment


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("ours", "ltkernels", ours),
        Variant("ours-compiled", "ltkernels in torch.compile", ours, compiled=True),
        Variant("eager", "F.cross_entropy(x + b)", eager, rounds=True),
        Variant("eager-compiled", "torch.compile of it", eager, rounds=True, compiled=True),
        Variant("liger", "Liger-Kernel", liger, rounds=True),
        Variant("ldam-ours", "ltkernels, LDAM", ldam_ours, method="ldam"),
        Variant("ldam-authors", "LDAM, authors' formula", ldam_authors, method="ldam"),
    )
}


def installed(device: str) -> list[str]:
    """Names of the variants that run here. Liger-Kernel needs CUDA and is optional."""
    with_liger = device == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    return [name for name in VARIANTS if name != "liger" or with_liger]


def compiled(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile for one set of shapes.

    The cache of torch.compile belongs to the code object and is searched entry by entry: a code object of its own
    keeps other shapes and dtypes out of it, and every call finds its graph at the first try.
    """
    copy = FunctionType(loss.__code__.replace(), loss.__globals__, loss.__name__, loss.__defaults__, loss.__closure__)
    return torch.compile(copy, dynamic=False, fullgraph=True)


class Step:
    """One forward and backward pass of a variant, to be repeated: ``reset`` is not timed, ``run`` is."""

    def __init__(self, variant: Variant, case: Case, problem: Problem, loss: Loss) -> None:
        self.leaf = problem.leaf(variant.method)
        self._arguments = (self.leaf, problem.target, variant.adjustment(problem), case.reduction)
        self._loss, self._upstream = loss, case.upstream
        self._row_upstream = {dtype: problem.row_upstream.to(dtype) for dtype in (torch.float32, self.leaf.dtype)}

    def reset(self) -> None:
        self.leaf.grad = None

    def run(self) -> Tensor:
        loss = self._loss(*self._arguments)
        if self._upstream == "upstream1":
            loss.backward()
        elif self._upstream == "half":
            (loss * 0.5).backward()
        else:
            loss.backward(self._row_upstream[loss.dtype])
        return loss
