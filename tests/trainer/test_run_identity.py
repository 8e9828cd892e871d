"""What belongs to a run: its images, the process that works on it, the code and machines of its parts, its results."""

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lightning_fabric", reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")

import stored_results  # noqa: E402
from tiny_images import load_tiny, tiny_recipe  # noqa: E402

from ltkernels.trainer import TrainerError, image_session, results, table_queue  # noqa: E402
from ltkernels.trainer.cli import main  # noqa: E402
from ltkernels.trainer.data.datasets import DATASETS, long_tailed_split  # noqa: E402
from ltkernels.trainer.fit import Fit  # noqa: E402
from ltkernels.trainer.image_session import open_fabric  # noqa: E402
from ltkernels.trainer.locks import LOCK_FILE, LOCKED_RUN, try_lock  # noqa: E402
from ltkernels.trainer.posthoc import PostHocOptions, freeze  # noqa: E402
from ltkernels.trainer.reproduction.page import hardware_table  # noqa: E402
from ltkernels.trainer.reproduction.runs import StoredRun  # noqa: E402
from ltkernels.trainer.tables import TABLES  # noqa: E402

CPU = ("--no-tensorboard", "--accelerator", "cpu")
RECIPE = tiny_recipe(checkpoint_every=5)


def other_images(part):
    """The tiny data set with one pixel of another value, in the training images or in those of the test."""
    data = load_tiny()
    images = getattr(data, part).images.copy()
    images[:, 0, 0] ^= 1
    return dataclasses.replace(data, **{part: dataclasses.replace(getattr(data, part), images=images)})


def make_fit(fabric, data):
    return Fit(fabric, RECIPE, data, long_tailed_split(data, RECIPE.long_tail))


@pytest.mark.parametrize(("part", "named"), [("train", "training"), ("test", "test")])
def test_a_checkpoint_of_other_images_is_refused(part, named):
    with open_fabric(RECIPE.precision, "cpu") as fabric:
        state = make_fit(fabric, load_tiny()).state()
        make_fit(fabric, load_tiny()).restore(state)
        changed = make_fit(fabric, other_images(part))
        with pytest.raises(TrainerError, match=f"the checkpoint is of other {named} images, sha256 .* the data root"):
            changed.restore(state)
        del state["images"]  # as older versions wrote it
        changed.restore(state)


def other_labels(part):
    """The tiny data set with the classes 0 and 1 exchanged, in the training images or in those of the test."""
    data = load_tiny()
    found = getattr(data, part)
    labels = found.labels.copy()
    labels[found.labels == 0], labels[found.labels == 1] = 1, 0
    return dataclasses.replace(data, **{part: dataclasses.replace(found, labels=labels)})


@pytest.mark.parametrize(("part", "named"), [("train", "training"), ("test", "test")])
def test_a_checkpoint_of_other_labels_is_refused(part, named):
    with open_fabric(RECIPE.precision, "cpu") as fabric:
        data = load_tiny()
        tail = dataclasses.replace(RECIPE.long_tail, imbalance_factor=None)  # so that all images are the same
        whole = dataclasses.replace(RECIPE, long_tail=tail)
        state = Fit(fabric, whole, data, long_tailed_split(data, tail)).state()
        changed = Fit(fabric, whole, other_labels(part), long_tailed_split(other_labels(part), tail))
        with pytest.raises(TrainerError, match=f"the checkpoint is of other {named} labels, sha256 .* the data root"):
            changed.restore(state)


@pytest.fixture
def finished(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tiny-ce", "--out", "run", *CPU]) == 0
    return tmp_path / "run"


def test_post_hoc_methods_refuse_other_images(finished, monkeypatch):
    options = PostHocOptions(passes=1, accelerator="cpu")
    freeze(finished, options)
    monkeypatch.setitem(DATASETS, "tiny", lambda root=None: other_images("test"))
    with pytest.raises(TrainerError, match="the run in .*run is of other test images, sha256"):
        freeze(finished, options)
    monkeypatch.setitem(DATASETS, "tiny", lambda root=None: other_labels("test"))
    with pytest.raises(TrainerError, match="the run in .*run is of other test labels, sha256"):
        freeze(finished, options)
    file = finished / "metrics.json"  # as older versions wrote it
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if "label" not in k}))
    freeze(finished, options)


def test_a_run_that_another_process_works_on_is_left_alone(finished, monkeypatch, capsys):
    commands = ["posthoc", "run", "--methods", "tau-norm", "--accelerator", "cpu"], ["train", "--resume", "run", *CPU]
    (finished / "metrics.json").unlink()  # so that there is something to go on with
    lock = try_lock(finished / LOCK_FILE)
    before = sorted(finished.iterdir())
    for command in commands:
        assert main(command) == 2
        assert "run: another process is at work on this run" in " ".join(capsys.readouterr().err.split())
    assert sorted(finished.iterdir()) == before
    # One that the queue, which holds the lock, has started.
    monkeypatch.setenv(LOCKED_RUN, str(finished.resolve()))
    assert [main(command) for command in commands] == [0, 0]
    monkeypatch.delenv(LOCKED_RUN)
    os.close(lock)
    assert main(commands[0]) == 0


