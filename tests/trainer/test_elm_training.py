"""ELM in the trainer: its steps written out, its prototypes in checkpoints, the features that a run leaves behind."""

import copy
import dataclasses
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("lightning_fabric", reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")

import tiny_images  # noqa: E402
from tiny_images import COUNTS, load_tiny, tiny_recipe  # noqa: E402

from ltkernels.trainer import TrainerError  # noqa: E402
from ltkernels.trainer.checkpoint import CheckpointFolder, read_weights  # noqa: E402
from ltkernels.trainer.cli import main  # noqa: E402
from ltkernels.trainer.data.augment import Augmentation  # noqa: E402
from ltkernels.trainer.data.datasets import long_tailed_split  # noqa: E402
from ltkernels.trainer.data.mixing import Mixing  # noqa: E402
from ltkernels.trainer.fit import Fit, StoppedError  # noqa: E402
from ltkernels.trainer.image_recipes import IMAGE_RECIPES  # noqa: E402
from ltkernels.trainer.image_session import open_fabric  # noqa: E402
from ltkernels.trainer.methods import METHODS, EmbeddingObjective  # noqa: E402
from ltkernels.trainer.metrics import Outputs  # noqa: E402
from ltkernels.trainer.papers.elm_measures import measure  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
PADDED = dict(augmentation=Augmentation(padding=1))


def settings(**changes):
    return dataclasses.replace(METHODS["elm"].settings, **changes)


def make_fit(recipe):
    data = load_tiny()
    with open_fabric(recipe.precision, "cpu") as fabric:
        return Fit(fabric, recipe, data, long_tailed_split(data, recipe.long_tail))


def attraction(embedding, target, prototypes):
    """Form D: mean squared distance to the prototype in each class of the batch, the mean over these classes."""
    z, p = F.normalize(embedding, dim=1), F.normalize(prototypes, dim=1)
    distance = (z - p[target]).square().sum(1)
    return torch.stack([distance[target == label].mean() for label in target.unique()]).mean()


def test_training_is_plain_sgd_of_the_two_losses(tmp_path):
    recipe = tiny_recipe("elm", settings=settings(form="D", tau_e=0.0, weight=0.3), weight_decay=0.05)
    fit = make_fit(recipe)
    network, orders = copy.deepcopy(fit.network), []
    prototypes = fit.objective.loss.embedding_loss.prototypes.detach().clone().requires_grad_()
    start = fit._start_epoch
    fit._start_epoch = lambda epoch: orders.append(start(epoch)) or orders[-1]
    fit.run(CheckpointFolder(tmp_path))

    images = (fit.images.float() / 255 - 0.5) / 0.25
    prior = (torch.tensor(COUNTS) / sum(COUNTS)).log()
    groups = [{"params": network.parameters()}, {"params": [prototypes], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.05)
    for step in range(recipe.steps):
        batch = orders[step // 5].split(16)[step % 5].repeat(2)
        target = fit.target[batch]
        embedding = network.features(images[batch])
        loss = F.cross_entropy(network.classifier(embedding) + prior, target)
        loss = loss + 0.3 * attraction(embedding, target, prototypes)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, ours in fit.network.state_dict().items():
        torch.testing.assert_close(ours, network.state_dict()[name], rtol=1e-4, atol=1e-5)
    ours = fit.objective.loss.embedding_loss.prototypes
    torch.testing.assert_close(ours.detach(), prototypes.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["A", "B", "C", "D"])
def test_every_form_trains(form, tmp_path):
    tau_e = 1.0 if form in "AC" else 0.0
    fit = make_fit(tiny_recipe("elm", settings=settings(form=form, tau_e=tau_e), steps=60))
    before = fit.objective.loss.embedding_loss.prototypes.detach().clone()
    fit.run(CheckpointFolder(tmp_path))
    assert fit.history[-1]["overall"] > 40  # of four classes
    assert not torch.equal(fit.objective.loss.embedding_loss.prototypes, before)


def test_weight_0_is_the_logit_only_baseline_to_the_bit(tmp_path):
    """Paired arms: the same initial network, images and augmentation."""
    elm = make_fit(tiny_recipe("elm", settings=settings(weight=0.0), **PADDED))
    baseline = make_fit(tiny_recipe("two-view-logit-adjustment", **PADDED))
    for index, fit in enumerate((elm, baseline)):
        fit.run(CheckpointFolder(tmp_path / str(index)))
    assert all(torch.equal(*pair) for pair in zip(elm.network.parameters(), baseline.network.parameters(), strict=True))
    assert elm.history == baseline.history


def test_a_stopped_run_goes_on_with_its_prototypes(tmp_path):
    recipe = tiny_recipe("elm", **PADDED)
    whole, first, second = (make_fit(recipe) for _ in range(3))
    whole.run(CheckpointFolder(tmp_path / "whole"))
    (tmp_path / "parts").mkdir()
    parts = CheckpointFolder(tmp_path / "parts")
    with pytest.raises(StoppedError):
        first.run(parts, stop_requested=lambda: first.step == 5)
    second.restore(parts.load())
    second.run(parts)
    ours, theirs = second.objective.state_dict(), whole.objective.state_dict()
    assert "loss.embedding_loss.prototypes" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for one, other in zip(second.optimizer.state.values(), whole.optimizer.state.values(), strict=True):
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])


def test_the_features_of_a_run_give_its_measures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(IMAGE_RECIPES, "tiny-elm", tiny_recipe("elm"))
    assert main(["train", "tiny-elm", "--accelerator", "cpu", "--no-tensorboard", "--out", "run"]) == 0
    network = tiny_images.Perceptron(1, 4)
    network.load_state_dict(read_weights(tmp_path / "run"))
    split = long_tailed_split(load_tiny(), tiny_recipe("elm").long_tail)
    saved = dict(np.load("run/features.npz"))

    def outputs(data):
        images = (torch.from_numpy(data.images).reshape(-1, 1, 8, 8).float() / 255 - 0.5) / 0.25
        with torch.no_grad():
            embedding = network.features(images)
            return Outputs(embedding, network.classifier(embedding), torch.from_numpy(data.labels))

    train, test = outputs(split.train), outputs(split.evaluate)
    assert all(array.dtype == np.float16 for name, array in saved.items() if name != "train_target")
    assert saved["train_target"].tolist() == train.target.tolist()
    for name, expected in (
        ("train_embedding", train.embedding),
        ("train_logits", train.logits),
        ("test_embedding", test.embedding),
    ):
        np.testing.assert_allclose(saved[name], expected.numpy(), rtol=2e-3, atol=2e-3)
    logits = torch.from_numpy(np.load("run/predictions.npz")["logits"])
    stored = Outputs(*(torch.from_numpy(saved[f"train_{name}"]) for name in ("embedding", "logits", "target")))
    found = measure(stored, Outputs(torch.from_numpy(saved["test_embedding"]), logits, test.target))
    torch.testing.assert_close(found.relative_spread, measure(train, test).relative_spread, rtol=0.01, atol=0)


def test_what_cannot_be_divided_or_mixed_is_refused():
    with pytest.raises(TrainerError, match="mixing: the embedding loss"):
        tiny_recipe("elm", mixing=Mixing("mixup"))
    fit = make_fit(tiny_recipe("elm"))
    assert isinstance(fit.objective, EmbeddingObjective)
    batch = fit._batch(fit._start_epoch(0)[:16])
    with pytest.raises(ValueError, match="whole batch"):
        fit.objective(batch.images, batch.target, batch.target)
    fit.fabric = types.SimpleNamespace(world_size=2)
    with pytest.raises(TrainerError, match=r"devices: ELM \(A\) contrasts"):
        fit._check_objective()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight", -1.0, "weight: expected a number >= 0"),
        ("temperature", 0.0, "temperature: expected a number > 0"),
        ("form", "B", "tau_e: form B has no prior"),
    ],
)
def test_bad_settings_are_named(name, value, message):
    with pytest.raises(TrainerError, match=message):
        settings(**{name: value})
