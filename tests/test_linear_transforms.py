"""The linear form under torch.func, compile, export, fake tensors and autocast, and without kernels."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import kernels_run
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacrev, vmap

import ltkernels.functional as LF
from ltkernels.neighbors import NeighborMap

N, D, C = 6, 4, 9
ops = torch.ops.ltkernels
Arguments = tuple[Tensor, Tensor, Tensor]


def make(*batch: int, seed: int = 0, rows: int = N) -> Arguments:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, rows, D, generator=generator, dtype=torch.float64)
    w = torch.randn(C, D, generator=generator, dtype=torch.float64)
    return x, w, torch.randint(C, (*batch, rows), generator=generator)


def rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def linear(x: Tensor, w: Tensor, y: Tensor, **options: object) -> Tensor | tuple:
    """The tested function, in several chunks."""
    return LF.linear_margin_cross_entropy(x, w, y, **{"chunk_size": 4} | options)


def composed(x: Tensor, w: Tensor, y: Tensor, *, cosine: bool = False, **options: object) -> Tensor | tuple:
    """The same from a function with tests of its own."""
    bias = options.pop("linear_bias", None)
    x, w = (F.normalize(x, dim=-1), F.normalize(w, dim=-1)) if cosine else (x, w)
    return LF.margin_cross_entropy(F.linear(x, w, bias), y, **options)


# name: (options, which of them require grad, kernels of one forward and backward over two chunks)
PRECOMPUTED, RECOMPUTED = {"forward_gradient": 2}, {"forward": 2, "backward": 2}
CASES: dict[str, tuple[dict, tuple[str, ...], dict]] = {
    "plain": ({}, (), PRECOMPUTED),
    "cosine": ({"cosine": True, "scale": 8.0, "target_margin": rand(C), "logit_bias": rand(C)}, (), PRECOMPUTED),
    "linear_bias": ({"linear_bias": rand(C), "mask": torch.arange(C) != 4}, ("linear_bias",), PRECOMPUTED),
    "learned": ({"logit_scale": rand(C), "cosine": True, "scale": rand()}, ("logit_scale", "scale"), RECOMPUTED),
    "pairwise": ({"pairwise_margin": rand(C, C)}, ("pairwise_margin",), RECOMPUTED),
    "sample_weight": ({"sample_weight": rand(N), "label_smoothing": 0.1}, ("sample_weight",), RECOMPUTED),
    "rows": ({"reduction": "none"}, (), RECOMPUTED),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def value_and_gradients(function: Callable, case: tuple, arguments: Arguments | None = None) -> list[Tensor]:
    options, names, _ = case
    x, w, y = make() if arguments is None else arguments
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    leaves += [options[name].clone().requires_grad_() for name in names]
    value = function(*leaves[:2], y, options | dict(zip(names, leaves[2:], strict=True)))
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def model(x: Tensor, w: Tensor, y: Tensor, options: dict) -> Tensor:
    loss, lse, stats = linear(x.tanh(), w, y, return_lse=True, return_stats=True, **options)
    return loss.square().sum() + 0 * lse.detach().sum() + stats.row_loss.sum() + stats.correct.sum()


def loss_model(x: Tensor, w: Tensor, y: Tensor, options: dict) -> Tensor:
    return linear(x.tanh(), w, y, **options).square().sum()


# ----------------------------------------------------------------------------------------------------- compile, export


@every_case
def test_compile(case: tuple) -> None:
    """One graph, the kernels of the eager call, its numbers."""
    torch.compiler.reset()
    compiled = torch.compile(loss_model, fullgraph=True, backend="aot_eager")
    value_and_gradients(compiled, case)
    with kernels_run() as ran:
        got = value_and_gradients(compiled, case)
    assert ran == case[2]
    torch.testing.assert_close(got, value_and_gradients(loss_model, case), rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cosine", "learned"])
def test_compile_with_inductor(name: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(value_and_gradients(compiled, CASES[name]), value_and_gradients(model, CASES[name]))


@pytest.mark.parametrize("function", [loss_model, model], ids=["loss", "statistics"])
@pytest.mark.parametrize("cosine", [False, True], ids=["linear", "cosine"])
def test_dynamic_shapes_compile_once(cosine: bool, function: Callable) -> None:
    """New numbers of rows and classes must not compile again; torch traces the first call twice."""
    torch.compiler.reset()
    graphs, settled = [], 0

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=True)
    case = ({"cosine": cosine}, (), {})
    for rows, classes in ((5, 7), (6, 8), (30, 100), (3, 9), (17, 2)):
        arguments = rand(rows, D), rand(classes, D, seed=2) - 1, torch.arange(rows) % classes
        got = value_and_gradients(compiled, case, arguments)
        torch.testing.assert_close(got, value_and_gradients(function, case, arguments))
        settled = settled or len(graphs)
    assert len(graphs) == settled <= 2


def test_compiled_call_checks_values() -> None:
    torch.compiler.reset()
    compiled = torch.compile(loss_model, fullgraph=True, backend="aot_eager")
    x, w, y = make()
    compiled(x, w, y, {})
    y[5] = C
    with pytest.raises(IndexError, match=f"target: expected class indices in .*got {C} at row 5"):
        compiled(x, w, y, {})


class Exported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(make()[1])

    def forward(self, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        loss, stats = linear(features, self.weight, target, reduction="none", cosine=True, return_stats=True)
        return loss, stats.correct


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export(strict: bool) -> None:
    module, rows = Exported(), torch.export.Dim("rows", min=2)
    shapes = {"features": {0: rows}, "target": {0: rows}}
    program = torch.export.export(module, make()[::2], dynamic_shapes=shapes, strict=strict)
    assert "ltkernels.linear_margin_softmax.default" in program.graph_module.code
    x, _, y = make(rows=13, seed=3)
    for form in (program, program.run_decompositions()):
        torch.testing.assert_close(form.module()(x, y), module(x, y))


# ---------------------------------------------------------------------------------------------------------- torch.func


@every_case
def test_functional_gradients(case: tuple) -> None:
    options, _, _ = case
    x, w, y = make()
    for argument in (0, 1):
        got = grad(lambda *a: linear(*a, y, **options).sum(), argument)(x, w)
        torch.testing.assert_close(got, grad(lambda *a: composed(*a, y, **options).sum(), argument)(x, w))
    if options.get("reduction") == "none":
        torch.testing.assert_close(
            jacrev(lambda x: linear(x, w, y, **options))(x), jacrev(lambda x: composed(x, w, y, **options))(x)
        )
    with pytest.raises(RuntimeError, match="can be differentiated once only|forward-mode"):
        hessian(lambda x: linear(x, w, y, **options).sum())(x)


@every_case
@pytest.mark.parametrize("shared", ["nothing", "classifier", "features"])
def test_vmap(case: tuple, shared: str) -> None:
    """A call a problem, and right; gradients inside and outside."""
    options, _, _ = case
    x, w, y = make(3)
    if shared != "classifier":
        w = torch.stack([w, w.flip(0), 2 * w])
    dims = (None if shared == "features" else 0, None if shared == "classifier" else 0, 0)
    x = x[0] if shared == "features" else x

    def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return linear(x, w, y, **options).sum()

    def looped(function: Callable) -> list:
        return [function(*(a if d is None else a[b] for a, d in zip((x, w, y), dims, strict=True))) for b in range(3)]

    torch.testing.assert_close(vmap(loss, dims)(x, w, y), torch.stack(looped(loss)))
    each = vmap(grad(loss, (0, 1)), dims)(x, w, y)
    want = [torch.stack(g) for g in zip(*looped(grad(loss, (0, 1))), strict=True)]
    torch.testing.assert_close(list(each), want)
    total = grad(lambda x, w: vmap(loss, dims)(x, w, y).sum(), (0, 1))(x, w)
    want = [g.sum(0) if d is None else g for g, d in zip(want, dims, strict=False)]
    torch.testing.assert_close(list(total), want)


def test_per_sample_gradients_of_a_module() -> None:
    module = Exported()
    x, _, y = make()

    def loss(parameters: dict, x: Tensor, y: Tensor) -> Tensor:
        return functional_call(module, parameters, (x[None], y[None]))[0].sum()

    parameters = dict(module.named_parameters())
    got = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)["weight"]
    torch.testing.assert_close(got, torch.stack([grad(loss)(parameters, x[i], y[i])["weight"] for i in range(N)]))


@every_case
def test_batched_gradients(case: tuple) -> None:
    """is_grads_batched runs the backward pass under vmap."""
    options, names, _ = case
    x, w, y = make()
    values = {name: options[name].clone().requires_grad_() for name in names}
    leaves = [x.requires_grad_(), w.requires_grad_(), *values.values()]
    loss = linear(x, w, y, **options | values)
    upstream = torch.stack([torch.zeros_like(loss), torch.ones_like(loss), 3 * torch.ones_like(loss)])
    got = torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True, retain_graph=True)
    for g, want in zip(got, torch.autograd.grad(loss, leaves, torch.ones_like(loss)), strict=True):
        torch.testing.assert_close(g, torch.stack([0 * want, want, 3 * want]))


# ------------------------------------------------------------------------------------------------- fake tensors, checks


NEIGHBORS = NeighborMap.from_pairs([(0, 5), (1, 5), (2, 7)], num_classes=5, num_auxiliary=C - 5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("samples", [(N,), (), (2, 3), (0,)], ids=str)
def test_fake_and_meta_tensors(samples: tuple, dtype: torch.dtype, reduction: str) -> None:
    """Shapes and dtypes of outputs and gradients without running anything."""

    def results(convert: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x, w = (convert(torch.ones(*s, D, dtype=dtype)).requires_grad_() for s in (samples, (C,)))
        y = convert(torch.zeros(samples, dtype=torch.long))
        loss, lse, stats = linear(x, w, y, reduction=reduction, return_lse=True, return_stats=True)
        scalar = linear(x, w, y, reduction="sum", linear_bias=convert(torch.ones(C)))
        return [loss, lse, *stats, scalar, *torch.autograd.grad(loss.sum() + scalar, (x, w))]

    real = results(torch.Tensor.clone)
    with kernels_run() as ran:
        with FakeTensorMode() as mode:
            fake = results(mode.from_tensor)
        meta = results(lambda x: x.to("meta"))
    assert not ran
    for got in (fake, meta):
        assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in real]


OPTIONS = "weight logit_scale logit_bias target_margin pairwise_margin mask sample_weight row_class".split()


def operator_arguments(options: dict, names: tuple[str, ...], reduction: int, neighbors: bool = False) -> tuple:
    """input ... label_smoothing of the operators."""
    x, w, y = make()
    values = options | {name: options[name].clone().requires_grad_() for name in names}
    if names or not neighbors:
        x, w = x.requires_grad_(), w.requires_grad_()
    offsets, classes, back_from = NEIGHBORS.rows("plain") if neighbors else (None, None, -1)
    numbers = (2.0, 0.0 if neighbors else 1.0, back_from, reduction, -100, 0.1)
    bias = values.get("linear_bias")
    tensors = tuple(values.get(name) for name in OPTIONS)
    return (x, w, bias, options.get("cosine", False), 4, y, *tensors, offsets, classes, *numbers)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "learned_scale"])
def test_opcheck(name: str) -> None:
    """torch's own checks of schema, autograd registration, fake kernels and compilation, for every operator."""
    options, names, _ = CASES[name]
    options = {key: x for key, x in options.items() if key != "scale"}
    names = tuple(key for key in names if key != "scale")
    reduction = {"plain": 1, "rows": 0}.get(name, 2)
    arguments = operator_arguments(options, names, reduction, neighbors=name == "plain")
    torch.library.opcheck(ops.linear_margin_softmax.default, (*arguments, name == "rows", 5))
    fixed = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    gradients = 7 if "linear_bias" in names else 3
    torch.library.opcheck(ops.linear_margin_softmax_fwd.default, (*fixed, 0, gradients))
    torch.library.opcheck(ops.linear_margin_softmax_fwd.default, (*fixed, C, 0))
    loss, stats, *_ = ops.linear_margin_softmax_fwd(*fixed, 0, 0)
    for lse, wanted in ((None, gradients), (torch.ones_like(stats[0]), 8 + 16), (None, 1), (None, 2)):
        upstream = (torch.ones_like(loss), lse, stats)
        torch.library.opcheck(ops.linear_margin_softmax_bwd.default, (*upstream, *fixed, wanted))


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("neighbors", [False, True])
def test_opcheck_in_place(neighbors: bool, reduction: int) -> None:
    """The row operator that leaves the gradient where the logits were: the tensor it says it modifies."""
    x, w, _, _, _, *rest = operator_arguments({"logit_bias": rand(C)}, (), reduction, neighbors)
    logits = (x @ w.T).detach()
    torch.library.opcheck(ops.margin_softmax_fwd_.default, (logits.clone(), *rest))
    got = logits.clone()
    loss, stats = ops.margin_softmax_fwd_(got, *rest)
    want = ops.margin_softmax_fwd(logits, *rest, True)
    torch.testing.assert_close((loss, stats, got), want)


