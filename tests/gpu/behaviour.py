"""What every operation owes a GPU beside right numbers. ``step()`` gives results of one call, gradients among them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from oracle import same_bits  # noqa: E402

Step = Callable[[], tuple[Tensor, ...]]


def check_same_bits_every_time(step: Step) -> None:
    first = step()
    for _ in range(5):
        assert all(same_bits(a, b) for a, b in zip(first, step(), strict=True))


def check_no_synchronisation(step: Step) -> None:
    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_cuda_graph(step: Step) -> None:
    # Detached: a graph of autograd that lives on would tie the capture to the stream it was made on.
    expected = [x.detach() for x in step()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in captured:
        x.detach().fill_(torch.nan)
    graph.replay()
    assert all(same_bits(a, b) for a, b in zip(expected, captured, strict=True))


def check_backward_takes_the_gradient_as_it_is(loss: Callable[[], Tensor], x: Tensor) -> None:
    """That which the forward pass has computed: a copy would be as much again to read and to write."""
    for _ in range(2):  # the first compiles
        result = loss() * 0.5
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(result, x)
        beyond = torch.cuda.max_memory_allocated() - before
    assert beyond < x.nbytes / 2
