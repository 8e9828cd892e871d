"""Training image recipes: plain SGD written out, what a batch is made of, logs, runs that diverge or have to stop."""

import copy
import csv
import dataclasses
import json
import math
import os
import signal

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
from ltkernels.trainer.engine import DivergedError  # noqa: E402
from ltkernels.trainer.fit import Fit, StoppedError, device_images  # noqa: E402
from ltkernels.trainer.image_recipes import IMAGE_RECIPES, ImageRecipe  # noqa: E402
from ltkernels.trainer.image_session import open_fabric, stop_signals  # noqa: E402
from ltkernels.trainer.step import Batch, GraphedStep  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = ["--accelerator", "cpu", "--no-tensorboard"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_fit(recipe):
    data = load_tiny()
    with open_fabric(recipe.precision, "cpu") as fabric:
        return Fit(fabric, recipe, data, long_tailed_split(data, recipe.long_tail))


def trained(recipe, folder, **hooks):
    fit = make_fit(recipe)
    fit.run(CheckpointFolder(folder), **hooks)
    return fit


def weights(fit):
    return {name: tensor.clone() for name, tensor in fit.network.state_dict().items()}


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("method", ["ce", "ldam-drw"])
def test_training_is_plain_sgd(method, tmp_path):
    """Twelve steps of a loop written out in torch: normalisation, batches, learning rates, deferred weights."""
    recipe = tiny_recipe(method, warmup=0.25, seed=5)
    fit = make_fit(recipe)
    network, orders = copy.deepcopy(fit.network), []
    start = fit._start_epoch
    fit._start_epoch = lambda epoch: orders.append(start(epoch)) or orders[-1]
    fit.run(CheckpointFolder(tmp_path))

    images = (fit.images.float() / 255 - 0.5) / 0.25
    counts = torch.tensor(COUNTS, dtype=torch.float64)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    rates = [0.1 / 3, 0.2 / 3, 0.1, *[0.1] * 7, 1e-3, 1e-5]  # drops at 0.8 and 0.9 of 12 steps: 10 and 11
    balanced = (1 - 0.9999) / (1 - 0.9999**counts)
    balanced = (4 * balanced / balanced.sum()).float()
    margin = (0.5 * (4 / counts) ** 0.25).float()
    for step, rate in enumerate(rates):
        batch = orders[step // 5].split(16)[step % 5]
        target = fit.target[batch]
        logits = network(images[batch])
        if method == "ce":
            loss = F.cross_entropy(logits, target)
        else:  # from epoch round(0.8 * 12 / 5) = 2 on
            weight = balanced if step // 5 >= 2 else None
            loss = F.cross_entropy(30 * (logits - F.one_hot(target, 4) * margin), target, weight)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_same(weights(fit), network.state_dict(), rtol=1e-4, atol=1e-5)
    assert len(orders) == 3 and all(sorted(order.tolist()) == list(range(70)) for order in orders)
    assert not torch.equal(orders[0], orders[1])


def test_the_same_seed_gives_the_same_bits(tmp_path):
    recipe = tiny_recipe(augmentation=Augmentation(policy="crop-flip", padding=1), mixing=Mixing("mixup"))
    first = trained(recipe, tmp_path)
    torch.rand(3)  # what others draw must not matter
    second = trained(recipe, tmp_path)
    assert_same(weights(first), weights(second))
    assert first.history == second.history
    other = trained(dataclasses.replace(recipe, seed=1), tmp_path)
    assert first.history[-1]["train_loss"] != other.history[-1]["train_loss"]


def test_batches_depend_on_the_seed_only():
    """Methods are paired: the same images, augmented alike, whatever the loss."""
    recipes = [tiny_recipe(name, augmentation=Augmentation(padding=2)) for name in ("ce", "ldam-drw")]
    fits = [make_fit(recipe) for recipe in recipes]
    for fit in fits:
        rows = fit._start_epoch(0)[:16]
        fit.batch = fit._batch(rows)
    assert torch.equal(fits[0].batch.images, fits[1].batch.images)
    assert torch.equal(fits[0].batch.target, fits[1].batch.target)
    assert_same(fits[0].network.hidden.state_dict(), fits[1].network.hidden.state_dict())


def test_views_repeat_every_image_with_its_own_augmentation():
    fit = make_fit(tiny_recipe(views=2, augmentation=Augmentation(padding=3)))
    batch = fit._batch(fit._start_epoch(0)[:16])
    assert batch.images.shape == (32, 1, 8, 8)
    assert torch.equal(batch.target[:16], batch.target[16:])
    assert not torch.equal(batch.images[:16], batch.images[16:])


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_batches_have_both_classes_in_proportion(kind):
    fit = make_fit(tiny_recipe(mixing=Mixing(kind, alpha=1.0)))
    rows = fit._start_epoch(0)[:16]
    plain = fit.augment.normalise(fit.images[rows])
    batch = fit._batch(rows)
    share, rest = batch.coefficients.tolist()
    assert share + rest == pytest.approx(1) and 0 < share < 1
    assert torch.equal(batch.target, fit.target[rows])
    if kind == "mixup":  # every image less its own share is another image, of class `other`
        partner = (batch.images - share * plain) / rest
        nearest = torch.cdist(partner.flatten(1), plain.flatten(1)).argmin(1)
        torch.testing.assert_close(partner, plain[nearest], rtol=1e-3, atol=1e-3)
        assert torch.equal(batch.other, fit.target[rows][nearest])


def test_colour_images_become_channels_first():
    data = load_tiny().train
    colour = np.stack([data.images, 255 - data.images, data.images // 2], axis=-1)
    images, target = device_images(dataclasses.replace(data, images=colour), torch.device("cpu"))
    assert images.shape == (240, 3, 8, 8) and images.dtype == torch.uint8 and images.is_contiguous()
    assert torch.equal(images[:, 2], torch.from_numpy(data.images // 2))
    assert target.tolist() == data.labels.tolist()


def test_scores_are_of_raw_logits_without_augmentation(tmp_path):
    fit = trained(tiny_recipe("logit-adjustment", augmentation=Augmentation(padding=3)), tmp_path)
    test = load_tiny().test
    network = fit.network.eval()
    logits = network((torch.from_numpy(test.images).float() / 255 - 0.5).unsqueeze(1) / 0.25)
    torch.testing.assert_close(fit.logits(), logits.detach(), rtol=1e-4, atol=1e-5)
    correct = (logits.argmax(1).numpy() == test.labels).mean()
    assert fit.history[-1]["overall"] == pytest.approx(100 * correct)


def test_calibration_is_of_scaled_cosines(tmp_path):
    fit = trained(tiny_recipe("ldam-drw", steps=60, evaluate_every=60), tmp_path)
    target = torch.from_numpy(load_tiny().test.labels)
    probability, predicted = (30 * fit.logits()).softmax(1).max(1)
    bins = (probability * 15).ceil().clamp(1, 15)
    gaps = [((predicted == target).float() - probability)[bins == k].sum().abs().item() for k in range(1, 16)]
    assert fit.history[-1]["ece"] == pytest.approx(100 * sum(gaps) / len(target), rel=1e-3)


def test_averaged_weights_are_evaluated(tmp_path):
    fit = make_fit(tiny_recipe(ema_decay=0.5))
    average, expected = None, None
    seen = []
    fit.run(CheckpointFolder(tmp_path), on_step=lambda step: seen.append(weights(fit)))
    for step, current in enumerate(seen, start=1):
        decay = min(0.5, step / (step + 9))
        if average is None:
            average = weights(make_fit(tiny_recipe(ema_decay=0.5)))
        average = {name: decay * average[name] + (1 - decay) * current[name] for name in current}
    assert_same(fit.evaluated_network.state_dict(), average, rtol=1e-4, atol=1e-6)
    images = fit.augment.normalise(fit.test_images)
    expected = fit.evaluated_network(images)
    torch.testing.assert_close(fit.logits(), expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(fit.network(images), expected, rtol=1e-2)


def test_the_rows_of_the_history(tmp_path):
    rows = []
    fit = trained(tiny_recipe(steps=14), tmp_path, on_evaluation=rows.append)
    assert [row["step"] for row in rows] == [6, 12, 14] and rows == fit.history
    assert rows[1]["epoch"] == pytest.approx(12 / 5)
    assert rows[0]["lr"] == 0.1 and rows[-1]["lr"] == pytest.approx(1e-5)
    assert rows[0]["few"] is not None and rows[0]["many"] is None  # 40, 18, 8, 4 images


@pytest.mark.parametrize("evaluate_every", [100, 4])
def test_a_loss_that_is_not_finite_names_step_and_batch(tmp_path, evaluate_every):
    recipe = tiny_recipe(steps=20, warmup=0.0, evaluate_every=evaluate_every, checkpoint_every=1)
    fit = make_fit(recipe)

    def spoil(step):
        if step == 6:
            with torch.no_grad():
                fit.network.hidden.weight.fill_(math.nan)

    with pytest.raises(DivergedError, match="weights are not finite after step 6"):
        fit.run(CheckpointFolder(tmp_path), on_step=spoil)
    assert CheckpointFolder(tmp_path).load()["step"] == 5  # nothing was saved over it

    fit = make_fit(dataclasses.replace(recipe, checkpoint_every=0))
    expected = r"CE, seed 0: the loss is nan at step 7 \(epoch 2, batch 2 of 5\)"
    steps = []
    with pytest.raises(DivergedError, match=expected):
        fit.run(CheckpointFolder(tmp_path), on_step=lambda step: (spoil(step), steps.append(step)))
    assert len(steps) == (8 if evaluate_every == 4 else 10)  # at the evaluation, at the end of the epoch at the latest


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    fit = trained(tiny_recipe(), tmp_path)
    with pytest.raises(TrainerError, match=f"recipe {fit.recipe.hash}; expected 2 and"):
        make_fit(tiny_recipe(seed=3)).restore(fit.state())


def test_a_request_to_stop_saves_and_the_rest_gives_the_same_bits(tmp_path):
    recipe = tiny_recipe(augmentation=Augmentation(padding=2), ema_decay=0.9, evaluate_every=5)
    whole = trained(recipe, tmp_path / "none")
    checkpoints = CheckpointFolder(tmp_path)
    first = make_fit(recipe)
    with pytest.raises(StoppedError, match="after step 7 of 12"):
        first.run(checkpoints, stop_requested=lambda: first.step == 7)
    assert [file.name for file in checkpoints.files()] == ["checkpoint-00000007.pt"]
    second = make_fit(recipe)
    second.restore(checkpoints.load() | {"seconds": 1000.0})
    second.run(checkpoints)
    assert_same(weights(second), weights(whole))
    assert second.history == whole.history
    assert 0 < whole.seconds < 60 and 1000 < second.state()["seconds"] <= second.seconds < 1060  # of all parts


def test_parts_of_a_batch_add_up_to_the_whole():
    """Losses of any number of processes average to that of the batch, with class weights and mixing, unequal parts."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 4, generator=generator)
    target, other = torch.randint(4, (2, 7), generator=generator)
    fit = make_fit(tiny_recipe("class-balanced"))
    objective = fit.objective
    objective.network = torch.nn.Identity()
    for batch in (Batch(logits, target), Batch(logits, target, other, torch.tensor([0.3, 0.7]))):
        whole = batch.loss(objective)
        for world in (2, 3):
            parts = [batch.part(rank, world, objective.criterion) for rank in range(world)]
            assert sorted(len(part.target) for part in parts) == sorted(len(target[r::world]) for r in range(world))
            mean = sum(part.loss(objective) for part in parts) / world
            torch.testing.assert_close(mean, whole)


class FakeGraph:
    """Stands for a CUDA graph: replays a step on the tensors that it was captured with."""

    def __init__(self, step):
        self.step, self.replays = step, 0

    def replay(self):
        self.replays += 1
        self.step._loss.copy_(self.step._eager(self.step._batch))


def test_a_captured_step_reads_its_own_copies(tmp_path, monkeypatch):
    """Bookkeeping around a graph, without a GPU: which batches are replayed, from which memory, at which rate."""
    recipe = tiny_recipe(warmup=0.3, mixing=Mixing("mixup"))
    expected = trained(recipe, tmp_path)
    fit = make_fit(recipe)
    step = GraphedStep(fit._eager, 16)
    rate = fit.optimizer.param_groups[0]["lr"]
    captured = []

    def capture(batch):
        captured.append(batch)
        step._batch = Batch(*(tensor.clone() for tensor in batch.arguments()))
        step._loss, step._graph = torch.zeros(()), FakeGraph(step)

    monkeypatch.setattr(step, "_on_side_stream", step._eager)
    monkeypatch.setattr(step, "_capture", capture)
    fit._step_function = lambda: step
    fit.run(CheckpointFolder(tmp_path))
    assert len(captured) == 1 and step._graph.replays == 12 - 2 - 3  # two of six images, three to warm up
    assert fit.optimizer.param_groups[0]["lr"] is rate and rate.item() == pytest.approx(1e-5)
    assert isinstance(fit.state()["optimizer"]["param_groups"][0]["lr"], float)
    assert_same(weights(fit), weights(expected), rtol=1e-5, atol=1e-6)
    assert fit.history[-1]["train_loss"] == pytest.approx(expected.history[-1]["train_loss"])


def test_graphs_are_for_one_gpu_only():
    fit = make_fit(tiny_recipe(cuda_graph=True))
    assert fit._step_function() is fit._eager


# The command


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_folder(tmp_path, capsys):
    arguments = ["train", "tiny-ldam-drw", "--steps", "12", "--settings.max-margin", "0.3", "--out", "run", *CPU]
    assert main(arguments) == 0
    folder = tmp_path / "run"
    expected = [".lock", "config.json", "features.npz", "log.csv", "metrics.json", "predictions.npz", "recipe.json"]
    assert [name for name in names(folder) if not name.startswith("weights.")] == expected

    recipe = dataclasses.replace(IMAGE_RECIPES["tiny-ldam-drw"], steps=12)
    recipe = dataclasses.replace(recipe, settings=dataclasses.replace(recipe.settings, max_margin=0.3))
    saved = json.loads((folder / "recipe.json").read_text())
    assert ImageRecipe.from_dict(saved["recipe"]) == recipe and saved["hash"] == recipe.hash
    config = json.loads((folder / "config.json").read_text())
    assert config["command"] == "ltkernels " + " ".join(arguments)

    metrics = json.loads((folder / "metrics.json").read_text())
    rows = list(csv.DictReader((folder / "log.csv").open()))
    assert [int(row["step"]) for row in rows] == [6, 12]
    assert metrics["last"]["step"] == 12 and float(rows[-1]["overall"]) == metrics["last"]["overall"]
    assert metrics["best"]["overall"] == max(float(row["overall"]) for row in rows)
    assert metrics["counts"] == list(COUNTS) and metrics["recipe_hash"] == recipe.hash
    assert len(metrics["test_fingerprint"]) == len(metrics["train_fingerprint"]) == 64

    saved = np.load(folder / "predictions.npz")
    assert saved["logits"].shape == (60, 4) and saved["logits"].dtype == np.float16
    assert (saved["target"] == load_tiny().test.labels).all()
    assert 100 * (saved["predicted"] == saved["target"]).mean() == pytest.approx(metrics["last"]["overall"])
    sure = torch.from_numpy(saved["logits"]).float().mul(30).softmax(1).amax(1)
    assert np.abs(sure.numpy() - saved["confidence"]).max() < 0.02

    network = tiny_images.Perceptron(1, 4, "cosine")
    network.load_state_dict(read_weights(folder))
    out = capsys.readouterr().out
    assert "LDAM-DRW: overall" in out and "step 6/12, loss" in out and "written: run" in out


def test_tensorboard_files(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(["train", "tiny-ce", "--out", "run", "--accelerator", "cpu"]) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    logged = {event.step: event.value for event in events.Scalars("overall")}
    assert logged == pytest.approx({int(row["step"]): float(row["overall"]) for row in rows})


def test_the_recipe_of_a_run_repeats_it(tmp_path):
    assert main(["train", "tiny-ce-mixup", "--seed", "3", "--out", "first", *CPU]) == 0
    assert main(["train", "--from", "first/recipe.json", "--out", "second", *CPU]) == 0
    first, second = (read_weights(tmp_path / name) for name in ("first", "second"))
    assert_same(first, second)
    assert (tmp_path / "first" / "recipe.json").read_text() == (tmp_path / "second" / "recipe.json").read_text()
    assert main(["train", "--from", "first/recipe.json", "--seed", "4", "--out", "third", *CPU]) == 0
    assert not torch.equal(read_weights(tmp_path / "third")["hidden.weight"], first["hidden.weight"])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_resume_goes_on(number, status, tmp_path, monkeypatch, capsys):
    assert main(["train", "tiny-ce", "--out", "whole", *CPU]) == 0
    before = signal.getsignal(number)
    original = Fit._batch

    def signalled(self, rows):
        if self.step == 8:
            os.kill(os.getpid(), number)
        return original(self, rows)

    monkeypatch.setattr(Fit, "_batch", signalled)
    assert main(["train", "tiny-ce", "--out", "run", *CPU]) == status
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert signal.getsignal(number) is before
    assert "checkpoint-00000009.pt" in names(tmp_path / "run") and "metrics.json" not in names(tmp_path / "run")
    assert "stopped after step 9 of 12; go on with: ltkernels train --resume run" in capsys.readouterr().out
    assert main(["train", "--resume", "run", *CPU]) == 0
    assert "going on after step 9 of 12" in capsys.readouterr().out
    assert_same(read_weights(tmp_path / "run"), read_weights(tmp_path / "whole"))
    assert (tmp_path / "run" / "log.csv").read_text() == (tmp_path / "whole" / "log.csv").read_text()
    metrics, config = (json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("metrics", "config"))
    assert metrics["resumed_from"] == 9 and metrics["finished"] >= config["started"]


def test_a_second_interrupt_interrupts_at_once():
    with stop_signals() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "tiny-ce", "--tier", "short", "--steps", "5"], "tier: it sets the number of steps"),
        (["train", "tiny-ce", "--tier", "long"], "long"),
        (["train", "tiny-ce", "--method", "vs"], "method"),
        (["train", "tiny-ce", "--devices", "0"], "devices: expected at least 1"),
        (["train", "tiny-ce", "--threads", "-1"], "threads: expected at least 0"),
        (["train", "tiny-ce", "--lr", "0"], "lr: expected a number > 0"),
        (["train", "tiny-ce", "--out", "."], "exists: a run folder is never overwritten"),
        (["train", "--from"], "--from: expected the recipe.json of a run"),
        (["train", "--resume", "nowhere"], "--resume: there is no folder nowhere"),
        (["train", "cifar100-lt-magic"], "unknown recipe 'cifar100-lt-magic': known are digits, cifar10-lt-ce"),
        (["posthoc"], "posthoc: expected the folder of a finished run"),
        (["posthoc", "nowhere"], "nowhere/recipe.json: No such file"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in " ".join((captured.err + captured.out).replace("│", " ").split())
    assert "Traceback" not in captured.err


def test_emulated_bfloat16_is_told(tmp_path, monkeypatch, capsys):
    for native in (True, False):
        capabilities = {"architecture": "x86_64", "avx512_bf16": native, "amx_bf16": False}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        arguments = ["train", "tiny-ce", "--precision", "bf16-mixed", "--out", str(native), *CPU]
        assert main(arguments) == 0
        assert ("emulates bfloat16" in capsys.readouterr().out) != native


def test_tiers_set_the_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(Fit, "run", lambda self, *rest: (_ for _ in ()).throw(StoppedError(f"{self.recipe.steps}")))
    for tier, steps in (("short", 3400), ("full", 17000)):
        main(["train", "tiny-ce", "--tier", tier, "--out", tier, *CPU])
        assert json.loads((tmp_path / tier / "recipe.json").read_text())["recipe"]["steps"] == steps


@pytest.mark.parametrize("name", ["cifar100-lt-ldam-drw", "fashion-lt-vs"])
def test_help_shows_every_field(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["train", name, "--help"]) == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(ImageRecipe):
        value = getattr(IMAGE_RECIPES[name], field.name)
        inner = [f".{f.name}" for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else [""]
        for suffix in inner:
            assert f"--{field.name}{suffix}".replace("_", "-") in shown
    for option in ("--tier", "--out", "--data-root", "--accelerator", "--devices", "--tensorboard"):
        assert option in shown
