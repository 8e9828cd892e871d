"""What the project promises about speed and memory, and whether a run keeps it."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.results import Results

# float32, logit bias, upstream 1: times faster than eager torch and than torch.compile of it.
SPEEDUPS = {"128x100": (1.8, 2.5), "512x1000": (3.5, 2.5), "4096x1000": (3.5, 2.5), "2048x8142": (4.5, 2.4)}
LDAM_SHAPE, LDAM_SPEEDUP = "8192x1000", 15.0
LARGE = 4_000_000  # logits from which memory traffic decides
SHARE_OF_CLONE = 0.85
CLONE_CAVEAT = (
    "The clone pays a page fault for every 4 KiB that it writes, which ltkernels may not: a gradient below 32 MB may "
    "land in memory that malloc has kept, and for larger ones ltkernels asks for huge pages. In brackets, the share of "
    "the rate of a clone into fresh huge pages."
)

# Auxiliary classes: times faster than the dense mask, time over that of the plain kernel, bytes of the map.
AUXILIARY_SHAPES = ("512x6012", "4096x6012")
DENSE_SPEEDUP, OVER_PLAIN, MAP_MEGABYTES = 5.0, 1.10, 1.0

# Linear: time over that of the materialised logits, and over that of torch's chunks; peak memory over the logits.
OVER_EAGER = {"256x2048x8142": 1.0, "2048x512x8142": 0.8, "4096x512x50304": 1.0}
OVER_TORCH_CHUNKED = 0.5
LINEAR_MEMORY_SHAPE, SHARE_OF_LOGITS = "4096x512x50304", 1 / 8

# Contrastive: times faster than eager torch and than torch.compile, the rate of 6 M^2 D operations over that of a
# matrix product, peak memory.
CONTRASTIVE_SPEEDUPS: dict[str, dict[str, float]] = {
    "512x128": {"eager": 1.7},
    "4096x128": {"eager": 4.0, "eager-compiled": 2.5},
}
PRODUCT_SHAPE, SHARE_OF_PRODUCT = "4096x512", 1.25
CONTRASTIVE_MEMORY_SHAPE, CONTRASTIVE_MEGABYTES = "16384x128", 64.0

CASE = ("float32", "upstream1")


@dataclass(frozen=True)
class Target:
    """``measured`` is None where the run has no such case; ``caveat`` is what the page says below its table."""

    text: str
    wanted: float
    measured: float | None
    at_most: bool = False
    caveat: str = ""
    beside: float | None = None  # a second number, which the caveat explains

    @property
    def wanted_text(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.wanted:g}"

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        kept = self.measured <= self.wanted if self.at_most else self.measured >= self.wanted
        return "met" if kept else "**missed**"


def targets(results: Results) -> list[Target]:
    """Empty on a GPU: the promises are about the CPU kernels."""
    if results.machine.get("device") != "cpu":
        return []
    found = {"margin": _margin, "auxiliary": _auxiliary, "linear": _linear, "contrastive": _contrastive}
    return found[results.family](results)


def _margin(results: Results) -> list[Target]:
    found = []
    for shape, wanted in SPEEDUPS.items():
        for name, text, times in zip(("eager", "eager-compiled"), ("eager", "torch.compile"), wanted, strict=True):
            found.append(Target(f"{shape}: faster than {text}", times, results.ratio(shape, *CASE, name, "ours")))
    ldam = results.ratio(LDAM_SHAPE, *CASE, "ldam-authors", "ldam-ours")
    found.append(Target(f"{LDAM_SHAPE}: LDAM faster than its authors' formula", LDAM_SPEEDUP, ldam))
    for shape in results.shapes():
        found.append(Target(f"{shape}: bfloat16 against float32", 1.0, bfloat16_gain(results, shape)))
    for shape in large_shapes(results):
        share = share_of_clone(results, shape, "float32")
        huge = share_of_clone(results, shape, "float32", memory="huge")
        text = f"{shape}: share of the rate of x.clone() into fresh memory"
        found.append(Target(text, SHARE_OF_CLONE, share, caveat=CLONE_CAVEAT, beside=huge))
    return found


def _auxiliary(results: Results) -> list[Target]:
    found = []
    for shape in AUXILIARY_SHAPES:
        dense = results.ratio(shape, *CASE, "dense", "ours")
        found.append(Target(f"{shape}: times faster than the dense mask", DENSE_SPEEDUP, dense))
        over = results.ratio(shape, *CASE, "ours", "plain")
        found.append(Target(f"{shape}: time over that of the plain margin kernel", OVER_PLAIN, over, at_most=True))
    # Smoke runs have smaller maps, which promise nothing.
    full = [case for case in results.cases.values() if case["shape"] in AUXILIARY_SHAPES]
    held = [case["variants"].get("ours", {}).get("map_bytes") for case in full]
    largest = max((count for count in held if count is not None), default=None)
    in_megabytes = None if largest is None else largest / 1e6
    return [*found, Target("MB that the neighbour map takes", MAP_MEGABYTES, in_megabytes, at_most=True)]


def _linear(results: Results) -> list[Target]:
    share = share_of_logits(results, LINEAR_MEMORY_SHAPE, "float32", "ours")
    text = f"{LINEAR_MEMORY_SHAPE}: peak memory beyond inputs and gradients, over the logits"
    found = [Target(text, SHARE_OF_LOGITS, share, at_most=True)]
    for name, text in (("eager", "F.linear and F.cross_entropy"), ("torch-chunked", "F.linear_cross_entropy, chunked")):
        for shape, wanted in OVER_EAGER.items():
            over = results.ratio(shape, *CASE, "ours", name)
            wanted = wanted if name == "eager" else OVER_TORCH_CHUNKED
            found.append(Target(f"{shape}: time over that of {text}", wanted, over, at_most=True))
    return found


def _contrastive(results: Results) -> list[Target]:
    found = []
    for shape, wanted in CONTRASTIVE_SPEEDUPS.items():
        for name, times in wanted.items():
            text = f"{shape}: faster than {'eager' if name == 'eager' else 'torch.compile'}"
            found.append(Target(text, times, results.ratio(shape, *CASE, name, "ours")))
    share = share_of_product(results, PRODUCT_SHAPE, "float32")
    found.append(Target(f"{PRODUCT_SHAPE}: rate over that of a matrix product", SHARE_OF_PRODUCT, share))
    peak = (results.variant(CONTRASTIVE_MEMORY_SHAPE, *CASE, "ours") or {}).get("peak_memory_bytes")
    text = f"{CONTRASTIVE_MEMORY_SHAPE}: MB beyond inputs and gradients"
    in_megabytes = None if peak is None else peak / 1e6
    return [*found, Target(text, CONTRASTIVE_MEGABYTES, in_megabytes, at_most=True)]


def large_shapes(results: Results) -> list[str]:
    def logits(shape: str) -> int:
        rows, classes = shape.split("x")
        return int(rows) * int(classes)

    return [shape for shape in results.shapes() if logits(shape) >= LARGE]


def bfloat16_gain(results: Results, shape: str) -> float | None:
    """How many times faster ours is in bfloat16 than in float32, the median over rounds."""
    return (results.variant(shape, "bfloat16", "upstream1", "ours") or {}).get("faster_than_float32")


def share_of_clone(results: Results, shape: str, dtype: str, name: str = "ours", memory: str = "fresh") -> float | None:
    """The rate of a pass over that of x.clone() into ``memory``: "fresh" as malloc gives it, or in "huge" pages."""
    case = results.cases.get((shape, dtype, "upstream1"), {})
    variant, clone = case.get("variants", {}).get(name, {}), case.get(f"clone_{memory}_gb_per_s")
    if f"clone_{memory}" in variant.get("rate_over", {}):
        return variant["rate_over"][f"clone_{memory}"]
    return variant["gb_per_s"] / clone if variant and clone else None  # results from before there was a ratio


def share_of_logits(results: Results, shape: str, dtype: str, name: str) -> float | None:
    """The peak beyond inputs and returned gradients, over what all logits would take in this dtype."""
    case = results.cases.get((shape, dtype, "upstream1"), {})
    peak = case.get("variants", {}).get(name, {}).get("peak_memory_bytes")
    return None if peak is None else peak / (case["bytes"] / 2)


def product_rate(results: Results, shape: str, dtype: str) -> float | None:
    """GFLOP/s of M x D by D x M in the best layout of the factors; on a CPU it is measured in float32 only."""
    for of in (dtype, "float32"):
        case = results.cases.get((shape, of, "upstream1"), {})
        rates = [rate for layout in ("nn", "nt", "tn") if (rate := case.get(f"mm_{layout}_gflop_per_s"))]
        if rates:
            return max(rates)
    return None


def share_of_product(results: Results, shape: str, dtype: str, name: str = "ours") -> float | None:
    """The rate of forward and backward, counting 6 M^2 D operations, over that of the matrix product."""
    variant = results.variant(shape, dtype, "upstream1", name) or {}
    over = [times for key, times in variant.get("rate_over", {}).items() if key.startswith("mm_")]
    if over:
        return min(over)
    rate = variant.get("gflop_per_s")
    product = product_rate(results, shape, dtype)
    return rate / product if rate and product else None
