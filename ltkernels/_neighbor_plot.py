"""Pictures of neighbour maps. Needs matplotlib; imported by ``NeighborMap.plot`` only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ltkernels._checks import ClassCounts, class_counts_of
from ltkernels._neighbor_pairs import checked_names

if TYPE_CHECKING:
    from ltkernels.neighbors import NeighborMap

DOT, BAR, COUNT = "#1f4e79", "#8fb3d4", "#c05a1c"
LABELLED = 40  # rows or columns that have room for a label each


def draw(
    neighbors: NeighborMap,
    path: str | os.PathLike[str],
    class_counts: ClassCounts | None,
    class_names: Sequence[str] | None,
) -> None:
    """Target classes downwards, auxiliary classes to the right, numbers of each target class beside them."""
    classes = neighbors.num_classes
    names = _labels(class_names, classes)
    counts = None if class_counts is None else class_counts_of(class_counts).cpu().numpy()
    if counts is not None and counts.shape != (classes,):
        raise ValueError(f"class_counts: expected shape ({classes},), got {counts.shape}")
    targets = np.arange(classes) if counts is None else np.argsort(-counts, kind="stable")

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    FigureCanvasAgg(figure)  # pyplot would keep the figure, and may open a window
    panels = figure.subplots(
        1, 2 if counts is None else 3, sharey=True, width_ratios=[6, 1.3] if counts is None else [6, 1.3, 1.3]
    )
    _dots(panels[0], neighbors, targets)
    _bars(panels[1], np.diff(neighbors.rows().offsets[: classes + 1].numpy())[targets])
    if counts is not None:
        _counts(panels[2], counts[targets])
    _label_targets(panels[0], targets, names, counts is not None)
    figure.savefig(path, dpi=150)


def _labels(class_names: Sequence[str] | None, classes: int) -> list[str]:
    if class_names is None:
        return [str(number) for number in range(classes)]
    names = checked_names("class_names", class_names)
    if len(names) != classes:
        raise ValueError(f"class_names: expected {classes} names, got {len(names)}")
    return [name.replace("$", r"\$") for name in names]  # not mathematics


def _dots(axes: Axes, neighbors: NeighborMap, targets: np.ndarray) -> None:
    classes, auxiliary = neighbors.num_classes, neighbors.num_auxiliary
    target, number = neighbors.pairs().numpy().T
    place = np.empty(classes, dtype=np.int64)
    place[targets] = np.arange(classes)
    first = np.full(auxiliary, classes)  # place of the first anchor; those without one come last
    np.minimum.at(first, number - classes, place[target])
    order = np.argsort(first, kind="stable")
    column = np.empty(auxiliary, dtype=np.int64)
    column[order] = np.arange(auxiliary)

    # A dot fills three quarters of its row or column where these are wide, and stays visible where they are not.
    points = 0.75 * min(72 * 7.5 / max(auxiliary, 1), 72 * 5.5 / classes)
    size = float(np.clip(points, 1.8, 11))
    axes.plot(column[number - classes], place[target], "s", ms=size, mew=0, color=DOT)
    anchored = int((first < classes).sum())
    if anchored < auxiliary:
        axes.axvspan(anchored - 0.5, auxiliary - 0.5, color="0.92", zorder=0, lw=0)
        if auxiliary - anchored > 0.12 * auxiliary:
            axes.text((anchored + auxiliary - 1) / 2, (classes - 1) / 2, "no anchor", ha="center", color="0.45")
    axes.set_xlim(-0.5, max(auxiliary, 1) - 0.5)
    axes.set_xlabel("auxiliary classes, sorted by their first anchor")
    if auxiliary <= LABELLED:
        axes.set_xticks(range(auxiliary), [str(classes + k) for k in order], rotation=90 if auxiliary > 20 else 0)
    if auxiliary <= LABELLED and classes <= LABELLED:
        axes.grid(color="0.9", lw=0.6)
    axes.set_axisbelow(True)
    axes.set_title(
        f"{len(target)} pairs of {classes} target and {auxiliary} auxiliary classes; "
        f"{auxiliary - anchored} without an anchor",
        fontsize=10,
        loc="left",
    )


def _bars(axes: Axes, numbers: np.ndarray) -> None:
    _profile(axes, numbers)
    if len(numbers) > LABELLED:
        groups = np.array_split(np.arange(len(numbers)), 20)
        axes.plot([numbers[g].mean() for g in groups], [g.mean() for g in groups], color=DOT, lw=2)
    axes.set_xlim(0, max(1, numbers.max()) * 1.08)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlabel("neighbours")
    axes.set_title(f"mean {numbers.mean():.1f}", fontsize=10)


def _counts(axes: Axes, counts: np.ndarray) -> None:
    _profile(axes, counts, COUNT)
    if counts.max() > 10 * counts.min():
        axes.set_xscale("log")
        axes.set_xlim(min(1, counts.min()) * 0.8, counts.max() * 1.3)
    axes.set_xlabel("training samples")


def _profile(axes: Axes, values: np.ndarray, color: str = BAR) -> None:
    """A bar for each row, without gaps where they would be thinner than a pixel."""
    if len(values) <= LABELLED:
        axes.barh(range(len(values)), values, height=0.7, color=color)
    else:
        axes.stairs(values, np.arange(len(values) + 1) - 0.5, orientation="horizontal", fill=True, color=color)
    axes.tick_params(left=False)
    axes.spines[["top", "right"]].set_visible(False)


def _label_targets(axes: Axes, targets: np.ndarray, names: list[str], by_count: bool) -> None:
    axes.set_ylim(len(targets) - 0.5, -0.5)
    if len(targets) <= LABELLED:
        axes.set_yticks(range(len(targets)), [_short(names[k]) for k in targets])
        axes.set_ylabel("target class, most samples first" if by_count else "target class")
    else:
        axes.set_ylabel("rank of the target class, most samples first" if by_count else "target class")


def _short(name: str, length: int = 24) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
