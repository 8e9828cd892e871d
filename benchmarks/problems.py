"""What all families of benchmarks share: cases, long-tailed inputs, and comparison with exact answers in float64."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import roofline

DTYPES = ("float32", "bfloat16")

IMBALANCE = 100.0
CHUNK = 1 << 16  # float64 elements that are compared at a time: the temporaries stay in the cache


@dataclass(frozen=True)
class Case:
    """One row of the results: a shape, a dtype and an upstream gradient. The shape begins with N.

    It ends with C, except where rows are compared with each other.
    """

    shape: str
    dtype: str
    upstream: str
    family: str = "margin"

    def __str__(self) -> str:
        return f"{self.shape}-{self.dtype}-{self.upstream}"

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(int, self.shape.split("x")))

    @property
    def rows(self) -> int:
        return self.sizes[0]

    @property
    def classes(self) -> int:
        """Columns of the logits."""
        return self.rows if self.family == "contrastive" else self.sizes[-1]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def bytes(self) -> int:
        """N x C logits and their gradient: what forward and backward have to move if they start from logits."""
        return 2 * self.rows * self.classes * self.torch_dtype.itemsize

    @property
    def reduction(self) -> str:
        return "none" if self.upstream == "none" else "mean"


class Problem(ABC):
    """The inputs of one case, under the names that the variants of its family ask for.

    ``blank`` leaves the values out: the memory that a variant takes does not depend on them.
    """

    def __init__(self, case: Case, device: str, counts: Tensor) -> None:
        self.case, self.counts = case, counts.float().to(device)
        generator = torch.Generator().manual_seed(0)
        self.target = torch.multinomial(counts, case.rows, replacement=True, generator=generator).to(device)
        self.row_upstream = ((torch.arange(case.rows) % 7 + 1) * 0.375).to(device)  # exact in bfloat16

    @abstractmethod
    def exact(self, method: str) -> Any:
        """The answer by the definition in float64."""

    @abstractmethod
    def errors(self, case: Case, exact: Any, loss: Tensor, gradients: Sequence[Tensor]) -> tuple[float, float]:
        """The largest errors of loss and gradients, relative to the largest loss and the largest gradient."""

    # The rates that variants are held against: what each step does in billions, and of what.

    unit = "gb_per_s"

    def work(self) -> float:
        return self.case.bytes * 1e-9

    @abstractmethod
    def roofline(self) -> dict[str, Any]:
        """Steps that do as much, or as much as ``roofline_work`` says, by name."""

    def roofline_work(self) -> float:
        return self.work()

    def info(self, inputs: Sequence[str]) -> dict[str, Any]:
        """What else is to be recorded about a variant that takes these inputs."""
        return {}


def long_tail(classes: int) -> Tensor:
    """Training samples of each class, in float64."""
    exponent = torch.arange(classes, dtype=torch.float64) / (classes - 1)
    return 500.0 * IMBALANCE**-exponent


def random_matrix(case: Case, rows: int, columns: int, device: str, blank: bool, seed: int = 0) -> Tensor:
    if blank:
        return torch.zeros(rows, columns, dtype=case.torch_dtype, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, device=device).to(case.torch_dtype)


# ------------------------------------------------------------------------------------------------- losses over logits


@dataclass(frozen=True)
class Exact:
    """Loss of each row and its gradient by the definition in float64."""

    row_loss: Tensor  # (N,)
    row_gradient: Tensor  # (N, C)


class RowProblem(Problem):
    """A loss over N x C logits: no row needs another, so the definition runs a few rows at a time."""

    logits: Tensor

    def roofline(self) -> dict[str, Any]:
        return roofline.steps(self.logits)

    def errors(self, case: Case, exact: Exact, loss: Tensor, gradients: Sequence[Tensor]) -> tuple[float, float]:
        (gradient,) = gradients
        n = case.rows
        upstream = self.row_upstream.double() if case.upstream == "none" else torch.ones_like(exact.row_loss) / n
        if case.upstream == "half":
            upstream = upstream / 2
        wanted = exact.row_loss if case.reduction == "none" else exact.row_loss.mean()
        loss_error = (loss.double() - wanted).abs().max() / wanted.abs().max()
        worst, largest = torch.zeros(2, dtype=torch.float64, device=gradient.device)
        with one_thread():
            for rows in _row_blocks(gradient):
                answer = exact.row_gradient[rows] * upstream[rows, None]
                worst = torch.maximum(worst, (gradient[rows].double() - answer).abs().max())  # NaN stays NaN
                largest = torch.maximum(largest, answer.abs().max())
        return loss_error.item(), (worst / largest).item()


def exact_rows(x: Tensor, row_loss: Callable[[Tensor, slice], Tensor]) -> Exact:
    """``row_loss(x[rows] in float64, rows)`` gives the losses of some rows by the definition."""
    losses, gradient = [], torch.empty_like(x, dtype=torch.float64)
    with one_thread():
        for rows in _row_blocks(x):
            block = x[rows].detach().double().requires_grad_()
            loss = row_loss(block, rows)
            (gradient[rows],) = torch.autograd.grad(loss.sum(), block)
            losses.append(loss.detach())
    return Exact(torch.cat(losses), gradient)


@contextmanager
def one_thread() -> Iterator[None]:
    """For what is too small to share, such as blocks that fit the cache: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _row_blocks(x: Tensor) -> list[slice]:
    # On a GPU a block has to fill the device; on a CPU it has to fit the cache.
    rows = max(1, CHUNK * (1 if x.device.type == "cpu" else 64) // x.shape[1])
    return [slice(i, i + rows) for i in range(0, x.shape[0], rows)]
