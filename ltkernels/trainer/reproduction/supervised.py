"""The page of the supervised methods: reported numbers beside ours, and what the paired differences allow to claim."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from statistics import mean
from typing import Any, NamedTuple

import numpy as np

from ltkernels.trainer.image_recipes import TIERS
from ltkernels.trainer.metrics import CALIBRATION_BINS, FEW_BELOW, MANY_ABOVE, shot_group
from ltkernels.trainer.posthoc import POST_HOC, SETTINGS, PostHocName, PostHocOptions
from ltkernels.trainer.report import EMPTY, markdown_table
from ltkernels.trainer.reproduction import plots, published
from ltkernels.trainer.reproduction.inputs import Inputs, Page, arms_without_runs, without_runs
from ltkernels.trainer.reproduction.page import (
    FEWEST_PAIRS,
    best_cell,
    box,
    cell,
    commands,
    difference_mean,
    epochs_of,
    folded_runs,
    hardware_table,
    interval,
    listed,
    numbers,
    protocol,
    table_command,
    thirds_cells,
)
from ltkernels.trainer.reproduction.runs import DATASET_TITLES, Line, Section, StoredRun, slugs
from ltkernels.trainer.tables import TABLES

NAME = "supervised"
PREFIX = "supervised-"
BASELINE = "ce"
FEWEST_SEEDS = 3
ADJUSTED = "logit-adjustment"
ABOVE_BASELINE = (3.0, 8.0)
"""Points that logit adjustment has to gain over cross-entropy: no deviation of it is reported."""
POST_HOC_DISTANCE = 1.5
"""Points that its post-hoc form may be away from its loss."""
_POST_HOC_TITLES = {"logit-adjustment": "post-hoc logit adj.", "crt": "cRT", "tau-norm": "tau-norm", "lws": "LWS"}
_RELIABILITY_PANELS = 6
_DEFAULTS = PostHocOptions()


def page(inputs: Inputs) -> Page:
    """The page and its pictures."""
    tables = [name for name in TABLES if name.startswith(PREFIX)]
    sections = [with_post_hoc(section) for table in tables for section in inputs.sections(table)]
    lines = [
        "# Supervised methods on long-tailed data",
        "",
        *box([*without_runs(inputs, tables), *_left_out(sections)], inputs.notes(NAME)),
    ]
    if not sections:
        lines += ["There are no results yet. These commands make them:", ""]
        lines += commands(table_command(table, tier) for table in tables for tier in TIERS)
        return Page("\n".join(lines))
    lines += [*_how_to_read(), "## Commands", "", "Every number and picture of this page:", ""]
    lines += commands(inputs.commands(tables))
    pictures: dict[str, bytes] = {}
    for section, slug in zip(sections, slugs(sections), strict=True):
        lines += _section(section, slug, pictures)
    return Page("\n".join(lines), pictures)


def with_post_hoc(section: Section) -> Section:
    """The section with a line for each post-hoc method below the line of the networks it was applied to."""
    lines: list[Line] = []
    for line in section.lines:
        lines.append(line)
        for method in POST_HOC:
            lines += _lines_of_post_hoc(line, method)
    return dataclasses.replace(section, lines=tuple(lines))


def _lines_of_post_hoc(line: Line, method: PostHocName) -> list[Line]:
    """One; more where runs were treated with other settings, and with those in its title that a table does not use."""
    variants: dict[str, list[StoredRun]] = {}
    for run in line.runs:
        if method in run["post_hoc"]:
            others = _other_settings(run, method)
            variants.setdefault(", ".join(f"{name} {value:g}" for name, value in others.items()), []).append(run)
    title = f"{line.title} + {_POST_HOC_TITLES.get(method, method)}"
    return [Line(f"{title} ({changed})" if changed else title, tuple(runs), method)
            for changed, runs in sorted(variants.items())]  # fmt: skip


def post_hoc_settings(run: StoredRun, method: PostHocName) -> dict[str, float]:
    """What decided the result of a post-hoc method; of results that lack it, what tables have always used."""
    stored = (run.values.get("post_hoc_settings") or {}).get(method)
    return {name: getattr(_DEFAULTS, name) for name in SETTINGS[method]} if stored is None else stored


def _other_settings(run: StoredRun, method: PostHocName) -> dict[str, float]:
    """Those that a table does not use."""
    settings = post_hoc_settings(run, method)
    return {name: value for name, value in settings.items() if value != getattr(_DEFAULTS, name)}


# The box


def _left_out(sections: list[Section]) -> Iterator[str]:
    planned = {published.CIFAR10_EXP100, published.CIFAR100_EXP100}  # without runs they are named among the tables
    others = [setting for setting in published.settings() if setting not in planned]
    others = [setting for setting in others if all(section.setting != setting for section in sections)]
    if others:
        yield f"Numbers are reported for these too, but no run is of them: {'; '.join(map(_setting_title, others))}."
    for section in sections:
        missing = not_run(section)
        if missing:
            yield f"{section.title}, not run yet: {_listed(missing)}"
    if not any(section.is_full for section in sections):
        yield (
            f"No run is of the full tier ({TIERS['full']:,} steps), so nothing on this page decides whether a reported "
            f"number is reached: the short tier takes {TIERS['short']:,} steps with the schedule scaled."
        )
    for section in sections:
        few = [line.title for line in section.lines if len(line.seeds) < FEWEST_SEEDS]
        if section.is_full and few:
            yield f"{section.title}, fewer than {FEWEST_SEEDS} seeds: {_listed(few)}"
    for section in sections:
        if published.methods(section.setting) and round(epochs_of(section)) != published.EPOCHS:
            yield f"{section.title}: {epochs_of(section):.0f} epochs, the numbers of (a) {published.EPOCHS}."
    if any(section.recipe["long_tail"]["selection"] == "hash" for section in sections):
        yield (
            "The training subsets are other images than the published ones: the selection here sorts the images of a "
            "class by the sha256 of their pixels, so that it does not depend on the order of a file, and draws from "
            "that order. Only the class counts are the same."
        )
    if sections:
        yield (
            "The headline here is the last epoch. Reported numbers may be those of the best epoch on the test set; "
            'the column "best epoch" is there for that, and is too good for the same reason. It is of the evaluated '
            f"steps that the protocol names, and `{EMPTY}` where only the last of them follows the first drop of the "
            "learning rate."
        )
    for source in published.SOURCES:
        if source.unsaid and any(published.reported(section.setting, BASELINE) for section in sections):
            yield f"({source.letter}) {source.name} {source.unsaid}"


def _listed(titles: list[str]) -> str:
    """With a full stop; titles may end in that of an abbreviation."""
    return "; ".join(titles).removesuffix(".") + "."


def _setting_title(setting: published.Setting) -> str:
    name = DATASET_TITLES.get(setting.dataset, setting.dataset)
    return f"{name}, {setting.profile} profile, imbalance factor {setting.imbalance_factor:g}"


def not_run(section: Section) -> list[str]:
    """Arms and post-hoc methods of the table that have no run in the section."""
    missing = arms_without_runs(section)
    for arm in TABLES[section.table].arms:
        if arm.post_hoc:
            applied = {line.post_hoc for line in section.lines if line.runs[0]["arm"] == arm.label}
            names = [_POST_HOC_TITLES.get(method, method) for method in POST_HOC if method not in applied]
            missing += [f"{arm.label} + {name}" for name in names]
    return missing


def _how_to_read() -> list[str]:
    return [
        "Percent of the balanced test set, mean ± standard deviation over runs. The last epoch is the result; the best "
        "evaluated epoch is chosen on the test set and so too good. Groups: many are classes with more than "
        f"{MANY_ABOVE} training images, medium {FEW_BELOW} to {MANY_ABOVE}, few fewer than {FEW_BELOW}; `{EMPTY}` "
        "where a group has no class. Where a group is empty, thirds of the classes by training images stand beside "
        f"the groups. ECE, many, medium and few are of the last epoch; ECE has {CALIBRATION_BINS} bins.",
        "",
        'Reported numbers have a letter for their source. "Goal" asks whether ours, last epoch, is within two '
        "published standard deviations, at least ±1.0 points, of the reported mean; it is decided in the full tier "
        f"with at least {FEWEST_SEEDS} seeds only. Logit adjustment, of which no deviation is reported, has to be "
        f"{ABOVE_BASELINE[0]:g} to {ABOVE_BASELINE[1]:g} points above cross-entropy, its post-hoc form within "
        f"{POST_HOC_DISTANCE:g} of its loss.",
        "",
        'A claim "A is better than B" is decided on differences of runs with the same seed, subset and steps, at least '
        f"{FEWEST_PAIRS} pairs, by the 95 % t-interval of their mean: *supported* if it is above 0, *not worse* if its "
        "lower end is above -0.5 points, *worse* if it is below 0 and reaches further, else *inconclusive*. The metric "
        "is the accuracy on all classes; differences of other columns are exploratory and decide nothing.",
        "",
    ]


# A section


def _section(section: Section, slug: str, pictures: dict[str, bytes]) -> list[str]:
    missing = not_run(section)
    return [
        f"## {section.title}",
        "",
        _table(section),
        *_sources(section),
        *([f"Not run yet: {_listed(missing)}", ""] if missing else []),
        *_comparisons(section),
        *_pictures(section, slug, pictures),
        "### Protocol",
        "",
        *protocol(section),
        *_post_hoc_protocol(section),
        "",
        hardware_table(section),
        *folded_runs(section),
    ]


def _post_hoc_protocol(section: Section) -> list[str]:
    """The settings of the post-hoc methods, as tables use them; a line that was made with others names those."""
    lines = [line for line in section.lines if line.post_hoc is not None]
    used = {line.post_hoc for line in lines}
    if not used:
        return []
    others = any(_other_settings(run, line.post_hoc) for line in lines for run in line.runs)
    exception = " where a line names no others" if others else ""
    found = [
        f"{_POST_HOC_TITLES.get(method, method)}: "
        + ", ".join(f"{name} {getattr(_DEFAULTS, name):g}" for name in SETTINGS[method])
        for method in POST_HOC
        if method in used
    ]
    return [f"- Settings of the post-hoc methods{exception}, none of them searched: {'; '.join(found)}."]


def _table(section: Section) -> str:
    thirds = len({shot_group(count) for count in section.counts}) < 3
    headings = ["method", "reported", "ours, last epoch", "best epoch", "many", "medium", "few"]
    headings += ["largest third", "middle third", "smallest third"] if thirds else []
    headings += ["ECE", "seeds", "subset seeds", "runs", "goal"]
    rows = []
    for line in section.lines:
        found = published.reported(section.setting, line.method) if _same_counts(section) else ()
        rows.append([
            line.title,
            "; ".join(number.cell for number in found) or EMPTY,
            cell(line.values("overall")),
            best_cell(line),
            *(cell(line.values(group), 1) for group in ("many", "medium", "few")),
            *(thirds_cells(line, section.counts) if thirds else ()),
            cell(line.values("ece"), 1),
            numbers(line.seeds),
            numbers(line.subset_seeds),
            str(len(line.runs)),
            goal(section, line),
        ])  # fmt: skip
    return markdown_table(headings, rows)


def _same_counts(section: Section) -> bool:
    """Whether the training set has the size of those that numbers are reported for."""
    max_count = published.MAX_COUNTS.get(section.setting.dataset)
    tail = section.recipe["long_tail"]
    return tail["max_count"] == max_count and not tail["validation_per_class"]


def goal(section: Section, line: Line) -> str:
    """Whether the mean of the last epochs is where the goal asks for it; why not, where nothing is decided."""
    wanted = _wanted(section, line) if _same_counts(section) else None
    if wanted is None:
        return EMPTY
    if not section.is_full:
        return f"not decided ({section.tier} tier)"
    if section.recipe["model"] != published.NETWORK or section.recipe["width"] != 1:
        return "not decided (another network)"
    seeds = min(len(line.seeds), len(wanted.other.seeds) if wanted.other else FEWEST_SEEDS)
    if seeds < FEWEST_SEEDS:
        return f"not decided ({seeds} seed{'s' * (seeds > 1)})"
    if wanted.other and {run.pair for run in wanted.other.runs} != {run.pair for run in line.runs}:
        return f"not decided (other runs than {wanted.other.title})"
    return wanted.verdict(mean(line.values("overall")))


class _Wanted(NamedTuple):
    """An interval for the accuracy of a line, in points above a reference.

    Args:
        reference: Accuracy that differences are taken to.
        low, high: Of the difference.
        other: The line that the reference is the mean of; None for a reported number.
        words: Behind a difference to another line.
    """

    reference: float
    low: float
    high: float
    other: Line | None = None
    words: str = ""

    def verdict(self, accuracy: float) -> str:
        difference = accuracy - self.reference
        # 38.06 - 36.00 is above 2.06 in floating point.
        met = self.low - 1e-9 <= difference <= self.high + 1e-9
        if self.other is not None:
            return f"{'yes' if met else 'no'} ({difference:+.2f} {self.words})"
        if met:
            return f"yes ({difference:+.2f})"
        return f"no ({abs(difference):.2f} {'above' if difference > 0 else 'below'})"


def _wanted(section: Section, line: Line) -> _Wanted | None:
    """The goal of a line; None for a method that has none, or whose reference has no run."""
    for number in published.reported(section.setting, line.method):
        if number.tolerance is not None:
            return _Wanted(number.mean, -number.tolerance, number.tolerance)
    if section.setting not in (published.CIFAR10_EXP100, published.CIFAR100_EXP100):
        return None
    baseline, loss_form = section.line(BASELINE), section.line(ADJUSTED)
    if line.method == ADJUSTED and baseline is not None:
        return _Wanted(mean(baseline.values("overall")), *ABOVE_BASELINE, baseline, f"to {baseline.title}")
    if (
        line.method == f"{BASELINE}+{ADJUSTED}"
        and loss_form is not None
        and not _other_settings(line.runs[0], ADJUSTED)
    ):
        distance = (-POST_HOC_DISTANCE, POST_HOC_DISTANCE)
        return _Wanted(mean(loss_form.values("overall")), *distance, loss_form, f"to {loss_form.title}")
    return None


def _sources(section: Section) -> list[str]:
    if not _same_counts(section) or not published.methods(section.setting):
        return ["No reported numbers are known for this data set.", ""]
    used = {
        number.source.letter for line in section.lines for number in published.reported(section.setting, line.method)
    }
    sources = [source for source in published.SOURCES if source.letter in used]
    return [*(f"- ({source.letter}) [{source.name}]({source.link}): {source.conditions}." for source in sources), ""]


# Claims


def _comparisons(section: Section) -> list[str]:
    lines = ["### Paired comparisons", ""]
    baseline = section.line(BASELINE)
    if baseline is None:
        return [*lines, "None: cross-entropy has no run here.", ""]
    comparisons = [(line, baseline) for line in section.lines if line is not baseline]
    adjusted, loss_form = section.line(f"{BASELINE}+{ADJUSTED}"), section.line(ADJUSTED)
    if adjusted is not None and loss_form is not None:
        comparisons.append((adjusted, loss_form))
    if not comparisons:
        return [*lines, "None: cross-entropy is the only method with runs.", ""]
    rows = [_comparison(line, other) for line, other in comparisons]
    headings = ["better?", "difference, points", "95 % interval", "pairs", "claim", "few, exploratory"]
    return [*lines, markdown_table(headings, rows)]


def _comparison(line: Line, baseline: Line) -> list[str]:
    difference, pairs = line.against(baseline, lambda side, run: side.scores(run)["overall"])
    few, _ = line.against(baseline, lambda side, run: side.scores(run)["few"])
    claim = "too few pairs" if difference is None else difference.claim
    return [
        f"{line.title} against {baseline.title}",
        difference_mean(difference),
        interval(difference),
        str(pairs),
        claim,
        difference_mean(few, 1),
    ]


# Pictures


def _pictures(section: Section, slug: str, pictures: dict[str, bytes]) -> list[str]:
    lines = []
    baseline = section.line(BASELINE)
    others = [line for line in section.lines if line is not baseline]
    if baseline is not None and others:
        name = f"{slug}-per-class.png"
        pictures[name] = plots.per_class_picture(
            _accuracies(baseline), [_accuracies(line) for line in others], section.counts
        )
        lines += [
            f"![Accuracy of each class by its training images: {baseline.title} against each other method]({name})",
            "",
            "Last epoch, mean over runs; bands are standard errors."
            if any(len(line.runs) > 1 for line in section.lines)
            else "Last epoch of one run each.",
            "",
        ]
    diagrams = [diagram for line in section.lines if (diagram := reliability(line)) is not None]
    if diagrams:
        name = f"{slug}-reliability.png"
        shown = diagrams[:_RELIABILITY_PANELS]
        pictures[name] = plots.reliability_picture(shown)
        titles = listed([diagram.title for diagram in shown])
        lines += [
            f"![Reliability diagrams: {titles}]({name})",
            "",
            "Images of all runs pooled in each bin of confidence; the ECE above a panel is the mean over runs, as in "
            "the table.",
            "",
        ]
    return ["### Pictures", "", *lines] if lines else []


def _accuracies(line: Line) -> plots.ClassAccuracies:
    return plots.ClassAccuracies(line.title, np.array([line.scores(run)["per_class"] for run in line.runs]))


def reliability(line: Line) -> plots.Reliability | None:
    """The bins of all runs pooled; None for post-hoc methods and runs without bins."""
    runs = [run for run in line.runs if run.values.get("calibration")]
    if line.post_hoc or not runs or len({run["calibration"]["bins"] for run in runs}) > 1:
        return None
    count = np.array([run["calibration"]["count"] for run in runs], dtype=float)
    total = np.maximum(count.sum(0), 1)
    pooled = {name: (count * _bins(runs, name)).sum(0) / total for name in ("confidence", "accuracy")}
    return plots.Reliability(line.title, mean(line.values("ece")), count.sum(0), **pooled)


def _bins(runs: list[StoredRun], name: str) -> np.ndarray:
    """(R, bins); a bin without images has no mean and counts nothing."""
    values: list[list[Any]] = [run["calibration"][name] for run in runs]
    return np.nan_to_num(np.array(values, dtype=float))
