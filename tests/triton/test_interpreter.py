"""The Triton kernels against the definition, without a GPU: Triton's interpreter runs them in numpy.

The interpreter checks what the kernels compute, masks and tails included; not their speed, nor how a GPU rounds.
"""

from __future__ import annotations

import importlib.util

import linear_cases  # noqa: F401  (adds its cases)
import pytest
import silencing_cases  # noqa: F401
from interpreter_pool import results_of
from row_cases import CASES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, str]:
    return results_of("interpreter_worker.py", CASES, tmp_path_factory.mktemp("interpreter"))


@pytest.mark.parametrize("name", CASES)
def test_case(results: dict[str, str], name: str) -> None:
    assert not results[name], f"\n{results[name]}"
