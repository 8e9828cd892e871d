"""Bad calls of the contrastive functions: which exception, and that its message names the argument.

The last test runs this file once more on the plain-torch backend.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from contrastive_oracle import KERNEL
from torch import Tensor

import ltkernels.functional as LF

M, N, D = 6, 9, 4
Z, KEY = (torch.randn(n, D, generator=torch.Generator().manual_seed(n)) for n in (M, N))
Y, KEY_LABELS, INDEX = torch.tensor([0, 0, 1, 1, 2, -1]), torch.arange(N) % 3, torch.tensor([1, 0, 3, 2, 5, 4])
META = {"device": "meta"}
OWN = {"query": Z, "temperature": 0.5, "labels": Y}
SIDES = {"query": Z, "key": KEY, "temperature": 0.5, "labels": Y, "key_labels": KEY_LABELS}
PAIRS = {"query": Z, "temperature": 0.5, "positive_index": INDEX}
AVERAGE = OWN | {"denominator": "negatives", "log_normalizer": torch.zeros(M)}
NAN, INF = torch.nan, torch.inf


def spoiled(x: Tensor, index: int, value: float) -> Tensor:
    x = x.clone()
    x.flatten()[index] = value
    return x


# A good call, what is changed in it, the exception, and words of its message.
Bad = tuple[dict, dict, type[Exception], tuple[str, ...]]
EMBEDDINGS: list[Bad] = [
    (OWN, {"query": [1.0]}, TypeError, ("query", "expected a Tensor", "list")),
    (OWN, {"query": None}, TypeError, ("query", "expected a Tensor", "NoneType")),
    (OWN, {"query": Z[0]}, ValueError, ("query", "(M, D)", "(4,)")),
    (OWN, {"query": Z[None]}, ValueError, ("query", "(M, D)", "(1, 6, 4)")),
    (OWN, {"query": Z[:, :0]}, ValueError, ("query", "D > 0", "(6, 0)")),
    (OWN, {"query": Z.long()}, TypeError, ("query", "expected", "int64")),
    (OWN, {"query": Z.bool()}, TypeError, ("query", "expected", "bool")),
    (OWN, {"query": Z.to(torch.complex64)}, TypeError, ("query", "expected", "complex64")),
    (OWN, {"query": Z.to(torch.float8_e4m3fn)}, TypeError, ("query", "float16, bfloat16, float32", "float8")),
    (SIDES, {"key": 3}, TypeError, ("key", "expected a Tensor or None", "int")),
    (SIDES, {"key": KEY[0]}, ValueError, ("key", "(N, 4)", "(4,)")),
    (SIDES, {"key": KEY[:, :3]}, ValueError, ("key", "(N, 4)", "(9, 3)")),
    (SIDES, {"key": KEY.double()}, TypeError, ("key", "float32 like query", "float64")),
    (SIDES, {"key": KEY.half()}, TypeError, ("key", "float32 like query", "float16")),
    (SIDES, {"query": Z.bfloat16()}, TypeError, ("key", "bfloat16 like query", "float32")),
    (SIDES, {"key": KEY.to("meta")}, ValueError, ("key", "cpu like query", "meta")),
    (OWN, {"extra_positive": Z[:5]}, ValueError, ("extra_positive", "(6, 4)", "(5, 4)")),
    (OWN, {"extra_positive": Z[:, :3]}, ValueError, ("extra_positive", "(6, 4)", "(6, 3)")),
    (OWN, {"extra_positive": Z[0]}, ValueError, ("extra_positive", "(6, 4)", "(4,)")),
    (OWN, {"extra_positive": Z.double()}, TypeError, ("extra_positive", "float32 like query", "float64")),
    (OWN, {"extra_positive": 1.0}, TypeError, ("extra_positive", "expected a Tensor or None", "float")),
    (OWN, {"extra_positive": Z.to("meta")}, ValueError, ("extra_positive", "cpu like query", "meta")),
]
TEMPERATURE: list[Bad] = [
    *((OWN, {"temperature": t}, ValueError, ("temperature", "above 0", f"{t}")) for t in (0, 0.0, -1.0, NAN, INF)),
    *((OWN, {"temperature": t}, TypeError, ("temperature", "a number or a Tensor")) for t in ("1", None, True, [1.0])),
    (OWN, {"temperature": torch.ones(N)}, ValueError, ("temperature", "() or (6,)", "(9,)")),
    (OWN, {"temperature": torch.ones(1)}, ValueError, ("temperature", "() or (6,)", "(1,)")),
    (OWN, {"temperature": torch.ones(M, 1)}, ValueError, ("temperature", "() or (6,)", "(6, 1)")),
    (OWN, {"temperature": torch.ones(M).long()}, TypeError, ("temperature", "floating dtype", "int64")),
    (OWN, {"temperature": torch.ones(M, **META)}, ValueError, ("temperature", "cpu like query", "meta")),
    *(
        (
            OWN,
            {"temperature": spoiled(torch.ones(M), 4, t)},
            ValueError,
            ("above 0", f"{t:g} at index 4"),
        )
        for t in (0.0, -0.5, NAN, INF)
    ),
    *((OWN, {"temperature": torch.tensor(t)}, ValueError, ("temperature", "above 0", f"{t:g}")) for t in (0.0, NAN)),
]
POSITIVES: list[Bad] = [
    (OWN, {"labels": None}, ValueError, ("labels, positive_index or extra_positive", "nothing says")),
    (OWN, {"positive_index": INDEX}, ValueError, ("labels, positive_index", "got both")),
    (OWN, {"key_labels": Y}, ValueError, ("key_labels", "without key")),
    (PAIRS, {"key": KEY, "key_labels": KEY_LABELS}, ValueError, ("key_labels", "without key and labels")),
    (SIDES, {"key_labels": None}, ValueError, ("key_labels", "the labels of key", "None")),
    *((OWN, {"labels": x}, TypeError, ("labels", "integer dtype")) for x in (Y.float(), Y > 0, Y.to(torch.complex64))),
    (OWN, {"labels": [0] * M}, TypeError, ("labels", "expected a Tensor or None", "list")),
    (OWN, {"labels": Y[:5]}, ValueError, ("labels", "(6,)", "(5,)")),
    (OWN, {"labels": Y[:, None]}, ValueError, ("labels", "(6,)", "(6, 1)")),
    (OWN, {"labels": Y.to("meta")}, ValueError, ("labels", "cpu like query", "meta")),
    (OWN, {"labels": spoiled(Y, 3, -2)}, ValueError, ("labels", "from -1 to 2^31 - 1", "-2 at index 3")),
    (OWN, {"labels": spoiled(Y, 3, -100)}, ValueError, ("labels", "from -1 to 2^31 - 1", "-100 at index 3")),
    (SIDES, {"key_labels": KEY_LABELS[:5]}, ValueError, ("key_labels", "(9,)", "(5,)")),
    (SIDES, {"key_labels": KEY_LABELS.float()}, TypeError, ("key_labels", "integer dtype", "float32")),
    (
        SIDES,
        {"key_labels": spoiled(KEY_LABELS, 8, -7)},
        ValueError,
        ("key_labels", "from -1 to 2^31 - 1", "-7 at index 8"),
    ),
    (PAIRS, {"positive_index": INDEX.float()}, TypeError, ("positive_index", "integer dtype", "float32")),
    (PAIRS, {"positive_index": INDEX[:4]}, ValueError, ("positive_index", "(6,)", "(4,)")),
    (PAIRS, {"positive_index": INDEX.to("meta")}, ValueError, ("positive_index", "cpu like query", "meta")),
    (PAIRS, {"positive_index": spoiled(INDEX, 2, 6)}, ValueError, ("positive_index", "0 to 5", "6 at index 2")),
    (PAIRS, {"positive_index": spoiled(INDEX, 2, -1)}, ValueError, ("positive_index", "0 to 5", "-1 at index 2")),
    (PAIRS, {"positive_index": spoiled(INDEX, 2, 2)}, ValueError, ("positive_index", "the row itself", "2 at index 2")),
    (PAIRS, {"positive_index": spoiled(INDEX, 0, 9), "key": KEY}, ValueError, ("positive_index", "0 to 8", "got 9")),
]
VECTORS: list[Bad] = [
    *((SIDES, {"allowed": torch.ones(s).bool()}, ValueError, ("allowed", "(9,) or (6, 9)", f"{s}"))
      for s in ((M,), (9, 6), (1, 9), ())),
    (OWN, {"allowed": torch.ones(M)}, TypeError, ("allowed", "bool", "float32")),
    (OWN, {"allowed": torch.ones(M, **META).bool()}, ValueError, ("allowed", "cpu like query", "meta")),
    (OWN, {"allowed": True}, TypeError, ("allowed", "expected a Tensor or None", "bool")),
    *((SIDES, {"key_bias": torch.ones(s)}, ValueError, ("key_bias", "(9,)", f"{s}")) for s in ((M,), (N, 1), ())),
    *((OWN, {name: torch.ones(N)}, ValueError, (name, "(6,)", "(9,)")) for name in ("sample_weight", "key_bias")),
    (AVERAGE, {"log_normalizer": torch.ones(N)}, ValueError, ("log_normalizer", "(6,)", "(9,)")),
    *(
        (OWN, {name: x}, error, (name, *words))
        for name in ("sample_weight", "key_bias", "pair_margin")
        for x, error, words in (
            (torch.ones((3, 3) if name == "pair_margin" else (M,)).long(), TypeError, ("floating dtype", "int64")),
            (torch.ones((3, 3) if name == "pair_margin" else (M,), **META), ValueError, ("cpu like query", "meta")),
            ([1.0], TypeError, ("expected a Tensor or None", "list")),
        )
    ),
    *(
        (good, {name: spoiled(torch.ones(*shape), 1, value)}, ValueError, (name, "finite", f"{value:g} at index 1"))
        for good, name, shape in (
            (OWN, "sample_weight", (M,)), (OWN, "key_bias", (M,)), (OWN, "pair_margin", (3, 3)),
            (AVERAGE, "log_normalizer", (M,)),
        )
        for value in (NAN, INF, -INF)
        if (name, value) != ("key_bias", -INF)
    ),
    *((OWN, {"pair_margin": torch.ones(s)}, ValueError, ("pair_margin", "(L, L)", f"{s}")) for s in ((3,), (3, 4), ())),
    (PAIRS, {"pair_margin": torch.ones(3, 3)}, ValueError, ("pair_margin", "labels", "None")),
    (OWN, {"pair_margin": torch.ones(2, 2)}, ValueError, ("labels", "below 2", "2 at index 4")),
    (SIDES, {"pair_margin": torch.ones(3, 3), "key_labels": spoiled(KEY_LABELS, 7, 3)}, ValueError,
     ("key_labels", "below 3", "3 at index 7")),
]  # fmt: skip
NAMES: list[Bad] = [
    *((OWN, {"denominator": x}, ValueError, ("denominator", "'own'", repr(x))) for x in ("each", None, 1, ["all"])),
    *((OWN, {"reduction": x}, ValueError, ("reduction", "'mean'", repr(x))) for x in ("average", None, 1, ["mean"])),
    (AVERAGE, {"denominator": "all"}, ValueError, ("log_normalizer", "denominator='negatives'")),
    (AVERAGE, {"denominator": "own"}, ValueError, ("log_normalizer", "denominator='negatives'")),
    (AVERAGE, {"scale_by_temperature": True}, ValueError, ("log_normalizer", "no scale_by_temperature")),
]
BAD = EMBEDDINGS + TEMPERATURE + POSITIVES + VECTORS + NAMES

LSE = {"query": Z, "temperature": 0.5}
BAD_LOGSUMEXP: list[Bad] = [
    *((LSE, {"exclude": x}, ValueError, ("exclude", "'self'", repr(x))) for x in ("diagonal", 1, ["self"])),
    *((LSE, {"exclude": x}, ValueError, ("labels", "got None")) for x in ("same_label", "different_label")),
    *((LSE, change, error, words) for good, change, error, words in EMBEDDINGS[:9] + TEMPERATURE if good is OWN),
    (LSE, {"key": KEY[:, :3]}, ValueError, ("key", "(N, 4)", "(9, 3)")),
    (LSE, {"key_bias": torch.ones(N)}, ValueError, ("key_bias", "(6,)", "(9,)")),
    (LSE, {"key": KEY, "labels": Y, "exclude": "same_label"}, ValueError, ("key_labels", "got None")),
    (LSE, {"labels": Y.float(), "exclude": "same_label"}, TypeError, ("labels", "integer dtype")),
]


def describe(value: object) -> str | None:
    if not isinstance(value, dict) or "query" in value and "temperature" in value:
        return ""
    return "-".join(f"{k}={tuple(v.shape) if isinstance(v, Tensor) else v}" for k, v in value.items())


def raises(function: Callable, given: dict, exception: type[Exception], words: tuple[str, ...]) -> None:
    before = {name: memory_of(x) for name, x in given.items()}
    with pytest.raises(exception) as error:
        function(**given)
    assert type(error.value) is exception
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"
    assert before == {name: memory_of(x) for name, x in given.items()}


def memory_of(x: object) -> list[int]:
    return x.untyped_storage().tolist() if isinstance(x, Tensor) and x.is_cpu else []


def with_gradient(given: dict) -> dict:
    query = given["query"]
    good = isinstance(query, Tensor) and query.dtype == torch.float32
    return given | {"query": torch.nn.Parameter(query)} if good else given


@pytest.mark.parametrize("form", [dict, with_gradient], ids=["no_gradient", "parameter"])
@pytest.mark.parametrize(("good", "change", "exception", "words"), BAD, ids=describe)
def test_bad_call(good: dict, change: dict, exception: type[Exception], words: tuple, form: Callable) -> None:
    raises(LF.contrastive_loss, form(good | change), exception, words)


@pytest.mark.parametrize(("good", "change", "exception", "words"), BAD_LOGSUMEXP, ids=describe)
def test_bad_logsumexp(good: dict, change: dict, exception: type[Exception], words: tuple) -> None:
    raises(LF.similarity_logsumexp, good | change, exception, words)


@pytest.mark.parametrize(("good", "change", "exception", "words"), NAMES + EMBEDDINGS[3:9], ids=describe)
def test_bad_call_of_fake_tensors(good: dict, change: dict, exception: type[Exception], words: tuple) -> None:
    """What needs no values is checked on every device."""
    given = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in (good | change).items()}
    raises(LF.contrastive_loss, given, exception, words)


def test_good_calls() -> None:
    """The calls above are bad for one reason only."""
    for good in (OWN, SIDES, PAIRS, AVERAGE):
        assert LF.contrastive_loss(**good).isfinite()
        assert LF.contrastive_loss(**with_gradient(good)).requires_grad
    assert LF.similarity_logsumexp(**LSE).isfinite().all()
    assert LF.similarity_logsumexp(**LSE, key=KEY, exclude="self", key_bias=torch.zeros(N)).isfinite().all()


def test_what_looks_bad_and_is_not() -> None:
    """-inf as a key's bias, weights of 0 or below, a row whose positive is removed, large labels."""
    bias = spoiled(torch.zeros(M), 2, -INF)
    assert LF.contrastive_loss(**OWN, key_bias=bias, sample_weight=-torch.ones(M)).isfinite()
    assert LF.contrastive_loss(**OWN, sample_weight=torch.zeros(M)) == 0
    assert LF.contrastive_loss(**PAIRS, allowed=torch.zeros(M, dtype=torch.bool)) == 0
    assert LF.contrastive_loss(**SIDES | {"labels": torch.full((M,), 10**9)}) == 0
    assert LF.contrastive_loss(**OWN, pair_margin=torch.zeros(10, 10)).isfinite()


