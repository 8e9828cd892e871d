"""One optimiser step: eager or captured in a CUDA graph and its part of a batch in distributed training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from ltkernels.nn import MarginCrossEntropyLoss
from ltkernels.trainer import TrainerError
from ltkernels.trainer.image_recipes import ImageRecipe

# Steps before a capture: libraries choose algorithms and allocate workspaces in the first ones.
_WARMUP_STEPS = 3


@dataclass(frozen=True)
class Batch:
    """What one step trains on, all on its device.

    Args:
        images: (B, C, H, W) float32, augmented and mixed.
        target: (B,) int64.
        other: (B,) int64 classes of the images that were mixed in, or None.
        coefficients: (2,) float32 of the losses for ``target`` and ``other``; None, without ``other`` only: 1. They
            stay outside of the module, whose floating inputs mixed precision rounds to 16 bits.
    """

    images: Tensor
    target: Tensor
    other: Tensor | None = None
    coefficients: Tensor | None = None

    def arguments(self) -> tuple[Tensor | None, ...]:
        return self.images, self.target, self.other, self.coefficients

    def loss(self, module: nn.Module) -> Tensor:
        """Of the batch, 0-d, by an :class:`~ltkernels.trainer.methods.Objective`."""
        losses = module(self.images, self.target, self.other)
        return losses if self.coefficients is None else (self.coefficients[: losses.numel()] * losses).sum()

    def part(self, rank: int, world: int, criterion: MarginCrossEntropyLoss) -> Batch:
        """The part of process ``rank`` of ``world``.

        Its coefficients make the mean of the processes' losses that of the whole batch, and so the mean of their
        gradients: parts may differ by a sample, and in the class weights that a mean is divided by.
        """
        rows = slice(rank, None, world)
        shares = [
            _divisor(labels[rows], criterion) * world / _divisor(labels, criterion)
            for labels in (self.target, self.target if self.other is None else self.other)
        ]
        coefficients = torch.stack(shares)
        if self.coefficients is not None:
            coefficients = coefficients * self.coefficients
        other = None if self.other is None else self.other[rows]
        return Batch(self.images[rows], self.target[rows], other, coefficients)


def _divisor(labels: Tensor, criterion: MarginCrossEntropyLoss) -> Tensor:
    """What the mean of the losses of these samples is divided by."""
    if criterion.weight is None:
        return torch.tensor(float(len(labels)), device=labels.device)
    return criterion.weight[labels].sum()


def make_optimizer(recipe: ImageRecipe, parameters: Iterable[nn.Parameter] | list[dict[str, Any]]) -> SGD:
    """SGD of parameters or groups of them, fused into one kernel where the device has it."""
    parameters = list(parameters)
    options = dict(lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.weight_decay)
    try:
        return SGD(parameters, **options, fused=True)
    except RuntimeError:
        return SGD(parameters, **options)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """In place where the learning rate is a tensor, which a captured graph reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


class EagerStep:
    """Forward, backward, update.

    Args:
        fabric: Device, precision, processes.
        module: An :class:`~ltkernels.trainer.methods.Objective`, set up by ``fabric``.
        optimizer: Of its parameters, set up by ``fabric``.
        compile_errors: What the module raises if it cannot be compiled.
    """

    def __init__(
        self,
        fabric: Fabric,
        module: nn.Module,
        optimizer: Optimizer,
        compile_errors: tuple[type[Exception], ...] = (),
    ) -> None:
        self.fabric = fabric
        self.module = module
        self.optimizer = optimizer
        self._compile_errors = compile_errors

    def __call__(self, batch: Batch) -> Tensor:
        """Train on a batch; its loss, 0-d on the device and without a graph.

        Raises:
            TrainerError: the module cannot be compiled.
        """
        try:
            loss = batch.loss(self.module)
        except self._compile_errors as error:
            raise TrainerError(f"the step could not be compiled; --no-compile trains without: {error}") from error
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        self.optimizer.step()
        return loss.detach()


class GraphedStep:
    """The same step as one CUDA graph, replayed for every full batch; other batches are trained eagerly.

    The first full batches are trained on a side stream, then one is captured: capturing runs nothing, so no state has
    to be put back. Random numbers are drawn outside. The learning rate becomes a tensor on the device.

    Args:
        eager: The step.
        batch_size: Images of a full batch.
    """

    def __init__(self, eager: EagerStep, batch_size: int) -> None:
        self._eager = eager
        self._batch_size = batch_size
        self._warmed_up = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch
        self._loss: Tensor
        device = eager.fabric.device
        for group in eager.optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), device=device)

    def __call__(self, batch: Batch) -> Tensor:
        if len(batch.target) != self._batch_size:
            return self._eager(batch)
        if self._warmed_up < _WARMUP_STEPS:
            self._warmed_up += 1
            return self._on_side_stream(batch)
        if self._graph is None:
            self._capture(batch)
        else:
            for held, given in zip(self._batch.arguments(), batch.arguments(), strict=True):
                if held is not None:
                    held.copy_(given)
        self._graph.replay()
        return self._loss.clone()  # the next replay overwrites it

    def _on_side_stream(self, batch: Batch) -> Tensor:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            loss = self._eager(batch)
        current.wait_stream(side)
        return loss

    def _capture(self, batch: Batch) -> None:
        # Copies that keep their strides: a graph reads these addresses at every replay.
        self._batch = Batch(*(None if tensor is None else tensor.clone() for tensor in batch.arguments()))
        # Without gradients at the start the captured backward pass writes them; with them it would add to them.
        self._eager.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer one puts the stream back where the capture fails. "thread_local": other threads, such as one
            # that pins batches for a loader, may go on.
            stream = torch.cuda.stream(torch.cuda.current_stream())
            with stream, torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._loss = self._eager(self._batch)
        except RuntimeError as error:
            raise TrainerError(
                f"the step could not be captured in a CUDA graph; --no-cuda-graph trains without one: {error}"
            ) from error
        self._graph = graph
