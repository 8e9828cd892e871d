"""The contrastive kernels against the definition, without a GPU: Triton's interpreter runs them in numpy.

The interpreter checks what the kernels compute, masks and tails included; not their speed, nor how a GPU rounds.
"""

from __future__ import annotations

import importlib.util

import pytest
from contrastive_cases import CASES
from interpreter_pool import results_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, str]:
    return results_of("contrastive_worker.py", CASES, tmp_path_factory.mktemp("contrastive_interpreter"))


@pytest.mark.parametrize("name", CASES)
def test_case(results: dict[str, str], name: str) -> None:
    assert not results[name], f"\n{results[name]}"
