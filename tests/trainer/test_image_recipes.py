"""Recipes for images: the published protocol, hashes that name results, files that give the recipe back."""

import dataclasses
import json
import math

import pytest

pytest.importorskip("lightning_fabric", reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")

from ltkernels.trainer import TrainerError  # noqa: E402
from ltkernels.trainer.data.longtail import class_counts  # noqa: E402
from ltkernels.trainer.image_recipes import IMAGE_RECIPES, TIERS, ImageRecipe, load_recipe, save_recipe  # noqa: E402
from ltkernels.trainer.methods import LDAM, METHODS  # noqa: E402
from ltkernels.trainer.tables import TABLES  # noqa: E402

RECIPE = IMAGE_RECIPES["cifar100-lt-ldam-drw"]


def change(recipe, path, value):
    """The recipe with the field ``a.b`` replaced."""
    name, _, inner = path.partition(".")
    if inner:
        value = dataclasses.replace(getattr(recipe, name), **{inner: value})
    return dataclasses.replace(recipe, **{name: value})


def test_every_method_has_a_recipe_for_every_task():
    tasks = ("cifar10-lt", "cifar100-lt", "cifar100-lt-small", "fashion-lt")
    assert {f"{task}-{method}" for task in tasks for method in METHODS} <= IMAGE_RECIPES.keys()
    assert IMAGE_RECIPES["cifar10-lt-vs"].settings.gamma == 0.2
    assert IMAGE_RECIPES["fashion-lt-elm"].settings.weight == 0.3
    assert IMAGE_RECIPES["cifar100-lt-ce-mixup"].mixing.kind == "mixup"


def test_the_published_protocol():
    assert (RECIPE.batch_size, RECIPE.lr, RECIPE.momentum, RECIPE.weight_decay) == (128, 0.1, 0.9, 2e-4)
    assert (RECIPE.model, RECIPE.augmentation.policy, RECIPE.augmentation.padding) == ("resnet32", "crop-flip", 4)
    assert RECIPE.settings == LDAM(max_margin=0.5, scale=30.0, drw_start=0.8, beta=0.9999)
    for name, total in (("cifar10-lt-ce", 12406), ("cifar100-lt-ce", 10847), ("fashion-lt-ce", 14886)):
        tail = IMAGE_RECIPES[name].long_tail
        classes = 100 if "100" in name else 10
        assert sum(class_counts(classes, tail.max_count, tail.imbalance_factor, tail.profile)) == total


def test_tiers_are_two_hundred_epochs_and_a_fifth():
    assert TIERS["full"] == 200 * math.ceil(10847 / 128) == 5 * TIERS["short"]
    assert RECIPE.tier == "full"
    assert dataclasses.replace(RECIPE, steps=3400).tier == "short"
    assert dataclasses.replace(RECIPE, steps=100).tier == "100 steps of 128"
    assert dataclasses.replace(RECIPE, batch_size=64).tier == "17000 steps of 64"
    assert dataclasses.replace(RECIPE, views=2).tier == "full, 2 views"
    assert dataclasses.replace(RECIPE, steps=100, views=2).tier == "100 steps of 128, 2 views"


@pytest.mark.parametrize(("tier", "every"), [("full", 425), ("short", 850)])
def test_the_best_epoch_of_a_full_run_is_one_of_many(tier, every):
    """Of those after the first drop: a column of best epochs says nothing where only the last one is looked at."""
    recipe = next(TABLES["supervised-cifar100"].runs(tier)).recipe
    assert recipe.evaluate_every == every
    dropped = [step for step in range(every, recipe.steps + 1, every) if step > 0.8 * recipe.steps]
    assert len(dropped) == (8 if tier == "full" else 1)


@pytest.mark.parametrize("steps", [17000, 3400])
def test_the_learning_rate_is_that_of_ldam(steps):
    """LDAM's repository sets it for each of 200 epochs, counted from 1 here."""
    recipe = dataclasses.replace(RECIPE, steps=steps)
    per_epoch = steps // 200
    for epoch in range(1, 201):
        expected = 0.1 * (1e-4 if epoch > 180 else 1e-2 if epoch > 160 else 1.0)
        if epoch > 5:
            for step in (per_epoch * (epoch - 1), per_epoch * epoch - 1):
                assert recipe.learning_rate(step) == pytest.approx(expected)
        else:  # it rises in steps there, here at every optimiser step, to the same values at the ends of epochs
            assert recipe.learning_rate(per_epoch * epoch - 1) == pytest.approx(0.1 * epoch / 5)


def test_cosine_schedule():
    recipe = dataclasses.replace(RECIPE, steps=100, schedule="cosine", warmup=0.1, lr=1.0)
    rates = [recipe.learning_rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert rates[55] == pytest.approx(0.5)
    assert all(a > b > 0 for a, b in zip(rates[10:], rates[11:], strict=False))


def test_the_hash_names_what_decides_the_result():
    changes = {
        "settings.max_margin": 0.4,
        "dataset": "cifar10",
        "model": "resnet18",
        "long_tail.subset_seed": 1,
        "long_tail.validation_per_class": 50,
        "augmentation.cutout": 8,
        "mixing.kind": "cutmix",
        "width": 2.0,
        "sampler": "square-root",
        "steps": 3400,
        "batch_size": 64,
        "views": 2,
        "lr": 0.2,
        "momentum": 0.8,
        "nesterov": True,
        "weight_decay": 5e-4,
        "schedule": "cosine",
        "warmup": 0.0,
        "drops": (0.5, 0.9),
        "factors": (0.1, 0.01),
        "ema_decay": 0.9,
        "precision": "bf16-mixed",
        "evaluate_every": 85,
        "seed": 1,
    }
    speed = {"channels_last": False, "compile": True, "cuda_graph": False, "checkpoint_every": 0}
    fields = {f.name for f in dataclasses.fields(ImageRecipe)}
    assert {path.partition(".")[0] for path in changes} | speed.keys() | {"method"} == fields
    hashes = {change(RECIPE, path, value).hash for path, value in changes.items()}
    assert len(hashes | {RECIPE.hash}) == len(changes) + 1
    assert {change(RECIPE, path, value).hash for path, value in speed.items()} == {RECIPE.hash}
    assert IMAGE_RECIPES["cifar100-lt-ce"].hash != IMAGE_RECIPES["cifar100-lt-ce-mixup"].hash


@pytest.mark.parametrize("name", [name for name in IMAGE_RECIPES if not name.startswith("tiny-")])
def test_a_saved_recipe_comes_back(name, tmp_path):
    recipe = change(IMAGE_RECIPES[name], "augmentation.cutout", 8)
    (tmp_path / "recipe.json").write_text(json.dumps(save_recipe(recipe, name)))
    assert load_recipe(tmp_path / "recipe.json") == (name, recipe)
    assert json.loads((tmp_path / "recipe.json").read_text())["hash"] == recipe.hash


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.update(method="magic"), r"method: expected one of .*\bce,.*got 'magic'"),
        (lambda r: r.update(stepz=3), "stepz: no such field"),
        (lambda r: r["settings"].update(tau=1.0), "settings.tau: no such field; known: max_margin"),
        (lambda r: r.update(settings=3), "settings: expected fields, got 3"),
        (lambda r: r.pop("dataset"), "missing .*'dataset'"),
        (lambda r: r.update(steps="many"), "steps: expected a whole number, got 'many'"),
        (lambda r: r.update(lr="fast"), "recipe.*str"),
        (lambda r: r.update(lr=-1.0), "lr: expected a number > 0, got -1"),
    ],
)
def test_a_recipe_that_was_edited_wrongly_is_explained(edit, message, tmp_path):
    content = save_recipe(RECIPE, "mine")
    edit(content["recipe"])
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(content))
    with pytest.raises(TrainerError, match=f"recipe.json: .*{message}"):
        load_recipe(file)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "x"}', "\xff"])
