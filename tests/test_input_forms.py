"""Input forms (C,), (N, C) and (N, C, d1, ...), and equality with F.cross_entropy where there are no margins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import Problem, deviation, evaluate, run_kernel, same_bits
from torch import Tensor

import ltkernels.functional as LF

SHAPES = [(5,), (1,), (4, 5), (0, 5), (3, 5, 2), (2, 7, 3, 2), (2, 33, 2, 1, 2), (0, 3, 4), (3, 4, 0)]
FORMS = [(7,), (4, 7), (4, 7, 3), (4, 7, 3, 2)]
every_form = pytest.mark.parametrize("shape", FORMS, ids=lambda shape: "x".join(map(str, shape)))


def samples(shape: tuple[int, ...]) -> tuple[int, ...]:
    return () if len(shape) == 1 else (shape[0], *shape[2:])


def make(shape: tuple[int, ...], seed: int, probabilities: bool, dtype: torch.dtype = torch.float32) -> tuple:
    """Logits, target and class weights."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator).mul(3).to(dtype)
    classes = shape[0] if len(shape) == 1 else shape[1]
    if probabilities:
        target = torch.randn(shape, generator=generator).softmax(0 if len(shape) == 1 else 1).to(dtype)
    else:
        target = torch.randint(classes, samples(shape), generator=generator)
    return logits, target, (torch.rand(classes, generator=generator) + 0.1).to(dtype)


# --------------------------------------------------------------------------------------------------------------- torch