def test_the_parts_of_a_run_are_remembered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    machines = iter(["first", "second", "second"])
    environment = image_session.environment
    monkeypatch.setattr(image_session, "environment", lambda device: environment(device) | {"revision": next(machines)})
    run = Fit.run
    stops = iter([3, 7, 12])

    def stopped(fit, checkpoints, on_step, on_evaluation, stop_requested):
        stop = next(stops)
        run(fit, checkpoints, on_step, on_evaluation, lambda: fit.step == stop)

    monkeypatch.setattr(Fit, "run", stopped)
    assert main(["train", "tiny-ce", "--steps", "12", "--out", "run", "--threads", "1", *CPU]) != 0
    again = ["train", "--resume", "run", *CPU]
    assert main([*again, "--threads", "1"]) != 0 and main([*again, "--threads", "2"]) == 0
    parts = json.loads(Path("run/config.json").read_text())["parts"]
    assert [(x["resumed_from"], x["revision"], x["threads"]) for x in parts] == [
        (0, "first", 1),
        (3, "second", 1),
        (7, "second", 2),
    ]
    assert all({"started", "device", "cpu", "processes", "torch"} < set(x) for x in parts)


def test_the_page_names_the_machines_of_all_parts():
    (planned,) = stored_results.planned("supervised-cifar100", "short", ("ce",), (0,), (0,))
    name, values = stored_results.run(planned, 40.0, 0.0)
    part = {"device": "cpu", "cpu": "Some Processor", "threads": 2, "torch": "2.13.0"}
    runs = []
    for parts in (None, [part], [part | {"threads": 1}, part, part | {"torch": "2.14.0"}]):
        results.check_entry("entry", values | {"parts": parts})
        runs.append(StoredRun(name, values | {"parts": parts}))

    lines = hardware_table(SimpleNamespace(runs=runs)).splitlines()
    assert [line.split("|")[1:4] for line in lines[2:]] == [
        [" Some Processor ", " 1, then 2 ", " 2.13.0, then 2.14.0 "],
        [" Some Processor ", " 2 ", " 2.13.0 "],
    ]
    with pytest.raises(TrainerError, match=r"entry\.parts\[0\]: no field 'device'"):
        results.check_entry("entry", values | {"parts": [{}]})


def test_results_of_another_machine_stay(tmp_path, monkeypatch, capsys):
    """Finished here before as well, with numbers that differ in their rounding."""
    monkeypatch.chdir(tmp_path)
    table = dataclasses.replace(TABLES["supervised-cifar100"], seeds=(0,), subset_seeds=(0,))
    monkeypatch.setitem(TABLES, "tiny", table)
    entries = {}
    for planned in list(table.runs("short"))[:3]:
        entries[planned.recipe.hash] = stored_results.run(planned, 40.0, 0.0)[1]
    file = table_queue.results.results_file("tiny", "short")
    stored_results.save(file.parent, "tiny", "short", entries)
    first, second, third = entries
    elsewhere = json.loads(json.dumps(entries))
    elsewhere[first]["last"]["overall"] += 0.01
    elsewhere[second]["last"]["overall"] += 0.01
    found = {"table": "tiny", "tier": "short", "runs": elsewhere}
    monkeypatch.setattr(table_queue.results, "collect", lambda *arguments: found)
    monkeypatch.setattr(table_queue.Queue, "work", lambda queue, received: queue._on_finished(finished))
    monkeypatch.setattr(table_queue.results, "entry", lambda *arguments: elsewhere[second])
    finished = next(run for run in table.runs("short") if run.recipe.hash == second)
    assert main(["table", "tiny", "--tier", "short"]) == 0
    held = results.load(file)["runs"]
    last = [held[name]["last"]["overall"] for name in entries]
    assert last == [
        entries[first]["last"]["overall"],
        *(elsewhere[name]["last"]["overall"] for name in (second, third)),
    ]
    assert f"that differ from the stored ones, of {first}" in capsys.readouterr().out


def test_scores_do_not_depend_on_how_logits_round():
    """In 16 bits many logits of an image would be equal, and the first class, the largest, would have them all."""
    with open_fabric("bf16-mixed", "cpu") as fabric:
        data = load_tiny()
        recipe = dataclasses.replace(RECIPE, precision="bf16-mixed")
        fit = Fit(fabric, recipe, data, long_tailed_split(data, recipe.long_tail))
        logits = fit.logits()
        embedding = fit.outputs(fit.network.features, fit.test_images)
    assert torch.equal(embedding, embedding.bfloat16().float()), "features are those of the precision"
    assert not torch.equal(logits, logits.bfloat16().float())
    torch.testing.assert_close(logits, fit.network.classifier(embedding))
