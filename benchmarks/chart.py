"""The bar chart of a report."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from benchmarks import targets  # noqa: E402
from benchmarks.results import Results  # noqa: E402

# Okabe and Ito's palette, told apart by people who see red and green alike.
BLUE, ORANGE, GREY, BLACK = "#0072B2", "#E69F00", "#999999", "#000000"
BARS = {"ours": ("ltkernels", BLUE), "eager": ("eager torch", ORANGE), "eager-compiled": ("torch.compile", GREY)}
_CASE = ("float32", "upstream1")


def draw(results: Results, path: Path) -> None:
    """Speed-ups over plain torch, and memory traffic against copies of the same size; float32, upstream gradient 1."""
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained", width_ratios=(8, 5))
        figure.suptitle(f"margin_cross_entropy, forward + backward, float32 - {results.machine['name']}")
        _speedups(left, results)
        _traffic(right, results)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _speedups(axes: Axes, results: Results) -> None:
    shapes, width = results.shapes(), 0.38
    with_targets = bool(targets.targets(results))
    for k, name in enumerate(("eager", "eager-compiled")):
        label, color = BARS[name]
        ratios = [results.ratio(shape, *_CASE, name, "ours") or 0.0 for shape in shapes]
        left = [i + (k - 0.5) * width for i in range(len(shapes))]
        axes.bar(left, ratios, width, color=color, label=f"over {label}")
        # At the foot of the bars, where no target crosses them.
        for x, ratio in zip(left, ratios, strict=True):
            if ratio:
                where = dict(xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8)
                axes.annotate(f"{ratio:.1f}", (x, 0), **where)
        for x, shape in zip(left, shapes, strict=True):
            if with_targets and shape in targets.SPEEDUPS:
                first = k == 0 and shape == next(iter(targets.SPEEDUPS))
                wanted = targets.SPEEDUPS[shape][k]
                reach = (x - width / 2, x + width / 2)
                axes.hlines(wanted, *reach, color=BLACK, linewidth=2, label="target" if first else None)
    axes.axhline(1, color=BLACK, linewidth=0.8, linestyle=":")
    axes.set(title="Times faster", ylabel="time of the other / time of ltkernels", xlabel="N x C")
    axes.set_xticks(range(len(shapes)), [shape.replace("x", " x\n") for shape in shapes])
    axes.margins(y=0.12)
    axes.legend(frameon=False)


def _traffic(axes: Axes, results: Results) -> None:
    shapes, width = targets.large_shapes(results), 0.27
    for k, (name, (label, color)) in enumerate(BARS.items()):
        variants = [results.variant(shape, *_CASE, name) for shape in shapes]
        left = [i + (k - 1) * width for i in range(len(shapes))]
        axes.bar(left, [v["gb_per_s"] if v else 0.0 for v in variants], width, color=color, label=label)
    lines = {"clone_fresh": ("x.clone() into fresh memory", "-"), "copy_warm": ("copy into warm memory", ":")}
    for rate, (label, style) in lines.items():
        for i, shape in enumerate(shapes):
            height = results.cases.get((shape, *_CASE), {}).get(f"{rate}_gb_per_s")
            if height is not None:
                axes.hlines(height, i - 0.45, i + 0.45, BLACK, style, linewidth=1.5, label=None if i else label)
    axes.set(title="Memory traffic", ylabel="GB/s (logits read + gradient written)", xlabel="N x C")
    axes.set_xticks(range(len(shapes)), [shape.replace("x", " x\n") for shape in shapes])
    axes.margins(y=0.3)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