@settings(max_examples=1000)
@given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 2**20),
    probabilities=st.booleans(),
    weighted=st.booleans(),
    ignore_index=st.sampled_from([-100, 0, 2]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    label_smoothing=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_torch_without_margins(
    one_thread: None,
    shape: tuple[int, ...],
    seed: int,
    probabilities: bool,
    weighted: bool,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    dtype: torch.dtype,
) -> None:
    logits, target, weight = make(shape, seed, probabilities, dtype)
    # torch calls an empty mean over probabilities NaN or 0 depending on the shape.
    assume(not (probabilities and logits.numel() == 0))
    assume(not (probabilities and ignore_index >= 0))  # an error in torch too
    options = {"reduction": reduction, "label_smoothing": label_smoothing, "ignore_index": ignore_index}
    problem = Problem(logits, target, options | {"weight": weight if weighted else None})
    got, eager, exact = (
        run_kernel(problem),
        evaluate(F.cross_entropy, problem),
        evaluate(F.cross_entropy, problem.double()),
    )
    for name, value in got.items():
        assert value.shape == eager[name].shape and value.dtype == eager[name].dtype
        # The loss is a difference of terms as large as the logits.
        assert deviation(value, exact[name], eager[name], 10.0 if name == "loss" else 0.0) is None, name


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_give_a_float32_loss(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The first of the two differences; F.cross_entropy rounds it to 16 bits."""
    logits, target, _ = make(shape, 0, False, dtype)
    for reduction in ("mean", "none"):
        got = run_kernel(Problem(logits, target, {"reduction": reduction}))
        exact = evaluate(F.cross_entropy, Problem(logits, target, {"reduction": reduction}).double())
        assert got["loss"].dtype == torch.float32 and got["dlogits"].dtype == dtype
        torch.testing.assert_close(got["loss"].double(), exact["loss"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got["dlogits"].double(), exact["dlogits"], rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "exception"),
    [
        ({"target": torch.tensor([0, 7, 1, 2])}, IndexError),
        ({"weight": torch.ones(6)}, ValueError),
        ({"reduction": "average"}, ValueError),
        ({"label_smoothing": 1.5}, ValueError),
        ({"target": torch.zeros(4, dtype=torch.bool)}, TypeError),
    ],
    ids=["target", "weight", "reduction", "label_smoothing", "dtype"],
)
def test_bad_input_is_bad_for_both(change: dict, exception: type[Exception]) -> None:
    """The second difference: the type of the error."""
    logits, target, _ = make((4, 7), 0, False)
    arguments = {"input": logits, "target": target} | change
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        F.cross_entropy(**arguments)
    with pytest.raises(exception):
        LF.margin_cross_entropy(**arguments)


# ---------------------------------------------------------------------------------------------------------- all options


def margins(shape: tuple[int, ...], probabilities: bool) -> dict:
    classes = shape[0] if len(shape) == 1 else shape[1]
    generator = torch.Generator().manual_seed(1)
    options = {
        "weight": torch.rand(classes, generator=generator),
        "logit_scale": torch.rand(classes, generator=generator) + 0.5,
        "logit_bias": torch.randn(classes, generator=generator),
        "target_margin": torch.rand(classes, generator=generator),
        "scale": 2.5,
        "sample_weight": torch.rand(samples(shape), generator=generator),
        "mask": torch.rand(shape, generator=generator) < 0.8,
    }
    return (
        options if probabilities else options | {"pairwise_margin": torch.randn(classes, classes, generator=generator)}
    )


def as_matrix(x: Tensor) -> Tensor:
    """(N, C) of (C,) or (N, C, d1, ...), spelled out index by index."""
    if x.dim() == 1:
        return x[None]
    positions = [
        index for index in torch.cartesian_prod(*map(torch.arange, samples(tuple(x.shape)))).reshape(-1, x.dim() - 1)
    ]
    return torch.stack([x[(int(n), slice(None), *map(int, rest))] for n, *rest in positions])


@every_form
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_form_is_a_matrix_of_rows(shape: tuple[int, ...], probabilities: bool, reduction: str) -> None:
    """Value, log-sum-exp and gradients equal those of the (N, C) call bit for bit."""
    logits, target, _ = make(shape, 0, probabilities)
    options = margins(shape, probabilities) | {"reduction": reduction, "return_lse": True}
    flat = options | {"sample_weight": options["sample_weight"].reshape(-1), "mask": as_matrix(options["mask"])}
    flat_target = as_matrix(target) if probabilities else target.reshape(-1)
    names = ("logits", "logit_bias", "sample_weight")
    got = run_kernel(Problem(logits, target, options, names))
    want = run_kernel(Problem(as_matrix(logits), flat_target, flat, names))
    assert got["lse"].shape == samples(shape) and same_bits(got["lse"].reshape(-1), want["lse"])
    assert got["loss"].shape == (samples(shape) if reduction == "none" else ())
    assert same_bits(got["loss"].reshape(-1), want["loss"].reshape(-1))
    assert got["dlogits"].shape == shape and same_bits(as_matrix(got["dlogits"]), want["dlogits"])
    assert got["dsample_weight"].shape == samples(shape)
    assert same_bits(got["dsample_weight"].reshape(-1), want["dsample_weight"])
    assert same_bits(got["dlogit_bias"], want["dlogit_bias"])


@every_form
def test_mask_shapes(shape: tuple[int, ...]) -> None:
    """(C,) for all, (N, C) for all positions of a sample, and the shape of the input."""
    logits, target, _ = make(shape, 0, False)
    per_class = torch.tensor([True, True, False, True, True, False, True])
    target = per_class.nonzero()[:, 0][target % 5]
    spread = per_class.reshape(-1, *[1] * (len(shape) - 2)) if len(shape) > 1 else per_class
    masks = [per_class, spread.expand(shape)]
    if len(shape) > 2:
        masks.append(per_class.expand(shape[:2]))
    results = [run_kernel(Problem(logits, target, {"mask": mask, "reduction": "none"})) for mask in masks]
    removed = logits.masked_fill(~spread, -torch.inf)
    results.append(run_kernel(Problem(removed, target, {"reduction": "none"})))
    assert all(torch.equal(result[name], results[0][name]) for result in results for name in result)


def test_mask_of_each_sample() -> None:
    logits, target, _ = make((2, 3, 4), 0, False)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    got = LF.margin_cross_entropy(logits, target, mask=mask, reduction="none")
    want = F.cross_entropy(logits.masked_fill(~mask[:, :, None], -torch.inf), target, reduction="none")
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", FORMS[1:], ids=lambda shape: "x".join(map(str, shape)))
def test_sample_weight_of_each_sample(shape: tuple[int, ...]) -> None:
    """(N,) weighs all positions of a sample."""
    logits, target, _ = make(shape, 0, False)
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0])
    rows = F.cross_entropy(logits, target, reduction="none")
    spread = weight.reshape(-1, *[1] * (rows.dim() - 1)).expand_as(rows)
    got = LF.margin_cross_entropy(logits, target, sample_weight=weight)
    torch.testing.assert_close(got, (spread * rows).sum() / spread.sum())
    torch.testing.assert_close(got, LF.margin_cross_entropy(logits, target, sample_weight=spread))


@pytest.mark.parametrize("layout", ["channels_last", "permuted", "expanded"])
def test_memory_formats(layout: str) -> None:
    logits, target, _ = make((4, 7, 3, 2), 0, False)
    views = {
        "channels_last": logits.contiguous(memory_format=torch.channels_last),
        "permuted": logits.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "expanded": logits[:, :, :1, :1].expand(4, 7, 3, 2),
    }
    got = run_kernel(Problem(views[layout], target))
    want = run_kernel(Problem(views[layout].contiguous(), target))
    assert same_bits(got["loss"], want["loss"]) and same_bits(got["dlogits"], want["dlogits"])


@every_form
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
def test_one_margin_for_all_classes(shape: tuple[int, ...], probabilities: bool) -> None:
    """A 0-d target_margin m takes m t off the logits: F.cross_entropy of s (f - m t), value and gradients."""
    logits, target, _ = make(shape, 0, probabilities, torch.float64)
    logits.requires_grad_()
    dim = 0 if len(shape) == 1 else 1
    t = target if probabilities else torch.movedim(F.one_hot(target, shape[dim]), -1, dim)
    for scale in (2.5, torch.tensor(2.5, dtype=torch.float64, requires_grad=True)):
        margin = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        leaves = [logits, margin, *([scale] if isinstance(scale, Tensor) else [])]
        got = LF.margin_cross_entropy(logits, target, target_margin=margin, scale=scale)
        want = F.cross_entropy(scale * (logits - margin * t), target)
        torch.testing.assert_close(got, want)
        for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
            torch.testing.assert_close(a, b)


def test_one_margin_for_all_classes_of_a_classifier() -> None:
    features, classifier, target = torch.randn(6, 4), torch.randn(5, 4), torch.arange(6) % 5
    got = LF.linear_margin_cross_entropy(features, classifier, target, target_margin=torch.tensor(0.4), scale=3.0)
    logits = features @ classifier.T
    torch.testing.assert_close(got, F.cross_entropy(3.0 * (logits - 0.4 * F.one_hot(target, 5)), target))
