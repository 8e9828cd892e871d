"""Calls of auxiliary_cross_entropy: what is wrong raises, what is unusual (traced, batched, compiled) works."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import kernels_run, same_bits
from test_auxiliary import MAP, MODES, TARGET, A, C, K, N, gradient, randn
from torch import Tensor, nn
from torch.func import grad, vmap

import ltkernels.functional as LF
from ltkernels import _ops
from ltkernels.neighbors import NeighborMap

NAN, INF = math.nan, math.inf
LOGITS = randn(N, K)
PROBABILITIES = randn(N, K, seed=1).softmax(1)
SOFT = {"target": PROBABILITIES, "row_class": TARGET}
COUNTS = torch.arange(1.0, K + 1)
kernels_only = pytest.mark.skipif(_ops.BACKEND == "reference", reason="about the operators")


def replaced(x: Tensor, index: int, value: float) -> Tensor:
    x = x.clone()
    x[index] = value
    return x


# -------------------------------------------------------------------------------------------------------------- errors

BAD: list[tuple[dict, type[Exception], tuple[str, ...]]] = [
    *(
        ({"neighbors": x}, TypeError, ("neighbors: expected a NeighborMap", f"got {type(x).__name__}"))
        for x in (None, {0: [4]}, [(0, 4)], torch.zeros(K, K))
    ),
    *(
        ({"neighbors": NeighborMap.from_pairs([(0, 4)], num_classes=C, num_auxiliary=a)}, ValueError, words)
        for a, words in ((A - 1, ("neighbors", "9 classes", "got one of 8")), (A + 1, ("neighbors", "got one of 10")))
    ),
    ({"neighbors": MAP.to("meta")}, ValueError, ("neighbor_offsets", "on cpu like input", "on meta")),
    *(
        ({"neighbor_weight": x}, ValueError, ("neighbor_weight", "in [0, 1]", f"got {x:g}"))
        for x in (-0.1, 1.1, NAN, INF, -INF)
    ),
    *(
        ({"neighbor_weight": x}, TypeError, ("neighbor_weight", "expected a number"))
        for x in ("0.1", None, [0.1], torch.tensor(0.1))
    ),
    *(({"mode": "back", "neighbor_weight": x}, ValueError, ("neighbor_weight=0", f"got {x:g}")) for x in (0.1, 1, NAN)),
    *(({"mode": x}, ValueError, ("mode", "plain, back", f"got {x!r}")) for x in ("hard", "", None, 0)),
    ({"target": PROBABILITIES}, ValueError, ("row_class", "probabilities")),
    ({"row_class": TARGET}, ValueError, ("row_class", "class indices")),
    *(
        (SOFT | {"row_class": replaced(TARGET, 3, x)}, IndexError, ("row_class", "[0, 9)", f"got {x} at row 3"))
        for x in (-1, -100, K, 2**40)
    ),
    *(
        (SOFT | {"row_class": TARGET.to(x)}, TypeError, ("row_class", "expected an integer dtype"))
        for x in (torch.float32, torch.bool)
    ),
    (SOFT | {"row_class": TARGET.tolist()}, TypeError, ("row_class", "expected a Tensor", "got list")),
    *(
        (SOFT | {"row_class": x}, ValueError, ("row_class", "(12,)", str(list(x.shape))))
        for x in (TARGET[:3], TARGET[:, None], torch.tensor(0))
    ),
    (SOFT | {"row_class": TARGET.to("meta")}, ValueError, ("row_class", "on cpu like input", "on meta")),
    (
        {"input": randn(N, K, 3), "target": randn(N, K, 3).softmax(1), "row_class": torch.zeros(3).long()},
        ValueError,
        ("row_class", "(12, 3)", "got (3,)"),
    ),
    *(
        ({"prior_counts": x}, ValueError, ("prior_counts", "(9,)", words))
        for x, words in ((COUNTS[:C], "(4,)"), (COUNTS[:, None], "(9, 1)"), (COUNTS.tolist(), "list"), (3.0, "float"))
    ),
    *(
        ({"prior_counts": replaced(COUNTS, 3, x)}, ValueError, ("prior_counts", "above 0", f"got {x:g} for class 3"))
        for x in (0.0, -2.0, NAN, float("inf"))
    ),
    *(
        ({"prior_counts": COUNTS, "tau": x}, ValueError, ("tau", "expected a finite number", f"got {x}"))
        for x in (NAN, INF, -INF)
    ),
    *(
        ({"prior_counts": COUNTS, "tau": x}, TypeError, ("tau", "expected a number", f"got {type(x).__name__}"))
        for x in (torch.tensor(1.0), torch.tensor(1.0, requires_grad=True), "1", None, [1.0])
    ),
    ({"prior_counts": torch.zeros(K, dtype=torch.long)}, ValueError, ("prior_counts", "for class 0")),
    ({"prior_counts": torch.ones(K, dtype=torch.bool)}, ValueError, ("prior_counts", "real numbers")),
    ({"target": replaced(TARGET, 1, K)}, IndexError, ("target", "[0, 9)", "got 9 at row 1")),
    ({"reduction": "max"}, ValueError, ("reduction", "got 'max'")),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: "-".join(bad[0]) + "-" + bad[1].__name__)
def test_bad_call(bad: tuple) -> None:
    """The documented exception and its words, and the next good call is right."""
    change, exception, words = bad
    want = LF.auxiliary_cross_entropy(LOGITS, TARGET, MAP)
    with pytest.raises(exception) as caught:
        LF.auxiliary_cross_entropy(**{"input": LOGITS, "target": TARGET, "neighbors": MAP} | change)
    assert type(caught.value) is exception and all(word in str(caught.value) for word in words), str(caught.value)
    assert same_bits(LF.auxiliary_cross_entropy(LOGITS, TARGET, MAP), want)


OFFSETS, CLASSES, _ = MAP.rows()
CORRUPTED: dict[str, tuple[Tensor | None, Tensor | None]] = {
    "descending": (replaced(OFFSETS, 2, 9), CLASSES),
    "negative_start": (replaced(OFFSETS, 0, -1), CLASSES),
    "negative": (replaced(OFFSETS, 3, -(2**31)), CLASSES),
    "beyond_the_end": (replaced(OFFSETS, K, 11), CLASSES),
    "far_beyond_the_end": (replaced(OFFSETS, 1, 2**31 - 1), CLASSES),
    "fewer_classes": (OFFSETS, CLASSES[:-1]),
    "no_classes": (OFFSETS, CLASSES[:0]),
    "class_too_large": (OFFSETS, replaced(CLASSES, 0, K)),
    "class_far_too_large": (OFFSETS, replaced(CLASSES, -1, 2**31 - 1)),
    "class_negative": (OFFSETS, replaced(CLASSES, 4, -1)),
    "unused_class": (torch.zeros_like(OFFSETS), replaced(CLASSES, 4, K)),
    "long_offsets": (OFFSETS.long(), CLASSES),
    "long_classes": (OFFSETS, CLASSES.long()),
    "float_classes": (OFFSETS, CLASSES.float()),
    "too_few_offsets": (OFFSETS[:-1], CLASSES),
    "too_many_offsets": (torch.cat([OFFSETS, OFFSETS[-1:]]), CLASSES),
    "no_offsets": (OFFSETS[:0], CLASSES),
    "scalar_offsets": (OFFSETS[0], CLASSES),
    "matrix_of_offsets": (OFFSETS[None], CLASSES),
    "matrix_of_classes": (OFFSETS, CLASSES[None]),
    "scalar_classes": (OFFSETS, CLASSES[0]),
    "offsets_alone": (OFFSETS, None),
    "classes_alone": (None, CLASSES),
}


def arguments(offsets: Tensor | None, classes: Tensor | None, *, soft: bool = False, back_from: int = -1) -> tuple:
    """Of the operator, up to label_smoothing."""
    target, row_class = (PROBABILITIES, TARGET) if soft else (TARGET, None)
    return (LOGITS, target, *[None] * 7, row_class, offsets, classes, 1.0, 0.0, back_from, 0, -100, 0.0)


@kernels_only
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("corrupted", CORRUPTED.values(), ids=CORRUPTED)
def test_corrupted_map(corrupted: tuple, soft: bool) -> None:
    """Straight to the operator, as a map never is: an error of the documented kinds, and nothing is read or written."""
    op = torch.ops.ltkernels.margin_softmax.default
    want, _ = op(*arguments(OFFSETS, CLASSES, soft=soft), False)
    with pytest.raises((ValueError, TypeError)) as caught:
        op(*arguments(*corrupted, soft=soft), False)
    assert "neighbor" in str(caught.value) or "row_class" in str(caught.value)
    assert same_bits(op(*arguments(OFFSETS, CLASSES, soft=soft), False)[0], want)


VALUES = (
    "descending",
    "negative_start",
    "negative",
    "beyond_the_end",
    "far_beyond_the_end",
    "fewer_classes",
    "no_classes",
)
VALUES += ("class_too_large", "class_far_too_large", "class_negative", "unused_class")


@kernels_only
@pytest.mark.parametrize("name", VALUES)
def test_corrupted_values_in_the_two_passes(name: str) -> None:
    """Values are checked wherever they are read: a map may change between forward and backward."""
    ops, bad = torch.ops.ltkernels, arguments(*CORRUPTED[name])
    with pytest.raises(ValueError, match="neighbor_"):
        ops.margin_softmax_fwd(*bad, True)
    loss, stats, _ = ops.margin_softmax_fwd(*arguments(OFFSETS, CLASSES), False)
    with pytest.raises(ValueError, match="neighbor_"):
        ops.margin_softmax_bwd(torch.ones_like(loss), None, stats, *bad, 1)


@kernels_only
def test_strided_map() -> None:
    op = torch.ops.ltkernels.margin_softmax.default
    wide = [torch.stack([x, x + 1], 1)[:, 0] for x in (OFFSETS, CLASSES)]
    assert not wide[0].is_contiguous()
    assert same_bits(op(*arguments(*wide), False)[0], op(*arguments(OFFSETS, CLASSES), False)[0])


@pytest.mark.parametrize("mode", ["target_only", "auxiliary_only"])
def test_modes_share_the_memory_of_the_map(mode: str) -> None:
    assert MAP.rows(mode).classes.data_ptr() == MAP.rows("plain").classes.data_ptr()


# ------------------------------------------------------------------------------------------------- gradients, batching

# name: options of one call
CASES: dict[str, dict] = {
    "plain": {},
    "back": {"mode": "back", "label_smoothing": 0.1},
    "damped": {"neighbor_weight": 0.1, "reduction": "none"},
    "soft": {"row_class": TARGET, "sample_weight": randn(N, seed=5).exp()},
    "soft_back": {"row_class": TARGET, "mode": "back", "target_margin": randn(K, seed=6)},
    "prior": {"prior_counts": COUNTS.double(), "weight": randn(K, seed=7).exp()},
}
every_case = pytest.mark.parametrize("options", CASES.values(), ids=CASES)


def target_of(options: dict) -> Tensor:
    return PROBABILITIES if "row_class" in options else TARGET


def loss_of(logits: Tensor, target: Tensor, options: dict) -> Tensor:
    return LF.auxiliary_cross_entropy(logits * 1, target, MAP, **options).square().sum()


@pytest.mark.parametrize(("mode", "lam"), MODES)
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_gradcheck(mode: str, lam: float, soft: bool) -> None:
    """Of the row losses and their log-sum-exp, to every argument that takes a gradient."""
    rows = [0, 4, 6]
    target = (PROBABILITIES if soft else TARGET)[rows]
    options = {"mode": mode, "neighbor_weight": lam, "reduction": "none", "return_lse": True, "label_smoothing": 0.1}
    options |= {"row_class": TARGET[rows]} if soft else {}
    if _ops.BACKEND == "reference":
        pytest.skip("about the kernels")

    def function(x: Tensor, a: Tensor, b: Tensor, m: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return LF.auxiliary_cross_entropy(
            x, target, MAP, logit_scale=a, logit_bias=b, target_margin=m, sample_weight=u, **options
        )

    leaves = [LOGITS[rows], *(randn(n, seed=n + k).exp() for k, n in enumerate((K, K, K, 3)))]
    assert torch.autograd.gradcheck(function, [x.clone().requires_grad_() for x in leaves])


@kernels_only
@every_case
def test_functional_gradients(options: dict) -> None:
    target = target_of(options)
    _, want = gradient(lambda x: loss_of(x, target, options), LOGITS)
    torch.testing.assert_close(grad(loss_of)(LOGITS, target, options), want)
    logits, targets = (
        torch.stack([LOGITS, -LOGITS, LOGITS / 2]),
        torch.stack([target, target.flip(0), target.roll(2, 0)]),
    )
    with kernels_run() as ran:
        got = vmap(lambda x, y: grad(loss_of)(x, y, options))(logits, targets)
    assert ran in ({"forward_gradient": 1}, {"forward": 1, "backward": 1})
    for b in range(3):
        torch.testing.assert_close(got[b], grad(loss_of)(logits[b], targets[b], options))


@kernels_only
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap_over_row_class(reduction: str) -> None:
    """Batched alone, together with the logits, or not at all: always one kernel call."""
    classes = torch.stack([TARGET, TARGET.flip(0), TARGET.roll(5)], 1)
    logits = torch.stack([LOGITS, -LOGITS, LOGITS / 2])

    def function(x: Tensor, k: Tensor) -> Tensor:
        return LF.auxiliary_cross_entropy(x, PROBABILITIES, MAP, mode="back", row_class=k, reduction=reduction)

    for x_dim, k_dim in ((None, 1), (0, 1), (0, None)):
        x, k = logits if x_dim == 0 else LOGITS, classes if k_dim == 1 else TARGET
        with kernels_run() as ran:
            got = vmap(function, in_dims=(x_dim, k_dim))(x, k)
        assert ran == {"forward": 1}
        want = [function(x[b] if x_dim == 0 else x, k[:, b] if k_dim == 1 else k) for b in range(3)]
        torch.testing.assert_close(got, torch.stack(want))
    with pytest.raises(IndexError, match="row_class"):
        vmap(lambda k: function(LOGITS, k))(classes.t() + 1)


@kernels_only
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_opcheck(soft: bool) -> None:
    ops, call = torch.ops.ltkernels, arguments(OFFSETS, CLASSES, soft=soft, back_from=C)
    torch.library.opcheck(ops.margin_softmax.default, (LOGITS.clone().requires_grad_(), *call[1:], True))
    torch.library.opcheck(ops.margin_softmax_fwd.default, (*call, True))
    loss, stats, _ = ops.margin_softmax_fwd(*call, False)
    torch.library.opcheck(ops.margin_softmax_bwd.default, (torch.ones_like(loss), None, stats, *call, 3))


# ------------------------------------------------------------------------------------------- compile, export, autocast


@kernels_only
@every_case
def test_compile(options: dict) -> None:
    """One graph for all numbers of rows, the kernels of the eager call, its numbers."""
    torch.compiler.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend=backend)
    settled = 0
    for rows in (12, 7, 3):
        part = {k: v[:rows].clone() if k in ("row_class", "sample_weight") else v for k, v in options.items()}
        target = target_of(options)[:rows].clone()  # no view: of that, the size of the whole would be a constant
        with kernels_run() as ran:
            got = gradient(lambda x, t=target, o=part: compiled(x, t, o), LOGITS[:rows])
        with kernels_run() as eager:
            want = gradient(lambda x, t=target, o=part: loss_of(x, t, o), LOGITS[:rows])
        assert ran == eager
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        settled = settled or len(graphs)
    assert len(graphs) == settled


@kernels_only
def test_compiled_call_checks_values() -> None:
    torch.compiler.reset()

    def function(x: Tensor, t: Tensor, k: Tensor) -> Tensor:
        return LF.auxiliary_cross_entropy(x, t, MAP, row_class=k)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(LOGITS, PROBABILITIES, TARGET), function(LOGITS, PROBABILITIES, TARGET))
    with pytest.raises(IndexError, match="row_class: expected class indices in .*got 9 at row 2"):
        compiled(LOGITS, PROBABILITIES, replaced(TARGET, 2, K))


class Exported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(4, K).double()
        self.neighbors = MAP

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        return LF.auxiliary_cross_entropy(
            self.classifier(features), target, self.neighbors, mode="back", reduction="none"
        )


@kernels_only
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export(strict: bool) -> None:
    module, rows = Exported(), torch.export.Dim("rows", min=2)
    shapes = {"features": {0: rows}, "target": {0: rows}}
    program = torch.export.export(module, (randn(5, 4), TARGET[:5]), dynamic_shapes=shapes, strict=strict)
    assert "ltkernels.margin_softmax.default" in program.graph_module.code
    for form in (program, program.run_decompositions()):
        features = randn(N, 4, seed=8)
        torch.testing.assert_close(form.module()(features, TARGET), module(features, TARGET))


@every_case
def test_autocast(options: dict) -> None:
    """bfloat16 logits of an autocast layer give a float32 loss: that of the same numbers without autocast."""
    layer, features = nn.Linear(4, K), randn(N, 4, dtype=torch.float32)
    options = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
    target = target_of(options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = layer(features)
        loss = LF.auxiliary_cross_entropy(logits, target, MAP, **options)
    loss.sum().backward()
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32 and layer.weight.grad.isfinite().all()
    assert same_bits(loss, LF.auxiliary_cross_entropy(logits, target, MAP, **options))


# ------------------------------------------------------------------------------------------------------------ backends

PROGRAM = """
import json, torch
from test_auxiliary_calls import CASES, LOGITS, gradient, loss_of, target_of
from ltkernels import _ops
from oracle import kernels_run
results = {}
with kernels_run() as ran:
    for name, options in CASES.items():
        value, grad = gradient(lambda x: loss_of(x, target_of(options), options), LOGITS)
        results[name] = [value.item(), *grad.flatten().tolist()]
print(json.dumps([results, ran]))
"""


@kernels_only
def test_reference_gives_the_same_numbers(run_python: Callable[..., str]) -> None:
    results, ran = json.loads(run_python("-c", PROGRAM, LTKERNELS_BACKEND="reference").splitlines()[-1])
    assert ran == {} and results.keys() == CASES.keys()
    for name, options in CASES.items():
        value, grad = gradient(lambda x, o=options: loss_of(x, target_of(o), o), LOGITS)
        want = torch.cat([value[None], grad.flatten()])
        torch.testing.assert_close(torch.tensor(results[name], dtype=torch.float64), want)


@kernels_only
def test_reference_gives_the_same_errors(run_python: Callable[..., str]) -> None:
    files = [str(Path(__file__).with_name(name)) for name in ("test_auxiliary_calls.py", "test_auxiliary.py")]
    chosen = "bad_call or (formula and kernel and prior) or ignored or dimensions or one_sample or integer"
    assert " passed" in run_python("-m", "pytest", "-q", "-k", chosen, *files, LTKERNELS_BACKEND="reference")
