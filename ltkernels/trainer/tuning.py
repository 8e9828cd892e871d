"""Search of a method's settings on the validation split: the same number of configurations for every method."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
from lightning_fabric import Fabric
from rich.console import Console

from ltkernels.trainer import TrainerError, data, report
from ltkernels.trainer.engine import DivergedError, fabric_for, train
from ltkernels.trainer.metrics import Scores
from ltkernels.trainer.progress import RunProgress
from ltkernels.trainer.recipes import Method
from ltkernels.trainer.runfolder import RunFolder
from ltkernels.trainer.session import LARGEST_SEED, Options, config_of

LARGEST_BUDGET = 24


@dataclass(frozen=True)
class TuneOptions(Options):
    """Search the settings of the methods on a validation split of the training images; test images are not touched."""

    trials: int = LARGEST_BUDGET
    """Configurations of every method, at most 24, drawn from its search space."""
    search_seed: int = 0
    """Seed of the draw."""
    seeds: int = 5
    """Validation splits (and initial weights and batch orders) that every configuration is trained under."""
    first_seed: int = 100
    """Seeds are first_seed, first_seed + 1, ...; none that train uses by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.search_seed <= LARGEST_SEED:
            raise TrainerError(f"search_seed: expected 0..{LARGEST_SEED}, got {self.search_seed}")
        if not 1 <= self.trials <= LARGEST_BUDGET:
            raise TrainerError(f"trials: expected 1..{LARGEST_BUDGET}, got {self.trials}")


@dataclass(frozen=True)
class Trial:
    """A configuration and its scores on the validation split of each seed; none if one of the runs diverged."""

    method_name: str
    method: Method
    scores: tuple[Scores, ...]

    @property
    def settings(self) -> dict[str, float]:
        return {name: getattr(self.method, name) for name in self.method.search_space}

    @property
    def overall(self) -> float:
        """What is maximised: mean accuracy on the balanced validation splits."""
        return mean(scores.overall for scores in self.scores)


def draw(method: Method, trials: int, seed: int) -> list[Method]:
    """``trials`` different configurations of the method's search space, in the order of the space."""
    space = list(itertools.product(*method.search_space.values()))
    chosen = sorted(np.random.RandomState(seed).permutation(len(space))[:trials])
    return [dataclasses.replace(method, **dict(zip(method.search_space, space[i], strict=True))) for i in chosen]


def best(trials: Sequence[Trial]) -> Trial | None:
    """The first of the best; None if all diverged."""
    return max((trial for trial in trials if trial.scores), key=lambda trial: trial.overall, default=None)


def run_search(options: TuneOptions, recipe_name: str, command: str, console: Console) -> int:
    """Search every method, print the best settings, write search.csv and search.md. Returns the exit status.

    Raises:
        TrainerError: a user's mistake.
    """
    images = data.load(options.recipe.dataset, options.data_root)
    splits = {seed: data.split(options.recipe, images, seed, tuning=True) for seed in options.seed_range}
    with fabric_for(options.recipe, options.accelerator) as fabric:
        folder = RunFolder.create(options.out, f"{recipe_name}-tune")
        config = config_of(options, recipe_name, command, fabric)
        config["validation"] = {
            "source": images.source,
            "counts": list(splits[options.first_seed].counts),
            "fingerprints": {str(seed): split.evaluate.fingerprint for seed, split in splits.items()},
        }
        folder.write_json("config.json", config)
        trials: list[Trial] = []
        status = "complete"
        try:
            for trial in _search(options, fabric, splits, console):
                trials.append(trial)
                folder.write("search.csv", search_csv(trials))
        except KeyboardInterrupt:
            status = "interrupted"
        folder.write("search.md", search_markdown(trials))
    for group in _by_method(trials):
        chosen = best(group)
        found = f"{chosen.method} {chosen.overall:.2f} %" if chosen else "every configuration diverged"
        console.print(f"{group[0].method_name}: {found}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{status}; written: {folder.path}", highlight=False, markup=False, soft_wrap=True)
    return 0 if status == "complete" else 130


def _search(options: TuneOptions, fabric: Fabric, splits: dict[int, data.Split], console: Console) -> Iterator[Trial]:
    drawn = [
        (name, method)
        for name in options.titles
        for method in draw(options.recipe.methods[name], options.trials, options.search_seed)
    ]
    runs = len(drawn) * len(splits)
    with RunProgress(console, runs, options.recipe.epochs, line_every=6 * len(splits)) as progress:
        for number, (name, method) in enumerate(drawn, start=1):
            # Only the last epoch counts, so no other is evaluated.
            recipe = dataclasses.replace(options.recipe, **{name: method}, evaluate_every=options.recipe.epochs)
            scores: list[Scores] = []
            for seed, split in splits.items():
                progress.start(f"{method.title}, configuration {number} of {len(drawn)}")
                with contextlib.suppress(DivergedError):
                    scores.append(train(fabric, recipe, name, split, seed, progress.epoch).last)
                progress.finish(method.title)
            yield Trial(name, method, tuple(scores) if len(scores) == len(splits) else ())


def _by_method(trials: Sequence[Trial]) -> list[list[Trial]]:
    return [list(group) for _, group in itertools.groupby(trials, key=lambda trial: trial.method_name)]


def _cells(trial: Trial) -> list[str]:
    return [report.mean_and_std([getattr(scores, name) for scores in trial.scores]) for name in ("overall", "few")]


def search_markdown(trials: Sequence[Trial]) -> str:
    """One table a method; the chosen configuration is bold."""
    parts = []
    for group in _by_method(trials):
        chosen = best(group)
        headings = [*group[0].settings, "overall", "few"]
        rows = []
        for trial in group:
            row = [f"{value:g}" for value in trial.settings.values()]
            row += _cells(trial) if trial.scores else ["diverged", "diverged"]
            rows.append([f"**{cell}**" for cell in row] if trial is chosen else row)
        parts.append(f"### {group[0].method.title}\n\n{report.markdown_table(headings, rows)}")
    return "\n".join(parts)


def search_csv(trials: Sequence[Trial]) -> str:
    """One row a configuration; settings as ``name=value``, scores in percent, empty where a run diverged."""
    lines = ["method,settings,validation_overall,validation_few"]
    for trial in trials:
        settings = " ".join(f"{name}={value:g}" for name, value in trial.settings.items())
        few = [scores.few for scores in trial.scores if scores.few is not None]
        overall_text = f"{trial.overall:.4f}" if trial.scores else ""
        lines.append(f"{trial.method_name},{settings},{overall_text},{f'{mean(few):.4f}' if few else ''}")
    return "\n".join(lines) + "\n"
