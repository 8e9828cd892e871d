"""Turns the JSON of a benchmark run into a Markdown report, a bar chart and a small JSON, all fit to be committed.

    python -m benchmarks.report [JSON ...] [--out FOLDER] [--name NAME]

Several files are merged if they are of one machine; a file that this program has written may be given again. NAME is
that of the first file, without "-raw".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import targets
from benchmarks.results import Results, ResultsError, load
from benchmarks.targets import SPEEDUPS

RESULTS = Path(__file__).parent / "results"
NOISY = 0.2  # interquartile range over median

LABELS = {
    "ours": "ltkernels",
    "ours-compiled": "ltkernels in torch.compile",
    "eager": "eager torch",
    "eager-compiled": "torch.compile",
    "liger": "Liger-Kernel",
    "ldam-ours": "LDAM, ltkernels",
    "ldam-authors": "LDAM, authors' formula",
    "linear-ours": "linear, then ltkernels",
    "linear-eager": "linear, then eager torch",
    "linear-liger": "linear, Liger-Kernel fused",
    "linear-cce": "linear, cut-cross-entropy",
}
UPSTREAMS = {
    "upstream1": "upstream gradient 1",
    "half": "`(loss * 0.5).backward()`",
    "none": '`reduction="none"`, one upstream gradient a row',
}


def markdown(results: Results) -> str:
    sections = [
        _introduction(results),
        main_table(results),
        _targets(results),
        _traffic(results),
        _ldam(results),
        _memory(results),
        *(_timings(results, dtype, upstream) for dtype in ("float32", "bfloat16") for upstream in UPSTREAMS),
        _tests(results),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _introduction(results: Results) -> str:
    m = results.machine
    where = m["name"] if m["device"] == "cuda" else f"{m['name']}, {m['cores']} cores ({m['cpu_capability']})"
    packages = {"Triton": "triton", "Liger-Kernel": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}
    optional = {name: m.get(key) for name, key in packages.items()}
    versions = [f"torch {m['torch']}", *(f"{name} {v}" for name, v in optional.items() if v), f"Python {m['python']}"]
    pages = f" Transparent huge pages: {m['huge_pages']}." if m.get("huge_pages") and m["device"] == "cpu" else ""
    rounds = min(v["rounds"] for case in results.cases.values() for v in case["variants"].values())
    smoke = "\n\n**A smoke run: the numbers mean nothing.**" if m.get("quick") else ""
    return (
        f"# margin_cross_entropy on {where}\n\n"
        f"{m['date']}, {', '.join(versions)}, {m['threads']} CPU threads, {m['system']}.{pages}{smoke}\n\n"
        f"Forward and backward, N x C logits, medians of at least {rounds} rounds. All variants of a shape and "
        "upstream gradient, in both dtypes, are timed in one loop, in a new random order each round, after each has "
        "been checked against the definition in float64. "
        f"`~` marks an interquartile range above {NOISY:.0%} of the median. "
        "eager torch is `F.cross_entropy(logits + bias, target)`; torch.compile is that function compiled."
    )


def main_table(results: Results) -> str:
    case = ("float32", "upstream1")
    wants_targets = bool(targets.targets(results))
    rows = []
    for shape in results.shapes():
        ratios = [results.ratio(shape, *case, name, "ours") for name in ("eager", "eager-compiled")]
        wanted = SPEEDUPS.get(shape) if wants_targets else None
        rows.append(
            [
                shape.replace("x", " x "),
                *(_time(results, shape, *case, name) for name in ("ours", "eager", "eager-compiled")),
                *(_times(r) + (f" (>= {w})" if w else "") for r, w in zip(ratios, wanted or (0, 0), strict=True)),
            ]
        )
    head = ["N x C", "ltkernels", "eager torch", "torch.compile", "over eager", "over torch.compile"]
    title = "## float32, logit bias, upstream gradient 1"
    return f"{title}\n\n{_table(head, rows)}" + ("\n\nIn brackets: the target." if wants_targets else "")


def _targets(results: Results) -> str:
    rows = [[t.text, f"{t.wanted:g}", _number(t.measured), t.verdict] for t in targets.targets(results)]
    if not rows:
        return ""
    met = sum(row[-1] == "met" for row in rows)
    head = ["float32 and upstream gradient 1 unless said otherwise", "at least", "measured", ""]
    return f"## Targets: {met} of {len(rows)} met\n\n{_table(head, rows)}"


def _traffic(results: Results) -> str:
    rows = []
    for shape in targets.large_shapes(results):
        for dtype in ("float32", "bfloat16"):
            case = results.cases.get((shape, dtype, "upstream1"))
            if case and "ours" in case["variants"]:
                rates = [case.get(f"{name}_gb_per_s") for name in ("clone_fresh", "clone_huge", "copy_warm")]
                share = targets.share_of_clone(results, shape, dtype)
                ours = case["variants"]["ours"]["gb_per_s"]
                rows.append([shape.replace("x", " x "), dtype, *map(_rate, [ours, *rates]), f"{share:.0%}"])
    if not rows:
        return ""
    head = ["N x C", "dtype", "ltkernels", "clone, fresh", "clone, fresh huge pages", "copy, warm", "of clone, fresh"]
    return (
        "## Memory traffic\n\nGB/s, counting 2 N C bytes-per-element: logits in, gradient out. The copies run in the "
        "same loop. A share can be above 100 %: a gradient below 32 MB may land in memory that malloc has kept, "
        "without page faults, and for larger ones ltkernels asks for huge pages, which a plain clone does not.\n\n"
        f"{_table(head, rows)}"
    )


def _ldam(results: Results) -> str:
    rows = []
    for shape in results.shapes():
        ratios = [
            results.ratio(shape, dtype, "upstream1", "ldam-authors", "ldam-ours") for dtype in ("float32", "bfloat16")
        ]
        if any(ratios):
            rows.append([shape.replace("x", " x "), *map(_times, ratios)])
    if not rows:
        return ""
    head = ["N x C", "float32", "bfloat16"]
    return f"## LDAM: times faster than its authors' formula, upstream gradient 1\n\n{_table(head, rows)}"


def _memory(results: Results) -> str:
    def peak(case: dict, name: str) -> str:
        measured = case["variants"].get(name, {}).get("peak_memory_bytes")
        return "" if measured is None else f"{measured / 1e6:,.1f}"

    cases = [case for (_, _, upstream), case in results.cases.items() if upstream != "half"]
    cases = [case for case in cases if any("peak_memory_bytes" in v for v in case["variants"].values())]
    names = _names(results)
    rows = [
        [case["shape"].replace("x", " x "), case["dtype"], UPSTREAMS[case["upstream"]].split(",")[0]]
        + [f"{case['bytes'] / 2e6:,.1f}", *(peak(case, name) for name in names)]
        for case in sorted(cases, key=lambda case: case["upstream"] == "none")
    ]
    if not rows:
        return ""
    head = ["N x C", "dtype", "upstream", "logits", *(LABELS[name] for name in names)]
    return f"## Peak memory beyond inputs and returned gradient, MB\n\n{_table(head, rows)}"


def _timings(results: Results, dtype: str, upstream: str) -> str:
    shapes = [shape for shape in results.shapes() if (shape, dtype, upstream) in results.cases]
    if not shapes:
        return ""
    names = _names(results)
    rows = [[s.replace("x", " x "), *(_time(results, s, dtype, upstream, name) for name in names)] for s in shapes]
    title = f"## Times: {dtype}, {UPSTREAMS[upstream]}"
    return f"{title}\n\n{_table(['N x C', *(LABELS[name] for name in names)], rows)}"


def _tests(results: Results) -> str:
    if not results.tests:
        return ""
    return "## Tests on this machine\n\n" + ", ".join(f"{count} {what}" for what, count in results.tests.items())


# ---------------------------------------------------------------------------------------------------------- formatting


def _names(results: Results) -> list[str]:
    present = {name for case in results.cases.values() for name in case["variants"]}
    return [name for name in LABELS if name in present]


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _time(results: Results, shape: str, dtype: str, upstream: str, name: str) -> str:
    variant = results.variant(shape, dtype, upstream, name)
    if variant is None:
        return ""
    microseconds = variant["median_s"] * 1e6
    text = f"{microseconds:.3g} us" if microseconds < 999.5 else f"{_three_digits(microseconds / 1e3)} ms"
    return text + (" ~" if variant["iqr_s"] > NOISY * variant["median_s"] else "")


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _optional(form: str) -> Callable[[float | None], str]:
    return lambda value: "" if value is None else form.format(value)


_times, _number, _rate = _optional("{:.2f}x"), _optional("{:.4g}"), _optional("{:.1f}")


def write(results: Results, name: str, out: Path) -> list[Path]:
    """Writes NAME.json, NAME.md and, where matplotlib is installed, NAME.png."""
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{name}.{suffix}" for suffix in ("json", "md", "png")]
    results.save(files[0])
    try:
        from benchmarks.chart import draw
    except ImportError as error:
        print(f"No bar chart: {error}. Install matplotlib for it.", file=sys.stderr)
        files.pop()
    else:
        draw(results, files[2])
    picture = f"\n![Speed-ups and memory traffic]({name}.png)\n" if len(files) == 3 else ""
    head, _, rest = markdown(results).partition("\n## ")
    files[1].write_text(f"{head}{picture}\n## {rest}")
    return files


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("json", nargs="*", type=Path, default=[RESULTS / "cpu-raw.json"], metavar="JSON")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the report; default: benchmarks/results")
    parser.add_argument("--name", help="of the report; default: that of the first file")
    options = parser.parse_args(arguments)
    try:
        results = load(options.json)
    except ResultsError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    name = options.name or options.json[0].stem.removesuffix("-raw")
    for path in write(results, name, options.out):
        print(path)
    for target in targets.targets(results):
        print(f"{target.verdict.strip('*'):>12}  {target.text}: {_number(target.measured) or '-'} (>= {target.wanted})")


if __name__ == "__main__":
    main()
