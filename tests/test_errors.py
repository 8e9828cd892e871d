"""Bad calls: which exception, and that its message names the argument, what was expected and what came.

tests/test_backends.py runs this file once more on the plain-torch backend.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from oracle import same_bits
from torch import Tensor

import ltkernels.functional as LF

N, C = 4, 7
NAN, INF = math.nan, math.inf
LOGITS = torch.randn(N, C, generator=torch.Generator().manual_seed(0))
TARGET = torch.arange(N)
FLOATING = [
    *(("weight", (C,)), ("logit_scale", (C,)), ("logit_bias", (C,)), ("target_margin", (C,))),
    *(("pairwise_margin", (C, C)), ("sample_weight", (N,))),
]
IMAGE = {"input": torch.randn(N, C, 5), "target": torch.zeros(N, 5, dtype=torch.long)}


@dataclass
class Bad:
    """A call that differs from a good one by ``change``."""

    change: dict
    exception: type[Exception]
    words: tuple[str, ...]
    name: str = field(default="")


def spoiled(value: float, *shape: int) -> Tensor:
    """Ones with one bad value, in a place that is used."""
    x = torch.ones(shape)
    x.flatten()[1] = value
    return x


def with_target(*classes: int, **change: object) -> dict:
    return {"target": torch.tensor(classes), **change}


VALUES = [
    Bad(with_target(0, 1, 2, 7), IndexError, ("target", "[0, 7)", "got 7 at row 3")),
    Bad(with_target(0, -1, 2, 3), IndexError, ("target", "[0, 7)", "got -1 at row 1")),
    Bad(with_target(-100, 1, 2, 3, ignore_index=-1), IndexError, ("target", "ignore_index=-1", "got -100 at row 0")),
    Bad(with_target(2**40, 1, 2, 3), IndexError, ("target", "[0, 7)", f"got {2**40} at row 0")),
    Bad({"target": torch.tensor([0, 1, 200, 3], dtype=torch.uint8)}, IndexError, ("target", "got 200 at row 2")),
    Bad({"target": torch.tensor([0, 1, -9, 3], dtype=torch.int8)}, IndexError, ("target", "got -9 at row 2")),
    Bad({"input": LOGITS[0], "target": torch.tensor(9)}, IndexError, ("target", "[0, 7)", "got 9")),
    *(
        Bad({name: spoiled(value, C)}, ValueError, (name, "expected finite values", f"got {value:g} at index 1"))
        for name in ("logit_scale", "logit_bias", "target_margin")
        for value in (NAN, INF, -INF)
        if (name, value) != ("logit_bias", -INF)  # a class removed for all rows
    ),
    Bad({"logit_scale": torch.tensor(NAN)}, ValueError, ("logit_scale", "expected finite values", "got nan")),
    Bad({"target_margin": torch.tensor(NAN)}, ValueError, ("target_margin", "expected finite values", "got nan")),
    Bad({"scale": torch.tensor(INF)}, ValueError, ("scale", "expected finite values", "got inf")),
    *(
        Bad(
            {"pairwise_margin": spoiled(value, C, C)},
            ValueError,
            ("pairwise_margin", "expected finite", f"got {value:g}"),
        )
        for value in (NAN, INF)
    ),
]

OPTIONS = [
    *(
        Bad({"scale": s}, ValueError, ("scale", "finite number above 0", f"got {s:g}"))
        for s in (0.0, -1.0, NAN, INF, -INF)
    ),
    *(
        Bad({"label_smoothing": eps}, ValueError, ("label_smoothing", "a number in [0, 1]", f"got {eps:g}"))
        for eps in (-0.1, 1.1, NAN, INF)
    ),
    *(
        Bad({"reduction": r}, ValueError, ("reduction", "'mean'", f"got {r!r}"))
        for r in ("average", "", None, 1, ["mean"])
    ),
    *(
        Bad({"scale": torch.tensor(s)}, ValueError, ("scale", "expected values above 0", f"got {s:g}"))
        for s in (0.0, -2.0)
    ),
    *(
        Bad({"scale": s}, ValueError, ("scale", "finite number above 0 in float32", f"got {s:g}"))
        for s in (1e-50, 1e39)  # 0 and infinity in float32
    ),
    Bad({"scale": torch.tensor(1e-50, dtype=torch.float64)}, ValueError, ("scale", "above 0 in torch.float32, got 0")),
    Bad({"scale": torch.tensor(1e39, dtype=torch.float64)}, ValueError, ("scale", "expected finite values, got inf")),
    *(
        Bad({name: 10**400}, ValueError, (name, "expected a finite number", "too large for float64"))
        for name in ("scale", "label_smoothing")
    ),
    *(
        Bad({"ignore_index": x}, ValueError, ("ignore_index", "expected an int of 64 bits", f"got one of {bits}"))
        for x, bits in ((2**70, 72), (2**63, 65), (-(2**63) - 1, 65))
    ),
    *(
        Bad({"return_lse": x}, TypeError, ("return_lse", "expected a bool", f"got {type(x).__name__}"))
        for x in ("yes", 1, None)
    ),
    Bad({"scale": torch.ones(2)}, ValueError, ("scale", "0-d floating tensor", "(2,)")),
    Bad({"scale": torch.tensor(2)}, ValueError, ("scale", "0-d floating tensor", "int64")),
    Bad({"scale": "2"}, TypeError, ("scale", "expected a number", "got str")),
    Bad({"scale": None}, TypeError, ("scale", "expected a number", "got NoneType")),
    Bad({"label_smoothing": "0.1"}, TypeError, ("label_smoothing", "expected a number", "got str")),
    Bad({"label_smoothing": torch.tensor(0.1)}, TypeError, ("label_smoothing", "expected a number", "got Tensor")),
    Bad({"ignore_index": 1.5}, TypeError, ("ignore_index", "expected an int", "got float")),
    Bad({"ignore_index": None}, TypeError, ("ignore_index", "expected an int", "got NoneType")),
]

DTYPES = [
    Bad({"input": torch.ones(N, C, dtype=torch.long)}, TypeError, ("input", "expected float16", "got Long")),
    Bad({"input": torch.ones(N, C, dtype=torch.complex64)}, TypeError, ("input", "expected float16", "got Complex")),
    Bad({"input": LOGITS.to(torch.float8_e4m3fn)}, TypeError, ("input", "expected float16", "got Float8")),
    Bad({"target": TARGET > 1}, TypeError, ("target", "integer dtype", "got Bool")),
    Bad({"target": TARGET.to(torch.complex64)}, TypeError, ("target", "integer dtype", "got Complex")),
    Bad({"mask": torch.ones(C)}, TypeError, ("mask", "expected dtype bool", "got Float")),
    *(
        Bad({name: torch.ones(shape, dtype=torch.long)}, TypeError, (name, "expected a floating dtype", "got Long"))
        for name, shape in FLOATING
    ),
    *(
        Bad({name: [1.0] * C}, TypeError, (name, "expected a Tensor", "got list"))
        for name in (
            "input",
            "target",
            "weight",
            "logit_scale",
            "logit_bias",
            "target_margin",
            "pairwise_margin",
            "mask",
        )
    ),
    Bad(IMAGE | {"mask": [True] * C}, TypeError, ("mask", "expected a Tensor", "got list")),
    Bad(IMAGE | {"sample_weight": 1.0}, TypeError, ("sample_weight", "expected a Tensor", "got float")),
    Bad({"logit_bias": 3.0}, TypeError, ("logit_bias", "expected a Tensor", "got float")),
]

SPARSE, DENSE = torch.ones(N, C).to_sparse(), "expected a dense tensor"
LAYOUTS = [
    Bad({"input": SPARSE}, TypeError, ("input", DENSE, "parse")),
    Bad({"input": LOGITS.to_sparse_csr()}, TypeError, ("input", DENSE, "parse")),
    Bad({"input": LOGITS.to_mkldnn()}, TypeError, ("input", DENSE, "kldnn")),
    Bad({"input": torch.nested.nested_tensor([LOGITS[0], LOGITS[1]])}, TypeError, ("input", DENSE, "nested")),
    Bad(
        {"input": torch.nested.nested_tensor([LOGITS[0], LOGITS[1]], layout=torch.jagged)},
        TypeError,
        ("input", DENSE, "nested"),
    ),
    Bad({"input": IMAGE["input"].to_sparse(), "target": IMAGE["target"]}, TypeError, ("input", DENSE, "sparse")),
    Bad(IMAGE | {"target": IMAGE["target"].to_sparse()}, TypeError, ("target", DENSE, "sparse")),
    Bad(IMAGE | {"mask": torch.ones(N, C, 5, dtype=torch.bool).to_sparse()}, TypeError, ("mask", DENSE, "sparse")),
    Bad({"target": SPARSE}, TypeError, ("target", DENSE, "parse")),
    Bad({"mask": SPARSE.bool()}, TypeError, ("mask", DENSE, "parse")),
    *(
        Bad({name: torch.ones(shape).to_sparse()}, TypeError, (name, DENSE, "parse"))
        for name, shape in [*FLOATING, ("scale", ()), ("target_margin", ())]
    ),
]

SHAPES = [
    Bad({"input": torch.tensor(1.0)}, ValueError, ("input", "(C,), (N, C) or (N, C, d1, ...)", "0-d")),
    Bad({"input": torch.ones(N, 0)}, ValueError, ("input", "at least one class", "[4, 0]")),
    Bad({"input": torch.ones(0), "target": torch.tensor(0)}, ValueError, ("input", "at least one class", "(0,)")),
    Bad(IMAGE | {"input": torch.ones(N, 0, 5)}, ValueError, ("input", "at least one class", "(4, 0, 5)")),
    Bad({"target": torch.zeros(N, 2, dtype=torch.long)}, ValueError, ("target", "(4,)", "[4, 2]")),
    Bad({"target": TARGET[:3]}, ValueError, ("target", "(4,)", "[3]")),
    Bad({"target": torch.tensor(1)}, ValueError, ("target", "(4,)", "[]")),
    Bad({"target": torch.rand(N, 6)}, ValueError, ("target", "probabilities", "[4, 7]", "[4, 6]")),
    Bad({"target": torch.rand(N)}, ValueError, ("target", "probabilities", "[4, 7]", "[4]")),
    Bad({"input": LOGITS[0], "target": TARGET[:1]}, ValueError, ("target", "shape ()", "(1,)")),
    Bad({"input": IMAGE["input"]}, ValueError, ("target", "(4, 5)", "got (4,)")),
    Bad(IMAGE | {"target": torch.rand(N, 5, C)}, ValueError, ("target", "(4, 7, 5)", "got (4, 5, 7)")),
    *(
        Bad({name: torch.ones(shape)}, ValueError, (name, "(7,)", str(list(shape))))
        for name in ("weight", "logit_scale", "logit_bias", "target_margin")
        for shape in ((6,), (1,), (C, 1), (N, C))
    ),
    *(Bad({name: torch.tensor(1.0)}, ValueError, (name, "(7,)", "[]")) for name in ("weight", "logit_bias")),
    *(
        Bad({"pairwise_margin": torch.ones(s)}, ValueError, ("pairwise_margin", "(7, 7)", str(list(s))))
        for s in ((C,), (C, 6))
    ),
    *(
        Bad({"sample_weight": torch.ones(s)}, ValueError, ("sample_weight", "(4,)", str(list(s))))
        for s in ((), (C,), (N, 1))
    ),
    *(
        Bad({"mask": torch.ones(s, dtype=torch.bool)}, ValueError, ("mask", "(7,) or (4, 7)", str(list(s))))
        for s in ((), (6,), (C, N), (N, C, 1))
    ),
    Bad(IMAGE | {"mask": torch.ones(N, 5, dtype=torch.bool)}, ValueError, ("mask", "(4, 7, 5)", "got (4, 5)")),
    Bad(IMAGE | {"sample_weight": torch.ones(5)}, ValueError, ("sample_weight", "(4, 5)", "got (5,)")),
    Bad(
        {"target": torch.rand(N, C), "pairwise_margin": torch.ones(C, C)},
        ValueError,
        ("pairwise_margin", "class indices", "got probabilities"),
    ),
    Bad({"target": torch.rand(N, C), "ignore_index": 3}, ValueError, ("ignore_index", "got probabilities")),
]

DEVICES = [
    Bad({name: torch.ones(shape, dtype=dtype, device="meta")}, ValueError, (name, "on cpu like input", "on meta"))
    for name, shape, dtype in [
        ("target", (N,), torch.long),
        ("weight", (C,), torch.float),
        ("logit_scale", (C,), torch.float),
        ("logit_bias", (C,), torch.float),
        ("target_margin", (C,), torch.float),
        ("mask", (C,), torch.bool),
        ("pairwise_margin", (C, C), torch.float),
        ("sample_weight", (N,), torch.float),
        ("scale", (), torch.float),
    ]
] + [Bad({"input": LOGITS.to("meta")}, ValueError, ("target", "on meta like input", "on cpu"))]

GRADIENTS = [
    Bad({"weight": torch.ones(C, requires_grad=True)}, ValueError, ("weight", "not supported", "weight.detach()")),
    Bad({"target": torch.rand(N, C, requires_grad=True)}, ValueError, ("target", "not supported", "target.detach()")),
]


def describe(bad: Bad) -> str:
    def word(x: object) -> str:
        if not isinstance(x, Tensor):
            return f"{x:g}" if isinstance(x, float) else f"{x}"[:20]
        shape = "nested" if x.is_nested else "x".join(map(str, x.shape))
        return shape + str(x.dtype)[5:] + ("" if x.layout is torch.strided else str(x.layout)[5:])

    return "-".join(f"{name}={word(x)}" for name, x in bad.change.items())


def memory_of(x: object) -> list[int]:
    dense = isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested
    return x.untyped_storage().tolist() if dense and x.device.type == "cpu" else []


@pytest.mark.parametrize("bad", VALUES + OPTIONS + DTYPES + LAYOUTS + SHAPES + DEVICES + GRADIENTS, ids=describe)
def test_bad_call(bad: Bad) -> None:
    """The documented exception and its words; nothing is corrupted, and the next good call is right."""
    want = LF.margin_cross_entropy(LOGITS, TARGET)
    arguments = {"input": LOGITS.clone(), "target": TARGET.clone()} | bad.change
    memory = {name: memory_of(x) for name, x in arguments.items()}
    with pytest.raises(bad.exception) as caught:
        LF.margin_cross_entropy(**arguments)
    assert type(caught.value) is bad.exception
    message = str(caught.value)
    assert all(word in message for word in bad.words), message
    assert memory == {name: memory_of(x) for name, x in arguments.items()}
    assert same_bits(LF.margin_cross_entropy(LOGITS, TARGET), want)


@pytest.mark.parametrize(
    "bad", [VALUES[0], VALUES[7], SHAPES[1], DTYPES[3]], ids=["target", "values", "shape", "dtype"]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bad_call_that_records_a_graph(bad: Bad, reduction: str) -> None:
    logits = LOGITS.clone().requires_grad_()
    good = LF.margin_cross_entropy(logits, TARGET, reduction=reduction)
    with pytest.raises(bad.exception):
        LF.margin_cross_entropy(**{"input": logits, "target": TARGET, "reduction": reduction} | bad.change)
    good.sum().backward()
    fresh = LOGITS.clone().requires_grad_()
    LF.margin_cross_entropy(fresh, TARGET, reduction=reduction).sum().backward()
    assert same_bits(logits.grad, fresh.grad)


def test_ignored_and_removed_values_are_not_errors() -> None:
    """What looks bad and is not: -inf in a bias or pairwise margin, and 0 or negative weights."""
    bias, pairwise = torch.zeros(C), torch.zeros(C, C)
    bias[6], pairwise[:, 5] = -INF, -INF
    loss = LF.margin_cross_entropy(LOGITS, TARGET, -torch.ones(C), logit_bias=bias, pairwise_margin=pairwise)
    assert loss.isfinite()
    assert LF.margin_cross_entropy(LOGITS, TARGET, sample_weight=torch.zeros(N), reduction="sum") == 0


def test_pairwise_margins_that_no_sample_uses_may_hold_anything() -> None:
    """C x C values are too many to check at each call, so no backend does: classes 4 to 6 have no sample here."""
    target = torch.tensor([0, 1, -100, 3])  # class 2 has an ignored one only
    pairwise = torch.randn(C, C, generator=torch.Generator().manual_seed(1))
    want = LF.margin_cross_entropy(LOGITS, target, pairwise_margin=pairwise)
    pairwise[4:], pairwise[2] = NAN, INF
    got = LF.margin_cross_entropy(LOGITS, target, pairwise_margin=pairwise)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    pairwise[3, 5] = NAN
    with pytest.raises(ValueError, match="pairwise_margin: expected finite values, got (nan|inf)"):
        LF.margin_cross_entropy(LOGITS, target, pairwise_margin=pairwise)
    mask = torch.arange(C) != 5
    assert LF.margin_cross_entropy(LOGITS, target, pairwise_margin=pairwise, mask=mask).isfinite()


@pytest.mark.parametrize(
    "options", [{}, {"weight": torch.ones(C)}, {"reduction": "sum"}], ids=["plain", "weight", "sum"]
)
def test_bad_target_under_vmap(options: dict) -> None:
    target = TARGET.expand(3, N).clone()
    target[1, 2] = C
    with pytest.raises(IndexError):
        torch.vmap(lambda y: LF.margin_cross_entropy(LOGITS, y, **options))(target)
