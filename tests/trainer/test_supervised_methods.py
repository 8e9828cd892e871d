"""Methods of the supervised table: each is the loss of its paper, written out here in plain torch."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("lightning_fabric", reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")

from ltkernels.trainer import TrainerError  # noqa: E402
from ltkernels.trainer.methods import LDAM, METHODS, CosFace, Focal, Objective  # noqa: E402
from ltkernels.trainer.step import Batch  # noqa: E402

COUNTS = (120, 30, 6)
N = torch.tensor(COUNTS, dtype=torch.float64)
PRIOR = (N / N.sum()).log().float()
SHRINK = N / N.max()


def balanced_weight(beta):
    weight = (1 - beta) / (1 - beta**N)
    return (3 * weight / weight.sum()).float()


def one_hot_minus(logits, target, margin):
    return logits - F.one_hot(target, 3) * margin


def focal(logits, target, gamma):
    probability = logits.softmax(1).gather(1, target[:, None])[:, 0]
    return (-((1 - probability) ** gamma) * probability.log()).mean()


def ldam(logits, target, weight=None):
    margin = (0.5 * (6 / N) ** 0.25).float()
    return F.cross_entropy(30 * one_hot_minus(logits, target, margin), target, weight)


PAPERS = {
    "ce": F.cross_entropy,
    "class-balanced": lambda f, y: F.cross_entropy(f, y, balanced_weight(0.9999)),
    "focal": lambda f, y: focal(f, y, 1.0),  # with a softmax, as in LDAM's code
    "balanced-softmax": lambda f, y: F.cross_entropy(f + N.log().float(), y),
    "logit-adjustment": lambda f, y: F.cross_entropy(f + PRIOR, y),
    "cdt": lambda f, y: F.cross_entropy(f * (SHRINK**0.2).float(), y),
    "ldam": ldam,
    "ldam-drw": ldam,  # in epoch 0
    "vs": lambda f, y: F.cross_entropy(f * (SHRINK**0.05).float() + PRIOR, y),
    "cosface": lambda f, y: F.cross_entropy(30 * one_hot_minus(f, y, 0.35), y),
    "ce-mixup": F.cross_entropy,
    "ce-cutmix": F.cross_entropy,
    "logit-adjustment-mixup": lambda f, y: F.cross_entropy(f + PRIOR, y),
    "two-view-ce": F.cross_entropy,
    "two-view-logit-adjustment": lambda f, y: F.cross_entropy(f + PRIOR, y),
    "elm": lambda f, y: F.cross_entropy(f + PRIOR, y),  # of the logits
}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(20, 3, generator=generator) * 2 - 1, torch.randint(3, (20,), generator=generator)


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_that_of_the_paper(name, batch):
    criterion = METHODS[name].settings_for("cifar100-lt").criterion(COUNTS, 200)
    criterion.set_epoch(0)
    logits, target = batch
    results = []
    for loss in (criterion, PAPERS[name]):
        leaf = logits.clone().requires_grad_()
        value = loss(leaf, target)
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_every_method_is_compared_with_its_paper():
    assert PAPERS.keys() == METHODS.keys()


def test_margins_on_cosines_have_a_cosine_classifier():
    cosine = {name for name, method in METHODS.items() if method.settings.classifier == "cosine"}
    assert cosine == {"ldam", "ldam-drw", "cosface"}


def test_settings_of_vector_scaling_follow_the_data_set():
    settings = [METHODS["vs"].settings_for(name) for name in ("cifar10-lt", "cifar100-lt")]
    assert [(s.gamma, s.tau) for s in settings] == [(0.2, 1.2), (0.05, 1.0)]


@pytest.mark.parametrize(("epochs", "start"), [(200.0, 160), (40.0, 32), (17000 / 97, 140)])
def test_deferred_weights_start_at_four_fifths_of_the_training(epochs, start, batch):
    criterion = METHODS["ldam-drw"].settings.criterion(COUNTS, epochs)
    for epoch, weight in ((0, None), (start - 1, None), (start, balanced_weight(0.9999))):
        criterion.set_epoch(epoch)
        torch.testing.assert_close(criterion(*batch), ldam(*batch, weight), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_focal_loss_of_certain_samples(gamma):
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0], [0.3, 0.1]], requires_grad=True)
    loss = Focal(gamma).criterion((9, 1), 1)(logits, torch.tensor([0, 0, 1]))
    loss.backward()
    assert torch.isfinite(logits.grad).all() and (logits.grad[0] == 0).all()
    wrong = torch.tensor(200.0) + focal(logits[2:].detach(), torch.tensor([1]), gamma)
    torch.testing.assert_close(loss.detach(), wrong / 3)


def test_two_losses_are_weighed(batch):
    images, target = batch
    other = target.flip(0)
    objective = Objective(torch.nn.Identity(), METHODS["ce"].settings.criterion(COUNTS, 1))
    first, second = (F.cross_entropy(images, labels) for labels in (target, other))
    torch.testing.assert_close(objective(images, target), first)
    torch.testing.assert_close(objective(images, target, other), torch.stack([first, second]))
    torch.testing.assert_close(Batch(images, target).loss(objective), first)
    torch.testing.assert_close(Batch(images, target, None, torch.tensor([0.5, 9.0])).loss(objective), 0.5 * first)
    mixed = Batch(images, target, other, torch.tensor([0.3, 0.7])).loss(objective)
    torch.testing.assert_close(mixed, 0.3 * first + 0.7 * second)


def test_only_the_mixing_methods_mix():
    mixing = {name: method.mixing.kind for name, method in METHODS.items() if method.mixing.kind != "none"}
    assert mixing == {"ce-mixup": "mixup", "ce-cutmix": "cutmix", "logit-adjustment-mixup": "mixup"}


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("class-balanced", "beta", 1.0),
        ("focal", "gamma", 0.5),
        ("logit-adjustment", "tau", -1.0),
        ("cdt", "gamma", math.nan),
        ("ldam", "max_margin", -0.1),
        ("ldam", "scale", 0.0),
        ("ldam-drw", "drw_start", 1.1),
        ("ldam-drw", "beta", -0.1),
        ("vs", "gamma", -0.1),
        ("vs", "tau", math.inf),
        ("cosface", "margin", -1.0),
        ("cosface", "scale", -1.0),
    ],
)
def test_bad_settings_are_named(method, field, value):
    with pytest.raises(TrainerError, match=f"{field}: expected a number"):
        dataclasses.replace(METHODS[method].settings, **{field: value})


def test_settings_without_deferral_have_no_weights():
    assert LDAM().criterion(COUNTS, 200).weight is None
    assert CosFace().criterion(COUNTS, 200).weight is None
