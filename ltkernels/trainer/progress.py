"""Progress of many runs: a bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_bar(console: Console, unit: str, *columns: TextColumn) -> Progress:
    """A bar with what is done, in ``unit``, and the time left; nothing where the console is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        *columns,
        console=console,
        disable=not console.is_terminal,
    )


class RunProgress:
    """Counts epochs of ``runs`` runs. Use as a context manager; ``start`` names a run, ``epoch`` counts one.

    Args:
        console: Where to show it.
        runs: Number of runs.
        epochs: Epochs of each.
        line_every: Runs between two lines where the console is no terminal.
    """

    def __init__(self, console: Console, runs: int, epochs: int, line_every: int) -> None:
        self._console = console
        self._runs, self._epochs, self._line_every = runs, epochs, line_every
        self._started = time.perf_counter()
        self._finished = 0
        self._bar = progress_bar(console, "epochs")
        self._task = self._bar.add_task("", total=runs * epochs)

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, description: str) -> None:
        self._bar.update(self._task, description=description)

    def epoch(self) -> None:
        self._bar.advance(self._task)

    def finish(self, description: str) -> None:
        """A run is over; it may have stopped before its last epoch."""
        self._finished += 1
        self._bar.update(self._task, completed=self._finished * self._epochs)
        if not self._console.is_terminal and self._finished % self._line_every == 0:
            elapsed = time.perf_counter() - self._started
            left = elapsed / self._finished * (self._runs - self._finished)
            self._console.print(
                f"{self._finished}/{self._runs} runs, {description}, {elapsed:.0f} s, {left:.0f} s left",
                highlight=False,
            )
