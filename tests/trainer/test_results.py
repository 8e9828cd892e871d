"""Stored results of tables: what is taken from a run, merging, and files that are damaged."""

import dataclasses
import json
import shutil
import threading

import numpy as np
import pytest
import torch

pytest.importorskip("lightning_fabric", reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")

from tiny_images import COUNTS, tiny_recipe  # noqa: E402

from ltkernels.trainer import TrainerError, results, tables  # noqa: E402
from ltkernels.trainer.cli import main  # noqa: E402
from ltkernels.trainer.image_recipes import ImageRecipe  # noqa: E402
from ltkernels.trainer.metrics import Outputs  # noqa: E402
from ltkernels.trainer.papers.elm_measures import measure  # noqa: E402
from ltkernels.trainer.results_check import FIELDS, LATER_FIELDS  # noqa: E402
from ltkernels.trainer.tables import Arm, PlannedRun, Table  # noqa: E402

PLANNED = PlannedRun(Arm("CE", "tiny-ce"), tiny_recipe())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", "tiny-ce", "--no-tensorboard", "--accelerator", "cpu", "--out", str(folder)]) == 0
    options = ["--steps", "5", "--passes", "1", "--accelerator", "cpu"]
    assert main(["posthoc", str(folder), "--methods", "crt", "tau-norm", *options]) == 0
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def json_of(file):
    return json.loads(file.read_text())


def six_digits(value):
    return pytest.approx(value, rel=1e-5)


def test_what_is_stored_of_a_run(folder):
    entry = results.entry("supervised-tiny", PLANNED, folder)
    metrics, config = json_of(folder / "metrics.json"), json_of(folder / "config.json")
    assert set(entry) == {*FIELDS, *LATER_FIELDS}
    assert entry["revision"] == config["revision"] and entry["processes"] == config["processes"] == 1
    assert ImageRecipe.from_dict(entry["recipe_fields"]).hash == PLANNED.recipe.hash
    assert (entry["arm"], entry["recipe"], entry["tier"]) == ("CE", "tiny-ce", "12 steps of 16")
    assert (entry["seed"], entry["subset_seed"], entry["counts"]) == (0, 0, list(COUNTS))
    for epoch in ("last", "best"):
        assert entry[epoch].keys() == metrics[epoch].keys()
        assert entry[epoch]["per_class"] == six_digits(metrics[epoch]["per_class"])
        assert entry[epoch]["overall"] == six_digits(metrics[epoch]["overall"])
    assert entry["train_fingerprint"] == config["train_fingerprint"] and entry["device"] == "cpu"
    assert entry["torch"].split("+")[0] == torch.__version__.split("+")[0]  # either may lack the tag of an index
    assert entry["torch"] == config["versions"]["torch"] and entry["elm"] is None
    assert entry["date"] == config["started"][:10] or entry["date"] > config["started"][:10]
    assert set(entry["post_hoc"]) == {"crt", "tau-norm"}
    scores = json_of(folder / "posthoc-crt.json")["scores"]
    assert entry["post_hoc"]["crt"]["overall"] == six_digits(scores["overall"])
    expected = {"passes": 1, "steps": 5, "batch_size": 512, "lr": 0.1, "weight_decay": 5e-4, "seed": 0}
    assert entry["post_hoc_settings"] == {"crt": expected, "tau-norm": {"norm_tau": 1.0}}


def test_calibration_gives_the_calibration_error(folder):
    entry = results.entry("supervised-tiny", PLANNED, folder)
    found = entry["calibration"]
    count, confidence, accuracy = (np.array(found[name]) for name in ("count", "confidence", "accuracy"))
    assert found["bins"] == len(count) == 15 and count.sum() == 60
    error = 100 * (count * np.abs(confidence - accuracy)).sum() / count.sum()
    assert error == pytest.approx(entry["last"]["ece"], abs=1e-3)
    assert (count * accuracy).sum() / count.sum() * 100 == pytest.approx(entry["last"]["overall"], abs=1e-3)


def test_the_first_and_the_last_bin():
    confidence = np.array([0.0, 1 / 15, 1.0, 0.99], np.float32)
    found = results._calibration([confidence, np.array([1, 1, 1, 0]), np.array([1, 0, 1, 1])])
    assert (found["count"][0], found["count"][1], found["count"][-1], sum(found["count"])) == (1, 1, 2, 4)
    assert (found["accuracy"][-1], found["confidence"][-1]) == (0.5, pytest.approx(0.995))
    assert (found["accuracy"][5], found["confidence"][5]) == (0.0, 0.0)


def test_measures_of_elm_for_its_tables(folder):
    entry = results.entry("elm-tiny", PLANNED, folder)
    train, test = np.load(folder / "features.npz"), np.load(folder / "predictions.npz")
    arrays = [train[f"train_{name}"] for name in ("embedding", "logits", "target")]
    others = [train["test_embedding"], test["logits"], test["target"]]
    expected = measure(Outputs(*map(torch.from_numpy, arrays)), Outputs(*map(torch.from_numpy, others)))
    assert entry["elm"]["class_counts"] == list(COUNTS)
    for name in expected.names():
        assert entry["elm"][name] == six_digits(getattr(expected, name).tolist())
    assert entry["elm"]["group_means"]["all"]["spread"] == six_digits(expected.spread.mean().item())
    (folder / "features.npz").unlink()
    assert results.entry("elm-tiny", PLANNED, folder)["elm"] is None


def test_values_that_older_runs_have_in_the_other_file(folder):
    metrics = json_of(folder / "metrics.json")
    moved = ("train_fingerprint", "test_fingerprint", "device", "cpu", "threads")
    expected = results.entry("supervised-tiny", PLANNED, folder)
    (folder / "metrics.json").write_text(json.dumps({k: v for k, v in metrics.items() if k not in moved}))
    assert results.entry("supervised-tiny", PLANNED, folder) == expected


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.json", "{", "metrics.json: damaged"),
        ("metrics.json", "[]", "metrics.json: expected fields, got list"),
        ("metrics.json", '{"recipe_hash": "x"}', "its run is of recipe x, expected"),
        ("config.json", "{}", "not the files of a finished run .KeyError: 'started'"),
        ("predictions.npz", "x", "predictions.npz: cannot be read"),
        ("posthoc-crt.json", "{}", "posthoc-crt.json: no scores"),
        ("posthoc-crt.json", '{"scores": {}}', "posthoc-crt.json: no settings"),
        ("recipe.json", "{}", "recipe.json: no recipe"),
    ],
)
def test_a_run_that_cannot_be_read_is_named(folder, file, content, message):
    (folder / file).write_text(content)
    with pytest.raises(TrainerError, match=message):
        results.entry("supervised-tiny", PLANNED, folder)
    (folder / file).unlink()
    if not file.startswith("posthoc"):
        with pytest.raises(TrainerError, match=f"{file}.*No such file"):
            results.entry("supervised-tiny", PLANNED, folder)


