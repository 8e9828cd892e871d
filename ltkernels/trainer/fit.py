"""Training one image recipe: the loop, its state, evaluation.

Data sets stay on the device; batches are indexed, augmented and mixed there. The loop counts optimiser steps; epochs
are what samplers and deferred weights go by. The state after any step is complete: a run that is resumed from it takes
the same steps, on a CPU to the last bit.

Distributed runs: every process draws and augments the whole batch and trains on its part, so that any number of
processes takes the same steps up to rounding. The exception is batch normalisation, whose statistics are those of the
part (they are not synchronised).
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric, seed_everything
from torch import Tensor, nn

from ltkernels.trainer import TrainerError
from ltkernels.trainer.checkpoint import CheckpointFolder
from ltkernels.trainer.data import LabelledImages, Split
from ltkernels.trainer.data.augment import BatchAugment
from ltkernels.trainer.data.datasets import ImageDataset
from ltkernels.trainer.data.images import check_images, fingerprints
from ltkernels.trainer.data.mixing import mix
from ltkernels.trainer.data.sampling import epoch_order
from ltkernels.trainer.ema import ExponentialMovingAverage
from ltkernels.trainer.engine import DivergedError
from ltkernels.trainer.image_recipes import ImageRecipe
from ltkernels.trainer.methods import Objective
from ltkernels.trainer.metrics import Outputs, Scores, probabilities_of, score
from ltkernels.trainer.models import build_model
from ltkernels.trainer.step import (
    Batch,
    EagerStep,
    GraphedStep,
    make_optimizer,
    set_learning_rate,
)

# On a CPU larger batches leave the cache.
_EVALUATION_BATCH = {"cpu": 250}
_LARGE_EVALUATION_BATCH = 1000
# Distributed processes agree on a request to stop every so many steps: asking at each would cost one more exchange.
_AGREE_EVERY = 20
_FORMAT = 2
# Streams of random numbers of a run.
_ORDER_STREAM, _AUGMENT_STREAM, _MIX_STREAM = 1, 2, 3


class StoppedError(Exception):
    """The run was asked to stop; its checkpoint is written."""


def device_images(data: LabelledImages, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) uint8 and labels (N,) int64, on the device."""
    images = torch.from_numpy(np.ascontiguousarray(data.images))
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
    return images.contiguous().to(device), torch.from_numpy(data.labels).to(device)


def make_network(recipe: ImageRecipe, channels: int, num_classes: int) -> nn.Module:
    """The network of a recipe, with weights drawn from torch's generator."""
    classifier = recipe.settings.classifier
    return build_model(
        recipe.model, in_channels=channels, num_classes=num_classes, classifier=classifier, width=recipe.width
    )


