"""Scores against brute force, paired differences against scipy.stats."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("torchmetrics", reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")

from scipy import stats  # noqa: E402

from ltkernels.trainer.metrics import (  # noqa: E402
    harmonic_mean,
    paired_difference,
    probabilities_of,
    score,
    shot_group,
)

COUNTS = (300, 101, 100, 60, 20, 19, 3)


def predictions(classes=7, per_class=13, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(classes).repeat(per_class)
    logits = torch.randn(len(target), classes, generator=generator)
    logits[torch.arange(len(target)), target] += 1.5
    return torch.softmax(logits, dim=1), target


def brute_force(probabilities, target, counts):
    rows = list(zip(probabilities.tolist(), target.tolist(), strict=True))
    hits = [(row.index(max(row)) == label, max(row), label) for row, label in rows]
    per_class = []
    for label in range(len(counts)):
        of_class = [hit for hit, _, truth in hits if truth == label]
        per_class.append(100 * sum(of_class) / len(of_class))
    ece = 0.0
    for k in range(15):
        in_bin = [(hit, top) for hit, top, _ in hits if k / 15 < top <= (k + 1) / 15]
        if in_bin:
            accuracy = sum(hit for hit, _ in in_bin) / len(in_bin)
            confidence = sum(top for _, top in in_bin) / len(in_bin)
            ece += len(in_bin) / len(hits) * abs(accuracy - confidence)
    return per_class, 100 * sum(hit for hit, _, _ in hits) / len(hits), 100 * ece


def test_a_confidence_of_one_is_in_the_last_bin():
    target = torch.arange(7).repeat(8)
    probabilities = torch.full((len(target), 7), 0.04 / 6)
    probabilities[range(len(target)), target] = 0.96
    sure = torch.arange(len(target)) % 2 == 0
    probabilities[sure] = F.one_hot(torch.where(torch.arange(len(target)) % 4 == 0, target, 0), 7).float()[sure]
    _, _, ece = brute_force(probabilities, target, COUNTS)
    assert score(probabilities, target, COUNTS).ece == pytest.approx(ece, abs=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_scores_against_brute_force(seed):
    probabilities, target = predictions(seed=seed)
    scores = score(probabilities, target, COUNTS)
    per_class, overall, ece = brute_force(probabilities, target, COUNTS)
    assert scores.per_class == pytest.approx(per_class, abs=1e-4)
    assert scores.overall == pytest.approx(overall, abs=1e-4)
    assert scores.many == pytest.approx(sum(per_class[:2]) / 2, abs=1e-4)
    assert scores.medium == pytest.approx(sum(per_class[2:5]) / 3, abs=1e-4)
    assert scores.few == pytest.approx(sum(per_class[5:]) / 2, abs=1e-4)
    assert scores.worst_class == pytest.approx(min(per_class), abs=1e-4)
    assert scores.harmonic_mean == pytest.approx(stats.hmean(per_class), rel=1e-5)
    assert scores.ece == pytest.approx(ece, abs=1e-3)
    assert len({scores.overall, scores.many, scores.medium, scores.few, scores.worst_class, scores.ece}) > 4


def test_overall_counts_images_and_groups_count_classes():
    # Two images of class 0, both right; four of class 1, one right.
    probabilities = torch.tensor([[0.9, 0.1]] * 5 + [[0.2, 0.8]])
    scores = score(probabilities, torch.tensor([0, 0, 1, 1, 1, 1]), (50, 30))
    assert scores.overall == pytest.approx(50.0)
    assert scores.medium == pytest.approx(62.5)
    assert scores.many is None and scores.few is None


@pytest.mark.parametrize(("count", "group"), [(101, "many"), (100, "medium"), (20, "medium"), (19, "few"), (1, "few")])
def test_shot_groups(count, group):
    assert shot_group(count) == group


def test_harmonic_mean_is_zero_where_a_class_is():
    assert harmonic_mean([100.0, 0.0, 50.0]) == 0
    assert harmonic_mean([100.0, 50.0]) == pytest.approx(200 / 3)


def test_probabilities_have_the_scale_of_the_loss():
    cosines = torch.tensor([[0.5, 0.1]])
    assert probabilities_of(cosines, 30.0)[0, 0].item() == pytest.approx(1 / (1 + math.exp(-12)))
    assert probabilities_of(cosines.half(), 1.0).dtype == torch.float32


def test_paired_difference_is_the_paired_t_interval():
    random = np.random.RandomState(0)
    baseline = random.normal(80, 5, size=10)
    values = baseline + random.normal(1.5, 1, size=10)
    difference = paired_difference(values, baseline)
    reference = stats.ttest_rel(values, baseline)
    low, high = reference.confidence_interval(0.95)
    assert difference.mean / difference.standard_error == pytest.approx(reference.statistic)
    assert (difference.low, difference.high) == pytest.approx((low, high))
    assert difference.pairs == 10


@pytest.mark.parametrize(
    ("differences", "above", "claim"),
    [
        ([1.0, 1.2, 0.8, 1.1, 0.9, 1.0], True, "supported"),
        ([-1.0, -1.2, -0.8, -1.1, -0.9, -1.0], False, "worse"),
        ([0.1, -0.1, 0.2, -0.2, 0.1, -0.1], False, "not worse"),
        ([-0.2, -0.3, -0.25, -0.2, -0.3, -0.25], False, "not worse"),
        ([-0.6, -0.7, -0.65, -0.6, -0.7, -0.65], False, "worse"),
        ([3.0, -3.0, 2.0, -2.0, 1.0, -1.0], False, "inconclusive"),
        ([1.0, 1.2, 0.8], True, "too few pairs"),
        ([0.0] * 6, False, "not worse"),
    ],
)
def test_verdicts(differences, above, claim):
    difference = paired_difference(differences, [0.0] * len(differences))
    assert difference.above_two_standard_errors is above
    assert difference.claim == claim


def test_two_standard_errors_is_a_sharp_line():
    # Mean 1 and standard error 0.5 + or - a little.
    for spread, above in ((0.49, True), (0.51, False)):
        values = [1 - spread, 1 + spread]  # standard error of two values: half their distance
        assert paired_difference(values, [0.0, 0.0]).standard_error == pytest.approx(spread)
        assert paired_difference(values, [0.0, 0.0]).above_two_standard_errors is above


def test_one_pair_has_no_error():
    assert paired_difference([1.0], [0.0]) is None
