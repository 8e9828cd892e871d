"""The page of ELM: its claims, decided on paired runs, the measures behind them, and how its weight was chosen."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from ltkernels.trainer import TrainerError
from ltkernels.trainer.image_recipes import TIERS
from ltkernels.trainer.methods import METHODS
from ltkernels.trainer.metrics import FEW_BELOW, MANY_ABOVE, Outputs, shot_group
from ltkernels.trainer.papers.elm_measures import GROUPS
from ltkernels.trainer.papers.elm_plots import FEW_CLASSES, SHOWN, projection_picture, spread_picture
from ltkernels.trainer.report import EMPTY, markdown_table
from ltkernels.trainer.reproduction.elm_claims import LARGEST_RATIO, Decision, decide, group_mean, tail_group
from ltkernels.trainer.reproduction.inputs import Inputs, Page, arms_without_runs, without_runs
from ltkernels.trainer.reproduction.page import (
    FEWEST_PAIRS,
    best_cell,
    box,
    cell,
    commands,
    folded_runs,
    hardware_table,
    interval,
    numbers,
    protocol,
    table_command,
    thirds_cells,
)
from ltkernels.trainer.reproduction.runs import Line, Pair, Section, StoredRun, slugs
from ltkernels.trainer.runlog import FEATURES_FILE, PREDICTIONS_FILE
from ltkernels.trainer.tables import ELM_SEARCH, TABLES

NAME = "elm"
TUNING_PREFIX = "elm-tuning-"
LOGIT_ONLY = "two-view-logit-adjustment"
_TASK = ("dataset", "model", "width")
_REPORT = "ltkernels report --runs runs"  # the projections are drawn from the embeddings of the runs
_MEASURES = {
    "spread": "spread",
    "relative_spread": "relative spread",
    "raw_spread": "raw spread",
    "norm": "norm",
    "error_gap": "error gap, points",
    "loss_gap": "loss gap, nats",
    "margin_gap": "margin gap",
}


def page(inputs: Inputs) -> Page:
    """The page and its pictures."""
    tuning = [name for name in TABLES if name.startswith(TUNING_PREFIX)]
    tables = [name for name in TABLES if name.startswith("elm-") and name not in tuning]
    sections = [section for table in tables for section in inputs.sections(table)]
    tuned = [section for table in tuning for section in inputs.sections(table)]
    lines = [
        "# ELM: embedding and logit margins",
        "",
        *box([*_left_out(sections, tuned), *without_runs(inputs, [*tables, *tuning])], inputs.notes(NAME)),
        'ELM, "Embedding and Logit Margins for Long-Tail Learning" (arXiv:2204.13208), joins logit margins to a loss '
        "that regularises the distribution of embeddings. The embedding loss here is a reconstruction of ours; "
        "`ltkernels/trainer/papers/elm.py` has its four forms, and the settings below name the one that was run.",
        "",
    ]
    if not sections and not tuned:
        lines += ["There are no results yet. These commands make them:", ""]
        lines += commands((table_command(table, tier) for table in (*tuning, *tables) for tier in TIERS), _REPORT)
        return Page("\n".join(lines))
    lines += [*_claims_fixed(), "## Commands", "", "Every number and picture of this page:", ""]
    lines += commands(inputs.commands((*tuning, *tables)), _REPORT)
    pictures: dict[str, bytes] = {}
    for section, slug in zip(sections, slugs(sections), strict=True):
        lines += _section(section, slug, inputs, pictures, tuned)
    lines += ["## Settings tried on validation images", ""]
    lines += _how_tuned() if tuned else ["No settings were tried on validation images yet.", ""]
    for section in tuned:
        lines += _tuning(section)
    return Page("\n".join(lines), pictures)


def _left_out(sections: Sequence[Section], tuned: Sequence[Section]) -> Iterator[str]:
    yield (
        "The embedding term is a reconstruction: the code of the paper, the exact term, its weight and the tables of "
        "results are not public, as far as we know. No reported numbers exist to compare with, so the page verifies "
        "the claims of the abstract and nothing else."
    )
    yield "ImageNet-LT and iNaturalist, which the paper uses too, are not among the data sets here."
    if sections:
        yield (
            "The training subsets are other images than those of other papers: the selection here does not depend on "
            "the order of a file."
        )
    for section in (*sections, *tuned):
        missing = arms_without_runs(section)
        if missing:
            yield f"{section.title}, not run yet: {'; '.join(missing)}."
    for section in tuned:
        tried = {method: len(_tried(section, method)) for method in ELM_SEARCH}
        if len(set(tried.values())) > 1:
            numbers_of = " and ".join(f"{count} settings of {METHODS[method].title}" for method, count in tried.items())
            yield f"{section.title}: the search was not equal so far, {numbers_of}."
    if sections and not any(section.tier.startswith("full") for section in sections):
        yield (
            f"No run is of the full tier ({TIERS['full']:,} steps): the claims are about {TIERS['short']:,} steps with "
            "the schedule scaled."
        )


def _claims_fixed() -> list[str]:
    return [
        "## Claims",
        "",
        "Fixed before the runs, each with one metric; the rest is exploratory. ELM is compared with logit margins only "
        "at the same two views, subset, seed and steps. Each claim is decided on the differences of the pairs, at "
        f"least {FEWEST_PAIRS}, by the 95 % t-interval of their mean:",
        "",
        f"1. Tail embeddings are tighter. Metric: relative spread of the classes with fewer than {FEW_BELOW} training "
        "images; where a data set has none, of the third of its classes with the fewest (4 of 10). "
        f"*Supported* if the interval is below 0 and the mean ratio of the pairs is at most {LARGEST_RATIO:g}; "
        "*not worse* if it is below 0 and the ratio is larger; *refuted* if it is above 0; else *inconclusive*.",
        "2. Balanced accuracy is not worse. Metric: accuracy on the balanced test set, last epoch. *Supported* if the "
        "interval is above 0, *not worse* if its lower end is above -0.5 points, either of which meets the claim; "
        "*refuted* if it is below 0 and reaches further; else *inconclusive*.",
        "3. The generalisation gap is smaller. Metric: loss gap, the mean over all classes. *Supported* if the "
        "interval is below 0, *refuted* if above, else *inconclusive*.",
        "",
        "Spread of a class: mean squared distance of its test images to the mean of its training images, embeddings of "
        "length 1, times n / (n - 1). Relative spread: over the squared distance to the nearest other class mean. Raw "
        "spread is that of the embeddings as they are; shorter ones lower it, so it stands beside their norm. Gaps "
        "are test minus training images without augmentation, the margin gap the other way round. Means over classes, "
        f"then mean ± standard deviation over runs; many is more than {MANY_ABOVE} training images, few fewer than "
        f"{FEW_BELOW}, medium between.",
        "",
    ]


# A section


def _section(
    section: Section, slug: str, inputs: Inputs, pictures: dict[str, bytes], tuned: Sequence[Section]
) -> list[str]:
    missing = arms_without_runs(section)
    return [
        f"## {section.title}",
        "",
        *_decisions(section),
        *_weight_used(section, tuned),
        _accuracies(section),
        *([f"Not run yet: {'; '.join(missing)}.", ""] if missing else []),
        *_measures(section),
        *_pictures(section, slug, inputs, pictures),
        "### Protocol",
        "",
        *protocol(section),
        "",
        hardware_table(section),
        *folded_runs(section),
    ]


def _decisions(section: Section) -> list[str]:
    logit_only = section.line(LOGIT_ONLY)
    elm_lines = [line for line in section.lines if line.method == "elm"]
    if not elm_lines or logit_only is None:
        return ["No claim is decided: it takes runs of ELM and of logit margins only.", ""]
    headings = ["claim", "primary metric", "result", "95 % interval of ELM - logit only", "pairs", "verdict"]
    lines = []
    for elm in elm_lines:  # more than one where runs have different settings, which the title names
        rows = [_decision_row(decision) for decision in decide(elm, logit_only)]
        lines += [f"{elm.title} against {logit_only.title}:", "", markdown_table(headings, rows)]
    return lines


def _decision_row(decision: Decision) -> list[str]:
    verdict = f"**{decision.verdict}**" + (f" ({decision.reason})" if decision.reason else "")
    ends = interval(decision.difference, 3)
    return [decision.claim, decision.metric, decision.result, ends, str(decision.pairs), verdict]


def _weight_used(section: Section, tuned: Sequence[Section]) -> list[str]:
    same_task = [found for found in tuned if all(found.recipe[name] == section.recipe[name] for name in _TASK)]
    sentences = []
    for method, search in ELM_SEARCH.items():
        used = sorted(_tried(section, method))
        if not used:
            continue
        sentence = f"{search.symbol} of {METHODS[method].title} is {' and '.join(f'{value:g}' for value in used)} here"
        choices = {value for found in same_task if (value := chosen(found, method)) is not None}
        if not choices:
            sentences.append(
                f"{sentence}, the default: none was chosen on validation images of this data set with this network."
            )
        elif choices == set(used):
            sentences.append(f"{sentence}, chosen on validation images (below).")
        else:
            others = ", ".join(f"{value:g}" for value in sorted(choices))
            sentences.append(f"{sentence}, not the one chosen ({others}) on validation images (below).")
    return [" ".join(sentences), ""] if sentences else []


def _accuracies(section: Section) -> str:
    few = tail_group(section.counts) == "few"
    headings = ["method", "balanced accuracy", "best epoch", "many", "medium", "few" if few else "smallest third"]
    headings += ["ECE", "seeds", "subset seeds"]
    rows = [
        [
            line.title,
            cell(line.values("overall")),
            best_cell(line),
            *(cell(line.values(group), 1) for group in ("many", "medium")),
            cell(line.values("few"), 1) if few else thirds_cells(line, section.counts)[2],
            cell(line.values("ece"), 1),
            numbers(line.seeds),
            numbers(line.subset_seeds),
        ]
        for line in section.lines
    ]
    return markdown_table(headings, rows)


def _measures(section: Section) -> list[str]:
    measured = [line for line in section.lines if any(run.measures is not None for run in line.runs)]
    if not measured:
        return ["No run here has measures of its embeddings.", ""]
    rows = []
    for line in measured:
        runs = [run for run in line.runs if run.measures is not None]
        for group in _groups(section.counts):
            cells = [cell([group_mean(run, group, name) for run in runs], 3) for name in _MEASURES]
            rows.append([line.title, group, *cells, str(len(runs))])
    return ["### Measures", "", markdown_table(["method", "classes", *_MEASURES.values(), "runs"], rows)]


def _groups(counts: Sequence[int]) -> list[str]:
    """Those with classes; the smallest third where it stands for the few-shot ones."""
    present = {"all", tail_group(counts), *(shot_group(count) for count in counts)}
    return [group for group in GROUPS if group in present]


# Tuning


def _how_tuned() -> list[str]:
    return [
        "A balanced validation set, taken from the training images before the long-tailed set was drawn, chooses "
        "lambda of ELM and tau of the baseline by balanced accuracy after the last epoch; of equal values the smaller "
        "one. The test set has no part in it.",
        "",
    ]


def _tuning(section: Section) -> list[str]:
    choices = {method: chosen(section, method) for method in ELM_SEARCH}
    rows = []
    for line in section.lines:
        texts = [
            line.title,
            cell(line.values("overall")),
            *(cell(line.values(group), 1) for group in ("many", "medium", "few")),
            numbers(line.seeds),
        ]
        is_chosen = line.method in ELM_SEARCH and searched(line) == choices[line.method]
        rows.append([f"**{text}**" if is_chosen and text != EMPTY else text for text in texts])
    headings = ["method", "validation accuracy", "many", "medium", "few", "seeds"]
    return [
        f"### {section.title}",
        "",
        markdown_table(headings, rows),
        *_choice(section, choices),
        *protocol(section),
        "",
        hardware_table(section),
        *folded_runs(section),
    ]


def _choice(section: Section, choices: dict[str, float | None]) -> list[str]:
    found = [
        f"{ELM_SEARCH[method].symbol} {value:g} for {METHODS[method].title}"
        for method, value in choices.items()
        if value is not None
    ]
    missing = arms_without_runs(section)
    still = f" Not run yet: {'; '.join(missing)}." if missing else ""
    once = {len(line.seeds) for line in section.lines} == {1}
    chance = " Each value has one seed, so neighbours may differ by chance." if once else ""
    return [f"Chosen{' so far' if missing else ''}: {', '.join(found) or 'nothing'}.{still}{chance}", ""]


def searched(line: Line) -> float:
    """The value of the setting that is searched for the method of a line."""
    return line.runs[0].recipe["settings"][ELM_SEARCH[line.method].field]


def _tried(section: Section, method: str) -> set[float]:
    return {searched(line) for line in section.lines if line.method == method}


def chosen(section: Section, method: str) -> float | None:
    """The value with the best mean validation accuracy, the smaller one of equal ones; None without runs."""
    found = [(-mean(line.values("overall")), searched(line)) for line in section.lines if line.method == method]
    return min(found)[1] if found else None


# Pictures


def _pictures(section: Section, slug: str, inputs: Inputs, pictures: dict[str, bytes]) -> list[str]:
    lines = []
    measures = {
        line.title: found
        for line in section.lines
        if (found := [run.measures for run in line.runs if run.measures is not None])
    }
    if measures:
        name = f"{slug}-spread.png"
        pictures[name] = spread_picture(measures)
        lines += [f"![Spread and relative spread of each class over its training images]({name})", ""]
        if len(section.counts) <= FEW_CLASSES and max(map(len, measures.values())) > 1:
            lines += ["Means over runs; bars are standard errors.", ""]
        elif len(section.counts) > FEW_CLASSES:
            text = (
                "Faint symbols are classes, means over runs; lines join the means of a tenth of the classes at a time."
            )
            lines += [text, ""]
    name = f"{slug}-projection.png"
    drawn = _projection(section, inputs.runs)
    if drawn is not None:
        pictures[name] = drawn
    if drawn is not None or (inputs.out / name).is_file():
        lines += [
            f"![Test embeddings of the three largest and the three smallest classes in the plane]({name})",
            "",
            "Two principal components of the embeddings, divided by their lengths, of the three classes with most "
            f"training images and the three with fewest, of each method by itself. The first {SHOWN} test images of a "
            "class are drawn; components and means are those of all.",
            "",
        ]
    return ["### Pictures", "", *lines] if lines else []


def _projection(section: Section, folder: Path | None) -> bytes | None:
    """The picture of the first seed and subset that every line has; None where folders of these runs are missing."""
    shared: set[Pair] = set.intersection(*({run.pair for run in line.runs} for line in section.lines))
    if folder is None or not shared:
        return None
    pair = min(shared, key=lambda found: (found.subset_seed, found.seed))
    tests = {}
    for line in section.lines:
        run = next(run for run in line.runs if run.pair == pair)
        path = _folder_of(run, folder)
        if path is None:
            return None
        tests[f"{line.title}, seed {pair.seed}, subset {pair.subset_seed}"] = _outputs(path)
    return projection_picture(tests, section.counts)


def _folder_of(run: StoredRun, folder: Path) -> Path | None:
    path = folder / f"{run['recipe']}-{run.hash}"
    return path if (path / FEATURES_FILE).is_file() and (path / PREDICTIONS_FILE).is_file() else None


def _outputs(folder: Path) -> Outputs:
    try:
        with np.load(folder / FEATURES_FILE) as features, np.load(folder / PREDICTIONS_FILE) as predictions:
            arrays = features["test_embedding"], predictions["logits"], predictions["target"]
            return Outputs(*(torch.from_numpy(array) for array in arrays))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise TrainerError(f"{folder}: cannot read the embeddings of the run: {error}") from error
