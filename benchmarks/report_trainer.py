"""The report on the reference trainer. Made without the trainer's dependencies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.results import Results
from benchmarks.tables import NOISY, number, table, time_of, times
from benchmarks.targets import Target

LABELS = {
    "plain": "plain PyTorch loop",
    "ours": "ltkernels",
    "ours-compiled": "ltkernels, compiled",
    "ours-bf16": "ltkernels",
    "ours-bf16-compiled": "ltkernels, compiled",
    "ours-captured": "ltkernels, captured step",
}
PRECISIONS = {
    "plain": "float32",
    "ours": "float32",
    "ours-compiled": "float32",
    "ours-bf16": "bf16-mixed",
    "ours-bf16-compiled": "bf16-mixed",
    "ours-captured": "bf16-mixed",
}
# On a CPU: times faster at equal precision, without and with the option --compile, and in mixed precision.
SPEEDUPS = {"ours": 1.3, "ours-compiled": 1.3, "ours-bf16": 2.5, "ours-bf16-compiled": 2.5}
# On a GPU: seconds of LDAM's 200 epochs.
STEPS, SECONDS = 17_000, 30.0
WORKERS = 4
ACCURACY = Path(__file__).parent / "results"
METHOD = "ldam-drw"
# In the place of a case's dtype: the loops of one case differ in it.
BY_ROW = "by row"


class Measurement:
    """The one task of a run, as the shape of its cases names it: images, images of a batch, batches of an epoch."""

    def __init__(self, results: Results) -> None:
        self.results, self.shape = results, results.shapes()[-1]
        self.images, batch, steps = self.shape.rsplit("-", 2)
        self.batch, self.steps = int(batch), int(steps)

    def variant(self, name: str) -> dict[str, Any] | None:
        return self.results.variant(*self._case, name)

    def time_of(self, name: str) -> str:
        return time_of(self.results, *self._case, name)

    def over_plain(self, name: str) -> float | None:
        """How many times faster than the plain loop a row is: the median over rounds."""
        return 1.0 if name == "plain" else self.results.ratio(*self._case, "plain", name)

    @property
    def _case(self) -> tuple[str, str, str]:
        return self.shape, BY_ROW, METHOD


def targets(results: Results) -> list[Target]:
    """What is promised about a step: on a CPU against the plain loop, on a GPU in seconds."""
    measurement = Measurement(results)
    if results.machine["device"] == "cpu":
        return [
            Target(
                f"{LABELS[name]}, {PRECISIONS[name]}: times faster than the plain loop",
                wanted,
                measurement.over_plain(name),
            )
            for name, wanted in SPEEDUPS.items()
        ]
    captured = measurement.variant("ours-captured")
    seconds = captured["median_s"] * STEPS if captured else None
    text = f"seconds of {STEPS:,} steps, extrapolated from the time of a captured one"
    return [Target(text, SECONDS, seconds, at_most=True)]


def sections(results: Results) -> list[str]:
    return [_head(results), main_table(results), _targets(results), _accuracy(results.machine["device"])]


def _head(results: Results) -> str:
    m, measurement = results.machine, Measurement(results)
    where = m["name"] if m["device"] == "cuda" else f"{m['name']}, {m['cores']} cores ({m['cpu_capability']})"
    smoke = "\n\n**A smoke run: the numbers mean nothing.**" if m.get("quick") else ""
    rounds = min(v["rounds"] for case in results.cases.values() for v in case["variants"].values())
    workers = min(WORKERS, m["cores"])
    # The default of torch: float32 convolutions, but no other products.
    tf32 = (
        " On this GPU torch computes float32 convolutions in TF32, which both loops leave on but for the check."
        if m["device"] == "cuda"
        else ""
    )
    # On a GPU a block is an epoch, on a CPU a small part of one.
    left_out = (
        "evaluation is not in it; the start of the plain loop's workers, once an epoch, is"
        if m["device"] == "cuda"
        else "evaluation and, in most blocks, the start of the plain loop's workers, once an epoch, are not in it"
    )
    real = measurement.images == "cifar100-lt"
    images = "" if real else " The images are synthetic, of the number, size and classes of CIFAR-100-LT."
    return (
        f"# The reference trainer on {where}\n\n"
        f"{m['date']}, commit {m.get('revision') or 'unknown'}, "
        f"torch {m['torch']}, Python {m['python']}, {m['threads']} CPU threads, {m['system']}.{smoke}\n\n"
        "One training step: loading and augmenting a batch, forward, backward, update. ResNet-32, CIFAR-100-LT with "
        f"imbalance factor 100, LDAM-DRW, batches of {measurement.batch}.{images} Medians of {rounds} blocks of steps; "
        "the loops take turns block by block, in a new random order each round, and a block begins with steps that "
        "are not timed. How many times faster a loop is, is the median of the ratios within the rounds. "
        f"`~` marks an interquartile range above {NOISY:.0%} of the median. An epoch is "
        f"{measurement.steps} steps; {left_out}.\n\n"
        f"The plain loop is written after LDAM's repository: {workers} worker processes crop, flip and normalise PIL "
        "images one by one, contiguous float32 tensors, SGD as torch chooses it, the loss by a one-hot mask, loss and "
        "accuracies read after every step. Before anything is timed, each loop's loss and gradients of a batch "
        "without augmentation are held against the definition in float64 from the same initial weights, and its crops "
        "and flips against the definition and the uniform distribution. Compiled means by torch.compile, as the option "
        "`--compile` has it: the first steps, which take minutes, are not in the time. The loops in float32 are also "
        "computed in float64, where they agree with the definition to 1e-7; in float32 a few activations at the kink "
        "of a ReLU move the gradient." + tf32
    )


def main_table(results: Results) -> str:
    measurement = Measurement(results)
    rows = [_row(measurement, name) for name in LABELS if measurement.variant(name)]
    columns = ["loop", "precision", "a step", "images/s", "s an epoch", "times faster", "loss error", "gradient error"]
    text = f"## A step\n\n{table(columns, rows)}"
    if results.machine["device"] == "cpu" and not measurement.variant("ours-bf16"):
        reason = "a processor without AVX512-BF16 or AMX emulates it, which takes many times as long as float32"
        row = [LABELS["ours-bf16"], PRECISIONS["ours-bf16"], "left out: " + reason, *[""] * (len(columns) - 3)]
        text += "\n| " + " | ".join(row) + " |"
    return text


def _row(measurement: Measurement, name: str) -> list[str]:
    variant = measurement.variant(name)
    seconds = variant["median_s"]
    return [
        LABELS[name],
        PRECISIONS[name],
        measurement.time_of(name),
        f"{measurement.batch / seconds:,.0f}",
        f"{measurement.steps * seconds:.3g}",
        times(measurement.over_plain(name)),
        *("" if variant.get(what) is None else f"{variant[what]:.1e}" for what in ("loss_error", "gradient_error")),
    ]


def _targets(results: Results) -> str:
    found = targets(results)
    rows = [[t.text, t.wanted_text, number(t.measured), t.verdict] for t in found]
    met = sum(target.verdict == "met" for target in found)
    return f"## Targets: {met} of {len(rows)} met\n\n{table(['a step', 'wanted', 'measured', ''], rows)}"


def _accuracy(device: str) -> str:
    """What ``benchmarks.trainer_accuracy`` has found so far; empty where it has not run."""
    path = ACCURACY / f"trainer-accuracy-{device}.json"
    if not path.exists():
        return ""
    content = json.loads(path.read_text())
    machines = sorted({run["machine"] for run in content["runs"]})
    rows = [
        [
            LABELS[name],
            PRECISIONS[name],
            ", ".join(f"{run['accuracy']:.2f}" for run in runs),
            _mean_and_deviation(content, name),
            _difference(content["differences"].get(name)),
        ]
        for name in LABELS
        if (runs := [run for run in content["runs"] if run["row"] == name])
    ]
    text = (
        f"Percent of the balanced test images after {content['epochs']} epochs of LDAM-DRW, its schedule shortened to "
        "them. Of each seed all loops have the same initial weights; the order of the images and their augmentation "
        "differ between the plain loop and ltkernels. Differences are from the plain loop, with 95 % t-intervals "
        "(Welch): one that contains 0 is called equal within noise, and excludes no more than what lies outside of it. "
        f"Trained on {' and '.join(machines)}."
    )
    title = f"## Accuracy after {content['epochs']} epochs"
    columns = ["loop", "precision", "seed by seed", "mean", "difference"]
    return f"{title}\n\n{text}\n\n{table(columns, rows)}"


def _mean_and_deviation(content: dict[str, Any], name: str) -> str:
    one = content["rows"][name]
    return f"{one['mean']:.2f}" + ("" if one["std"] is None else f" +- {one['std']:.2f}")


def _difference(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return ""
    low, high = difference["interval"]
    verdict = "equal within noise" if low <= 0 <= high else "**they differ**"
    return f"{difference['mean']:+.2f} ({low:+.2f} to {high:+.2f}): {verdict}"
