"""Pictures of ELM: how tight classes are over their training images, and test embeddings in the plane."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.decomposition import PCA

from ltkernels.trainer import TrainerError
from ltkernels.trainer.metrics import Outputs
from ltkernels.trainer.papers.elm_measures import ElmMeasures
from ltkernels.trainer.report import mark_groups

_COLOURS = ("#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # told apart by colour-blind readers
_MARKERS = ("o", "s", "^", "D", "v", "P")
FEW_CLASSES = 20  # classes that a line can join one by one; more are averaged in bins
_BINS = 10
_EACH = 3  # head classes, and tail classes, of a projection
SHOWN = 200  # images of a class in a projection: more would hide each other


# Spread over class counts


def spread_picture(measures: Mapping[str, Sequence[ElmMeasures]]) -> bytes:
    """PNG of spread and relative spread of every class over its training images, a colour for each method.

    Args:
        measures: Measures of each method by its title, one for each seed. Classes are means over seeds. Up to 20 are
            joined by a line, with the standard error over seeds; of more, the line is the mean of a tenth of the
            classes at a time.

    Raises:
        TrainerError: no measures, a method without any, or methods with different class counts.
    """
    if not measures or not all(measures.values()):
        raise TrainerError("measures: expected one method or more, and measures of one seed or more of each")
    counts = next(iter(measures.values()))[0].class_counts
    if any(found.class_counts.tolist() != counts.tolist() for seeds in measures.values() for found in seeds):
        raise TrainerError("measures: expected the same class counts of every method and seed")
    figure = Figure(figsize=(11, 5.1), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)  # pyplot would keep the figure, and may open a window
    panels = figure.subplots(1, 2)
    labels = {
        "spread": "mean squared distance to the class mean",
        "relative_spread": "spread / squared distance to the nearest mean",
    }
    for axes, (name, label) in zip(panels, labels.items(), strict=True):
        for index, (title, seeds) in enumerate(measures.items()):
            values = np.stack([getattr(found, name).numpy() for found in seeds])
            # Methods stand side by side at a class, or their error bars would hide each other.
            side = 1.015 ** (len(measures) - 1 - 2 * index)
            _plot_method(axes, side * counts.double().numpy(), values, title, index)
        _finish(axes, counts.numpy(), name.replace("_", " ").capitalize(), label)
    handles, titles = panels[0].get_legend_handles_labels()
    figure.legend(handles, titles, loc="outside lower center", ncols=len(titles), frameon=False)
    return _png(figure)


def _plot_method(axes: Axes, counts: np.ndarray, values: np.ndarray, title: str, index: int) -> None:
    """Values (S, C) of S seeds."""
    colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
    order = np.argsort(-counts, kind="stable")
    x, mean = counts[order], values.mean(0)[order]
    line = dict(label=title, color=colour, marker=marker, markersize=5, linewidth=1.8)
    if len(counts) <= FEW_CLASSES:
        error = values.std(0, ddof=1)[order] / math.sqrt(len(values)) if len(values) > 1 else np.zeros_like(mean)
        axes.errorbar(x, mean, error, elinewidth=1, capsize=2, **line)
        return
    axes.plot(x, mean, marker, color=colour, markersize=3, alpha=0.25, markeredgewidth=0)
    bins = np.array_split(np.arange(len(counts)), _BINS)
    axes.plot([np.exp(np.log(x[b]).mean()) for b in bins], [mean[b].mean() for b in bins], **line)


def _finish(axes: Axes, counts: np.ndarray, title: str, label: str) -> None:
    axes.set_xscale("log")
    axes.set_xlim(counts.max() * 1.15, counts.min() / 1.15)  # the largest class on the left, as in the tables
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
             if counts.min() / 1.15 <= tick <= counts.max() * 1.15]  # fmt: skip
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("training images of the class (log scale)")
    axes.set_ylabel(label)
    axes.set_title(title, pad=20)
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    mark_groups(axes, sorted(counts.tolist(), reverse=True))


# Test embeddings in the plane


def head_and_tail(class_counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """The three classes with most training images and the three with fewest, of equal ones the lower number first.

    Raises:
        TrainerError: there are fewer than six classes.
    """
    if len(class_counts) < 2 * _EACH:
        raise TrainerError(f"class_counts: expected {2 * _EACH} classes or more, got {len(class_counts)}")
    order = sorted(range(len(class_counts)), key=lambda label: (-class_counts[label], label))
    return order[:_EACH], order[-_EACH:]


def projection_picture(
    tests: Mapping[str, Outputs], class_counts: Sequence[int], class_names: Sequence[str] = ()
) -> bytes:
    """PNG of the test embeddings of three head and three tail classes, a panel for each method.

    Embeddings of length 1 are projected on the two principal components of the six classes, of each method by itself;
    the panels have one scale, so that distances compare. Labels have no part in the projection: one that separates
    the classes on purpose would show what it was asked for.

    Args:
        tests: Outputs for the test images by the title of the method.
        class_counts: (C,) training images of each class.
        class_names: (C,), or none.

    Raises:
        TrainerError: no outputs, fewer than six classes, names of another number, a class without test images.
    """
    head, tail = head_and_tail(class_counts)
    if not tests:
        raise TrainerError("tests: expected outputs of one method or more, got none")
    if class_names and len(class_names) != len(class_counts):
        raise TrainerError(f"class_names: expected {len(class_counts)} names, got {len(class_names)}")
    projections = {title: _project(title, outputs, head + tail) for title, outputs in tests.items()}
    reach = 1.05 * max(np.abs(points).max() for points, _, _ in projections.values())

    figure = Figure(figsize=(max(6.4, 4.3 * len(tests)), 5.9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(tests), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (title, (points, target, share)) in zip(panels, projections.items(), strict=True):
        _scatter(axes, points, target, head + tail)
        axes.set_title(f"{title}\n{share:.0%} of the variance", fontsize=10)
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        axes.tick_params(labelsize=8)
    _legend(figure, head + tail, class_counts, class_names)
    return _png(figure)


def _project(title: str, outputs: Outputs, labels: list[int]) -> tuple[np.ndarray, np.ndarray, float]:
    """Points (M, 2), their classes (M,) and their share of the variance."""
    target = outputs.target.cpu().numpy()
    for label in labels:
        if not (target == label).any():
            raise TrainerError(f"{title}: expected test images of class {label}, got none")
    chosen = np.isin(target, labels)
    embedding = F.normalize(outputs.embedding.double().cpu(), dim=1).numpy()[chosen]
    pca = PCA(n_components=2, svd_solver="full")
    points = pca.fit_transform(embedding)
    return points, target[chosen], float(pca.explained_variance_ratio_.sum())


def _scatter(axes: Axes, points: np.ndarray, target: np.ndarray, labels: list[int]) -> None:
    for index, label in enumerate(labels):
        of_class = points[target == label]
        x, y = of_class[:SHOWN].T
        axes.plot(x, y, color=_class_colour(index), alpha=0.6, ms=4, mew=0, **_class_marker(index))
    for index, label in enumerate(labels):  # above all points
        x, y = points[target == label].mean(0)
        axes.plot(x, y, color=_class_colour(index), ms=10, mew=1.5, mec="black", **_class_marker(index))


def _class_colour(index: int) -> str:
    """Blues and green for the head, reds and yellow for the tail."""
    return ("#0b3c6f", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#e0a800")[index]


def _class_marker(index: int) -> dict[str, str]:
    return {"marker": "o" if index < _EACH else "^", "linestyle": "none"}


def _legend(figure: Figure, labels: list[int], counts: Sequence[int], names: Sequence[str]) -> None:
    handles = []
    for index, label in enumerate(labels):
        name = names[label].replace("$", r"\$") if names else f"class {label}"
        text = f"{'head' if index < _EACH else 'tail'}: {name} ({counts[label]})"
        handles.append(Line2D([], [], color=_class_colour(index), ms=8, label=text, **_class_marker(index)))
    # Columns fill downwards: the head above, the tail below.
    by_column = [handle for pair in zip(handles[:_EACH], handles[_EACH:], strict=True) for handle in pair]
    legend = figure.legend(handles=by_column, loc="outside lower center", ncols=_EACH, frameon=False, fontsize=9)
    legend.set_title("class (training images); large symbols: mean of the test images", {"size": 9})


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
