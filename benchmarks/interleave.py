"""Times several steps in turn, so that what the machine does meanwhile hits all of them alike."""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

LONG = 1.0  # seconds, to which memory and caches that are cold add little


class Repeatable(Protocol):
    def reset(self) -> None:
        """Before each run, not timed on a CPU: drop what the last run returned."""

    def run(self) -> Any:
        """What is timed."""


@dataclass(frozen=True)
class Effort:
    """Rounds go on until ``seconds`` are spent, but at least ``min_rounds`` and at most ``max_rounds`` of them."""

    seconds: float
    min_rounds: int = 7
    max_rounds: int = 200


def interleave(
    steps: Mapping[Any, Repeatable],
    effort: Effort,
    device: str = "cpu",
    warm: Mapping[Any, float] | None = None,
    on_failure: Callable[[Any, Exception], None] | None = None,
) -> dict[Any, list[float]]:
    """Seconds of one run of each step, once a round.

    The order is shuffled anew in each round, so that no step always finds the caches as the same neighbour left them.
    Before it is timed, a step is run once untimed: a training step follows its like, and finds code, data, threads and
    memory as the last one left them. After another variant the threads may sleep and the memory be with the system or,
    on a virtual machine, the host, from where it takes ten times the step to come back, now and then. A short step is
    then run several times in a row and gives the mean: one call alone is close to the clock's overhead. ``warm``:
    seconds of an earlier run; a step that took long then is spared what is untimed. ``on_failure``: told of a step that
    raises, which is left out from then on and has no samples; without it the exception ends the loop.
    """
    sample = _sample_cuda if device == "cuda" else _sample_cpu
    shortest = 5e-3 if device == "cuda" else 5e-4
    order, repeats, long = list(steps), {}, {name for name, seconds in (warm or {}).items() if seconds > LONG}
    samples: dict[Any, list[float]] = {name: [] for name in order}
    shuffle = random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for name in list(order):
            with _left_out(name, order, samples, steps, on_failure):
                if name not in long:
                    sample(steps[name], 1)  # warms up
                    repeats[name] = min(25, max(1, round(shortest / sample(steps[name], 1))))
        start, rounds = time.perf_counter(), 0
        while rounds < effort.min_rounds or (
            rounds < effort.max_rounds and time.perf_counter() - start < effort.seconds
        ):
            shuffle(order)
            for name in list(order):
                with _left_out(name, order, samples, steps, on_failure):
                    if name not in long:
                        sample(steps[name], 1)
                        steps[name].reset()
                    samples[name].append(sample(steps[name], repeats.get(name, 1)))
                    steps[name].reset()
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return samples


@contextlib.contextmanager
def _left_out(
    name: Any,
    order: list[Any],
    samples: dict[Any, list[float]],
    steps: Mapping[Any, Repeatable],
    on_failure: Callable[[Any, Exception], None] | None,
) -> Iterator[None]:
    """Takes a step that raises out of the loop."""
    try:
        yield
    except Exception as failure:
        if on_failure is None:
            raise
        order.remove(name)
        del samples[name]
        with contextlib.suppress(Exception):
            steps[name].reset()  # its memory is for the others
        on_failure(name, failure)


def _sample_cpu(step: Repeatable, repeats: int) -> float:
    seconds, clock = 0.0, time.perf_counter
    for _ in range(repeats):
        step.reset()
        start = clock()
        step.run()
        seconds += clock() - start
    return seconds / repeats


def _sample_cuda(step: Repeatable, repeats: int) -> float:
    """By events: the time on the device, launch gaps included. ``reset`` only hands memory back to torch's pool."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run: Callable[[], Any] = step.run
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        step.reset()
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / repeats
