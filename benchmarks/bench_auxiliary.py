"""auxiliary_cross_entropy against a dense mask and against the plain kernel: forward and backward.

A test is named ``512x6012-float32-upstream1-ours``. ``LTKERNELS_NEIGHBORS`` may name a neighbour map, see auxiliary.py.
"""

from benchmarks.auxiliary import FAMILY  # noqa: F401  conftest makes the tests from it


def test_forward_backward(case, variant, measure):
    measure(case, variant)
