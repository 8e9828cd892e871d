"""Measures all variants of one shape and upstream gradient together, and keeps the results for the tests that ask.

pytest-benchmark times one test after the other; minutes lie between two variants. Here the first test of a group
times the whole group, both dtypes included, in one interleaved loop; each test then reports its own samples.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from benchmarks import memory, roofline
from benchmarks.interleave import Effort, interleave
from benchmarks.peers import VARIANTS, Step, Variant, compiled
from benchmarks.problems import DTYPES, Case, Exact, Problem, errors, exact_answer

# Both dtypes: logits, cosines, exact gradients in float64 of both methods, and what plain torch takes for a pass.
BYTES_PER_LOGIT = 72


class LeftOut(Exception):
    """A group that is not measured, and why; what has been measured stays."""


@dataclass
class Measured:
    """Results of one variant in one case; ``failure`` instead if its answer was wrong or it raised."""

    samples: list[float] = field(default_factory=list)
    loss_error: float | None = None
    gradient_error: float | None = None
    peak_memory: int | None = None
    roofline: dict[str, float] = field(default_factory=dict)  # bytes per second by name
    failure: BaseException | None = None

    def extra_info(self, case: Case, variant: Variant, device: str) -> dict:
        gigabytes = case.bytes * 1e-9
        return {
            "shape": case.shape,
            "dtype": case.dtype,
            "upstream": case.upstream,
            "variant": variant.name,
            "device": device,
            "bytes": case.bytes,
            # Not for a linear classifier, which does not start from logits.
            "gb_per_s": None if variant.method == "linear" else gigabytes / statistics.median(self.samples),
            **{f"{name}_gb_per_s": rate * 1e-9 for name, rate in self.roofline.items()},
            "peak_memory_bytes": self.peak_memory,
            "loss_error": self.loss_error,
            "gradient_error": self.gradient_error,
        }


class Suite:
    """``selected`` are the (case, variant name) that the run will ask for: nothing else is measured."""

    def __init__(
        self,
        selected: Iterable[tuple[Case, str]],
        effort: Effort,
        device: str = "cpu",
        measure_memory: bool = True,
        time_limit: float = float("inf"),
    ) -> None:
        self._selected = list(dict.fromkeys(selected))
        self.device = device
        self._effort, self._measure_memory = effort, measure_memory
        self._deadline = time.monotonic() + time_limit
        self._group: tuple[str, str] | None = None  # (shape, upstream) of _measured
        self._measured: dict[tuple[Case, str], Measured] = {}
        self._shape: str | None = None  # of everything below
        self._problems: dict[str, Problem] = {}
        self._exact: dict[tuple[str, str], Exact] = {}
        self._compiled: dict[tuple[str, str, str], object] = {}

    def measured(self, case: Case, name: str) -> Measured:
        group = (case.shape, case.upstream)
        if group != self._group:
            if time.monotonic() > self._deadline:
                raise LeftOut("the time limit has passed")
            self._group, self._measured = None, {}
            self._measure([(c, n) for c, n in self._selected if (c.shape, c.upstream) == group])
            self._group = group
        return self._measured[case, name]

    # One group

    def _measure(self, selected: list[tuple[Case, str]]) -> None:
        self._use_shape(selected[0][0])
        steps: dict[tuple[Case, str], Step] = {}
        for case, name in selected:
            result = self._measured[case, name] = Measured()
            try:
                step = self._step(case, VARIANTS[name])
                self._check(case, VARIANTS[name], step, result)
                steps[case, name] = step
            except Exception as failure:  # a wrong variant fails its own test, not those of the others
                result.failure = failure
        rates = {
            (case, name): step
            for case in dict.fromkeys(case for case, _ in steps)
            for name, step in roofline.steps(self._problems[case.dtype].logits).items()
        }
        samples = interleave({**rates, **steps}, self._effort, self.device)
        for case, name in steps:
            result = self._measured[case, name]
            result.samples = samples[case, name]
            result.roofline = {
                rate: case.bytes / statistics.median(samples[of, rate]) for of, rate in rates if of == case
            }
            if self._measure_memory and memory.measurable(case, VARIANTS[name], self.device):
                result.peak_memory = self._peak_memory(case, VARIANTS[name], steps[case, name])

    def _check(self, case: Case, variant: Variant, step: Step, result: Measured) -> None:
        """Asserts that loss and gradient are right."""
        problem = self._problems[case.dtype]
        step.reset()
        loss = step.run().detach()
        gradient = step.leaf.grad
        assert gradient.dtype == step.leaf.dtype and gradient.shape == step.leaf.shape
        result.loss_error, result.gradient_error = errors(
            case, problem, self._exact_answer(case, variant.method), loss, gradient
        )
        step.reset()
        tolerances = variant.tolerances(problem.logits.dtype)
        assert result.loss_error <= tolerances[0], f"loss: relative error {result.loss_error:.2g}"
        assert result.gradient_error <= tolerances[1], f"gradient: relative error {result.gradient_error:.2g}"

    def _peak_memory(self, case: Case, variant: Variant, step: Step) -> int | None:
        return memory.peak_on_cuda(step) if self.device == "cuda" else memory.peak_on_cpu(case, variant)

    # What the groups of one shape share

    def _use_shape(self, case: Case) -> None:
        if case.shape == self._shape:
            return
        self._shape = None
        for shared in (self._problems, self._exact, self._compiled):
            shared.clear()
        torch._dynamo.reset()
        if self.device == "cuda":
            needed = case.rows * case.classes * BYTES_PER_LOGIT
            if torch.cuda.mem_get_info()[0] < needed:
                raise LeftOut(f"needs {needed / 1e9:.0f} GB of GPU memory")
        for dtype in DTYPES:
            if any(c.shape == case.shape and c.dtype == dtype for c, _ in self._selected):
                self._problems[dtype] = Problem(Case(case.shape, dtype, case.upstream), self.device)
        self._shape = case.shape

    def _exact_answer(self, case: Case, method: str) -> Exact:
        key = (case.dtype, method)
        if key not in self._exact:
            self._exact[key] = exact_answer(self._problems[case.dtype], method)
        return self._exact[key]

    def _step(self, case: Case, variant: Variant) -> Step:
        loss = variant.loss
        if variant.compiled:
            key = (variant.name, case.dtype, case.reduction)
            if key not in self._compiled:
                self._compiled[key] = compiled(variant.loss)
            loss = self._compiled[key]
        return Step(variant, case, self._problems[case.dtype], loss)
