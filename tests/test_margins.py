"""Margins from class counts: values, accepted inputs, the Margins value, schedules, masks and errors."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal, localcontext
from math import inf, log, nan

import numpy as np
import pytest
import torch
from torch import Tensor

import ltkernels.functional as LF
from ltkernels import margins as M

COUNTS = [500, 20, 1280, 5, 80]
ON_META = torch.ones((), device="meta")
FROM_COUNTS = {
    "logit_adjustment": M.logit_adjustment,
    "balanced_softmax": M.balanced_softmax,
    "ldam": M.ldam,
    "class_dependent_temperatures": M.class_dependent_temperatures,
    "vector_scaling": lambda counts: M.vector_scaling(counts, gamma=0.3, tau=1.2),
    "adaptive_logit_adjustment": M.adaptive_logit_adjustment,
    "pairwise_logit_adjustment": M.pairwise_logit_adjustment,
    "effective_number": lambda counts: M.effective_number(counts, 0.999),
    "class_balanced_weight": M.class_balanced_weight,
    "deferred_reweighting": lambda counts: M.DeferredReweighting(counts, 3).weight(5),
    "tail_classes": lambda counts: M.tail_classes(counts, 0.03),
    "post_hoc_logit_adjustment": lambda counts: M.post_hoc_logit_adjustment(torch.zeros(2, 5), counts),
}


def tensors_of(result: M.Margins | Tensor) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [x for x in result.as_arguments().values() if isinstance(x, Tensor)]


# Values


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda: M.logit_adjustment(COUNTS, 1.7).logit_bias, [1.7 * log(n / 1885) for n in COUNTS]),
        (lambda: M.balanced_softmax(COUNTS).logit_bias, [log(n) for n in COUNTS]),
        (lambda: M.ldam(COUNTS, 0.7).target_margin, [0.7 * (5 / n) ** 0.25 for n in COUNTS]),
        (lambda: M.class_dependent_temperatures(COUNTS, 0.4).logit_scale, [(n / 1280) ** 0.4 for n in COUNTS]),
        (lambda: M.vector_scaling(COUNTS, 0.3, 1.2).logit_scale, [(n / 1280) ** 0.3 for n in COUNTS]),
        (lambda: M.vector_scaling(COUNTS, 0.3, 1.2).logit_bias, [1.2 * log(n / 1885) for n in COUNTS]),
        (lambda: M.adaptive_logit_adjustment(COUNTS, 1.3, 0.8).logit_bias, [1.3 * log(n / 1885) for n in COUNTS]),
        (lambda: M.adaptive_logit_adjustment(COUNTS, 1.3, 0.8).target_margin, [0.8 * (5 / n) ** 0.25 for n in COUNTS]),
        (
            lambda: M.pairwise_logit_adjustment(COUNTS, 0.6).pairwise_margin,
            [[0.6 * log(n_j / n_y) for n_j in COUNTS] for n_y in COUNTS],
        ),
        (lambda: M.cosface(0.35, 64, num_classes=3).target_margin, [0.35] * 3),
        (lambda: M.tail_classes(COUNTS, 0.03), [False, True, False, True, False]),
        (lambda: M.tail_classes([1, 3], 0.25), [False, False]),
    ],
)
def test_values(function: Callable[[], Tensor], expected: list) -> None:
    """The formula in Python's float64, rounded once to float32."""
    exact = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(function().double(), exact.double(), rtol=2**-24, atol=1e-15)


def test_defaults_and_scales() -> None:
    assert M.ldam(COUNTS).scale == 30.0
    assert M.ldam(COUNTS).target_margin.max() == 0.5
    assert M.ldam(COUNTS, scale=12).scale == 12.0
    assert M.cosface(0.35, 64, num_classes=3).scale == 64.0
    assert M.adaptive_logit_adjustment(COUNTS).scale == 1.0
    assert M.adaptive_logit_adjustment(COUNTS).target_margin.max() == 0.5
    assert torch.equal(M.pairwise_logit_adjustment(COUNTS).pairwise_margin.diagonal(), torch.zeros(5))


