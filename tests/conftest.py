"""Settings and helpers of the whole suite."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).parent

# The same examples at every run; `--hypothesis-profile explore` looks for new ones.
_COMMON = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
settings.register_profile("repeatable", derandomize=True, **_COMMON)
settings.register_profile("explore", max_examples=20000, **_COMMON)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "variants: run again with the kernels of each instruction set")


# Marks of tests that run only where `-m` names them, and why.
ON_REQUEST = {
    "large": "more than 2^22 logits: run with -m large",
    "distribution": "compiles the extension: run with -m distribution",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for mark, reason in ON_REQUEST.items():
        if mark in config.option.markexpr:
            continue
        for item in items:
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """After a fault of the GPU nothing works in its process: pytest-xdist begins another for the tests to come."""
    try:
        return (yield)
    finally:
        if item.get_closest_marker("gpu") and torch.cuda.is_available():
            try:
                torch.cuda.synchronize()  # the fault of a kernel shows when somebody waits for it
            except RuntimeError as error:
                if "PYTEST_XDIST_WORKER" not in os.environ:
                    raise
                print(f"{item.nodeid}: {error}", file=sys.__stderr__, flush=True)
                os._exit(3)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small problems are faster without a second thread, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Runs Python with arguments and environment variables in a process of its own; gives what it printed."""

    def run(*arguments: str, timeout: float = 600, fails: bool = False, **environment: str) -> str:
        path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
        # A pytest started here is nobody's worker.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        result = subprocess.run(
            [sys.executable, *arguments],
            env=inherited | {"PYTHONPATH": path} | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=TESTS.parent,
        )
        # 1 is an uncaught exception; anything else a crash.
        assert result.returncode == int(fails), f"{result.returncode}: {result.stdout[-4000:]}{result.stderr[-4000:]}"
        return result.stderr if fails else result.stdout

    return run
