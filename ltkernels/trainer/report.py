"""From runs to tables, sentences and a picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ltkernels.trainer.engine import Run
from ltkernels.trainer.metrics import (
    CALIBRATION_BINS,
    COLUMNS,
    FEW_BELOW,
    MANY_ABOVE,
    PairedDifference,
    paired_difference,
    shot_group,
)
from ltkernels.trainer.runfolder import describe

BASELINE = "ce"
EMPTY = "-"


@dataclass(frozen=True)
class Results:
    """Runs of several methods over several seeds, and what the tables need to name them."""

    runs: tuple[Run, ...]
    titles: dict[str, str]
    counts: tuple[int, ...]

    def with_run(self, run: Run) -> Results:
        return replace(self, runs=(*self.runs, run))

    def of(self, method: str) -> list[Run]:
        return [run for run in self.runs if run.method == method]

    @property
    def methods(self) -> list[str]:
        """The methods that have runs, in the order of the recipe."""
        return [method for method in self.titles if self.of(method)]

    @property
    def tail_classes(self) -> list[int]:
        return [label for label, count in enumerate(self.counts) if shot_group(count) == "few"]

    def paired_tail(self, method: str) -> PairedDifference | None:
        """Tail accuracy minus the baseline's over the seeds that both have; None where nothing can be said."""
        ours = {run.seed: run.last.few for run in self.of(method)}
        baseline = {run.seed: run.last.few for run in self.of(BASELINE)}
        seeds = sorted(ours.keys() & baseline.keys()) if self.tail_classes else []
        return paired_difference([ours[seed] for seed in seeds], [baseline[seed] for seed in seeds])


# Cells


def mean_and_std(values: Sequence[float | None]) -> str:
    """``mean ±std`` over seeds, the mean alone for one seed, ``-`` for a group without classes."""
    present = [value for value in values if value is not None]
    if not present:
        return EMPTY
    spread = f" ±{stdev(present):.1f}" if len(present) > 1 else ""
    return f"{mean(present):.1f}{spread}"


def difference_cell(difference: PairedDifference | None) -> str:
    return EMPTY if difference is None else f"{difference.mean:+.1f} (SE {difference.standard_error:.1f})"


def verdict_cell(difference: PairedDifference | None) -> str:
    if difference is None:
        return EMPTY
    return "yes" if difference.above_two_standard_errors else "no"


def table_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table, one row a method; the same for terminal and report."""
    headings = ["method", *(heading for _, heading in COLUMNS), "few - CE, paired", ">2 SE"]
    rows = []
    for method in results.methods:
        runs = results.of(method)
        scores = [mean_and_std([getattr(run.last, name) for run in runs]) for name, _ in COLUMNS]
        difference = None if method == BASELINE else results.paired_tail(method)
        rows.append([results.titles[method], *scores, difference_cell(difference), verdict_cell(difference)])
    return headings, rows


def terminal_table(results: Results, width: int) -> Table:
    """The table for a terminal of ``width`` characters; from 80 on no column is cut off."""
    headings, rows = table_rows(results)
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        title=f"Accuracy on the balanced test set, %, mean ± standard deviation, {seeds_phrase(results)}",
    )

    def fitting(cell: str) -> str:
        return cell if width >= 120 else cell.replace(" ", "\n")

    for column, heading in enumerate(headings):
        table.add_column(fitting(heading), justify="right" if column else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(fitting, row))
    return table


def seeds_phrase(results: Results) -> str:
    """How many seeds the methods have; after an interrupt not all have the same number."""
    numbers = {len(results.of(method)) for method in results.methods}
    fewest, most = min(numbers), max(numbers)
    return f"{most} seed{'s' * (most != 1)}" if fewest == most else f"{fewest} to {most} seeds"


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


# Sentences


def verdict(results: Results, method: str) -> str:
    """Whether the tail accuracy of a method is above the baseline's by more than two standard errors."""
    title = results.titles[method]
    if not results.tail_classes:
        return f"{title}: no class has fewer than {FEW_BELOW} training images, so there is no tail to compare."
    difference = results.paired_tail(method)
    if difference is None:
        return f"{title}: no verdict, for a standard error takes two seeds that CE has too."
    negation = "" if difference.above_two_standard_errors else "**not** "
    return (
        f"{title}: {difference.mean:+.1f} points, standard error {difference.standard_error:.1f}, 95 % interval "
        f"[{difference.low:+.1f}, {difference.high:+.1f}], {difference.pairs} pairs: {negation}above CE by more than "
        f'two standard errors. By the 95 % t-interval "better than CE": {difference.claim}.'
    )


