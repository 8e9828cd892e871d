"""The contrastive loss under gradcheck, compile, export, torch.func, fake tensors, autocast, and used twice."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from contrastive_oracle import KERNEL, Case, definition, evaluate, public
from contrastive_problems import COMPLETE, FEATURES, make_case
from oracle import kernels_run
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

import ltkernels.functional as LF

pytestmark = pytest.mark.usefixtures("one_thread")
needs_kernel = pytest.mark.skipif(not KERNEL, reason="only a kernel has operators")

FLOAT64 = COMPLETE | {"rows": 9, "width": 3, "dtype": torch.float64}
# name: features that differ; together they have every argument.
CASES: dict[str, dict] = {
    "plain": {},
    "vectors": {"temperature": "vector", "sample_weight": "weight", "key_bias": "bias", "pair_margin": True},
    "queue": {"keys": "more", "positives": "extra", "temperature": "scalar", "reduction": "sum", "key_bias": "bias"},
    "own": {"denominator": "own", "keys": "more", "positives": "labels_extra", "reduction": "none", "scaled": True},
    "negatives": {"denominator": "negatives", "allowed": "pairs", "positives": "unlabelled", "temperature": "vector"},
    "index": {"positives": "index", "temperature": "vector", "scaled": True, "normalize": True},
    "normalizer": {"denominator": "normalizer", "positives": "labels_extra"},
}
every_case = pytest.mark.parametrize("case", [make_case(FLOAT64 | x) for x in CASES.values()], ids=list(CASES))
LOGSUMEXP = {"exclude": "same_label", "temperature": "vector", "key_bias": "bias"}


def total(arguments: dict) -> dict:
    """A loss, in a graph of its own before and behind it."""
    loss = LF.contrastive_loss(**arguments | {"query": arguments["query"].tanh()})
    return {"loss": loss.square().sum()}


def scalar(case: Case) -> Case:
    return Case(case.arguments, case.requires_grad, 1.5)


def close(got: object, want: object) -> None:
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", [name for name in CASES if name != "normalizer"])  # whose weights are constants
def test_gradcheck(name: str) -> None:
    case = make_case(FLOAT64 | CASES[name])
    leaves = [case.arguments[name].detach().clone().requires_grad_() for name in case.requires_grad]

    def loss(*x: Tensor) -> Tensor:
        return LF.contrastive_loss(**case.arguments | dict(zip(case.requires_grad, x, strict=True)))

    torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("exclude", ["self", None, "same_label", "different_label"])
def test_gradcheck_of_logsumexp(exclude: str | None) -> None:
    leaves = torch.randn(6, 3), torch.rand(6) + 0.5, torch.randn(6)
    leaves = [x.detach().double().requires_grad_() for x in leaves]
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    torch.autograd.gradcheck(
        lambda z, tau, bias: LF.similarity_logsumexp(
            z, temperature=tau, key_bias=bias, exclude=exclude, labels=y if exclude and "label" in exclude else None
        ),
        leaves,
    )


@needs_kernel
@every_case
def test_second_derivative_says_so(case: Case) -> None:
    """An error, not a gradient penalty that silently has no second-order term."""
    leaves = [case.arguments[name].detach().clone().requires_grad_() for name in case.requires_grad]
    loss = LF.contrastive_loss(**case.arguments | dict(zip(case.requires_grad, leaves, strict=True)))
    grads = torch.autograd.grad(loss.sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once only"):
        torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)


def test_a_graph_is_used_again() -> None:
    """Twice with retain_graph: equal bits, nothing scaled in place. Without it: torch's error."""
    for features in CASES.values():
        case = make_case(FLOAT64 | features)
        leaves = [case.arguments[name].detach().clone().requires_grad_() for name in case.requires_grad]
        loss = LF.contrastive_loss(**case.arguments | dict(zip(case.requires_grad, leaves, strict=True)))
        once = torch.autograd.grad(3 * loss.sum(), leaves, retain_graph=True)
        twice = torch.autograd.grad(3 * loss.sum(), leaves, retain_graph=True)
        single = torch.autograd.grad(loss.sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
        close(list(once), [3 * g for g in single])
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss.sum(), leaves)


