"""The rule of accuracy itself: what it lets pass and what it does not."""

from __future__ import annotations

import pytest
import torch
from oracle import deviation

EXACT = torch.tensor([1.0, -0.25, 0.5, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_errors_are_relative_to_the_largest_value(dtype: torch.dtype, size: float) -> None:
    """Small gradients, those of a mean over many rows, are held to as many digits as large ones."""
    exact = EXACT * size
    allowed = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    eager = exact.to(dtype)
    assert deviation(eager, exact, eager) is None
    for error, passes in ((0.5 * allowed, True), (3 * allowed, False)):
        got = (exact + error * size * torch.tensor([1.0, 0, 0, 0])).to(dtype)
        assert (deviation(got, exact, eager) is None) == passes, error


def test_plain_torch_s_own_error_counts_twice_and_terms_stand_in_for_the_largest_value() -> None:
    exact, eager = EXACT, (EXACT + 1e-3).float()
    assert deviation((EXACT + 1.9e-3).float(), exact, eager) is None
    assert deviation((EXACT + 2.1e-3).float(), exact, eager) is not None
    got = (EXACT + 1e-5).float()
    assert deviation(got, exact, EXACT.float()) is not None
    assert deviation(got, exact, EXACT.float(), largest=100.0) is None


def test_what_is_not_finite_must_be_where_the_definition_has_it() -> None:
    exact = torch.tensor([1.0, torch.nan, torch.inf], dtype=torch.float64)
    assert deviation(exact.float(), exact, exact.float()) is None
    for got in ([torch.nan, torch.nan, torch.inf], [1.0, 0.0, torch.inf], [1.0, torch.nan, -torch.inf]):
        assert deviation(torch.tensor(got), exact, exact.float()) is not None
