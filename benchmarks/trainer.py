"""The reference trainer and the plain loop on the same task: what is timed, and the proof that both do the same.

A row's task is CIFAR-100-LT of imbalance factor 100, ResNet-32, LDAM-DRW, batches of 128. Without the archive of
CIFAR-100 the images are noise of the same number, size and classes, which costs a loop as much.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric, seed_everything
from torch import Tensor, nn

from benchmarks.interleave import Effort
from benchmarks.suite import Measured
from benchmarks.trainer_plain import PREFETCHED, WORKERS, PlainLoop, synchronize
from ltkernels.trainer.checkpoint import CheckpointFolder
from ltkernels.trainer.data import LabelledImages, Split, class_counts
from ltkernels.trainer.data.datasets import ImageDataset, LongTail
from ltkernels.trainer.data.images import MissingDataError
from ltkernels.trainer.data.pack import load_split
from ltkernels.trainer.fit import Fit, StoppedError, make_network
from ltkernels.trainer.image_recipes import IMAGE_RECIPES, ImageRecipe, Precision
from ltkernels.trainer.image_session import emulates_bfloat16, open_fabric

METHOD = "ldam-drw"
CLASSES, SIDE = 100, 32
# Before the clock runs: the other loop's workers fill their queue, and a step that is captured has been captured.
WARM_STEPS = PREFETCHED * WORKERS + 1
# On a GPU an epoch, in which the plain loop starts its workers once.
TIMED_STEPS = {"cpu": 10, "cuda": 85}
AUGMENTED_IMAGES = 2000
DOUBLE_TOLERANCES = (1e-7, 1e-7)  # margins are float32


@dataclass(frozen=True)
class Row:
    """A loop of the table; ``captured``: its step is replayed as one CUDA graph; ``compiled``: by torch.compile."""

    name: str
    precision: Precision = "32-true"
    captured: bool = False
    compiled: bool = False
    ours: bool = True

    @property
    def dtype(self) -> str:
        return "float32" if self.precision == "32-true" else "bfloat16"

    def reason_to_leave_out(self, device: str, quick: bool = False) -> str | None:
        if self.captured and device != "cuda":
            return "a captured step needs a GPU"
        if self.compiled and (quick or device == "cuda"):
            return "compiling takes minutes, for which a smoke run and the time limit on a GPU have no room"
        if self.dtype == "bfloat16" and emulates_bfloat16(device):
            return "this processor emulates bfloat16"
        return None

    @property
    def tolerances(self) -> tuple[float, float]:
        """Largest relative error of loss and gradient.

        Of the millions of activations a few lie so close to the kink of a ReLU that rounding decides on which side,
        and a gradient changes by all that comes through them: float64 shows whether the formulas are the same.
        """
        return (1e-5, 2e-2) if self.dtype == "float32" else (5e-2, 0.5)


ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row("plain", ours=False),
        Row("ours"),
        Row("ours-compiled", compiled=True),
        Row("ours-bf16", "bf16-mixed"),
        Row("ours-bf16-compiled", "bf16-mixed", compiled=True),
        Row("ours-captured", "bf16-mixed", captured=True),
    )
}


# ---------------------------------------------------------------------------------------------------------------- task


@dataclass(frozen=True)
class Size:
    """Of the task; anything but the default is for smoke runs and tests."""

    batch_size: int = 128
    width: float = 1.0
    max_count: int = 500
    imbalance_factor: float = 100.0
    timed_steps: int | None = None
    archive: bool = True  # of CIFAR-100, where it is

    @classmethod
    def quick(cls) -> Size:
        return cls(16, 0.25, 20, 10.0, timed_steps=2, archive=False)


@dataclass(frozen=True)
class Task:
    """``images``: what is trained on, ``"cifar100-lt"`` or ``"synthetic"``."""

    recipe: ImageRecipe
    data: ImageDataset
    split: Split
    images: str

    @property
    def shape(self) -> str:
        """What the results are filed under: images, images of a batch, batches of an epoch."""
        batch = self.recipe.batch_size
        return f"{self.images}-{batch}-{-(-len(self.split.train) // batch)}"


def make_task(size: Size, root: Path | None = None) -> Task:
    tail = LongTail(size.imbalance_factor, max_count=size.max_count)
    recipe = IMAGE_RECIPES[f"cifar100-lt-{METHOD}"]
    recipe = dataclasses.replace(
        recipe,
        width=size.width,
        batch_size=size.batch_size,
        long_tail=tail,
        evaluate_every=recipe.steps,
        checkpoint_every=0,
    )
    if size.archive:
        try:
            return Task(recipe, *load_split("cifar100", tail, root), "cifar100-lt")
        except MissingDataError:
            pass
    counts = class_counts(CLASSES, size.max_count, size.imbalance_factor)
    train, test = _noise(counts, 0), _noise([1] * CLASSES, 1)
    data = ImageDataset("cifar100", train, test, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))
    return Task(recipe, data, Split(train, test, tuple(counts)), "synthetic")


def _noise(counts: Sequence[int], seed: int) -> LabelledImages:
    labels = np.repeat(np.arange(len(counts)), counts)
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), SIDE, SIDE, 3), dtype=np.uint8)
    return LabelledImages("synthetic", pixels, labels.astype(np.int64), len(counts), 255)


# --------------------------------------------------------------------------------------------------------------- loops


class Loop(Protocol):
    """A loop in the middle of its training."""

    @property
    def network(self) -> nn.Module: ...

    def block(self, warm: int, timed: int) -> float:
        """Seconds of a step: the mean of ``timed`` ones, after ``warm`` (at least 1) that are not timed."""

    def augmented(self, images: np.ndarray) -> Tensor:
        """Any images (B, H, W, 3) uint8 as the loop would train on them."""


class _NoCheckpoints(CheckpointFolder):
    def save(self, step: int, state: dict[str, Any]) -> Path:
        return self.path


class OurLoop:
    """The trainer's own loop, stopped between blocks as an interrupt stops it and gone on with."""

    def __init__(self, fabric: Fabric, recipe: ImageRecipe, data: ImageDataset, split: Split) -> None:
        self.fit = Fit(fabric, recipe, data, split)
        self._checkpoints = _NoCheckpoints(Path())

    @property
    def network(self) -> nn.Module:
        return self.fit.network

    def block(self, warm: int, timed: int) -> float:
        first = self.fit.step + warm
        clock: list[float] = []

        def on_step(step: int) -> None:
            if step in (first, first + timed):
                synchronize(self.fit.fabric.device)
                clock.append(time.perf_counter())

        self._run(first + timed, on_step)
        return (clock[1] - clock[0]) / timed

    def advance(self, count: int) -> None:
        """Take so many steps."""
        self._run(self.fit.step + count, lambda step: None)

    def _run(self, last: int, on_step: Callable[[int], None]) -> None:
        try:
            self.fit.run(self._checkpoints, on_step, stop_requested=lambda: self.fit.step >= last)
        except StoppedError:
            pass

    def accuracy(self) -> float:
        """Percent of the evaluation images."""
        return self.fit.evaluate().overall

    # For the checks

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Training images without augmentation, and their classes."""
        index = torch.from_numpy(rows).to(self.fit.fabric.device)
        return self.fit.augment.normalise(self.fit.images[index]), self.fit.target[index]

    def loss(self, images: Tensor, target: Tensor) -> Tensor:
        """Of a batch of the first epoch."""
        self.fit.objective.criterion.set_epoch(0)
        return self.fit.module(images.contiguous(memory_format=torch.channels_last), target)

    def backward(self, loss: Tensor) -> None:
        self.fit.fabric.backward(loss)  # which mixed precision asks for

    def augmented(self, images: np.ndarray) -> Tensor:
        """Any images (B, H, W, 3) uint8 as the loop would train on them."""
        batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(self.fit.fabric.device)
        return self.fit.augment(batch, torch.Generator(batch.device).manual_seed(0)).cpu()


def make_loop(row: Row, task: Task, device: str, stack: ExitStack) -> PlainLoop | OurLoop:
    """The loop of a row; ``stack`` closes what it needs."""
    if not row.ours:
        return PlainLoop(task.recipe, task.data, task.split, torch.device(device))
    fabric = stack.enter_context(open_fabric(row.precision, device))
    changes = {"precision": row.precision, "cuda_graph": row.captured, "compile": row.compiled}
    recipe = dataclasses.replace(task.recipe, **changes)
    return OurLoop(fabric, recipe, task.data, task.split)


# -------------------------------------------------------------------------------------------------------------- checks


Answer = tuple[Tensor, dict[str, Tensor]]


def loss_and_gradients(loop: PlainLoop | OurLoop, rows: np.ndarray, images: Tensor | None = None) -> Answer:
    """Of a loop's first epoch on these training images without augmentation; its network stays as it is.

    ``images``: the same, normalised by somebody else; in float64 the loop computes in float64.
    """
    network = loop.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    own, target = loop.batch(rows)
    images = own if images is None else images.to(own.device)
    network.to(images.dtype).train()
    network.zero_grad()
    loss = loop.loss(images, target)
    loop.backward(loss)
    gradients = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    network.zero_grad()
    network.float().load_state_dict(before)  # batch normalisation has seen a batch
    return loss.detach(), gradients


def normalised(task: Task, rows: np.ndarray) -> Tensor:
    """Training images in float64 by the definition."""
    mean, std = (torch.tensor(of, dtype=torch.float64)[:, None, None] for of in (task.data.mean, task.data.std))
    return (torch.from_numpy(task.split.train.images[rows]).permute(0, 3, 1, 2).double() / 255 - mean) / std


def exact_answer(task: Task, rows: np.ndarray) -> Answer:
    """Loss and gradients by the definition in float64, with the initial weights, on the CPU."""
    settings, counts = task.recipe.settings, torch.tensor(task.split.counts, dtype=torch.float64)
    seed_everything(task.recipe.seed, verbose=False)
    network = make_network(task.recipe, 3, len(counts)).double().train()
    target = torch.from_numpy(task.split.train.labels[rows])
    embedding = network.features(normalised(task, rows))
    cosines = F.normalize(embedding) @ F.normalize(network.classifier.weight).T
    margin = settings.max_margin * (counts.min() / counts) ** 0.25
    shift = F.one_hot(target, len(counts)) * margin
    loss = F.cross_entropy(settings.scale * (cosines - shift), target)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in network.named_parameters()}


def errors(found: Answer, exact: Answer) -> tuple[float, float]:
    """Relative errors of the loss and, by the norm of all parameters together, of the gradient."""
    loss_error = abs(found[0].cpu().double() - exact[0]) / exact[0].abs()
    assert found[1].keys() == exact[1].keys()
    flat, answer = (torch.cat([one[1][name].cpu().double().flatten() for name in exact[1]]) for one in (found, exact))
    return loss_error.item(), ((flat - answer).norm() / answer.norm()).item()


def check_augmentation(loop: Loop, task: Task, count: int = AUGMENTED_IMAGES) -> None:
    """Asserts that crops and flips are uniform, and that they and the normalisation are those of the definition.

    The images have their own coordinates as colours, so that the middle pixel tells where it comes from.
    """
    padding = task.recipe.augmentation.padding
    y, x = np.mgrid[:SIDE, :SIDE]
    image = np.stack([y * 7 + 1, x * 7 + 1, np.full_like(x, 255)], axis=2).astype(np.uint8)
    found = loop.augmented(np.repeat(image[None], count, axis=0)).double()
    mean, std = (torch.tensor(of, dtype=torch.float64)[:, None, None] for of in (task.data.mean, task.data.std))
    assert found.shape == (count, 3, SIDE, SIDE)
    pixels = (found * std + mean) * 255
    middle = ((pixels[:, :2, SIDE // 2, SIDE // 2 - 1 : SIDE // 2 + 1] - 1) / 7).round().long()
    flip = middle[:, 1, 1] < middle[:, 1, 0]
    rows = middle[:, 0, 0] - SIDE // 2 + padding
    columns = torch.where(flip, middle[:, 1, 0], middle[:, 1, 1]) - SIDE // 2 + padding
    padded = F.pad(torch.from_numpy(image).permute(2, 0, 1).double(), (padding,) * 4)
    for i in range(count):
        cut = padded[:, rows[i] :, columns[i] :][:, :SIDE, :SIDE]
        assert torch.allclose(pixels[i], cut.flip(2) if flip[i] else cut, atol=1e-3), "not a crop of the padded image"
    _assert_uniform("rows", rows, 2 * padding + 1)
    _assert_uniform("columns", columns, 2 * padding + 1)
    _assert_uniform("flips", flip.long(), 2)
    # Offsets and flips of an image do not depend on each other.
    _assert_uniform("joint", (rows * (2 * padding + 1) + columns) * 2 + flip, 2 * (2 * padding + 1) ** 2)


def _assert_uniform(what: str, values: Tensor, kinds: int) -> None:
    counts = values.bincount(minlength=kinds).double()
    assert len(counts) == kinds, f"{what}: {len(counts)} kinds, expected {kinds}"
    expected = len(values) / kinds
    statistic = float(((counts - expected) ** 2 / expected).sum())
    # Chi-squared has mean k - 1 and variance 2 (k - 1): five standard deviations above its mean.
    assert statistic < kinds - 1 + 5 * (2 * (kinds - 1)) ** 0.5, f"{what}: not uniform, {counts.tolist()}"


# --------------------------------------------------------------------------------------------------------- measurement


def measure(rows: Sequence[Row], task: Task, device: str, effort: Effort, size: Size) -> dict[str, Measured]:
    """All rows, block by block in an order of its own each round; a loop that is wrong is not timed."""
    results = {row.name: Measured() for row in rows}
    with ExitStack() as stack:
        loops: dict[str, PlainLoop | OurLoop] = {}
        count = len(task.split.train)
        # As many as the last batch of an epoch has: a compiled step knows both sizes of batches before the clock runs.
        sample = np.random.default_rng(0).permutation(count)[: count % size.batch_size or size.batch_size]
        exact = exact_answer(task, sample)
        for row in rows:
            result = results[row.name]
            try:
                loop = make_loop(row, task, device, stack)
                check(loop, row, task, sample, exact, result)
                loops[row.name] = loop
            except Exception as failure:  # a wrong loop fails its own test, not those of the others
                result.failure = failure
        _interleave(loops, results, effort, size.timed_steps or TIMED_STEPS[device])
    return results


def check(
    loop: PlainLoop | OurLoop,
    row: Row,
    task: Task,
    sample: np.ndarray,
    exact: Answer,
    result: Measured,
) -> None:
    """Asserts loss, gradients and augmentation before anything is timed."""
    torch.manual_seed(0)
    check_augmentation(loop, task)
    with float32_convolutions():
        result.loss_error, result.gradient_error = errors(loss_and_gradients(loop, sample), exact)
    _assert_small("", (result.loss_error, result.gradient_error), row.tolerances)
    if row.dtype == "float32":
        in_double = loss_and_gradients(loop, sample, normalised(task, sample))
        _assert_small(" in float64", errors(in_double, exact), DOUBLE_TOLERANCES)


@contextmanager
def float32_convolutions() -> Iterator[None]:
    """On a GPU torch rounds what float32 convolutions multiply to TF32 unless told not to."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _assert_small(where: str, found: tuple[float, float], tolerances: tuple[float, float]) -> None:
    for what, error, tolerance in zip(("loss", "gradient"), found, tolerances, strict=True):
        assert error <= tolerance, f"{what}{where}: relative error {error:.2g}"


def _interleave(loops: Mapping[str, Loop], results: Mapping[str, Measured], effort: Effort, timed: int) -> None:
    """Blocks of steps: a block begins with steps that are not timed, so that no loop pays for what another left."""
    order, shuffle = list(loops), random.Random(0).shuffle

    def block(name: str, steps: int) -> float | None:
        try:
            return loops[name].block(WARM_STEPS, steps)
        except Exception as failure:  # of this loop alone
            results[name].failure, results[name].samples = failure, []
            order.remove(name)
            return None

    for name in list(order):
        block(name, 1)
    start, rounds = time.perf_counter(), 0
    while order and (
        rounds < effort.min_rounds or (rounds < effort.max_rounds and time.perf_counter() - start < effort.seconds)
    ):
        shuffle(order)
        for name in list(order):
            seconds = block(name, timed)
            if seconds is not None:
                results[name].samples.append(seconds)
        rounds += 1
