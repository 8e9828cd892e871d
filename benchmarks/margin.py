"""margin_cross_entropy and its peers: ``(logits, target, adjustment, reduction) -> loss``.

``adjustment`` is the logit bias (C,) of logit adjustment, or the LDAM margins (C,).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import ltkernels.functional as LF
from benchmarks.problems import Case, Exact, RowProblem, exact_rows, long_tail, random_matrix
from benchmarks.variants import Family, Variant, by_name
from ltkernels import margins, reference

SHAPES = ("128x10", "128x100", "512x1000", "4096x1000", "8192x1000", "2048x8142", "2048x8192", "4096x8142")
GPU_SHAPES = ("8192x32000", "8192x8192")  # 128x100 is all launch overhead on a GPU; these are all memory traffic
# Upstream gradient 1, as in `loss.backward()`; a scaled loss, as in gradient accumulation; one value for each row.
UPSTREAMS = ("upstream1", "half", "none")
LDAM_SCALE = 30.0


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

    Their mask is uint8, which torch.where no longer takes: here it is bool. Of bfloat16 logits all of it is bfloat16;
    a mask of float32, as in their code, would turn the rest into float32.
    """
    index = torch.zeros_like(cosines, dtype=torch.bool)
    index.scatter_(1, target.view(-1, 1), True)
    batch_margin = torch.matmul(margin[None, :], index.to(margin.dtype).transpose(0, 1)).view(-1, 1)
    shifted = cosines - batch_margin
    output = torch.where(index, shifted, cosines)
    return F.cross_entropy(LDAM_SCALE * output, target, reduction=reduction)


VARIANTS = by_name(
    (
        Variant("ours", ours),
        Variant("ours-compiled", ours, compiled=True),
        Variant("eager", eager, rounds=True),
        Variant("eager-compiled", eager, rounds=True, compiled=True),
        Variant("liger", liger, rounds=True, package="liger_kernel", gpu_only=True),
        Variant("ldam-ours", ldam_ours, "ldam", ("cosines",), ("margin",)),
        Variant("ldam-authors", ldam_authors, "ldam", ("cosines",), ("margin",), rounds=True),
    )
)


class MarginProblem(RowProblem):
    """Logits, cosines (LDAM takes those), targets drawn from a long-tailed distribution, and its margins."""

    def __init__(self, case: Case, device: str = "cpu", blank: bool = False) -> None:
        counts = long_tail(case.classes)
        super().__init__(case, device, counts)
        logits = random_matrix(case, case.rows, case.classes, device, blank)
        self.cosines = (logits if blank else (logits / 3).clamp(-1, 1)).detach().requires_grad_()
        self.logits = logits.requires_grad_()
        self.bias = margins.logit_adjustment(counts).logit_bias.to(device)
        self.margin = margins.ldam(counts).target_margin.to(device)

    def exact(self, method: str) -> Exact:
        ldam = method == "ldam"
        bias, margin = (None, self.margin.double()) if ldam else (self.bias.double(), None)

        def row_loss(block: Tensor, rows: slice) -> Tensor:
            return reference.margin_softmax(
                block, self.target[rows], None, None, bias, margin, None, None, None, None, None, None,
                LDAM_SCALE if ldam else 1.0, 1.0, -1, "none", -100, 0.0,
            )[0]  # fmt: skip

        return exact_rows(self.cosines if ldam else self.logits, row_loss)


def _leave_out(case: Case, variant: Variant, device: str, quick: bool) -> bool:
    if not variant.compiled:
        return False
    # Compilation is what takes the time: half of it goes for reduction="none", nearly all of a smoke run.
    if quick:
        return (case.dtype, case.upstream, variant.name) != ("float32", "upstream1", "eager-compiled")
    return device == "cuda" and case.upstream == "none"


FAMILY = Family(
    "margin",
    MarginProblem,
    VARIANTS,
    shapes=SHAPES,
    gpu_shapes=(*GPU_SHAPES, *reversed(SHAPES)),  # should the time run out, the small ones tell least
    quick_shapes=("128x10",),
    small_shape="64x32",
    upstreams=UPSTREAMS,
    leave_out=_leave_out,
)
