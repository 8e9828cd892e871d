"""The reference trainer against the loop that repositories share: one step on CIFAR-100-LT, ResNet-32, LDAM-DRW.

A test is named by the row of the table, ``test_step[plain]``.
"""

from __future__ import annotations

import argparse
import time

import pytest

from benchmarks.interleave import Effort
from benchmarks.run_gpu import TRAINER

for package in TRAINER:
    pytest.importorskip(package, reason=f"the trainer needs {package}: pip install ltkernels[trainer]")

from benchmarks.report_trainer import BY_ROW  # noqa: E402
from benchmarks.suite import Measured  # noqa: E402
from benchmarks.trainer import METHOD, ROWS, Row, Size, Task, make_task, measure  # noqa: E402


def reason_to_leave_out(row: Row, option: argparse.Namespace) -> str | None:
    return row.reason_to_leave_out(option.device, option.quick)


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest) -> tuple[Task, dict[str, Measured]]:
    """All selected rows that this machine can run, timed in one loop."""
    option = request.config.option
    if time.monotonic() > option.deadline:
        pytest.skip("the time limit has passed")
    items = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    names = {item.callspec.params["row"] for item in items}
    rows = [ROWS[name] for name in ROWS if name in names and reason_to_leave_out(ROWS[name], option) is None]
    size = Size.quick() if option.quick else Size()
    # A round is a block of steps of every row: the GPU run has little time, and three rounds fit into it.
    rounds = min(option.min_rounds, 3) if option.device == "cuda" else option.min_rounds
    effort = Effort(0.1, min_rounds=3, max_rounds=3) if option.quick else Effort(option.seconds, rounds)
    task = make_task(size)
    return task, measure(rows, task, option.device, effort, size)


@pytest.mark.parametrize("row", ROWS)
def test_step(row, request, record):
    device = request.config.option.device
    reason = reason_to_leave_out(ROWS[row], request.config.option)
    if reason is not None:
        pytest.skip(reason)
    task, results = request.getfixturevalue("measured")
    result = results[row]
    if result.failure is not None:
        raise result.failure
    info = {
        "family": "trainer",
        "shape": task.shape,
        "dtype": BY_ROW,
        "upstream": METHOD,
        "variant": row,
        "device": device,
        "loss_error": result.loss_error,
        "gradient_error": result.gradient_error,
    }
    record(result.samples, f"trainer {task.shape}", info)
