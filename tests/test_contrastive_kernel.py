"""The contrastive loss against its definition in float64: all options, shapes, dtypes and layouts.

Without a kernel the definition is held to itself, so that the cases are known to be good calls.
"""

from __future__ import annotations

import pytest
import torch
from contrastive_oracle import DIFFERENTIABLE, STATS, Case, check, evaluate, public
from contrastive_problems import COMPLETE, FEATURES, LOGSUMEXP_FEATURES, describe, make_case, moving_average, possible
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import covering_set

import ltkernels.functional as LF

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = covering_set(FEATURES, possible)
LOGSUMEXP_CASES = covering_set(LOGSUMEXP_FEATURES, possible, seed=1)


@pytest.mark.parametrize("features", CASES, ids=describe)
def test_covering_set(features: dict) -> None:
    check(make_case(features))


@pytest.mark.parametrize("features", LOGSUMEXP_CASES, ids=describe)
def test_logsumexp_covering_set(features: dict) -> None:
    check(make_case(features))


def test_covering_sets_ask_for_everything() -> None:
    """Every argument and every gradient occurs, and with self-contrast as well as with keys."""
    cases = [make_case(features) for features in CASES]
    for own in (True, False):
        some = [case for case in cases if ("key" in case.arguments) != own]
        differentiable = set(DIFFERENTIABLE) - ({"key"} if own else set())
        names = {name for case in some for name in case.arguments}
        assert names >= differentiable | {"labels", "positive_index", "allowed", "log_normalizer"}
        assert {name for case in some for name in case.requires_grad} == differentiable


# --------------------------------------------------------------------------------------------------------------- shapes

# Sizes around the blocks of the kernels, and far from them.
SHAPES = [(1, 1, 1), (2, 1, 3), (1, 300, 16), (300, 1, 16), (63, 64, 65), (64, 64, 64), (65, 63, 15), (128, 129, 16)]
SHAPES += [(257, 65, 3), (65, 511, 8), (31, 1000, 33)]


@pytest.mark.parametrize("denominator", FEATURES["denominator"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_sided_shapes(shape: tuple, denominator: str) -> None:
    rows, keys, width = shape
    case = make_case(COMPLETE | {"rows": max(rows, keys), "keys": "more", "width": width, "denominator": denominator})
    arguments = case.arguments
    arguments |= {"query": arguments["query"][:rows], "labels": arguments["labels"][:rows]}
    arguments |= {"key": arguments["key"][:keys], "key_labels": arguments["key_labels"][:keys]}
    if denominator == "normalizer":
        arguments["log_normalizer"] = arguments["log_normalizer"][:rows]
    check(case)


@pytest.mark.parametrize("denominator", FEATURES["denominator"])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 15, 16, 17, 31, 63, 64, 65, 95, 127, 128, 129, 191, 192, 193, 320])
def test_self_shapes(rows: int, denominator: str) -> None:
    """Half the tiles serve self-contrast: each number of rows has its own edge."""
    features = COMPLETE | {"rows": rows, "temperature": "vector", "denominator": denominator, "reduction": "sum"}
    check(make_case(features | {"positives": "unlabelled", "dtype": torch.float64}))
    check(make_case(features | {"key_bias": "bias", "pair_margin": denominator != "normalizer"}))


@pytest.mark.parametrize("keys", [0, 3])
@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_to_contrast(rows: int, keys: int) -> None:
    """No rows or no keys: loss 0, gradients 0, and a statistic for each row."""
    query, key = torch.randn(rows, 8), torch.randn(keys, 8)
    arguments = {"query": query, "temperature": torch.full((rows,), 0.3), "labels": torch.zeros(rows, dtype=torch.long)}
    arguments |= {"key": key, "key_labels": torch.zeros(keys, dtype=torch.int32), "sample_weight": torch.ones(rows)}
    for reduction in ("mean", "sum", "none"):
        names = ("query", "key", "temperature", "sample_weight")
        got = check(Case(arguments | {"reduction": reduction}, names))
        assert all(got[name].shape == (rows,) for name in STATS)
        if not rows or not keys:
            assert not any(got[name].any() for name in ("loss", *(f"d{name}" for name in names)))
    own = {name: x for name, x in arguments.items() if "key" not in name}
    check(Case(own, ("query",)))
    check(Case({"query": query, "key": key, "temperature": 0.5, "exclude": None}, ("query", "key")))


