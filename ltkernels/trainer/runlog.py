"""What a run leaves behind while it trains and at its end: progress, CSV and TensorBoard logs, predictions, scores."""

from __future__ import annotations

import csv
import importlib.util
import io
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import TextColumn
from torch import Tensor

from ltkernels.trainer.image_recipes import ImageRecipe
from ltkernels.trainer.metrics import COLUMNS, Outputs, probabilities_of
from ltkernels.trainer.progress import progress_bar
from ltkernels.trainer.runfolder import RunFolder

LOG_FILE = "log.csv"
PREDICTIONS_FILE = "predictions.npz"
FEATURES_FILE = "features.npz"
_COLUMNS = ("step", "epoch", "lr", "train_loss", *(name for name, _ in COLUMNS))


class RunLog:
    """Shows and writes the evaluations of one run. Use as a context manager.

    ``log.csv`` always, TensorBoard's files in ``tensorboard/`` where asked for, a bar with the time left on a terminal
    and a line for each evaluation elsewhere.

    Args:
        folder: Of the run.
        console: Where to show the progress.
        recipe: What is trained.
        history: Rows that an earlier part of the run has written.
        step: Steps that it has taken.
        tensorboard: Write TensorBoard's files, if it is installed.
        writes: Whether this process is the one that writes files.
    """

    def __init__(
        self,
        folder: RunFolder,
        console: Console,
        recipe: ImageRecipe,
        history: Sequence[dict[str, Any]],
        step: int,
        tensorboard: bool,
        writes: bool = True,
    ) -> None:
        self._writes = writes
        self._folder, self._console, self._recipe = folder, console, recipe
        self._rows = list(history)
        self._first_step, self._started = step, time.perf_counter()
        self._writer = _summary_writer(folder, step) if tensorboard and writes else None
        self._bar = progress_bar(console, "steps", TextColumn("{task.fields[scores]}"))
        scores = scores_line(self._rows[-1]) if self._rows else ""
        self._task = self._bar.add_task(recipe.title, total=recipe.steps, completed=step, scores=scores)

    def __enter__(self) -> RunLog:
        if self._writes:  # without rows that a killed run wrote after its last checkpoint
            self._folder.write(LOG_FILE, history_csv(self._rows))
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._writer is not None:
            self._writer.close()

    @property
    def seconds(self) -> float:
        """Since the log was opened."""
        return time.perf_counter() - self._started

    def on_step(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def on_evaluation(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self._folder.write(LOG_FILE, history_csv(self._rows))
        if self._writer is not None:
            for name in _COLUMNS[1:]:
                if row[name] is not None:
                    self._writer.add_scalar(name, row[name], row["step"])
            self._writer.flush()
        self._bar.update(self._task, scores=scores_line(row))
        if not self._console.is_terminal:
            done = row["step"] - self._first_step
            left = self.seconds / done * (self._recipe.steps - row["step"])
            self._console.print(
                f"step {row['step']}/{self._recipe.steps}, loss {row['train_loss']:.3f}, {scores_line(row)}, "
                f"{self.seconds:.0f} s, {left:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )


def scores_line(scores: dict[str, Any]) -> str:
    """Overall accuracy and that of the shot groups that have classes."""
    names = ("overall", "many", "medium", "few")
    return " ".join(f"{name} {scores[name]:.1f}" for name in names if scores[name] is not None)


def history_csv(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each evaluation."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def predictions(logits: Tensor, scale: float | Tensor, target: Tensor) -> bytes:
    """An .npz of the evaluation images in their order: ``logits`` (N, C) float16 as the network gives them,
    ``predicted`` (N,) int32, ``confidence`` (N,) float32 and ``target`` (N,) int32."""
    scale = scale.cpu() if isinstance(scale, Tensor) else scale
    confidence, predicted = probabilities_of(logits, scale).max(dim=1)
    file = io.BytesIO()
    np.savez_compressed(
        file,
        logits=logits.to(torch.float16).numpy(),
        predicted=predicted.to(torch.int32).numpy(),
        confidence=confidence.numpy(),
        target=target.cpu().to(torch.int32).numpy(),
    )
    return file.getvalue()


def features(train: Outputs, test_embedding: Tensor) -> bytes:
    """An .npz of float16: ``train_embedding`` (N, D), ``train_logits`` (N, C) and ``train_target`` (N,) int32 of the
    training images without augmentation, ``test_embedding`` (M, D) of the evaluation images."""
    file = io.BytesIO()
    np.savez_compressed(
        file,
        train_embedding=train.embedding.to(torch.float16).numpy(),
        train_logits=train.logits.to(torch.float16).numpy(),
        train_target=train.target.cpu().to(torch.int32).numpy(),
        test_embedding=test_embedding.to(torch.float16).numpy(),
    )
    return file.getvalue()


def summary(recipe: ImageRecipe, history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Last and best evaluation. The best is chosen on the evaluation set, so it is too good."""
    return {
        "recipe_hash": recipe.hash,
        "method": recipe.method,
        "title": recipe.title,
        "dataset": recipe.dataset,
        "tier": recipe.tier,
        "steps": recipe.steps,
        "seed": recipe.seed,
        "subset_seed": recipe.long_tail.subset_seed,
        "last": history[-1],
        "best": max(history, key=lambda row: row["overall"]),
    }


def _summary_writer(folder: RunFolder, step: int) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder.path / "tensorboard"), purge_step=step + 1)
