"""Row operations: many classes, values of classes that are out, and arguments that only look right."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ltkernels.functional as LF
from ltkernels import _ops, margins
from ltkernels import nn as lnn
from ltkernels.neighbors import NeighborMap

pytestmark = pytest.mark.variants
NEIGHBORS = NeighborMap.from_pairs([(0, 3)], num_classes=3, num_auxiliary=2)
LOGITS = torch.linspace(-2, 2, 30).view(6, 5).sin()
TARGET = torch.tensor([0, 1, 2, 2, 1, 0])
CLASS = torch.tensor([0, 1, 2])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------------- many classes


@pytest.mark.parametrize("classes", [1001, 8142, 50304, 262144])
@pytest.mark.parametrize("how", ["smoothed", "uniform", "masked"])
def test_targets_spread_over_many_classes(classes: int, how: str) -> None:
    """A running sum of equal terms rounds the same way again and again."""
    logits = randn(2, classes).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    if how == "uniform":
        target = torch.full((2, classes), 1 / classes)
        loss, right = LF.margin_cross_entropy(logits, target), F.cross_entropy(exact, target.double())
    else:
        target = torch.tensor([0, classes - 2])
        mask = torch.ones(classes, dtype=torch.bool)
        if how == "masked":
            mask[1::2] = False
            mask[target] = True
        loss = LF.margin_cross_entropy(logits, target, label_smoothing=0.1, mask=mask)
        log_p = exact.masked_fill(~mask, -math.inf).log_softmax(1)
        own = log_p.gather(1, target[:, None])[:, 0]
        right = -(0.9 * own + 0.1 * log_p[:, mask].mean(1)).mean()
    loss.backward(), right.backward()
    torch.testing.assert_close(loss.double(), right, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-9)


# ------------------------------------------------------------------------------------------------- classes that are out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [5, 40])
def test_gradient_beyond_the_largest_number_is_0_in_classes_that_are_out(classes: int, dtype: torch.dtype) -> None:
    """Weight times scale overflows, neither of them by itself, and 0 times infinity is NaN."""
    logits, target = torch.zeros(1, classes, dtype=dtype, requires_grad=True), torch.tensor([0])
    out = torch.arange(classes) == 1
    neighbors = NeighborMap.from_pairs([(0, 1)], num_classes=1, num_auxiliary=classes - 1)
    options = {"sample_weight": torch.tensor([1e38]), "scale": 1e5, "reduction": "sum"}
    for loss in (
        LF.margin_cross_entropy(logits, target, mask=~out, **options),
        LF.auxiliary_cross_entropy(logits, target, neighbors, **options),
    ):
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient[0, 0] == -math.inf and gradient[0, 1] == 0 and (gradient[0, 2:] == math.inf).all()


@pytest.mark.parametrize("classes", [3, 40])
def test_small_float16_numbers_where_the_processor_flushes_smaller_ones(classes: int) -> None:
    """Subnormal in float16, but not in float32: nothing of the mode of the processor is about them."""
    logits = torch.zeros(1, classes, dtype=torch.float16)
    logits[0, 0] = 5e-5
    probabilities = torch.full((1, classes), 5e-5, dtype=torch.float16)

    def results() -> list[Tensor]:
        x = logits.clone().requires_grad_()
        loss = LF.margin_cross_entropy(x, torch.tensor([0]), scale=1e5)
        small = LF.margin_cross_entropy(x / 1e3, torch.tensor([1]))
        spread = LF.margin_cross_entropy(x, probabilities, reduction="sum")
        return [loss.detach(), spread.detach(), *(torch.autograd.grad(y, x)[0] for y in (loss, small, spread))]

    expected = results()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor flushes nothing")
    try:
        flushed = results()
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(*pair) for pair in zip(flushed, expected, strict=True))
    exact = math.log(math.exp(float(logits[0, 0]) * 1e5) + classes - 1) - float(logits[0, 0]) * 1e5
    assert float(flushed[0]) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("shape", [(9,), (3, 9)])
@pytest.mark.parametrize("learned", ["scale", "logit_scale", "target_margin"])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("backend", ["kernel", "reference"])
def test_what_a_masked_class_holds_reaches_no_gradient(
    value: float, shape: tuple, learned: str, probabilities: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ops, "KERNELS_ENABLED", backend == "kernel")
    mask = torch.ones(shape, dtype=torch.bool)
    mask[..., 4] = False
    target: Tensor = CLASS
    if probabilities:
        target = F.one_hot(CLASS, 9).float() * 0.9 + 0.1 * F.one_hot(CLASS + 5, 9)
    found = []
    for held in (0.25, value):
        logits = randn(3, 9)
        logits[:, 4] = held
        logits.requires_grad_()
        learn = (torch.tensor(2.0) if learned == "scale" else torch.full((9,), 0.5)).requires_grad_()
        LF.margin_cross_entropy(logits, target, mask=mask, **{learned: learn}).backward()
        found.append((logits.grad, learn.grad))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------------- forward mode


def margin(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    return LF.margin_cross_entropy(logits, target, weight)


def linear(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    return LF.linear_margin_cross_entropy(logits, torch.eye(5), target, weight=weight)


@pytest.mark.parametrize("loss", [margin, linear])
def test_forward_mode_is_refused_for_targets_and_weights(loss) -> None:
    p, direction = LOGITS.softmax(1), randn(6, 5)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda target: loss(LOGITS, target), (p,), (direction,))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda weight: loss(LOGITS, TARGET, weight), (torch.ones(5),), (torch.ones(5),))


def test_forward_mode_is_refused_for_prior_counts() -> None:
    with torch.autograd.forward_ad.dual_level():
        counts = torch.autograd.forward_ad.make_dual(torch.arange(1.0, 6), torch.ones(5))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            LF.auxiliary_cross_entropy(LOGITS, TARGET, NEIGHBORS, prior_counts=counts)


# ------------------------------------------------------------------------------------------------ what users do with it


@pytest.mark.parametrize("form", ["margin", "linear", "contrastive"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_divided_in_place_gives_gradients_to_sample_weights(form: str, reduction: str) -> None:
    """``loss /= accumulation_steps``"""
    calls = {
        "margin": lambda u: LF.margin_cross_entropy(LOGITS, TARGET, sample_weight=u, reduction=reduction),
        "linear": lambda u: LF.linear_margin_cross_entropy(
            LOGITS, torch.eye(5), TARGET, sample_weight=u, reduction=reduction
        ),
        "contrastive": lambda u: LF.contrastive_loss(
            LOGITS, temperature=0.5, labels=TARGET, sample_weight=u, reduction=reduction
        ),
    }
    weights = [torch.linspace(0.5, 2, 6).requires_grad_() for _ in range(2)]
    loss = calls[form](weights[0])
    loss /= 2
    loss.backward()
    (calls[form](weights[1]) / 2).backward()
    torch.testing.assert_close(weights[0].grad, weights[1].grad)


def test_equalization_loss_exports() -> None:
    loss = lnn.EqualizationLoss([5, 4, 3, 2, 1], 0.1, 0.0)
    exported = torch.export.export(loss, (LOGITS, TARGET))
    torch.testing.assert_close(exported.module()(2 * LOGITS, TARGET), loss(2 * LOGITS, TARGET))


def test_a_neighbor_map_keeps_what_was_checked() -> None:
    offsets, classes = NEIGHBORS._offsets.clone(), NEIGHBORS._classes.clone()
    made = NeighborMap(offsets, classes, num_classes=3, num_auxiliary=2)
    classes.fill_(4)
    assert made == NEIGHBORS and hash(made) == hash(NEIGHBORS)


# -------------------------------------------------------------------------------------------- arguments that look right


@pytest.mark.parametrize(
    "bias, error, words",
    [
        (torch.ones(1), ValueError, r"expected a Tensor of shape \(5,\), got shape \(1,\)"),
        (torch.tensor(1.0), ValueError, r"expected a Tensor of shape \(5,\), got shape \(\)"),
        (2.0, ValueError, r"expected a Tensor of shape \(5,\), got float"),
        (torch.ones(5, dtype=torch.int64), TypeError, "expected a floating dtype, got torch.int64"),
    ],
)
def test_a_bias_beside_a_prior_is_checked_as_one_without(bias: object, error: type, words: str) -> None:
    with pytest.raises(error, match="logit_bias: " + words):
        LF.auxiliary_cross_entropy(LOGITS, TARGET, NEIGHBORS, prior_counts=torch.arange(1.0, 6), logit_bias=bias)


@pytest.mark.parametrize("name", ["logit_scale", "target_margin"])
@pytest.mark.parametrize(
    "value, words",
    [
        (torch.ones(5, dtype=torch.int64), "expected a floating dtype, got torch.int64"),
        ([1.0] * 5, "expected a Tensor or None, got list"),
        (2.0, "expected a Tensor or None, got float"),
    ],
)
def test_vectors_beside_a_learned_scale_are_checked_as_without(name: str, value: object, words: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: {words}"):
        LF.margin_cross_entropy(LOGITS, TARGET, scale=torch.tensor(2.0), **{name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_learned_scale_that_is_not_finite_is_named(value: float) -> None:
    with pytest.raises(ValueError, match=r"^scale: expected finite values, got"):
        LF.margin_cross_entropy(LOGITS, TARGET, scale=torch.tensor(value))
    with pytest.raises(ValueError, match=r"^scale: expected finite values, got"):
        LF.linear_margin_cross_entropy(LOGITS, torch.eye(5), TARGET, scale=torch.tensor(value))


@pytest.mark.parametrize("tau", [1e38, 1e39, 1e308])
def test_a_prior_beyond_float32_is_refused(tau: float) -> None:
    with pytest.raises(ValueError, match="class_counts: expected counts and settings whose results are finite in"):
        margins.logit_adjustment([1000, 5, 4], tau)
    with pytest.raises(ValueError, match="prior_counts: expected counts and settings whose results are finite in"):
        lnn.NeighborSilencingLoss(NEIGHBORS, prior_counts=[1000, 5, 4, 3, 2], tau=tau)


@pytest.mark.parametrize("name, value", [("target", TARGET[:1]), ("sample_weight", torch.ones(1))])
def test_problems_of_vmap_have_a_number_for_each_row(name: str, value: Tensor) -> None:
    """One number would be taken for all rows."""
    options = {"target": TARGET, "sample_weight": torch.ones(6)} | {name: value}
    many = torch.stack([options.pop(name)] * 2)
    with pytest.raises(ValueError, match=rf"^{name}: expected .*shape \(6,\)"):
        torch.func.vmap(lambda x: LF.margin_cross_entropy(LOGITS, **options, **{name: x}))(many)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_logits_to_mask_are_floating(dtype: torch.dtype) -> None:
    for call in (LF.mask_auxiliary, LF.auxiliary_predict):
        with pytest.raises(TypeError, match=f"logits: expected a floating dtype, got {dtype}"):
            call(torch.ones(6, 5).to(dtype), 3)
