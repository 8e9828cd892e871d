"""Options and plumbing of the benchmarks: collection of bench_*.py, the shared suite, pytest-benchmark's records."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from benchmarks.interleave import Effort
from benchmarks.peers import installed
from benchmarks.problems import DTYPES, GPU_SHAPES, QUICK_SHAPES, SHAPES, UPSTREAMS, Case
from benchmarks.suite import Suite


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ltkernels benchmarks")
    group.addoption("--quick", action="store_true", help="a smoke run of seconds: one shape, few rounds, one compile")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure; default: cpu")
    group.addoption(
        "--seconds", type=float, default=6.0, help="time of a group (shape, upstream) of variants; default: 6"
    )
    group.addoption("--min-rounds", type=int, default=7, help="even where they take longer than that; default: 7")
    group.addoption(
        "--time-limit", type=float, default=float("inf"), help="seconds after which no further group is started"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    # torch 2.13 warns about its own use of it when torch.compile is imported.
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit.script_method:DeprecationWarning")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" not in metafunc.fixturenames:
        return
    config = metafunc.config
    rows = [
        (*case, variant)
        for case in _cases(config.option.device, config.option.quick)
        for variant in installed(config.option.device)
        if not _leave_out(*case, variant, config)
    ]
    metafunc.parametrize("shape, dtype, upstream, variant", rows, ids=["-".join(row) for row in rows])


def _cases(device: str, quick: bool) -> list[tuple[str, str, str]]:
    # The suite measures the dtypes of a shape and upstream gradient together, and shares what a shape needs.
    shapes = QUICK_SHAPES if quick else SHAPES
    if device == "cuda" and not quick:
        shapes = (*GPU_SHAPES, *reversed(SHAPES))  # should the time run out, the small ones tell least
    return [(shape, dtype, upstream) for shape in shapes for upstream in UPSTREAMS for dtype in DTYPES]


def _leave_out(shape: str, dtype: str, upstream: str, variant: str, config: pytest.Config) -> bool:
    if variant.startswith("linear"):
        return (dtype, upstream) != ("bfloat16", "upstream1")  # cut-cross-entropy takes 16-bit types only
    if "compiled" not in variant:
        return False
    # Compilation is what takes the time: half of it goes for reduction="none", nearly all of a smoke run.
    if config.option.quick:
        return (dtype, upstream, variant) != ("float32", "upstream1", "eager-compiled")
    return config.option.device == "cuda" and upstream == "none"


@pytest.fixture(scope="session")
def suite(request: pytest.FixtureRequest) -> Suite:
    option = request.config.option
    if option.device == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda: torch sees no NVIDIA GPU", returncode=2)
    selected = [
        (
            Case(*(item.callspec.params[name] for name in ("shape", "dtype", "upstream"))),
            item.callspec.params["variant"],
        )
        for item in request.session.items
        if "variant" in getattr(item, "fixturenames", ()) and hasattr(item, "callspec")
    ]
    effort = Effort(0.1, min_rounds=3, max_rounds=5) if option.quick else Effort(option.seconds, option.min_rounds)
    return Suite(selected, effort, option.device, not option.quick, option.time_limit)


@pytest.fixture
def record(benchmark) -> Callable[..., None]:
    """Hands samples and extra_info to pytest-benchmark, as if it had taken them."""

    def record(samples: list[float], group: str, extra_info: dict) -> None:
        benchmark.group = group
        benchmark.extra_info.update(extra_info)
        # There is no public way to report samples taken elsewhere, and `pedantic` times one function at a time.
        benchmark._mode = "interleaved"
        if benchmark.enabled:
            stats = benchmark._make_stats(iterations=1)
            for seconds in samples:
                stats.update(seconds)

    return record


# ------------------------------------------------------------------------------------------------------------ machine


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """What the report prints. The host's name and the environment stay out of it."""
    device = config.option.device
    machine_info.clear()
    machine_info.update(
        device=device,
        name=torch.cuda.get_device_name() if device == "cuda" else _processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        system=f"{platform.system()} {platform.machine()}",
        huge_pages=_huge_pages(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton") if device == "cuda" else None,
        liger_kernel=_version("liger-kernel") if device == "cuda" else None,
        cut_cross_entropy=_version("cut-cross-entropy") if device == "cuda" else None,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        quick=config.option.quick,
    )


def _processor() -> str:
    if sys.platform == "linux":
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def _huge_pages() -> str | None:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    match = re.search(r"\[(\w+)\]", path.read_text()) if path.exists() else None
    return match[1] if match else None


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
