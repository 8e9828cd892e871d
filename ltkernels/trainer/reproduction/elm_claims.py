"""The claims of ELM's abstract, each with the one metric that decides it, fixed before the runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Literal, TypeAlias

from ltkernels.trainer.metrics import FEW_BELOW, PairedDifference, thirds
from ltkernels.trainer.papers.elm_measures import SMALLEST_THIRD
from ltkernels.trainer.report import EMPTY
from ltkernels.trainer.reproduction.page import FEWEST_PAIRS
from ltkernels.trainer.reproduction.runs import Line, StoredRun

Verdict: TypeAlias = Literal["supported", "not worse", "inconclusive", "refuted", "not decided"]

LARGEST_RATIO = 0.9
"""Of the tail's relative spreads: a claim of tighter embeddings asks for a tenth less."""


@dataclass(frozen=True)
class Decision:
    """What the pairs of runs say about a claim.

    Args:
        claim: In words.
        metric: The primary one, and on which images.
        result: Its values.
        difference: Of the metric, ELM minus logit margins only; None without two pairs.
        pairs: Number of pairs.
        verdict: In a word.
        reason: Why nothing is decided, where nothing is.
    """

    claim: str
    metric: str
    result: str
    difference: PairedDifference | None
    pairs: int
    verdict: Verdict
    reason: str = ""


def decide(elm: Line, logit_only: Line) -> list[Decision]:
    """The three claims on the pairs of runs that the two lines have."""
    return [_tighter(elm, logit_only), _accurate(elm, logit_only), _narrower(elm, logit_only)]


def group_mean(run: StoredRun, group: str, measure: str) -> float | None:
    """Mean of one of ELM's measures over the classes of a group; None without classes or measures."""
    return None if run.group_means is None else run.group_means[group][measure]


def tail_group(counts: Sequence[int]) -> str:
    """The few-shot classes; where a data set has none, the smallest third of the classes stands for them."""
    return "few" if min(counts) < FEW_BELOW else SMALLEST_THIRD


def _tighter(elm: Line, logit_only: Line) -> Decision:
    claim = (
        f"Tail embeddings are tighter: a relative spread of at most {LARGEST_RATIO:g} times that of logit margins only"
    )
    counts = elm.runs[0]["counts"]
    tail = tail_group(counts)
    smallest = ", ".join(str(counts[k]) for k in thirds(counts)[2])
    classes = "few-shot classes" if tail == "few" else f"{tail} of the classes ({smallest} images), as none is few-shot"
    metric = f"relative spread of the {classes}, test images"
    difference, pairs = elm.against(logit_only, lambda _, run: group_mean(run, tail, "relative_spread"))
    ratio = mean_ratio(elm, logit_only)
    result = EMPTY if ratio is None else f"mean ratio {ratio:.3f}"
    undecided = _undecided(difference, pairs)
    if undecided or difference is None or ratio is None:
        return Decision(claim, metric, result, difference, pairs, "not decided", undecided)
    verdict: Verdict = "inconclusive"
    if difference.low > 0:
        verdict = "refuted"
    elif difference.high < 0:
        verdict = "supported" if ratio <= LARGEST_RATIO else "not worse"
    return Decision(claim, metric, result, difference, pairs, verdict)


def mean_ratio(elm: Line, logit_only: Line) -> float | None:
    """Mean over the pairs of runs of the ratio of the tail's relative spreads; None without pairs with measures."""
    tail = tail_group(elm.runs[0]["counts"])
    theirs = {run.pair: group_mean(run, tail, "relative_spread") for run in logit_only.runs}
    ours = {run.pair: group_mean(run, tail, "relative_spread") for run in elm.runs}
    pairs = sorted(pair for pair in ours.keys() & theirs.keys() if None not in (ours[pair], theirs[pair]))
    return mean(ours[pair] / theirs[pair] for pair in pairs) if pairs else None


def _accurate(elm: Line, logit_only: Line) -> Decision:
    claim, metric = "Balanced accuracy is not worse", "accuracy on the balanced test set, points"
    difference, pairs = elm.against(logit_only, lambda side, run: side.scores(run)["overall"])
    undecided = _undecided(difference, pairs)
    if undecided or difference is None:
        return Decision(claim, metric, _mean(difference, 2), difference, pairs, "not decided", undecided)
    verdict: Verdict = "refuted" if difference.claim == "worse" else difference.claim
    return Decision(claim, metric, _mean(difference, 2), difference, pairs, verdict)


def _narrower(elm: Line, logit_only: Line) -> Decision:
    claim = "The generalisation gap is smaller"
    metric = "loss gap, mean over all classes, nats"
    difference, pairs = elm.against(logit_only, lambda _, run: group_mean(run, "all", "loss_gap"))
    undecided = _undecided(difference, pairs)
    if undecided or difference is None:
        return Decision(claim, metric, _mean(difference, 3), difference, pairs, "not decided", undecided)
    verdict: Verdict = "inconclusive"
    if difference.low > 0:
        verdict = "refuted"
    elif difference.high < 0:
        verdict = "supported"
    return Decision(claim, metric, _mean(difference, 3), difference, pairs, verdict)


def _mean(difference: PairedDifference | None, digits: int) -> str:
    return EMPTY if difference is None else f"mean difference {difference.mean:+.{digits}f}"


def _undecided(difference: PairedDifference | None, pairs: int) -> str:
    if difference is None or pairs < FEWEST_PAIRS:
        return f"too few pairs: {pairs} of {FEWEST_PAIRS}"
    return ""
