"""The report on margin_cross_entropy."""

from __future__ import annotations

from benchmarks import targets
from benchmarks.results import Results
from benchmarks.tables import by_times, head, memory, rate, table, targets_table, time_of, times, timings
from benchmarks.targets import SPEEDUPS

LABELS = {
    "ours": "ltkernels",
    "ours-compiled": "ltkernels in torch.compile",
    "eager": "eager torch",
    "eager-compiled": "torch.compile",
    "liger": "Liger-Kernel",
    "ldam-ours": "LDAM, ltkernels",
    "ldam-authors": "LDAM, authors' formula",
}
UPSTREAMS = {
    "upstream1": "upstream gradient 1",
    "half": "`(loss * 0.5).backward()`",
    "none": '`reduction="none"`, one upstream gradient a row',
}
MEMORY_UPSTREAMS = {name: UPSTREAMS[name] for name in ("upstream1", "half")} | {"none": '`reduction="none"`'}


def sections(results: Results) -> list[str]:
    what = (
        "eager torch is `F.cross_entropy(logits + bias, target)` over N x C logits; torch.compile is that function "
        "compiled."
    )
    return [
        head(results, "margin_cross_entropy", what),
        main_table(results),
        targets_table(results),
        _traffic(results),
        _ldam(results),
        _memory(results),
        *(
            timings(results, LABELS, dtype, upstream, f"{dtype}, {UPSTREAMS[upstream]}", "N x C")
            for dtype in ("float32", "bfloat16")
            for upstream in UPSTREAMS
        ),
    ]


def main_table(results: Results) -> str:
    case = ("float32", "upstream1")
    wants_targets = bool(targets.targets(results))
    rows = []
    for shape in results.shapes():
        ratios = [results.ratio(shape, *case, name, "ours") for name in ("eager", "eager-compiled")]
        wanted = SPEEDUPS.get(shape) if wants_targets else None
        rows.append(
            [
                by_times(shape),
                *(time_of(results, shape, *case, name) for name in ("ours", "eager", "eager-compiled")),
                *(times(r) + (f" (>= {w})" if w else "") for r, w in zip(ratios, wanted or (0, 0), strict=True)),
            ]
        )
    columns = ["N x C", "ltkernels", "eager torch", "torch.compile", "over eager", "over torch.compile"]
    title = "## float32, logit bias, upstream gradient 1"
    return f"{title}\n\n{table(columns, rows)}" + ("\n\nIn brackets: the target." if wants_targets else "")


def _traffic(results: Results) -> str:
    rows = []
    for shape in targets.large_shapes(results):
        for dtype in ("float32", "bfloat16"):
            case = results.cases.get((shape, dtype, "upstream1"))
            if case and "ours" in case["variants"]:
                rates = [case.get(f"{name}_gb_per_s") for name in ("clone_fresh", "clone_huge", "copy_warm")]
                shares = [targets.share_of_clone(results, shape, dtype, memory=name) for name in ("fresh", "huge")]
                ours = case["variants"]["ours"]["gb_per_s"]
                percents = ["" if share is None else f"{share:.0%}" for share in shares]
                rows.append([by_times(shape), dtype, *map(rate, [ours, *rates]), *percents])
    if not rows:
        return ""
    clones = ["clone, fresh", "clone, fresh huge pages", "copy, warm"]
    columns = ["N x C", "dtype", "ltkernels", *clones, "of clone, fresh", "of clone, fresh huge pages"]
    return (
        "## Memory traffic\n\nGB/s, counting 2 N C bytes-per-element: logits in, gradient out. The copies run in the "
        "same loop. A share can be above 100 %: a gradient below 32 MB may land in memory that malloc has kept, "
        "without page faults, and for larger ones ltkernels asks for huge pages, which a plain clone does not.\n\n"
        f"{table(columns, rows)}"
    )


def _memory(results: Results) -> str:
    found = memory(results, LABELS, MEMORY_UPSTREAMS, "N x C")
    scaled = any(upstream == "half" for _, _, upstream in results.cases)
    note = "Compiled variants of a scaled loss are the same graph, and are not compiled again for this."
    return f"{found}\n\n{note}" if found and scaled else found


def _ldam(results: Results) -> str:
    rows = []
    for shape in results.shapes():
        ratios = [
            results.ratio(shape, dtype, "upstream1", "ldam-authors", "ldam-ours") for dtype in ("float32", "bfloat16")
        ]
        if any(ratios):
            rows.append([by_times(shape), *map(times, ratios)])
    if not rows:
        return ""
    columns = ["N x C", "float32", "bfloat16"]
    return f"## LDAM: times faster than its authors' formula, upstream gradient 1\n\n{table(columns, rows)}"