def test_in_place_rows_that_lie_apart() -> None:
    """What is between the rows of a wider matrix stays; rows in the same memory could not hold a gradient each."""
    x, w, _, _, _, *rest = operator_arguments({"logit_bias": rand(C)}, (), 1, False)
    logits = (x @ w.T).detach()
    wide = torch.full((len(logits), C + 9), 7.0, dtype=logits.dtype)
    got = wide[:, :C].copy_(logits)
    loss, stats = ops.margin_softmax_fwd_(got, *rest)
    torch.testing.assert_close((loss, stats, got), ops.margin_softmax_fwd(logits, *rest, True))
    assert wide[:, C:].eq(7).all()
    for bad in (logits[:1].expand_as(logits), logits.T.contiguous().T):
        with pytest.raises(ValueError, match="logits: expected rows of unit stride"):
            ops.margin_softmax_fwd_(bad, *rest)


# ------------------------------------------------------------------------------------------------------------ autocast


@pytest.mark.parametrize("options", [{}, {"linear_bias": rand(C).float()}, {"reduction": "none"}], ids=list)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype, options: dict) -> None:
    """As F.linear: bfloat16 logits, gradients in the dtype of the inputs; float64 stays float64."""
    x, w, y = make()
    results = []
    for function in (linear, composed):
        leaves = [t.to(dtype).detach().requires_grad_() for t in (x, w)]
        extra = {k: v.to(dtype) if k == "linear_bias" else v for k, v in options.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = function(*leaves, y, **extra)
        results.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
    tolerance = {} if dtype == torch.float64 else {"rtol": 0.016, "atol": 0.008}  # a bfloat16 rounded the other way
    torch.testing.assert_close(*results, **tolerance)


# ------------------------------------------------------------------------------------------------------------- backend

PROGRAM = """
import json, torch
import ltkernels.functional as LF
from ltkernels import _ops
from ltkernels.neighbors import NeighborMap

torch.manual_seed(0)
neighbors = NeighborMap.from_pairs([(0, 5), (1, 5), (2, 6)], num_classes=4, num_auxiliary=3)
numbers = []
for samples in ((9,), (), (3, 2)):
    x = torch.randn(*samples, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randint(6, samples)
    options = dict(
        weight=torch.rand(7), logit_scale=torch.rand(7) + 0.5, target_margin=torch.rand(7),
        sample_weight=torch.rand(samples), scale=torch.tensor(1.5, requires_grad=True), mask=torch.arange(7) != 6,
        label_smoothing=0.1, chunk_size=4, return_lse=True, return_stats=True,
    )
    for reduction in ("mean", "none"):
        for form in ({"cosine": True}, {"linear_bias": torch.randn(7, dtype=torch.float64)}):
            options |= {"reduction": reduction} | form
            for out in (
                LF.linear_margin_cross_entropy(x, w, y, **options),
                LF.linear_auxiliary_cross_entropy(x, w, y, neighbors, prior_counts=torch.arange(1, 8), **options),
            ):
                loss = out[0].sum() + out[1].sum()
                grads = torch.autograd.grad(loss, [x, w, options["scale"]])
                numbers += [v for t in (out[0], *out[2], *grads) for v in t.double().flatten().tolist()]
            options = {k: v for k, v in options.items() if k not in form}
print(json.dumps({"numbers": numbers, "calls": _ops.kernel_calls()}))
"""


def test_reference_gives_the_same_numbers(run_python: Callable[..., str]) -> None:
    kernel = json.loads(run_python("-c", PROGRAM, LTKERNELS_BACKEND="auto"))
    reference = json.loads(run_python("-c", PROGRAM, LTKERNELS_BACKEND="reference"))
    assert kernel["calls"] and reference["calls"] == {}
    torch.testing.assert_close(torch.tensor(kernel["numbers"]), torch.tensor(reference["numbers"]))
