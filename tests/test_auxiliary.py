"""Auxiliary classes with neighbour silencing: values and gradients, against formulas in Python sets and floats."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import Problem, definition, kernels_run, public, run_kernel, same_bits
from torch import Tensor

import ltkernels.functional as LF
from ltkernels import _ops
from ltkernels.neighbors import NeighborMap

INF, NAN = math.inf, math.nan
# Target class 2 and auxiliary class 8 have no neighbours; auxiliary class 6 has two.
PAIRS = ((0, 4), (0, 6), (1, 5), (1, 6), (3, 7))
C, A = 4, 5
K = C + A
MAP = NeighborMap.from_pairs(PAIRS, num_classes=C, num_auxiliary=A)
EMPTY = NeighborMap.from_pairs((), num_classes=C, num_auxiliary=A)
TARGET = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 6, 2])
N = len(TARGET)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MODES = [(mode, weight) for mode in ("plain", "target_only", "auxiliary_only") for weight in (0.0, 0.1, 1.0)]
MODES += [("back", 0.0)]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_mode = pytest.mark.parametrize("mode", ("plain", "back", "target_only", "auxiliary_only"))
# Both gradients: written by the forward pass, and recomputed by the backward pass.
both_passes = pytest.mark.parametrize("reduction", ["sum", "none"])


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def silenced_by(k: int, mode: str) -> set[int]:
    """S of class k, as the definition has it in words."""
    if k < C:
        return set() if mode == "auxiliary_only" else {a for i, a in PAIRS if i == k}
    anchors = set() if mode == "target_only" else {i for i, a in PAIRS if a == k}
    return anchors | {a for a in range(C, K) if a != k} if mode == "back" else anchors


def silenced_table(mode: str) -> Tensor:
    return torch.tensor([[j in silenced_by(k, mode) for j in range(K)] for k in range(K)])


def gradient(loss: Callable[[Tensor], Tensor], logits: Tensor, upstream: float = 1.0) -> tuple[Tensor, Tensor]:
    """Loss and gradient for the same upstream gradient of each output."""
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf)
    (grad,) = torch.autograd.grad(value, leaf, torch.full_like(value, upstream))
    return value.detach(), grad


# -------------------------------------------------------------------------------------------------------- the formula


def one_row(f: list, t: list, k: int, mode: str, lam: float, eps: float, w: list, bias: list) -> tuple[float, list]:
    """Loss and gradient of a row whose class k picks what is silenced, without its sample weight."""
    out = silenced_by(k, mode)
    present = [j for j in range(K) if lam > 0 or j not in out]
    v = {j: f[j] + bias[j] + (math.log(lam) if j in out else 0.0) for j in present}
    total = math.fsum(math.exp(x) for x in v.values())
    mass = {j: w[j] * ((1 - eps) * t[j] + eps / K) for j in present}
    loss = -math.fsum(mass[j] * (v[j] - math.log(total)) for j in present)
    all_mass = math.fsum(mass.values())
    grad = [all_mass * math.exp(v[j]) / total - mass[j] if j in v else 0.0 for j in range(K)]
    return loss, grad


@pytest.mark.parametrize("function", [LF.auxiliary_cross_entropy, definition], ids=["kernel", "definition"])
@pytest.mark.parametrize(("mode", "lam"), MODES)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("eps", [0.0, 0.2])
@pytest.mark.parametrize("weights", ["plain", "weights", "prior"])
def test_formula(function: Callable, mode: str, lam: float, kind: str, eps: float, weights: str) -> None:
    logits, row_class = 2 * randn(N, K), TARGET
    t = F.one_hot(TARGET, K).double() if kind == "indices" else randn(N, K, seed=1).softmax(1)
    w, u, bias = torch.ones(K).double(), torch.ones(N).double(), torch.zeros(K).double()
    options = {"neighbors": MAP, "neighbor_weight": lam, "mode": mode, "label_smoothing": eps}
    if kind == "probabilities":
        options["row_class"] = row_class
    if weights == "weights":
        w, u = randn(K, seed=2).exp(), randn(N, seed=3).exp()
        options |= {"weight": w, "sample_weight": u}
    if weights == "prior":
        counts = torch.tensor([900.0, 300, 40, 7, 60, 60, 2, 11, 100], dtype=torch.float64)
        bias = 0.7 * (counts / counts.sum()).log()
        options |= {"logit_bias": bias} if function is definition else {"prior_counts": counts, "tau": 0.7}
    rows = [
        one_row(f, x, k, mode, lam, eps, w.tolist(), bias.tolist())
        for f, x, k in zip(logits.tolist(), t.tolist(), row_class.tolist(), strict=True)
    ]
    losses, grads = (torch.tensor(x, dtype=torch.float64) for x in zip(*rows, strict=True))
    loss, grad = u * losses, u[:, None] * grads
    z = (u * w[TARGET]).sum() if kind == "indices" else u.sum()
    target = TARGET if kind == "indices" else t
    for reduction, scale in (("none", 1.0), ("sum", 1.0), ("mean", 1 / z)):
        got, got_grad = gradient(lambda x, r=reduction: function(x, target, reduction=r, **options), logits)
        want = loss if reduction == "none" else loss.sum() * scale
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(got_grad, grad * scale, rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------------------------------------------- exact zeros


@every_dtype
@every_mode
@both_passes
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("upstream", [1.0, 1e30, 0.0])
def test_silenced_gradient_is_exactly_zero(
    dtype: torch.dtype, mode: str, reduction: str, eps: float, upstream: float
) -> None:
    table = silenced_table(mode)[TARGET]
    options = {"mode": mode, "reduction": reduction, "label_smoothing": eps}
    _, grad = gradient(lambda x: public(x, TARGET, neighbors=MAP, **options), randn(N, K, dtype=dtype), upstream)
    assert grad[table].eq(0).all() and (grad[~table].ne(0).all() or upstream == 0)


@every_dtype
@pytest.mark.parametrize("upstream", [INF, -INF, NAN])
@pytest.mark.parametrize("case", ["rows", "rows_smoothed", "rows_bias", "z_loss"])
def test_silenced_gradient_is_zero_under_any_upstream(dtype: torch.dtype, upstream: float, case: str) -> None:
    """Where the gradient is recomputed: 0 times infinity is not NaN there."""
    bias = torch.zeros(K, requires_grad=True)
    options = {
        "rows": {"reduction": "none"},
        "rows_smoothed": {"reduction": "none", "label_smoothing": 0.1},
        "rows_bias": {"reduction": "none", "logit_bias": bias},
        "z_loss": {"reduction": "sum", "return_lse": True},
    }[case]

    def loss(x: Tensor) -> Tensor:
        result = LF.auxiliary_cross_entropy(x, TARGET, MAP, mode="back", **options)
        return result[0] + result[1] if case == "z_loss" else result

    table = silenced_table("back")[TARGET]
    _, grad = gradient(loss, randn(N, K, dtype=dtype), upstream)
    assert grad[table].eq(0).all() and not grad[~table].isfinite().any()


@pytest.mark.parametrize("upstream", [INF, -INF, NAN])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_silenced_gradient_written_by_the_forward_pass_under_any_upstream(upstream: float, reduction: str) -> None:
    table = silenced_table("back")[TARGET]
    _, grad = gradient(
        lambda x: LF.auxiliary_cross_entropy(x, TARGET, MAP, mode="back", reduction=reduction), randn(N, K), upstream
    )
    assert grad[table].eq(0).all()


@pytest.mark.skipif(_ops.BACKEND == "reference", reason="plain torch's autograd multiplies 0 by NaN")
@every_dtype
@both_passes
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_silenced_gradient_of_a_row_that_is_nan(dtype: torch.dtype, reduction: str, value: float, eps: float) -> None:
    logits, table = randn(N, K, dtype=dtype), silenced_table("plain")[TARGET]
    logits[torch.arange(N), TARGET] = value
    _, grad = gradient(
        lambda x: LF.auxiliary_cross_entropy(x, TARGET, MAP, reduction=reduction, label_smoothing=eps), logits
    )
    assert grad[table].eq(0).all() and grad[~table].isnan().all()


# ------------------------------------------------------------------------------------------------------ cancellation


@every_dtype
@both_passes
@every_mode
@pytest.mark.parametrize("value", [25.0, 80.0, 1e4, INF, NAN, -INF])
def test_silenced_logits_do_not_matter(dtype: torch.dtype, reduction: str, mode: str, value: float) -> None:
    """Bit for bit; a sum over all classes minus that of the silenced ones has no digits left at 25."""
    table, logits = silenced_table(mode)[TARGET], randn(N, K, dtype=dtype)
    for options in ({}, {"label_smoothing": 0.1}, {"row_class": TARGET}):
        target = randn(N, K, dtype=dtype, seed=1).softmax(1) if "row_class" in options else TARGET
        options = {"neighbors": MAP, "mode": mode, "reduction": reduction} | options
        want = run_kernel(Problem(logits, target, options | {"return_lse": True}))
        got = run_kernel(Problem(logits.masked_fill(table, value), target, options | {"return_lse": True}))
        assert all(same_bits(got[name], want[name]) for name in want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [25.0, 80.0, INF, NAN])
@pytest.mark.parametrize("classes", [9, 70])
def test_like_the_problem_without_silenced_classes(dtype: torch.dtype, value: float, classes: int) -> None:
    """To a few ulp of torch's float64 answer with the columns taken out; losses down to the smallest difference."""
    neighbors = NeighborMap.from_pairs([(0, 5), (0, classes - 1)], num_classes=4, num_auxiliary=classes - 4)
    kept = torch.tensor([j for j in range(classes) if j not in (5, classes - 1)])
    logits = randn(6, classes, dtype=dtype)
    logits[0, 1:] -= 10  # a small loss
    logits[:, [5, classes - 1]] = value
    target = torch.zeros(6, dtype=torch.long)
    exact, exact_grad = gradient(lambda x: F.cross_entropy(x, target, reduction="none"), logits[:, kept].double())
    got, grad = gradient(lambda x: LF.auxiliary_cross_entropy(x, target, neighbors, reduction="none"), logits)
    assert (got - exact).abs().max() <= 4 * 2**-24 * exact.abs().max() and got[0] > 0
    assert (grad[:, kept].double() - exact_grad).abs().max() <= 2 * torch.finfo(dtype).eps
    assert grad[:, [5, classes - 1]].eq(0).all()


