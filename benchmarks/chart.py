"""The bar charts of the reports: times faster on the left, what else was promised on the right. And other plots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from benchmarks import targets  # noqa: E402
from benchmarks.results import Results  # noqa: E402
from benchmarks.tables import machine_name  # noqa: E402
from benchmarks.targets import CASE  # noqa: E402

# Okabe and Ito's palette, told apart by people who see red and green alike.
BLUE, ORANGE, GREY, BLACK = "#0072B2", "#E69F00", "#999999", "#000000"
GREEN, SKY, VERMILION, PURPLE = "#009E73", "#56B4E9", "#D55E00", "#CC79A7"
BARS = {"ours": ("ltkernels", BLUE), "eager": ("eager torch", ORANGE), "eager-compiled": ("torch.compile", GREY)}
DENSE_BARS = {
    "dense": ("dense mask", ORANGE),
    "dense-compiled": ("dense mask in torch.compile", GREY),
    "dense-float64": ("dense mask in float64", SKY),
}
LINEAR_BARS = {
    "eager": ("eager torch", ORANGE),
    "eager-compiled": ("torch.compile", GREY),
    "torch": ("F.linear_cross_entropy", SKY),
    "torch-chunked": ("F.linear_cross_entropy, chunked", GREEN),
    "liger": ("Liger-Kernel fused", VERMILION),
    "cut": ("cut-cross-entropy", PURPLE),
}
# Beside the variant of ours that computes the same.
CONTRASTIVE_BARS = {
    "eager": ("eager torch", ORANGE, "ours"),
    "eager-compiled": ("torch.compile", GREY, "ours"),
    "simclr-lt": ("SimCLR-LT's formula", SKY, "ours"),
    "pml-ntxent": ("pytorch-metric-learning NTXentLoss", GREEN, "ours-scalar"),
    "lightly": ("lightly NTXentLoss", VERMILION, "ours-scalar"),
    "pml-supcon": ("pytorch-metric-learning SupConLoss", PURPLE, "ours-supcon"),
    "inf-cl": ("Inf-CL", BLACK, "ours-cross"),
}


def draw(results: Results, path: Path) -> None:
    """float32 and upstream gradient 1, where nothing else is said."""
    title, widths, left_axes, right_axes = {
        "margin": ("margin_cross_entropy, forward + backward, float32", (8, 5), _speedups, _traffic),
        "auxiliary": ("auxiliary_cross_entropy, forward + backward", (8, 5), _over_dense, _over_plain),
        "linear": ("linear_margin_cross_entropy, forward + backward, float32", (7, 6), _over_linear, _linear_memory),
        "contrastive": ("contrastive_loss, forward + backward, float32", (7, 5), _over_peers, _rates),
    }[results.family]
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained", width_ratios=widths)
        figure.suptitle(f"{title} - {machine_name(results)}")
        left_axes(left, results)
        right_axes(right, results)
        figure.savefig(path, dpi=110)
        plt.close(figure)


# -------------------------------------------------------------------------------------------------------------- margin


def _speedups(axes: Axes, results: Results) -> None:
    shapes = results.shapes()
    wanted = targets.SPEEDUPS if targets.targets(results) else {}
    peers = ("eager", "eager-compiled")
    bars = {name: (f"over {BARS[name][0]}", BARS[name][1]) for name in peers}
    values = {name: [results.ratio(shape, *CASE, name, "ours") for shape in shapes] for name in peers}
    marks = {name: [wanted[shape][k] if shape in wanted else None for shape in shapes] for k, name in enumerate(peers)}
    _grouped(axes, bars, values, marks)
    axes.axhline(1, color=BLACK, linewidth=0.8, linestyle=":")
    axes.set(title="Times faster", ylabel="time of the other / time of ltkernels", xlabel="N x C")
    _ticks(axes, shapes)
    axes.margins(y=0.12)
    axes.legend(frameon=False)


def _traffic(axes: Axes, results: Results) -> None:
    shapes, width = targets.large_shapes(results), 0.27
    for k, (name, (label, color)) in enumerate(BARS.items()):
        variants = [results.variant(shape, *CASE, name) for shape in shapes]
        left = [i + (k - 1) * width for i in range(len(shapes))]
        axes.bar(left, [v["gb_per_s"] if v else 0.0 for v in variants], width, color=color, label=label)
    lines = {"clone_fresh": ("x.clone() into fresh memory", "-"), "copy_warm": ("copy into warm memory", ":")}
    for rate, (label, style) in lines.items():
        for i, shape in enumerate(shapes):
            height = results.cases.get((shape, *CASE), {}).get(f"{rate}_gb_per_s")
            if height is not None:
                axes.hlines(height, i - 0.45, i + 0.45, BLACK, style, linewidth=1.5, label=None if i else label)
    axes.set(title="Memory traffic", ylabel="GB/s (logits read + gradient written)", xlabel="N x C")
    _ticks(axes, shapes)
    axes.margins(y=0.3)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")


# ----------------------------------------------------------------------------------------------------------- auxiliary


def _over_dense(axes: Axes, results: Results) -> None:
    cases = list(results.cases)
    values = {name: [results.ratio(*case, name, "ours") for case in cases] for name in DENSE_BARS}
    wanted = {target.text.split(":")[0]: target.wanted for target in targets.targets(results) if not target.at_most}
    marks = {"dense": [wanted.get(shape) if dtype == "float32" else None for shape, dtype, _ in cases]}
    bars = {name: (f"over {label}", color) for name, (label, color) in DENSE_BARS.items()}
    _grouped(axes, bars, values, marks)
    axes.axhline(1, color=BLACK, linewidth=0.8, linestyle=":")
    axes.set(title="Times faster", ylabel="time of the other / time of ltkernels", xlabel="N x K")
    _case_ticks(axes, cases)
    axes.margins(y=0.3)
    axes.legend(frameon=False, ncols=2, loc="upper left")


def _over_plain(axes: Axes, results: Results) -> None:
    cases = list(results.cases)
    values = {"ours": [results.ratio(*case, "ours", "plain") for case in cases]}
    wanted = bool(targets.targets(results))
    marks = {"ours": [targets.OVER_PLAIN if wanted and dtype == "float32" else None for _, dtype, _ in cases]}
    _grouped(axes, {"ours": ("ltkernels", BLUE)}, values, marks, form="{:.2f}", mark="target: at most")
    axes.axhline(1, color=BLACK, linewidth=0.8, linestyle=":")
    axes.set(title="What silencing costs", ylabel="time / time of the plain margin kernel", xlabel="N x K")
    _case_ticks(axes, cases)
    axes.margins(y=0.3)
    axes.legend(frameon=False, loc="upper left")


# -------------------------------------------------------------------------------------------------------------- linear


def _over_linear(axes: Axes, results: Results) -> None:
    shapes = results.shapes()
    values = {name: [results.ratio(shape, *CASE, name, "ours") for shape in shapes] for name in LINEAR_BARS}
    bars = {name: bar for name, bar in LINEAR_BARS.items() if any(values[name])}
    marks = {}
    if targets.targets(results):  # limits on our time over theirs, here the other way round
        marks["eager"] = [1 / targets.OVER_EAGER[s] if s in targets.OVER_EAGER else None for s in shapes]
        marks["torch-chunked"] = [1 / targets.OVER_TORCH_CHUNKED if s in targets.OVER_EAGER else None for s in shapes]
    _grouped(axes, bars, values, marks)
    axes.axhline(1, color=BLACK, linewidth=0.8, linestyle=":")
    axes.set(title="Times faster", ylabel="time of the other / time of ltkernels", xlabel="N x D x C")
    _ticks(axes, shapes)
    axes.margins(y=0.3)
    axes.legend(frameon=False, ncols=2, loc="upper left")


def _linear_memory(axes: Axes, results: Results) -> None:
    shapes = results.shapes()
    all_bars = {"ours": BARS["ours"]} | LINEAR_BARS
    shares = {name: [targets.share_of_logits(results, s, "float32", name) for s in shapes] for name in all_bars}
    bars = {name: bar for name, bar in all_bars.items() if any(shares[name])}
    axes.set_yscale("log")
    wanted = targets.SHARE_OF_LOGITS if targets.targets(results) else None
    marks = {"ours": [wanted if shape == targets.LINEAR_MEMORY_SHAPE else None for shape in shapes]}
    _grouped(axes, bars, shares, marks, form="{:.2g}", mark="target: at most")
    axes.axhline(1, color=BLACK, linewidth=0.8, linestyle=":")
    label = "beyond inputs and gradients / N x C logits"
    axes.set(title="Peak memory", ylabel=label, xlabel="N x D x C")
    _ticks(axes, shapes)
    axes.margins(y=0.4)
    if bars:
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")


# --------------------------------------------------------------------------------------------------------- contrastive


def _over_peers(axes: Axes, results: Results) -> None:
    shapes = results.shapes()
    values = {
        name: [results.ratio(shape, *CASE, name, same) for shape in shapes]
        for name, (_, _, same) in CONTRASTIVE_BARS.items()
    }
    bars = {name: bar[:2] for name, bar in CONTRASTIVE_BARS.items() if any(values[name])}
    wanted = targets.CONTRASTIVE_SPEEDUPS if targets.targets(results) else {}
    marks = {name: [wanted.get(shape, {}).get(name) for shape in shapes] for name in bars}
    axes.set_yscale("log")
    _grouped(axes, bars, values, marks)
    axes.axhline(1, color=BLACK, linewidth=0.8, linestyle=":")
    label = "time of the other / time of ltkernels doing the same"
    axes.set(title="Times faster", ylabel=label, xlabel="M x D")
    _ticks(axes, shapes)
    axes.margins(y=0.5)
    if bars:
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")


def _rates(axes: Axes, results: Results) -> None:
    shapes = [shape for shape in results.shapes() if targets.product_rate(results, shape, "float32")]
    shares = {name: [targets.share_of_product(results, s, "float32", name) for s in shapes] for name in BARS}
    bars = {name: bar for name, bar in BARS.items() if any(shares[name])}
    wanted = targets.SHARE_OF_PRODUCT if targets.targets(results) else None
    marks = {"ours": [wanted if shape == targets.PRODUCT_SHAPE else None for shape in shapes]}
    _grouped(axes, bars, shares, marks, form="{:.2f}")
    axes.axhline(1, color=BLACK, linewidth=0.8, linestyle=":")
    axes.set(title="Rate, counting 6 M\u00b2 D operations", ylabel="over that of a matrix product", xlabel="M x D")
    _ticks(axes, shapes)
    axes.margins(y=0.3)
    if bars:
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")


def draw_scaling(results: Results, path: Path) -> None:
    """Time and peak memory over M, at the D that has most shapes; float32, and ours in bfloat16 too."""
    widths = [shape.split("x")[1] for shape in results.shapes()]
    width = max(dict.fromkeys(widths), key=widths.count)
    lines = {("float32", name): bar[:2] for name, bar in ({"ours": BARS["ours"]} | CONTRASTIVE_BARS).items()}
    lines["bfloat16", "ours"] = ("ltkernels, bfloat16", BLUE)
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained", sharex=True)
        figure.suptitle(f"contrastive_loss, forward + backward, D = {width} - {machine_name(results)}")
        for axes, what, unit in ((left, "median_s", 1e3), (right, "peak_memory_bytes", 1e-6)):
            _lines(axes, results, width, lines, what, unit)
        left.set(title="Time", ylabel="ms")
        right.set(title="Peak memory beyond inputs and gradients", ylabel="MB")
        handles, labels = left.get_legend_handles_labels()
        rows, of = targets.CONTRASTIVE_MEMORY_SHAPE.split("x")
        if targets.targets(results) and of == width and targets.CONTRASTIVE_MEMORY_SHAPE in results.shapes():
            place = [int(rows)], [targets.CONTRASTIVE_MEGABYTES]
            handles += right.plot(*place, "_", color=BLACK, markersize=18, markeredgewidth=2)
            labels.append("target: at most")
        if handles:
            figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside right center")
        figure.savefig(path, dpi=110)
        plt.close(figure)


PLOTS: dict[str, dict[str, tuple[Callable[[Results, Path], None], str]]] = {
    "contrastive": {"scaling": (draw_scaling, "Time and memory over the number of rows")}
}


# --------------------------------------------------------------------------------------------------------------- parts


def _lines(
    axes: Axes, results: Results, width: str, lines: dict[tuple[str, str], tuple[str, str]], what: str, unit: float
) -> None:
    """A line for each dtype and variant over M, both axes logarithmic."""
    counts = sorted(int(rows) for rows, d in (shape.split("x") for shape in results.shapes()) if d == width)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for (dtype, name), (label, color) in lines.items():
        found = [results.variant(f"{rows}x{width}", dtype, "upstream1", name) or {} for rows in counts]
        there = [(rows, one[what] * unit) for rows, one in zip(counts, found, strict=True) if one.get(what)]
        if there:
            style = "-" if dtype == "float32" else "--"
            axes.plot(*zip(*there, strict=True), style, marker="o", markersize=4, color=color, label=label)
    axes.set_xticks(counts, map(str, counts))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.set(xlabel="M")


def _grouped(
    axes: Axes,
    bars: dict[str, tuple[str, str]],  # label and colour by name
    values: dict[str, Sequence[float | None]],
    marks: dict[str, Sequence[float | None]],  # targets, as lines across bars
    form: str = "{:.1f}",
    mark: str = "target",
) -> None:
    """A group of bars for each place, a bar for each name; places without a value stay empty."""
    many = len(bars) > 5
    width = (0.9 if many else 0.76) / max(1, len(bars))
    places = max(map(len, values.values()), default=0)
    # Side by side around their place, without gaps. On a logarithmic axis no bar can be of height 0.
    there = [[name for name in bars if i < len(values[name]) and values[name][i]] for i in range(places)]
    label: str | None = mark
    for name, (text, color) in bars.items():
        own = [i for i in range(places) if name in there[i]]
        middle = {i: i + (there[i].index(name) - (len(there[i]) - 1) / 2) * width for i in own}
        axes.bar([*middle.values()], [values[name][i] for i in own], width, color=color, label=text)
        # At the foot of the bars, where no target crosses them.
        look = dict(ha="center", va="bottom", fontsize=6 if many else 7, color="white" if color == BLUE else BLACK)
        foot = dict(xycoords=axes.get_xaxis_transform(), xytext=(0, 3), textcoords="offset points")
        for i in own:
            number = form.format(values[name][i]) if values[name][i] < 100 else f"{values[name][i]:.0f}"
            axes.annotate(number, (middle[i], 0), **foot, **look)
            wanted = marks[name][i] if name in marks and i < len(marks[name]) else None
            if wanted:
                axes.hlines(wanted, middle[i] - width / 2, middle[i] + width / 2, color=BLACK, linewidth=2, label=label)
                label = None


def _ticks(axes: Axes, shapes: Iterable[str]) -> None:
    names = [shape.replace("x", " x\n") for shape in shapes]
    axes.set_xticks(range(len(names)), names)


def _case_ticks(axes: Axes, cases: Sequence[tuple[str, str, str]]) -> None:
    axes.set_xticks(range(len(cases)), [f"{shape.replace('x', ' x ')}\n{dtype}" for shape, dtype, _ in cases])
