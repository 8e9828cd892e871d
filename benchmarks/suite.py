"""Measures all variants of one shape and upstream gradient together, and keeps the results for the tests that ask.

pytest-benchmark times one test after the other; minutes lie between two variants. Here the first test of a group
times the whole group, both dtypes included, in one interleaved loop; each test then reports its own samples.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks import memory
from benchmarks.families import FAMILIES
from benchmarks.interleave import Effort, interleave
from benchmarks.problems import DTYPES, Case, Problem
from benchmarks.variants import Step, Variant, compiled


class LeftOut(Exception):
    """A group that is not measured, and why; what has been measured stays."""


@dataclass
class Measured:
    """Results of one variant in one case; ``failure`` instead if its answer was wrong or it raised."""

    samples: list[float] = field(default_factory=list)
    loss_error: float | None = None
    gradient_error: float | None = None
    peak_memory: int | None = None
    # In the problem's unit: the rate of the variant and, by name, those that it is held against.
    rate: dict[str, float] = field(default_factory=dict)
    roofline: dict[str, float] = field(default_factory=dict)
    rate_over: dict[str, float] = field(default_factory=dict)  # each of the roofline, the median over rounds
    info: dict[str, Any] = field(default_factory=dict)
    seconds_of_check: float = 0.0
    failure: BaseException | None = None

    def extra_info(self, case: Case, variant: Variant, device: str) -> dict:
        return {
            "family": case.family,
            "shape": case.shape,
            "dtype": case.dtype,
            "upstream": case.upstream,
            "variant": variant.name,
            "device": device,
            "bytes": case.bytes,
            **self.rate,
            **self.roofline,
            **self.info,
            "rate_over": self.rate_over or None,
            "peak_memory_bytes": self.peak_memory,
            "loss_error": self.loss_error,
            "gradient_error": self.gradient_error,
        }


def _group(case: Case) -> tuple[str, str, str]:
    return case.family, case.shape, case.upstream


class Suite:
    """``selected`` are the (case, variant name) that the run will ask for: nothing else is measured."""

    def __init__(
        self,
        selected: Iterable[tuple[Case, str]],
        effort: Effort,
        device: str = "cpu",
        measure_memory: bool = True,
        deadline: float = float("inf"),
    ) -> None:
        self._selected = list(dict.fromkeys(selected))
        self.device = device
        self._effort, self._measure_memory = effort, measure_memory
        self._deadline = deadline  # of time.monotonic()
        self._group: tuple[str, str, str] | None = None  # (family, shape, upstream) of _measured
        self._measured: dict[tuple[Case, str], Measured] = {}
        self._shape: tuple[str, str] | None = None  # (family, shape) of everything below
        self._problems: dict[str, Problem] = {}
        self._exact: dict[tuple[str, str], Any] = {}
        self._compiled: dict[tuple[str, str, str], object] = {}

    def measured(self, case: Case, name: str) -> Measured:
        group = _group(case)
        if group != self._group:
            if time.monotonic() > self._deadline:
                raise LeftOut("the time limit has passed")
            self._group, self._measured = None, {}
            self._measure([(c, n) for c, n in self._selected if _group(c) == group])
            self._group = group
        return self._measured[case, name]

    # One group

    def _measure(self, selected: list[tuple[Case, str]]) -> None:
        self._use_shape(selected[0][0])
        steps: dict[tuple[Case, str], Step] = {}
        for case, name in selected:
            result = self._measured[case, name] = Measured()
            try:
                variant = FAMILIES[case.family].variants[name]
                step = self._step(case, variant)
                self._check(case, variant, step, result)
                steps[case, name] = step
            except Exception as failure:  # a wrong variant fails its own test, not those of the others
                result.failure = failure
        rates = {
            (case, name): step
            for case in dict.fromkeys(case for case, _ in steps)
            for name, step in self._problems[case.dtype].roofline().items()
        }
        effort = FAMILIES[selected[0][0].family].effort(selected[0][0], self._effort, self.device)
        warm = {key: self._measured[key].seconds_of_check for key in steps}
        failures: dict[tuple[Case, str], Exception] = {}
        samples = interleave({**rates, **steps}, effort, self.device, warm, failures.__setitem__)
        for (case, name), step in steps.items():
            result, variant = self._measured[case, name], FAMILIES[case.family].variants[name]
            result.failure = failures.get((case, name))
            if result.failure is not None:
                continue
            self._keep(case, name, samples)
            if self._measure_memory and memory.measurable(case, variant, self.device):
                try:
                    result.peak_memory = self._peak_memory(case, variant, step)
                except Exception as failure:
                    result.failure = failure

    def _keep(self, case: Case, name: str, samples: dict[tuple[Case, str], list[float]]) -> None:
        result, problem = self._measured[case, name], self._problems[case.dtype]

        def rate(of: str, work: float) -> float:
            return work / statistics.median(samples[case, of])

        result.samples = samples[case, name]
        result.rate = {problem.unit: rate(name, problem.work())}
        roofline = [key for of, key in samples if of == case and key not in FAMILIES[case.family].variants]
        result.roofline = {f"{key}_{problem.unit}": rate(key, problem.roofline_work()) for key in roofline}
        for key in roofline:
            times = statistics.median(a / b for a, b in zip(samples[case, key], result.samples, strict=True))
            result.rate_over[key] = times * problem.work() / problem.roofline_work()
        result.info = problem.info(FAMILIES[case.family].variants[name].inputs)

    def _check(self, case: Case, variant: Variant, step: Step, result: Measured) -> None:
        """Asserts that loss and gradient are right."""
        problem = self._problems[case.dtype]
        step.reset()
        start = time.perf_counter()
        loss = step.run().detach()
        # Compilation is no part of a pass. On a GPU nearly all variants are compiled at their first call.
        known = self.device == "cpu" and not variant.compiled
        result.seconds_of_check = time.perf_counter() - start if known else 0.0
        for leaf, gradient in zip(step.leaves, step.gradients, strict=True):
            assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
        exact = self._exact_answer(case, variant.method)
        result.loss_error, result.gradient_error = problem.errors(case, exact, loss, step.gradients)
        step.reset()
        tolerances = variant.tolerances(case.torch_dtype, FAMILIES[case.family].tolerance)
        assert result.loss_error <= tolerances[0], f"loss: relative error {result.loss_error:.2g}"
        assert result.gradient_error <= tolerances[1], f"gradient: relative error {result.gradient_error:.2g}"

    def _peak_memory(self, case: Case, variant: Variant, step: Step) -> int | None:
        return memory.peak_on_cuda(step) if self.device == "cuda" else memory.peak_on_cpu(case, variant)

    # What the groups of one shape share

    def _use_shape(self, case: Case) -> None:
        if (case.family, case.shape) == self._shape:
            return
        self._shape = None
        for shared in (self._problems, self._exact, self._compiled):
            shared.clear()
        torch._dynamo.reset()
        if self.device == "cuda":
            torch.cuda.empty_cache()  # what the shape before has left counts as used
            needed = case.rows * case.classes * FAMILIES[case.family].bytes_per_logit
            if torch.cuda.mem_get_info()[0] < needed:
                raise LeftOut(f"needs {needed / 1e9:.0f} GB of GPU memory")
        for dtype in DTYPES:
            one = replace(case, dtype=dtype)
            if any((c.family, c.shape, c.dtype) == (one.family, one.shape, dtype) for c, _ in self._selected):
                self._problems[dtype] = FAMILIES[case.family].problem(one, self.device, False)
        self._shape = (case.family, case.shape)

    def _exact_answer(self, case: Case, method: str) -> Any:
        key = (case.dtype, method)
        if key not in self._exact:
            self._exact[key] = self._problems[case.dtype].exact(method)
        return self._exact[key]

    def _step(self, case: Case, variant: Variant) -> Step:
        loss = variant.loss
        if variant.compiled:
            key = (variant.name, case.dtype, case.reduction)
            if key not in self._compiled:
                self._compiled[key] = compiled(variant.loss)
            loss = self._compiled[key]
        return Step(variant, case, self._problems[case.dtype], loss)
