"""The tables of docs/reproduction: which runs each of them is made of, the most valuable first.

A new table is an entry in ``TABLES``; a method that is new in ``METHODS`` enters the supervised ones by itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ltkernels.trainer import TrainerError
from ltkernels.trainer.image_recipes import IMAGE_RECIPES, TIERS, ImageRecipe, Tier
from ltkernels.trainer.methods import METHODS

_EVALUATE_EVERY: dict[Tier, int] = {"full": 425, "short": 850}
"""Steps between evaluations. At 425, eight of forty follow the first drop of the learning rate, among which the best
epoch of a full run nearly always is; of a short run only the last one does, whose best epoch says nothing."""


@dataclass(frozen=True)
class Arm:
    """A line of a table: a recipe trained with several seeds.

    Args:
        label: Its name in the table.
        recipe: Name in ``IMAGE_RECIPES``.
        change: What the table changes in the recipe.
        post_hoc: Also apply the post-hoc methods to each run.
    """

    label: str
    recipe: str
    change: Callable[[ImageRecipe], ImageRecipe] = lambda recipe: recipe
    post_hoc: bool = False


@dataclass(frozen=True)
class PlannedRun:
    """One run of a table."""

    arm: Arm
    recipe: ImageRecipe

    @property
    def name(self) -> str:
        """Of its folder: other settings, seeds or numbers of steps have another name."""
        return f"{self.arm.recipe}-{self.recipe.hash}"


# What a choice among the runs of a table goes by.
CHOICES: dict[str, Callable[[PlannedRun], str | int]] = {
    "arms": lambda run: run.arm.recipe,
    "seeds": lambda run: run.recipe.seed,
    "subset_seeds": lambda run: run.recipe.long_tail.subset_seed,
}


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        title: Above it.
        arms: Its lines, the most valuable first.
        seeds: Each arm is trained with each of them.
        subset_seeds: And on each of these subsets.
        topic: What it is about, where it is not a comparison of methods.
    """

    title: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    subset_seeds: tuple[int, ...] = (0,)
    topic: str = ""

    def runs(self, tier: Tier) -> Iterator[PlannedRun]:
        """All runs in the order of their value: every arm once before any arm twice."""
        for subset_seed in self.subset_seeds:
            for seed in self.seeds:
                for arm in self.arms:
                    recipe = arm.change(IMAGE_RECIPES[arm.recipe])
                    long_tail = dataclasses.replace(recipe.long_tail, subset_seed=subset_seed)
                    planned = dataclasses.replace(
                        recipe, seed=seed, long_tail=long_tail, steps=TIERS[tier], evaluate_every=_EVALUATE_EVERY[tier]
                    )
                    yield PlannedRun(arm, planned)


# Two views of every image and the steps of the other arms: methods of the embedding, and what they are compared with.
_TWO_VIEWS = tuple(name for name, method in METHODS.items() if method.views > 1)
_SUPERVISED = ("ce", "ldam-drw", "logit-adjustment", "vs", "balanced-softmax")


class Search(NamedTuple):
    """Values of one setting of a method that are tried on the validation images."""

    field: str
    symbol: str
    values: tuple[float, ...]


ELM_SEARCH = {
    "two-view-logit-adjustment": Search("tau", "tau", (0.5, 1.0, 1.5, 2.0)),
    "elm": Search("weight", "lambda", (0.03, 0.1, 0.3, 1.0)),
}
"""As many settings of the baseline as of ELM: what is searched more looks better."""

# Images of the largest class and validation images of each class while settings are chosen.
_TUNING = {"cifar10": (4500, 500), "cifar100": (450, 50), "fashion-mnist": (5400, 600)}


def _supervised(title: str, task: str) -> Table:
    rest = tuple(name for name in METHODS if name not in (*_SUPERVISED, *_TWO_VIEWS))
    return Table(
        title,
        tuple(Arm(METHODS[name].title, f"{task}-{name}", post_hoc=name == "ce") for name in (*_SUPERVISED, *rest)),
        subset_seeds=(0, 1),  # three seeds on each are the six pairs that a claim takes
    )


def _subsets(title: str, task: str) -> Table:
    """What the choice of the images alone changes: published numbers are of other subsets."""
    topic = "one method on three subsets"
    arms = (Arm(METHODS["ce"].title, f"{task}-ce"),)
    return Table(f"{title}, {topic}", arms, seeds=(0,), subset_seeds=(0, 1, 2), topic=topic)


def _elm(title: str, task: str) -> Table:
    arms = tuple(Arm(METHODS[name].title, f"{task}-{name}") for name in _TWO_VIEWS)
    return Table(title, arms, subset_seeds=(0, 1))


def _elm_tuning(title: str, task: str) -> Table:
    arms = [
        Arm(
            f"{METHODS[name].title}, {search.symbol} {value:g}",
            f"{task}-{name}",
            functools.partial(_set, search.field, value),
        )
        for name, search in ELM_SEARCH.items()
        for value in search.values
    ]
    return Table(title, tuple(arms), seeds=(0,))


def _set(field: str, value: float, recipe: ImageRecipe) -> ImageRecipe:
    return _on_validation(dataclasses.replace(recipe, settings=dataclasses.replace(recipe.settings, **{field: value})))


def _on_validation(recipe: ImageRecipe) -> ImageRecipe:
    max_count, held_out = _TUNING[recipe.dataset]
    long_tail = dataclasses.replace(recipe.long_tail, max_count=max_count, validation_per_class=held_out)
    return dataclasses.replace(recipe, long_tail=long_tail)


_TASKS = {
    "cifar100": ("cifar100-lt", "CIFAR-100-LT, imbalance factor 100"),
    "cifar10": ("cifar10-lt", "CIFAR-10-LT, imbalance factor 100"),
    "fashion": ("fashion-lt", "Fashion-MNIST-LT, imbalance factor 100"),
}

# Of these there are tables of the embedding only.
_EMBEDDING_TASKS = {
    "cifar100-small": ("cifar100-lt-small", "CIFAR-100-LT, imbalance factor 100, small network"),
}


def _tables() -> Iterator[tuple[str, Table]]:
    for short, (task, title) in (_TASKS | _EMBEDDING_TASKS).items():
        if short in _TASKS:
            yield f"supervised-{short}", _supervised(title, task)
            yield f"supervised-{short}-subsets", _subsets(title, task)
        yield f"elm-{short}", _elm(f"ELM on {title}", task)
        yield f"elm-tuning-{short}", _elm_tuning(f"ELM on {title}: settings tried on validation images", task)


TABLES: dict[str, Table] = dict(_tables())


def table_named(name: str) -> Table:
    """The table of this name.

    Raises:
        TrainerError: there is none.
    """
    if name not in TABLES:
        raise TrainerError(f"unknown table {name!r}: known are {', '.join(TABLES)}")
    return TABLES[name]
