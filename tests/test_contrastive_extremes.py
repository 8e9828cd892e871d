"""Contrastive losses of logits in the billions and of temperatures that make no sense: no number that looks right."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ltkernels.functional as LF
from ltkernels import nn as lnn

pytestmark = pytest.mark.variants
LABELS = torch.arange(6) // 2
ROWS = torch.arange(8)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def similarities(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    return x.double() @ y.double().T / temperature


@pytest.mark.parametrize("dtype, size", [(torch.float32, 1e4), (torch.float64, 1e10)])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("two_sided", [False, True])
def test_log_sum_exp_of_huge_logits(dtype: torch.dtype, size: float, seed: int, two_sided: bool) -> None:
    """A fused product of which the rounded one was the maximum would be off by more than the whole sum."""
    x, y = ((size * randn(8, 16, seed=seed + k)).to(dtype) for k in (0, 100))
    exact = similarities(x, y if two_sided else x, 0.07)
    if not two_sided:
        exact.fill_diagonal_(-math.inf)
    got = LF.similarity_logsumexp(x, y if two_sided else None, temperature=0.07)
    torch.testing.assert_close(got.double(), exact.logsumexp(1), rtol=100 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("rows", [4, 128, 700])
@pytest.mark.parametrize("by", ["index", "labels"])
@pytest.mark.parametrize("denominator", ["all", "own"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_gradient_where_every_positive_wins_by_far(rows: int, by: str, denominator: str, reduction: str) -> None:
    """exp(-thousands) is 0: what is left would be the difference of two roundings of the same logit."""
    pairs = rows // 2
    centre = 300 * F.normalize(randn(pairs, 64), dim=1).float()
    z = (centre.repeat_interleave(2, 0) + 0.01 * randn(rows, 64, seed=1).float()).requires_grad_()
    index = torch.arange(rows) ^ 1
    logits = similarities(z.detach(), z.detach(), 0.07).fill_diagonal_(-math.inf)
    rivals = logits.scatter(1, index[:, None], -math.inf).amax(1)
    assert (logits.gather(1, index[:, None])[:, 0] - rivals).min() > 2000
    positives = {"positive_index": index} if by == "index" else {"labels": torch.arange(rows) // 2}
    loss = LF.contrastive_loss(z, temperature=0.07, denominator=denominator, reduction=reduction, **positives)
    loss.sum().backward()
    assert not loss.any() and not z.grad.any()


def test_a_loss_of_normalised_rows_at_a_low_temperature_is_not_negative() -> None:
    z = F.normalize(randn(64, 32), dim=1).float().repeat_interleave(2, 0)
    loss = LF.contrastive_loss(
        z, temperature=0.01, positive_index=torch.arange(128) ^ 1, normalize=True, reduction="none"
    )
    assert loss.min() >= 0


# --------------------------------------------------------------------------------------------------------- temperatures


@pytest.mark.parametrize("value", [math.nan, 0.0, -0.5, 1e-39, math.inf])
def test_where_values_cannot_be_read_a_bad_temperature_gives_nan(value: float) -> None:
    """0, what a row without keys has, would read as solved."""
    x = randn(6, 4).float()
    both = torch.tensor([0.5, value])
    calls = [
        lambda tau: LF.contrastive_loss(x, temperature=tau, labels=LABELS, normalize=True),
        lambda tau: LF.contrastive_loss(x, x.flip(0), temperature=tau, labels=LABELS, key_labels=LABELS),
        lambda tau: LF.contrastive_loss(x, temperature=tau, labels=LABELS, key_bias=torch.zeros(6)),
        lambda tau: LF.similarity_logsumexp(x, temperature=tau).sum(),
    ]
    for call in calls:
        good, bad = torch.func.vmap(call)(both)
        torch.testing.assert_close(good, call(0.5))
        assert bad.isnan() or (math.isinf(value) and bad.isfinite())
        torch._dynamo.reset()
        tau = torch.tensor(value, requires_grad=True)
        loss = torch.compile(call, backend="aot_eager", fullgraph=True)(tau)
        loss.backward()
        assert math.isinf(value) or (loss.isnan() and tau.grad.isnan())


@pytest.mark.parametrize("value", [1e-39, 1e39, 0.0, math.nan])
@pytest.mark.parametrize("form", [float, torch.tensor, lambda value: torch.full((6,), value, dtype=torch.float64)])
def test_a_temperature_needs_an_inverse(value: float, form) -> None:
    with pytest.raises(
        ValueError, match="temperature: expected .* above 0 with a finite inverse in torch.float32, got"
    ):
        LF.contrastive_loss(randn(6, 4).float(), temperature=form(value), labels=LABELS)


def test_rows_without_keys_stay_rows_without_keys() -> None:
    """No key, a NaN key and a NaN temperature are told apart."""
    x = randn(3, 4).float()
    allowed = torch.tensor([[False] * 3, [False, True, True], [True, False, True]])
    lse = torch.func.vmap(lambda tau: LF.similarity_logsumexp(x, x, temperature=tau), in_dims=0)
    assert lse(torch.tensor([1.0, math.nan])).isnan().tolist() == [[False] * 3, [True] * 3]
    loss = LF.contrastive_loss(x, x, temperature=0.5, positive_index=torch.tensor([1, 2, 0]), allowed=allowed)
    assert loss.isfinite()


# -------------------------------------------------------------------------------------------------------------- modules


@pytest.mark.parametrize("module", ["temperature", "isogclr"])
def test_a_negative_sample_does_not_count_from_the_end_where_it_cannot_be_read(module: str) -> None:
    x = randn(8, 4).float()
    loss = (
        lnn.TemperatureContrastiveLoss(torch.full((10,), 0.5)) if module == "temperature" else lnn.ISogCLRLoss(10, 0.3)
    )
    index = torch.tensor([0, 3, 1, -1])
    with pytest.raises(ValueError, match="index: expected samples from 0 to 9, got -1"):
        loss(x, index)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    torch._dynamo.reset()
    with pytest.raises((IndexError, RuntimeError), match="out of bounds|out of range"):
        torch.compile(loss, backend="aot_eager", fullgraph=True)(x, index)
    assert all(torch.equal(before[name], value) for name, value in loss.state_dict().items())
    good = torch.tensor([0, 3, 1, 9])
    assert torch.compile(loss.eval(), backend="aot_eager", fullgraph=True)(x, good) == loss(x, good)


@pytest.mark.parametrize(
    "make, arguments",
    [
        (lambda: lnn.BalancedContrastiveLoss(0.2), (ROWS % 3, randn(3, 4).float())),
        (lambda: lnn.TemperatureContrastiveLoss(torch.full((10,), 0.5)), (torch.tensor([0, 3, 1, 9]),)),
        (lambda: lnn.ISogCLRLoss(10, 0.3).eval(), (torch.tensor([0, 3, 1, 9]),)),
    ],
    ids=["balanced", "temperature", "isogclr"],
)
def test_modules_under_vmap(make, arguments: tuple) -> None:
    x, loss = randn(3, 8, 4).float(), make()
    together = torch.func.vmap(loss, in_dims=(0, *[None] * len(arguments)))(x, *arguments)
    torch.testing.assert_close(together, torch.stack([loss(one, *arguments) for one in x]))
    many = tuple(torch.stack([value] * 3) for value in arguments)
    torch.testing.assert_close(torch.func.vmap(loss)(x, *many), together)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_states_are_float32_at_least_whatever_the_default_dtype(default: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        modules = [lnn.ISogCLRLoss(10, 0.3), lnn.TemperatureScheduledLoss(10)]
    finally:
        torch.set_default_dtype(before)
    for module in modules:
        floating = {value.dtype for value in module.state_dict().values() if value.is_floating_point()}
        assert floating == {torch.float64 if default == torch.float64 else torch.float32}


def test_macl_temperature_stays_above_0() -> None:
    """Views that oppose each other: a mean similarity of -1."""
    z = randn(4, 8).float()
    assert lnn.MACLLoss(0.2, alpha=0.99)(torch.cat([z, -z])).isfinite()
    with pytest.raises(
        ValueError, match=r"alpha, threshold: expected alpha \* \(1 \+ threshold\) < 1, got 1.0 and 0.0"
    ):
        lnn.MACLLoss(0.2, alpha=1.0)
