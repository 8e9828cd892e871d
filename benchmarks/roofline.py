"""The rates that memory-bound code is held against: copies of the same size, in the same process and the same loop.

``clone_fresh``    ``x.clone()`` into memory that nobody has touched. A training step returns a gradient in new memory;
                   for a large one that means new pages, and on a CPU the first write to each is a page fault.
``clone_huge``     the same with huge pages asked for (Linux), as ltkernels does for large gradients. What a clone
                   could reach with the same trick.
``copy_warm``      copy into memory that has been written before: no page fault at all.

An allocator hands out memory that it has kept, which is warm, whenever it can (glibc below 32 MB): ``fresh`` is a
new anonymous mapping each time. On a GPU torch keeps all memory and pages are not faulted in, so fresh and warm differ
little there. Each rate counts the bytes read and written.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable

import torch
from torch import Tensor


class CloneFresh:
    """Times the mapping and the copy; the mapping is dropped outside, as a gradient is."""

    def __init__(self, x: Tensor, huge_pages: bool = False) -> None:
        self._x, self._huge_pages, self._fresh = x.detach(), huge_pages, None
        self._allocate: Callable[[], Tensor] = self._map if _can_map(x) else lambda: torch.empty_like(self._x)

    def reset(self) -> None:
        self._fresh = None

    def run(self) -> None:
        self._fresh = self._allocate().copy_(self._x)

    def _map(self) -> Tensor:
        memory = mmap.mmap(-1, self._x.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if self._huge_pages:
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=self._x.dtype).view_as(self._x)  # holds on to the mapping


class CopyWarm:
    def __init__(self, x: Tensor) -> None:
        self._x = x.detach()
        self._warm = self._x.clone()

    def reset(self) -> None:
        pass

    def run(self) -> None:
        self._warm.copy_(self._x)


def steps(x: Tensor) -> dict[str, CloneFresh | CopyWarm]:
    """The roofline for tensors like ``x``, by name."""
    rates: dict[str, CloneFresh | CopyWarm] = {"clone_fresh": CloneFresh(x), "copy_warm": CopyWarm(x)}
    if _can_map(x) and hasattr(mmap, "MADV_HUGEPAGE"):
        rates["clone_huge"] = CloneFresh(x, huge_pages=True)
    return rates


def _can_map(x: Tensor) -> bool:
    return x.device.type == "cpu" and sys.platform == "linux"
