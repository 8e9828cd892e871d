"""Training one method under one seed: tensors stay on the device, lightning-fabric picks device and precision."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from lightning_fabric import Fabric, seed_everything
from lightning_fabric.plugins.environments import LightningEnvironment
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from ltkernels.nn import MarginCrossEntropyLoss
from ltkernels.trainer import TrainerError
from ltkernels.trainer.data import Split
from ltkernels.trainer.metrics import Scores, probabilities_of, score
from ltkernels.trainer.models import SmallNetwork
from ltkernels.trainer.recipes import Method, Recipe


class DivergedError(TrainerError):
    """The training loss is not finite."""


@dataclass(frozen=True)
class Evaluation:
    """Scores after ``epoch`` epochs and the mean training loss of the last of them."""

    epoch: int
    train_loss: float
    scores: Scores


@dataclass(frozen=True)
class Run:
    """One method trained under one seed."""

    method: str
    seed: int
    evaluations: tuple[Evaluation, ...]
    seconds: float

    @property
    def last(self) -> Scores:
        """Scores after the last epoch, the headline."""
        return self.evaluations[-1].scores

    @property
    def best_overall(self) -> float:
        """Best overall accuracy of any evaluated epoch: chosen on the evaluation set, so too good."""
        return max(evaluation.scores.overall for evaluation in self.evaluations)


@contextmanager
def fabric_for(recipe: Recipe, accelerator: str) -> Iterator[Fabric]:
    """Fabric on one device, with the CPU threads of the recipe; the caller's number of threads comes back at the end.

    Raises:
        TrainerError: this machine has no such accelerator, or it does not know the precision.
    """
    try:
        # Named: finding out the environment asks mpi4py, which fails where it is installed without a library of MPI.
        fabric = Fabric(
            accelerator=accelerator, devices=1, precision=recipe.precision, plugins=[LightningEnvironment()]
        )
        fabric.launch()
    except (RuntimeError, ValueError) as error:
        raise TrainerError(f"accelerator {accelerator!r} with precision {recipe.precision!r}: {error}") from error
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        yield fabric
    finally:
        torch.set_num_threads(threads)


def train(
    fabric: Fabric,
    recipe: Recipe,
    method_name: str,
    split: Split,
    seed: int,
    on_epoch: Callable[[], None] = lambda: None,
) -> Run:
    """Train one method of the recipe on ``split.train`` and score it on ``split.evaluate``.

    One seed gives every method the same hidden layers and the same batches in the same order, so that their
    differences are paired.

    Raises:
        DivergedError: the loss is not finite; the message names the step and the batch.
    """
    started = time.perf_counter()
    method = recipe.methods[method_name]
    images, target = split.train.tensors(fabric.device)
    evaluation_set = split.evaluate.tensors(fabric.device)
    criterion = method.criterion(split.counts, recipe.epochs).to(fabric.device)
    seed_everything(seed, verbose=False)
    network = SmallNetwork(images[0].numel(), recipe.hidden, len(split.counts), method.classifier)
    model, optimizer, schedule = _set_up(fabric, recipe, method, network, steps_of(len(target), recipe))
    batch_order = torch.Generator().manual_seed(seed)

    evaluations = []
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        criterion.set_epoch(epoch - 1)  # counts from 0
        batches = torch.randperm(len(target), generator=batch_order).to(fabric.device).split(recipe.batch_size)
        losses = torch.empty(len(batches), device=fabric.device)
        for step, batch in enumerate(batches):
            loss = criterion(model(images[batch]), target[batch])
            losses[step] = loss.detach()
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            schedule.step()
        _check_finite(losses, method.title, seed, epoch)
        if epoch % recipe.evaluate_every == 0 or epoch == recipe.epochs:
            scores = evaluate(model, criterion, *evaluation_set, split.counts)
            evaluations.append(Evaluation(epoch, losses.mean().item(), scores))
        on_epoch()
    return Run(method_name, seed, tuple(evaluations), time.perf_counter() - started)


def steps_of(images: int, recipe: Recipe) -> int:
    """Steps of a run; the last batch of an epoch may be smaller."""
    return math.ceil(images / recipe.batch_size) * recipe.epochs


def evaluate(
    model: torch.nn.Module,
    criterion: MarginCrossEntropyLoss,
    images: Tensor,
    target: Tensor,
    class_counts: tuple[int, ...],
) -> Scores:
    """Scores of the raw logits: margins and priors belong to training only."""
    model.eval()
    with torch.inference_mode():
        return score(probabilities_of(model(images), criterion.scale), target, class_counts)


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at ``step`` (from 0): linear to the peak, then half a cosine towards 0."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _set_up(
    fabric: Fabric, recipe: Recipe, method: Method, network: SmallNetwork, steps: int
) -> tuple[torch.nn.Module, torch.optim.Optimizer, LambdaLR]:
    # Nesterov's form is undefined without momentum.
    optimizer = SGD(
        network.parameters(),
        lr=method.lr,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
        weight_decay=method.weight_decay,
    )
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps, recipe.warmup))
    model, optimizer = fabric.setup(network, optimizer)
    return model, optimizer, schedule


def _check_finite(losses: Tensor, title: str, seed: int, epoch: int) -> None:
    # Once an epoch: reading every step's loss would make the device wait for the host.
    finite = torch.isfinite(losses)
    if finite.all():
        return
    batch = int((~finite).nonzero()[0])
    step = (epoch - 1) * len(losses) + batch
    raise DivergedError(
        f"{title}, seed {seed}: the loss is {losses[batch].item()} at step {step + 1} (epoch {epoch}, "
        f"batch {batch + 1} of {len(losses)}); lower the learning rate or check the settings of the method"
    )
