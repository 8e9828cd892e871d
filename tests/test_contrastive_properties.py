"""Properties of the contrastive loss: symmetries, identities of gradients, rows and batches with nothing to say."""

from __future__ import annotations

import pytest
import torch
from contrastive_oracle import DIFFERENTIABLE, KERNEL, Case, definition, evaluate, public, run_public, unchanged
from contrastive_problems import COMPLETE, FEATURES, make_case
from torch import Tensor

import ltkernels.functional as LF

pytestmark = pytest.mark.usefixtures("one_thread")
M, D = 70, 6
DENOMINATORS = ("all", "own", "negatives")
every_denominator = pytest.mark.parametrize("denominator", DENOMINATORS)
FLOAT64 = COMPLETE | {"rows": M, "width": D, "dtype": torch.float64, "temperature": "vector"}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(got: object, want: object, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------- identities of gradients


@every_denominator
@pytest.mark.parametrize("reduction", FEATURES["reduction"])
def test_temperature_gradient_is_that_of_the_query(denominator: str, reduction: str) -> None:
    """Only q_i / tau_i enters: dtau_i = -<q_i, dq_i> / tau_i."""
    features = {"keys": "more", "positives": "labels_extra", "sample_weight": "weight", "key_bias": "bias"}
    case = make_case(FLOAT64 | features | {"denominator": denominator, "reduction": reduction})
    got, q, tau = evaluate(public, case), case.arguments["query"], case.arguments["temperature"]
    close(got["dtemperature"], -(q * got["dquery"]).sum(1) / tau)


@every_denominator
def test_scaling_embeddings_is_scaling_the_temperature(denominator: str) -> None:
    case = make_case(FLOAT64 | {"denominator": denominator})
    got = evaluate(public, case)
    changed = {"query": 3 * case.arguments["query"], "temperature": 9 * case.arguments["temperature"]}
    scaled = evaluate(public, Case(case.arguments | changed, case.requires_grad, case.upstream))
    close(scaled["loss"], got["loss"])
    close([3 * scaled["dquery"], 9 * scaled["dtemperature"]], [got["dquery"], got["dtemperature"]])


@pytest.mark.parametrize("denominator", ["all", "negatives"])  # in "own" it counts, against each positive
def test_a_constant_bias_changes_no_gradient(denominator: str) -> None:
    """The log-sum-exp shifts by it, nothing else does."""
    case = make_case(FLOAT64 | {"key_bias": "bias", "denominator": denominator})
    moved = case.arguments | {"key_bias": case.arguments["key_bias"] + 2}
    got, results = evaluate(public, case), evaluate(public, Case(moved, case.requires_grad, case.upstream))
    close(results["loss"], got["loss"] + 2)
    close([results[f"d{n}"] for n in case.requires_grad], [got[f"d{n}"] for n in case.requires_grad])


@every_denominator
@pytest.mark.parametrize("keys", ["self", "more"])
def test_rotation(denominator: str, keys: str) -> None:
    """Similarities do not know the basis: the loss stays and the gradients turn along."""
    case = make_case(FLOAT64 | {"keys": keys, "positives": "labels_extra", "denominator": denominator})
    turn = torch.linalg.qr(randn(D, D)).Q
    names = [name for name in ("query", "key", "extra_positive") if name in case.arguments]
    turned = {name: case.arguments[name] @ turn for name in names}
    got, want = (
        evaluate(public, Case(case.arguments | turned, case.requires_grad, case.upstream)),
        evaluate(public, case),
    )
    for name in names:
        want[f"d{name}"] = want[f"d{name}"] @ turn
    close(got, want)


@pytest.mark.parametrize("denominator", FEATURES["denominator"])
@pytest.mark.parametrize("keys", ["self", "more"])
def test_permutation(denominator: str, keys: str) -> None:
    """The order of rows and keys means nothing, in whatever tiles they come to lie."""
    features = {"keys": keys, "positives": "unlabelled", "denominator": denominator, "allowed": "pairs"}
    case = make_case(FLOAT64 | features | {"sample_weight": "weight", "key_bias": "bias", "reduction": "none"})
    arguments, count = case.arguments, len(case.arguments["key_bias"])
    rows = torch.randperm(M, generator=torch.Generator().manual_seed(1))
    columns = rows if keys == "self" else torch.randperm(count, generator=torch.Generator().manual_seed(2))
    order = {name: columns if name.startswith("key") else rows for name in arguments}
    moved = {n: x[order[n]] if isinstance(x, Tensor) and n != "allowed" else x for n, x in arguments.items()}
    moved["allowed"] = arguments["allowed"][rows][:, columns]
    got = evaluate(public, Case(moved, case.requires_grad, case.upstream[rows]))
    want = evaluate(public, case)
    close(got, {name: x[columns if name.startswith("dkey") else rows] for name, x in want.items()})


@every_denominator
def test_self_contrast_is_two_sided_without_the_diagonal(denominator: str) -> None:
    case = make_case(FLOAT64 | {"denominator": denominator, "positives": "unlabelled", "sample_weight": "weight"})
    own = evaluate(public, case)
    both = {"key": case.arguments["query"].clone(), "key_labels": case.arguments["labels"]}
    both["allowed"] = ~torch.eye(M, dtype=torch.bool)
    got = evaluate(public, Case(case.arguments | both, (*case.requires_grad, "key"), case.upstream))
    got["dquery"] = got["dquery"] + got.pop("dkey")
    close(got, own)
    # The same tensor on both sides: its gradient is the sum, and the diagonal is a key like any other.
    z = case.arguments["query"].clone().requires_grad_()
    given = {"temperature": 0.5, "labels": both["key_labels"], "key_labels": both["key_labels"]}
    (same,) = torch.autograd.grad(LF.contrastive_loss(z, z, denominator=denominator, **given), z)
    key = z.detach().clone().requires_grad_()
    apart = torch.autograd.grad(LF.contrastive_loss(z, key, denominator=denominator, **given), (z, key))
    close(same, sum(apart))


def test_negative_weights_and_weights_that_cancel() -> None:
    """A mean whose weights add up to 0 is 0, with gradients of 0."""
    case = make_case(FLOAT64 | {"sample_weight": "weight"})
    case.arguments["sample_weight"] = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(M // 2)
    got = evaluate(public, case)
    assert not any(got[name].any() for name in ("loss", *(f"d{name}" for name in case.requires_grad)))
    case.arguments["reduction"] = "sum"
    want = evaluate(definition, case)
    got = evaluate(public, case)
    assert got["dquery"].any()
    close(got, want)


# --------------------------------------------------------------------------------------------- nothing to contrast with


def gradients_are_zero(results: dict, rows: object = slice(None), names: tuple = DIFFERENTIABLE) -> bool:
    return not any(results[f"d{name}"][rows].any() for name in names if f"d{name}" in results)


@pytest.mark.parametrize("dtype", FEATURES["dtype"], ids=str)
@every_denominator
@pytest.mark.parametrize("labels", ["none", "singletons"])
@pytest.mark.parametrize("reduction", FEATURES["reduction"])
def test_no_positive_at_all(reduction: str, labels: str, denominator: str, dtype: torch.dtype) -> None:
    """Labels that are all -1, or all different: loss 0 and gradients 0, never NaN."""
    features = {"positives": "labels", "denominator": denominator, "sample_weight": "weight", "dtype": dtype}
    case = make_case(FLOAT64 | features | {"reduction": reduction, "key_bias": "bias"})
    case.arguments["labels"] = torch.full((M,), -1) if labels == "none" else torch.arange(M)
    got = run_public(case)
    assert not got["loss"].any() and not got["row_loss"].any() and not got["positive"].any()
    assert gradients_are_zero(got) and got["logsumexp"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("denominator", FEATURES["denominator"])
def test_rows_without_positive(denominator: str, dtype: torch.dtype) -> None:
    """They give 0, no gradient to their own weight, temperature or margin, and do not count in the mean."""
    features = {"positives": "unlabelled", "keys": "more", "denominator": denominator, "dtype": dtype}
    case = make_case(FLOAT64 | features | {"reduction": "mean", "sample_weight": "weight"})
    got, lonely = run_public(case), case.arguments["labels"] < 0
    assert lonely.any() and not got["row_loss"][lonely].any()
    assert gradients_are_zero(got, lonely, ("query", "temperature", "sample_weight"))
    kept = {n: x[~lonely] if isinstance(x, Tensor) and len(x) == M else x for n, x in case.arguments.items()}
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    close(got["loss"], public(kept)["loss"], tolerance)


def test_one_class_only() -> None:
    """No negatives: "all" is still a loss, "own" and "negatives" are 0 with gradients of 0."""
    case = make_case(FLOAT64 | {"positives": "one_class", "key_bias": "bias", "sample_weight": "weight"})
    got = evaluate(public, case)
    assert got["loss"].abs() > 0.01 and got["dquery"].any()
    for denominator in ("own", "negatives"):
        case.arguments["denominator"] = denominator
        got = run_public(case)
        assert got["loss"] == 0 and gradients_are_zero(got) and got["logsumexp"].isneginf().all()
        assert not got["expected"].any() and got["positive"].any()


@every_denominator
def test_rows_whose_keys_are_all_removed(denominator: str) -> None:
    """By the mask (no positive either) or by a bias of -inf (positives remain): 0, no NaN in any gradient."""
    case = make_case(FLOAT64 | {"denominator": denominator, "allowed": "pairs", "keys": "more", "key_bias": "bias"})
    case.arguments["allowed"][:5] = False
    got = run_public(case)
    assert not got["row_loss"][:5].any() and got["logsumexp"][:5].isneginf().all()
    assert all(x.isfinite().all() for name, x in got.items() if name != "logsumexp")
    case.arguments["key_bias"][:] = -torch.inf
    got = run_public(case)
    assert got["loss"] == 0 and got["logsumexp"].isneginf().all() and gradients_are_zero(got)


@pytest.mark.parametrize("exclude", [None, "self", "same_label", "different_label"])
def test_logsumexp_of_nothing(exclude: str | None) -> None:
    """-inf and no gradient, beside rows that have keys."""
    z, y = randn(5, D), torch.tensor([0, 0, 0, 0, -1])
    case = Case({"query": z, "temperature": torch.full((5,), 0.5).double(), "labels": y, "exclude": exclude})
    got = evaluate(public, Case(case.arguments, ("query", "temperature"), torch.ones(5).double()))
    empty = {"same_label": [False] * 5, "different_label": [False] * 4 + [True]}.get(exclude, [False] * 5)
    assert got["loss"].isneginf().tolist() == empty
    assert got["dquery"].isfinite().all() and not got["dtemperature"][torch.tensor(empty)].any()
    alone = evaluate(public, Case({"query": z[:1], "temperature": 0.5, "exclude": "self"}, ("query",)))
    assert alone["loss"].isneginf().all() and not alone["dquery"].any()


# ------------------------------------------------------------------------------------------------------- extreme input


@every_denominator
@pytest.mark.parametrize("dtype", FEATURES["dtype"], ids=str)
@pytest.mark.parametrize("temperature", [0.01, 0.1, 10.0])
def test_equal_embeddings(temperature: float, dtype: torch.dtype, denominator: str) -> None:
    """All similarities are equal: the log-sum-exp counts the keys."""
    z, y = torch.ones(M, 4, dtype=dtype) / 2, torch.arange(M) % 7
    results = evaluate(public, Case({"query": z, "temperature": temperature, "labels": y, "denominator": denominator}))
    negatives = M - M // 7
    count = {"all": M - 1, "negatives": negatives, "own": 1 + negatives}[denominator]
    want = torch.full((M,), float(count), dtype=torch.float64).log()
    # The difference of two logits of 1 / tau each, of which one is a sum.
    torch.testing.assert_close(results["row_loss"].double(), want, rtol=1e-6, atol=1e-6 / temperature)


@pytest.mark.parametrize("dtype", FEATURES["dtype"], ids=str)
def test_duplicated_views(dtype: torch.dtype) -> None:
    """Two equal views at a small temperature: the positive is the largest logit, and the loss is near its least."""
    z = torch.nn.functional.normalize(randn(16, 64)).to(dtype).repeat(2, 1)
    got = evaluate(public, Case({"query": z, "temperature": 0.02, "positive_index": LF.view_pairs(32)}, ("query",)))
    assert -1e-5 <= got["loss"] < 1e-4 and got["dquery"].isfinite().all()


@pytest.mark.parametrize("where", ["query", "key", "extra_positive"])
@pytest.mark.parametrize("positives", ["labels", "index", "extra", "labels_extra", "index_extra"])
@pytest.mark.parametrize("denominator", FEATURES["denominator"])
def test_nan_is_not_hidden(denominator: str, positives: str, where: str) -> None:
    """An embedding that is not a number gives a loss that is none."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for keys in ("self", "more"):
            features = {"keys": keys, "positives": positives, "denominator": denominator, "dtype": dtype}
            case = make_case(FLOAT64 | features | {"rows": 20})
            if where in case.arguments:
                case.arguments[where][7, 3] = torch.nan
                assert public(case.arguments)["loss"].isnan(), (dtype, keys)


@pytest.mark.parametrize("denominator", FEATURES["denominator"])
@pytest.mark.parametrize("rows", [20, 130])
def test_nan_in_self_contrast(rows: int, denominator: str) -> None:
    """Each row that sees it has no loss: all of them."""
    case = make_case(FLOAT64 | {"rows": rows, "denominator": denominator})
    case.arguments["labels"] = torch.arange(rows) % 2
    case.arguments["query"][rows - 1, 2] = torch.nan
    results = public(case.arguments)
    rows_with_it = results["row_loss"].isnan()
    assert results["loss"].isnan() and rows_with_it[1::2].all()
    assert rows_with_it.all() or denominator == "normalizer"


@pytest.mark.parametrize("exclude", [None, "self", "same_label", "different_label"])
def test_nan_in_logsumexp(exclude: str | None) -> None:
    for dtype in (torch.float32, torch.float64):
        z, y = randn(40, D, dtype=dtype), torch.arange(40) % 4
        z[9] = torch.nan
        got = public({"query": z, "temperature": 0.5, "labels": y, "exclude": exclude})["loss"].isnan()
        seen = {"same_label": y != 1, "different_label": y == 1}.get(exclude, torch.ones(40, dtype=torch.bool))
        seen[9] = True
        assert torch.equal(got, seen)


def test_removed_keys_may_hold_anything() -> None:
    """A NaN that no row may see does not reach loss or statistics; queues begin like that."""
    case = make_case(FLOAT64 | {"keys": "queue", "allowed": "keys"})
    want = public(case.arguments)
    case.arguments["key"][~case.arguments["allowed"]] = torch.nan
    close(public(case.arguments), want)


# ---------------------------------------------------------------------------------------------- bits, and the arguments

REPEATED = {
    "self": {"rows": 301, "width": 17, "sample_weight": "weight", "temperature": "vector"},
    "two_sided": {"rows": 130, "width": 33, "keys": "queue", "key_bias": "bias", "pair_margin": True},
    "own": {"rows": 257, "denominator": "own", "positives": "labels_extra", "reduction": "none", "pair_margin": True},
    "negatives": {"rows": 200, "denominator": "negatives", "allowed": "pairs", "keys": "more", "key_bias": "bias"},
    "normalizer": {"rows": 200, "denominator": "normalizer", "positives": "unlabelled"},
    "bfloat16": {"rows": 260, "width": 128, "dtype": torch.bfloat16, "normalize": True, "key_bias": "bias"},
    "float64": {"rows": 260, "dtype": torch.float64, "positives": "index", "key_bias": "bias", "reduction": "sum"},
}


@pytest.mark.skipif(not KERNEL, reason="torch's matrix products promise no order of summation")
@pytest.mark.parametrize("features", REPEATED.values(), ids=REPEATED)
def test_same_bits_for_any_number_of_threads(features: dict) -> None:
    case, wanted = make_case(COMPLETE | features), None
    for threads in (1, 2, 3, 8, 1):
        torch.set_num_threads(threads)  # the fixture one_thread restores it
        for _ in range(2):
            got = run_public(case)
            wanted = wanted or got
            assert [name for name in got if not unchanged(wanted[name], got[name])] == []


@pytest.mark.parametrize("features", REPEATED.values(), ids=REPEATED)
def test_a_gradient_does_not_depend_on_which_others_are_wanted(features: dict) -> None:
    case = make_case(COMPLETE | features)
    everything = evaluate(public, case)
    for name in case.requires_grad:
        alone = evaluate(public, Case(case.arguments, (name,), case.upstream))
        for key, x in alone.items():
            tolerance = 1e-10 if case.dtype == torch.float64 else 0.01 if case.dtype == torch.bfloat16 else 2e-4
            torch.testing.assert_close(x, everything[key], rtol=tolerance, atol=tolerance * everything[key].abs().max())


def test_statistics_have_no_gradient() -> None:
    case = make_case(COMPLETE)
    z = case.arguments["query"].requires_grad_()
    loss, stats = LF.contrastive_loss(z, temperature=0.5, labels=case.arguments["labels"], return_stats=True)
    assert loss.requires_grad and loss.dim() == 0
    assert not any(x.requires_grad for x in stats) and all(x.shape == (len(z),) for x in stats)
    plain = LF.contrastive_loss(z, temperature=0.5, labels=case.arguments["labels"])
    assert isinstance(plain, Tensor) and torch.equal(plain, loss)


def test_infinite_query_is_not_hidden() -> None:
    """Its products may all be -inf, which is also how a key that a row does not see looks to a kernel."""
    query = torch.tensor([[-torch.inf, -torch.inf], [0.5, 1.0]])
    key = torch.rand(5, 2, generator=torch.Generator().manual_seed(0)) + 0.1
    loss = LF.contrastive_loss(query, key, temperature=1.0, positive_index=torch.tensor([0, 1]), reduction="none")
    assert loss.isnan().tolist() == [True, False]


INFINITE = {
    "a row of a self-contrast": ([[-torch.inf, 1], [0.5, 1], [0.2, 0.7], [0.3, 0.3]], None, [0, 1]),
    "an overflow of finite numbers": ([[-3e38, 1], [5, 1], [0.2, 0.7], [0.3, 0.3]], None, [0, 1]),
    "a query": ([[-torch.inf, 1], [0.5, 1], [0.2, 0.7], [0.3, 0.3]], [[0.5, 1], [1, 1], [1, 2], [2, 1]], [0]),
    "a positive key": ([[0.1, 1], [0.5, 1], [0.2, 0.7], [0.3, 0.3]], [[-torch.inf, 1], [1, 2], [1, 1]], [0, 1]),
}


@pytest.mark.parametrize("denominator", ["all", "own", "negatives"])
@pytest.mark.parametrize("name", INFINITE)
def test_infinite_positive_is_not_hidden(name: str, denominator: str) -> None:
    """Left out, it would leave a row without positives and a loss of 0: a diverged training would look well."""
    query, key, rows = INFINITE[name]
    arguments = {"query": torch.tensor(query), "labels": torch.tensor([0, 0, 1, 1]), "temperature": 1.0}
    if key is not None:
        arguments |= {"key": torch.tensor(key), "key_labels": torch.tensor([0, 1, 1, 0][: len(key)])}
    loss = LF.contrastive_loss(**arguments, denominator=denominator, reduction="none")
    expected = definition(arguments | {"denominator": denominator, "reduction": "none"})["loss"]
    assert all(not expected[i].isfinite() and not loss[i].isfinite() for i in rows)
    # Without positives in the denominator an infinite negative may be all there is: NaN there too.
    shown = loss.isfinite() if denominator != "all" else expected.isfinite()
    torch.testing.assert_close(loss[shown], expected[shown])
    assert not LF.contrastive_loss(**arguments, denominator=denominator).isfinite()


def test_infinite_negative_is_an_infinite_distance() -> None:
    """A key that is infinitely far from a row takes no part in its sum, as in the definition."""
    query = torch.tensor([[0.1, 1.0], [0.5, 1.0]])
    key = torch.tensor([[1.0, 2.0], [2.0, 1.0], [-torch.inf, 1.0]])
    arguments = {"temperature": 0.5, "labels": torch.tensor([0, 1]), "key_labels": torch.tensor([0, 1, 2])}
    loss = LF.contrastive_loss(query, key, **arguments, reduction="none")
    arguments["key_labels"] = arguments["key_labels"][:2]
    torch.testing.assert_close(loss, LF.contrastive_loss(query, key[:2], **arguments, reduction="none"))