def test_finished_runs_are_collected(trained, tmp_path, monkeypatch):
    table = Table("Tiny", (Arm("CE", "tiny-ce", lambda recipe: dataclasses.replace(recipe, lr=0.1)),), seeds=(0, 1))
    monkeypatch.setitem(tables.TABLES, "tiny", table)
    first, second = table.runs("short")
    folder = shutil.copytree(trained, tmp_path / first.name)
    assert (tmp_path / second.name).mkdir() is None
    metrics = json_of(folder / "metrics.json") | {"recipe_hash": first.recipe.hash}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    found = results.collect("tiny", "short", tmp_path)
    assert (found["table"], found["tier"], list(found["runs"])) == ("tiny", "short", [first.recipe.hash])
    with pytest.raises(TrainerError, match="unknown table 'none'"):
        results.collect("none", "short", tmp_path)


@pytest.fixture
def entry(trained):
    return results.entry("supervised-tiny", PLANNED, trained)


def of(**runs):
    return {"table": "tiny", "tier": "short", "runs": runs}


def test_results_come_back_and_have_a_line_for_each_run(entry, tmp_path):
    file = tmp_path / "deep" / "tiny-short.json"
    content = results.store(file, of(b=entry, a=entry))
    assert results.load(file) == content == of(a=entry, b=entry)
    lines = file.read_text().splitlines()
    assert len(lines) == 4 and lines[1].startswith('"a": {') and lines[2].startswith('"b": {')
    before = file.stat().st_mtime_ns
    results.store(file, of(a=entry))
    assert file.stat().st_mtime_ns == before and [path.name for path in file.parent.iterdir()] == [file.name]


