"""Inputs at the edge that have a defined answer, one test each. All run on the kernels of every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import Problem, Results, check, evaluate, run_kernel, same_bits
from torch import Tensor

import ltkernels.functional as LF

pytestmark = pytest.mark.variants

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# Both gradients: written by the forward pass, and recomputed by the backward pass.
both_passes = pytest.mark.parametrize("reduction", ["sum", "none"])


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def against_torch(logits: Tensor, target: Tensor, **options: object) -> Results:
    """Errors of a few ulp of what F.cross_entropy gives in float64: no allowance for anything else."""
    problem = Problem(logits, target, options)
    got, exact = run_kernel(problem), evaluate(F.cross_entropy, problem.double())
    for name, value in got.items():
        # 1 is a term of the log-sum-exp's sum and of the gradient's difference.
        limit = 4 * torch.finfo(value.dtype).eps * max(1.0, exact[name].abs().max().item())
        assert (value.double() - exact[name]).abs().max().item() <= limit, name
    return got


# ----------------------------------------------------------------------------------------------------- sizes of logits


@every_dtype
@both_passes
@pytest.mark.parametrize("leading", [1, 7, 16, 64, 99])
def test_first_block_minus_infinity(dtype: torch.dtype, reduction: str, leading: int) -> None:
    """exp(-inf - -inf) is NaN: a running maximum must survive a block without a finite logit."""
    logits = randn(3, 100, dtype=dtype)
    logits[:, :leading] = -INF
    got = against_torch(logits, torch.tensor([99, 99, 99]), reduction=reduction)
    assert got["dlogits"][:, :leading].eq(0).all()


@every_dtype
@both_passes
@pytest.mark.parametrize("offset", [-120.0, -80.0, 120.0, 1e4])
def test_logits_far_from_zero(dtype: torch.dtype, reduction: str, offset: float) -> None:
    """No maximum that starts at 0, no overflow, and no digits lost by adding maximum and logarithm."""
    logits = (randn(5, 33) + offset).to(dtype)
    against_torch(logits, torch.arange(5), reduction=reduction)


def test_log_sum_exp_far_from_zero() -> None:
    logits = randn(5, 33) + 1e4
    _, lse = LF.margin_cross_entropy(logits, torch.arange(5), return_lse=True)
    torch.testing.assert_close(lse.double(), logits.double().logsumexp(1), rtol=2**-23, atol=0)


def test_probability_that_underflows() -> None:
    """A difference of 100 is exp(-100) = 3.7e-44: the loss is exact, the gradient 0 or a subnormal number."""
    logits = torch.tensor([[0.0, -100.0, -1000.0]])
    got = against_torch(logits, torch.tensor([1]), reduction="sum")
    assert got["loss"] == 100
    assert against_torch(logits, torch.tensor([2]), reduction="sum")["loss"] == 1000


@every_dtype
@pytest.mark.parametrize("margin", [1e3, -1e3, 1e30, -1e30])
def test_huge_margin(dtype: torch.dtype, margin: float) -> None:
    """The maximum must be that of the adjusted logits."""
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    for reduction in ("mean", "none"):
        options = {"target_margin": torch.full((9,), margin, dtype=vectors), "reduction": reduction}
        got = check(Problem(randn(4, 9, dtype=dtype), torch.arange(4), options, ("logits", "target_margin")))
        assert got["loss"].isfinite().all() and got["dlogits"].isfinite().all()
        assert (got["loss"] > 0.9 * margin).all() if margin > 0 else (got["loss"] == 0).all()


def test_huge_pairwise_margin_and_bias() -> None:
    pairwise = torch.zeros(9, 9)
    pairwise[:, 3] = 1e30
    bias = torch.zeros(9)
    bias[5] = -1e30
    for options in ({"pairwise_margin": pairwise}, {"logit_bias": bias}):
        got = check(Problem(randn(4, 9), torch.tensor([3, 3, 0, 5]), options))
        assert got["loss"].isfinite().all() and got["dlogits"].isfinite().all()


# ------------------------------------------------------------------------------------------------- infinities and NaN


@every_dtype
@both_passes
@pytest.mark.parametrize("position", [0, 5, 31, 32, 98, 99], ids=lambda j: f"class{j}")
@pytest.mark.parametrize("value", [NAN, INF], ids=["nan", "inf"])
def test_nan_or_infinite_logit(dtype: torch.dtype, reduction: str, position: int, value: float) -> None:
    """That row is NaN altogether, whatever lane the value is in; the others are what they are without it."""
    logits, target = randn(3, 100, dtype=dtype), torch.tensor([5, 6, 7])
    clean = run_kernel(Problem(logits, target, {"reduction": "none"}))
    dirty = logits.clone()
    dirty[1, position] = value
    got = run_kernel(Problem(dirty, target, {"reduction": reduction}))
    assert got["dlogits"][1].isnan().all()
    if reduction == "sum":
        assert got["loss"].isnan()
    else:
        assert got["loss"].isnan().tolist() == [False, True, False]
        assert all(same_bits(got[name][::2], clean[name][::2]) for name in got)


@every_dtype
def test_nan_in_every_lane(dtype: torch.dtype) -> None:
    for classes in (*range(1, 20), 40):
        got = run_kernel(Problem(torch.full((2, classes), NAN, dtype=dtype), torch.tensor([0, classes - 1])))
        assert got["loss"].isnan() and got["dlogits"].isnan().all()


@every_dtype
def test_row_of_minus_infinity(dtype: torch.dtype) -> None:
    logits = randn(3, 20, dtype=dtype)
    logits[1] = -INF
    got = check(Problem(logits, torch.arange(3), {"reduction": "none", "return_lse": True}))
    assert got["loss"].isnan().tolist() == [False, True, False] and got["lse"].isnan()[1]


@every_dtype
@both_passes
def test_target_of_minus_infinity(dtype: torch.dtype, reduction: str) -> None:
    """Loss +inf; its gradient is that of torch: p - t, finite."""
    logits = randn(3, 20, dtype=dtype)
    logits[:, 4] = -INF
    got = check(Problem(logits, torch.tensor([4, 4, 4]), {"reduction": reduction}))
    assert (got["loss"] == INF).all() and got["dlogits"].isfinite().all()


def test_smoothing_with_minus_infinity_is_infinite() -> None:
    """A plain -inf, unlike a mask, keeps its share of the smoothing, as in torch."""
    logits = randn(3, 20)
    logits[1, 7] = -INF
    got = check(Problem(logits, torch.arange(3), {"reduction": "none", "label_smoothing": 0.1}))
    torch_loss = F.cross_entropy(logits, torch.arange(3), reduction="none", label_smoothing=0.1)
    assert got["loss"].isinf().tolist() == torch_loss.isinf().tolist() == [False, True, False]


def test_probability_zero_on_minus_infinity() -> None:
    """A term with t = 0 is 0 even where v = -inf (torch gives NaN); positive probability there gives +inf."""
    logits = torch.tensor([[0.0, 1.0, -INF], [0.0, 1.0, -INF]])
    target = torch.tensor([[0.25, 0.75, 0.0], [0.25, 0.5, 0.25]])
    got = check(Problem(logits, target, {"reduction": "none"}))
    assert got["loss"][0].isfinite() and got["loss"][1] == INF


# ---------------------------------------------------------------------------------------------------- few rows, classes


@every_dtype
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_class(dtype: torch.dtype, reduction: str) -> None:
    for options in ({}, {"scale": 30.0, "target_margin": torch.ones(1)}, {"label_smoothing": 0.1}):
        target = torch.zeros(4, dtype=torch.long)
        got = run_kernel(Problem(randn(4, 1, dtype=dtype), target, options | {"reduction": reduction}))
        assert got["loss"].eq(0).all() and got["dlogits"].eq(0).all()


@every_dtype
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_no_rows(dtype: torch.dtype, kind: str) -> None:
    logits = torch.empty(0, 5, dtype=dtype)
    target = torch.empty(0, dtype=torch.long) if kind == "indices" else torch.empty(0, 5)
    vectors = {"logit_bias": torch.ones(5), "target_margin": torch.ones(5), "sample_weight": torch.empty(0)}
    for reduction, expected in (("mean", NAN), ("sum", 0.0)):
        for options in ({}, vectors):
            got = check(Problem(logits, target, options | {"reduction": reduction}, ("logits", *options)))
            assert got["loss"].shape == () and torch.equal(got["loss"].isnan(), torch.tensor(math.isnan(expected)))
            assert got["dlogits"].shape == (0, 5)
    assert run_kernel(Problem(logits, target, {"reduction": "none"}))["loss"].shape == (0,)
    if kind == "indices":
        got = run_kernel(Problem(logits, target, {"pairwise_margin": torch.ones(5, 5)}, ("pairwise_margin",)))
        assert got["dpairwise_margin"].eq(0).all()


def test_all_rows_ignored() -> None:
    """NaN for the mean as in torch, 0 for a sum, and no gradient."""
    logits, target = randn(4, 9), torch.full((4,), -100)
    options = {"sample_weight": torch.rand(4), "logit_bias": torch.rand(9), "pairwise_margin": torch.rand(9, 9)}
    for reduction, expected in (("mean", NAN), ("sum", 0.0), ("none", 0.0)):
        for extra in ({}, options, {"label_smoothing": 0.1}):
            names = ("logits", *(name for name in extra if name != "label_smoothing"))
            got = check(Problem(logits, target, extra | {"reduction": reduction}, names))
            assert got["loss"].isnan() if math.isnan(expected) else got["loss"].eq(expected).all()
            assert all(got[f"d{name}"].eq(0).all() for name in names)


@both_passes
def test_ignored_rows_may_hold_anything(reduction: str) -> None:
    logits, target = randn(4, 40), torch.tensor([1, -100, 3, -100])
    logits[1], logits[3, 8] = NAN, INF
    options = {"reduction": reduction, "sample_weight": torch.tensor([1.0, NAN, 2.0, INF]), "logit_bias": randn(40)}
    got = check(Problem(logits, target, options, ("logits", "logit_bias")))
    assert got["loss"].isfinite().all() and got["dlogits"][1::2].eq(0).all() and got["dlogit_bias"].isfinite().all()


def test_a_mean_takes_no_weight_from_ignored_rows() -> None:
    """Not even an infinite one, in either form and in the gradient of the weights."""
    x, w, target = randn(4, 6), randn(9, 6, seed=1), torch.tensor([1, -100, 3, -100])
    u, kept = torch.tensor([1.0, INF, 2.0, NAN], requires_grad=True), target >= 0
    exact = F.cross_entropy((x @ w.T)[kept].double(), target[kept], reduction="none")
    expected = (u[kept] * exact).sum() / u[kept].sum()
    (du,) = torch.autograd.grad(expected, u)
    for loss in (
        LF.margin_cross_entropy(x @ w.T, target, sample_weight=u),
        LF.linear_margin_cross_entropy(x, w, target, sample_weight=u),
    ):
        torch.testing.assert_close(loss.double(), expected)
        torch.testing.assert_close(torch.autograd.grad(loss, u)[0], du)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_tensor_scale_of_16_bit_vectors_is_no_16_bit_product(dtype: torch.dtype) -> None:
    """What a number gives, a tensor gives; 30 * 3000 is beyond float16."""
    logits, target = randn(4, 5), torch.tensor([1, 0, 3, 4])
    vectors = {"logit_scale": torch.rand(5).add(0.3).to(dtype), "target_margin": torch.rand(5).to(dtype)}
    for scale in (30.7, 1e-3):
        want = LF.margin_cross_entropy(logits, target, scale=scale, **vectors)
        got = LF.margin_cross_entropy(logits, target, scale=torch.tensor(scale), **vectors)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    large = torch.full((5,), 3000.0, dtype=dtype, requires_grad=True)
    loss = LF.margin_cross_entropy(1e-5 * logits, target, logit_scale=large, scale=torch.tensor(30.0))
    loss.backward()
    assert loss.isfinite() and large.grad.dtype == dtype and large.grad.isfinite().all()


@pytest.mark.parametrize("ignore_index", [3, -1, -100, 200, 2**40])
def test_ignore_index(ignore_index: int) -> None:
    target = torch.tensor([1, ignore_index, 3, 0])
    against_torch(randn(4, 9), target, ignore_index=ignore_index)
    against_torch(randn(4, 9), target, ignore_index=ignore_index, weight=torch.rand(9), label_smoothing=0.2)


# ------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"])
def test_integer_dtypes(dtype: str) -> None:
    logits, target = randn(4, 9), torch.tensor([1, 8, 0, 5])
    want = run_kernel(Problem(logits, target, {"sample_weight": torch.rand(4, generator=torch.manual_seed(0))}))
    options = {"sample_weight": torch.rand(4, generator=torch.manual_seed(0))}
    got = run_kernel(Problem(logits, target.to(getattr(torch, dtype)), options))
    assert all(same_bits(got[name], want[name]) for name in want)


def test_class_that_wraps_to_ignore_index() -> None:
    """156 is -100 in uint8: such a row is not ignored."""
    target = torch.tensor([156, 3], dtype=torch.uint8)
    options = {"sample_weight": torch.tensor([1.0, 2.0])}
    got = check(Problem(randn(2, 200), target, options, ("logits", "sample_weight")))
    want = run_kernel(Problem(randn(2, 200), target.long(), options, ("logits", "sample_weight")))
    assert all(same_bits(got[name], want[name]) for name in want)


def test_strided_targets_and_vectors() -> None:
    """Every argument may be a view with gaps, expanded, or in another floating dtype."""
    wide, target = randn(9, 2).double(), torch.arange(8)[::2]
    options = {"weight": wide[:, 0].abs(), "logit_bias": wide[:, 1], "target_margin": torch.tensor(0.5).expand(9)}
    options |= {"pairwise_margin": randn(9, 9, seed=1).t(), "mask": (randn(9, 4, seed=2) < 1).t()}
    options |= {"sample_weight": torch.rand(8, dtype=torch.float64)[::2], "logit_scale": torch.ones(9).bfloat16()}
    options["mask"][torch.arange(4), target] = True
    got = check(Problem(randn(4, 9), target, options))
    dense = {name: value.float().contiguous() if value.is_floating_point() else value.contiguous()
             for name, value in options.items()}  # fmt: skip
    want = run_kernel(Problem(randn(4, 9), target.contiguous(), dense))
    assert all(same_bits(got[name], want[name]) for name in want)


# --------------------------------------------------------------------------------------------------------------- masks


@every_dtype
@both_passes
@pytest.mark.parametrize("shape", ["class", "row"])
def test_masked_class_has_no_gradient(dtype: torch.dtype, reduction: str, shape: str) -> None:
    mask = torch.ones(40, dtype=torch.bool)
    mask[[0, 17, 39]] = False
    mask = mask if shape == "class" else mask.expand(3, 40)
    got = check(Problem(randn(3, 40, dtype=dtype), torch.tensor([1, 2, 3]), {"mask": mask, "reduction": reduction}))
    assert got["dlogits"][:, [0, 17, 39]].eq(0).all() and got["loss"].isfinite().all()


@both_passes
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30])
def test_masked_logit_may_hold_anything(reduction: str, value: float) -> None:
    logits, mask = randn(3, 40), torch.ones(40, dtype=torch.bool)
    mask[[0, 17, 39]] = False
    want = run_kernel(Problem(logits, torch.tensor([1, 2, 3]), {"mask": mask, "reduction": reduction}))
    dirty = logits.masked_fill(~mask, value)
    got = run_kernel(Problem(dirty, torch.tensor([1, 2, 3]), {"mask": mask, "reduction": reduction}))
    assert all(same_bits(got[name], want[name]) for name in want)


@every_dtype
@both_passes
def test_masked_target(dtype: torch.dtype, reduction: str) -> None:
    """Loss +inf, gradient exactly 0 in the masked entries, that of the log-sum-exp in the others."""
    mask = torch.ones(40, dtype=torch.bool)
    mask[5] = False
    got = check(Problem(randn(2, 40, dtype=dtype), torch.tensor([5, 5]), {"mask": mask, "reduction": reduction}))
    assert got["loss"].eq(INF).all() and got["dlogits"][:, 5].eq(0).all() and got["dlogits"].isfinite().all()
    assert got["dlogits"][:, mask].gt(0).any()


@both_passes
def test_row_without_classes(reduction: str) -> None:
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[1] = False
    options = {"mask": mask, "reduction": reduction, "return_lse": True}
    got = check(Problem(randn(3, 40), torch.tensor([1, 2, 3]), options))
    assert got["lse"].isnan().tolist() == [False, True, False] and got["loss"].isnan().any()
    assert got["dlogits"][1].eq(0).all() and got["dlogits"][::2].isfinite().all()


def test_smoothing_spreads_over_allowed_classes() -> None:
    logits, mask = randn(2, 5), torch.tensor([True, True, False, True, False])
    got = check(Problem(logits, torch.tensor([0, 3]), {"mask": mask, "label_smoothing": 0.3}))
    kept = F.cross_entropy(logits[:, mask], torch.tensor([0, 2]), label_smoothing=0.3)
    torch.testing.assert_close(got["loss"], kept)


def test_probability_on_a_masked_class_is_dropped() -> None:
    logits, mask = randn(1, 4), torch.tensor([True, True, True, False])
    target = torch.tensor([[0.2, 0.1, 0.3, 0.4]])
    got = check(Problem(logits, target, {"mask": mask}))
    log_p = logits[0, :3].log_softmax(0)
    torch.testing.assert_close(got["loss"], -(target[0, :3] * log_p).sum())


# --------------------------------------------------------------------------------------------------- means and dtypes


def test_mean_divides_by_the_sum_of_weights() -> None:
    logits, target = randn(4, 3), torch.tensor([0, 1, -100, 2])
    w, u = torch.tensor([0.5, 2.0, 4.0]), torch.tensor([1.0, 3.0, 7.0, 0.25])
    row = F.cross_entropy(logits, target, w, reduction="none")
    got = LF.margin_cross_entropy(logits, target, w, sample_weight=u)
    torch.testing.assert_close(got, (u * row).sum() / (0.5 * 1 + 2 * 3 + 4 * 0.25))
    probabilities = randn(4, 3, seed=1).softmax(1)
    row = F.cross_entropy(logits, probabilities, w, reduction="none")
    got = LF.margin_cross_entropy(logits, probabilities, w, sample_weight=u)
    torch.testing.assert_close(got, (u * row).sum() / u.sum())


@every_dtype
def test_dtypes_of_results(dtype: torch.dtype) -> None:
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    bias = torch.zeros(9, dtype=torch.bfloat16)
    options = {"return_lse": True, "logit_bias": bias, "reduction": "none"}
    got = run_kernel(Problem(randn(4, 9, dtype=dtype), torch.arange(4), options, ("logits", "logit_bias")))
    assert got["loss"].dtype == got["lse"].dtype == accumulated
    assert got["dlogits"].dtype == dtype and got["dlogit_bias"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_lose_nothing_else(dtype: torch.dtype) -> None:
    """The loss of 16-bit logits is that of the same numbers in float32, to float32 accuracy."""
    logits = (randn(64, 1000) * 5).to(dtype)
    got = LF.margin_cross_entropy(logits, torch.arange(64))
    torch.testing.assert_close(got.double(), F.cross_entropy(logits.double(), torch.arange(64)), rtol=5e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exp_of_16_bit_logits(dtype: torch.dtype) -> None:
    """Two classes, so that the error of one exp shows in the log-sum-exp, which is rounded at 1 and below."""
    x = torch.arange(0, 20, 1 / 64).to(dtype)
    logits = torch.stack([torch.zeros_like(x), -x], 1)
    _, lse = LF.margin_cross_entropy(logits, torch.zeros(len(x), dtype=torch.long), return_lse=True)
    assert (lse.double() - torch.log1p((-x.double()).exp())).abs().max() <= 2.5e-7


# ------------------------------------------------------------------------------------------------- upstream gradients


def batched_backward(loss: Tensor, logits: Tensor, upstream: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits, upstream.expand(2), is_grads_batched=True)[0][1]


BACKWARDS = {
    "in_place": torch.autograd.grad,
    "kept_graph": lambda *arguments: torch.autograd.grad(*arguments, retain_graph=True),
    "graph_of_the_gradient": lambda *arguments: torch.autograd.grad(*arguments, create_graph=True),
    "batched": batched_backward,
}


@pytest.mark.parametrize("factor", [INF, -INF, NAN, 0.0, 3.0])
@pytest.mark.parametrize("backward", BACKWARDS.values(), ids=BACKWARDS)
def test_entries_of_gradient_0_stay_0(backward, factor: float) -> None:
    """Removed classes and ignored rows, whatever the upstream gradient: 0 * inf would be NaN."""
    rows, classes = 300, 1000  # more than one piece
    logits, target = randn(rows, classes).requires_grad_(), torch.arange(rows)
    target[7] = -100
    mask = torch.arange(classes) != 500
    exact = logits.detach().double().masked_fill(~mask, -INF).softmax(1)
    exact[torch.arange(rows), target.clamp(min=0)] -= 1
    out = ~mask.expand(rows, classes) | (target == -100)[:, None]
    loss = LF.margin_cross_entropy(logits, target, mask=mask, reduction="sum")
    got = backward(loss, logits, torch.tensor(factor))
    got = got[0] if isinstance(got, tuple) else got
    assert (got[out] == 0).all()
    torch.testing.assert_close(got[~out].double(), exact[~out] * factor, rtol=1e-4, atol=1e-6, equal_nan=True)
