"""Whether the reference trainer learns what the plain loop learns: test accuracy of each after a few epochs.

    python -m benchmarks.trainer_accuracy --epochs 5 --seeds 3 --out benchmarks/results/trainer-accuracy-cpu.json

Needs CIFAR-100 (LTKERNELS_DATA or --data-root). A run takes minutes on a CPU; each is written when it is done, and the
same command goes on with those that are missing; in bfloat16 where that is faster than float32. The report of the
trainer's benchmark shows the file beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from benchmarks.trainer import METHOD, ROWS, Size, Task, make_loop, make_task
from ltkernels.trainer.checkpoint import write_atomically
from ltkernels.trainer.runfolder import environment

BASELINE = "plain"
COMPARED = (BASELINE, "ours", "ours-bf16")
CONFIDENCE = 0.95


class AccuracyError(Exception):
    """The comparison cannot be made; the message says why."""


def train(row: str, seed: int, task: Task, device: str) -> dict[str, Any]:
    """One run of a row: its accuracy in percent, and its seconds, with the evaluation at the end."""
    task = dataclasses.replace(task, recipe=dataclasses.replace(task.recipe, seed=seed))
    with ExitStack() as stack:
        loop = make_loop(ROWS[row], task, device, stack)
        start = time.perf_counter()
        loop.advance(task.recipe.steps)
        accuracy = loop.accuracy()
        seconds = time.perf_counter() - start
        return {"row": row, "seed": seed, "accuracy": round(accuracy, 4), "seconds": round(seconds, 1)}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of each row, and its difference from the plain loop with the interval."""
    found = {row: [run["accuracy"] for run in runs if run["row"] == row] for row in COMPARED}
    rows = {
        row: {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
        for row, values in found.items()
        if values
    }
    differences = {row: difference(values, found[BASELINE]) for row, values in found.items() if row != BASELINE}
    return {"rows": rows, "differences": {row: found for row, found in differences.items() if found}}


def difference(first: Sequence[float], second: Sequence[float]) -> dict[str, Any] | None:
    """Mean of the first minus that of the second, with Welch's t-interval; None with fewer than two values each.

    Unpaired: a seed gives both loops their initial weights, but the batches, which matter more, are drawn apart.
    """
    if min(len(first), len(second)) < 2:
        return None
    mean = statistics.mean(first) - statistics.mean(second)
    parts = [statistics.variance(values) / len(values) for values in (first, second)]
    if sum(parts) == 0:
        return {"mean": mean, "interval": [mean, mean]}
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True)
    )
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * sum(parts) ** 0.5
    return {"mean": mean, "interval": [mean - half, mean + half]}


def compare(task: Task, epochs: int, seeds: int, device: str, out: Path) -> dict[str, Any]:
    """Train what ``out`` does not have yet, writing it after each run. Returns its content.

    Raises:
        AccuracyError: ``out`` is of another task.
    """
    steps_per_epoch = -(-len(task.split.train) // task.recipe.batch_size)
    recipe = dataclasses.replace(task.recipe, steps=epochs * steps_per_epoch, evaluate_every=epochs * steps_per_epoch)
    task = dataclasses.replace(task, recipe=recipe)
    head = {
        "method": METHOD,
        "epochs": epochs,
        "steps": recipe.steps,
        "recipe": recipe.hash,
        "train_fingerprint": task.split.train.fingerprint,
    }
    runs = _runs_so_far(out, head)
    # Seed by seed: stopped early, all rows have as many runs.
    rows = [row for row in COMPARED if ROWS[row].reason_to_leave_out(device) is None]
    for seed in range(seeds):
        for row in rows:
            if any((run["row"], run["seed"]) == (row, seed) for run in runs):
                continue
            runs.append(train(row, seed, task, device) | {"machine": _machine(device)})
            _write(out, head | {"runs": runs} | summary(runs))
            print(f"{row}, seed {seed}: {runs[-1]['accuracy']:.2f} % in {runs[-1]['seconds']:.0f} s", flush=True)
    return head | {"runs": runs} | summary(runs)


def _runs_so_far(out: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    if not out.exists():
        return []
    content = json.loads(out.read_text())
    other = [name for name, value in head.items() if content.get(name) != value]
    if other:
        raise AccuracyError(f"{out}: holds another comparison, its {', '.join(other)} differ; choose another --out")
    return content["runs"]


def _write(out: Path, content: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(out, lambda file: file.write(text.encode()))


def _machine(device: str) -> str:
    found = environment(torch.device(device))
    name = found["device"] if device == "cuda" else f"{found['cpu']} ({torch.backends.cpu.get_cpu_capability()})"
    return f"{name}, torch {torch.__version__}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainer_accuracy", description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=5, help="of each run; default: 5")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each loop; default: 3")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--data-root", type=Path, help="folder with CIFAR-100; default: the one LTKERNELS_DATA names")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/trainer-accuracy-DEVICE.json")
    options = parser.parse_args(arguments)
    if min(options.epochs, options.seeds) < 1:
        parser.error("--epochs and --seeds: expected at least 1")
    out = options.out or Path(__file__).parent / "results" / f"trainer-accuracy-{options.device}.json"
    try:
        task = make_task(Size(), options.data_root)
        if task.images == "synthetic":
            raise AccuracyError("no CIFAR-100 found: name its folder by --data-root or LTKERNELS_DATA")
        content = compare(task, options.epochs, options.seeds, options.device, out)
    except AccuracyError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    for row, one in content["rows"].items():
        print(f"{row}: {one['mean']:.2f}" + ("" if one["std"] is None else f" +- {one['std']:.2f}"))
    for row, found in content["differences"].items():
        low, high = found["interval"]
        print(f"{row} minus {BASELINE}: {found['mean']:+.2f}, 95 % interval {low:+.2f} to {high:+.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
