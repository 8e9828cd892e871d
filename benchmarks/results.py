"""Reads what pytest-benchmark wrote and keeps what is worth committing: no raw samples, no trace of the host."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOW_TO_MEASURE = "Measure first: pytest benchmarks --benchmark-only --benchmark-json=benchmarks/results/cpu-raw.json"

# What all variants of a case share, and what is one variant's own.
_SHARED = (
    *("shape", "dtype", "upstream", "bytes", "clone_fresh_gb_per_s", "clone_huge_gb_per_s", "copy_warm_gb_per_s"),
    *("products_gflop_per_s", "mm_nn_gflop_per_s", "mm_nt_gflop_per_s", "mm_tn_gflop_per_s", "pairs", "map"),
)
_OWN = ("gb_per_s", "gflop_per_s", "rate_over", "peak_memory_bytes", "map_bytes", "loss_error", "gradient_error")
_STATS = {"median": "median_s", "min": "min_s", "iqr": "iqr_s", "rounds": "rounds"}


class ResultsError(Exception):
    """A file of results is missing or is something else."""


@dataclass
class Results:
    """Of one family. ``cases`` by (shape, dtype, upstream); each has what _SHARED names, and ``variants`` by name."""

    machine: dict[str, Any]
    cases: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    tests: dict[str, Any] | None = None  # of the GPU tests that ran with the benchmarks
    family: str = "margin"

    def variant(self, shape: str, dtype: str, upstream: str, name: str) -> dict[str, Any] | None:
        return self.cases.get((shape, dtype, upstream), {}).get("variants", {}).get(name)

    def ratio(self, shape: str, dtype: str, upstream: str, slow: str, fast: str) -> float | None:
        """How many times faster ``fast`` is: the median over rounds."""
        variant = self.variant(shape, dtype, upstream, fast)
        return variant["faster_than"].get(slow) if variant else None

    def shapes(self) -> list[str]:
        return list(dict.fromkeys(shape for shape, _, _ in self.cases))

    def save(self, path: Path) -> None:
        """One case a line: small, and a diff of two runs can be read."""
        head = {"machine": self.machine, "family": self.family} | ({"tests": self.tests} if self.tests else {})
        lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in self.cases.values())
        path.write_text(json.dumps(head)[:-1] + ', "cases": [\n' + lines + "\n]}\n")


def load(paths: Iterable[Path]) -> dict[str, Results]:
    """By family, the results of one or several runs on one machine, raw or trimmed; of a case measured twice, the last.

    Families may have been measured on different machines: each gets a report of its own.
    """
    results: dict[str, Results] = {}
    for path in paths:
        for family, one in _load_one(path).items():
            before = results.setdefault(family, one)
            if _hardware(before.machine) != _hardware(one.machine):
                raise ResultsError(f"{path}: measured elsewhere or with another torch than the files before it")
            before.cases |= one.cases
            for name in ("date", "revision"):
                found = (value for of in (before, one) for value in (of.machine.get(name) or "unknown").split(", "))
                values = dict.fromkeys(found)
                if len(values) > 1:
                    before.machine[name] = ", ".join(values)
    if not results:
        raise ResultsError(f"no file of results given. {HOW_TO_MEASURE}")
    return results


def partial_of(raw: Path) -> Path:
    """What a run that has not written ``raw`` yet has measured; it is there until the run ends well."""
    return raw.with_name(raw.name + ".partial")


def append_partial(raw: Path, benchmark: dict, machine_info: Callable[[], dict]) -> None:
    """One benchmark a line, behind a line with the machine."""
    path = partial_of(raw)
    lines = [] if path.exists() else [machine_info()]
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in [*lines, benchmark])


def _read_partial(path: Path) -> dict:
    machine, *benchmarks = path.read_text().splitlines()
    found = []
    for line in benchmarks:
        try:
            found.append(json.loads(line))
        except ValueError:  # it was killed while it wrote the last one
            break
    return {"machine_info": json.loads(machine), "benchmarks": found}


def _load_one(path: Path) -> dict[str, Results]:
    partial = partial_of(path)
    if not path.exists() and not partial.exists():
        raise ResultsError(f"{path}: no such file. {HOW_TO_MEASURE}")
    try:
        content = _read_partial(partial) if partial.exists() else json.loads(path.read_text())
    except ValueError as error:
        raise ResultsError(f"{path}: not JSON ({error}); was the run stopped? {HOW_TO_MEASURE}") from None
    if not isinstance(content, dict) or not ("benchmarks" in content or "cases" in content):
        raise ResultsError(f"{path}: holds neither pytest-benchmark's results nor ours. {HOW_TO_MEASURE}")
    results = _trim(content) if "benchmarks" in content else _trimmed(content)
    if not any(one.cases for one in results.values()):
        raise ResultsError(f"{path}: holds no benchmark of this suite. {HOW_TO_MEASURE}")
    return results


def _trimmed(content: dict) -> dict[str, Results]:
    family = content.get("family", "margin")  # files from when there was one family do not name it
    cases = {(case["shape"], case["dtype"], case["upstream"]): case for case in content["cases"]}
    return {family: Results(content["machine"], cases, content.get("tests"), family)}


def _trim(raw: dict) -> dict[str, Results]:
    results: dict[str, Results] = {}
    samples: dict[str, dict[tuple[str, str, str], dict[str, list[float]]]] = {}
    for benchmark in raw["benchmarks"]:
        info, stats = benchmark["extra_info"], benchmark["stats"]
        if "variant" not in info:
            continue
        family = info.get("family", "margin")
        key = info["shape"], info["dtype"], info["upstream"]
        samples.setdefault(family, {}).setdefault(key, {})[info["variant"]] = stats["data"]
        case = results.setdefault(family, Results(dict(raw["machine_info"]), family=family)).cases.setdefault(
            key,
            {name: _rounded(info[name]) for name in _SHARED if name in info} | {"variants": {}},
        )
        case["variants"][info["variant"]] = {new: _rounded(stats[old]) for old, new in _STATS.items()} | {
            name: _rounded(info[name]) for name in _OWN if info.get(name) is not None
        }
    for family, one in results.items():
        _compare(one, samples[family])
    return results


def _compare(results: Results, samples: dict[tuple[str, str, str], dict[str, list[float]]]) -> None:
    """Adds what is left of the samples: ratios within a round, whose median no change of the machine's speed moves.

    On a machine with two speeds, shared as most are, the medians of two variants may fall on different ones.
    """
    for (shape, dtype, upstream), case in results.cases.items():
        own = samples[shape, dtype, upstream]
        single = samples.get((shape, "float32", upstream), {}) if dtype != "float32" else {}
        for name, variant in case["variants"].items():
            others = {other: own[other] for other in own if other != name}
            variant["faster_than"] = {other: _median_ratio(slow, own[name]) for other, slow in others.items()}
            if name in single:
                variant["faster_than_float32"] = _median_ratio(single[name], own[name])


def _median_ratio(slow: list[float], fast: list[float]) -> float:
    return float(f"{statistics.median(a / b for a, b in zip(slow, fast, strict=True)):.6g}")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _hardware(machine: dict) -> dict:
    return {name: value for name, value in machine.items() if name not in ("date", "revision")}