def test_runs_of_other_machines_stay(entry, tmp_path):
    file = tmp_path / "tiny-short.json"
    results.store(file, of(a=entry, b=entry))
    again = entry | {"last": entry["last"] | {"overall": 1.0}, "post_hoc": {}, "device": "another"}
    merged = results.store(file, of(b=again, c=entry))
    assert results.load(file) == merged == of(a=entry, b=again, c=entry)


def test_the_same_run_keeps_what_it_had(entry):
    old = entry | {"elm": {"spread": [1.0]}, "post_hoc": {"crt": {"overall": 1.0}, "lws": {"overall": 2.0}}}
    new = entry | {"elm": None, "post_hoc": {"crt": {"overall": 3.0}}}
    (run,) = results.merge(of(a=old), of(a=new))["runs"].values()
    assert run["elm"] == {"spread": [1.0]}
    assert run["post_hoc"] == {"crt": {"overall": 3.0}, "lws": {"overall": 2.0}}
    assert run["post_hoc_settings"] == entry["post_hoc_settings"]
    (run,) = results.merge(of(a=old), of(a=new | {"post_hoc_settings": {}}))["runs"].values()
    assert run["post_hoc_settings"] == {"tau-norm": {"norm_tau": 1.0}}  # those of other scores say nothing of these


def test_two_at_once_lose_nothing(entry, tmp_path):
    file = tmp_path / "tiny-short.json"
    threads = [threading.Thread(target=results.store, args=(file, of(**{f"r{i}": entry}))) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results.load(file)["runs"]) == 12


def change(*path, value):
    def edit(content):
        *outer, name = path
        fields = content["runs"]["a"]
        for key in outer:
            fields = fields[key]
        fields[name] = value

    return edit


def without(name):
    return lambda content: content["runs"]["a"].pop(name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: content.pop("runs"), "no runs in it"),
        (lambda content: content.update(tier="long"), "no results of a table: table tiny, tier long"),
        (lambda content: content["runs"].update(a=[]), "runs.a: expected fields, got list"),
        (without("last"), "runs.a: no field 'last'"),
        (without("elm"), "runs.a: no field 'elm'"),
        (change("seconds", value="9"), "runs.a.seconds: expected a number, got str"),
        (change("seed", value=True), "runs.a.seed: expected an integer, got bool"),
        (change("counts", value=[5]), "runs.a.last.per_class: expected 1 numbers, got "),
        (change("last", "overall", value="abc"), "runs.a.last.overall: expected a number, got str"),
        (change("best", "overall", value=float("nan")), "runs.a.best.overall: expected a finite number, got nan"),
        (change("last", "ece", value=None), "runs.a.last.ece: expected a number, got NoneType"),
        (change("last", "per_class", value=[1.0]), "runs.a.last.per_class: expected [0-9]+ numbers, got 1"),
        (change("calibration", "count", value=["a"] * 15), "runs.a.calibration.count: expected a number, got str"),
        (change("calibration", "count", value=[1]), "runs.a.calibration.count: expected 15 numbers, got 1"),
        (change("post_hoc", "lws", value={}), "runs.a.post_hoc.lws: no field 'overall'"),
    ],
)
def test_a_damaged_file_is_told_and_left_alone(entry, tmp_path, edit, message):
    file = tmp_path / "tiny-short.json"
    content = json.loads(json.dumps(of(a=entry)))
    edit(content)
    file.write_text(json.dumps(content))
    before = file.read_bytes()
    with pytest.raises(TrainerError, match=f"tiny-short.json: .*{message}"):
        results.store(file, of(b=entry))
    assert file.read_bytes() == before


def test_a_truncated_file_and_one_of_another_table(entry, tmp_path):
    file = tmp_path / "tiny-short.json"
    results.store(file, of(a=entry))
    with pytest.raises(TrainerError, match="table: the stored results are of tiny, the new ones of other"):
        results.store(file, of(b=entry) | {"table": "other"})
    file.write_text(file.read_text()[:-100])
    before = file.read_bytes()
    with pytest.raises(TrainerError, match="tiny-short.json: damaged"):
        results.store(file, of(b=entry))
    with pytest.raises(TrainerError, match="Out of range float"):
        results.store(tmp_path / "new.json", of(a=entry | {"seconds": float("nan")}))
    assert file.read_bytes() == before and not (tmp_path / "new.json").exists()