@pytest.mark.parametrize("beta", [0.0, 1e-3, 0.5, 0.9999, 1 - 1e-9, 1 - 1e-12, 1 - 2**-53])
def test_class_balanced_weight_is_exact(beta: float) -> None:
    """Against 60 digits: 1 - beta^n as the authors write it has no digit left where n is no integer and beta near 1."""
    counts = [500, 20.25, 1280, 0.7, 5.5]
    with localcontext() as context:
        context.prec = 60
        exact_beta = Decimal(beta)
        effective = [(1 - exact_beta ** Decimal(n)) / (1 - exact_beta) for n in counts]
        total = sum(1 / e for e in effective)
        exact = [[float(e) for e in effective], [float(5 / e / total) for e in effective]]
    ours = torch.stack([M.effective_number(counts, beta), M.class_balanced_weight(counts, beta)])
    torch.testing.assert_close(ours.double(), torch.tensor(exact, dtype=torch.float64), rtol=2**-24 + 1e-12, atol=0)


def test_class_balanced_weight_equals_released_code() -> None:
    effective_num = 1.0 - np.power(0.9999, COUNTS)
    weights = (1.0 - 0.9999) / np.array(effective_num)
    weights = weights / np.sum(weights) * len(COUNTS)
    np.testing.assert_allclose(M.class_balanced_weight(COUNTS).numpy(), weights, rtol=1e-6)


def test_extreme_counts() -> None:
    counts = [1.0, 1e300]
    assert M.logit_adjustment(counts).logit_bias[0] == torch.tensor(-300 * log(10))
    assert M.balanced_softmax(counts).logit_bias[1] == torch.tensor(300 * log(10))
    assert M.class_balanced_weight(counts, 0.9).isfinite().all()
    assert M.ldam([7]).target_margin.tolist() == [0.5]
    assert M.logit_adjustment([7]).logit_bias.tolist() == [0.0]


# Accepted inputs


@pytest.mark.parametrize("name", FROM_COUNTS)
@pytest.mark.parametrize(
    "counts",
    [
        tuple(COUNTS),
        [float(n) for n in COUNTS],
        [torch.tensor(n) for n in COUNTS],
        np.array(COUNTS, dtype=np.float32),
        np.array(COUNTS[::-1])[::-1],
        torch.tensor(COUNTS),
        torch.tensor(COUNTS, dtype=torch.int16),
        torch.tensor(COUNTS, dtype=torch.bfloat16),
        torch.tensor(COUNTS, dtype=torch.float32, requires_grad=True),
        torch.tensor([n for n in COUNTS for _ in range(2)])[::2],
    ],
    ids=lambda counts: f"{type(counts).__name__}-{getattr(counts, 'dtype', type(counts[0]).__name__)}",
)
def test_accepts_any_kind_of_counts(name: str, counts: object) -> None:
    for ours, expected in zip(
        tensors_of(FROM_COUNTS[name](counts)), tensors_of(FROM_COUNTS[name](COUNTS)), strict=True
    ):
        assert torch.equal(ours, expected)
        assert ours.dtype == (torch.bool if name == "tail_classes" else torch.float32)
        assert not ours.requires_grad


@pytest.mark.parametrize("name", FROM_COUNTS)
def test_lists_give_cpu_tensors_whatever_the_default_device(name: str) -> None:
    """Inside ``with torch.device("meta")``, where models are built without memory, margins still have values."""
    with torch.device("meta"):
        made = FROM_COUNTS[name](COUNTS) if name != "post_hoc_logit_adjustment" else M.logit_adjustment(COUNTS)
        made = [*tensors_of(made), *tensors_of(M.cosface(0.2, 2.0, num_classes=4))]
    assert {x.device.type for x in made} == {"cpu"}