class Fit:
    """One run of a recipe.

    Args:
        fabric: Device, precision, processes.
        recipe: What is trained.
        data: Where the constants of the normalisation come from.
        split: Training and evaluation images.

    Attributes:
        module: What a step computes, with its gradients: the objective, compiled or distributed where it is.
        fingerprints: Of the training and the test images, without and with their labels.
        step: Steps taken.
        history: One row for each evaluation: step, epoch, lr, train_loss and the fields of
            :class:`~ltkernels.trainer.metrics.Scores`; empty on all processes but the first.

    Raises:
        TrainerError: settings that do not fit each other, the data or the devices.
    """

    def __init__(self, fabric: Fabric, recipe: ImageRecipe, data: ImageDataset, split: Split) -> None:
        self.fabric, self.recipe, self.counts = fabric, recipe, split.counts
        self.images, self.target = device_images(split.train, fabric.device)
        self._evaluation_set = device_images(split.evaluate, fabric.device)
        self._labels = torch.from_numpy(split.train.labels)
        channels, *size = self.images.shape[1:]
        self.augment = BatchAugment(recipe.augmentation, tuple(size), channels, data.mean, data.std).to(fabric.device)
        self.steps_per_epoch = math.ceil(len(self.target) / recipe.batch_size)
        self.fingerprints = fingerprints(split.train, split.evaluate)
        self._check_parts()

        seed_everything(recipe.seed, verbose=False)
        self.network = make_network(recipe, channels, len(split.counts))
        self.objective = self._make_objective()
        self._check_objective()
        self.objective.to(fabric.device)
        if recipe.channels_last:
            self.network.to(memory_format=torch.channels_last)
        # Not dynamic: an epoch has two sizes of batches, and kernels for one size are faster than those for any.
        module = torch.compile(self.objective, dynamic=False) if recipe.compile else self.objective
        optimizer = make_optimizer(recipe, self.objective.parameter_groups())
        self.module, self.optimizer = fabric.setup(module, optimizer)
        errors = (torch._dynamo.exc.TorchDynamoException,) if recipe.compile else ()
        self._eager = EagerStep(fabric, self.module, self.optimizer, errors)
        self.average = ExponentialMovingAverage(self.network, recipe.ema_decay) if recipe.ema_decay else None

        cpu = torch.device("cpu")
        self._generators = {
            "order": _generator(cpu, recipe.seed, _ORDER_STREAM),
            "augment": _generator(fabric.device, recipe.seed, _AUGMENT_STREAM),
            "mix": _generator(cpu, recipe.seed, _MIX_STREAM),  # its numbers are read by the host
        }
        self.step = 0
        self._earlier_seconds, self._began = 0.0, time.perf_counter()
        self.history: list[dict[str, Any]] = []
        self._order = torch.empty(0, dtype=torch.int64)
        # Losses since the last evaluation, read when it is due: reading each would make the device wait for the host.
        self._losses = torch.zeros(min(recipe.evaluate_every, recipe.steps), device=fabric.device)
        self._losses_from = 0
        self._logits: tuple[int, Tensor] | None = None

    def _check_parts(self) -> None:
        last = len(self.target) % self.recipe.batch_size or self.recipe.batch_size
        world = self.fabric.world_size
        if min(last, len(self.target)) < world:
            raise TrainerError(f"devices: the last batch of an epoch has {last} images, too few for {world} processes")

    def _make_objective(self) -> Objective:
        recipe = self.recipe
        try:
            return recipe.settings.objective(self.network, self.counts, recipe.steps / self.steps_per_epoch)
        except (ValueError, RuntimeError) as error:  # values beyond float32, say, that fit these class counts only
            raise TrainerError(f"settings of {recipe.title}: {error}") from error

    def _check_objective(self) -> None:
        if self.recipe.settings.contrasts_the_batch and self.fabric.world_size > 1:
            raise TrainerError(
                f"devices: {self.recipe.title} contrasts the images of a whole batch, of which each of "
                f"{self.fabric.world_size} processes would see a part; train it on one"
            )

    def run(
        self,
        checkpoints: CheckpointFolder,
        on_step: Callable[[int], None] = lambda step: None,
        on_evaluation: Callable[[dict[str, Any]], None] = lambda row: None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        """Take the steps that are left.

        Args:
            checkpoints: Where the state is saved: as often as the recipe says, and at the end.
            on_step: Called with the number of steps taken.
            on_evaluation: Called with each new row of the history.
            stop_requested: Asked after every step.

        Raises:
            DivergedError: a loss is not finite; no checkpoint of the steps since the last finite one is written.
            StoppedError: ``stop_requested`` said so; the checkpoint is written.
        """
        recipe = self.recipe
        self._began = time.perf_counter()
        take_step = self._step_function()
        order = self._order.to(self.fabric.device)
        while self.step < recipe.steps:
            epoch, position = divmod(self.step, self.steps_per_epoch)
            if position == 0:
                order = self._start_epoch(epoch)
            rows = order[position * recipe.batch_size : (position + 1) * recipe.batch_size]
            set_learning_rate(self.optimizer, recipe.learning_rate(self.step))
            self._losses[self.step - self._losses_from] = take_step(self._batch(rows))
            if self.average is not None:
                self.average.update(self.network)
            self.step += 1
            on_step(self.step)
            self._after_step(checkpoints, on_evaluation, stop_requested)

    def _after_step(
        self,
        checkpoints: CheckpointFolder,
        on_evaluation: Callable[[dict[str, Any]], None],
        stop_requested: Callable[[], bool],
    ) -> None:
        recipe, last = self.recipe, self.step == self.recipe.steps
        if self.step % recipe.evaluate_every == 0 or last:
            row = self._evaluate_and_log()
            if row is not None:
                on_evaluation(row)
        elif self.step % self.steps_per_epoch == 0:
            self._finite_losses()
        stop = self._agreed(stop_requested)
        due = recipe.checkpoint_every > 0 and (last or self.step % recipe.checkpoint_every == 0)
        if due or stop:
            self._save(checkpoints)
        if stop and not last:
            raise StoppedError(f"stopped after step {self.step} of {recipe.steps}")

    def _save(self, checkpoints: CheckpointFolder) -> None:
        self._finite_losses()
        if not all(torch.isfinite(parameter).all() for parameter in self.objective.parameters()):
            raise DivergedError(
                f"{self.recipe.title}, seed {self.recipe.seed}: weights are not finite after step {self.step}; lower "
                "the learning rate or check the settings of the method"
            )
        if self.fabric.is_global_zero:
            checkpoints.save(self.step, self.state())

    def _agreed(self, stop_requested: Callable[[], bool]) -> bool:
        """Whether any process was asked to stop: all of them must stop after the same step."""
        if self.fabric.world_size == 1:
            return stop_requested()
        if self.step % _AGREE_EVERY:
            return False
        asked = torch.tensor(float(stop_requested()), device=self.fabric.device)
        return bool(self.fabric.all_reduce(asked, reduce_op="sum") > 0)

    def _step_function(self) -> Callable[[Batch], Tensor]:
        graphed = self.recipe.cuda_graph and self.fabric.device.type == "cuda" and self.fabric.world_size == 1
        batch_size = self.recipe.batch_size * self.recipe.views
        return GraphedStep(self._eager, batch_size) if graphed else self._eager

    def _start_epoch(self, epoch: int) -> Tensor:
        recipe = self.recipe
        self.objective.train()
        self.objective.criterion.set_epoch(epoch)
        epochs, generator = math.ceil(recipe.steps / self.steps_per_epoch), self._generators["order"]
        self._order = epoch_order(recipe.sampler, self._labels, len(self.counts), epoch, epochs, generator)
        return self._order.to(self.fabric.device)

    def _batch(self, rows: Tensor) -> Batch:
        """Augmented images of the rows (N,) and their classes; this process's part of them."""
        recipe = self.recipe
        rows = rows.repeat(recipe.views) if recipe.views > 1 else rows
        target = self.target[rows]
        images = self.augment(self.images[rows], self._generators["augment"])
        batch = Batch(images, target)
        if recipe.mixing.kind != "none":
            images, target, other, share = mix(images, target, self._generators["mix"], recipe.mixing)
            coefficients = torch.full((2,), share, device=images.device)  # filled there: no copy to wait for
            coefficients[1].fill_(1 - share)
            batch = Batch(images, target, other, coefficients)
        if self.fabric.world_size > 1:
            batch = batch.part(self.fabric.global_rank, self.fabric.world_size, self.objective.criterion)
        return Batch(self._arranged(batch.images), *batch.arguments()[1:])

    def _arranged(self, images: Tensor) -> Tensor:
        order = torch.channels_last if self.recipe.channels_last else torch.contiguous_format
        return images.contiguous(memory_format=order)

    def _finite_losses(self) -> Tensor:
        """Losses since the last evaluation, means over the processes.

        Raises:
            DivergedError: one is not finite.
        """
        losses = self._losses[: self.step - self._losses_from]
        if len(losses) == 0:
            return losses
        losses.copy_(self.fabric.all_reduce(losses.clone(), reduce_op="mean"))  # a checkpoint is of all processes
        losses = losses.cpu()
        finite = torch.isfinite(losses)
        if not finite.all():
            index = int((~finite).nonzero()[0])
            epoch, batch = divmod(self._losses_from + index, self.steps_per_epoch)
            raise DivergedError(
                f"{self.recipe.title}, seed {self.recipe.seed}: the loss is {losses[index].item()} at step "
                f"{self._losses_from + index + 1} (epoch {epoch + 1}, batch {batch + 1} of {self.steps_per_epoch}); "
                "lower the learning rate or check the settings of the method"
            )
        return losses

    def _evaluate_and_log(self) -> dict[str, Any] | None:
        losses = self._finite_losses()
        self._losses_from = self.step
        if not self.fabric.is_global_zero:
            return None
        scores = self.evaluate()
        row = {
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "lr": self.recipe.learning_rate(self.step - 1),
            "train_loss": losses.mean().item(),
            **vars(scores),
        }
        self.history.append(row)
        return row

    # Evaluation

    @property
    def evaluated_network(self) -> nn.Module:
        """The network that is scored: the averaged one, where there is one."""
        return self.network if self.average is None else self.average.module

    @property
    def scale(self) -> float | Tensor:
        """What logits are multiplied by to be those of a softmax: cosines are meant to be scaled."""
        return self.objective.criterion.scale

    def evaluate(self) -> Scores:
        """Scores of the raw logits: margins and priors belong to training only."""
        return score(probabilities_of(self.logits().to(self.fabric.device), self.scale), self.test_target, self.counts)

    @property
    def test_target(self) -> Tensor:
        """(N,) classes of the evaluation images."""
        return self._evaluation_set[1]

    @property
    def test_images(self) -> Tensor:
        """(N, C, H, W) uint8 evaluation images."""
        return self._evaluation_set[0]

    def logits(self) -> Tensor:
        """Logits (N, C) of the evaluation images without augmentation, float32 on the host."""
        if self._logits is None or self._logits[0] != self.step:
            self._logits = self.step, self.outputs(self._evaluated_logits, self.test_images)
        return self._logits[1]

    def _evaluated_logits(self, images: Tensor) -> Tensor:
        """By a classifier in float32: of logits rounded to 16 bits one in a hundred ties, and the first class wins."""
        embedding = self.evaluated_network.features(images)
        with torch.autocast(self.fabric.device.type, enabled=False):
            return self.evaluated_network.classifier(embedding.float())

    def outputs(
        self, module: Callable[[Tensor], Tensor], images: Tensor, prepare: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """What ``module``, the evaluated network or its ``features``, gives for uint8 images: float32 on the host.

        Images are normalised, or prepared in another way: ``lambda part: self.augment(part, generator)``.
        """
        network, prepare = self.evaluated_network, prepare or self.augment.normalise
        size = _EVALUATION_BATCH.get(images.device.type, _LARGE_EVALUATION_BATCH)
        training = network.training
        network.eval()
        with torch.inference_mode(), self.fabric.autocast():
            parts = [module(self._arranged(prepare(part))).float().cpu() for part in images.split(size)]
        network.train(training)
        return torch.cat(parts)

    def train_outputs(self) -> Outputs:
        """What the evaluated network gives for the training images without augmentation: float32 on the host."""
        network = self.evaluated_network
        embedding = self.outputs(network.features, self.images)
        classifier = copy.deepcopy(network.classifier).cpu().eval()
        with torch.inference_mode():
            return Outputs(embedding, classifier(embedding), self.target.cpu())

    @property
    def seconds(self) -> float:
        """Of training and evaluation, up to now; of an earlier part of the run, up to the checkpoint it left."""
        return self._earlier_seconds + time.perf_counter() - self._began

    # State

    def state(self) -> dict[str, Any]:
        """Everything that decides the steps to come, in tensors and plain values, and the time of those taken."""
        optimizer = self.optimizer.state_dict()
        for group in optimizer["param_groups"]:
            group["lr"] = float(group["lr"])
        return {
            "format": _FORMAT,
            "recipe": self.recipe.hash,
            "images": self.fingerprints,
            "step": self.step,
            "seconds": self.seconds,
            "objective": self.objective.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": optimizer,
            "order": self._order,
            "losses": self._losses[: self.step - self._losses_from].cpu(),
            "losses_from": self._losses_from,
            "history": self.history,
            "generators": {
                **{name: generator.get_state() for name, generator in self._generators.items()},
                **_global_generators(self.fabric.device),
            },
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state` of the same recipe.

        Raises:
            TrainerError: it is of another recipe or of other images, or of another version of the trainer.
        """
        if state.get("format") != _FORMAT or state.get("recipe") != self.recipe.hash:
            found = f"format {state.get('format')}, recipe {state.get('recipe')}"
            raise TrainerError(f"the checkpoint is of {found}; expected {_FORMAT} and {self.recipe.hash}")
        check_images("the checkpoint", state.get("images", {}), self.fingerprints)
        self.objective.load_state_dict(state["objective"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.objective.train()
        self._earlier_seconds = state["seconds"]
        self.step, self._order, self._losses_from = state["step"], state["order"], state["losses_from"]
        self._losses[: len(state["losses"])] = state["losses"].to(self._losses.device)
        self.history = list(state["history"]) if self.fabric.is_global_zero else []
        for name, generator in self._generators.items():
            try:
                generator.set_state(state["generators"][name])
            except RuntimeError as error:  # a GPU's random numbers are others
                raise TrainerError(
                    f"the checkpoint is of a run on another kind of device, expected {self.fabric.device.type}: {error}"
                ) from error
        _restore_global_generators(state["generators"], self.fabric.device)


def _generator(device: torch.device, seed: int, stream: int) -> torch.Generator:
    # torch's CPU generator reads 32 bits of its seed: a stream's number beside the seed would be lost.
    mixed = np.random.SeedSequence([seed, stream]).generate_state(1)[0]
    return torch.Generator(device).manual_seed(int(mixed))


def _global_generators(device: torch.device) -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore_global_generators(states: dict[str, Any], device: torch.device) -> None:
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
