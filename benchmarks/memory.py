"""Peak memory of one forward and backward pass, beyond its inputs and the gradients that it returns.

On a CPU (Linux): a process of its own for each measurement, in which the kernel's record of the largest resident set
(VmHWM) is reset just before the pass. Every allocation of 64 KiB or more is a mapping of its own there, so that memory
kept by malloc does not hide what is used. The numbers are whole pages, and noise of some 100 KiB is normal.
On a GPU: the peak of torch's allocator.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.families import FAMILIES
from benchmarks.problems import Case
from benchmarks.variants import Step, Variant, compiled

SMALLEST = 10**6  # logits; with fewer, the answer is a matter of pages
TIMEOUT = 180.0
_M_MMAP_THRESHOLD = -3  # malloc.h


def measurable(case: Case, variant: Variant, device: str) -> bool:
    if device == "cuda":
        return True
    # A compiled variant has to be compiled again in its process: not for a scaled loss, which is the same graph.
    worthwhile = not (variant.compiled and case.upstream == "half")
    return worthwhile and case.rows * case.classes >= SMALLEST and sys.platform == "linux"


def peak_on_cuda(step: Step) -> int:
    step.reset()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step.run()
    peak = torch.cuda.max_memory_allocated() - before - step.gradient_bytes
    step.reset()
    return max(0, peak)


def peak_on_cpu(case: Case, variant: Variant) -> int | None:
    """Bytes; None if the process failed or took too long, which is no reason to lose the timings."""
    # A fork of a server that has imported torch but has not run it yet: a new process without seconds of imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.memory", "torch._inductor.compile_fx"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, case, variant.name), daemon=False)
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(TIMEOUT) else None
    except EOFError:
        return None
    finally:
        process.join(1)
        if process.is_alive():
            process.kill()


def _measure(sender, case: Case, name: str) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    sender.send(_peak(case, FAMILIES[case.family].variants[name], getattr(libc, "malloc_trim", lambda _: None)))


def _peak(case: Case, variant: Variant, malloc_trim: Callable[[int], None]) -> int:
    family, loss = FAMILIES[case.family], compiled(variant.loss) if variant.compiled else variant.loss
    # Threads, lazily loaded code and compilation take memory once: not what is asked for here.
    first = case if variant.compiled else replace(case, shape=family.small_shape)
    Step(variant, first, family.problem(first, "cpu", True), loss).run()
    step = Step(variant, case, family.problem(case, "cpu", True), loss)
    malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = _status("VmRSS")
    step.run()
    return max(0, _status("VmHWM") - before - step.gradient_bytes)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