def test_import_is_light() -> None:
    code = "import sys, ltkernels.margins; sys.exit(any(m in sys.modules for m in ('ltkernels._ops', 'triton')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


# The value


def test_as_arguments() -> None:
    assert M.Margins().as_arguments() == {}
    ldam = M.ldam(COUNTS)
    assert list(ldam.as_arguments()) == ["target_margin", "scale"]
    assert ldam.as_arguments()["target_margin"] is ldam.target_margin
    logits, target = torch.rand(4, 5), torch.tensor([0, 1, 2, 3])
    value = LF.margin_cross_entropy(logits, target, weight=torch.ones(5), **ldam.as_arguments())
    assert value == LF.margin_cross_entropy(logits, target, target_margin=ldam.target_margin, scale=30.0)
    learned = torch.tensor(2.0, requires_grad=True)
    assert M.Margins(scale=learned).as_arguments()["scale"] is learned


def test_num_classes() -> None:
    assert M.Margins().num_classes is None
    assert M.Margins(logit_scale=torch.tensor(2.0)).num_classes is None
    assert M.Margins(logit_scale=torch.tensor(2.0), weight=torch.ones(4)).num_classes == 4
    assert M.pairwise_logit_adjustment(COUNTS).num_classes == 5


def test_combine_and_replace() -> None:
    weight = M.class_balanced_weight(COUNTS)
    both = M.ldam(COUNTS).combine(M.Margins(weight=weight))
    assert list(both.as_arguments()) == ["target_margin", "weight", "scale"]
    assert both.weight is weight and both.scale == 30.0
    assert M.Margins(weight=weight).combine(M.ldam(COUNTS)).scale == 30.0
    replaced = both.replace(weight=None, scale=2)
    assert replaced.weight is None and replaced.scale == 2.0 and replaced.target_margin is both.target_margin
    with pytest.raises(ValueError, match="^scale, target_margin: set in both"):
        both.combine(M.ldam(COUNTS))
    with pytest.raises(ValueError, match="^weight: expected shape"):
        M.ldam(COUNTS).combine(M.Margins(weight=torch.ones(4)))
    with pytest.raises(ValueError, match="^scale: "):
        both.replace(scale=-1)


def test_to() -> None:
    margins = M.vector_scaling(COUNTS, 0.3, 1.2).replace(scale=torch.tensor(3.0), weight=torch.ones(5))
    wide = margins.to(dtype=torch.float64)
    assert {x.dtype for x in tensors_of(wide)} == {torch.float64}
    assert len(tensors_of(wide)) == 4
    assert torch.equal(wide.logit_bias.float(), margins.logit_bias)
    assert tensors_of(margins.to("cpu"))[0] is margins.logit_scale
    assert margins.logit_bias.dtype == torch.float32
    with pytest.raises(ValueError, match="^scale: expected finite values, got inf"):
        M.Margins(scale=torch.tensor(1e5)).to(dtype=torch.float16)
    with pytest.raises(TypeError, match="^logit_scale: expected a floating Tensor, got torch.int64"):
        margins.to(dtype=torch.int64)


def test_identity_equality_and_immutability() -> None:
    one, other = M.ldam(COUNTS), M.ldam(COUNTS)
    assert one != other and len({one, one, other}) == 2
    with pytest.raises(AttributeError):
        one.scale = 2.0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_pickle_and_deepcopy(duplicate: Callable) -> None:
    margins = M.ldam(COUNTS).combine(M.logit_adjustment(COUNTS))
    again = duplicate(margins)
    assert again.as_arguments().keys() == margins.as_arguments().keys()
    assert torch.equal(again.target_margin, margins.target_margin) and again.scale == 30.0
    schedule = duplicate(M.DeferredReweighting(COUNTS, 2))
    assert torch.equal(schedule.weight(2), M.class_balanced_weight(COUNTS))


