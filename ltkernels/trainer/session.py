"""What a command does: train every method under every seed, or search settings; and keep the run folder up to date."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import tyro
from lightning_fabric import Fabric
from rich.console import Console

from ltkernels.trainer import TrainerError, data, report
from ltkernels.trainer.engine import Run, fabric_for, train
from ltkernels.trainer.progress import RunProgress
from ltkernels.trainer.recipes import Recipe
from ltkernels.trainer.report import Results
from ltkernels.trainer.runfolder import RunFolder, describe, environment

MethodName: TypeAlias = Literal["ce", "logit_adjustment", "ldam_drw", "vs"]
METHOD_NAMES: tuple[MethodName, ...] = ("ce", "logit_adjustment", "ldam_drw", "vs")
LARGEST_SEED = 2**32 - 1  # of NumPy


@dataclass(frozen=True)
class Options:
    """What ``train`` and ``tune`` have in common."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    methods: tuple[MethodName, ...] = METHOD_NAMES
    """Methods to run; without ce there is nothing to compare with."""
    data_root: Path | None = None
    """Folder with the images; default: the one that LTKERNELS_DATA names, else scikit-learn's copy of the digits."""
    out: Path | None = None
    """Run folder, which must not exist yet; default: runs/ with the name of the recipe and the time."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device, in the words of lightning-fabric."""

    seeds: int = 10
    """Number of seeds; a seed gives the long-tailed subset, the initial weights and the order of the batches."""
    first_seed: int = 0
    """Seeds are first_seed, first_seed + 1, ..."""

    def __post_init__(self) -> None:
        if not self.methods or len(set(self.methods)) != len(self.methods):
            raise TrainerError(f"methods: expected each method once, got {' '.join(self.methods) or 'none'}")
        if self.seeds < 1:
            raise TrainerError(f"seeds: expected at least 1, got {self.seeds}")
        if not 0 <= self.first_seed <= LARGEST_SEED + 1 - self.seeds:
            raise TrainerError(f"first_seed: expected 0..{LARGEST_SEED + 1 - self.seeds}, got {self.first_seed}")

    @property
    def seed_range(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    @property
    def titles(self) -> dict[str, str]:
        """The chosen methods, in the order of the recipe, and their names in tables."""
        return {name: method.title for name, method in self.recipe.methods.items() if name in self.methods}


@dataclass(frozen=True)
class TrainOptions(Options):
    """Train the methods of a recipe and compare them on the test set."""


def run_training(options: TrainOptions, recipe_name: str, command: str, console: Console) -> int:
    """Train, print the table, write the run folder. Returns the exit status: 130 after an interrupt.

    Raises:
        TrainerError: a user's mistake or a loss that is not finite; what was done by then is in the run folder.
    """
    recipe = options.recipe
    images = data.load(recipe.dataset, options.data_root)
    splits = {seed: data.split(recipe, images, seed) for seed in options.seed_range}
    with fabric_for(recipe, options.accelerator) as fabric:
        folder = RunFolder.create(options.out, recipe_name)
        config = config_of(options, recipe_name, command, fabric)
        config["data"] = _data_of(images, splits)
        folder.write_json("config.json", config)
        _print_data(console, config)

        results = Results((), options.titles, tuple(config["data"]["counts"]))
        started, status = time.perf_counter(), "complete"
        try:
            runs = len(splits) * len(options.titles)
            with RunProgress(console, runs, recipe.epochs, line_every=len(options.titles)) as progress:
                for run in _train_all(fabric, recipe, options.titles, splits, progress):
                    results = results.with_run(run)
                    _write_scores(folder, results)
        except KeyboardInterrupt:
            status = "interrupted"
        except TrainerError as error:
            status = f"stopped: {error}"
            raise
        finally:
            seconds = time.perf_counter() - started
            if results.runs:
                _write_scores(folder, results)  # once more: an interrupt may have come in between
                folder.write("per_class_accuracy.png", report.per_class_picture(results))
            folder.write("report.md", report.markdown_report(results, config, status, seconds))
    _print_results(console, folder, results, status, seconds)
    return 0 if status == "complete" else 130


def _write_scores(folder: RunFolder, results: Results) -> None:
    folder.write("metrics.csv", report.metrics_csv(results))
    folder.write("per_class_accuracy.csv", report.per_class_csv(results))


def _train_all(
    fabric: Fabric,
    recipe: Recipe,
    titles: dict[str, str],
    splits: dict[int, data.Split],
    progress: RunProgress,
) -> Iterator[Run]:
    # Seeds outside, methods inside: an interrupt leaves whole pairs.
    for seed, split in splits.items():
        for name, title in titles.items():
            progress.start(f"{title}, seed {seed}")
            yield train(fabric, recipe, name, split, seed, progress.epoch)
            progress.finish(f"seed {seed}")


def config_of(options: Options, recipe_name: str, command: str, fabric: Fabric) -> dict[str, Any]:
    """Everything that is needed to run it again: config.json."""
    return {
        "command": command,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "recipe_name": recipe_name,
        "recipe_hash": options.recipe.hash,
        "recipe": dataclasses.asdict(options.recipe),
        "methods": list(options.titles),
        "seeds": list(options.seed_range),
        **environment(fabric.device),
    }


def _data_of(images: data.LabelledImages, splits: dict[int, data.Split]) -> dict[str, Any]:
    first = next(iter(splits.values()))
    return {
        "source": images.source,
        "counts": list(first.counts),
        "test_images": len(first.evaluate),
        "test_fingerprint": first.evaluate.fingerprint,
        "train_fingerprints": {str(seed): split.train.fingerprint for seed, split in splits.items()},
    }


def _print_data(console: Console, config: dict[str, Any]) -> None:
    drawn = config["data"]
    seed, fingerprint = next(iter(drawn["train_fingerprints"].items()))
    lines = (
        f"{config['recipe_name']} (recipe {config['recipe_hash']}), {drawn['source']}: "
        f"{sum(drawn['counts'])} training images {tuple(drawn['counts'])}, {drawn['test_images']} test images",
        f"sha256 of the images: test {drawn['test_fingerprint'][:12]}, training of seed {seed} {fingerprint[:12]}",
        describe(config),
    )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _print_results(console: Console, folder: RunFolder, results: Results, status: str, seconds: float) -> None:
    if results.runs:
        console.print(report.terminal_table(results, console.width))
        console.print(report.groups_sentence(results.counts), highlight=False, soft_wrap=True)
    for sentence in report.verdicts(results):
        console.print(sentence.replace("**", ""), highlight=False, markup=False, soft_wrap=True)
    console.print(f"{status}, {seconds:.0f} s; written: {folder.path}", highlight=False, markup=False, soft_wrap=True)
