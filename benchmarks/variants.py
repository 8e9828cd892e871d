"""What is compared: variants of a loss, each one function, and the families that they belong to."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FunctionType

import torch
from torch import Tensor

from benchmarks.interleave import Effort
from benchmarks.problems import DTYPES, Case, Problem


@dataclass(frozen=True)
class Variant:
    """``loss(*leaves, target, *inputs, reduction)``; leaves, to which gradients flow, and inputs are the problem's.

    ``method`` names the definition that the variant has to equal; ``rounds``: it computes in the leaves' dtype.
    ``package``: the optional one that it needs, and a GPU.
    """

    name: str
    loss: Callable[..., Tensor]
    method: str = "bias"
    leaves: tuple[str, ...] = ("logits",)
    inputs: tuple[str, ...] = ("bias",)
    compiled: bool = False
    rounds: bool = False
    package: str | None = None
    dtypes: tuple[str, ...] = DTYPES

    def tolerances(self, dtype: torch.dtype) -> tuple[float, float]:
        """Largest relative error of loss and gradient that counts as right."""
        if self.rounds and dtype != torch.float32:
            return 5e-2, 5e-2  # bfloat16 logits near 10 are 0.03 apart: this is what users of plain torch get
        return 1e-5, 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps

    def runs_on(self, device: str) -> bool:
        if self.package is None:
            return True
        return device == "cuda" and importlib.util.find_spec(self.package) is not None


@dataclass(frozen=True)
class Family:
    """One public function and its peers. ``problem(case, device, blank)`` makes the inputs of a case."""

    name: str
    problem: Callable[[Case, str, bool], Problem]
    variants: dict[str, Variant]
    shapes: tuple[str, ...]
    gpu_shapes: tuple[str, ...]  # in the order of what they tell: the time may run out
    quick_shapes: tuple[str, ...]
    small_shape: str  # for what takes memory once, before memory is measured
    upstreams: tuple[str, ...] = ("upstream1",)
    # (case, variant, device, quick): what is not worth its time.
    leave_out: Callable[[Case, Variant, str, bool], bool] = lambda case, variant, device, quick: False
    effort: Callable[[Case, Effort, str], Effort] = lambda case, effort, device: effort
    # Both dtypes: inputs, exact gradients in float64, and what plain torch takes for a pass.
    bytes_per_logit: int = 72

    def rows(self, device: str, quick: bool) -> list[tuple[Case, str]]:
        """Cases and names of variants. Dtypes vary fast: those of a shape and upstream are measured together."""
        shapes = self.quick_shapes if quick else self.gpu_shapes if device == "cuda" else self.shapes
        cases = [
            Case(shape, dtype, upstream, self.name)
            for shape in shapes
            for upstream in self.upstreams
            for dtype in DTYPES
        ]
        return [
            (case, name)
            for case in cases
            for name, variant in self.variants.items()
            if case.dtype in variant.dtypes
            and variant.runs_on(device)
            and not self.leave_out(case, variant, device, quick)
        ]


def by_name(variants: Iterable[Variant]) -> dict[str, Variant]:
    return {variant.name: variant for variant in variants}


def compiled(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile for one set of shapes.

    The cache of torch.compile belongs to the code object and is searched entry by entry: a code object of its own
    keeps other shapes and dtypes out of it, and every call finds its graph at the first try.
    """
    copy = FunctionType(loss.__code__.replace(), loss.__globals__, loss.__name__, loss.__defaults__, loss.__closure__)
    return torch.compile(copy, dynamic=False, fullgraph=True)


class Step:
    """One forward and backward pass of a variant, to be repeated: ``reset`` is not timed, ``run`` is."""

    def __init__(self, variant: Variant, case: Case, problem: Problem, loss: Callable[..., Tensor]) -> None:
        self.leaves = [getattr(problem, name) for name in variant.leaves]
        dtype = self.leaves[0].dtype
        inputs = [getattr(problem, name) for name in variant.inputs]
        if variant.rounds:
            # A float32 vector would turn the whole computation into float32.
            inputs = [x.to(dtype) if isinstance(x, Tensor) and x.dim() == 1 else x for x in inputs]
        self._arguments = [*self.leaves, problem.target, *inputs, case.reduction]
        self._loss, self._upstream = loss, case.upstream
        self._row_upstream = {kind: problem.row_upstream.to(kind) for kind in (torch.float32, dtype)}

    def reset(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    @property
    def gradients(self) -> list[Tensor]:
        return [leaf.grad for leaf in self.leaves]

    @property
    def gradient_bytes(self) -> int:
        return sum(gradient.nbytes for gradient in self.gradients)

    def run(self) -> Tensor:
        loss = self._loss(*self._arguments)
        if self._upstream == "upstream1":
            loss.backward()
        elif self._upstream == "half":
            (loss * 0.5).backward()
        else:
            loss.backward(self._row_upstream[loss.dtype])
        return loss