def test_repr() -> None:
    assert repr(M.Margins()) == "Margins()"
    assert repr(M.ldam(COUNTS)) == "Margins(target_margin=(5,), scale=30.0)"
    assert repr(M.DeferredReweighting(COUNTS, 160)) == "DeferredReweighting(start_epoch=160, beta=0.9999)"


# Schedule, masks, test time


def test_deferred_reweighting() -> None:
    counts = np.array(COUNTS)
    schedule = M.DeferredReweighting(counts, start_epoch=160, beta=0.99)
    counts[:] = 1  # the schedule keeps its own
    for epoch in (0, 159):
        assert torch.equal(schedule.weight(epoch), torch.ones(5))
    for epoch in (160, np.int64(161), 199):
        assert torch.equal(schedule.weight(epoch), M.class_balanced_weight(COUNTS, 0.99))
    assert torch.equal(M.DeferredReweighting(COUNTS, 0).weight(0), M.class_balanced_weight(COUNTS))
    tensor = torch.tensor(COUNTS)
    schedule = M.DeferredReweighting(tensor, 1)
    tensor.fill_(1)
    assert torch.equal(schedule.weight(1), M.class_balanced_weight(COUNTS))


def test_equalization_mask() -> None:
    tail = torch.tensor([False, True, False, True, True])
    target = torch.randint(5, (4000,), generator=torch.Generator().manual_seed(0))
    target[0] = -100  # an ignored sample
    mask = M.equalization_mask(target, tail, 0.75, generator=torch.Generator().manual_seed(1))
    is_target = target[:, None] == torch.arange(5)
    assert mask.shape == (4000, 5) and mask.dtype == torch.bool
    assert mask[is_target].all() and mask[:, ~tail].all()
    dropped = (~mask & ~is_target).sum(0) / (~is_target).sum(0)
    assert ((dropped[tail] - 0.75).abs() < 0.03).all()  # 3200 draws a class: 4 standard deviations
    pairs = ~mask[~is_target[:, [1, 3]].any(1)][:, [1, 3]]
    assert abs(torch.corrcoef(pairs.T.float())[0, 1]) < 0.1  # drawn for each sample and class, not for each sample


@pytest.mark.parametrize("shape", [(), (6,), (6, 2), (2, 3, 4)])
def test_equalization_mask_shapes(shape: tuple[int, ...]) -> None:
    tail = torch.tensor([True, False, True])
    target = torch.ones(shape, dtype=torch.int32)
    mask = M.equalization_mask(target, tail, 1.0)
    assert mask.shape == (*shape[:1], 3, *shape[1:])
    assert torch.equal(mask.movedim(1 if shape else 0, -1), (~tail).expand(*shape, 3))
    assert M.equalization_mask(target, tail, 0.0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_post_hoc_logit_adjustment(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64).to(dtype).requires_grad_()
    adjusted = M.post_hoc_logit_adjustment(logits, COUNTS, 1.5)
    assert adjusted.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = logits.double() - 1.5 * (torch.tensor(COUNTS).double() / sum(COUNTS)).log()
    assert (adjusted - expected).abs().max() <= (1e-14 if dtype == torch.float64 else 2e-6)
    adjusted.sum().backward()
    assert torch.equal(logits.grad, torch.ones_like(logits))


# Errors: each names the argument, what was expected and what came


@pytest.mark.parametrize("name", FROM_COUNTS)
@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ([5, 0, 3], ValueError, "expected positive finite counts, got 0 for class 1"),
        ([5, 2, -3.5], ValueError, "expected positive finite counts, got -3.5 for class 2"),
        (torch.tensor([nan, 1.0]), ValueError, "expected positive finite counts, got nan for class 0"),
        (np.array([1, inf]), ValueError, "expected positive finite counts, got inf for class 1"),
        ([], ValueError, "expected shape (C,) with C >= 1, got (0,)"),
        (5, ValueError, "expected shape (C,) with C >= 1, got ()"),
        (torch.ones(2, 3), ValueError, "expected shape (C,) with C >= 1, got (2, 3)"),
        ([[1, 2], [3]], ValueError, "expected shape (C,), got sequences of different lengths"),
        (["many", "few"], TypeError, "expected C real numbers, got list"),
        ({0: 5, 1: 3}, TypeError, "expected C real numbers, got dict"),
        (None, TypeError, "expected C real numbers, got NoneType"),
        (np.array([True, False]), TypeError, "expected C real numbers, got bool"),
        (torch.tensor([True, False]), TypeError, "expected C real numbers, got torch.bool"),
        (torch.ones(2, dtype=torch.complex64), TypeError, "expected C real numbers, got torch.complex64"),
    ],
    ids=str,
)
def test_bad_counts(name: str, counts: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(f"class_counts: {message}")):
        FROM_COUNTS[name](counts)