# ------------------------------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("dtype", FEATURES["dtype"], ids=str)
@pytest.mark.parametrize("temperature", [0.005, 0.01, 0.07, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("denominator", FEATURES["denominator"])
def test_temperatures(denominator: str, temperature: float, dtype: torch.dtype) -> None:
    """Logits of unit vectors reach 1 / tau = 200: nothing overflows, and the error is that of the logits."""
    features = COMPLETE | {"rows": 65, "dtype": dtype, "normalize": True, "denominator": denominator}
    case = make_case(features | {"temperature": "vector", "sample_weight": "weight"})
    case.arguments["temperature"] = case.arguments["temperature"] * temperature
    if denominator == "normalizer":
        case.arguments["log_normalizer"] = moving_average(case.arguments)
    got = check(case)
    assert all(x.isfinite().all() for x in got.values())


@pytest.mark.parametrize("shift", [-120.0, 120.0, -1e4, 1e4])
@pytest.mark.parametrize("denominator", ["all", "own", "negatives"])
def test_logits_far_from_zero(denominator: str, shift: float) -> None:
    """A log-sum-exp that starts at 0, or one without its maximum, fails here."""
    case = make_case(COMPLETE | {"rows": 70, "key_bias": "bias", "denominator": denominator})
    case.arguments["key_bias"] = case.arguments["key_bias"] + shift
    got = check(case)
    assert got["logsumexp"].isfinite().all() and (got["logsumexp"] - shift).abs().max() < 20


@pytest.mark.parametrize("normalize", [False, True], ids=["as_given", "normalize"])
@pytest.mark.parametrize("keys", ["self", "more"])
def test_similarities_are_not_rounded(keys: str, normalize: bool) -> None:
    """16-bit embeddings give the statistics of their values in float32: nothing in between is 16 bits."""
    for dtype in (torch.bfloat16, torch.float16):
        features = COMPLETE | {"rows": 130, "width": 64, "keys": keys, "temperature": "small", "normalize": normalize}
        case = make_case(features | {"dtype": dtype, "grads": "none"})
        wide = Case({name: x.float() if name in ("query", "key") else x for name, x in case.arguments.items()})
        for name, x in check(case).items():
            torch.testing.assert_close(x, check(wide)[name], rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_normalised_embeddings_are_rounded_once(dtype: torch.dtype) -> None:
    """Those of 16-bit embeddings are those of their values in float32 to half a unit in the last place of each."""
    case = make_case(COMPLETE | {"rows": 130, "width": 64, "temperature": "small", "normalize": True, "dtype": dtype})
    wide = Case(case.arguments | {"query": case.arguments["query"].float()}, ("query",))
    got, want = evaluate(public, Case(case.arguments, ("query",)))["dquery"], evaluate(public, wide)["dquery"]
    assert got.dtype == dtype
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(got.float(), want, rtol=0.51 * torch.finfo(dtype).eps, atol=smallest)


@pytest.mark.parametrize("dtype", FEATURES["dtype"], ids=str)
def test_vectors_of_another_dtype(dtype: torch.dtype) -> None:
    """Temperatures, weights and biases may be of any floating dtype; their gradients are of theirs."""
    for vectors in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        features = COMPLETE | {"dtype": dtype, "temperature": "vector", "key_bias": "bias", "pair_margin": True}
        case = make_case(features | {"sample_weight": "weight"})
        for name in ("temperature", "key_bias", "pair_margin", "sample_weight"):
            case.arguments[name] = case.arguments[name].to(vectors)
        check(case)


@pytest.mark.parametrize("integer", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8], ids=str)
def test_labels_of_every_integer_dtype(integer: torch.dtype) -> None:
    for keys in ("self", "queue"):
        for features in ({}, {"pair_margin": True}, {"positives": "index"}):
            case = make_case(COMPLETE | {"rows": 20, "keys": keys} | features)
            for name in ("labels", "key_labels", "positive_index"):
                if name in case.arguments:
                    case.arguments[name] = case.arguments[name].to(integer)
            wide = {n: x.long() if n.endswith(("labels", "index")) else x for n, x in case.arguments.items()}
            want = check(Case(wide, case.requires_grad, case.upstream))
            got = check(case)
            assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("allowed", ["keys", "pairs"])
@pytest.mark.parametrize("keys", ["self", "more"])
def test_strided_options(keys: str, allowed: str) -> None:
    """Every vector and matrix may be a view: transposed, or every other element of its memory."""
    features = {"rows": 70, "keys": keys, "allowed": allowed, "temperature": "vector", "key_bias": "bias"}
    case = make_case(COMPLETE | features | {"pair_margin": True, "sample_weight": "weight"})
    want = check(case)
    for name, x in case.arguments.items():
        if isinstance(x, torch.Tensor) and name not in ("query", "key"):
            view = torch.stack([x, ~x if x.dtype == torch.bool else -x], x.dim())[..., 0]
            case.arguments[name] = x.T.contiguous().T if x.dim() == 2 else view
            assert not case.arguments[name].is_contiguous()
    got = check(case)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_large_labels() -> None:
    """Labels are compared, not counted: they may be far apart where no pair margin is given."""
    case = make_case(COMPLETE | {"rows": 40, "positives": "unlabelled"})
    want = check(case)
    y = case.arguments["labels"]
    case.arguments["labels"] = torch.where(y >= 0, y * 400_000_000, y)
    got = check(case)
    torch.testing.assert_close(got, want)
    case.arguments["labels"] = torch.where(y == 4, 2**31 - 1, y)
    torch.testing.assert_close(check(case), want)


def test_labels_above_int32() -> None:
    """Refused, not taken for another label of the same lower bits."""
    z, y = torch.randn(4, 3), torch.tensor([0, 2**32, 1, 1])
    with pytest.raises(ValueError, match=f"labels: .*got {2**32} at index 1"):
        LF.contrastive_loss(z, temperature=0.5, labels=y)
    with pytest.raises(ValueError, match=f"^key_labels: .*got {2**32} at index 1"):
        LF.contrastive_loss(z, z.clone(), temperature=0.5, labels=y % 7, key_labels=y)


# --------------------------------------------------------------------------------------------------------- any mixture

ANY = {name: st.sampled_from(values) for name, values in FEATURES.items() if name != "rows"}
ANY["rows"] = st.integers(1, 140)
ANY["width"] = st.integers(1, 40)


@settings(max_examples=80)
@given(st.fixed_dictionaries(ANY).filter(possible), st.integers(0, 1000))
def test_any_mixture(features: dict, seed: int) -> None:
    check(make_case(features, seed))