# ------------------------------------------------------------------------------------------------- known equivalents


@every_dtype
@both_passes
@pytest.mark.parametrize("mode", ["plain", "target_only", "auxiliary_only"])
def test_neighbor_weight_1_is_margin_cross_entropy(dtype: torch.dtype, reduction: str, mode: str) -> None:
    logits, options = randn(N, K, dtype=dtype), {"reduction": reduction, "label_smoothing": 0.1}
    got = gradient(
        lambda x: LF.auxiliary_cross_entropy(x, TARGET, MAP, neighbor_weight=1.0, mode=mode, **options), logits
    )
    want = gradient(lambda x: LF.margin_cross_entropy(x, TARGET, **options), logits)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(
            a, b, rtol=4 * torch.finfo(a.dtype).eps, atol=1e-7 if a.dtype != torch.float64 else 0
        )


@every_dtype
@both_passes
@pytest.mark.parametrize("mode", ["plain", "target_only", "auxiliary_only"])
@pytest.mark.parametrize("lam", [0.0, 0.1])
def test_empty_map_is_margin_cross_entropy(dtype: torch.dtype, reduction: str, mode: str, lam: float) -> None:
    options = {"reduction": reduction, "sample_weight": torch.rand(N), "mask": torch.arange(K) != 3}
    for kind, smoothing in itertools.product(("indices", "probabilities"), (0.0, 0.1)):
        target = TARGET if kind == "indices" else randn(N, K, dtype=dtype, seed=1).softmax(1)
        extra = {"neighbors": EMPTY, "neighbor_weight": lam, "mode": mode}
        extra |= {} if kind == "indices" else {"row_class": TARGET}
        options["label_smoothing"] = smoothing
        got = run_kernel(Problem(randn(N, K, dtype=dtype), target, options | extra))
        want = run_kernel(Problem(randn(N, K, dtype=dtype), target, options))
        assert all(same_bits(got[name], want[name]) for name in want)


