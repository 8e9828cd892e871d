"""The bar chart of the report on the reference trainer."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes

from benchmarks.chart import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, plt
from benchmarks.report_trainer import LABELS, PRECISIONS, SPEEDUPS, STEPS, Measurement
from benchmarks.results import Results
from benchmarks.tables import machine_name

COLORS = {
    "plain": ORANGE,
    "ours": BLUE,
    "ours-compiled": PURPLE,
    "ours-bf16": SKY,
    "ours-bf16-compiled": VERMILION,
    "ours-captured": GREEN,
}


def draw(results: Results, path: Path) -> None:
    """Images a second on the left, times faster than the plain loop on the right."""
    measurement = Measurement(results)
    names = [name for name in LABELS if measurement.variant(name)]
    rates = {name: measurement.batch / measurement.variant(name)["median_s"] for name in names}
    gains = {name: gain for name in names if name != "plain" and (gain := measurement.over_plain(name))}
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained", width_ratios=(8, 5))
        figure.suptitle(f"Training step, ResNet-32, batch {measurement.batch} - {machine_name(results)}")
        _bars(left, rates, "{:,.0f}")
        left.set(title="Images a second", ylabel="images/s")
        _bars(right, gains, "{:.2f}")
        right.axhline(1, color=BLACK, linewidth=0.8, linestyle=":")
        right.set(title="Times faster", ylabel="time of the plain loop / time of ltkernels")
        if results.machine["device"] == "cpu":
            _wanted(right, list(gains))
        else:
            left.set_xlabel(_extrapolated(measurement))
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _bars(axes: Axes, values: dict[str, float], form: str) -> None:
    for i, (name, value) in enumerate(values.items()):
        axes.bar(i, value, 0.6, color=COLORS[name])
        # At the foot, where no target is.
        axes.annotate(form.format(value), (i, 0), xytext=(0, 5), textcoords="offset points", ha="center", color="white")
    labels = [LABELS[name].replace(", ", ",\n") + f"\n{PRECISIONS[name]}" for name in values]
    axes.set_xticks(range(len(values)), labels)
    axes.set_xlim(-0.7, max(0.7, len(values) - 0.3))
    axes.margins(y=0.15)


def _wanted(axes: Axes, names: list[str]) -> None:
    label: str | None = "target"
    for i, name in enumerate(names):
        if name in SPEEDUPS:
            axes.hlines(SPEEDUPS[name], i - 0.3, i + 0.3, color=BLACK, linewidth=2, label=label)
            label = None
    if label is None:
        axes.legend(frameon=False, loc="upper left")


def _extrapolated(measurement: Measurement) -> str:
    captured = measurement.variant("ours-captured")
    return f"{STEPS:,} captured steps: {captured['median_s'] * STEPS:.0f} s, extrapolated" if captured else ""
