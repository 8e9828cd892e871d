"""What ``ltkernels train`` does for images: one run in its folder, started, stopped, resumed, finished."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import torch
import tyro
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from rich.console import Console

from ltkernels.trainer import TrainerError
from ltkernels.trainer.checkpoint import CheckpointFolder, export_weights
from ltkernels.trainer.data import Split
from ltkernels.trainer.data.datasets import ImageDataset
from ltkernels.trainer.data.pack import load_split
from ltkernels.trainer.fit import Fit, StoppedError
from ltkernels.trainer.image_recipes import TIERS, ImageRecipe, Tier, load_recipe, save_recipe
from ltkernels.trainer.locks import run_locked
from ltkernels.trainer.runfolder import RunFolder, describe, environment, read_json
from ltkernels.trainer.runlog import (
    FEATURES_FILE,
    PREDICTIONS_FILE,
    RunLog,
    features,
    predictions,
    scores_line,
    summary,
)

RECIPE_FILE = "recipe.json"
METRICS_FILE = "metrics.json"
# Names in its files of the fingerprints of a run.
FINGERPRINTS = {
    "training": "train_fingerprint",
    "test": "test_fingerprint",
    "training labels": "train_label_fingerprint",
    "test labels": "test_label_fingerprint",
}
INTERRUPTED, TERMINATED = 130, 143  # 128 + the number of the signal, as a shell has it


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """Where a run takes place. Only the number of processes decides the result, through batch normalisation."""

    data_root: Path | None = None
    """Folder with the data sets; default: the one that LTKERNELS_DATA names, else data."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device, in the words of lightning-fabric."""
    devices: int = 1
    """Processes with a device each; every one trains on its part of each batch. Under torchrun its number counts."""
    threads: int = 0
    """CPU threads of a process; 0: torch's choice."""
    tensorboard: bool = True
    """Write TensorBoard's files where it is installed."""

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise TrainerError(f"devices: expected at least 1, got {self.devices}")
        if self.threads < 0:
            raise TrainerError(f"threads: expected at least 0, got {self.threads}")


@dataclass(frozen=True, kw_only=True)
class ImageTrainOptions(MachineOptions):
    """Train one recipe and score it on the test set."""

    recipe: Annotated[ImageRecipe, tyro.conf.arg(name="")]
    tier: Tier | None = None
    """Number of steps by name: full is 17000, short 3400."""
    out: Path | None = None
    """Run folder, which must not exist yet; default: runs/ with the name of the recipe and the time."""


@dataclass(frozen=True, kw_only=True)
class ResumeOptions(MachineOptions):
    """Go on with a run that was stopped, from its last checkpoint."""

    cuda_graph: bool = True
    """Capture the step in a CUDA graph where the recipe does; without, the same training takes longer."""
    compile: bool = True
    """Compile the step where the recipe does; without, the same training takes longer and rounds differently."""


def run_image_training(options: ImageTrainOptions, name: str, command: str, console: Console) -> int:
    """Train a recipe in a new run folder. Returns the exit status: 130 after an interrupt, 143 after a SIGTERM.

    Raises:
        TrainerError: a user's mistake or a loss that is not finite.
    """
    recipe = options.recipe
    if options.tier is not None:
        recipe = dataclasses.replace(recipe, steps=TIERS[options.tier])
    with open_fabric(recipe.precision, options.accelerator, options.devices, options.threads) as fabric:
        # Before the folder: one that is left without a run would be in the way of the next attempt.
        loaded = load_split(recipe.dataset, recipe.long_tail, options.data_root)
        path = RunFolder.create(options.out, name).path if fabric.is_global_zero else None
        folder = RunFolder(fabric.broadcast(path))
        if fabric.is_global_zero:
            folder.write_json(RECIPE_FILE, save_recipe(recipe, name))
        return train_in_folder(fabric, folder, name, recipe, loaded, options, command, console)


