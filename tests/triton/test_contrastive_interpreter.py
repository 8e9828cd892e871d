"""The contrastive kernels against the definition, without a GPU: Triton's interpreter runs them in numpy.

The interpreter checks what the kernels compute, masks and tails included; not their speed, nor how a GPU rounds.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from contrastive_cases import CASES

WORKER = Path(__file__).with_name("contrastive_worker.py")
SHARDS = 2

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, str]:
    """Of every case, what went wrong."""
    folder = tmp_path_factory.mktemp("contrastive_interpreter")
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))}
    commands = [[sys.executable, str(WORKER), str(folder / f"{i}.json"), str(i), str(SHARDS)] for i in range(SHARDS)]
    workers = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    results = {}
    for i, worker in enumerate(workers):
        output, _ = worker.communicate(timeout=900)
        assert worker.returncode == 0, f"worker {i} failed:\n{output}"
        results |= json.loads((folder / f"{i}.json").read_text())
    return results


@pytest.mark.parametrize("name", CASES)
def test_case(results: dict[str, str], name: str) -> None:
    assert not results[name], f"\n{results[name]}"
