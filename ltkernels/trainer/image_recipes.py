"""Recipes for images: data, network, method and optimisation of one run. A new one is an entry in ``IMAGE_RECIPES``.

The command line shows every field: the text below a field is its help.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import tyro

from ltkernels.trainer import TrainerError
from ltkernels.trainer.data.augment import Augmentation
from ltkernels.trainer.data.datasets import DATASETS, LongTail
from ltkernels.trainer.data.mixing import Mixing
from ltkernels.trainer.data.sampling import Sampling
from ltkernels.trainer.methods import METHODS, MethodSettings
from ltkernels.trainer.models import MODELS

Tier: TypeAlias = Literal["full", "short"]
Schedule: TypeAlias = Literal["step", "cosine"]
Precision: TypeAlias = Literal["32-true", "bf16-mixed"]

# Optimiser steps: 200 epochs of CIFAR-100-LT with imbalance factor 100 at batch 128, and a fifth of them.
TIERS: dict[Tier, int] = {"full": 17_000, "short": 3_400}
LARGEST_SEED = 2**32 - 1  # of NumPy

# They change the speed of a run, and its result by rounding only.
_NOT_HASHED = ("channels_last", "compile", "cuda_graph", "checkpoint_every")


@dataclass(frozen=True)
class ImageRecipe:
    """One training run. Everything that decides its result is here; where the images lie and the device are not."""

    method: tyro.conf.Fixed[str]
    """Method; another one is another recipe."""
    settings: MethodSettings
    """Settings of the method."""
    dataset: str
    """Data set."""
    model: str
    """Network."""
    long_tail: LongTail
    augmentation: Augmentation = field(default_factory=Augmentation)
    mixing: Mixing = field(default_factory=Mixing)
    width: float = 1.0
    """Factor on the number of channels of the network."""
    sampler: Sampling = "instance"
    """How the images of an epoch are drawn."""
    steps: int = TIERS["full"]
    """Optimiser steps."""
    batch_size: int = 128
    """Images of a step; the last batch of an epoch may be smaller."""
    views: int = 1
    """Augmented copies of every image in its batch."""
    lr: float = 0.1
    """Peak learning rate of SGD."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    weight_decay: float = 2e-4
    """Weight decay of SGD, on every parameter but the prototypes of ELM."""
    schedule: Schedule = "step"
    """After the warm-up: constant with drops, or half a cosine down to 0."""
    warmup: float = 5 / 200
    """Share of the steps in which the learning rate rises."""
    drops: tuple[float, ...] = (160 / 200, 180 / 200)
    """Shares of the steps at which the learning rate drops, rising."""
    factors: tuple[float, ...] = (1e-2, 1e-4)
    """Share of the peak learning rate after each drop."""
    ema_decay: float = 0.0
    """Decay a step of the averaged weights that are evaluated; 0: the weights themselves."""
    precision: Precision = "32-true"
    """Arithmetic, in the words of lightning-fabric."""
    channels_last: bool = True
    """Memory order of images and filters."""
    compile: bool = False
    """Compile the step with torch.compile: a minute or two before the first one, the rest is faster."""
    cuda_graph: bool = True
    """Replay the step as one captured graph, on a single CUDA device."""
    evaluate_every: int = 850
    """Steps between evaluations; the last step is always evaluated."""
    checkpoint_every: int = 850
    """Steps between checkpoints; 0: only when the run is told to stop."""
    seed: int = 0
    """Initial weights, order of the images, augmentation."""

    def __post_init__(self) -> None:
        for name, known in (("dataset", DATASETS), ("model", MODELS), ("method", METHODS)):
            _one_of(name, getattr(self, name), tuple(known))
        for name, words in (("sampler", Sampling), ("schedule", Schedule), ("precision", Precision)):
            _one_of(name, getattr(self, name), get_args(words))
        if type(self.settings) is not type(METHODS[self.method].settings):
            raise TrainerError(f"settings: {type(self.settings).__name__} are not those of method {self.method!r}")
        for name in ("steps", "batch_size", "views", "evaluate_every"):
            _number(name, getattr(self, name), 1, whole=True)
        _number("checkpoint_every", self.checkpoint_every, 0, whole=True)
        _number("seed", self.seed, 0, LARGEST_SEED, whole=True)
        _number("weight_decay", self.weight_decay, 0)
        for name in ("lr", "width"):
            _number(name, getattr(self, name), 0, exclusive=True)
        for name in ("momentum", "warmup", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainerError(f"{name}: expected a number in [0, 1), got {getattr(self, name):g}")
        if self.mixing.kind != "none" and self.settings.contrasts_the_batch:
            raise TrainerError(f"mixing: the embedding loss of {self.title} needs images of one class each")
        if self.nesterov and self.momentum == 0:
            raise TrainerError("nesterov: needs momentum > 0")
        if len(self.drops) != len(self.factors):
            raise TrainerError(f"factors: expected one for each of {len(self.drops)} drops, got {len(self.factors)}")
        if any(not a < b for a, b in zip((0.0, *self.drops), (*self.drops, 1.0), strict=True)):
            raise TrainerError(f"drops: expected rising shares between 0 and 1, got {self.drops}")
        for factor in self.factors:
            _number("factors", factor, 0)

    @property
    def title(self) -> str:
        """Name of the method in tables."""
        return METHODS[self.method].title

    @property
    def tier(self) -> str:
        """``"full"``, ``"short"``, or what was trained instead, with the number of views where it is not 1."""
        names = [name for name, steps in TIERS.items() if self.steps == steps and self.batch_size == 128]
        views = f", {self.views} views" if self.views > 1 else ""
        return (names[0] if names else f"{self.steps} steps of {self.batch_size}") + views

    @property
    def hash(self) -> str:
        """Twelve hex digits over every field that decides the result, the seeds among them."""
        fields = {name: value for name, value in self.as_dict().items() if name not in _NOT_HASHED}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]

    def learning_rate(self, step: int) -> float:
        """Learning rate of step ``step``, counted from 0."""
        rising = round(self.warmup * self.steps)
        if step < rising:
            return self.lr * (step + 1) / rising
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising)))
        passed = sum(step >= round(drop * self.steps) for drop in self.drops)
        return self.lr * (1.0, *self.factors)[passed]

    def as_dict(self) -> dict[str, Any]:
        """Every field, in values of JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ImageRecipe:
        """The recipe that :meth:`as_dict` wrote.

        Raises:
            TrainerError: a field is unknown, missing, of the wrong type or out of range.
        """
        values = dict(values)
        _one_of("method", values.get("method"), tuple(METHODS))
        nested = {
            "settings": type(METHODS[values["method"]].settings),
            "long_tail": LongTail,
            "augmentation": Augmentation,
            "mixing": Mixing,
        }
        for name, kind in nested.items():
            if name in values:
                values[name] = _build(kind, values[name], f"{name}.")
        for name in ("drops", "factors"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return _build(cls, values, "")


def save_recipe(recipe: ImageRecipe, name: str) -> dict[str, Any]:
    """Content of ``recipe.json``."""
    return {"name": name, "hash": recipe.hash, "recipe": recipe.as_dict()}


def load_recipe(file: Path) -> tuple[str, ImageRecipe]:
    """Name and recipe of a ``recipe.json``.

    Raises:
        TrainerError: the file cannot be read, or its recipe is not valid.
    """
    try:
        content = json.loads(file.read_text())
        name, values = content["name"], content["recipe"]
        return name, ImageRecipe.from_dict(values)
    except OSError as error:
        raise TrainerError(f"{file}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise TrainerError(f"{file}: no recipe of a run ({type(error).__name__}: {error})") from error
    except TrainerError as error:
        raise TrainerError(f"{file}: {error}") from error


def _build(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise TrainerError(f"{where.rstrip('.')}: expected fields, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = [name for name in values if name not in fields]
    if unknown:
        raise TrainerError(f"{where}{unknown[0]}: no such field; known: {', '.join(fields)}")
    try:
        return kind(**values)
    except TypeError as error:  # a field that is missing, or a value that cannot be compared with a number
        raise TrainerError(f"{where or 'recipe '}{error}") from error


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise TrainerError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def _number(
    name: str,
    value: float,
    minimum: float,
    maximum: float = math.inf,
    *,
    exclusive: bool = False,
    whole: bool = False,
) -> None:
    if whole and (not isinstance(value, int) or isinstance(value, bool)):
        raise TrainerError(f"{name}: expected a whole number, got {value!r}")
    if not (math.isfinite(value) and (value > minimum if exclusive else value >= minimum) and value <= maximum):
        limit = "" if maximum == math.inf else f" and <= {maximum:g}"
        raise TrainerError(f"{name}: expected a number {'>' if exclusive else '>='} {minimum:g}{limit}, got {value:g}")


def _recipes() -> dict[str, ImageRecipe]:
    # Data set, network and its width, and images of the largest class: all that its archive has. The tasks with a part
    # of the small network are those of which a table can do without a GPU.
    tasks = {
        "cifar10-lt": ("cifar10", "resnet32", 1.0, 5000),
        "cifar100-lt": ("cifar100", "resnet32", 1.0, 500),
        "cifar100-lt-small": ("cifar100", "small-cnn", 0.25, 500),
        "fashion-lt": ("fashion-mnist", "small-cnn", 0.25, 6000),
    }
    return {
        f"{task}-{name}": ImageRecipe(
            method=name,
            settings=method.settings_for(task),
            dataset=dataset,
            model=model,
            width=width,
            long_tail=LongTail(imbalance_factor=100.0, profile="exp", max_count=max_count, subset_seed=0),
            mixing=method.mixing,
            views=method.views,
        )
        for task, (dataset, model, width, max_count) in tasks.items()
        for name, method in METHODS.items()
    }


IMAGE_RECIPES: dict[str, ImageRecipe] = _recipes()
