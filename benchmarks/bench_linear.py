"""linear_margin_cross_entropy against classifiers that hold all logits, and others that do not: forward and backward.

A test is named ``2048x512x8142-float32-upstream1-ours``, by N x D x C.
"""

from benchmarks.linear import FAMILY  # noqa: F401  conftest makes the tests from it


def test_forward_backward(case, variant, measure):
    measure(case, variant)
