"""The definition as an oracle: problems, their exact answer, and how far a kernel may be from it.

The rule: a kernel's largest error against float64 is no larger than twice that of plain torch in the kernel's own
dtype, plus 4 ulp of the largest value. Infinities and NaN must be where the definition has them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import ltkernels.functional as LF
from ltkernels import _ops, reference

CLASS_VECTORS = ("weight", "logit_scale", "logit_bias", "target_margin", "pairwise_margin", "sample_weight")
DIFFERENTIABLE = ("logit_scale", "logit_bias", "target_margin", "pairwise_margin", "sample_weight", "scale")

Results = dict[str, Tensor]
Loss = Callable[..., Tensor | tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Problem:
    """One call: logits (N, C), target, keyword arguments, and the names of what requires grad."""

    logits: Tensor
    target: Tensor
    options: dict = field(default_factory=dict)
    requires_grad: tuple[str, ...] = ("logits",)

    def to(self, dtype: torch.dtype) -> Problem:
        """The same values in another dtype; exact, as every dtype here widens to float64."""
        options = {
            name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in self.options.items()
        }
        target = self.target.to(dtype) if self.target.is_floating_point() else self.target
        return replace(self, logits=self.logits.to(dtype), target=target, options=options)


def definition(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    logit_scale: Tensor | None = None,
    logit_bias: Tensor | None = None,
    target_margin: Tensor | None = None,
    pairwise_margin: Tensor | None = None,
    scale: float | Tensor = 1.0,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """ltkernels.reference with the signature of margin_cross_entropy, for logits (N, C)."""
    if isinstance(scale, Tensor):
        logit_scale = scale if logit_scale is None else scale * logit_scale
        target_margin = None if target_margin is None else scale * target_margin
        scale = 1.0
    loss, lse = reference.margin_softmax(
        input, target, weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight,
        scale, reduction, ignore_index, label_smoothing,
    )  # fmt: skip
    return (loss, lse) if return_lse else loss


def upstream_of(output: Tensor) -> Tensor:
    """Upstream gradients: uneven, and exact in every dtype."""
    ramp = torch.arange(output.numel(), dtype=output.dtype) % 7 + 1
    return (ramp * 0.375).reshape(output.shape)


def evaluate(function: Loss, problem: Problem) -> Results:
    """Outputs of ``function`` and its gradients for uneven upstream gradients."""
    leaves = {}
    options = dict(problem.options)
    logits = problem.logits.detach()
    if "logits" in problem.requires_grad:
        leaves["logits"] = logits.requires_grad_()
    for name in problem.requires_grad:
        if name != "logits":
            leaves[name] = options[name] = options[name].detach().clone().requires_grad_()
    outputs = function(logits, problem.target, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = dict(zip(("loss", "lse"), (x.detach() for x in outputs), strict=False))
    if leaves:
        grads = torch.autograd.grad(outputs, list(leaves.values()), [upstream_of(x) for x in outputs])
        results |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN: an element that a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def run_kernel(problem: Problem) -> Results:
    """margin_cross_entropy on poisoned memory; a kernel must have run, and the input must be as it was."""
    before, calls = problem.logits.clone(), sum(_ops.kernel_calls().values())
    with poisoned_memory():
        results = evaluate(LF.margin_cross_entropy, problem)
    assert sum(_ops.kernel_calls().values()) > calls, "no kernel ran"
    assert same_bits(before, problem.logits), "the input was modified"
    return results


def same_bits(a: Tensor, b: Tensor) -> bool:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a.contiguous().view(integers), b.contiguous().view(integers)))
