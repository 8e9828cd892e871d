"""The differences that docs/differs-from-torch.md lists: what torch does, and what the library does instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ltkernels.functional as LF

N, C = 4, 7
PAGE = Path(__file__).parents[1] / "docs" / "differs-from-torch.md"
LOGITS = torch.randn(N, C, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 3, 6, 1])
PROBABILITIES = torch.rand(N, C, generator=torch.Generator().manual_seed(1)).double().softmax(1)


def loss_and_gradient(function: Callable[..., Tensor], logits: Tensor, *arguments: Tensor, **options: object) -> tuple:
    logits = logits.clone().requires_grad_()
    loss = function(logits, *arguments, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]


@pytest.mark.parametrize(
    "row",
    [
        "loss for float16 and bfloat16 logits",
        "loss for float32 logits and float64 probabilities",
        "dtype of `weight`",
        "ignored rows that hold `NaN` or `inf`",
        "integer dtypes of class indices",
    ],
)
def test_the_page_lists_what_is_tested_here(row: str) -> None:
    assert any(line.startswith("|") and row in line for line in PAGE.read_text().splitlines())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_of_16_bit_logits(dtype: torch.dtype) -> None:
    theirs, ours = (f(LOGITS.to(dtype), TARGET) for f in (F.cross_entropy, LF.margin_cross_entropy))
    assert theirs.dtype == dtype and ours.dtype == torch.float32


def test_loss_of_float64_probabilities() -> None:
    theirs, ours = (loss_and_gradient(f, LOGITS, PROBABILITIES) for f in (F.cross_entropy, LF.margin_cross_entropy))
    assert theirs[0].dtype == torch.float64 and ours[0].dtype == torch.float32
    torch.testing.assert_close(ours[0], theirs[0].float())
    torch.testing.assert_close(ours[1], theirs[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weight_of_another_dtype(dtype: torch.dtype) -> None:
    weight = torch.rand(C, generator=torch.Generator().manual_seed(2)).to(dtype)
    with pytest.raises(RuntimeError, match="expected scalar type Float"):
        F.cross_entropy(LOGITS, TARGET, weight)
    torch.testing.assert_close(
        LF.margin_cross_entropy(LOGITS, TARGET, weight), F.cross_entropy(LOGITS, TARGET, weight.float())
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_ignored_rows_that_are_not_finite(value: float, reduction: str) -> None:
    logits, target = LOGITS.clone(), TARGET.clone()
    logits[2], target[2] = value, -100
    theirs, ours = (
        loss_and_gradient(f, logits, target, reduction=reduction) for f in (F.cross_entropy, LF.margin_cross_entropy)
    )
    torch.testing.assert_close(ours[0], theirs[0])
    assert theirs[1][2].isnan().all() and (ours[1][2] == 0).all()
    kept = target >= 0
    torch.testing.assert_close(ours[1][kept], theirs[1][kept])


def test_integer_dtypes() -> None:
    with pytest.raises(RuntimeError, match="Int"):
        F.cross_entropy(LOGITS, TARGET.int())
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        assert torch.equal(LF.margin_cross_entropy(LOGITS, TARGET.to(dtype)), LF.margin_cross_entropy(LOGITS, TARGET))