def test_a_file_that_is_no_recipe_is_named(text, tmp_path):
    (tmp_path / "recipe.json").write_bytes(text.encode("latin1"))
    with pytest.raises(TrainerError, match="recipe.json: no recipe of a run"):
        load_recipe(tmp_path / "recipe.json")
    with pytest.raises(TrainerError, match="none.json: No such file"):
        load_recipe(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dataset", "letters"),
        ("model", "vgg"),
        ("sampler", "random"),
        ("schedule", "linear"),
        ("precision", "16-mixed"),
        ("settings", METHODS["ce"].settings),
        ("steps", 0),
        ("steps", 1.5),
        ("batch_size", 0),
        ("views", 0),
        ("evaluate_every", 0),
        ("checkpoint_every", -1),
        ("seed", 2**32),
        ("lr", 0.0),
        ("lr", math.nan),
        ("weight_decay", -1.0),
        ("width", 0.0),
        ("momentum", 1.0),
        ("warmup", -0.1),
        ("ema_decay", 1.0),
        ("drops", (0.9, 0.8)),
        ("drops", (0.5, 1.0)),
        ("factors", (0.1,)),
        ("factors", (0.1, -1.0)),
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(TrainerError, match=f"{field}: "):
        dataclasses.replace(RECIPE, **{field: value})


def test_nesterov_needs_momentum():
    with pytest.raises(TrainerError, match="nesterov: needs momentum"):
        dataclasses.replace(RECIPE, nesterov=True, momentum=0.0)
