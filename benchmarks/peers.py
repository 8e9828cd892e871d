"""The variants that are compared, each as one function ``(logits, target, adjustment, reduction) -> loss``.

``adjustment`` is the logit bias (C,) of logit adjustment, or the LDAM margins (C,). The variants whose names begin with
"linear" take features (N, F) instead of logits, and the linear classifier (C, F) too.
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

Loss = Callable[..., Tensor]


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


def linear_ours(features: Tensor, target: Tensor, bias: Tensor, reduction: str, classifier: Tensor) -> Tensor:
    """A linear classifier in torch, then logit adjustment by this library."""
    return ours(F.linear(features, classifier), target, bias, reduction)


def linear_eager(features: Tensor, target: Tensor, bias: Tensor, reduction: str, classifier: Tensor) -> Tensor:
    """A linear classifier whose bias is the logit bias, in plain torch."""
    return F.cross_entropy(F.linear(features, classifier, bias), target, reduction=reduction)


def linear_liger(features: Tensor, target: Tensor, bias: Tensor, reduction: str, classifier: Tensor) -> Tensor:
    """Liger-Kernel's fused classifier and cross-entropy: the logits exist a chunk of rows at a time."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(features, classifier, target, bias, reduction=reduction)


def linear_cce(features: Tensor, target: Tensor, bias: Tensor, reduction: str, classifier: Tensor) -> Tensor:
    """Apple's cut-cross-entropy: the logits never exist. It leaves out gradients below the precision of bfloat16."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(features, classifier, target, bias, reduction=reduction)


@dataclass(frozen=True)
class Variant:
    """``method`` names the definition that the variant has to equal; ``rounds``: it computes in the logits' dtype.

    ``package``: the optional one that it needs, and a GPU.
    """

    name: str
    loss: Loss
    method: str = "bias"
    compiled: bool = False
    rounds: bool = False
    package: str | None = None

    def tolerances(self, dtype: torch.dtype) -> tuple[float, float]:
        """Largest relative error of loss and gradient that counts as right."""
        if self.rounds and dtype != torch.float32:
            return 5e-2, 5e-2  # bfloat16 logits near 10 are 0.03 apart: this is what users of plain torch get
        return 1e-5, 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps

    def adjustment(self, problem: Problem) -> Tensor:
        adjustment = problem.margin if self.method == "ldam" else problem.bias
        # A float32 bias would turn the whole computation into float32.
        return adjustment.to(problem.logits.dtype) if self.rounds else adjustment


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("ours", ours),
        Variant("ours-compiled", ours, compiled=True),
        Variant("eager", eager, rounds=True),
        Variant("eager-compiled", eager, rounds=True, compiled=True),
        Variant("liger", liger, rounds=True, package="liger_kernel"),
        Variant("ldam-ours", ldam_ours, method="ldam"),
        Variant("ldam-authors", ldam_authors, method="ldam"),
        Variant("linear-ours", linear_ours, method="linear", rounds=True),
        Variant("linear-eager", linear_eager, method="linear", rounds=True),
        Variant("linear-liger", linear_liger, method="linear", rounds=True, package="liger_kernel"),
        Variant("linear-cce", linear_cce, method="linear", rounds=True, package="cut_cross_entropy"),
    )
}


def installed(device: str) -> list[str]:
    """Names of the variants that run here. Those with a linear classifier are there for the peers that fuse it."""

    def present(variant: Variant) -> bool:
        return variant.package is None or (device == "cuda" and importlib.util.find_spec(variant.package) is not None)

    names = [name for name, variant in VARIANTS.items() if present(variant)]
    fused = any(VARIANTS[name].method == "linear" and VARIANTS[name].package for name in names)
    return [name for name in names if fused or VARIANTS[name].method != "linear"]


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
        self._arguments = [self.leaf, problem.target, variant.adjustment(problem), case.reduction]
        self._leaves = [self.leaf]
        if variant.method == "linear":
            self._arguments.append(problem.classifier)
            self._leaves.append(problem.classifier)
        self._loss, self._upstream = loss, case.upstream
        self._row_upstream = {dtype: problem.row_upstream.to(dtype) for dtype in (torch.float32, self.leaf.dtype)}

    def reset(self) -> None:
        for leaf in self._leaves:
            leaf.grad = None

    @property
    def gradient_bytes(self) -> int:
        return sum(leaf.grad.nbytes for leaf in self._leaves)

    def run(self) -> Tensor:
        loss = self._loss(*self._arguments)
        if self._upstream == "upstream1":
            loss.backward()
        elif self._upstream == "half":
            (loss * 0.5).backward()
        else:
            loss.backward(self._row_upstream[loss.dtype])
        return loss
