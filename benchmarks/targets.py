"""What the project promises about speed, and whether a run keeps it."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.results import Results

# float32, logit bias, upstream 1: times faster than eager torch and than torch.compile of it.
SPEEDUPS = {"128x100": (1.8, 2.5), "512x1000": (3.5, 2.5), "4096x1000": (3.5, 2.5), "2048x8142": (4.5, 2.4)}
LDAM_SHAPE, LDAM_SPEEDUP = "8192x1000", 15.0
LARGE = 4_000_000  # logits from which memory traffic decides
SHARE_OF_CLONE = 0.85

_CASE = ("float32", "upstream1")


@dataclass(frozen=True)
class Target:
    """``measured`` is None where the run has no such case."""

    text: str
    wanted: float
    measured: float | None
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        return "met" if self.measured >= self.wanted else "**missed**"


def targets(results: Results) -> list[Target]:
    """Empty on a GPU: the promises are about the CPU kernels."""
    if results.machine.get("device") != "cpu":
        return []
    found = []
    for shape, wanted in SPEEDUPS.items():
        for name, text, times in zip(("eager", "eager-compiled"), ("eager", "torch.compile"), wanted, strict=True):
            found.append(Target(f"{shape}: faster than {text}", times, results.ratio(shape, *_CASE, name, "ours")))
    ldam = results.ratio(LDAM_SHAPE, *_CASE, "ldam-authors", "ldam-ours")
    found.append(Target(f"{LDAM_SHAPE}: LDAM faster than its authors' formula", LDAM_SPEEDUP, ldam))
    for shape in results.shapes():
        found.append(Target(f"{shape}: bfloat16 against float32", 1.0, bfloat16_gain(results, shape)))
    for shape in large_shapes(results):
        share = share_of_clone(results, shape, "float32")
        found.append(Target(f"{shape}: share of the rate of x.clone() into fresh memory", SHARE_OF_CLONE, share))
    return found


def large_shapes(results: Results) -> list[str]:
    def logits(shape: str) -> int:
        rows, classes = shape.split("x")
        return int(rows) * int(classes)

    return [shape for shape in results.shapes() if logits(shape) >= LARGE]


def bfloat16_gain(results: Results, shape: str) -> float | None:
    """How many times faster ours is in bfloat16 than in float32; the two are timed in one loop."""
    single, half = (results.variant(shape, dtype, "upstream1", "ours") for dtype in ("float32", "bfloat16"))
    return single["median_s"] / half["median_s"] if single and half else None


def share_of_clone(results: Results, shape: str, dtype: str, name: str = "ours") -> float | None:
    case = results.cases.get((shape, dtype, "upstream1"), {})
    variant = case.get("variants", {}).get(name)
    return variant["gb_per_s"] / case["clone_fresh_gb_per_s"] if variant else None