def resume_image_training(path: Path, options: ResumeOptions, command: str, console: Console) -> int:
    """Go on with the run of a folder, from its last complete checkpoint or from the start. Returns the exit status.

    Raises:
        TrainerError: the folder is not that of a run, or none of its checkpoints can be read.
    """
    if not path.is_dir():
        raise TrainerError(f"--resume: there is no folder {path}")
    name, recipe = load_recipe(path / RECIPE_FILE)
    if (path / METRICS_FILE).is_file():
        again = f"ltkernels train --from {path / RECIPE_FILE} trains it once more"
        console.print(f"{path}: this run is finished; {again}", highlight=False, markup=False, soft_wrap=True)
        return 0
    recipe = dataclasses.replace(
        recipe, cuda_graph=recipe.cuda_graph and options.cuda_graph, compile=recipe.compile and options.compile
    )
    with open_fabric(recipe.precision, options.accelerator, options.devices, options.threads) as fabric:
        loaded = load_split(recipe.dataset, recipe.long_tail, options.data_root)
        return train_in_folder(fabric, RunFolder(path), name, recipe, loaded, options, command, console)


def train_in_folder(
    fabric: Fabric,
    folder: RunFolder,
    name: str,
    recipe: ImageRecipe,
    loaded: tuple[ImageDataset, Split],
    options: MachineOptions,
    command: str,
    console: Console,
) -> int:
    """Take the steps of the recipe that the checkpoints of the folder do not have yet. Returns the exit status.

    Raises:
        TrainerError: another process is at work in the folder, or a user's mistake.
    """
    with _only_here(fabric, folder):
        data, split = loaded
        fit = Fit(fabric, recipe, data, split)
        checkpoints = CheckpointFolder(folder.path)
        state = checkpoints.load()
        if state is not None:
            fit.restore(state)
        console = console if fabric.is_global_zero else Console(quiet=True)
        if fabric.is_global_zero:
            config = _config(fit, name, split, command)
            config["parts"] = [*_earlier_parts(folder.path, fit.step), _part(config)]
            folder.write_json("config.json", config)
            _print_start(console, config, fit.step, recipe)
        status = _train(fit, folder, checkpoints, options.tensorboard, console)
        if status == 0 and fabric.is_global_zero:
            _finish(fit, folder, config, console)
        fabric.barrier()
        return status


@contextmanager
def _only_here(fabric: Fabric, folder: RunFolder) -> Iterator[None]:
    """No other run in the folder meanwhile, which the first process sees to for all.

    Raises:
        TrainerError: another process is at work in it.
    """
    with run_locked(folder.path) if fabric.is_global_zero else nullcontext(True) as free:
        if not fabric.broadcast(free):
            raise TrainerError(f"{folder.path}: another process is at work on this run")
        yield


def _train(fit: Fit, folder: RunFolder, checkpoints: CheckpointFolder, tensorboard: bool, console: Console) -> int:
    log = RunLog(folder, console, fit.recipe, fit.history, fit.step, tensorboard, writes=fit.fabric.is_global_zero)
    with log, stop_signals() as received:
        try:
            fit.run(checkpoints, log.on_step, log.on_evaluation, lambda: bool(received))
        except StoppedError as stopped:
            again = f"go on with: ltkernels train --resume {folder.path}"
            console.print(f"{stopped}; {again}", highlight=False, markup=False, soft_wrap=True)
            return TERMINATED if signal.SIGTERM in received else INTERRUPTED
    return 0


