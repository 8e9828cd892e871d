"""Peak memory of a forward and backward pass beyond inputs and the gradient that it returns, in N x C matrices."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
import torch
from peak_memory import PRELUDE
from torch import Tensor

import ltkernels.functional as LF
from ltkernels import _ops

PROGRAM = (
    PRELUDE
    + """
torch.set_num_threads(1)

def plain(x, loss):
    loss.backward()

def half(x, loss):
    (loss * 0.5).backward()

def infinite(x, loss):
    (loss * torch.inf).backward()

def retained(x, loss):
    (loss * 0.5).backward(retain_graph=True)

def with_graph(x, loss):
    torch.autograd.grad(loss * 0.5, x, create_graph=True)

def rows(x, loss):
    loss.sum().backward()

def peak(backward, shape, order=None, **options):
    x = torch.randn(shape)
    x = (x if order is None else x.permute(order)).requires_grad_()
    y = torch.randint(x.shape[1], (x.shape[0], *x.shape[2:]))
    before = resident()
    backward(x, LF.margin_cross_entropy(x, y, **options))
    return (status("VmHWM") - before) / x.nbytes - 1

N, C = 4096, 1000
cases = {
    "plain": (plain, (N, C), None, {}),
    "half": (half, (N, C), None, {}),
    "infinite": (infinite, (N, C), None, {}),
    "retained": (retained, (N, C), None, {}),
    "with_graph": (with_graph, (N, C), None, {}),
    "rows": (rows, (N, C), None, {"reduction": "none"}),
    "transposed": (plain, (C, N), (1, 0), {}),
    "images": (plain, (4, C, N // 4), None, {}),
}
for backward, shape, order, options in cases.values():
    peak(backward, [min(size, 16) for size in shape], order, **options)  # what is loaded and allocated once
print(json.dumps({name: peak(*case[:3], **case[3]) for name, case in cases.items()}))
"""
)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_matrix_beyond_the_gradient(run_python: Callable[..., str]) -> None:
    peaks = json.loads(run_python("-c", PROGRAM))
    for name in ("plain", "half", "infinite", "rows"):
        assert peaks[name] < 0.15, peaks
    # A graph that is kept keeps the gradient of the forward pass; the returned one is a copy, and that is all.
    for name in ("retained", "with_graph"):
        assert peaks[name] < 1.15, peaks
    # Rows whose classes are apart in memory are copied once.
    for name in ("transposed", "images"):
        assert peaks[name] < 1.15, peaks


@pytest.mark.skipif(_ops.BACKEND == "reference", reason="the definition has no gradient of its own")
def test_a_gradient_made_in_python_is_not_copied() -> None:
    """As the GPU's is: a wrapper in Python refers to it besides the graph."""
    made: list[int] = []

    def forward(logits: Tensor, target: Tensor, *options: object) -> tuple[Tensor, Tensor, Tensor]:
        gradient = torch.empty_like(logits)
        gradient.copy_((logits.softmax(1) - torch.nn.functional.one_hot(target, logits.shape[1])) / len(target))
        made.append(gradient.data_ptr())
        return torch.nn.functional.cross_entropy(logits, target), torch.zeros(3, len(target)), gradient

    logits, target = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])
    (wanted,) = torch.autograd.grad(LF.margin_cross_entropy(logits, target), logits)
    with torch.library._scoped_library("ltkernels", "IMPL") as library:
        library.impl("margin_softmax_fwd", forward, "CPU", allow_override=True)
        for upstream in (1.0, -0.5):
            loss = LF.margin_cross_entropy(logits, target) * upstream
            (kept,) = torch.autograd.grad(loss, logits, retain_graph=True)
            (last,) = torch.autograd.grad(loss, logits)
            assert kept.data_ptr() != made[-1] == last.data_ptr()
            torch.testing.assert_close([kept, last], [wanted * upstream] * 2)
    assert len(made) == 2
