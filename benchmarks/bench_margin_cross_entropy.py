"""margin_cross_entropy against its peers: forward and backward, every shape, dtype, upstream gradient and variant.

A test is named ``4096x1000-float32-upstream1-ours``; ``-k`` selects. What is not selected is not run, so that
``-k "upstream1 and (ours or eager)"`` still times its variants in turn, and only those.
"""

from __future__ import annotations

import pytest

from benchmarks.peers import VARIANTS
from benchmarks.problems import Case
from benchmarks.suite import LeftOut


def test_forward_backward(shape, dtype, upstream, variant, suite, record):
    case = Case(shape, dtype, upstream)
    try:
        measured = suite.measured(case, variant)  # asserts loss and gradient before anything is timed
    except LeftOut as reason:
        pytest.skip(str(reason))
    if measured.failure is not None:
        raise measured.failure
    record(measured.samples, str(case), measured.extra_info(case, VARIANTS[variant], suite.device))
