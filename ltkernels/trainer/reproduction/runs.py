"""Stored runs, put together so that only what may be compared stands in one table.

A section holds runs of one data set, network, tier and precision; a line of it the runs of one arm, which differ in
their seeds only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ltkernels.trainer import TrainerError, results
from ltkernels.trainer.image_recipes import Tier
from ltkernels.trainer.metrics import PairedDifference, paired_difference
from ltkernels.trainer.papers.elm_measures import ElmMeasures
from ltkernels.trainer.reproduction.published import Setting
from ltkernels.trainer.tables import TABLES

# They change the speed of a run, not its result; a line may hold runs that differ in them.
_OF_THE_MACHINE = ("channels_last", "compile", "cuda_graph", "checkpoint_every")
_OF_THE_SECTION = ("dataset", "model", "width", "steps", "batch_size", "views", "precision")
DATASET_TITLES = {"cifar100": "CIFAR-100-LT", "cifar10": "CIFAR-10-LT", "fashion-mnist": "Fashion-MNIST-LT"}

Scores: TypeAlias = dict[str, Any]


class Pair(NamedTuple):
    """What two runs must share to be compared."""

    seed: int
    subset_seed: int


@dataclass(frozen=True, eq=False)
class StoredRun:
    """One run of a file of results.

    Args:
        hash: Of its recipe.
        values: What the file holds of it.
    """

    hash: str
    values: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    @property
    def recipe(self) -> dict[str, Any]:
        return self.values["recipe_fields"]

    @property
    def pair(self) -> Pair:
        return Pair(self.values["seed"], self.values["subset_seed"])

    @cached_property
    def measures(self) -> ElmMeasures | None:
        """ELM's measures, where the run has them."""
        stored = self.values.get("elm")
        if stored is None:
            return None
        return ElmMeasures.from_json(stored if isinstance(stored, str) else json.dumps(stored))

    @cached_property
    def group_means(self) -> dict[str, dict[str, float | None]] | None:
        """ELM's measures as means over the classes of each group."""
        return None if self.measures is None else self.measures.group_means()

    @cached_property
    def section_key(self) -> str:
        """Equal for runs that may stand in one table."""
        fields = {name: self.recipe[name] for name in _OF_THE_SECTION}
        tail = {name: value for name, value in self.recipe["long_tail"].items() if name != "subset_seed"}
        return json.dumps([self["tier"], fields, tail], sort_keys=True)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every field of the recipe that is neither a seed nor of the machine, nested ones as ``outer.inner``."""
        flat = _flattened(self.recipe)
        ignored = ("seed", "long_tail.subset_seed", *_OF_THE_MACHINE)
        return {name: value for name, value in flat.items() if name not in ignored}


def _flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


@dataclass(frozen=True, eq=False)
class Line:
    """The runs of one arm, or what a post-hoc method made of them.

    Args:
        title: In tables and pictures.
        runs: In the order of their subsets and seeds.
        post_hoc: The post-hoc method.
    """

    title: str
    runs: tuple[StoredRun, ...]
    post_hoc: str | None = None

    @property
    def method(self) -> str:
        """As in ``METHODS``, with ``+NAME`` for a post-hoc method."""
        method = self.runs[0].recipe["method"]
        return method if self.post_hoc is None else f"{method}+{self.post_hoc}"

    @property
    def seeds(self) -> list[int]:
        return sorted({run.pair.seed for run in self.runs})

    @property
    def subset_seeds(self) -> list[int]:
        return sorted({run.pair.subset_seed for run in self.runs})

    def scores(self, run: StoredRun, epoch: str = "last") -> Scores:
        return run[epoch] if self.post_hoc is None else run["post_hoc"][self.post_hoc]

    def values(self, name: str, epoch: str = "last") -> list[float | None]:
        """A score of every run."""
        return [self.scores(run, epoch)[name] for run in self.runs]

    def against(
        self, baseline: Line, value: Callable[[Line, StoredRun], float | None]
    ) -> tuple[PairedDifference | None, int]:
        """A value of the runs minus that of the baseline's runs with the same seeds, and the number of pairs."""
        ours = {run.pair: value(self, run) for run in self.runs}
        theirs = {run.pair: value(baseline, run) for run in baseline.runs}
        pairs = sorted(pair for pair in ours.keys() & theirs.keys() if None not in (ours[pair], theirs[pair]))
        return paired_difference([ours[pair] for pair in pairs], [theirs[pair] for pair in pairs]), len(pairs)


