"""torch.compile, export, fake tensors, autocast: the same numbers from the same kernels, no fallback."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import definition, kernels_run, public
from problems import FEATURES, covering_set, describe, make_problem, possible
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import ltkernels.functional as LF
from ltkernels import _ops

N, C = 6, 9


def make(*batch: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*batch, N, C, generator=generator, dtype=torch.float64).to(dtype)
    return logits, torch.randint(C, (*batch, N), generator=generator)


def rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def mean_loss(logits: Tensor, target: Tensor, **options: object) -> Tensor:
    return LF.margin_cross_entropy(logits, target, **options)


VECTORS = {"logit_scale": rand(C), "logit_bias": rand(C, seed=2), "target_margin": rand(C, seed=3)}
MASK = torch.arange(C) != 4
# name: (options, which of them require grad, kernels of one forward and backward)
PRECOMPUTED, RECOMPUTED = {"forward_gradient": 1}, {"forward": 1, "backward": 1}
CASES: dict[str, tuple[dict, tuple[str, ...], dict]] = {
    "plain": ({}, (), PRECOMPUTED),
    "vectors": (VECTORS | {"scale": 2.0, "weight": rand(C)}, (), PRECOMPUTED),
    "learned_vectors": (VECTORS, tuple(VECTORS), RECOMPUTED),
    "learned_scale": ({"scale": rand(), "target_margin": rand(C)}, ("scale",), RECOMPUTED),
    "pairwise": ({"pairwise_margin": rand(C, C)}, ("pairwise_margin",), RECOMPUTED),
    "sample_weight": ({"sample_weight": rand(N)}, ("sample_weight",), PRECOMPUTED),
    "rows": ({"reduction": "none", "mask": MASK}, (), RECOMPUTED),
    "z_loss": ({"return_lse": True, "label_smoothing": 0.1}, (), RECOMPUTED),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def total(outputs: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return outputs.square().sum() if isinstance(outputs, Tensor) else outputs[0] + outputs[1].square().sum()


def value_and_gradients(function: Callable, case: tuple) -> list[Tensor]:
    options, learned, _ = case
    logits, target = make()
    leaves = [logits.requires_grad_()]
    for name in learned:
        leaves.append(options[name].clone().requires_grad_())
    value = function(logits, target, options | dict(zip(learned, leaves[1:], strict=True)))
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def model(logits: Tensor, target: Tensor, options: dict) -> Tensor:
    return total(LF.margin_cross_entropy(logits * 2, target, **options))


# ------------------------------------------------------------------------------------------------------------- compile


@every_case
def test_compile(case: tuple) -> None:
    """One graph, the kernels of the eager call, its numbers."""
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    value_and_gradients(compiled, case)
    with kernels_run() as ran:
        got = value_and_gradients(compiled, case)
    assert ran == case[2]
    torch.testing.assert_close(got, value_and_gradients(model, case), rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vectors", "learned_vectors"])
def test_compile_with_inductor(name: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    value_and_gradients(compiled, CASES[name])
    with kernels_run() as ran:
        got = value_and_gradients(compiled, CASES[name])
    assert ran == CASES[name][2]
    torch.testing.assert_close(got, value_and_gradients(model, CASES[name]), rtol=1e-12, atol=1e-14)


def test_compile_other_input_forms() -> None:
    torch.compiler.reset()
    compiled = torch.compile(mean_loss, fullgraph=True, backend="aot_eager")
    logits, target = make(2)
    for x, y in ((logits.transpose(1, 2), target), (logits[0, 0], target[0, 0])):
        torch.testing.assert_close(compiled(x, y), F.cross_entropy(x, y))


class Counter:
    """A compiler backend that counts graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        self.graphs += 1
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)


SIZES = [(5, 7), (6, 8), (30, 100), (4, 3), (17, 2)]


