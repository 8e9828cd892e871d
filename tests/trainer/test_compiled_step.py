"""The compiled training step: the same training as step by step, resumed bit for bit, without a graph break."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

pytest.importorskip("lightning_fabric", reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")

from tiny_images import load_tiny, tiny_recipe  # noqa: E402

from ltkernels.trainer.checkpoint import CheckpointFolder  # noqa: E402
from ltkernels.trainer.cli import main  # noqa: E402
from ltkernels.trainer.data.datasets import long_tailed_split  # noqa: E402
from ltkernels.trainer.fit import Fit, StoppedError  # noqa: E402
from ltkernels.trainer.image_session import open_fabric  # noqa: E402

CPU = ["--accelerator", "cpu", "--no-tensorboard"]


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()


def make_fit(recipe):
    data = load_tiny()
    with open_fabric(recipe.precision, "cpu") as fabric:
        return Fit(fabric, recipe, data, long_tailed_split(data, recipe.long_tail))


def trained(recipe, folder):
    fit = make_fit(recipe)
    fit.run(CheckpointFolder(folder))
    return fit


# Class weights change in place in the fourth epoch; an epoch ends with 6 images where a batch has 16.
@pytest.mark.parametrize(
    "changes",
    [
        dict(method="ldam-drw", model="small-cnn", steps=25),
        dict(method="ce-mixup"),
        dict(method="elm"),
    ],
    ids=lambda changes: changes["method"],
)
def test_it_trains_as_the_eager_step(changes, tmp_path):
    eager = tiny_recipe(**changes)
    recipe = dataclasses.replace(eager, compile=True)
    assert recipe.hash == eager.hash
    ours, theirs = trained(recipe, tmp_path / "compiled"), trained(eager, tmp_path / "eager")
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]  # one for each size of a batch
    expected = theirs.objective.state_dict()
    for name, found in ours.objective.state_dict().items():  # rounding decides on a ReLU here and there
        assert (found - expected[name]).double().norm() <= 1e-4 * expected[name].double().norm(), name
    losses, expected = ([row["train_loss"] for row in fit.history] for fit in (ours, theirs))
    assert losses == pytest.approx(expected, rel=1e-4)


def test_it_resumes_bit_for_bit(tmp_path):
    recipe = tiny_recipe("ldam-drw", steps=25, ema_decay=0.5, compile=True)
    first, checkpoints = make_fit(recipe), CheckpointFolder(tmp_path)
    with pytest.raises(StoppedError):
        first.run(checkpoints, stop_requested=lambda: first.step == 13)
    torch._dynamo.reset()  # as a new process would
    second = make_fit(recipe)
    second.restore(checkpoints.load())
    second.run(checkpoints)
    whole = trained(recipe, tmp_path / "whole")
    for part, other in ((second.network, whole.network), (second.evaluated_network, whole.evaluated_network)):
        torch.testing.assert_close(part.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_a_machine_without_a_compiler_is_told(tmp_path, capsys):
    out = tmp_path / "run"
    train = ["train", "tiny-ce", "--steps", "3", "--compile", "--out", str(out), *CPU]
    with inductor.patch({"cpp.cxx": (None, "/nonexistent/c++"), "force_disable_caches": True}):
        assert main(train) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "the step could not be compiled; --no-compile trains without: InvalidCxxCompiler" in said
        # The recipe in the folder still asks for it.
        assert json.loads((out / "recipe.json").read_text())["recipe"]["compile"] is True
        assert main(["train", "--resume", str(out), "--no-compile", *CPU]) == 0
    assert (out / "metrics.json").is_file()


def test_other_errors_of_a_compiled_step_stay_what_they_are(monkeypatch):
    fit = make_fit(tiny_recipe(compile=True))

    def broken(images):
        raise FloatingPointError("of the network")

    monkeypatch.setattr(fit.network, "forward", broken)
    with pytest.raises(FloatingPointError, match="of the network"):
        fit.run(CheckpointFolder(Path()))