@dataclass(frozen=True, eq=False)
class Section:
    """Runs of one table that may be compared.

    Args:
        table: Its name.
        lines: One an arm, in the order of the table.
    """

    table: str
    lines: tuple[Line, ...]

    @property
    def runs(self) -> list[StoredRun]:
        return [run for line in self.lines if line.post_hoc is None for run in line.runs]

    @property
    def first(self) -> StoredRun:
        return self.lines[0].runs[0]

    @property
    def tier(self) -> str:
        return self.first["tier"]

    @property
    def recipe(self) -> dict[str, Any]:
        """Of any of its runs: only for fields that all of them share."""
        return self.first.recipe

    @property
    def counts(self) -> list[int]:
        return self.first["counts"]

    @property
    def setting(self) -> Setting:
        tail = self.recipe["long_tail"]
        return Setting(self.recipe["dataset"], tail["profile"], float(tail["imbalance_factor"]))

    @property
    def is_full(self) -> bool:
        return self.tier == "full"

    @property
    def data_title(self) -> str:
        tail = self.recipe["long_tail"]
        profile = "" if tail["profile"] == "exp" else f" ({tail['profile']} profile)"
        name = DATASET_TITLES.get(self.recipe["dataset"], self.recipe["dataset"])
        held_out = ", validation images" if tail["validation_per_class"] else ""
        return f"{name}, imbalance factor {tail['imbalance_factor']:g}{profile}{held_out}"

    @property
    def title(self) -> str:
        tier = re.sub(r"^(full|short)\b", r"\1 tier", self.tier)
        topic = f", {about}" if (about := TABLES[self.table].topic) else ""
        return f"{self.data_title}{topic}, {tier} ({self.network}, {self.recipe['precision']})"

    @property
    def network(self) -> str:
        """Its name, with the width where that is not its own."""
        width = self.recipe["width"]
        return self.recipe["model"] + ("" if width == 1 else f" of width {width:g}")

    @property
    def slug(self) -> str:
        """For names of pictures; :func:`slugs` tells sections apart that differ in something else."""
        parts = (self.table, self.tier, self.recipe["precision"])
        return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")

    def line(self, method: str) -> Line | None:
        """The first line of a method of ``METHODS``."""
        return next((line for line in self.lines if line.method == method), None)


def slugs(found: Sequence[Section]) -> list[str]:
    """One for each section, with a number behind those that would come twice."""
    names = [section.slug for section in found]
    earlier = [names[:index].count(name) for index, name in enumerate(names)]
    return [f"{name}-{count + 1}" if count else name for name, count in zip(names, earlier, strict=True)]


def sections(table: str, runs: Sequence[StoredRun], arms: Sequence[str]) -> list[Section]:
    """The runs of a file of results in sections, in an order that does not depend on that of the file.

    Args:
        table: Name of the table.
        runs: Of the file.
        arms: Labels of the arms in the order of the table; other ones come last.
    """
    grouped: dict[str, list[StoredRun]] = {}
    for run in runs:
        grouped.setdefault(run.section_key, []).append(run)
    return [Section(table, _lines(grouped[key], arms)) for key in sorted(grouped)]


def _lines(runs: Iterable[StoredRun], arms: Sequence[str]) -> tuple[Line, ...]:
    by_arm: dict[str, list[StoredRun]] = {}
    for run in runs:
        by_arm.setdefault(run["arm"], []).append(run)
    ordered = sorted(by_arm, key=lambda arm: (arms.index(arm) if arm in arms else len(arms), arm))
    return tuple(line for arm in ordered for line in _lines_of_arm(arm, by_arm[arm]))


def _lines_of_arm(arm: str, runs: Sequence[StoredRun]) -> list[Line]:
    """One line; more where runs have other settings, which its title then names."""
    variants: dict[str, list[StoredRun]] = {}
    for run in runs:
        variants.setdefault(json.dumps(run.settings, sort_keys=True), []).append(run)
    found = [json.loads(key) for key in sorted(variants)]
    names = dict.fromkeys(name for settings in found for name in settings)
    differ = [name for name in names if len({json.dumps(settings.get(name)) for settings in found}) > 1]
    lines = []
    for key, settings in zip(sorted(variants), found, strict=True):
        what = f" ({', '.join(f'{name} {settings.get(name)}' for name in differ)})" if differ else ""
        ordered = sorted(variants[key], key=lambda run: (run.pair.subset_seed, run.pair.seed, run.hash))
        lines.append(Line(arm + what, tuple(ordered)))
    return lines


def read(file: Path, table: str, tier: Tier) -> list[StoredRun]:
    """The runs of a file of results.

    Raises:
        TrainerError: the file cannot be read, is not one of results, is of another table or tier, or has runs that
            seem to belong together and were made with other images or another number of processes.
    """
    content = results.load(file)
    if (content["table"], content["tier"]) != (table, tier):
        raise TrainerError(f"{file}: these are results of {content['table']}, tier {content['tier']}")
    for name, values in content["runs"].items():
        missing = [field for field in (*_OF_THE_SECTION, "long_tail") if field not in values["recipe_fields"]]
        if missing:
            raise TrainerError(f"{file}: runs.{name}.recipe_fields: no field {missing[0]!r}")
    found = [StoredRun(name, values) for name, values in content["runs"].items()]
    for run in found:
        try:
            _ = run.measures
        except TrainerError as error:
            raise TrainerError(f"{file}: runs.{run.hash}.elm: {error}") from error
    _check_alike(file, found)
    return found


def _check_alike(file: Path, runs: Iterable[StoredRun]) -> None:
    """Of a section all runs are of the same test images and, with the same subset seed, the same training images.

    A recipe names the images by seeds: archives that are not complete give others. The number of processes is part of
    a training, as batch normalisation sees the part of a batch.
    """
    seen: dict[tuple[str, ...], tuple[StoredRun, Any]] = {}
    for run in runs:
        subset, key = f"subset {run.pair.subset_seed}", run.section_key
        for what, of, value in (
            ("test images", "", run["test_fingerprint"]),
            ("training images", subset, run["train_fingerprint"]),
            ("processes", "", run.values.get("processes") or 1),
        ):
            first, expected = seen.setdefault((key, what, of), (run, value))
            if value != expected:
                values = " and ".join(str(x)[:12] for x in (expected, value))
                where = f"{what} of {of}" if of else what
                raise TrainerError(
                    f"{file}: runs.{first.hash} and runs.{run.hash} cannot be compared, as they differ in the {where}: "
                    f"{values}; keep the results of one of the two in another file"
                )