def step(function: Callable, rows: int, classes: int, mark: bool) -> None:
    logits, target = torch.randn(rows, classes, dtype=torch.float64), torch.zeros(rows, dtype=torch.long)
    bias = torch.randn(classes, dtype=torch.float64)
    if mark:
        for x, dim in ((logits, 0), (logits, 1), (target, 0), (bias, 0)):
            torch._dynamo.mark_dynamic(x, dim)
    loss = function(logits.requires_grad_(), target, logit_bias=bias)
    (got,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(got, torch.autograd.grad(definition(logits, target, logit_bias=bias), logits)[0])


@pytest.mark.parametrize("how", ["dynamic", "marked", "automatic"])
def test_dynamic_shapes_compile_once(how: str) -> None:
    """New numbers of rows and classes must not compile again. "automatic" sees that both vary at the second size."""
    torch.compiler.reset()
    counter = Counter()
    dynamic = True if how == "dynamic" else None
    compiled = torch.compile(mean_loss, fullgraph=True, backend=counter, dynamic=dynamic)
    settled = 0
    for count, (rows, classes) in enumerate(SIZES):
        step(compiled, rows, classes, mark=how == "marked")
        if count == (1 if how == "automatic" else 0):
            settled = counter.graphs
    assert counter.graphs == settled <= 3


def test_compiled_call_checks_values() -> None:
    torch.compiler.reset()
    compiled = torch.compile(mean_loss, fullgraph=True, backend="aot_eager")
    logits, target = make()
    compiled(logits, target)
    target[2] = C
    with pytest.raises(IndexError, match=f"target: expected class indices in .*got {C} at row 2"):
        compiled(logits, target)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (
            "eager",
            "^ltkernels: margin_cross_entropy can be differentiated once only; .*BACKEND=reference computes them",
        ),
        # torch's own, before ours; in the words of torch 2.13, and of 2.11.
        ("aot_eager", "aot_autograd does not currently support double backward|does not require grad"),
    ],
)
def test_compiled_gradient_penalty_raises(backend: str, message: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(mean_loss, fullgraph=True, backend=backend)
    logits, target = make()
    (gradient,) = torch.autograd.grad(compiled(logits.requires_grad_(), target), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=message):
        gradient.square().sum().backward()


# -------------------------------------------------------------------------------------------------------------- export


class Exported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(4, C).double()
        self.register_buffer("bias", rand(C))

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        return LF.margin_cross_entropy(self.classifier(features), target, logit_bias=self.bias, reduction="none")


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export(strict: bool) -> None:
    """The exported program holds the operator, runs at another batch size, and survives decomposition."""
    module, rows = Exported(), torch.export.Dim("rows", min=2)
    shapes = {"features": {0: rows}, "target": {0: rows}}
    example = (rand(5, 4), torch.arange(5))
    program = torch.export.export(module, example, dynamic_shapes=shapes, strict=strict)
    assert "ltkernels.margin_softmax.default" in program.graph_module.code
    features, target = rand(12, 4, seed=7), torch.arange(12) % C
    for form in (program, program.run_decompositions()):
        with kernels_run() as ran:
            got = form.module()(features, target)
        assert ran == {"forward": 1}
        torch.testing.assert_close(got, module(features, target))


# --------------------------------------------------------------------------------------------------- fake tensors, meta


FAKE = FEATURES | {"rows": (0, 1, 4), "classes": (1, 5), "content": ("normal",)}


@pytest.mark.parametrize("features", covering_set(FAKE), ids=describe)
def test_fake_tensors_have_the_real_shapes(features: dict) -> None:
    """Shapes, dtypes and devices of outputs and gradients without running anything; on meta tensors too."""
    problem = make_problem(features)
    real = public(problem.logits, problem.target, **problem.options)
    with FakeTensorMode(allow_non_fake_inputs="neighbors" in problem.options) as mode, kernels_run() as ran:
        fake = call_on(mode.from_tensor, problem)
    meta = call_on(lambda x: x.to("meta"), problem)
    assert not ran
    for got in (fake, meta):
        for a, b in zip(as_tuple(got[0]), as_tuple(real), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if "logits" in problem.requires_grad:
            assert (got[1].shape, got[1].dtype) == (problem.logits.shape, problem.logits.dtype)


def call_on(convert: Callable[[Tensor], Tensor], problem) -> tuple:
    options = {name: convert(x) if isinstance(x, Tensor) else x for name, x in problem.options.items()}
    logits = convert(problem.logits).detach().requires_grad_("logits" in problem.requires_grad)
    if "neighbors" in options:
        options["neighbors"] = options["neighbors"].to(logits.device)
    outputs = public(logits, convert(problem.target), **options)
    gradient = torch.autograd.grad(as_tuple(outputs)[0].sum(), logits)[0] if logits.requires_grad else None
    return outputs, gradient


def as_tuple(x: Tensor | tuple) -> tuple:
    return x if isinstance(x, tuple) else (x,)


# ------------------------------------------------------------------------------------------------------------- opcheck


OPCHECK = FEATURES | {
    "rows": (2, 5),
    "classes": (1, 7),
    "dtype": (torch.float32, torch.float64, torch.bfloat16),
    "layout": ("contiguous", "transposed"),
    "content": ("normal",),
    "target": ("int64", "int32", "ignored", "probabilities"),
    "affine": ("no_affine", "scale_bias", "scalar"),
    "smoothing": (0.0, 0.1),
}
ORDER = "weight logit_scale logit_bias target_margin pairwise_margin mask sample_weight".split()
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def operator_arguments(features: dict, requires_grad: bool) -> tuple:
    problem = make_problem(features)
    options = dict(problem.options)
    if requires_grad:
        for name in problem.requires_grad:
            (problem.logits if name == "logits" else options[name]).requires_grad_()
    tensors = [options.get(name) for name in ORDER]
    neighbors, row_class = options.get("neighbors"), options.get("row_class")
    offsets, classes, back_from = (None, None, -1) if neighbors is None else neighbors.rows(options["mode"])
    numbers = (options["scale"], options.get("neighbor_weight", 1.0), back_from)
    numbers += (REDUCTIONS[options["reduction"]], -100, options["label_smoothing"])
    return (problem.logits, problem.target, *tensors, row_class, offsets, classes, *numbers)


def has_results(features: dict) -> bool:
    """Without NaN, which opcheck takes for a difference: a mask may remove the only class."""
    return possible(features) and (features.get("classes") != 1 or features.get("mask", "no_mask") == "no_mask")


@pytest.mark.slow
@pytest.mark.parametrize("features", covering_set(OPCHECK, has_results), ids=describe)
def test_opcheck(features: dict) -> None:
    """torch's own checks of schema, autograd registration, fake kernels and compilation, for every operator."""
    ops = torch.ops.ltkernels
    arguments = operator_arguments(features, requires_grad=True)
    torch.library.opcheck(ops.margin_softmax.default, (*arguments, features["lse"] == "lse"))
    arguments = operator_arguments(features, requires_grad=False)
    for with_grad in (False, True):
        torch.library.opcheck(ops.margin_softmax_fwd.default, (*arguments, with_grad))
    logits = arguments[0].contiguous()  # whose rows are to be written to
    torch.library.opcheck(ops.margin_softmax_fwd_.default, (logits, *arguments[1:]))
    loss, stats, _ = ops.margin_softmax_fwd(*arguments, False)
    grads = 3 if arguments[1].is_floating_point() else 7
    lse = torch.ones_like(stats[0]) if features["lse"] == "lse" else None
    torch.library.opcheck(ops.margin_softmax_bwd.default, (torch.ones_like(loss), lse, stats, *arguments, grads))


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_opcheck_scale(factor: float) -> None:
    arguments = (torch.randn(4, 5), torch.tensor(factor))
    torch.library.opcheck(torch.ops.ltkernels.margin_softmax_scale_.default, arguments)


# ------------------------------------------------------------------------------------------------------------ autocast


@pytest.mark.parametrize("name", ["plain", "learned_vectors"])
def test_autocast(name: str) -> None:
    """bfloat16 logits of an autocast layer give a float32 loss and bfloat16 gradients."""
    options, learned, kernels = CASES[name]
    torch.manual_seed(0)
    layer, features, target = nn.Linear(4, C), torch.randn(N, 4), torch.arange(N)
    options = {
        key: x.float().requires_grad_(key in learned) if isinstance(x, Tensor) else x for key, x in options.items()
    }
    with torch.autocast("cpu", dtype=torch.bfloat16), kernels_run() as ran:
        logits = layer(features)
        loss = LF.margin_cross_entropy(logits, target, **options)
        loss.backward()
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32 and ran == kernels
    got = layer.weight.grad.clone()
    layer.weight.grad = None
    definition(layer(features), target, **options).backward()
    torch.testing.assert_close(got, layer.weight.grad, rtol=0.02, atol=2e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact = LF.margin_cross_entropy(*make(dtype=torch.float32))
    assert torch.equal(exact, LF.margin_cross_entropy(*make(dtype=torch.float32)))


# ------------------------------------------------------------------------------------------------------ batched, names


@every_case
def test_batched_gradients(case: tuple) -> None:
    """is_grads_batched runs the backward pass under vmap."""
    options, learned, _ = case
    logits, target = make()
    leaves = [logits.requires_grad_(), *(options[name].clone().requires_grad_() for name in learned)]
    loss = as_tuple(LF.margin_cross_entropy(logits, target, **options | dict(zip(learned, leaves[1:], strict=True))))
    upstream = [torch.stack([torch.zeros_like(x), torch.ones_like(x), 3 * torch.ones_like(x)]) for x in loss]
    got = torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True, retain_graph=True)
    want = torch.autograd.grad(loss, leaves, [torch.ones_like(x) for x in loss])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, torch.stack([0 * w, w, 3 * w]))


def test_which_kernels_there_are() -> None:
    """Names are public to `ltkernels doctor`: backend, instruction set, operation, pass."""
    variant = torch.ops.ltkernels.cpu_capability().lower()
    names = {f"cpu.{variant}.margin_softmax.{name}" for name in ("forward", "forward_gradient", "backward")}
    assert names <= _ops.kernel_calls().keys()
