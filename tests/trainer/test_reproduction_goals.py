"""What the page of the supervised methods decides: goals of reproduction, and claims on paired runs."""

import numpy as np
import pytest

pytest.importorskip("lightning_fabric", reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")

import stored_results as stored  # noqa: E402
from stored_results import DIFFERENCES, report, rows  # noqa: E402

from ltkernels.trainer import TrainerError  # noqa: E402


@pytest.fixture
def quick(monkeypatch):
    stored.without_pictures(monkeypatch)


# Goals


@pytest.mark.parametrize(
    "tier, seeds, accuracy, expected",
    [
        ("full", (0, 1, 2), 40.0, "yes (+1.94)"),
        ("full", (0, 1, 2), 36.0, "yes (-2.06)"),
        ("full", (0, 1, 2), 40.2, "no (2.14 above)"),
        ("full", (0, 1, 2), 35.0, "no (3.06 below)"),
        ("full", (0, 1), 38.0, "not decided (2 seeds)"),
        ("short", (0, 1, 2), 38.0, "not decided (short tier)"),
    ],
)
def test_goal(tmp_path, quick, tier, seeds, accuracy, expected):
    results = stored.supervised(tmp_path / "results", arms=("ce", "focal"), tier=tier, seeds=seeds)
    for run in results.values():
        run["last"]["overall"] = accuracy
    stored.save(tmp_path / "results", "supervised-cifar100", tier, results)
    found = {row["method"]: row["goal"] for row in rows(report(tmp_path)[0])}
    assert found["CE"] == expected and found["focal"] == found["CE + post-hoc logit adj."] == "-"


@pytest.mark.parametrize(
    "tier, seeds, baseline, loss, post_hoc, expected",
    [
        ("full", (0, 1, 2), 38.0, 43.0, 42.0, ("yes (+5.00 to CE)", "yes (-1.00 to logit adj.)")),
        ("full", (0, 1, 2), 38.0, 41.0, 42.5, ("yes (+3.00 to CE)", "yes (+1.50 to logit adj.)")),
        ("full", (0, 1, 2), 38.0, 46.1, 44.5, ("no (+8.10 to CE)", "no (-1.60 to logit adj.)")),
        ("full", (0, 1, 2), 38.0, 40.9, 42.5, ("no (+2.90 to CE)", "no (+1.60 to logit adj.)")),
        ("full", (0, 1), 38.0, 43.0, 43.0, ("not decided (2 seeds)",) * 2),
        ("short", (0, 1, 2), 38.0, 43.0, 43.0, ("not decided (short tier)",) * 2),
    ],
)
def test_goal_of_logit_adjustment(tmp_path, quick, tier, seeds, baseline, loss, post_hoc, expected):
    results = stored.supervised(tmp_path / "results", arms=("ce", "logit-adjustment"), tier=tier, seeds=seeds)
    for run in results.values():
        run["last"]["overall"] = baseline if run["arm"] == "CE" else loss
        if run["arm"] == "CE":
            run["post_hoc"]["logit-adjustment"]["overall"] = post_hoc
    stored.save(tmp_path / "results", "supervised-cifar100", tier, results)
    found = {row["method"]: row["goal"] for row in rows(report(tmp_path)[0])}
    assert (found["logit adj."], found["CE + post-hoc logit adj."]) == expected


def test_the_goal_of_the_post_hoc_form_is_for_the_settings_of_the_table(tmp_path, quick):
    results = stored.supervised(tmp_path / "results", arms=("ce", "logit-adjustment"), tier="full")
    for run in results.values():
        if run["arm"] == "CE":
            run["post_hoc_settings"] = {"tau-norm": {"norm_tau": 1.0}, "logit-adjustment": {"prior_tau": 2.0}}
    stored.save(tmp_path / "results", "supervised-cifar100", "full", results)
    found = {row["method"]: row["goal"] for row in rows(report(tmp_path)[0])}
    assert found["CE + post-hoc logit adj. (prior_tau 2)"] == "-"


def test_the_goal_of_logit_adjustment_waits_for_what_it_is_compared_with(tmp_path, quick):
    stored.supervised(tmp_path / "results", arms=("logit-adjustment",), tier="full")
    assert {row["goal"] for row in rows(report(tmp_path)[0])} == {"-"}
    few = stored.supervised(tmp_path / "results", arms=("ce",), tier="full", seeds=(0,))
    many = stored.supervised(tmp_path / "results", arms=("logit-adjustment",), tier="full")
    stored.save(tmp_path / "results", "supervised-cifar100", "full", few | many)
    found = {row["method"]: row["goal"] for row in rows(report(tmp_path)[0])}
    assert found["logit adj."] == "not decided (1 seed)"
    other = stored.supervised(tmp_path / "results", arms=("ce",), tier="full", subset_seeds=(0, 1))
    stored.save(tmp_path / "results", "supervised-cifar100", "full", other | many)
    found = {row["method"]: row["goal"] for row in rows(report(tmp_path)[0])}
    assert found["logit adj."] == "not decided (other runs than CE)"


def test_numbers_for_other_class_counts_are_not_put_beside_ours(tmp_path, quick):
    results = stored.supervised(tmp_path / "results", arms=("ce",), tier="full")
    for run in results.values():
        run["recipe_fields"]["long_tail"]["max_count"] = 450
    stored.save(tmp_path / "results", "supervised-cifar100", "full", results)
    page, _ = report(tmp_path)
    assert {(row["reported"], row["goal"]) for row in rows(page)} == {("-", "-")}
    assert "No reported numbers are known" in page


# Claims


@pytest.mark.parametrize("claim", DIFFERENCES)
def test_claims_of_methods(tmp_path, quick, claim):
    differences, interval = DIFFERENCES[claim]
    results = stored.supervised(tmp_path / "results", arms=("ce", "vs"), subset_seeds=(0, 1))
    for run in results.values():
        pair = 3 * run["subset_seed"] + run["seed"]
        run["last"]["overall"] = 40.0 + 2 * pair + (differences[pair] if run["arm"] == "VS" else 0.0)
    stored.save(tmp_path / "results", "supervised-cifar100", "short", results)
    row = next(row for row in rows(report(tmp_path)[0], "better?") if row["better?"] == "VS against CE")
    assert (row["claim"], row["95 % interval"], row["pairs"]) == (claim, interval, "6")
    assert row["difference, points"] == f"{np.mean(differences):+.2f}"


def test_five_pairs_decide_nothing_and_only_pairs_count(tmp_path, quick):
    results = stored.supervised(tmp_path / "results", arms=("ce", "vs", "logit-adjustment"), subset_seeds=(0, 1))
    results = {name: run for name, run in results.items()
               if not (run["arm"] == "VS" and (run["seed"], run["subset_seed"]) == (2, 1))}  # fmt: skip
    stored.save(tmp_path / "results", "supervised-cifar100", "short", results)
    table = {row["better?"]: row for row in rows(report(tmp_path)[0], "better?")}
    assert (table["VS against CE"]["pairs"], table["VS against CE"]["claim"]) == ("5", "too few pairs")
    assert table["logit adj. against CE"]["claim"] == "supported"
    assert table["CE + post-hoc logit adj. against logit adj."]["pairs"] == "6"


def test_without_cross_entropy_nothing_is_compared(tmp_path, quick):
    stored.supervised(tmp_path / "results", arms=("vs",), seeds=(0,))
    assert "None: cross-entropy has no run here." in report(tmp_path)[0]


# What may not be compared


@pytest.mark.parametrize(
    "field, value, what",
    [
        ("train_fingerprint", "c" * 64, "training images of subset 0: (00aaaaaaaaaa and c{12}|c{12} and 00aaaaaaaaaa)"),
        ("test_fingerprint", "c" * 64, "test images: (b{12} and c{12}|c{12} and b{12})"),
        ("processes", 2, "processes: (1 and 2|2 and 1)"),
    ],
    ids=["training images", "test images", "processes"],
)
def test_runs_that_seem_to_be_paired_are_of_the_same_images(tmp_path, quick, field, value, what):
    results = stored.supervised(tmp_path / "results", arms=("ce", "focal"), subset_seeds=(0, 1))
    changed = next(run for run in results.values() if run["arm"] == "focal" and run["subset_seed"] == 0)
    changed[field] = value
    stored.save(tmp_path / "results", "supervised-cifar100", "short", results)
    with pytest.raises(TrainerError, match=f"cannot be compared, as they differ in the {what}"):
        report(tmp_path)
    for run in results.values():  # all of other images, or all by two processes
        if run["subset_seed"] == 0 or field != "train_fingerprint":
            run[field] = value
    stored.save(tmp_path / "results", "supervised-cifar100", "short", results)
    report(tmp_path)
