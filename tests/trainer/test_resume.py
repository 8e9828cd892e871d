"""Runs that are killed at any moment, and runs of two processes: the same steps as one run left alone."""

import gc
import multiprocessing
import os
import random
import signal
import socket
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning_fabric", reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")

from tiny_images import load_tiny, tiny_recipe  # noqa: E402

from ltkernels.trainer import checkpoint  # noqa: E402
from ltkernels.trainer.checkpoint import CheckpointFolder, read  # noqa: E402
from ltkernels.trainer.data.augment import Augmentation  # noqa: E402
from ltkernels.trainer.data.datasets import long_tailed_split  # noqa: E402
from ltkernels.trainer.data.mixing import Mixing  # noqa: E402
from ltkernels.trainer.fit import Fit  # noqa: E402
from ltkernels.trainer.image_session import open_fabric  # noqa: E402

# A server that has imported everything and forks a fresh process for each part of a run.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tiny_images", "ltkernels.trainer.image_session"])

STEPS = 60
CHECKPOINT_EVERY = 7
# Everything with a state: batch normalisation, momentum, average, deferred weights, augmentation, mixing.
RECIPE = tiny_recipe(
    "ldam-drw",
    model="small-cnn",
    width=0.0625,
    steps=STEPS,
    checkpoint_every=CHECKPOINT_EVERY,
    evaluate_every=10,
    ema_decay=0.9,
    sampler="progressive",
    mixing=Mixing("cutmix"),
    augmentation=Augmentation(policy="crop-flip", padding=2, cutout=2),
)


def train_part(folder: str, kill_after: int | None, kill_in_checkpoint: str | None) -> None:
    """Go on with the run of the folder; die by SIGKILL after a step, or in the midst of writing a checkpoint."""
    torch.set_num_threads(1)
    data = load_tiny()
    with open_fabric(RECIPE.precision, "cpu") as fabric:
        fit = Fit(fabric, RECIPE, data, long_tailed_split(data, RECIPE.long_tail))
        checkpoints = CheckpointFolder(Path(folder))
        state = checkpoints.load()

        def on_step(step: int) -> None:
            random.random(), torch.rand(1)  # somebody uses the global generators
            if step == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            if kill_in_checkpoint and step == int(kill_in_checkpoint.partition(":")[0]):
                _die_while_writing(kill_in_checkpoint.partition(":")[2])

        if state is not None:
            random.random(), torch.rand(1)  # what a new process draws before must not matter
            fit.restore(state)
        fit.run(checkpoints, on_step=on_step)


def _die_while_writing(moment: str) -> None:
    def die(*arguments: object, **options: object) -> None:
        if moment == "half":
            temporary = next(Path(arguments[1].name).parent.glob(".checkpoint-*.tmp"))
            arguments[1].write(b"PK\x03\x04 the beginning of a checkpoint")
            arguments[1].flush()
            assert temporary.stat().st_size > 0
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "half":
        checkpoint.torch.save = die
    else:
        checkpoint.os.replace = die


def run(folder: Path, kill_after: int | None = None, kill_in_checkpoint: str | None = None) -> int:
    process = PROCESSES.Process(target=train_part, args=(str(folder), kill_after, kill_in_checkpoint))
    process.start()
    process.join(120)
    return process.exitcode


