"""The contrastive modules with buffers beside a network in DistributedDataParallel, in two processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).with_name("distributed_contrastive.py")
FIRST, SECOND = range(5), range(10, 15)  # the samples that each rank sees

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no torch.distributed")


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, list[list[float]]]]:
    """What both ranks saw, by module."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(PROGRAM.parents[1])}
    workers = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(port), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=120) for worker in workers]
    assert not any(worker.returncode for worker in workers), outputs
    return json.loads(outputs[0][0])


def test_gradients_are_those_of_both_ranks(found: dict) -> None:
    for name, results in found.items():
        first, second = results["gradient"]
        assert first == second and any(first), name


@pytest.mark.parametrize("name", ["scheduled", "temperature"])
def test_buffers_that_a_forward_pass_reads(found: dict, name: str) -> None:
    want = [0.55] if name == "scheduled" else [0.5] * 20
    for temperature in found[name]["temperature"]:
        assert temperature == pytest.approx(want)


def moved(temperature: list[float]) -> list[int]:
    return [i for i, x in enumerate(temperature) if x != pytest.approx(0.1)]


def test_isogclr_keeps_the_state_of_every_rank_without_broadcast(found: dict) -> None:
    assert [moved(x) for x in found["isogclr"]["temperature"]] == [list(FIRST), list(SECOND)]


def test_isogclr_with_broadcast_loses_the_state_of_other_ranks(found: dict) -> None:
    """DDP's default, of which the docstring warns: before every forward pass rank 1 gets the state of rank 0."""
    first, second = found["isogclr, broadcast"]["temperature"]
    assert moved(first) == list(FIRST)
    assert moved(second) == [*FIRST, *SECOND]  # its own of the last step alone
    alone = found["isogclr"]["temperature"][1]
    assert all(second[i] != pytest.approx(alone[i]) for i in SECOND)


def test_queues_stay_the_same(found: dict) -> None:
    first, second = found["moco"]["queue"]
    assert first == second and found["moco"]["pointer"] == [[10], [10]]
