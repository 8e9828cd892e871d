"""Exponential moving average of a network during training."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ltkernels.trainer import TrainerError


class ExponentialMovingAverage:
    """A copy of a network whose parameters and buffers follow those of the network in training.

    After update t (from 1) the copy is ``d * copy + (1 - d) * network`` with ``d = min(decay, t / (t + 9))``: a fixed
    decay would keep the random initial weights for ``1 / (1 - decay)`` steps. Buffers of whole numbers, such as the
    count of batches, are copied.

    The number of updates is kept on the host: ``torch.optim.swa_utils.AveragedModel`` reads it from the device at each
    step, which makes a GPU wait.

    Args:
        network: In training; its device and dtypes become those of the copy. Not compiled and not wrapped.
        decay: In [0, 1).

    Attributes:
        module: The average, in evaluation mode and without gradients.

    Raises:
        TrainerError: the decay is out of range.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise TrainerError(f"decay: expected a number in [0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        self.module = copy.deepcopy(network).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Follow the network, after a step of the optimiser; it may be compiled or wrapped since."""
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 9))
        average, current = _tensors(self.module), _tensors(network)
        continuous = [k for k, tensor in enumerate(average) if tensor.is_floating_point()]
        whole = [k for k, tensor in enumerate(average) if not tensor.is_floating_point()]
        torch._foreach_lerp_([average[k] for k in continuous], [current[k] for k in continuous], 1 - decay)
        if whole:
            torch._foreach_copy_([average[k] for k in whole], [current[k] for k in whole])

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on: the average and the number of updates."""
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.updates = state["updates"]


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