def verdicts(results: Results) -> list[str]:
    return [verdict(results, method) for method in results.methods if method != BASELINE]


def groups_sentence(counts: Sequence[int]) -> str:
    """Which classes are in which shot group, by their training images."""
    rules = {"many": f"> {MANY_ABOVE}", "medium": f"{FEW_BELOW}..{MANY_ABOVE}", "few": f"< {FEW_BELOW}"}
    parts = []
    for group, rule in rules.items():
        members = [str(label) for label, count in enumerate(counts) if shot_group(count) == group]
        parts.append(f"{group} ({rule} images): {_classes(members)}")
    return "; ".join(parts)


def _classes(members: Sequence[str]) -> str:
    if not members:
        return "none"
    return f"class{'es' * (len(members) > 1)} {', '.join(members)}"


# Files


def markdown_report(results: Results, config: dict[str, Any], status: str, seconds: float) -> str:
    """The run in words and tables: report.md."""
    recipe, drawn = config["recipe"], config["data"]
    counts = drawn["counts"]
    seeds = sorted({run.seed for run in results.runs})
    lines = [
        f"# {config['recipe_name']}",
        "",
        f"Status: {status}. Started {config['started']}, {seconds:.0f} s of training and evaluation on "
        f"{describe(config)}. Seeds with results: {', '.join(map(str, seeds)) or 'none'}. "
        f"Recipe {config['recipe_hash']}.",
        "",
        f"    {config['command']}",
        "",
        "## Result",
        "",
    ]
    if not results.runs:
        return "\n".join([*lines, "No run was finished.", ""])
    headings, rows = table_rows(results)
    headings.append("best overall")
    for row, method in zip(rows, results.methods, strict=True):
        row.append(mean_and_std([run.best_overall for run in results.of(method)]))
    lines += [
        'Last epoch, balanced test set, percent, mean ± standard deviation over seeds. "best overall" is the best '
        "evaluated epoch, chosen on the test set and so too good.",
        "",
        markdown_table(headings, rows),
        f"Groups: {groups_sentence(counts)}. ECE has {CALIBRATION_BINS} bins. Harmonic mean and worst class are over "
        "the accuracies of the classes.",
        "",
        "![accuracy of each class over its training images](per_class_accuracy.png)",
        "",
        "## Tail accuracy against CE",
        "",
        'The tail is the group "few". Differences are paired: a seed gives every method the same images, the same '
        "initial hidden layers and the same batches.",
        "",
        *(f"- {sentence}" for sentence in verdicts(results)),
        "",
        "## Protocol",
        "",
        f"- Data: {drawn['source']}; {sum(counts)} training images ({', '.join(map(str, counts))} for classes "
        f"0..{len(counts) - 1}, drawn anew for every seed), {drawn['test_images']} test images, the same for all seeds "
        f"(sha256 {drawn['test_fingerprint'][:12]}; of every training set: config.json).",
        f"- Network: hidden layers {recipe['hidden']}; SGD with momentum {recipe['momentum']:g}, batches of "
        f"{recipe['batch_size']}, {recipe['epochs']} epochs = {steps(sum(counts), recipe)} steps, warm-up over "
        f"{recipe['warmup']:g} of the steps, then a cosine; {recipe['precision']}.",
        *(f"- {results.titles[name]}: {settings_of(recipe[name])}." for name in results.methods),
        "- Predictions are the largest raw logit: margins and priors belong to training only.",
        "",
    ]
    return "\n".join(lines)


