"""Run by test_nn_contrastive_ddp.py in a process a rank: what DistributedDataParallel makes of the modules' buffers.

``distributed_contrastive.py PORT RANK``; rank 0 prints what both saw.
"""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ltkernels import nn as lnn

SAMPLES, WIDTH = 20, 4


class Model(nn.Module):
    """A network and its loss, called with the arguments of the loss, the first of them images."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network, self.loss = nn.Linear(6, WIDTH), loss

    def forward(self, image: Tensor, *arguments: Tensor) -> Tensor:
        return self.loss(self.network(image), *arguments)


def gathered(x: Tensor) -> list[list[float]]:
    every = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(every, x.contiguous())
    return [y.flatten().tolist() for y in every]


def steps(loss: nn.Module, arguments: list[tuple[Tensor, ...]], **options: bool) -> tuple[nn.Module, list]:
    """A backward pass for each of the arguments: the module, and the ranks' gradients of the network."""
    model = DistributedDataParallel(Model(loss), **options)
    torch.manual_seed(1 + dist.get_rank())
    for given in arguments:
        model(torch.randn(10, 6), *given).backward()
    return model.module.loss, gathered(model.module.network.weight.grad)


def main() -> None:
    port, rank = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=int(rank), world_size=2)
    index = torch.arange(5) + 10 * int(rank)  # each rank has samples of its own
    found = {}

    loss = lnn.TemperatureScheduledLoss(10)
    loss.set_epoch(5)
    loss, gradient = steps(loss, [()] * 2)
    found["scheduled"] = {"gradient": gradient, "temperature": gathered(loss.temperature)}

    loss = lnn.TemperatureContrastiveLoss(torch.linspace(0.1, 1, SAMPLES), torch.linspace(1, 2, SAMPLES))
    loss, gradient = steps(loss, [(index,)] * 2)
    loss.set_temperature(torch.full((SAMPLES,), 0.5))
    found["temperature"] = {"gradient": gradient, "temperature": gathered(loss.temperature)}

    for name, broadcast in (("isogclr, broadcast", True), ("isogclr", False)):
        loss, gradient = steps(lnn.ISogCLRLoss(SAMPLES, 0.3), [(index,)] * 2, broadcast_buffers=broadcast)
        found[name] = {"gradient": gradient, "temperature": gathered(loss.temperature)}

    # Keys are gathered, so that every rank puts all of them into its queue.
    torch.manual_seed(3 + int(rank))  # queues start apart; DDP makes them those of rank 0
    loss = lnn.MoCoLoss(WIDTH, 30)
    model = DistributedDataParallel(Model(loss))
    for _ in range(2):
        key = torch.randn(10, WIDTH)
        model(torch.randn(10, 6), key).backward()
        keys = [torch.empty_like(key) for _ in range(2)]
        dist.all_gather(keys, key)
        loss.enqueue(torch.cat(keys))
    queue, pointer = gathered(loss.queue), gathered(loss.pointer)
    found["moco"] = {"gradient": gathered(model.module.network.weight.grad), "queue": queue, "pointer": pointer}

    if rank == "0":
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # gloo may leave a thread running, and the interpreter then ends by std::terminate: seen once in many runs.
    os._exit(0)
