"""Parts that the pages share: cells, tables, the box at the top, and what the runs were made with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

from ltkernels.trainer import TrainerError
from ltkernels.trainer.image_recipes import Tier
from ltkernels.trainer.metrics import PairedDifference, thirds
from ltkernels.trainer.report import EMPTY, markdown_table
from ltkernels.trainer.reproduction.runs import Line, Section, StoredRun
from ltkernels.trainer.tables import CHOICES, TABLES

FEWEST_PAIRS = 6
SHORT_HASH = 12


def cell(values: Sequence[float | None], digits: int = 2) -> str:
    """``mean ±std``, the mean alone of one run, ``-`` where there is nothing to average."""
    present = [value for value in values if value is not None]
    if not present:
        return EMPTY
    spread = f" ±{stdev(present):.{digits}f}" if len(present) > 1 else ""
    return f"{mean(present):.{digits}f}{spread}"


def best_cell(line: Line) -> str:
    """Accuracy of the best evaluated step; ``-`` where all but the last are before the learning rate drops."""
    if line.post_hoc or evaluations(line.runs[0].recipe).after_drop < 2:
        return EMPTY
    return cell(line.values("overall", "best"))


class Evaluations(NamedTuple):
    """How often a run is evaluated on the way.

    Args:
        number: In all.
        after_drop: Of them, after the first drop of the learning rate; all without drops.
    """

    number: int
    after_drop: int


def evaluations(recipe: dict[str, Any]) -> Evaluations:
    """Those that the best step of a run is chosen from."""
    steps, every = recipe["steps"], recipe["evaluate_every"]
    has_drops = recipe["schedule"] == "step" and recipe["drops"]
    first = recipe["drops"][0] * steps if has_drops else 0
    evaluated = {*range(every, steps + 1, every), steps}
    return Evaluations(len(evaluated), sum(step > first for step in evaluated))


def thirds_cells(line: Line, counts: Sequence[int]) -> list[str]:
    """Accuracy of the classes with most training images, of those in the middle and of those with fewest."""
    accuracies = [line.scores(run)["per_class"] for run in line.runs]
    return [cell([mean(of_run[k] for k in classes) for of_run in accuracies], 1) for classes in thirds(counts)]


def numbers(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def interval(difference: PairedDifference | None, digits: int = 2) -> str:
    if difference is None:
        return EMPTY
    return f"[{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"


def difference_mean(difference: PairedDifference | None, digits: int = 2) -> str:
    return EMPTY if difference is None else f"{difference.mean:+.{digits}f}"


def box(points: Sequence[str], notes: str) -> list[str]:
    """The box that opens a page; ``notes`` follow its points as they are."""
    lines = ["> **Not reproduced here**", ">", *(f"> - {point}" for point in points)]
    if notes.strip():
        lines += [">", *(f"> {line}".rstrip() for line in notes.strip().splitlines())]
    return [*lines, ""]


def read_notes(out: Path, page: str) -> str:
    """Content of ``notes-PAGE.md``, nothing where there is none.

    Raises:
        TrainerError: the file cannot be read.
    """
    file = out / f"notes-{page}.md"
    try:
        return file.read_text() if file.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise TrainerError(f"{file}: cannot be read: {error}") from error


def hardware_table(section: Section) -> str:
    """What the runs were made with, and how long one took."""
    groups: dict[tuple[str, str, str, str], list[StoredRun]] = {}
    for run in section.runs:
        parts = run.values.get("parts") or [run.values]
        device = _each(part["cpu"] if part["device"] == "cpu" else f"{part['device']}; {part['cpu']}" for part in parts)
        compiled = ", compiled" if run.recipe.get("compile") else ""
        key = (device, _each(part["threads"] for part in parts), _each(part["torch"] for part in parts) + compiled,
               str(run.recipe["views"]))  # fmt: skip
        groups.setdefault(key, []).append(run)
    rows = [
        [*key, f"{len(runs)}", _minutes(median(run["seconds"] for run in runs))] for key, runs in sorted(groups.items())
    ]
    return markdown_table(["hardware", "threads", "torch", "views", "runs", "wall time a run (median)"], rows)


def _each(values: Iterable[object]) -> str:
    """Those of the parts of a run that was resumed: one, where they are equal."""
    return ", then ".join(dict.fromkeys(map(str, values)))


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def epochs_of(section: Section) -> float:
    return section.recipe["steps"] / math.ceil(sum(section.counts) / section.recipe["batch_size"])


def protocol(section: Section) -> list[str]:
    """Data, network, schedule, hardware and fingerprints of a section."""
    recipe, counts = section.recipe, section.counts
    steps, batch = recipe["steps"], recipe["batch_size"]
    dates = sorted({str(run["date"])[:10] for run in section.runs})
    drops = listed([f"x{factor:g} at {share:.0%}" for share, factor in zip(recipe["drops"], recipe["factors"],
                    strict=True)]) if recipe["drops"] else "no drops"  # fmt: skip
    schedule = drops if recipe["schedule"] == "step" else "a cosine"
    views = f", {recipe['views']} views of every image" if recipe["views"] > 1 else ""
    test_set = "held-out validation images" if recipe["long_tail"]["validation_per_class"] else "balanced test set"
    return [
        f"- Data: {sum(counts):,} training images, {counts[0]:,} of the largest class, {counts[-1]:,} of the smallest; "
        f"evaluated on the {test_set} (sha256 of its images {_fingerprints(section, 'test_fingerprint')}).",
        *(f"- Subset {seed}: sha256 of its training images {found}." for seed, found in _subsets(section)),
        f"- {steps:,} steps of {batch} images{views} = {epochs_of(section):.1f} epochs; {section.network}, "
        f"{_precision(section)}; SGD with lr {recipe['lr']:g}, momentum {recipe['momentum']:g}, weight decay "
        f"{recipe['weight_decay']:g}{_without_decay(section)}; warm-up over {recipe['warmup']:.1%} of the steps, then "
        f"{schedule}."
        + (" Lines of a table that differ in these settings say so." if _settings_differ(section) else ""),
        f"- Evaluated {evaluations(recipe).number} times, every {recipe['evaluate_every']:,} steps and after the last, "
        f"{evaluations(recipe).after_drop} of them after the first drop of the learning rate.",
        f"- Settings of the methods: {'; '.join(_method_settings(section))}.",
        f"- Trained {dates[0] if len(dates) == 1 else f'{dates[0]} to {dates[-1]}'}.",
    ]


def _without_decay(section: Section) -> str:
    """See ``EmbeddingObjective.parameter_groups``."""
    return " (none of ELM's prototypes)" if any(line.method == "elm" for line in section.lines) else ""


def _precision(section: Section) -> str:
    precision = section.recipe["precision"]
    on_gpu = precision == "32-true" and any(run["device"] not in ("cpu", "mps") for run in section.runs)
    return f"{precision} (on a GPU with convolutions in TF32, the default of torch)" if on_gpu else precision


def _settings_differ(section: Section) -> bool:
    names = ("lr", "momentum", "weight_decay", "schedule", "warmup", "drops", "factors")
    return any(run.recipe[name] != section.recipe[name] for run in section.runs for name in names)


def _method_settings(section: Section) -> list[str]:
    found = {}
    for line in section.lines:
        if not line.post_hoc:
            recipe = line.runs[0].recipe
            settings = [f"{name} {value}" for name, value in recipe["settings"].items()]
            mixing = recipe["mixing"]
            settings += (
                [f"{mixing['kind']} of every batch with alpha {mixing['alpha']}"] if mixing["kind"] != "none" else []
            )
            found[line.title] = ", ".join(settings)
    return [f"{title}: {settings or 'none'}" for title, settings in found.items()]


def _fingerprints(section: Section, name: str) -> str:
    return listed(sorted({f"`{run[name][:SHORT_HASH]}`" for run in section.runs}))


def _subsets(section: Section) -> list[tuple[int, str]]:
    found: dict[int, set[str]] = {}
    for run in section.runs:
        found.setdefault(run.pair.subset_seed, set()).add(f"`{run['train_fingerprint'][:SHORT_HASH]}`")
    return [(seed, listed(sorted(found[seed]))) for seed in sorted(found)]


def folded_runs(section: Section) -> list[str]:
    """All runs with their recipe hashes, folded away."""
    rows = [
        [f"`{run.hash}`", line.title, *map(str, run.pair), str(run["date"])[:10], f"{run['seconds']:.0f}"]
        for line in section.lines
        if line.post_hoc is None
        for run in line.runs
    ]
    table = markdown_table(["recipe hash", "arm", "seed", "subset seed", "date", "seconds"], rows)
    return [f"<details><summary>{len(rows)} runs and their recipe hashes</summary>", "", table, "</details>", ""]


def commands(lines: Iterable[str], report: str = "ltkernels report") -> list[str]:
    """The command lines that make the page, from nothing."""
    return ["```", *dict.fromkeys(lines), report, "```", ""]


def table_command(table: str, tier: Tier, stored: Sequence[StoredRun] = ()) -> str:
    """The command that trains the runs of a table: those that are stored, where some are, else all."""
    planned = list(TABLES[table].runs(tier))
    names = {run.hash for run in stored}
    done = [run for run in planned if run.recipe.hash in names] or planned
    options = ""
    for name, value_of in CHOICES.items():
        chosen = dict.fromkeys(map(value_of, done))
        if len(chosen) < len(set(map(value_of, planned))):
            options += f" --{name.replace('_', '-')} {' '.join(map(str, chosen))}"
    if stored and all(run.recipe.get("compile") for run in stored):
        options += " --compile"  # the recipe hash is that of the plain step, but the rounding is not
    return f"ltkernels table {table} --tier {tier}{options}"