@every_mode
@pytest.mark.parametrize("tau", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("with_bias", [False, True])
def test_prior_is_a_bias(mode: str, tau: float, with_bias: bool) -> None:
    logits, counts = randn(N, K), torch.tensor([900, 300, 40, 7, 60, 60, 2, 11, 100])
    bias = randn(K, seed=4) if with_bias else torch.zeros(K).double()
    options = {"logit_bias": bias} if with_bias else {}
    want = gradient(
        lambda x: LF.auxiliary_cross_entropy(
            x, TARGET, MAP, mode=mode, logit_bias=bias + tau * (counts.double() / counts.sum()).log()
        ),
        logits,
    )
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.int64, 1e-5)):
        got = gradient(
            lambda x, d=dtype: LF.auxiliary_cross_entropy(
                x, TARGET, MAP, mode=mode, prior_counts=counts.to(d), tau=tau, **options
            ),
            logits,
        )
        torch.testing.assert_close(got, want, rtol=rtol, atol=rtol / 10)


def test_gradient_reaches_the_bias_under_a_prior() -> None:
    bias = torch.zeros(K, dtype=torch.float64, requires_grad=True)
    logits = randn(N, K)
    loss = LF.auxiliary_cross_entropy(
        logits, TARGET, MAP, logit_bias=bias, prior_counts=torch.arange(1, K + 1).double()
    )
    loss.backward()
    prior = (torch.arange(1, K + 1).double() / 45).log()
    _, want = gradient(lambda x: LF.auxiliary_cross_entropy(x, TARGET, MAP, logit_bias=prior), logits)
    torch.testing.assert_close(bias.grad, want.sum(0))