def flat(value, name=""):
    """Every leaf of nested containers by its path."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {name: value}
    return {path: leaf for key, inner in items for path, leaf in flat(inner, f"{name}/{key}").items()}


def assert_same_state(ours: Path, theirs: Path) -> None:
    first, second = (flat(read(CheckpointFolder(folder).files()[0])) for folder in (ours, theirs))
    assert first.keys() == second.keys()
    assert first.pop("/seconds") > 0 < second.pop("/seconds")  # the time it took is all that may differ
    tensors = 0
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            tensors += 1
            same = value.dtype == second[name].dtype and torch.equal(value, second[name])
        else:
            same = value == second[name]
        assert same, name
    assert tensors > 30
    assert {"objective", "optimizer", "generators", "average"} <= {name.split("/")[1] for name in first}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder) == 0
    return folder


@pytest.mark.parametrize("moment", ["half", "before the name"])
def test_a_run_killed_five_times_ends_in_the_same_bits(uninterrupted, tmp_path, moment):
    kills = sorted(random.Random(moment).sample(range(2, STEPS), 4))
    for kill in kills:
        assert run(tmp_path, kill_after=kill) == -signal.SIGKILL
    # The fifth one in the midst of the next checkpoint.
    files = CheckpointFolder(tmp_path).files()
    before = [file.name for file in files]
    step = min(STEPS, (read(files[0])["step"] if files else 0) + CHECKPOINT_EVERY)
    assert run(tmp_path, kill_in_checkpoint=f"{step}:{moment}") == -signal.SIGKILL
    assert [file.name for file in CheckpointFolder(tmp_path).files()] == before
    assert list(tmp_path.glob(".checkpoint-*.tmp"))
    assert run(tmp_path) == 0
    assert_same_state(tmp_path, uninterrupted)
    assert not list(tmp_path.glob(".checkpoint-*.tmp"))


def test_a_damaged_last_checkpoint_costs_only_the_steps_since_the_one_before(uninterrupted, tmp_path):
    assert run(tmp_path, kill_after=30) == -signal.SIGKILL
    newest = CheckpointFolder(tmp_path).files()[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    assert run(tmp_path) == 0
    assert_same_state(tmp_path, uninterrupted)


# Two processes

DISTRIBUTED = dict(steps=12, augmentation=Augmentation(policy="crop-flip", padding=2), warmup=0.0)


def distributed_part(folder: str, rank: int, world: int, port: int, method: str, mixing: str, compiled: bool) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "test",
    }
    recipe = tiny_recipe(method, mixing=Mixing(mixing), compile=compiled, **DISTRIBUTED)
    with open_fabric(recipe.precision, "cpu") as fabric:
        assert fabric.world_size == world
        torch.save(trained(fabric, recipe, folder), Path(folder) / f"rank-{rank}.pt")
        # DDP goes before the process group: its reducer would else be the last owner, whose end waits for a thread of
        # torch's with the GIL held, for which that thread may wait.
        gc.collect()
        torch.distributed.destroy_process_group()


def trained(fabric, recipe, folder):
    data = load_tiny()
    fit = Fit(fabric, recipe, data, long_tailed_split(data, recipe.long_tail))
    gradients = []
    fit.run(
        CheckpointFolder(Path(folder)),
        on_step=lambda step: gradients.append([p.grad.clone() for p in fit.network.parameters()]),
    )
    return gradients, fit.network.state_dict(), fit.history


@pytest.mark.parametrize(
    ("method", "mixing", "compiled"),
    [("ce", "none", False), ("class-balanced", "mixup", False), ("ldam-drw", "none", True)],
)
def test_two_processes_take_the_steps_of_one(method, mixing, compiled, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        PROCESSES.Process(
            target=distributed_part, args=(str(tmp_path), rank, 2, port, method, mixing, compiled), daemon=True
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]

    recipe = tiny_recipe(method, mixing=Mixing(mixing), **DISTRIBUTED)
    data = load_tiny()
    expected = []
    with open_fabric(recipe.precision, "cpu") as fabric:
        fit = Fit(fabric, recipe, data, long_tailed_split(data, recipe.long_tail))
        fit.run(
            CheckpointFolder(tmp_path),
            on_step=lambda step: expected.append([p.grad.clone() for p in fit.network.parameters()]),
        )
    for rank in range(2):
        gradients, weights, history = torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True)
        assert len(gradients) == len(expected) == 12  # each fifth batch has 6 images, three a process
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(weights, dict(fit.network.state_dict()), rtol=1e-4, atol=1e-6)
        if rank == 0:
            assert [row["step"] for row in history] == [6, 12]
            assert history[-1]["train_loss"] == pytest.approx(fit.history[-1]["train_loss"], rel=1e-4)
        else:
            assert history == []