def _finish(fit: Fit, folder: RunFolder, config: dict[str, Any], console: Console) -> None:
    seconds = fit.seconds
    console.print("writing weights, predictions and features of all images", highlight=False)
    export_weights(folder.path, fit.evaluated_network.state_dict())
    folder.write(PREDICTIONS_FILE, predictions(fit.logits(), fit.scale, fit.test_target))
    test_embedding = fit.outputs(fit.evaluated_network.features, fit.test_images)
    folder.write(FEATURES_FILE, features(fit.train_outputs(), test_embedding))
    content = summary(fit.recipe, fit.history) | {
        "counts": list(fit.counts),
        "seconds": round(seconds, 1),  # of all parts, for a run that was resumed
        "finished": _now(),
        "resumed_from": config["resumed_from"],
        **{key: config[key] for key in (*FINGERPRINTS.values(), "device", "cpu", "threads")},
    }
    folder.write_json(METRICS_FILE, content)  # the last file: who finds it finds all of them
    last, best = content["last"], content["best"]
    console.print(
        f"{fit.recipe.title}: {scores_line(last)}, ECE {last['ece']:.1f}; best {best['overall']:.1f} at step "
        f"{best['step']}; {seconds:.0f} s; written: {folder.path}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@contextmanager
def open_fabric(precision: str, accelerator: str, devices: int = 1, threads: int = 0) -> Iterator[Fabric]:
    """Fabric with its processes running; CPU threads are put back at the end.

    Raises:
        TrainerError: this machine has no such accelerator, or it does not know the precision.
    """
    # Under torchrun the processes are there already.
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1)) if torchrun else 1
    if torchrun:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
    strategy = "ddp" if devices * nodes > 1 else "auto"
    try:
        fabric = Fabric(
            accelerator=accelerator,
            devices=devices,
            num_nodes=nodes,
            precision=precision,
            strategy=strategy,
            # Named: finding it out asks mpi4py, which fails where it is installed without a library of MPI.
            plugins=[TorchElasticEnvironment() if torchrun else LightningEnvironment()],
        )
        fabric.launch()
    except (RuntimeError, ValueError) as error:
        raise TrainerError(f"accelerator {accelerator!r} with precision {precision!r}: {error}") from error
    before, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.set_num_threads(threads or before)
    torch.backends.cudnn.benchmark = True  # one size of images: the search for the fastest algorithm pays off
    try:
        yield fabric
    finally:
        torch.set_num_threads(before)
        torch.backends.cudnn.benchmark = benchmark


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and the first interrupt enter; a second interrupt interrupts as usual."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may handle signals
        return

    def receive(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _config(fit: Fit, name: str, split: Split, command: str) -> dict[str, Any]:
    return {
        "command": command,
        "started": _now(),
        "resumed_from": fit.step,
        "recipe_name": name,
        "recipe_hash": fit.recipe.hash,
        "processes": fit.fabric.world_size,
        "source": split.train.source,
        "train_images": len(split.train),
        "test_images": len(split.evaluate),
        **{name: fit.fingerprints[part] for part, name in FINGERPRINTS.items()},
        **environment(fit.fabric.device),
    }


def _part(config: dict[str, Any]) -> dict[str, Any]:
    """What a part of a run was made with: another part may be of other code or another machine."""
    names = ("started", "resumed_from", "revision", "device", "cpu", "threads", "processes")
    return {**{name: config.get(name) for name in names}, "torch": config["versions"]["torch"]}


def _earlier_parts(folder: Path, step: int) -> list[dict[str, Any]]:
    """Those that led to the checkpoint at ``step``, as far as the folder knows."""
    file = folder / "config.json"
    if step == 0 or not file.is_file():
        return []
    config = read_json(file)
    return config.get("parts") or [_part(config)]


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _print_start(console: Console, config: dict[str, Any], step: int, recipe: ImageRecipe) -> None:
    tier = f"tier {recipe.tier}" if recipe.tier in TIERS else recipe.tier
    lines = [
        f"{config['recipe_name']} (recipe {config['recipe_hash']}), {tier}, {config['source']}: "
        f"{config['train_images']} training images, {config['test_images']} test images",
        f"sha256 of the images: test {config['test_fingerprint'][:12]}, training {config['train_fingerprint'][:12]}",
        describe(config),
    ]
    if recipe.precision == "bf16-mixed" and emulates_bfloat16(config["device"]):
        lines.append("this processor emulates bfloat16: --precision 32-true is many times faster here")
    if recipe.compile:
        lines.append("the first steps are compiled, which may take minutes; --no-compile trains without")
    if step:
        lines.append(f"going on after step {step} of {recipe.steps}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def emulates_bfloat16(device: str) -> bool:
    """Whether bfloat16 is slower than float32 on ``device``: the processor has no such arithmetic."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.11
    x86 = capabilities.get("architecture") == "x86_64"
    return device == "cpu" and x86 and not (capabilities["avx512_bf16"] or capabilities["amx_bf16"])
