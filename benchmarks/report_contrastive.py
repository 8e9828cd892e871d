"""The report on contrastive_loss."""

from __future__ import annotations

from benchmarks.contrastive import LARGEST, TEMPERATURE, TEMPERATURES, WIDE
from benchmarks.results import Results
from benchmarks.tables import by_times, head, memory, present, rate, table, targets_table, time_of, times, timings
from benchmarks.targets import CASE, product_rate, share_of_product

LABELS = {
    "ours": "ltkernels",
    "eager": "eager torch",
    "eager-compiled": "torch.compile",
    "simclr-lt": "SimCLR-LT's formula",
    "ours-scalar": "ltkernels, one temperature",
    "pml-ntxent": "pytorch-metric-learning NTXentLoss",
    "lightly": "lightly NTXentLoss",
    "ours-supcon": "ltkernels, labels",
    "pml-supcon": "pytorch-metric-learning SupConLoss",
    "ours-cross": "ltkernels, view against view",
    "inf-cl": "Inf-CL",
}
# Each peer, and what of ours computes the same.
PEERS = {
    "eager": "ours",
    "eager-compiled": "ours",
    "simclr-lt": "ours",
    "pml-ntxent": "ours-scalar",
    "lightly": "ours-scalar",
    "pml-supcon": "ours-supcon",
    "inf-cl": "ours-cross",
}
PACKAGES = {
    "pytorch-metric-learning": ("pml-ntxent", "pml-supcon"),
    "lightly": ("lightly",),
    "Inf-CL": ("inf-cl",),
}
SHAPE = "M x D"


def sections(results: Results) -> list[str]:
    what = (
        f"Shapes are {SHAPE}: two views of M / 2 samples, D features, contrasted with each other. The embeddings have "
        "length 1 and get the gradient, of which the check compares 512 rows. Each row has one positive, its other "
        f"view, and a temperature of its own, from {TEMPERATURES[0]:g} to {TEMPERATURES[1]:g}. eager torch is "
        "`F.cross_entropy(z @ z.T / tau[:, None], positive)` with -inf on the diagonal; torch.compile is that function "
        "compiled; SimCLR-LT's formula is that of repositories for long-tailed SimCLR, `masked_select` of the "
        f"exponentials. The other losses have one temperature, {TEMPERATURE:g}, and are held against ltkernels doing "
        "what they do: the NTXentLosses and SupConLoss divide the embeddings by their length, SupConLoss takes as "
        "positives all rows of the label, from a long tail of 100 classes. torch and the other losses compute in the "
        "dtype of the embeddings, ltkernels in float32."
    )
    dtypes = ("float32", "bfloat16")
    return [
        head(results, "contrastive_loss", what + _left_out(results)),
        main_table(results),
        targets_table(results),
        _shares(results),
        memory(results, LABELS, {"upstream1": ""}, SHAPE, "similarities"),
        *(timings(results, LABELS, dtype, "upstream1", dtype, SHAPE) for dtype in dtypes),
    ]


def _left_out(results: Results) -> str:
    """Said aloud, above all if it is ours."""
    cpu = results.machine["device"] == "cpu"
    found = set(present(results, LABELS))
    missing = [name for name, peers in PACKAGES.items() if not found & set(peers) and not (cpu and name == "Inf-CL")]
    text = f" Not installed here, and left out: {', '.join(missing)}." if missing else ""
    if "pml-ntxent" in found:
        text += " pytorch-metric-learning's NTXentLoss holds M^3 numbers, and is measured only where M is small."
    if not cpu:
        return (
            f"{text} {by_times(LARGEST)} is measured in bfloat16 only, without the losses that need most memory. "
            "Inf-CL contrasts the first views with the second ones only, as in CLIP, and multiplies in TF32: it is "
            "measured in bfloat16 only."
        )
    text += (
        f" At {by_times(WIDE)} only ltkernels, eager torch and torch.compile are measured; where a pass in plain torch "
        "takes seconds, ltkernels and eager torch."
    )
    half = present(results, LABELS, "bfloat16")
    if half and "eager" not in half and not results.machine.get("quick"):
        text += (
            " In bfloat16 only ltkernels is measured: on this processor eager torch takes more than six times as long "
            "as in float32, because torch multiplies bfloat16 matrices by a slow loop without arithmetic for them."
        )
    return text


def main_table(results: Results) -> str:
    names = [name for name in PEERS if name in present(results, LABELS, CASE[0])]
    rows = [
        [
            by_times(shape),
            time_of(results, shape, *CASE, "ours"),
            *(times(results.ratio(shape, *CASE, name, PEERS[name])) for name in names),
        ]
        for shape in results.shapes()
        if (shape, *CASE) in results.cases
    ]
    if not rows:
        return ""
    text = "The time of each over that of ltkernels doing the same: above 1x, ltkernels is faster."
    columns = [SHAPE, "ltkernels", *(LABELS[name] for name in names)]
    return f"## Times faster, float32\n\n{text}\n\n{table(columns, rows)}"


def _shares(results: Results) -> str:
    rows = []
    for shape, dtype, _ in results.cases:
        product = product_rate(results, shape, dtype)
        if product is None:
            continue
        variants = results.cases[shape, dtype, "upstream1"]["variants"]
        rates = [variants.get(name, {}).get("gflop_per_s") for name in ("ours", "eager", "eager-compiled")]
        share = share_of_product(results, shape, dtype)
        rows.append([by_times(shape), dtype, *map(rate, [*rates, product]), "" if share is None else f"{share:.2f}"])
    if not rows:
        return ""
    of = "float32" if results.machine["device"] == "cpu" else "that dtype"
    text = (
        "Counting 6 M^2 D operations for forward and backward, three matrix products. The similarities are symmetric "
        f"up to the temperature, so that fewer will do. The matrix product is M x D by D x M in {of}, in the best of "
        "three layouts of its factors, timed in the same loop; not where a pass takes seconds."
    )
    names = [LABELS[name] for name in ("ours", "eager", "eager-compiled")]
    columns = [SHAPE, "dtype", *names, "matrix product", "ltkernels over that"]
    return f"## GFLOP/s\n\n{text}\n\n{table(columns, rows)}"