NOT_NEGATIVE = "expected a finite number >= 0"
BAD_NUMBERS = {
    "tau": [
        M.logit_adjustment,
        M.adaptive_logit_adjustment,
        M.pairwise_logit_adjustment,
        lambda counts, tau: M.vector_scaling(counts, 0.1, tau),
        lambda counts, tau: M.post_hoc_logit_adjustment(torch.zeros(5), counts, tau),
    ],
    "gamma": [M.class_dependent_temperatures, lambda counts, gamma: M.vector_scaling(counts, gamma, 1.0)],
    "max_margin": [M.ldam, lambda counts, margin: M.adaptive_logit_adjustment(counts, 1.0, margin)],
    "margin": [lambda counts, margin: M.cosface(margin, 30.0, num_classes=5)],
    "scale": [
        lambda counts, scale: M.ldam(counts, 0.5, scale),
        lambda counts, scale: M.cosface(0.3, scale, num_classes=5),
        lambda counts, scale: M.Margins(scale=scale),
    ],
    "beta": [M.effective_number, M.class_balanced_weight, lambda counts, beta: M.DeferredReweighting(counts, 1, beta)],
    "threshold": [M.tail_classes],
}


@pytest.mark.parametrize(
    ("name", "function"), [(name, function) for name, functions in BAD_NUMBERS.items() for function in functions]
)
def test_bad_numbers(name: str, function: Callable) -> None:
    out_of_range = {"scale": [0.0], "beta": [1.0, 1.5], "threshold": [1.5]}.get(name, [])
    for value in (-0.1, nan, inf, *out_of_range):
        with pytest.raises(ValueError, match=rf"^{name}: expected a finite number .*, got {value}$"):
            function(COUNTS, value)
    for value in ("1", None, True, 1j):
        with pytest.raises(TypeError, match=f"^{name}: expected a number, got {type(value).__name__}$"):
            function(COUNTS, value)


