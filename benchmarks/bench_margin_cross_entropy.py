"""margin_cross_entropy against its peers: forward and backward, every shape, dtype, upstream gradient and variant.

A test is named ``4096x1000-float32-upstream1-ours``; ``-k`` selects. What is not selected is not run, so that
``-k "upstream1 and (ours or eager)"`` still times its variants in turn, and only those.
"""

from benchmarks.margin import FAMILY  # noqa: F401  conftest makes the tests from it


def test_forward_backward(case, variant, measure):
    measure(case, variant)
