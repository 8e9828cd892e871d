"""What is compared: variants of a loss, each one function, and the families that they belong to."""

from __future__ import annotations

import pkgutil
import time
import timeit
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from types import FunctionType

import torch
from torch import Tensor

from benchmarks.interleave import Effort
from benchmarks.problems import DTYPES, Case, Problem, one_thread


@dataclass(frozen=True)
class Variant:
    """``loss(*leaves, target, *inputs, reduction)``; leaves, to which gradients flow, and inputs are the problem's.

    ``method`` names the definition that the variant has to equal; ``rounds``: it computes in the leaves' dtype.
    ``package``: the optional one that it needs, or a function of one; ``gpu_only``: it has no code for a CPU, or none
    worth comparing.
    """

    name: str
    loss: Callable[..., Tensor]
    method: str = "bias"
    leaves: tuple[str, ...] = ("logits",)
    inputs: tuple[str, ...] = ("bias",)
    compiled: bool = False
    rounds: bool = False
    package: str | None = None
    gpu_only: bool = False
    dtypes: tuple[str, ...] = DTYPES

    def tolerances(self, dtype: torch.dtype, scale: float = 1.0) -> tuple[float, float]:
        """Largest relative error of loss and gradient that counts as right; ``scale``: by what logits multiply it."""
        if self.rounds and dtype != torch.float32:
            return 5e-2, 5e-2  # bfloat16 logits near 10 are 0.03 apart: this is what users of plain torch get
        computed = 1e-5 * scale
        return computed, computed if dtype == torch.float32 else max(computed, torch.finfo(dtype).eps)

    def runs_on(self, device: str) -> bool:
        if self.gpu_only and device != "cuda":
            return False
        return self.package is None or _importable(self.package)


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
    tolerance: float = 1.0  # times what counts as right elsewhere
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


@cache
def _importable(package: str) -> bool:
    """Installed, and so are the packages that it needs: some have been installed without them."""
    try:
        pkgutil.resolve_name(package)
    except Exception:  # an extension of another torch may raise anything
        return False
    return True


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
            inputs = [x.to(dtype) if _is_vector(x) else x for x in inputs]
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


def _is_vector(x: object) -> bool:
    return isinstance(x, Tensor) and x.dim() == 1 and x.is_floating_point()


SLOW = 6.0  # times as long in bfloat16 as in float32


@cache
def slow_in_bfloat16(variant: Variant, problem: Callable[[Case], Problem], shape: str, family: str) -> bool:
    """Whether a variant takes much longer on this CPU in bfloat16 than in float32, tried out on a small case.

    By the processor time of one thread, the least of five: other processes change it little.
    For processors without bfloat16 arithmetic torch multiplies such matrices by a loop that takes up to a hundred
    times as long. What turns to float32 for the products is measured, the rest would take the whole time there is.
    """
    seconds = []
    for dtype in DTYPES:
        case = Case(shape, dtype, "upstream1", family)
        step = Step(variant, case, problem(case), variant.loss)
        with one_thread():
            step.run()
            seconds.append(min(timeit.repeat(step.run, timer=time.thread_time, number=1, repeat=5)))
    return seconds[1] > SLOW * seconds[0]