def test_changed_in_place_after_forward() -> None:
    """What the backward pass needs may not change before it: autograd's version check."""
    z = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    x = z * 1
    tau = torch.full((8,), 0.5, dtype=torch.float64, requires_grad=True)
    loss = LF.contrastive_loss(x, temperature=tau, labels=torch.arange(8) % 2, reduction="none")
    want = torch.autograd.grad(loss.sum(), z, retain_graph=True)[0]
    with torch.no_grad():
        x.mul_(2)
    try:
        got = torch.autograd.grad(loss.sum(), z)[0]
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        close(got, want)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradient(guard: Callable) -> None:
    for features in CASES.values():
        case = make_case(FLOAT64 | features)
        arguments = {n: x.clone().requires_grad_() if n in case.requires_grad else x for n, x in case.arguments.items()}
        with guard():
            got = public(arguments)
        assert not any(x.requires_grad for x in got.values())
        close(got, {name: x.detach() for name, x in public(arguments).items()})


def test_gradients_accumulate_in_leaves() -> None:
    """backward() of two losses over one tensor, and deep copies of a module that holds it."""

    class Prototypes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key = nn.Parameter(torch.randn(5, 4))

        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            return LF.contrastive_loss(z, self.key, temperature=0.5, labels=y, key_labels=torch.arange(5))

    module, z, y = Prototypes(), torch.randn(7, 4), torch.arange(7) % 5
    twin = copy.deepcopy(module)
    for _ in range(2):
        module(z, y).backward()
    twin(z, y).backward()
    torch.testing.assert_close(module.key.grad, 2 * twin.key.grad)


# ----------------------------------------------------------------------------------------------------- compile, export


@every_case
def test_compile(case: Case) -> None:
    """One graph, the kernels of the eager call, its numbers."""
    torch.compiler.reset()
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    evaluate(compiled, scalar(case))
    with kernels_run() as ran:
        got = evaluate(compiled, scalar(case))
    with kernels_run() as eager:
        want = evaluate(total, scalar(case))
    assert ran == eager and bool(ran) == KERNEL
    close(got, want)


def test_compile_with_statistics_and_logsumexp() -> None:
    torch.compiler.reset()
    case = make_case(FLOAT64 | CASES["own"])
    compiled = torch.compile(public, fullgraph=True, backend="aot_eager")
    close(evaluate(compiled, case), evaluate(public, case))
    rows = make_case(FLOAT64 | LOGSUMEXP)
    close(evaluate(compiled, rows), evaluate(public, rows))


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    torch.compiler.reset()
    case = scalar(make_case(FLOAT64 | CASES["vectors"]))
    close(evaluate(torch.compile(total, fullgraph=True), case), evaluate(total, case))


@pytest.mark.parametrize("keys", ["self", "more"])
def test_dynamic_shapes_compile_once(keys: str) -> None:
    """New numbers of rows and keys must not compile again; torch traces the first call twice."""
    torch.compiler.reset()
    graphs, settled = [], 0

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    compiled = torch.compile(total, fullgraph=True, backend=backend, dynamic=True)
    for rows in (9, 6, 70, 31, 12):
        features = {"rows": rows, "keys": keys, "temperature": "vector", "key_bias": "bias", "sample_weight": "weight"}
        case = scalar(make_case(FLOAT64 | features))
        close(evaluate(compiled, case), evaluate(total, case))
        settled = settled or len(graphs)
    assert len(graphs) == settled <= 2