@pytest.mark.parametrize(
    ("name", "function", "minimum"),
    [
        ("num_classes", lambda value: M.cosface(0.3, 30.0, num_classes=value), 1),
        ("start_epoch", lambda value: M.DeferredReweighting(COUNTS, value), 0),
        ("epoch", M.DeferredReweighting(COUNTS, 2).weight, 0),
    ],
)
def test_bad_integers(name: str, function: Callable, minimum: int) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected at least {minimum}, got {minimum - 1}$"):
        function(minimum - 1)
    for value in (2.0, "2", True):
        with pytest.raises(TypeError, match=f"^{name}: expected an integer, got {type(value).__name__}$"):
            function(value)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"logit_bias": [1.0, 2.0]}, TypeError, "logit_bias: expected a floating Tensor, got list"),
        (
            {"weight": torch.ones(3, dtype=torch.int64)},
            TypeError,
            "weight: expected a floating Tensor, got torch.int64",
        ),
        (
            {"logit_bias": torch.tensor(1.0)},
            ValueError,
            "logit_bias: expected shape (C,) with at least one class, got ()",
        ),
        ({"target_margin": torch.ones(2, 3)}, ValueError, "target_margin: expected shape (2,) or () with at least"),
        ({"pairwise_margin": torch.ones(2, 3)}, ValueError, "pairwise_margin: expected shape (2, 2) with at least one"),
        ({"weight": torch.ones(0)}, ValueError, "weight: expected shape (C,) with at least one class, got (0,)"),
        (
            {"logit_scale": torch.ones(3), "logit_bias": torch.ones(4)},
            ValueError,
            "logit_bias: expected shape (3,) with at least one class, got (4,)",
        ),
        (
            {"logit_scale": torch.ones(2, 2), "logit_bias": torch.ones(2)},
            ValueError,
            "logit_scale: expected shape (2,) or () with at least one class, got (2, 2)",
        ),
        ({"logit_scale": torch.tensor(nan)}, ValueError, "logit_scale: expected finite values, got nan"),
        ({"logit_bias": torch.tensor([0.0, -inf])}, ValueError, "logit_bias: expected finite values, got -inf"),
        ({"weight": torch.tensor([1.0, -2.0])}, ValueError, "weight: expected no negative weight, got -2"),
        ({"scale": ON_META, "weight": torch.ones(2)}, ValueError, "weight, scale: expected one device, got cpu, meta"),
        ({"scale": torch.ones(3)}, ValueError, "scale: expected shape () with"),
        ({"scale": torch.tensor(0.0)}, ValueError, "scale: expected a positive number, got 0"),
        ({"scale": torch.tensor(nan)}, ValueError, "scale: expected finite values, got nan"),
        ({"scale": torch.tensor(3)}, TypeError, "scale: expected a floating Tensor, got torch.int64"),
    ],
)
def test_bad_fields(fields: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message)):
        M.Margins(**fields)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_devices() -> None:
    counts = torch.tensor(COUNTS, device="cuda")
    for function in FROM_COUNTS.values():
        assert {x.device.type for x in tensors_of(function(counts))} <= {"cuda", "cpu"}
    assert M.ldam(counts).target_margin.device == counts.device
    assert M.ldam(COUNTS).to("cuda").target_margin.device == counts.device


INDEX, TAIL = torch.tensor([0]), torch.tensor([True])


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (
            M.post_hoc_logit_adjustment,
            (torch.zeros(5, 2), COUNTS),
            ValueError,
            "logits: expected shape (..., 5), got (5, 2)",
        ),
        (M.post_hoc_logit_adjustment, (torch.zeros(()), COUNTS), ValueError, "logits: expected shape (..., 5), got ()"),
        (
            M.post_hoc_logit_adjustment,
            (INDEX, COUNTS),
            TypeError,
            "logits: expected a floating Tensor, got torch.int64",
        ),
        (M.post_hoc_logit_adjustment, ([0.0], COUNTS), TypeError, "logits: expected a floating Tensor, got list"),
        (M.equalization_mask, (torch.rand(3), TAIL, 0.5), TypeError, "target: expected class indices of an integer"),
        (M.equalization_mask, (INDEX + 0j, TAIL, 0.5), TypeError, "target: expected class indices of an integer"),
        (M.equalization_mask, (INDEX, INDEX, 0.5), TypeError, "tail: expected a bool Tensor, got torch.int64"),
        (M.equalization_mask, (INDEX, TAIL[None], 0.5), ValueError, "tail: expected shape (C,), got (1, 1)"),
        (M.equalization_mask, (INDEX, TAIL.to("meta"), 0.5), ValueError, "tail: expected a tensor on cpu like target"),
        (M.logit_adjustment, (COUNTS, 1e39), ValueError, "class_counts: expected counts and settings whose results"),
        (M.equalization_mask, (INDEX, TAIL, 1.5), ValueError, "gamma: expected a finite number in [0, 1], got 1.5"),
        (M.equalization_mask, (INDEX, TAIL, "1"), TypeError, "gamma: expected a number, got str"),
    ],
)
def test_other_errors(function: Callable, arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message)):
        function(*arguments)
