"""contrastive_loss against losses that hold all similarities, and others that do not: forward and backward.

A test is named ``4096x128-float32-upstream1-ours``, by M x D.
"""

from benchmarks.contrastive import FAMILY  # noqa: F401  conftest makes the tests from it


def test_forward_backward(case, variant, measure):
    measure(case, variant)
