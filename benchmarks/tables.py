"""What all reports are made of: Markdown tables, numbers in them, the machine, the targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from benchmarks.results import Results
from benchmarks.targets import targets

NOISY = 0.2  # interquartile range over median
# What the machine's description calls them.
PACKAGES = {
    "Triton": "triton",
    "Liger-Kernel": "liger_kernel",
    "cut-cross-entropy": "cut_cross_entropy",
    "pytorch-metric-learning": "pytorch_metric_learning",
    "lightly": "lightly",
    "Inf-CL": "inf_cl",
}


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_times(shape: str) -> str:
    return shape.replace("x", " x ")


def time_of(results: Results, shape: str, dtype: str, upstream: str, name: str) -> str:
    variant = results.variant(shape, dtype, upstream, name)
    if variant is None:
        return ""
    microseconds = variant["median_s"] * 1e6
    if microseconds < 999.5:
        text = f"{microseconds:.3g} us"
    else:
        milliseconds = microseconds / 1e3
        text = f"{_three_digits(milliseconds)} ms" if milliseconds < 9999.5 else f"{milliseconds / 1e3:.3g} s"
    return text + (" ~" if variant["iqr_s"] > NOISY * variant["median_s"] else "")


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _optional(form: str) -> Callable[[float | None], str]:
    return lambda value: "" if value is None else form.format(value)


times, number, rate = _optional("{:.2f}x"), _optional("{:.4g}"), _optional("{:.1f}")


def megabytes(count: float | None) -> str:
    return "" if count is None else f"{count / 1e6:,.1f}"


def machine_name(results: Results) -> str:
    """The GPU, or the processor, its cores and the instruction set that torch uses: one name stands for many."""
    m = results.machine
    return m["name"] if m["device"] == "cuda" else f"{m['name']}, {m['cores']} cores ({m['cpu_capability']})"


def head(results: Results, title: str, what: str) -> str:
    """The title, where and when, and how it was measured; ``what`` comes after that."""
    m = results.machine
    optional = {name: m.get(key) for name, key in PACKAGES.items()}
    versions = [f"torch {m['torch']}", *(f"{name} {v}" for name, v in optional.items() if v), f"Python {m['python']}"]
    revision = f"commit {m.get('revision') or 'unknown'}, "
    pages = f" Transparent huge pages: {m['huge_pages']}." if m.get("huge_pages") and m["device"] == "cpu" else ""
    rounds = min(v["rounds"] for case in results.cases.values() for v in case["variants"].values())
    before = (
        " Each timed run follows an untimed one of the same variant, as in a training loop." if m.get("settled") else ""
    )
    smoke = "\n\n**A smoke run: the numbers mean nothing.**" if m.get("quick") else ""
    return (
        f"# {title} on {machine_name(results)}\n\n"
        f"{m['date']}, {revision}{', '.join(versions)}, {m['threads']} CPU threads, {m['system']}.{pages}{smoke}\n\n"
        f"Forward and backward, at least {rounds} rounds: medians of the times, and medians of the ratios within a "
        "round, so that what the machine does meanwhile hits both sides of a ratio alike. All variants of a shape and "
        "upstream gradient, in both dtypes, are timed in one loop, in a new random order each round, after each has "
        f"been checked against the definition in float64.{before} "
        f"`~` marks an interquartile range above {NOISY:.0%} of the median. {what}"
    )


def targets_table(results: Results) -> str:
    found = targets(results)
    if not found:
        return ""
    caveats = list(dict.fromkeys(t.caveat for t in found if t.caveat))
    rows = []
    for t in found:
        mark = f" [{caveats.index(t.caveat) + 1}]" if t.caveat else ""
        beside = "" if t.beside is None else f" ({number(t.beside)})"
        rows.append([t.text + mark, t.wanted_text, number(t.measured) + beside, t.verdict])
    met = sum(target.verdict == "met" for target in found)
    columns = ["float32 and upstream gradient 1 unless said otherwise", "wanted", "measured", ""]
    below = "".join(f"\n\n[{k}] {caveat}" for k, caveat in enumerate(caveats, 1))
    return f"## Targets: {met} of {len(rows)} met\n\n{table(columns, rows)}{below}"


def timings(results: Results, labels: Mapping[str, str], dtype: str, upstream: str, title: str, column: str) -> str:
    """A section with the times of all variants; empty where there are none."""
    shapes = [shape for shape in results.shapes() if (shape, dtype, upstream) in results.cases]
    if not shapes:
        return ""
    names = present(results, labels, dtype)
    rows = [[by_times(s), *(time_of(results, s, dtype, upstream, name) for name in names)] for s in shapes]
    return f"## Times: {title}\n\n{table([column, *(labels[name] for name in names)], rows)}"


def memory(
    results: Results, labels: Mapping[str, str], upstreams: Mapping[str, str], column: str, matrix: str = "logits"
) -> str:
    """A section with the peaks; ``upstreams`` names those that have one. Empty where none was measured."""
    cases = [case for (_, _, upstream), case in results.cases.items() if upstream in upstreams]
    cases = [case for case in cases if any("peak_memory_bytes" in v for v in case["variants"].values())]
    names, order = present(results, labels), list(upstreams)
    several = len(upstreams) > 1
    rows = [
        [by_times(case["shape"]), case["dtype"], *([upstreams[case["upstream"]]] if several else [])]
        + [megabytes(case["bytes"] / 2)]
        + [megabytes(case["variants"].get(name, {}).get("peak_memory_bytes")) for name in names]
        for case in sorted(cases, key=lambda case: order.index(case["upstream"]))
    ]
    if not rows:
        return ""
    columns = [column, "dtype", *(["upstream"] if several else []), matrix, *(labels[name] for name in names)]
    return f"## Peak memory beyond inputs and returned gradients, MB\n\n{table(columns, rows)}"


def present(results: Results, labels: Mapping[str, str], dtype: str | None = None) -> list[str]:
    """The variants that there are results of, in the order of ``labels``."""
    cases = [case for case in results.cases.values() if dtype in (None, case["dtype"])]
    names = {name for case in cases for name in case["variants"]}
    return [name for name in labels if name in names]
