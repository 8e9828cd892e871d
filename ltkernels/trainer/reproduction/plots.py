"""Pictures of the supervised tables: accuracy of each class against cross-entropy, and reliability diagrams."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ltkernels.trainer.metrics import shot_group

# Told apart by colour-blind readers (Okabe and Ito).
GREY, BLUE, VERMILION = "#4d4d4d", "#0072b2", "#d55e00"
WINDOW = 11
"""Classes that an accuracy of the smoothed picture is the mean of."""
_SMOOTHED_ABOVE = 20  # classes: fewer can be read one by one
_COLUMNS = 4


@dataclass(frozen=True, eq=False)
class ClassAccuracies:
    """A method in the picture of per-class accuracies: (R, C) of R runs, in percent."""

    title: str
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class Reliability:
    """A method in the reliability diagram: images, mean confidence and accuracy of each bin, from 0 to 1."""

    title: str
    ece: float
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def smoothed(values: np.ndarray) -> np.ndarray:
    """(..., C) running means over ``WINDOW`` classes, of fewer at the ends; up to 20 classes as they are."""
    classes = values.shape[-1]
    if classes <= _SMOOTHED_ABOVE:
        return values
    half = WINDOW // 2
    return np.stack([values[..., max(0, k - half) : k + half + 1].mean(-1) for k in range(classes)], axis=-1)


def per_class_picture(baseline: ClassAccuracies, others: Sequence[ClassAccuracies], counts: Sequence[int]) -> bytes:
    """PNG with a panel for each other method: its accuracy of each class and the baseline's, the largest class left.

    Bands are standard errors over the runs. Of more than 20 classes the lines are running means.
    """
    order = np.argsort(-np.asarray(counts), kind="stable")
    rows = math.ceil(len(others) / _COLUMNS)
    columns = min(len(others), _COLUMNS)
    figure = Figure(figsize=(max(6.4, 3.2 * columns), 2.75 * rows + 1.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)  # pyplot would keep the figure, and may open a window
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for index, axes in enumerate(panels.flat):
        if index >= len(others):
            axes.set_visible(False)
            panels.flat[index - columns].tick_params(labelbottom=True)
            continue
        _plot_accuracies(axes, baseline, order, GREY, "--")
        _plot_accuracies(axes, others[index], order, BLUE, "-")
        _mark_groups(axes, np.asarray(counts)[order])
        axes.set_title(_plain(others[index].title), fontsize=10, pad=18)
        axes.set(ylim=(0, 100), xlim=(-0.5, len(counts) - 0.5))
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    handles, _ = panels.flat[0].get_legend_handles_labels()
    labels = [_plain(baseline.title), "the method above the panel"]
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    window = f"; running mean over {WINDOW} classes" if len(counts) > _SMOOTHED_ABOVE else ""
    figure.supxlabel(f"classes, by training images, the largest first{window}", fontsize=10)
    figure.supylabel("test accuracy of the class, %", fontsize=10)
    return _png(figure)


def _plot_accuracies(axes: Axes, method: ClassAccuracies, order: np.ndarray, colour: str, style: str) -> None:
    values = smoothed(method.values[:, order])
    x, mean = np.arange(values.shape[1]), values.mean(0)
    marker = "o" if len(x) <= _SMOOTHED_ABOVE else ""
    axes.plot(x, mean, style, color=colour, linewidth=1.7, marker=marker, markersize=4, label=method.title)
    if len(values) > 1:
        error = values.std(0, ddof=1) / math.sqrt(len(values))
        axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)


def _mark_groups(axes: Axes, counts: np.ndarray) -> None:
    """Name the shot groups above the axes, with a line where one ends."""
    groups = [shot_group(int(count)) for count in counts]
    for group in dict.fromkeys(groups):
        members = [x for x, found in enumerate(groups) if found == group]
        middle = (members[0] + members[-1]) / 2
        axes.text(middle, 1.01, group, transform=axes.get_xaxis_transform(), ha="center", va="bottom", color="0.4",
                  fontsize=8)  # fmt: skip
        if members[0] > 0:
            axes.axvline(members[0] - 0.5, color="0.75", linestyle=":", zorder=0)


def reliability_picture(methods: Sequence[Reliability]) -> bytes:
    """PNG with a panel for each method: accuracy of each bin of confidence, and how far it is from the confidence."""
    columns = min(len(methods), 3)
    rows = math.ceil(len(methods) / columns)
    figure = Figure(figsize=(max(6.4, 3.6 * columns), 3.5 * rows + 0.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for index, axes in enumerate(panels.flat):
        if index >= len(methods):
            axes.set_visible(False)
            panels.flat[index - columns].tick_params(labelbottom=True)
            continue
        _plot_reliability(axes, methods[index])
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.supxlabel("confidence: largest probability of an image", fontsize=10)
    # A single panel does not fill the width of the legend, and the figure's own label would be far from it.
    name_axis = panels.flat[0].set_ylabel if len(methods) == 1 else figure.supylabel
    name_axis("share of the images that are right", fontsize=10)
    return _png(figure)


def _plot_reliability(axes: Axes, method: Reliability) -> None:
    bins = len(method.count)
    filled = method.count > 0
    centres = ((np.arange(bins) + 0.5) / bins)[filled]
    confidence, accuracy = method.confidence[filled], method.accuracy[filled]
    width = 0.9 / bins
    axes.bar(centres, accuracy, width, color=BLUE, label="accuracy")
    axes.bar(centres, np.abs(confidence - accuracy), width, bottom=np.minimum(confidence, accuracy), facecolor="none",
             edgecolor=VERMILION, hatch="////", linewidth=0.8, label="gap to the confidence")  # fmt: skip
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="calibrated")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set_title(f"{_plain(method.title)}: ECE {method.ece:.1f} %", fontsize=10)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    # Without the version of matplotlib: the same runs give the same file.
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()
