"""The captured training step on a GPU: the same training as step by step, and a run that stops and resumes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

for package in ("lightning_fabric", "torchmetrics", "tyro", "rich", "PIL"):
    pytest.importorskip(package, reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))
from tiny_images import load_tiny, tiny_recipe  # noqa: E402

from ltkernels.trainer.checkpoint import CheckpointFolder  # noqa: E402
from ltkernels.trainer.data.augment import Augmentation  # noqa: E402
from ltkernels.trainer.data.datasets import long_tailed_split  # noqa: E402
from ltkernels.trainer.data.mixing import Mixing  # noqa: E402
from ltkernels.trainer.fit import Fit, StoppedError  # noqa: E402
from ltkernels.trainer.image_recipes import ImageRecipe  # noqa: E402
from ltkernels.trainer.image_session import open_fabric  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
RECIPE = tiny_recipe("ldam-drw", steps=40, warmup=0.2, ema_decay=0.5, augmentation=Augmentation(padding=2))


def make_fit(recipe: ImageRecipe) -> Fit:
    data = load_tiny()
    with open_fabric(recipe.precision, "cuda") as fabric:
        return Fit(fabric, recipe, data, long_tailed_split(data, recipe.long_tail))


def trained(recipe: ImageRecipe, folder: Path) -> Fit:
    fit = make_fit(recipe)
    fit.run(CheckpointFolder(folder))
    return fit


def assert_close(ours: Fit, theirs: Fit) -> None:
    for first, second in ((ours.network, theirs.network), (ours.evaluated_network, theirs.evaluated_network)):
        torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=1e-3, atol=1e-4)
    first, second = ([row["train_loss"] for row in fit.history] for fit in (ours, theirs))
    assert first == pytest.approx(second, rel=1e-3)


@pytest.mark.parametrize(("mixing", "compiled"), [("none", False), ("mixup", False), ("none", True)])
def test_the_captured_step_trains_as_the_eager_one(mixing: str, compiled: bool, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, mixing=Mixing(mixing), compile=compiled)
    captured = trained(recipe, tmp_path)
    assert captured._step_function() is not captured._eager
    assert_close(captured, trained(dataclasses.replace(recipe, cuda_graph=False, compile=False), tmp_path))


@pytest.mark.parametrize("model", ["small-cnn", "resnet32"])
def test_captured_networks_learn_in_bfloat16(model: str, tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        tiny_recipe("vs", steps=60, evaluate_every=20, precision="bf16-mixed"), model=model, warmup=0.1
    )
    losses = [row["train_loss"] for row in trained(recipe, tmp_path).history]
    assert losses[-1] < 0.8 * losses[0]


def test_a_captured_run_resumes(tmp_path: Path) -> None:
    first = make_fit(RECIPE)
    checkpoints = CheckpointFolder(tmp_path)
    with pytest.raises(StoppedError):
        first.run(checkpoints, stop_requested=lambda: first.step == 17)
    second = make_fit(RECIPE)
    second.restore(checkpoints.load())
    second.run(checkpoints)
    assert_close(second, trained(RECIPE, tmp_path / "none"))