@pytest.mark.parametrize("lam", [0.0, 0.1])
def test_the_two_halves_make_plain(lam: float) -> None:
    logits, options = randn(N, K), {"reduction": "none", "neighbor_weight": lam}
    rows = {
        mode: LF.auxiliary_cross_entropy(logits, TARGET, MAP, mode=mode, **options)
        for mode in ("plain", "target_only", "auxiliary_only")
    }
    unsilenced = LF.margin_cross_entropy(logits, TARGET, reduction="none")
    assert same_bits(torch.where(TARGET < C, rows["target_only"], rows["auxiliary_only"]), rows["plain"])
    assert same_bits(torch.where(TARGET < C, rows["auxiliary_only"], rows["target_only"]), unsilenced)
    table = silenced_table("plain")[TARGET].any(1)
    assert (rows["plain"] < unsilenced)[table].all() and same_bits(rows["plain"][~table], unsilenced[~table])
    if lam == 0:
        back = LF.auxiliary_cross_entropy(logits, TARGET, MAP, mode="back", reduction="none")
        assert same_bits(back[TARGET < C], rows["plain"][TARGET < C]) and (back < rows["plain"])[TARGET >= C].all()


@every_mode
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dense_mask_of_logits(mode: str, dtype: torch.dtype) -> None:
    """A K x K table of 0 and -inf, a row of it added to the logits of each sample, and the usual loss."""
    table = torch.zeros(K, K, dtype=dtype).masked_fill(silenced_table(mode), -INF)
    logits = randn(N, K, dtype=dtype)
    want = gradient(lambda x: F.cross_entropy(x + table[TARGET], TARGET), logits)
    got = gradient(lambda x: LF.auxiliary_cross_entropy(x, TARGET, MAP, mode=mode), logits)
    torch.testing.assert_close(got, want)


@every_mode
def test_order_of_auxiliary_classes_does_not_matter(mode: str) -> None:
    order = torch.tensor([2, 4, 0, 3, 1]) + C  # new class C + i is old class order[i]
    old = torch.cat([torch.arange(C), order])
    new = old.argsort()
    pairs = [(i, int(new[a])) for i, a in PAIRS]
    permuted = NeighborMap.from_pairs(pairs[::-1] + pairs, num_classes=C, num_auxiliary=A)
    logits, weight = randn(N, K), randn(K, seed=2).exp()
    want = gradient(lambda x: LF.auxiliary_cross_entropy(x, TARGET, MAP, weight, mode=mode), logits)
    got = gradient(
        lambda x: LF.auxiliary_cross_entropy(x, new[TARGET], permuted, weight[old], mode=mode), logits[:, old]
    )
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1][:, old])


# ----------------------------------------------------------------------------------------------------- forms of input


