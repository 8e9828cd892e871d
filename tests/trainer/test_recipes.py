"""Recipes: methods give the losses they name, settings come from the search, bad values are named."""

import ast
import dataclasses
import itertools
import math
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

import ltkernels

pytest.importorskip("lightning_fabric", reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")

from ltkernels.trainer import TrainerError  # noqa: E402
from ltkernels.trainer.recipes import LDAMDRW, RECIPES, CrossEntropy, LogitAdjustment, VectorScaling  # noqa: E402
from ltkernels.trainer.session import METHOD_NAMES, MethodName  # noqa: E402
from ltkernels.trainer.tuning import LARGEST_BUDGET, draw  # noqa: E402

COUNTS = (120, 30, 6)
RECIPE = RECIPES["digits"]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(20, 3, generator=generator) * 2 - 1, torch.randint(3, (20,), generator=generator)


def test_cross_entropy(batch):
    criterion = CrossEntropy(lr=0.1, weight_decay=0.0).criterion(COUNTS, 10)
    torch.testing.assert_close(criterion(*batch), F.cross_entropy(*batch))


def test_logit_adjustment(batch):
    logits, target = batch
    prior = torch.tensor(COUNTS) / sum(COUNTS)
    criterion = LogitAdjustment(lr=0.1, weight_decay=0.0, tau=0.7).criterion(COUNTS, 10)
    torch.testing.assert_close(criterion(*batch), F.cross_entropy(logits + 0.7 * prior.log(), target))


def test_vector_scaling(batch):
    logits, target = batch
    counts = torch.tensor(COUNTS)
    adjusted = logits * (counts / 120) ** 0.2 + 0.7 * (counts / counts.sum()).log()
    criterion = VectorScaling(lr=0.1, weight_decay=0.0, gamma=0.2, tau=0.7).criterion(COUNTS, 10)
    torch.testing.assert_close(criterion(*batch), F.cross_entropy(adjusted, target))


def test_ldam_with_deferred_weights(batch):
    cosines, target = batch
    counts = torch.tensor(COUNTS, dtype=torch.float64)
    margin = 0.4 * (6 / counts) ** 0.25
    logits = 20 * (cosines - F.one_hot(target, 3) * margin).float()
    weight = (1 - 0.99) / (1 - 0.99**counts)
    weight = (3 * weight / weight.sum()).float()
    method = LDAMDRW(lr=0.1, weight_decay=0.0, max_margin=0.4, scale=20.0, drw_start=0.8, beta=0.99)
    criterion = method.criterion(COUNTS, epochs=10)
    for epoch, expected in ((0, None), (7, None), (8, weight), (9, weight)):
        criterion.set_epoch(epoch)
        torch.testing.assert_close(criterion(*batch), F.cross_entropy(logits, target, expected))
    assert method.classifier == "cosine"


def test_the_method_names_of_the_command_line_are_those_of_the_recipe():
    assert METHOD_NAMES == get_args(MethodName) == tuple(RECIPE.methods)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_settings_come_from_the_listed_configurations(name):
    method = RECIPE.methods[name]
    drawn = draw(method, LARGEST_BUDGET, 0)
    assert method in drawn
    assert len(set(drawn)) == LARGEST_BUDGET  # the budget is the same for every method
    space = list(itertools.product(*method.search_space.values()))
    assert {tuple(getattr(m, field) for field in method.search_space) for m in drawn} <= set(space)


def test_the_hash_names_every_field():
    changed = [
        dataclasses.replace(RECIPE, epochs=61),
        dataclasses.replace(RECIPE, profile="step"),
        dataclasses.replace(RECIPE, vs=dataclasses.replace(RECIPE.vs, gamma=0.2)),
    ]
    assert len({recipe.hash for recipe in (RECIPE, *changed)}) == 4
    assert dataclasses.replace(RECIPE).hash == RECIPE.hash


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("max_count", -1),
        ("test_per_class", 0),
        ("imbalance_factor", 0.9),
        ("imbalance_factor", math.nan),
        ("hidden", ()),
        ("hidden", (0,)),
        ("momentum", 1.0),
        ("warmup", -0.1),
        ("evaluate_every", 0),
        ("threads", 0),
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(TrainerError, match=field):
        dataclasses.replace(RECIPE, **{field: value})


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("ce", "lr", 0.0),
        ("ce", "lr", math.inf),
        ("ce", "weight_decay", -1e-4),
        ("logit_adjustment", "tau", -1.0),
        ("ldam_drw", "max_margin", -0.1),
        ("ldam_drw", "scale", 0.0),
        ("ldam_drw", "drw_start", 1.1),
        ("ldam_drw", "beta", 1.0),
        ("vs", "gamma", -0.1),
        ("vs", "tau", math.nan),
    ],
)
def test_bad_settings_are_named(method, field, value):
    with pytest.raises(TrainerError, match=field):
        dataclasses.replace(RECIPE.methods[method], **{field: value})


def test_the_trainer_uses_public_modules_only():
    folder = Path(ltkernels.__file__).parent
    public = {"functional", "nn", "margins", "neighbors", "trainer"}
    imported = set()
    for file in (folder / "trainer").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name.split(".")[1] for name in imported if name.startswith("ltkernels.")}
    assert {"nn", "margins", "trainer"} <= ours <= public
