"""The report on linear_margin_cross_entropy."""

from __future__ import annotations

from benchmarks.results import Results
from benchmarks.tables import by_times, head, memory, present, rate, table, targets_table, time_of, times, timings
from benchmarks.targets import CASE, share_of_logits

LABELS = {
    "ours": "ltkernels",
    "separate": "F.linear, then ltkernels",
    "eager": "eager torch",
    "eager-compiled": "torch.compile",
    "torch": "F.linear_cross_entropy",
    "torch-chunked": "F.linear_cross_entropy, chunked",
    "liger": "Liger-Kernel fused",
    "cut": "cut-cross-entropy",
}
SHAPE = "N x D x C"


def sections(results: Results) -> list[str]:
    what = (
        f"Shapes are {SHAPE}: N samples, D features, C classes; both the features and the classifier get gradients, "
        "of which the check compares 512 rows each. "
        "eager torch is `F.cross_entropy(F.linear(x, weight) + bias, target)`, which holds all N x C logits; "
        "torch.compile is that function compiled; F.linear_cross_entropy is torch's own, without options or with "
        "`LinearCrossEntropyOptions()`, which chooses chunks by itself."
    ) + _left_out(results)
    return [
        head(results, "linear_margin_cross_entropy", what),
        main_table(results),
        targets_table(results),
        _shares(results),
        memory(results, LABELS, {"upstream1": ""}, SHAPE),
        *(timings(results, LABELS, dtype, "upstream1", dtype, SHAPE) for dtype in ("float32", "bfloat16")),
        _throughput(results),
    ]


def _left_out(results: Results) -> str:
    """Said aloud, above all if it is ours."""
    if results.machine["device"] != "cpu":
        return ""
    long = (
        " At the size where a pass takes some ten seconds, bfloat16 is left out, and so are torch.compile and "
        "F.linear_cross_entropy without options, which multiply the same matrices as eager torch."
    )
    single, half = (set(present(results, LABELS, dtype)) for dtype in ("float32", "bfloat16"))
    missing = [LABELS[name] for name in LABELS if name in single - half]
    if not half or not missing:
        return long
    return (
        f"{long} Not measured in bfloat16: {', '.join(missing)}. On this processor they take more than six times as "
        "long as in float32, because torch multiplies bfloat16 matrices by a slow loop without arithmetic for them."
    )


def main_table(results: Results) -> str:
    peers = ("eager", "eager-compiled", "torch", "torch-chunked", "separate")
    rows = [
        [
            by_times(shape),
            time_of(results, shape, *CASE, "ours"),
            *(times(results.ratio(shape, *CASE, "ours", name)) for name in peers),
        ]
        for shape in results.shapes()
        if (shape, *CASE) in results.cases
    ]
    if not rows:
        return ""
    text = "Below 1x, ltkernels takes less time than the other."
    columns = [SHAPE, "ltkernels", *(f"over {LABELS[name]}" for name in peers)]
    return f"## Time over that of others, float32\n\n{text}\n\n{table(columns, rows)}"


def _shares(results: Results) -> str:
    names = ("ours", "torch-chunked", "separate", "eager", "eager-compiled")
    rows = []
    for shape, dtype, upstream in results.cases:
        shares = [share_of_logits(results, shape, dtype, name) for name in names]
        if any(share is not None for share in shares) and upstream == "upstream1":
            rows.append([by_times(shape), dtype, *("" if s is None else f"{s:.3f}" for s in shares)])
    if not rows:
        return ""
    columns = [SHAPE, "dtype", *(LABELS[name] for name in names)]
    return f"## Peak memory beyond inputs and returned gradients, over that of the logits\n\n{table(columns, rows)}"


def _throughput(results: Results) -> str:
    rows = []
    for (shape, dtype, _), case in results.cases.items():
        rates = [case["variants"].get(name, {}).get("gflop_per_s") for name in ("ours", "eager")]
        rows.append([by_times(shape), dtype, *map(rate, [*rates, case.get("products_gflop_per_s")])])
    columns = [SHAPE, "dtype", "ltkernels", "eager torch", "the three products alone"]
    return (
        "## GFLOP/s, counting 6 N D C\n\nThe three matrix products run in the same loop, into memory written before; "
        f"not where a pass takes seconds.\n\n{table(columns, rows)}"
    )
