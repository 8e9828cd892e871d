"""Options and plumbing of the benchmarks: collection of bench_*.py, the shared suite, pytest-benchmark's records."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from benchmarks.families import FAMILIES
from benchmarks.interleave import Effort
from benchmarks.problems import Case
from benchmarks.results import append_partial, partial_of
from benchmarks.suite import LeftOut, Suite
from ltkernels.trainer.runfolder import revision


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ltkernels benchmarks")
    group.addoption("--quick", action="store_true", help="a smoke run of seconds: one shape, few rounds, one compile")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure; default: cpu")
    group.addoption(
        "--seconds", type=float, default=6.0, help="time of a group (shape, upstream) of variants; default: 6"
    )
    group.addoption("--min-rounds", type=int, default=7, help="even where they take longer than that; default: 7")
    group.addoption(
        "--time-limit", type=float, default=float("inf"), help="seconds from now after which no group is started"
    )


def pytest_configure(config: pytest.Config) -> None:
    if (raw := getattr(config.option, "benchmark_json", None)) is not None:
        partial_of(raw).unlink(missing_ok=True)
    config.option.deadline = time.monotonic() + config.option.time_limit
    config.addinivalue_line("python_files", "bench_*.py")
    # torch 2.13 warns about its own use of it when torch.compile is imported.
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit.script_method:DeprecationWarning")


def pytest_unconfigure(config: pytest.Config) -> None:
    """pytest-benchmark has written everything by now; a run that crashes or is killed does not come here."""
    if (raw := getattr(config.option, "benchmark_json", None)) is not None and raw.exists():
        partial_of(raw).unlink(missing_ok=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    family = getattr(metafunc.module, "FAMILY", None)
    if family is None or "variant" not in metafunc.fixturenames:
        return
    option = metafunc.config.option
    rows = family.rows(option.device, option.quick)
    metafunc.parametrize("case, variant", rows, ids=[f"{case}-{variant}" for case, variant in rows])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU the first upstream gradient and the most telling shape of each family first: the time may run out."""
    if config.option.device == "cuda" and not config.option.quick:
        items.sort(key=_rank)


def _rank(item: pytest.Item) -> tuple[int, int]:
    case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
    if case is None:
        return -1, -1
    family = FAMILIES[case.family]
    return family.upstreams.index(case.upstream), family.gpu_shapes.index(case.shape)


@pytest.fixture(scope="session")
def suite(request: pytest.FixtureRequest) -> Suite:
    option = request.config.option
    if option.device == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda: torch sees no NVIDIA GPU", returncode=2)
    selected = [
        (item.callspec.params["case"], item.callspec.params["variant"])
        for item in request.session.items
        if "variant" in getattr(item, "fixturenames", ()) and hasattr(item, "callspec")
    ]
    effort = Effort(0.1, min_rounds=3, max_rounds=5) if option.quick else Effort(option.seconds, option.min_rounds)
    return Suite(selected, effort, option.device, not option.quick, option.deadline)


@pytest.fixture
def measure(suite: Suite, record) -> Callable[[Case, str], None]:
    """What every test does."""

    def measure(case: Case, variant: str) -> None:
        try:
            measured = suite.measured(case, variant)  # asserts loss and gradients before anything is timed
        except LeftOut as reason:
            pytest.skip(str(reason))
        if measured.failure is not None:
            raise measured.failure
        info = measured.extra_info(case, FAMILIES[case.family].variants[variant], suite.device)
        record(measured.samples, f"{case.family} {case}", info)

    return measure


@pytest.fixture
def record(benchmark, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Hands samples and extra_info to pytest-benchmark, as if it had taken them.

    It writes its file at the end. What a run has measured that crashes or is killed before is in another one.
    """
    config = request.config

    def record(samples: list[float], group: str, extra_info: dict) -> None:
        benchmark.group = group
        benchmark.extra_info.update(extra_info)
        # There is no public way to report samples taken elsewhere, and `pedantic` times one function at a time.
        benchmark._mode = "interleaved"
        if benchmark.enabled:
            stats = benchmark._make_stats(iterations=1)
            for seconds in samples:
                stats.update(seconds)
            if (raw := getattr(config.option, "benchmark_json", None)) is not None:
                whole = benchmark.stats.as_dict()
                one = {name: whole[name] for name in ("fullname", "extra_info", "stats")}
                append_partial(raw, one, lambda: _machine_info(config))

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
        settled=True,  # interleave.py: an untimed run before each timed one
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton") if device == "cuda" else None,
        liger_kernel=_version("liger-kernel") if device == "cuda" else None,
        cut_cross_entropy=_version("cut-cross-entropy") if device == "cuda" else None,
        inf_cl=_version("inf-cl") if device == "cuda" else None,
        pytorch_metric_learning=_version("pytorch-metric-learning"),
        lightly=_version("lightly"),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        revision=revision(Path(__file__).parents[1]),
        quick=config.option.quick,
    )


def _machine_info(config: pytest.Config) -> dict:
    found: dict = {}
    pytest_benchmark_update_machine_info(config, found)
    return found


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
