"""``ltkernels table``: the runs of a table, as many of them as the time allows, each in a process of its own.

A run has the folder ``RUNS/NAME`` of its plan: a finished one is left alone, one with checkpoints goes on, any other
one starts. Who works in a folder holds the lock file in it, which the training process inherits: neither a second queue
nor one that follows a killed queue trains the same run twice.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from ltkernels.trainer import TrainerError, results
from ltkernels.trainer.image_recipes import Tier, load_recipe, save_recipe
from ltkernels.trainer.image_session import (
    INTERRUPTED,
    METRICS_FILE,
    RECIPE_FILE,
    TERMINATED,
    stop_signals,
)
from ltkernels.trainer.locks import LOCK_FILE, LOCKED_RUN, try_lock
from ltkernels.trainer.posthoc import POST_HOC
from ltkernels.trainer.runfolder import RUNS, RunFolder, read_json
from ltkernels.trainer.runlog import scores_line
from ltkernels.trainer.tables import CHOICES, PlannedRun, table_named

LOG_FILE = "train.log"
PROGRAM: tuple[str, ...] = (sys.executable, "-m", "ltkernels.cli")
_POLL = 0.1  # seconds
_LINES_OF_A_FAILURE = 8


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Train the runs of a table that are not done yet, the most valuable first, and store their results."""

    name: tyro.conf.Fixed[str]
    """Table."""
    tier: Tier = "full"
    """Number of steps of its runs: full is 17000, short 3400."""
    minutes: float = 0.0
    """Start no run after so many minutes and let those under way save a checkpoint; 0: no limit."""
    parallel: int = 1
    """Runs side by side; they share one GPU."""
    threads: int = 0
    """CPU threads of a run; 0: the cores divided by --parallel."""
    runs: Path = RUNS
    """Folder with the run folders."""
    arms: tuple[str, ...] = ()
    """Only runs of these recipes; default: all."""
    seeds: tuple[int, ...] = ()
    """Only runs with these seeds; default: all."""
    subset_seeds: tuple[int, ...] = ()
    """Only runs on these subsets; default: all."""
    missing: bool = False
    """Only runs that the stored results lack: on another machine, those that nobody has trained yet."""
    data_root: Path | None = None
    """Folder with the data sets or packs of them; default: the one that LTKERNELS_DATA names, else data."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device, in the words of lightning-fabric."""
    cuda_graph: bool = True
    """On a GPU, replay a step as one CUDA graph; without, the same training takes longer."""
    compile: bool = False
    """Compile the step of runs that start, with torch.compile; others go on as they began."""
    results: Path | None = None
    """File that the results are merged into; default: docs/reproduction/results/NAME-TIER.json."""

    def __post_init__(self) -> None:
        if not 0 <= self.minutes < float("inf"):
            raise TrainerError(f"minutes: expected a number >= 0, got {self.minutes:g}")
        if self.parallel < 1:
            raise TrainerError(f"parallel: expected at least 1, got {self.parallel}")
        if self.threads < 0:
            raise TrainerError(f"threads: expected at least 0, got {self.threads}")

    @property
    def threads_of_a_run(self) -> int:
        """CPU threads of each process."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.threads or max(1, cores // self.parallel)


def run_table(options: TableOptions, console: Console) -> int:
    """Work through the queue, show what is there and store it.

    Returns:
        1 if a run failed, 130 after an interrupt, 143 after SIGTERM, else 0, with runs left for the next time or not.

    Raises:
        TrainerError: an unknown table, recipe or seed, or results that cannot be read or written.
    """
    table, planned = table_named(options.name), chosen_runs(options)
    file = options.results or results.results_file(options.name, options.tier)
    before = results.load(file)["runs"] if file.exists() else {}  # a damaged file is told now, not after the work
    if options.missing:
        planned = [run for run in planned if not is_stored(run, before)]

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    finished: set[str] = set()

    def on_finished(run: PlannedRun) -> None:
        finished.add(run.recipe.hash)
        entry = results.entry(options.name, run, options.runs / run.name)
        results.store(file, {"table": options.name, "tier": options.tier, "runs": {run.recipe.hash: entry}})

    which = " that are not stored yet" if options.missing else ""
    say(f"{table.title}, tier {options.tier}: runs{which}: {len(planned)}, in {options.runs}")
    queue = Queue(planned, options, say, on_finished)
    with stop_signals() as received:
        queue.work(received)
    unreadable: list[TrainerError] = []
    found = results.collect(options.name, options.tier, options.runs, unreadable.append)
    others = _stored_otherwise(found, file, finished)
    found["runs"] = {name: values for name, values in found["runs"].items() if name not in others}
    stored = results.store(file, found)
    console.print(overview(planned, stored))
    say(f"{len(stored['runs'])} runs stored in {file}")
    if others:
        say(f"not stored: results in {options.runs} that differ from the stored ones, of {', '.join(sorted(others))}")
    for error in unreadable:
        say(f"not stored: {error}")
    if queue.failed:
        say(f"failed, tried again the next time: {', '.join(queue.failed)}")
    if queue.failed or unreadable:
        return 1
    if received:
        return INTERRUPTED if signal.SIGINT in received else TERMINATED
    return 0


def _stored_otherwise(found: results.Results, file: Path, finished: set[str]) -> set[str]:
    """Runs of before with other results than are stored for them: those of another machine, perhaps, which stay."""
    held = results.load(file)["runs"] if file.exists() else {}
    return {
        name
        for name, values in found["runs"].items()
        if name not in finished and name in held and held[name]["last"] != values["last"]
    }


def chosen_runs(options: TableOptions) -> list[PlannedRun]:
    """The runs that the options leave of the table, in its order.

    Raises:
        TrainerError: an unknown table, or a recipe or seed that it does not have.
    """
    planned = list(table_named(options.name).runs(options.tier))
    for name, value_of in CHOICES.items():
        known = dict.fromkeys(value_of(run) for run in planned)
        asked: tuple[str | int, ...] = getattr(options, name)
        for value in asked:
            if value not in known:
                raise TrainerError(f"{name}: {options.name} has no {value}, but {', '.join(map(str, known))}")
        planned = [run for run in planned if not asked or value_of(run) in asked]
    return planned


def is_stored(planned: PlannedRun, stored: results.Results) -> bool:
    """Whether a run is among the stored ones, with the post-hoc methods that its table asks for."""
    entry = stored.get(planned.recipe.hash)
    return entry is not None and (not planned.arm.post_hoc or entry["post_hoc"].keys() >= set(POST_HOC))


@dataclass
class _Job:
    """A run that is worked on: the process of its present stage, and its lock."""

    planned: PlannedRun
    folder: Path
    lock: int
    started: float
    stage: str = ""
    log_start: int = 0
    process: subprocess.Popen[bytes] = field(init=False)


class Queue:
    """The runs that are worked on and those that wait.

    Args:
        planned: In the order in which they are started.
        options: Of the command.
        say: Shows a line.
        on_finished: Called with each run that is complete now and was not before.

    Attributes:
        failed: Names of runs that failed.
    """

    def __init__(
        self,
        planned: Sequence[PlannedRun],
        options: TableOptions,
        say: Callable[[str], None],
        on_finished: Callable[[PlannedRun], None],
    ) -> None:
        self._planned, self._options, self._say, self._on_finished = planned, options, say, on_finished
        self._waiting: deque[PlannedRun] = deque()
        self._running: list[_Job] = []
        self._done = self._finished_now = 0
        self.failed: list[str] = []

    def work(self, received: Sequence[int]) -> None:
        """Start runs until none waits, the time is over or a signal is in ``received``; then wait for those that run.

        At the end of the time and after a signal those under way are asked to save a checkpoint and stop.
        """
        self._sort_out()
        self._began = time.monotonic()
        limit = self._began + 60 * self._options.minutes if self._options.minutes else float("inf")
        stopping = False
        try:
            while True:
                if not stopping and (received or time.monotonic() >= limit):
                    stopping = True
                    self._stop("signal" if received else f"{self._options.minutes:g} minutes are over")
                for job in list(self._running):
                    self._look_after(job, stopping)
                while not stopping and self._waiting and len(self._running) < self._options.parallel:
                    self._start(self._waiting.popleft())
                if not self._running and (stopping or not self._waiting):
                    return
                time.sleep(_POLL)
        finally:
            for job in self._running:  # a second interrupt
                job.process.terminate()

    def _sort_out(self) -> None:
        for planned in self._planned:
            try:
                if next_stage(planned, self._options.runs / planned.name) is None:
                    self._done += 1
                else:
                    self._waiting.append(planned)
            except TrainerError as error:
                self._fail(planned, str(error))
        self._say(f"{self._count()} done, {len(self._waiting)} to do")

    def _count(self) -> str:
        return f"[{self._done}/{len(self._planned)}]"

    def _start(self, planned: PlannedRun) -> None:
        folder = self._options.runs / planned.name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = try_lock(folder / LOCK_FILE)
        except (OSError, TrainerError) as error:
            return self._fail(planned, str(error))
        if lock is None:
            return self._say(f"{self._count()} {planned.name}: another process is at it")
        job = _Job(planned, folder, lock, time.monotonic())
        self._running.append(job)
        self._go_on(job)

    def _go_on(self, job: _Job) -> None:
        """Start the next stage of a run, or tell that it is finished."""
        before = job.stage
        try:
            stage = next_stage(job.planned, job.folder)
            if stage is None:
                return self._finish(job)
            if stage == before:
                raise TrainerError(f"its process ended without an error and without {METRICS_FILE}")
            _prepare(job.planned, job.folder, self._options.compile)
            job.stage = stage
            self._launch(job)
        except (OSError, TrainerError) as error:
            self._leave(job)
            return self._fail(job.planned, str(error))
        if not before:
            again = any(job.folder.glob("checkpoint-*.pt")) and stage == "train"
            verb = "goes on" if again else "started" if stage == "train" else f"finished before, {stage}"
            self._say(f"{self._count()} {job.planned.name}, seed {job.planned.recipe.seed}: {verb}")

    def _launch(self, job: _Job) -> None:
        options, environment = self._options, dict(os.environ)
        threads = options.threads_of_a_run
        environment["OMP_NUM_THREADS"] = str(threads)  # for commands without an option
        environment[LOCKED_RUN] = str(job.folder.resolve())
        command = [*PROGRAM, *_arguments(job), "--accelerator", options.accelerator]
        if job.stage == "train":
            command += ["--threads", str(threads), "--no-tensorboard"]
            command += [] if options.cuda_graph else ["--no-cuda-graph"]
        if options.data_root is not None:
            command += ["--data-root", str(options.data_root)]
        with (job.folder / LOG_FILE).open("ab") as log:
            job.log_start = log.tell()
            job.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(job.lock,),
                start_new_session=True,  # an interrupt from the keyboard is passed on once, by the queue
            )

    def _look_after(self, job: _Job, stopping: bool) -> None:
        status = job.process.poll()
        if status is None:
            return
        if status == 0 and not (stopping and _is_unfinished(job)):
            return self._go_on(job)
        self._leave(job)
        if stopping and status in (0, INTERRUPTED, TERMINATED, -signal.SIGINT, -signal.SIGTERM):
            return self._say(f"{self._count()} {job.planned.name}: stopped, goes on the next time")
        self._fail(job.planned, f"{job.stage} ended with status {status}\n{_last_lines(job)}".rstrip())

    def _leave(self, job: _Job) -> None:
        self._running.remove(job)
        os.close(job.lock)

    def _finish(self, job: _Job) -> None:
        self._leave(job)
        self._done += 1
        self._finished_now += bool(job.stage)
        try:
            last = read_json(job.folder / METRICS_FILE)["last"]
            self._on_finished(job.planned)
        except (KeyError, TrainerError) as error:
            return self._fail(job.planned, str(error))
        seconds = time.monotonic() - job.started
        self._say(
            f"{self._count()} {job.planned.name} finished: {scores_line(last)}, {seconds:.0f} s{self._time_left()}"
        )

    def _time_left(self) -> str:
        left = len(self._waiting) + len(self._running)
        if not left or not self._finished_now:
            return ""
        minutes = (time.monotonic() - self._began) / self._finished_now * left / 60
        return f"; {left} left, about {minutes:.0f} min"

    def _fail(self, planned: PlannedRun, why: str) -> None:
        self.failed.append(planned.name)
        self._say(f"{self._count()} {planned.name} failed: {why}")

    def _stop(self, why: str) -> None:
        if self._running:
            self._say(f"{why}: {_runs(len(self._running))} told to save a checkpoint")
        elif self._waiting:
            self._say(f"{why}: {_runs(len(self._waiting))} left for the next time")
        for job in self._running:
            job.process.terminate()


def _runs(count: int) -> str:
    return f"{count} run{'s are' if count != 1 else ' is'}"


def next_stage(planned: PlannedRun, folder: Path) -> str | None:
    """``"train"``, ``"posthoc"``, or None for a run that is complete.

    Raises:
        TrainerError: the folder holds a finished run of another recipe, or one that cannot be read.
    """
    if not (folder / METRICS_FILE).is_file():
        return "train"
    results.check_hash(folder, read_json(folder / METRICS_FILE), planned)
    return "posthoc" if planned.arm.post_hoc and missing_post_hoc(folder) else None


def _is_unfinished(job: _Job) -> bool:
    """Whether another stage would follow; what cannot be read is for that stage to tell."""
    try:
        return next_stage(job.planned, job.folder) is not None
    except TrainerError:
        return False


def missing_post_hoc(folder: Path) -> list[str]:
    """Post-hoc methods that a run has no scores of."""
    return [name for name in POST_HOC if not (folder / f"posthoc-{name}.json").is_file()]


def _prepare(planned: PlannedRun, folder: Path, compiled: bool) -> None:
    """Write the recipe of a run that starts; TrainerError if another one is there."""
    if not (folder / RECIPE_FILE).is_file():
        recipe = dataclasses.replace(planned.recipe, compile=planned.recipe.compile or compiled)
        RunFolder(folder).write_json(RECIPE_FILE, save_recipe(recipe, planned.arm.recipe))
        return
    _, recipe = load_recipe(folder / RECIPE_FILE)
    if recipe.hash != planned.recipe.hash:
        raise TrainerError(f"{folder / RECIPE_FILE}: recipe {recipe.hash}, expected {planned.recipe.hash}")


def _arguments(job: _Job) -> list[str]:
    if job.stage == "train":
        return ["train", "--resume", str(job.folder)]  # from the start where there is no checkpoint
    return ["posthoc", str(job.folder), "--methods", *missing_post_hoc(job.folder)]


def _last_lines(job: _Job) -> str:
    """What the process that failed said last."""
    with (job.folder / LOG_FILE).open("rb") as log:
        log.seek(job.log_start)
        lines = log.read().decode("utf-8", "replace").strip().splitlines()
    return "\n".join(f"  {line}" for line in lines[-_LINES_OF_A_FAILURE:])


def overview(planned: Sequence[PlannedRun], stored: results.Results) -> RichTable:
    """For each arm how many of its runs are stored, whichever machine they are from, and their last accuracy."""
    table = RichTable(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("method")
    table.add_column("runs", justify="right")
    table.add_column("overall, last step", justify="right")
    by_arm: dict[str, list[PlannedRun]] = {}
    for run in planned:
        by_arm.setdefault(run.arm.label, []).append(run)
    for label, members in by_arm.items():
        found = [stored["runs"].get(run.recipe.hash) for run in members]
        values = [run["last"]["overall"] for run in found if run is not None]
        spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        mean = f"{np.mean(values):.2f}{spread}" if values else "-"
        table.add_row(label, f"{len(values)}/{len(members)}", mean)
    return table