@pytest.mark.parametrize("kind", ["indices", "probabilities", "row_class_of_each_position"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_more_dimensions(kind: str, reduction: str) -> None:
    logits, positions = randn(N, K, 3), torch.stack([TARGET, TARGET.flip(0), TARGET.roll(3)], 1)
    flat, rows = logits.movedim(1, -1).reshape(-1, K), positions.reshape(-1)
    options, flat_options = {"reduction": reduction}, {"reduction": reduction}
    target, flat_target = positions, rows
    if kind != "indices":
        target = randn(N, K, 3, seed=1).softmax(1)
        flat_target = target.movedim(1, -1).reshape(-1, K)
        options["row_class"] = TARGET if kind == "probabilities" else positions
        flat_options["row_class"] = TARGET.repeat_interleave(3) if kind == "probabilities" else rows
    got, grad = gradient(lambda x: LF.auxiliary_cross_entropy(x, target, MAP, **options), logits)
    want, want_grad = gradient(lambda x: LF.auxiliary_cross_entropy(x, flat_target, MAP, **flat_options), flat)
    assert torch.equal(got.reshape(-1), want.reshape(-1))
    assert torch.equal(grad.movedim(1, -1).reshape(-1, K), want_grad)


def test_one_sample() -> None:
    logits, probabilities = randn(K), randn(K, seed=1).softmax(0)
    got = LF.auxiliary_cross_entropy(logits, torch.tensor(6), MAP)
    assert torch.equal(got, LF.auxiliary_cross_entropy(logits[None], torch.tensor([6]), MAP))
    got = LF.auxiliary_cross_entropy(logits, probabilities, MAP, row_class=torch.tensor(6), reduction="none")
    want = LF.auxiliary_cross_entropy(logits[None], probabilities[None], MAP, row_class=torch.tensor([6]))
    assert got.shape == () and torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_integer_dtypes(dtype: torch.dtype) -> None:
    logits, probabilities = randn(N, K), randn(N, K, seed=1).softmax(1)
    want = LF.auxiliary_cross_entropy(logits, TARGET, MAP, mode="back")
    assert torch.equal(LF.auxiliary_cross_entropy(logits, TARGET.to(dtype), MAP, mode="back"), want)
    want = LF.auxiliary_cross_entropy(logits, probabilities, MAP, row_class=TARGET)
    strided = torch.stack([TARGET, TARGET], 1).to(dtype)[:, 0]
    assert torch.equal(LF.auxiliary_cross_entropy(logits, probabilities, MAP, row_class=strided), want)


@both_passes
@pytest.mark.parametrize("ignore_index", [-100, 2, 6])
def test_ignored_rows(reduction: str, ignore_index: int) -> None:
    """No class to look neighbours up for, -100 above all; whatever their logits hold."""
    target, logits = TARGET.clone(), randn(N, K)
    target[::3] = ignore_index
    kept = target != ignore_index
    logits[~kept] = NAN
    options = {"mode": "back", "reduction": reduction}
    got, grad = gradient(
        lambda x: LF.auxiliary_cross_entropy(x, target, MAP, ignore_index=ignore_index, **options), logits
    )
    want, want_grad = gradient(lambda x: LF.auxiliary_cross_entropy(x, target[kept], MAP, **options), logits[kept])
    torch.testing.assert_close(got[kept] if reduction == "none" else got, want)
    assert torch.equal(grad[kept], want_grad) and grad[~kept].eq(0).all()


def test_all_target_mass_silenced() -> None:
    """Nothing left to predict: a loss and a gradient of 0."""
    target = torch.zeros(1, K).double()
    target[0, [4, 6]] = 0.5
    got, grad = gradient(lambda x: LF.auxiliary_cross_entropy(x, target, MAP, row_class=torch.tensor([0])), randn(1, K))
    assert got == 0 and grad.eq(0).all()


def test_which_kernels_run() -> None:
    if _ops.BACKEND == "reference":
        pytest.skip("the definition runs no kernel")
    logits = randn(N, K).requires_grad_()
    for reduction, want in (("mean", {"forward_gradient": 1}), ("none", {"forward": 1, "backward": 1})):
        with kernels_run() as ran:
            LF.auxiliary_cross_entropy(logits, TARGET, MAP, reduction=reduction).sum().backward()
        assert ran == want


# ---------------------------------------------------------------------------------------------------------- inference


@pytest.mark.parametrize("shape", [(K,), (N, K), (N, K, 3), (N, K, 2, 2)])
@every_dtype
def test_mask_and_predict(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = randn(*shape, dtype=dtype)
    before, dim = logits.clone(), 0 if len(shape) == 1 else 1
    masked, predicted = LF.mask_auxiliary(logits, C), LF.auxiliary_predict(logits, C)
    assert torch.equal(logits, before) and masked.shape == shape and masked.dtype == dtype
    assert torch.equal(masked.narrow(dim, 0, C), before.narrow(dim, 0, C))
    assert masked.narrow(dim, C, A).eq(-INF).all()
    assert predicted.dtype == torch.int64 and predicted.shape == shape[:dim] + shape[dim + 1 :]
    assert torch.equal(predicted, masked.float().argmax(dim)) and predicted.max() < C
    assert torch.equal(LF.mask_auxiliary(logits, K), logits)
    assert LF.auxiliary_predict(logits, 1).eq(0).all()
    for function in (LF.mask_auxiliary, LF.auxiliary_predict):
        for number in (0, -1, K + 1):
            with pytest.raises(ValueError, match=f"num_classes: expected a number from 1 to {K}, got {number}"):
                function(logits, number)
        with pytest.raises(ValueError, match="0-d"):
            function(torch.tensor(1.0), 1)


def test_mask_passes_gradients_to_target_classes_only() -> None:
    logits = randn(N, K).requires_grad_()
    LF.mask_auxiliary(logits, C).softmax(1)[:, 0].sum().backward()
    assert logits.grad[:, C:].eq(0).all() and logits.grad[:, :C].ne(0).all()
