"""The commands: run folders, exit statuses, messages without tracebacks."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric", reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")

from ltkernels.trainer import TrainerError, data, session, tuning  # noqa: E402
from ltkernels.trainer.cli import main  # noqa: E402
from ltkernels.trainer.recipes import RECIPES, Recipe  # noqa: E402
from ltkernels.trainer.runfolder import RunFolder  # noqa: E402
from ltkernels.trainer.tuning import Trial, best, draw, search_csv, search_markdown  # noqa: E402

FILES = ["config.json", "metrics.csv", "per_class_accuracy.csv", "per_class_accuracy.png", "report.md"]
QUICK = ["--seeds", "2", "--epochs", "2", "--evaluate-every", "1"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LTKERNELS_DATA", raising=False)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_run_folder(tmp_path, capsys):
    arguments = ["train", "digits", *QUICK, "--vs.gamma", "0.2", "--out", "run"]
    assert main(arguments) == 0
    folder = tmp_path / "run"
    assert names(folder) == FILES

    config = json.loads((folder / "config.json").read_text())
    recipe = dataclasses.replace(
        RECIPES["digits"], epochs=2, evaluate_every=1, vs=dataclasses.replace(RECIPES["digits"].vs, gamma=0.2)
    )
    assert config["recipe_hash"] == recipe.hash != RECIPES["digits"].hash
    assert config["recipe"]["vs"]["gamma"] == 0.2
    assert config["seeds"] == [0, 1]
    assert (
        config["command"] == "ltkernels train digits --seeds 2 --epochs 2 --evaluate-every 1 --vs.gamma 0.2 --out run"
    )
    assert config["data"]["counts"] == [120, 86, 61, 44, 31, 22, 16, 11, 8, 6]
    assert len(set(config["data"]["train_fingerprints"].values())) == 2
    assert {"torch", "lightning-fabric", "scikit-learn"} <= config["versions"].keys()

    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [(row["method"], row["seed"], row["epoch"]) for row in rows[:3]] == [
        ("ce", "0", "1"),
        ("ce", "0", "2"),
        ("logit_adjustment", "0", "1"),
    ]
    assert len(rows) == 4 * 2 * 2
    assert len(list(csv.DictReader((folder / "per_class_accuracy.csv").open()))) == 4 * 2 * 10

    text = (folder / "report.md").read_text()
    for part in (
        "Status: complete",
        config["command"],
        "| VS |",
        "- LDAM-DRW: ",
        "per_class_accuracy.png",
        "gamma 0.2",
    ):
        assert part in text
    out = capsys.readouterr().out
    assert "LDAM-DRW" in out and "8/8 runs" in out and f"written: {folder.name}" in out


def test_the_default_folder_has_name_and_time(tmp_path):
    assert main(["train", "digits", "--seeds", "1", "--epochs", "1", "--methods", "ce"]) == 0
    assert main(["train", "digits", "--seeds", "1", "--epochs", "1", "--methods", "ce"]) == 0
    folders = names(tmp_path / "runs")
    assert len(folders) == 2 and all(name.startswith("digits-20") for name in folders)


def test_two_runs_in_one_second_get_two_folders(tmp_path, monkeypatch):
    class Frozen:
        @staticmethod
        def now():
            import datetime

            return datetime.datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr("ltkernels.trainer.runfolder.datetime", Frozen)
    for _ in range(3):
        RunFolder.create(None, "digits")
    assert names(tmp_path / "runs") == [f"digits-20260102-030405{suffix}" for suffix in ("", "-2", "-3")]


def test_a_run_folder_is_never_overwritten(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("mine")
    assert main(["train", "digits", *QUICK, "--out", "run"]) == 2
    assert names(tmp_path / "run") == ["config.json"]
    assert (tmp_path / "run" / "config.json").read_text() == "mine"
    assert capsys.readouterr().err == "error: run exists: a run folder is never overwritten, give another --out\n"


def test_a_file_has_the_old_content_or_the_new(tmp_path, monkeypatch):
    folder = RunFolder.create(tmp_path / "run", "digits")
    folder.write("a.txt", "old")

    def failing(source, target):
        assert Path(source).read_text() == "new" and Path(target).read_text() == "old"
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(TrainerError, match="a.txt: disk full"):
        patch.setattr(os, "replace", failing)
        folder.write("a.txt", "new")
    assert (folder.path / "a.txt").read_text() == "old"
    folder.write("a.txt", "new")
    assert (folder.path / "a.txt").read_text() == "new"
    assert names(folder.path) == ["a.txt"]


def test_every_seed_has_its_own_images_and_methods_share_them(tmp_path, monkeypatch):
    seen = []
    train = session.train

    def watching(fabric, recipe, method, split, seed, on_epoch):
        seen.append((method, str(seed), split.train.fingerprint))
        return train(fabric, recipe, method, split, seed, on_epoch)

    monkeypatch.setattr(session, "train", watching)
    assert main(["train", "digits", *QUICK, "--first-seed", "3", "--methods", "vs", "ce", "--out", "run"]) == 0
    fingerprints = json.loads((tmp_path / "run" / "config.json").read_text())["data"]["train_fingerprints"]
    assert list(fingerprints) == ["3", "4"]
    assert seen == [(method, seed, fingerprints[seed]) for seed in ("3", "4") for method in ("ce", "vs")]


def stop_at(monkeypatch, number, error):
    """Let the run of this number (from 1) raise."""
    calls = []
    train = session.train

    def stopping(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            raise error
        return train(*arguments, **options)

    monkeypatch.setattr(session, "train", stopping)


def test_an_interrupt_leaves_what_is_done(tmp_path, monkeypatch, capsys):
    stop_at(monkeypatch, 6, KeyboardInterrupt())
    assert main(["train", "digits", *QUICK, "--out", "run"]) == 130
    assert names(tmp_path / "run") == FILES
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert len({(row["method"], row["seed"]) for row in rows}) == 5
    text = (tmp_path / "run" / "report.md").read_text()
    assert "Status: interrupted" in text and "1 to 2 seeds" in capsys.readouterr().out


def test_an_interrupt_before_the_first_run_leaves_a_report(tmp_path, monkeypatch):
    stop_at(monkeypatch, 1, KeyboardInterrupt())
    assert main(["train", "digits", *QUICK, "--out", "run"]) == 130
    assert names(tmp_path / "run") == ["config.json", "report.md"]
    assert "No run was finished" in (tmp_path / "run" / "report.md").read_text()


def test_a_diverging_run_names_the_step_and_keeps_what_is_done(tmp_path, capsys):
    assert main(["train", "digits", *QUICK, "--vs.lr", "1e30", "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: VS, seed 0: the loss is ") and "at step 2 (epoch 1, batch 2 of 7)" in error
    assert "Traceback" not in error
    assert names(tmp_path / "run") == FILES
    assert "Status: stopped: VS, seed 0" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["fly"],
            "unknown command 'fly': expected train or tune with a recipe, posthoc, table, report, data, pack or doctor",
        ),
        (["train"], "train: which recipe? known: digits"),
        (["train", "--seeds", "3"], "train: which recipe? known: digits"),
        (["train", "letters"], "unknown recipe 'letters': known are digits"),
        (["train", "cifar10-lt-ldam-dwr"], "unknown recipe 'cifar10-lt-ldam-dwr': did you mean cifar10-lt-ldam-drw or"),
        (["train", "--from", "."], "--from: expected the recipe.json of a run, got a folder: ."),
        (["train", "--resume", __file__], "--resume: expected the folder of a run, got a file: "),
        (["train", "digits", "--data-root", "none"], "data root none: no such folder. Fetch https://"),
        (["train", "digits", "--epochs", "many"], "--epochs"),
        (["train", "digits", "--epochs", "0"], "epochs: expected a number >= 1, got 0"),
        (["train", "digits", "--seeds", "0"], "seeds: expected at least 1, got 0"),
        (["train", "digits", "--first-seed", "-1"], "first_seed: expected 0.."),
        (["train", "digits", "--imbalance-factor", "500"], "imbalance_factor: 500 leaves the last class 0.24 images"),
        (["train", "digits", "--max-count", "130"], "max_count: class 0 has 128 images to train on, 130 are asked for"),
        (["train", "digits", "--test-per-class", "200"], "held-out images: class 8 has 174 images"),
        (["train", "digits", "--methods", "ce", "ce"], "methods: expected each method once"),
        (["train", "digits", "--methods", "magic"], "magic"),
        (["train", "digits", "--profile", "flat"], "flat"),
        (["train", "digits", "--ldam-drw.drw-start", "2"], "drw_start: expected a share of the epochs"),
        (["train", "digits", "--nonsense", "1"], "nonsense"),
        (["tune", "digits", "--trials", "25"], "trials: expected 1..24, got 25"),
        (["tune", "digits", "--search-seed", "-1"], "search_seed: expected 0.."),
    ],
)
def test_mistakes_are_explained_without_a_traceback(arguments, message, tmp_path, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in " ".join((captured.err + captured.out).replace("│", " ").split())
    assert "Traceback" not in captured.err
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("command", "option"),
    [("posthoc", "--norm-tau"), ("table", "--missing"), ("report", "--runs"), ("data", "--profile")],
)
def test_help_of_a_command_without_what_it_is_for(command, option, capsys):
    assert main([command, "--help"]) == 0
    assert option in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train", "--help"]])
def test_usage(arguments, capsys):
    assert main(arguments) == 0
    assert "usage: ltkernels train RECIPE" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "tune"])
def test_help_shows_every_field(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main([command, "digits", "--help"]) == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(Recipe):
        value = getattr(RECIPES["digits"], field.name)
        inner = [f".{f.name}" for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else [""]
        for suffix in inner:
            assert f"--{field.name}{suffix}".replace("_", "-") in shown
    for option in ("--seeds", "--first-seed", "--methods", "--data-root", "--out", "--accelerator"):
        assert option in shown
    assert ("--trials" in shown) == (command == "tune")


def test_a_search_never_sees_test_images(tmp_path, monkeypatch, capsys):
    seen = []
    train = tuning.train

    def watching(fabric, recipe, method, split, seed, on_epoch):
        seen.append((method, recipe.methods[method], seed, split))
        return train(fabric, recipe, method, split, seed, on_epoch)

    monkeypatch.setattr(tuning, "train", watching)
    arguments = ["tune", "digits", "--trials", "2", "--seeds", "2", "--epochs", "1", "--methods", "ce", "vs"]
    assert main([*arguments, "--out", "search"]) == 0
    test = set(data.split(RECIPES["digits"], data.load("digits"), 0).evaluate.hashes)
    for _, _, _, split in seen:
        assert not test & (set(split.train.hashes) | set(split.evaluate.hashes))
    assert [(method, seed) for method, _, seed, _ in seen] == [
        (method, seed) for method in ("ce", "ce", "vs", "vs") for seed in (100, 101)
    ]
    assert len({settings for _, settings, _, _ in seen}) == 4
    assert names(tmp_path / "search") == ["config.json", "search.csv", "search.md"]
    assert len((tmp_path / "search" / "search.csv").read_text().splitlines()) == 1 + 4
    assert "vs: VectorScaling(" in capsys.readouterr().out


def test_a_search_goes_on_after_a_diverging_configuration(tmp_path, monkeypatch):
    drawn = [dataclasses.replace(RECIPES["digits"].ce, lr=lr) for lr in (1e30, 0.1)]
    monkeypatch.setattr(tuning, "draw", lambda method, trials, seed: drawn)
    assert main(["tune", "digits", "--seeds", "1", "--epochs", "1", "--methods", "ce", "--out", "search"]) == 0
    lines = (tmp_path / "search" / "search.md").read_text().splitlines()
    assert "| 1e+30 | 0.0001 | diverged | diverged |" in lines
    assert any(line.startswith("| **0.1** | **0.0001** | **") for line in lines)


def test_the_best_configuration_is_the_first_of_the_best():
    from ltkernels.trainer.metrics import Scores

    def trial(lr, overall):
        method = dataclasses.replace(RECIPES["digits"].ce, lr=lr)
        scores = tuple(Scores(v, None, 1.0, 2.0, 0.0, 0.0, 0.0, ()) for v in overall)
        return Trial("ce", method, scores)

    trials = [trial(0.1, [80, 82]), trial(0.2, [70, 99]), trial(0.3, []), trial(0.4, [84, 85])]
    assert best(trials) is trials[1]
    assert best(trials[2:3]) is None
    assert search_markdown(trials).count("**") == 2 * 4
    assert "ce,lr=0.3 weight_decay=0.0001,," in search_csv(trials)


def test_the_draw_depends_on_its_seed_only():
    method = RECIPES["digits"].vs
    assert draw(method, 24, 0) == draw(dataclasses.replace(method, lr=9.0), 24, 0)
    assert draw(method, 24, 0) != draw(method, 24, 1)
    assert len(draw(RECIPES["digits"].ce, 24, 0)) == 24  # all there are


def test_a_new_folder_in_a_place_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainerError, match="cannot make the run folder"):
        RunFolder.create(tmp_path / "file" / "run", "digits")


def test_a_reader_that_leaves_is_no_crash():
    """As in ``ltkernels train ... --help | head -1``."""
    command = [sys.executable, "-m", "ltkernels.cli", "train", "cifar100-lt-ce", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 141
