"""The report on auxiliary_cross_entropy."""

from __future__ import annotations

from benchmarks.results import Results
from benchmarks.tables import by_times, head, memory, present, table, targets_table, time_of, times, timings
from benchmarks.targets import CASE

LABELS = {
    "ours": "ltkernels",
    "plain": "plain margin kernel",
    "dense": "dense mask",
    "dense-compiled": "dense mask in torch.compile",
    "dense-float64": "dense mask in float64",
}
DENSE = ("dense", "dense-compiled", "dense-float64")


def sections(results: Results) -> list[str]:
    what = (
        "Logits are N x K: target classes and auxiliary ones. The dense mask is the formula of Category Extrapolation "
        "(arXiv:2410.15980) as its authors write it: a K x K mask of the classes that each class silences, gathered "
        "by the row's target, silenced logits at -inf, cross-entropy over prior-adjusted logits; the mask in float32 "
        "or float64. The plain margin kernel is `margin_cross_entropy` over the same logits, with nothing silenced."
    )
    return [
        head(results, "auxiliary_cross_entropy", what),
        main_table(results),
        targets_table(results),
        _bfloat16(results),
        _maps(results),
        memory(results, LABELS, {"upstream1": ""}, "N x K"),
        *(timings(results, LABELS, dtype, "upstream1", dtype, "N x K") for dtype in ("float32", "bfloat16")),
    ]


def main_table(results: Results) -> str:
    return f"## float32, nothing but neighbours silenced\n\n{_ratios(results, *CASE)}"


def _bfloat16(results: Results) -> str:
    if not any(dtype == "bfloat16" for _, dtype, _ in results.cases):
        return ""
    return f"## bfloat16\n\n{_ratios(results, 'bfloat16', 'upstream1')}"


def _ratios(results: Results, dtype: str, upstream: str) -> str:
    rows = []
    for shape in results.shapes():
        case = (shape, dtype, upstream)
        rows.append(
            [
                by_times(shape),
                *(time_of(results, *case, name) for name in ("ours", "plain")),
                times(results.ratio(*case, "ours", "plain")),
                *(times(results.ratio(*case, name, "ours")) for name in DENSE),
            ]
        )
    columns = ["N x K", "ltkernels", "plain margin kernel", "time over plain"]
    return table([*columns, *(f"faster than {LABELS[name]}" for name in DENSE)], rows)


def _maps(results: Results) -> str:
    case = next(iter(results.cases.values()))
    held = {name: case["variants"].get(name, {}).get("map_bytes") for name in present(results, LABELS)}
    rows = [[LABELS[name], f"{count / 1e6:,.3g}"] for name, count in held.items() if count]
    if not rows:
        return ""
    return (
        f"## What is silenced, MB held all the time\n\nA map of {case['pairs']:,} pairs, {case['map']}.\n\n"
        f"{table(['', 'MB'], rows)}"
    )