@pytest.mark.parametrize("how", ["compiled", "vmap"])
@pytest.mark.parametrize(
    "options",
    [
        {"positive_index": spoiled(LF.view_pairs(M), 2, M)},
        {"positive_index": spoiled(LF.view_pairs(M), 2, -1)},
        {"positive_index": spoiled(LF.view_pairs(M), 2, 2)},
        {"labels": spoiled(torch.arange(M) % 2, 2, -2)},
        {"labels": spoiled(torch.arange(M) % 2, 2, 2), "pair_margin": torch.ones(2, 2)},
    ],
    ids=["beyond", "negative", "itself", "label", "label_without_margin"],
)
def test_what_no_check_sees_is_no_number(options: dict, how: str) -> None:
    """Traced and batched values are not there to be read before the call: the kernel raises, the definition is NaN."""

    def loss(query: Tensor) -> Tensor:
        return LF.contrastive_loss(query, temperature=0.5, **options)

    query = torch.randn(M, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.compiler.reset()
    call = torch.compile(loss, backend="aot_eager") if how == "compiled" else lambda z: torch.vmap(loss)(z[None])[0]
    try:
        value = call(query)
    except ValueError as error:
        assert "expected" in str(error)
        return
    assert not KERNEL and value.isnan() and torch.autograd.grad(value, query)[0].isnan().any()


@pytest.mark.skipif(os.environ.get("LTKERNELS_BACKEND") == "reference", reason="runs this file")
def test_reference_gives_the_same_errors(run_python: Callable[..., str]) -> None:
    assert " passed" in run_python("-m", "pytest", "-q", str(Path(__file__)), LTKERNELS_BACKEND="reference")