def steps(images: int, recipe: dict[str, Any]) -> int:
    return math.ceil(images / recipe["batch_size"]) * recipe["epochs"]


def settings_of(method: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in method.items())


def metrics_csv(results: Results) -> str:
    """One row a method, seed and evaluated epoch; percent."""
    names = [name for name, _ in COLUMNS]
    rows = [
        [run.method, run.seed, evaluation.epoch, int(evaluation is run.evaluations[-1]), f"{evaluation.train_loss:.6f}"]
        + [_number(getattr(evaluation.scores, name)) for name in names]
        + [f"{run.seconds:.3f}"]
        for run in results.runs
        for evaluation in run.evaluations
    ]
    return _csv(["method", "seed", "epoch", "is_last", "train_loss", *names, "run_seconds"], rows)


def per_class_csv(results: Results) -> str:
    """Accuracy of each class after the last epoch, one row a method, seed and class; percent."""
    rows = [
        [run.method, run.seed, label, count, _number(accuracy)]
        for run in results.runs
        for label, (count, accuracy) in enumerate(zip(results.counts, run.last.per_class, strict=True))
    ]
    return _csv(["method", "seed", "class", "train_images", "accuracy"], rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _csv(header: list[str], rows: list[list[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([header, *rows])
    return text.getvalue()


# Picture

_COLOURS = ("#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # told apart by colour-blind readers
_MARKERS = ("o", "s", "^", "D", "v", "P")


def per_class_picture(results: Results) -> bytes:
    """PNG of per-class accuracy over the training images of the class: mean and standard error over seeds."""
    figure = Figure(figsize=(9, 5.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, method in enumerate(results.methods):
        _plot_method(axes, results, method, index)
    axes.set_xscale("log")
    axes.invert_xaxis()  # the largest class on the left, as in the tables
    labels: dict[int, list[str]] = {}
    for label, count in enumerate(results.counts):
        labels.setdefault(count, []).append(str(label))
    axes.set_xticks(list(labels), [f"{count}\n{','.join(names)}" for count, names in labels.items()])
    axes.tick_params(axis="x", which="minor", bottom=False)
    mark_groups(axes, results.counts)
    axes.set_xlabel("training images of the class (log scale); below: the class")
    axes.set_ylabel("test accuracy of the class, %")
    axes.set_title(f"Accuracy of each class, mean ± standard error over {seeds_phrase(results)}", pad=20)
    axes.grid(axis="y", color="0.9")
    axes.legend(loc="lower left", framealpha=1, edgecolor="none")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _plot_method(axes: Axes, results: Results, method: str, index: int) -> None:
    accuracies = list(zip(*(run.last.per_class for run in results.of(method)), strict=True))
    # Methods stand side by side at a class, or their error bars would hide each other.
    side = 1.018 ** (len(results.methods) - 1 - 2 * index)
    axes.errorbar(
        [count * side for count in results.counts],
        [mean(values) for values in accuracies],
        [stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0 for values in accuracies],
        label=results.titles[method],
        color=_COLOURS[index % len(_COLOURS)],
        marker=_MARKERS[index % len(_MARKERS)],
        markersize=5,
        linewidth=1.6,
        elinewidth=1,
        capsize=2,
    )


def mark_groups(axes: Axes, counts: Sequence[int]) -> None:
    """Name the shot groups above axes of training images, with a line where one ends; ``counts`` fall."""
    for group in ("many", "medium", "few"):
        members = [count for count in counts if shot_group(count) == group]
        if members:
            middle = math.sqrt(members[0] * members[-1])
            axes.text(middle, 1.01, group, transform=axes.get_xaxis_transform(), ha="center", va="bottom", color="0.4")
    for larger, smaller in pairwise(counts):
        if shot_group(larger) != shot_group(smaller):
            axes.axvline(math.sqrt(larger * smaller), color="0.75", linestyle=":", zorder=0)
