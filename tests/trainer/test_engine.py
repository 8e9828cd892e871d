"""Training: the same bits for the same seed, paired methods, scores of raw logits, errors that name the step."""

import dataclasses
import math

import pytest
import torch

pytest.importorskip("lightning_fabric", reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")

from lightning_fabric import seed_everything  # noqa: E402

from ltkernels.nn import LDAMLoss, LogitAdjustedLoss, MarginCrossEntropyLoss  # noqa: E402
from ltkernels.trainer import TrainerError, data  # noqa: E402
from ltkernels.trainer.engine import (  # noqa: E402
    DivergedError,
    evaluate,
    fabric_for,
    learning_rate_factor,
    steps_of,
    train,
)
from ltkernels.trainer.metrics import paired_difference  # noqa: E402
from ltkernels.trainer.models import SmallNetwork  # noqa: E402
from ltkernels.trainer.recipes import RECIPES, CrossEntropy, LogitAdjustment, VectorScaling  # noqa: E402

DIGITS = RECIPES["digits"]
SHORT = dataclasses.replace(DIGITS, epochs=3, evaluate_every=1)


@pytest.fixture(scope="module")
def images():
    return data.load("digits")


@pytest.fixture(scope="module")
def fabric():
    with fabric_for(SHORT, "cpu") as fabric:
        yield fabric


def without_time(run):
    return dataclasses.replace(run, seconds=0.0)


@pytest.mark.parametrize("method", DIGITS.methods)
def test_the_same_seed_gives_the_same_run(fabric, images, method):
    split = data.split(SHORT, images, 0)
    first = train(fabric, SHORT, method, split, seed=0)
    torch.rand(5)  # what others draw must not matter
    assert without_time(train(fabric, SHORT, method, split, seed=0)) == without_time(first)
    other = train(fabric, SHORT, method, split, seed=1)
    assert other.evaluations[-1].train_loss != first.evaluations[-1].train_loss


def test_methods_are_paired(fabric, images):
    """Without its adjustment every method is cross-entropy, if it has the same weights and sees the same batches."""
    same = {"lr": 0.3, "weight_decay": 1e-3}
    recipe = dataclasses.replace(
        SHORT,
        ce=CrossEntropy(**same),
        logit_adjustment=LogitAdjustment(**same, tau=0.0),
        vs=VectorScaling(**same, gamma=0.0, tau=0.0),
    )
    split = data.split(recipe, images, 0)
    losses = [
        [evaluation.train_loss for evaluation in train(fabric, recipe, method, split, seed=0).evaluations]
        for method in ("ce", "logit_adjustment", "vs")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_training_is_plain_sgd(fabric, images):
    """The losses of a loop written out in torch: network, batches, optimiser, learning rates."""
    recipe = dataclasses.replace(SHORT, ce=CrossEntropy(lr=0.2, weight_decay=0.02), warmup=0.2)
    split = data.split(recipe, images, 0)
    run = train(fabric, recipe, "ce", split, seed=5)

    torch.manual_seed(5)
    network = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)
    )
    optimizer = torch.optim.SGD(network.parameters(), momentum=0.9, nesterov=True, weight_decay=0.02)
    pixels = torch.from_numpy(split.train.images).float() / 8 - 1
    target = torch.from_numpy(split.train.labels)
    order = torch.Generator().manual_seed(5)
    rates = iter([0.05, 0.1, 0.15, 0.2] + [0.1 * (1 + math.cos(math.pi * k / 17)) for k in range(17)])
    for evaluation in run.evaluations:
        losses = []
        for batch in torch.randperm(len(target), generator=order).split(64):
            for group in optimizer.param_groups:
                group["lr"] = next(rates)
            optimizer.zero_grad()
            losses.append(torch.nn.functional.cross_entropy(network(pixels[batch]), target[batch]))
            losses[-1].backward()
            optimizer.step()
        assert evaluation.train_loss == pytest.approx(sum(losses).item() / len(losses), rel=1e-3)
    assert next(rates, None) is None