class Exported(nn.Module):
    def __init__(self, two_sided: bool) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.randn(5, 4)) if two_sided else None

    def forward(self, z: Tensor, tau: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        sides = {} if self.key is None else {"key": self.key, "key_labels": torch.arange(5)}
        loss, stats = LF.contrastive_loss(z, temperature=tau, labels=y, normalize=True, return_stats=True, **sides)
        return loss, stats.logsumexp


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
@pytest.mark.parametrize("two_sided", [False, True], ids=["self", "two_sided"])
def test_export(two_sided: bool, strict: bool) -> None:
    module, rows = Exported(two_sided), torch.export.Dim("rows", min=2)

    def example(count: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(count, 4), torch.rand(count) + 0.1, torch.arange(count) % 3

    shapes = {name: {0: rows} for name in ("z", "tau", "y")}
    program = torch.export.export(module, example(6), dynamic_shapes=shapes, strict=strict)
    if KERNEL:
        assert "ltkernels.contrastive.default" in program.graph_module.code
    more = example(13)
    for form in (program, program.run_decompositions()):
        torch.testing.assert_close(form.module()(*more), module(*more))


# ---------------------------------------------------------------------------------------------------------- torch.func


@every_case
def test_functional_gradients(case: Case) -> None:
    names = case.requires_grad

    def loss(function: Callable) -> Callable:
        return lambda *x: function(case.arguments | dict(zip(names, x, strict=True)))["loss"].sum()

    leaves, wanted = [case.arguments[name] for name in names], tuple(range(len(names)))
    close(grad(loss(public), wanted)(*leaves), grad(loss(definition), wanted)(*leaves))


@pytest.mark.parametrize("name", ["plain", "own"])
def test_jacobian_of_rows(name: str) -> None:
    """Batched upstream gradients: jacrev, and autograd's is_grads_batched."""
    case = make_case(FLOAT64 | CASES[name] | {"reduction": "none"})

    def rows(function: Callable) -> Callable:
        return lambda z: function(case.arguments | {"query": z})["loss"]

    z = case.arguments["query"]
    want = torch.autograd.functional.jacobian(rows(definition), z)
    close(jacrev(rows(public))(z), want)
    z = z.clone().requires_grad_()
    (batched,) = torch.autograd.grad(rows(public)(z), z, torch.eye(9, dtype=torch.float64), is_grads_batched=True)
    close(batched, want)


@every_case
@pytest.mark.parametrize("batched", ["query", "vectors", "everything"])
def test_vmap(case: Case, batched: str) -> None:
    """One problem after the other, and right; gradients inside and outside."""
    names = [name for name, x in case.arguments.items() if isinstance(x, Tensor)]
    names = {"query": ["query"], "vectors": names[1:], "everything": names}[batched]

    def other(name: str) -> Tensor:
        x = case.arguments[name]
        return x if name == "positive_index" else x.roll(1, 0) if x.dim() else 2 * x

    batch = [torch.stack([case.arguments[name], other(name)]) for name in names]

    def loss(*x: Tensor) -> Tensor:
        return LF.contrastive_loss(**case.arguments | dict(zip(names, x, strict=True))).sum()

    looped = torch.stack([loss(*(x[i] for x in batch)) for i in range(2)])
    close(vmap(loss)(*batch), looped)
    floating = tuple(i for i, x in enumerate(batch) if x.is_floating_point() and names[i] in case.requires_grad)
    if floating:
        got = vmap(grad(loss, floating))(*batch)
        each = [grad(loss, floating)(*(x[i] for x in batch)) for i in range(2)]
        close(list(got), [torch.stack(g) for g in zip(*each, strict=True)])
        outside = grad(lambda *x: vmap(loss)(*x).sum(), floating)(*batch)
        close(list(outside), list(got))


def test_functional_call_of_a_module() -> None:
    module, z, tau, y = Exported(True), torch.randn(6, 4), torch.full((6,), 0.5), torch.arange(6) % 3

    def loss(parameters: dict) -> Tensor:
        return functional_call(module, parameters, (z, tau, y))[0]

    got = grad(loss)(dict(module.named_parameters()))["key"]
    module(z, tau, y)[0].backward()
    torch.testing.assert_close(got, module.key.grad)


# ------------------------------------------------------------------------------------------------- fake tensors, checks


@pytest.mark.parametrize("dtype", FEATURES["dtype"], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_fake_and_meta_tensors(name: str, dtype: torch.dtype) -> None:
    """Shapes and dtypes of outputs and gradients without running anything."""
    case = make_case(FLOAT64 | CASES[name] | {"dtype": dtype})

    def results(convert: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        arguments = {n: convert(x) if isinstance(x, Tensor) else x for n, x in case.arguments.items()}
        return evaluate(public, Case(arguments, case.requires_grad, convert(case.upstream)))

    real = results(torch.Tensor.clone)
    with kernels_run() as ran:
        with FakeTensorMode() as mode:
            fake = results(mode.from_tensor)
        meta = results(lambda x: x.to("meta"))
    assert not ran
    for got in (fake, meta):
        assert {n: (x.shape, x.dtype) for n, x in got.items()} == {n: (x.shape, x.dtype) for n, x in real.items()}


REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
TENSORS = (
    "query", "key", "temperature", "labels", "key_labels", "positive_index", "allowed", "key_bias", "pair_margin",
    "sample_weight", "log_normalizer", "extra_positive",
)  # fmt: skip


def operator_arguments(case: Case, learned: bool) -> tuple:
    given = dict(case.arguments)
    given["temperature"] = (
        torch.as_tensor(given["temperature"], dtype=torch.float64).expand(len(given["query"])).clone()
    )
    if learned:
        given |= {name: given[name].detach().clone().requires_grad_() for name in case.requires_grad}
    denominator = {"all": 0, "own": 1, "negatives": 2}[given["denominator"]]
    tail = denominator, True, given["scale_by_temperature"], REDUCTIONS[given["reduction"]]
    return (*(given.get(name) for name in TENSORS), *tail)


@needs_kernel
@pytest.mark.slow
@pytest.mark.parametrize("name", ["vectors", "queue", "own", "normalizer"])
def test_opcheck(name: str) -> None:
    """torch's own checks of schema, autograd registration, fake kernels and compilation, for every operator."""
    case = make_case(FLOAT64 | CASES[name])
    operators = torch.ops.ltkernels
    torch.library.opcheck(operators.contrastive.default, (*operator_arguments(case, True), True))
    fixed = operator_arguments(case, False)
    for wanted in (0, 64 + 1 + 4):
        torch.library.opcheck(operators.contrastive_fwd.default, (*fixed, wanted))
    loss, stats, *_ = operators.contrastive_fwd(*fixed, 64)
    bits = {"query": 1, "key": 2, "temperature": 4, "key_bias": 8, "pair_margin": 16, "extra_positive": 32}
    every = sum(bit for name, bit in bits.items() if name in case.requires_grad)
    for wanted in (every, 1):
        torch.library.opcheck(operators.contrastive_bwd.default, (torch.ones_like(loss), stats, *fixed, wanted))


# ------------------------------------------------------------------------------------------------------------ autocast


@pytest.mark.parametrize("dtype", FEATURES["dtype"], ids=str)
@pytest.mark.parametrize("name", ["plain", "queue", "index"])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    """Similarities are in float32 at least, whatever autocast is set to: the same results."""
    case = make_case(FLOAT64 | CASES[name] | {"dtype": dtype})
    want = evaluate(public, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = evaluate(public, case)
    torch.testing.assert_close(got, want)


def test_gradients_of_mixed_precision_training() -> None:
    """bfloat16 embeddings of a float32 layer under autocast, as in training."""
    layer, x, y = nn.Linear(8, 4), torch.randn(12, 8), torch.arange(12) % 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = layer(x)
        loss = LF.contrastive_loss(z, temperature=0.5, labels=y, normalize=True)
    assert z.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert layer.weight.grad.isfinite().all() and layer.weight.grad.any()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_under_activation_checkpointing(reduction: str, dtype: torch.dtype, normalize: bool) -> None:
    """What is saved may be unpacked once."""
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(12, 5, generator=generator).to(dtype),
        torch.rand(12, generator=generator) + 0.5,
        torch.rand(12, generator=generator) + 0.5,
    ]

    def loss(query: Tensor, temperature: Tensor, weight: Tensor) -> Tensor:
        options = {"labels": torch.arange(12) % 3, "normalize": normalize, "reduction": reduction}
        return LF.contrastive_loss(query, temperature=temperature, sample_weight=weight, **options)

    results = []
    for function in (loss, lambda *x: checkpoint(loss, *x, use_reentrant=False)):
        inputs = [x.clone().requires_grad_() for x in leaves]
        results.append(torch.autograd.grad(function(*inputs).sum(), inputs))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
