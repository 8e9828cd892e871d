"""What can be done to a trained network without training it again: its classifier is changed, its features are not.

- ``crt``: classifier re-training, a new classifier on class-balanced samples (Kang et al., arXiv:1910.09217).
- ``tau-norm``: each weight vector divided by the power tau of its length, without bias (the same paper).
- ``lws``: learnable weight scaling, one factor a class on the trained classifier (the same paper).
- ``logit-adjustment``: the log-prior taken off the logits (Menon et al., arXiv:2007.07314).

A new one is a function here and an entry in ``POST_HOC``.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from lightning_fabric import seed_everything
from rich.console import Console
from torch import Tensor, nn

from ltkernels.margins import post_hoc_logit_adjustment
from ltkernels.nn import MarginCrossEntropyLoss
from ltkernels.trainer import TrainerError
from ltkernels.trainer.checkpoint import read_weights
from ltkernels.trainer.data.images import check_images
from ltkernels.trainer.data.pack import load_split
from ltkernels.trainer.data.sampling import epoch_order
from ltkernels.trainer.fit import Fit, make_network
from ltkernels.trainer.image_recipes import LARGEST_SEED, load_recipe
from ltkernels.trainer.image_session import FINGERPRINTS, METRICS_FILE, open_fabric
from ltkernels.trainer.locks import run_locked
from ltkernels.trainer.metrics import probabilities_of, score
from ltkernels.trainer.runfolder import RunFolder, read_json
from ltkernels.trainer.runlog import scores_line

PostHocName: TypeAlias = Literal["crt", "tau-norm", "lws", "logit-adjustment"]


@dataclass(frozen=True)
class PostHocOptions:
    """Post-hoc methods on the weights of a finished run."""

    methods: tuple[PostHocName, ...] = get_args(PostHocName)
    """Methods to apply, each to the network as it was trained."""
    norm_tau: float = 1.0
    """tau-norm: 0 leaves the weights alone, 1 gives all of them the same length."""
    prior_tau: float = 1.0
    """logit-adjustment: strength of the log-prior."""
    passes: int = 10
    """crt and lws: augmented copies of the training images whose features are kept."""
    steps: int = 1000
    """crt and lws: optimiser steps."""
    batch_size: int = 512
    """crt and lws: features of a step."""
    lr: float = 0.1
    """crt and lws: peak learning rate of SGD with momentum 0.9; it falls as half a cosine."""
    weight_decay: float = 5e-4
    """crt: weight decay; lws has none, where the authors' code has 5e-4 on its factors."""
    seed: int = 0
    """crt and lws: initial classifier, augmentation and samples."""
    data_root: Path | None = None
    """Folder with the images; default: the one that LTKERNELS_DATA names, else data."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device, in the words of lightning-fabric."""

    def __post_init__(self) -> None:
        if not self.methods or len(set(self.methods)) != len(self.methods):
            raise TrainerError(f"methods: expected each method once, got {' '.join(self.methods) or 'none'}")
        for name in ("passes", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise TrainerError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("norm_tau", "prior_tau", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise TrainerError(f"{name}: expected a number >= 0, got {getattr(self, name):g}")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise TrainerError(f"seed: expected 0..{LARGEST_SEED}, got {self.seed}")
        if not 0 < self.lr < math.inf:
            raise TrainerError(f"lr: expected a number > 0, got {self.lr:g}")


@dataclass(frozen=True, eq=False)
class Frozen:
    """A trained network reduced to what post-hoc methods use, all float32 on the host.

    Args:
        classifier: Its last layer.
        new_classifier: Makes an untrained one of the same kind.
        scale: Of the logits in the softmax.
        features: (passes, N, D) of augmented training images.
        labels: (N,) int64.
        counts: Training images of each class.
        test_features, test_target: (M, D) and (M,) of the evaluation images.
    """

    classifier: nn.Module
    new_classifier: Callable[[], nn.Module]
    scale: float
    features: Tensor
    labels: Tensor
    counts: tuple[int, ...]
    test_features: Tensor
    test_target: Tensor


def crt(frozen: Frozen, options: PostHocOptions) -> Tensor:
    """Test logits of a new classifier, trained with cross-entropy on class-balanced samples of the frozen features."""
    seed_everything(options.seed, verbose=False)
    classifier = frozen.new_classifier()
    _train(classifier, frozen, options, options.weight_decay)
    return classifier(frozen.test_features)


def tau_norm(frozen: Frozen, options: PostHocOptions) -> Tensor:
    """Test logits of the weight vectors w / |w|^tau, without bias. Cosines do not change with it."""
    if not isinstance(frozen.classifier, nn.Linear):
        return frozen.classifier(frozen.test_features)
    weight = frozen.classifier.weight
    return frozen.test_features @ (weight / weight.norm(dim=1, keepdim=True) ** options.norm_tau).T


class _Scaled(nn.Module):
    """A frozen classifier with one learned factor a class."""

    def __init__(self, classifier: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.classifier = classifier.requires_grad_(False)
        self.factor = nn.Parameter(torch.ones(num_classes))

    def forward(self, features: Tensor) -> Tensor:
        return self.factor * self.classifier(features)


def lws(frozen: Frozen, options: PostHocOptions) -> Tensor:
    """Test logits of the trained classifier times one factor a class, learned on class-balanced samples."""
    scaled = _Scaled(frozen.classifier, len(frozen.counts))
    _train(scaled, frozen, options, weight_decay=0.0)
    return scaled(frozen.test_features)


def logit_adjustment(frozen: Frozen, options: PostHocOptions) -> Tensor:
    """Test logits minus tau times the log-prior, in the unit the softmax sees."""
    logits = frozen.scale * frozen.classifier(frozen.test_features)
    return post_hoc_logit_adjustment(logits, frozen.counts, options.prior_tau) / frozen.scale


POST_HOC: dict[PostHocName, Callable[[Frozen, PostHocOptions], Tensor]] = {
    "crt": crt,
    "tau-norm": tau_norm,
    "lws": lws,
    "logit-adjustment": logit_adjustment,
}

SETTINGS: dict[PostHocName, tuple[str, ...]] = {
    "crt": ("passes", "steps", "batch_size", "lr", "weight_decay", "seed"),
    "tau-norm": ("norm_tau",),
    "lws": ("passes", "steps", "batch_size", "lr", "seed"),
    "logit-adjustment": ("prior_tau",),
}
"""The options that decide what a method makes of a network."""


def _train(module: nn.Module, frozen: Frozen, options: PostHocOptions, weight_decay: float) -> None:
    criterion = MarginCrossEntropyLoss(scale=frozen.scale)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=options.lr, momentum=0.9, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    generator = torch.Generator().manual_seed(options.seed)
    drawn = options.steps * options.batch_size
    images = epoch_order("class-balanced", frozen.labels, len(frozen.counts), 0, 1, generator, size=drawn)
    copies = torch.randint(len(frozen.features), (drawn,), generator=generator)
    for image, view in zip(images.split(options.batch_size), copies.split(options.batch_size), strict=True):
        loss = criterion(module(frozen.features[view, image]), frozen.labels[image])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if not all(torch.isfinite(parameter).all() for parameter in parameters):
        raise TrainerError("lr: the classifier diverged; lower it")


def freeze(folder: Path, options: PostHocOptions) -> Frozen:
    """The network of a run folder, its classifier and features.

    Raises:
        TrainerError: the folder is not that of a finished run, or the data is missing or other than the run's.
    """
    _, recipe = load_recipe(folder / "recipe.json")
    weights = read_weights(folder)
    data, split = load_split(recipe.dataset, recipe.long_tail, options.data_root)
    with open_fabric(recipe.precision, options.accelerator) as fabric:
        fit = Fit(fabric, recipe, data, split)
        check_images(f"the run in {folder}", _images_of(folder), fit.fingerprints)
        network = fit.evaluated_network
        network.load_state_dict(weights)
        generator = torch.Generator(fabric.device).manual_seed(options.seed)
        train = torch.stack(
            [
                fit.outputs(network.features, fit.images, lambda part: fit.augment(part, generator))
                for _ in range(options.passes)
            ]
        )
        test = fit.outputs(network.features, fit.test_images)
        return Frozen(
            classifier=network.classifier.cpu().eval(),
            new_classifier=lambda: make_network(recipe, fit.images.shape[1], len(split.counts)).classifier,
            scale=float(fit.scale),
            features=train.clone(),  # outside inference mode: the training saves them for its backward pass
            labels=torch.from_numpy(split.train.labels),
            counts=split.counts,
            test_features=test.clone(),
            test_target=fit.test_target.cpu(),
        )


def _images_of(folder: Path) -> dict[str, str]:
    """Fingerprints of what a finished run was trained and evaluated on, as far as its files have them."""
    file = folder / METRICS_FILE
    metrics = read_json(file) if file.is_file() else {}
    return {part: metrics[name] for part, name in FINGERPRINTS.items() if name in metrics}


def run_posthoc(folder: Path, options: PostHocOptions, command: str, console: Console) -> int:
    """Apply the methods to the weights of a run; ``posthoc-METHOD.json`` in its folder holds settings and scores.

    Raises:
        TrainerError: a user's mistake.
    """
    with run_locked(folder) as free:
        if not free:
            raise TrainerError(f"{folder}: another process is at work on this run")
        return _apply(folder, options, command, console)


def _apply(folder: Path, options: PostHocOptions, command: str, console: Console) -> int:
    frozen = freeze(folder, options)
    for name in options.methods:
        # Each starts from the network as it was trained.
        logits = POST_HOC[name](dataclasses.replace(frozen, classifier=copy.deepcopy(frozen.classifier)), options)
        with torch.no_grad():
            scores = score(probabilities_of(logits, frozen.scale), frozen.test_target, frozen.counts)
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        content: dict[str, Any] = {"command": command, "method": name, "settings": settings, "scores": vars(scores)}
        RunFolder(folder).write_json(f"posthoc-{name}.json", content)
        console.print(f"{name}: {scores_line(vars(scores))}", highlight=False, soft_wrap=True)
    return 0