def test_every_method_sees_the_same_batches_and_is_told_the_epoch(fabric, images, monkeypatch):
    randperm, orders, epochs = torch.randperm, [], []

    def recording(*arguments, **options):
        orders.append(randperm(*arguments, **options))
        return orders[-1]

    monkeypatch.setattr(torch, "randperm", recording)
    monkeypatch.setattr(MarginCrossEntropyLoss, "set_epoch", lambda self, epoch: epochs.append(epoch))
    split = data.split(SHORT, images, 0)
    for method in SHORT.methods:
        train(fabric, SHORT, method, split, seed=0)
    assert epochs == [0, 1, 2] * 4  # counted from 0, as deferred weights are
    assert len(orders) == 3 * 4
    for i, order in enumerate(orders):
        assert torch.equal(order, orders[i % 3])
        assert sorted(order.tolist()) == list(range(len(split.train)))
    assert not torch.equal(orders[0], orders[1])


def test_hidden_layers_do_not_depend_on_the_classifier():
    networks = []
    for classifier in ("linear", "cosine"):
        seed_everything(3, verbose=False)
        networks.append(SmallNetwork(64, (32, 16), 10, classifier))
    ours, theirs = (network.features.state_dict() for network in networks)
    assert len(ours) == 4
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert networks[1](torch.randn(5, 1, 8, 8)).abs().max() <= 1 + 1e-6


def test_evaluation_epochs(fabric, images):
    recipe = dataclasses.replace(SHORT, epochs=5, evaluate_every=2)
    counted = []
    run = train(fabric, recipe, "ce", data.split(recipe, images, 0), 0, lambda: counted.append(1))
    assert [evaluation.epoch for evaluation in run.evaluations] == [2, 4, 5]
    assert run.last is run.evaluations[-1].scores
    assert run.best_overall == max(evaluation.scores.overall for evaluation in run.evaluations)
    assert len(counted) == 5


class Fixed(torch.nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        return self.logits


def test_scores_are_of_raw_logits():
    logits, target = torch.tensor([[0.2, 0.1], [0.1, 0.2]]), torch.tensor([0, 1])
    # With the prior of these counts added, every prediction would be class 0.
    scores = evaluate(Fixed(logits), LogitAdjustedLoss((1000, 10)), torch.zeros(2), target, (1000, 10))
    assert scores.per_class == (100.0, 100.0)


def test_calibration_is_of_scaled_cosines():
    cosines, target = torch.tensor([[0.9, 0.1], [0.1, 0.9]]), torch.tensor([0, 1])
    scores = evaluate(Fixed(cosines), LDAMLoss((50, 10), scale=30.0), torch.zeros(2), target, (50, 10))
    assert scores.ece < 0.01  # all right, and sure of it; unscaled the largest probability is 0.69


def test_learning_rate():
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert all(a > b > 0 for a, b in zip(factors[10:], factors[11:], strict=False))
    assert [learning_rate_factor(step, 2, 0.0) for step in range(3)] == pytest.approx([1.0, 0.5, 0.0])


def test_steps_count_the_smaller_last_batch():
    assert steps_of(129, dataclasses.replace(SHORT, batch_size=64)) == 3 * 3


def test_a_loss_that_is_not_finite_names_step_and_batch(fabric, images):
    recipe = dataclasses.replace(SHORT, ce=CrossEntropy(lr=1e30, weight_decay=0.0))
    with pytest.raises(DivergedError, match=r"CE, seed 0: the loss is (nan|inf) at step 2 \(epoch 1, batch 2 of 7\)"):
        train(fabric, recipe, "ce", data.split(recipe, images, 0), seed=0)


def test_a_missing_accelerator_is_named():
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(TrainerError, match="accelerator 'cuda'"), fabric_for(SHORT, "cuda"):
        pass


def test_threads_come_back():
    before = torch.get_num_threads()
    with fabric_for(dataclasses.replace(SHORT, threads=before + 1), "cpu"):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_logit_adjustment_lifts_the_tail(fabric, images):
    """The claim of the recipe, smaller: six pairs, a third of the epochs."""
    recipe = dataclasses.replace(DIGITS, epochs=20, evaluate_every=20)
    few = {"ce": [], "logit_adjustment": []}
    for seed in range(20, 26):  # not those of the documented table
        split = data.split(recipe, images, seed)
        for method, values in few.items():
            values.append(train(fabric, recipe, method, split, seed).last.few)
    difference = paired_difference(few["logit_adjustment"], few["ce"])
    assert difference.claim == "supported", difference
    assert difference.above_two_standard_errors
