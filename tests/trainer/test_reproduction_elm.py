"""The page of ELM: claims decided on made-up results of tables, and the pictures that need run folders."""

import json

import numpy as np
import pytest

pytest.importorskip("lightning_fabric", reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")

import stored_results as stored  # noqa: E402
from stored_results import DIFFERENCES, parts, report, rows  # noqa: E402

from ltkernels.trainer.reproduction import elm, elm_claims, runs  # noqa: E402
from ltkernels.trainer.reproduction.inputs import Inputs  # noqa: E402
from ltkernels.trainer.tables import ELM_SEARCH  # noqa: E402


@pytest.fixture
def quick(monkeypatch):
    stored.without_pictures(monkeypatch)


def elm_results(tmp_path, spread=None, accuracy=None, loss=None, seeds=(0, 1, 2)):
    """Runs of ELM and logit margins only: ratios or differences of each pair."""
    methods = ("two-view-logit-adjustment", "elm")
    results = stored.elm_table(tmp_path / "results", arms=methods, seeds=seeds)
    for run in results.values():
        pair, is_elm = 3 * run["subset_seed"] + run["seed"], run["arm"].startswith("ELM")
        few = [n < 20 for n in run["counts"]]
        base = 1.0 + 0.1 * pair
        value = base * (spread[pair] if spread and is_elm else 1.0)
        run["elm"]["relative_spread"] = [value if rare else 7.0 for rare in few]
        run["elm"]["loss_gap"] = [base + (loss[pair] if loss and is_elm else 0.0)] * len(few)
        run["last"]["overall"] = 40 + pair + (accuracy[pair] if accuracy and is_elm else 0.0)
    stored.save(tmp_path / "results", "elm-cifar100", "short", results)
    return [row["verdict"] for row in rows(report(tmp_path)[1], "claim")]


@pytest.mark.parametrize(
    "change, claim, verdict",
    [
        ({"spread": (0.8, 0.81, 0.79, 0.8, 0.8, 0.8)}, 0, "supported"),
        ({"spread": (0.95, 0.96, 0.94, 0.95, 0.95, 0.95)}, 0, "not worse"),
        ({"spread": (0.5, 1.5, 0.5, 1.5, 0.5, 0.5)}, 0, "inconclusive"),
        ({"spread": (1.2, 1.21, 1.19, 1.2, 1.2, 1.2)}, 0, "refuted"),
        ({"spread": (1.01, 1.02, 1.01, 1.02, 1.01, 1.02)}, 0, "refuted"),
        ({"accuracy": DIFFERENCES["supported"][0]}, 1, "supported"),
        ({"accuracy": DIFFERENCES["not worse"][0]}, 1, "not worse"),
        ({"accuracy": DIFFERENCES["inconclusive"][0]}, 1, "inconclusive"),
        ({"accuracy": DIFFERENCES["worse"][0]}, 1, "refuted"),
        ({"loss": DIFFERENCES["worse"][0]}, 2, "supported"),
        ({"loss": DIFFERENCES["not worse"][0]}, 2, "inconclusive"),
        ({"loss": DIFFERENCES["supported"][0]}, 2, "refuted"),
        ({"loss": (0.01, 0.02, 0.01, 0.02, 0.01, 0.02)}, 2, "refuted"),
        ({"loss": (-0.01, -0.02, -0.01, -0.02, -0.01, -0.02)}, 2, "supported"),
    ],
)
def test_claims_of_elm(tmp_path, quick, change, claim, verdict):
    assert elm_results(tmp_path, **change)[claim] == f"**{verdict}**"


@pytest.mark.parametrize("seeds", [(0, 1, 2), (0, 1)], ids=["decided", "too few"])
def test_differences_stand_beside_the_claims(tmp_path, quick, seeds):
    elm_results(tmp_path, accuracy=(0.25,) * 6, loss=(-0.0123,) * 6, seeds=seeds)
    results = [row["result"] for row in rows(report(tmp_path)[1], "claim")]
    assert results == ["mean ratio 1.000", "mean difference +0.25", "mean difference -0.012"]


def test_claims_of_elm_need_six_pairs(tmp_path, quick):
    verdicts = elm_results(tmp_path, spread=(0.5,) * 6, seeds=(0, 1))
    assert verdicts == ["**not decided** (too few pairs: 4 of 6)"] * 3


def test_a_run_without_its_partner_is_left_out(tmp_path, quick):
    elm_results(tmp_path, spread=(0.5, 0.5, 0.5, 0.5, 0.5, 0.9), accuracy=(1.0,) * 5 + (3.0,))
    file = tmp_path / "results" / "elm-cifar100-short.json"
    content = json.loads(file.read_text())
    last = next(
        k
        for k, run in content["runs"].items()
        if run["arm"].startswith("ELM") and (run["seed"], run["subset_seed"]) == (2, 1)
    )
    del content["runs"][last]
    file.write_text(json.dumps(content))
    decisions = rows(report(tmp_path)[1], "claim")
    assert [row["verdict"] for row in decisions] == ["**not decided** (too few pairs: 5 of 6)"] * 3
    assert [row["result"] for row in decisions][:2] == ["mean ratio 0.500", "mean difference +1.00"]


def test_ratio_is_the_mean_of_the_ratios(tmp_path, quick):
    ratios = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    elm_results(tmp_path, spread=ratios)
    (section,) = Inputs.load(tmp_path / "results", tmp_path).sections("elm-cifar100")
    found = elm_claims.mean_ratio(section.line("elm"), section.line(elm.LOGIT_ONLY))
    assert found == pytest.approx(np.mean(ratios))
    assert "mean ratio 0.750" in report(tmp_path)[1]


def test_measures_of_elm_are_group_means(tmp_path, quick):
    results = stored.elm_table(tmp_path / "results")
    page = report(tmp_path)[1]
    table = {
        (row["method"], row["classes"]): row
        for row in rows(parts(page)[next(t for t in parts(page) if "CIFAR" in t)].split("### Measures")[1])
    }
    of_elm = [run for run in results.values() if run["arm"].startswith("ELM")]
    few = np.array([n < 20 for n in of_elm[0]["counts"]])
    for heading, name in (("relative spread", "relative_spread"), ("norm", "norm"), ("loss gap, nats", "loss_gap")):
        means = np.array([np.array(run["elm"][name])[few].mean() for run in of_elm])
        assert table["ELM (A)", "few"][heading] == f"{means.mean():.3f} ±{means.std(ddof=1):.3f}"
    assert "reconstruction" in page and "No reported numbers exist" in page


def test_without_few_shot_classes_the_smallest_third_stands_for_them(tmp_path, quick):
    results = stored.elm_table(tmp_path / "results", "elm-cifar10")
    for run in results.values():  # worse for the large classes, a quarter better for the four smallest
        pair, is_elm = 3 * run["subset_seed"] + run["seed"], run["arm"].startswith("ELM")
        assert len(run["counts"]) == 10 and sorted(run["counts"], reverse=True) == run["counts"]
        run["elm"]["relative_spread"] = [9.0 if is_elm else 1.0] * 6 + [(1 + 0.1 * pair) * (0.75 if is_elm else 1)] * 4
    stored.save(tmp_path / "results", "elm-cifar10", "short", results)
    page = report(tmp_path)[1]
    elm_runs = [run for run in results.values() if run["arm"].startswith("ELM")]
    smallest = np.mean([run["last"]["per_class"][6:] for run in elm_runs], axis=1)
    accuracies = {row["method"]: row for row in rows(page)}
    assert accuracies["ELM (A)"]["smallest third"] == f"{smallest.mean():.1f} ±{smallest.std(ddof=1):.1f}"
    assert "few" not in accuracies["ELM (A)"]
    decision = rows(page, "claim")[0]
    assert decision["verdict"] == "**supported**" and decision["result"] == "mean ratio 0.750"
    assert decision["primary metric"].startswith("relative spread of the smallest third of the classes")
    measured = page.split("### Measures")[1]
    assert [row["classes"] for row in rows(measured)[:4]] == ["all", "many", "medium", "smallest third"]


def test_a_network_of_another_width_is_named(tmp_path, quick):
    stored.elm_table(tmp_path / "results", "elm-fashion")
    page = report(tmp_path)[1]
    title = "Fashion-MNIST-LT, imbalance factor 100, short tier, 2 views (small-cnn of width 0.25, 32-true)"
    assert title in parts(page) and "epochs; small-cnn of width 0.25, 32-true; SGD" in page


@pytest.mark.parametrize("best", [0.03, 0.3])
def test_chosen_settings(tmp_path, quick, best):
    stored.elm_table(tmp_path / "results", seeds=(0,))
    stored.elm_tuning(tmp_path / "results", best)
    page = report(tmp_path)[1]
    assert f"Chosen: tau 1.5 for logit adj., two views, lambda {best:g} for ELM (A)." in page
    assert f"lambda of ELM (A) is 0.1 here, not the one chosen ({best:g}) on validation images" in page
    assert "tau of logit adj., two views is 1 here, not the one chosen (1.5) on validation images" in page
    assert f"| **ELM (A), lambda {best:g}** |" in page and page.count("| **ELM (A), lambda") == 1
    assert "| **logit adj., two views, tau 1.5** |" in page and page.count("| **logit adj., two views, tau") == 1
    assert "held-out validation images" in page and "not equal" not in page


def test_settings_chosen_with_one_network_are_not_those_of_another(tmp_path, quick):
    stored.elm_table(tmp_path / "results", "elm-cifar100-small", seeds=(0,))
    stored.elm_tuning(tmp_path / "results", 1.0)  # with ResNet-32
    page = report(tmp_path)[1]
    assert page.count("none was chosen on validation images of this data set with this network") == 2
    stored.elm_tuning(tmp_path / "results", 0.1, "elm-tuning-cifar100-small", best_tau=1.0)
    page = report(tmp_path)[1]
    assert "lambda of ELM (A) is 0.1 here, chosen on validation images" in page
    assert "tau of logit adj., two views is 1 here, chosen on validation images" in page


def test_a_search_that_is_not_complete_is_told(tmp_path, quick):
    stored.elm_tuning(tmp_path / "results", 0.3, without=(1.0, 0.03))  # 1 of both, 0.03 of ELM
    page = report(tmp_path)[1]
    assert "Chosen so far: tau 1.5 for logit adj., two views, lambda 0.3 for ELM (A). Not run yet: " in page
    assert "the search was not equal so far, 3 settings of logit adj., two views and 2 settings of ELM (A)." in page


def test_of_equal_values_the_smaller_one_is_chosen(tmp_path, quick):
    stored.elm_tuning(tmp_path / "results", best=None, best_tau=None)
    assert "Chosen: tau 0.5 for logit adj., two views, lambda 0.03 for ELM (A)." in report(tmp_path)[1]


def test_the_search_is_equal_for_both():
    assert len({len(search.values) for search in ELM_SEARCH.values()}) == 1
    assert sum(len(search.values) for search in ELM_SEARCH.values()) <= 8


def test_projection_is_drawn_where_the_runs_are_and_kept_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(elm, "spread_picture", lambda *arguments: b"a picture")
    results = stored.elm_table(tmp_path / "results", seeds=(0,), subset_seeds=(0,))
    name = "elm-cifar100-short-2-views-32-true-projection.png"
    assert name not in report(tmp_path)[1]
    noise = np.random.default_rng(0)
    for found, run in results.items():
        folder = tmp_path / "runs" / f"{run['recipe']}-{found}"
        folder.mkdir(parents=True)
        assert name not in report(tmp_path, runs=tmp_path / "runs")[1]
        target = np.repeat(np.arange(100), 3)
        embedding = (np.eye(100)[target] + 0.1 * noise.normal(size=(300, 100))).astype(np.float16)
        np.savez(folder / "features.npz", test_embedding=embedding)
        np.savez(folder / "predictions.npz", logits=embedding, target=target)
    drawn = report(tmp_path, runs=tmp_path / "runs")[1]
    picture = (tmp_path / "out" / name).read_bytes()
    assert f"]({name})" in drawn and picture.startswith(b"\x89PNG")
    assert report(tmp_path)[1] == drawn and (tmp_path / "out" / name).read_bytes() == picture


def test_measures_are_read_as_text_or_as_values():
    measures = stored.elm([30, 20, 10], 1.0, np.random.default_rng(0))
    for content in (measures.to_json(), json.loads(measures.to_json())):
        found = runs.StoredRun("0", {"elm": content}).measures
        assert found.group_means() == measures.group_means()
