"""The autograd node: upstream gradients, graphs that are kept or used twice, hooks, and what must raise."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import definition, public, same_bits
from problems import DIFFERENTIABLE, FEATURES, covering_set, describe, make_problem
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ltkernels.functional as LF

ROWS, CLASSES = 6, 21


def make(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(CLASSES, (ROWS,), generator=generator)


def vectors(*names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"pairwise_margin": (CLASSES, CLASSES), "sample_weight": (ROWS,), "scale": (), "scalar": ()}
    result = {}
    for name in names:
        value = torch.rand(shapes.get(name, (CLASSES,)), generator=generator, dtype=torch.float64) + 0.5
        result["logit_scale" if name == "scalar" else name] = value.requires_grad_()
    return result


# The forward pass writes the gradient for the first; the backward pass recomputes it for the others.
PATHS: dict[str, dict] = {
    "precomputed": {},
    "precomputed_sum": {"reduction": "sum"},
    "with_sample_weight": vectors("sample_weight"),
    "with_bias": vectors("logit_bias"),
    "with_pairwise": vectors("pairwise_margin"),
    "with_scale": vectors("scale", "target_margin"),
}
every_path = pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)


def leaves_of(logits: Tensor, options: dict) -> list[Tensor]:
    return [logits, *(value for value in options.values() if isinstance(value, Tensor) and value.requires_grad)]


def assert_gradients(grads: tuple[Tensor, ...], loss: Callable[..., Tensor], logits: Tensor, options: dict) -> None:
    """``loss`` is a function of the loss function; its gradient by the definition is the expected one."""
    expected = torch.autograd.grad(loss(definition), leaves_of(logits, options))
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ upstream


@every_path
@pytest.mark.parametrize("factor", [1.0, 3.0, 0.5, 0.0, -2.0])
def test_upstream_factor(options: dict, factor: float) -> None:
    logits, target = make()

    def loss(function: Callable[..., Tensor]) -> Tensor:
        return factor * function(logits, target, **options)

    assert_gradients(
        torch.autograd.grad(loss(LF.margin_cross_entropy), leaves_of(logits, options)), loss, logits, options
    )


@every_path
def test_upstream_of_each_row(options: dict) -> None:
    logits, target = make()
    factors = torch.tensor([1.0, 3.0, 0.5, 0.0, -2.0, 1e3], dtype=torch.float64)
    options = options | {"reduction": "none"}

    def loss(function: Callable[..., Tensor]) -> Tensor:
        return (factors * function(logits, target, **options)).sum()

    assert_gradients(
        torch.autograd.grad(loss(LF.margin_cross_entropy), leaves_of(logits, options)), loss, logits, options
    )


def test_upstream_of_expanded_and_strided_rows() -> None:
    logits, target = make()
    rows = LF.margin_cross_entropy(logits, target, reduction="none")
    for upstream in (torch.ones(()).double().expand(ROWS), torch.arange(2.0 * ROWS).double()[::2]):
        got = torch.autograd.grad(rows, logits, upstream, retain_graph=True)[0]
        want = torch.autograd.grad(F.cross_entropy(logits, target, reduction="none"), logits, upstream)[0]
        torch.testing.assert_close(got, want)


@every_path
def test_loss_used_twice(options: dict) -> None:
    logits, target = make()

    def loss(function: Callable[..., Tensor]) -> Tensor:
        value = function(logits, target, **options)
        return value * 2 + value**2

    assert_gradients(
        torch.autograd.grad(loss(LF.margin_cross_entropy), leaves_of(logits, options)), loss, logits, options
    )


@every_path
def test_z_loss(options: dict) -> None:
    """Gradients flow through the log-sum-exp, alone and together with the loss."""
    logits, target = make()
    for weights in ((1.0, 0.1), (0.0, 1.0)):

        def loss(function: Callable[..., Tensor], weights: tuple[float, float] = weights) -> Tensor:
            value, lse = function(logits, target, return_lse=True, **options)
            return weights[0] * value + weights[1] * (lse**2).mean()

        grads = torch.autograd.grad(loss(LF.margin_cross_entropy), leaves_of(logits, options))
        assert_gradients(grads, loss, logits, options)


def test_log_sum_exp_alone() -> None:
    logits, target = make()
    _, lse = LF.margin_cross_entropy(logits, target, return_lse=True)
    torch.testing.assert_close(torch.autograd.grad(lse.sum(), logits)[0], logits.softmax(1))


# ---------------------------------------------------------------------------------------------------- graphs kept twice


@every_path
def test_backward_twice_over_a_kept_graph(options: dict) -> None:
    """Never a gradient scaled twice: 3, then 5, then 1 times the gradient."""
    logits, target = make()
    leaves = leaves_of(logits, options)
    want = torch.autograd.grad(definition(logits, target, **options), leaves)
    loss = LF.margin_cross_entropy(logits, target, **options)
    kept = []
    for factor, keep in ((3.0, True), (5.0, True), (1.0, False)):
        upstream = torch.tensor(factor, dtype=torch.float64)
        kept.append((factor, torch.autograd.grad(loss, leaves, upstream, retain_graph=keep)))
    for factor, grads in kept:  # after the last: no result may have changed since
        for got, expected in zip(grads, want, strict=True):
            torch.testing.assert_close(got, factor * expected, rtol=1e-11, atol=1e-12)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


@every_path
def test_second_backward_raises(options: dict) -> None:
    logits, target = make()
    loss = LF.margin_cross_entropy(logits, target, **options)
    loss.backward()
    first = logits.grad.clone()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    assert same_bits(logits.grad, first)
    for value in options.values():
        if isinstance(value, Tensor):
            value.grad = None


def test_gradient_accumulates() -> None:
    """AccumulateGrad takes the gradient over without a copy: later steps must not write into it."""
    logits, target = make()
    want = torch.autograd.grad(F.cross_entropy(logits, target), logits)[0]
    for step in range(3):
        (LF.margin_cross_entropy(logits, target) * (step + 1)).backward()
        torch.testing.assert_close(logits.grad, want * sum(range(step + 2)))
        assert not logits.grad.requires_grad


def test_gradient_of_a_part() -> None:
    """Only what is asked for, whatever else requires grad; one graph serves them all."""
    logits, target = make()
    options = vectors("logit_scale", "logit_bias", "target_margin", "pairwise_margin", "sample_weight", "scale")
    leaves = leaves_of(logits, options)
    want = torch.autograd.grad(definition(logits, target, **options), leaves)
    loss = LF.margin_cross_entropy(logits, target, **options)
    for leaf, expected in zip(leaves, want, strict=True):
        torch.testing.assert_close(torch.autograd.grad(loss, leaf, retain_graph=True)[0], expected)
    for (a, x), (b, y) in itertools.combinations(zip(leaves, want, strict=True), 2):
        got = torch.autograd.grad(loss, [a, b], retain_graph=True)
        torch.testing.assert_close(got, (x, y))


# ------------------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "scalar"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen_logits"])
def test_gradient_to_each_argument(name: str, reduction: str, frozen: bool) -> None:
    logits, target = make()
    target[2] = -100
    options = vectors(name) | {"reduction": reduction, "weight": torch.rand(CLASSES, dtype=torch.float64)}
    logits = logits.detach() if frozen else logits
    leaves = [value for value in options.values() if isinstance(value, Tensor) and value.requires_grad]
    got = torch.autograd.grad(LF.margin_cross_entropy(logits, target, **options).sum(), leaves)
    want = torch.autograd.grad(definition(logits, target, **options).sum(), leaves)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    assert got[0].shape == leaves[0].shape


# Every argument that takes a gradient, at every other option; kept small, as gradcheck evaluates once an entry.
GRADCHECK = FEATURES | {
    "rows": (1, 4),
    "classes": (1, 3, 5),
    "dtype": (torch.float64,),
    "layout": ("contiguous", "transposed", "column_sliced"),
    "content": ("normal", "equal"),
    "target": ("int64", "ignored", "probabilities"),
    "mask": ("no_mask", "class_mask"),
    "grads": ("grad_logits", "grad_all"),
}


@pytest.mark.parametrize("features", covering_set(GRADCHECK), ids=describe)
def test_gradcheck(features: dict) -> None:
    """Analytic against numeric gradients; no reference involved."""
    problem = make_problem(features)
    if "mask" in problem.options:
        problem.options["mask"][:] = torch.arange(features["classes"]) != 1  # a class for each row, a finite loss
        for classes in (problem.target, problem.options.get("row_class")):
            if classes is not None and not classes.is_floating_point():
                classes[classes == 1] = 0
    kept = (problem.target != -100).any()
    if not kept:
        problem.target[:] = 0
    fixed = {name: value for name, value in problem.options.items() if name not in problem.requires_grad}
    names = [name for name in problem.requires_grad if name != "logits"]
    leaves = [problem.logits.detach().clone(), *(problem.options[name].clone() for name in names)]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def function(logits: Tensor, *values: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return public(logits, problem.target, **fixed, **dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(function, leaves)


def test_weight_that_requires_grad_raises() -> None:
    logits, target = make()
    weight = torch.ones(CLASSES, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="weight: gradients to class weights are not supported"):
        LF.margin_cross_entropy(logits, target, weight)
    with torch.no_grad():
        LF.margin_cross_entropy(logits, target, weight)


def test_probabilities_that_require_grad_raise() -> None:
    logits, _ = make()
    target = torch.full((ROWS, CLASSES), 1 / CLASSES, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="target: probabilities that require grad are not supported"):
        LF.margin_cross_entropy(logits, target)
    LF.margin_cross_entropy(logits, target.detach())


def test_no_graph_without_need() -> None:
    """No gradient is computed where none can be asked for."""
    logits, target = make()
    with torch.no_grad():
        assert not LF.margin_cross_entropy(logits, target).requires_grad
    with torch.inference_mode():
        assert LF.margin_cross_entropy(logits, target).is_inference()
    assert not LF.margin_cross_entropy(logits.detach(), target).requires_grad


# ----------------------------------------------------------------------------------------------- memory that is shared


@every_path
def test_input_modified_after_forward(options: dict) -> None:
    """Right, or an error: never the gradient at other logits."""
    logits, target = make()
    want = torch.autograd.grad(definition(logits, target, **options), logits)[0]
    intermediate = logits * 1
    loss = LF.margin_cross_entropy(intermediate, target, **options)
    with torch.no_grad():
        intermediate.zero_()
    try:
        got = torch.autograd.grad(loss, logits)[0]
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["target", "weight", "mask", "logit_bias", "target_margin", "sample_weight"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_argument_modified_after_forward(name: str, reduction: str) -> None:
    logits, target = make()
    options = {key: value.detach() for key, value in vectors("logit_bias", "target_margin", "sample_weight").items()}
    options |= {"weight": torch.ones(CLASSES).double(), "mask": torch.ones(CLASSES, dtype=torch.bool)}
    arguments = {"input": logits, "target": target, "reduction": reduction} | options
    want = torch.autograd.grad(definition(**arguments).sum(), logits)[0]
    loss = LF.margin_cross_entropy(**arguments).sum()
    arguments[name].zero_()
    try:
        got = torch.autograd.grad(loss, logits)[0]
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(got, want)


@every_path
@pytest.mark.parametrize("before", [torch.sigmoid, torch.exp, torch.tanh, F.relu])
def test_gradient_of_the_operation_before(options: dict, before: Callable[[Tensor], Tensor]) -> None:
    """Its saved output is our input: writing into that would corrupt its gradient."""
    logits, target = make()

    def loss(function: Callable[..., Tensor]) -> Tensor:
        return function(before(logits), target, **options)

    assert_gradients(
        torch.autograd.grad(loss(LF.margin_cross_entropy), leaves_of(logits, options)), loss, logits, options
    )


@every_path
def test_saved_tensors_on_cpu(options: dict) -> None:
    logits, target = make()
    with torch.autograd.graph.save_on_cpu():
        loss = LF.margin_cross_entropy(logits, target, **options) * 3
    grads = torch.autograd.grad(loss, leaves_of(logits, options))
    assert_gradients(grads, lambda function: function(logits, target, **options) * 3, logits, options)


@pytest.mark.parametrize(
    "packed", [lambda x: x, lambda x: x.detach(), lambda x: x.view(-1)], ids=["same", "alias", "view"]
)
def test_tensors_seen_by_a_hook_do_not_change(packed: Callable[[Tensor], Tensor]) -> None:
    """A hook may keep another view of what it packs: the gradient must not be scaled in place then."""
    logits, target = make()
    seen: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return packed(x)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.view(ROWS, CLASSES)):
        loss = LF.margin_cross_entropy(logits, target)
    copies = [x.clone() for x in seen]
    (3 * loss).backward()
    assert seen and all(same_bits(a, b) for a, b in zip(seen, copies, strict=True))


def test_saved_tensors_in_another_form() -> None:
    logits, target = make()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy().copy(), torch.from_numpy):
        loss = LF.margin_cross_entropy(logits, target)
    got = torch.autograd.grad(loss, logits, torch.tensor(2.0).double())[0]
    torch.testing.assert_close(got, 2 * torch.autograd.grad(F.cross_entropy(logits, target), logits)[0])


@every_path
@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_checkpoint(options: dict, reentrant: bool) -> None:
    logits, target = make()

    def loss(function: Callable[..., Tensor]) -> Tensor:
        return function(logits * 2, target, **options)

    recomputed = checkpoint(
        lambda x: LF.margin_cross_entropy(x * 2, target, **options), logits, use_reentrant=reentrant
    )
    recomputed.backward()
    grads = tuple(leaf.grad for leaf in leaves_of(logits, options))
    for leaf in leaves_of(logits, options):
        leaf.grad = None
    assert_gradients(grads, loss, logits, options)


def test_tensor_and_node_hooks() -> None:
    logits, target = make()
    upstream, seen = [], []
    logits.register_hook(lambda grad: seen.append(grad.clone()) or grad * 10)
    loss = LF.margin_cross_entropy(logits, target)
    loss.grad_fn.register_prehook(lambda grads: (grads[0] * 2,))
    loss.grad_fn.register_hook(lambda inputs, outputs: upstream.append(outputs[0].item()))
    loss.backward()
    want = torch.autograd.grad(F.cross_entropy(logits, target), logits)[0] / 10  # the hook is still there
    assert upstream == [2.0]
    torch.testing.assert_close(seen[0], 2 * want)
    torch.testing.assert_close(logits.grad, 20 * want)


# ------------------------------------------------------------------------------------------------- second derivatives


@every_path
def test_gradient_penalty_raises(options: dict) -> None:
    """create_graph gives the first derivative; differentiating that raises, whatever it is mixed with."""
    logits, target = make()
    features = logits * 2
    loss = LF.margin_cross_entropy(features, target, **options)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(definition(logits * 2, target, **options), logits)[0])
    with pytest.raises(RuntimeError, match="margin_cross_entropy can be differentiated once only.*BACKEND=reference"):
        (loss + (grad**2).sum()).backward()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivative_to_an_argument_raises(name: str) -> None:
    logits, target = make()
    options = vectors(name)
    loss = LF.margin_cross_entropy(logits, target, **options, reduction="none").square().sum()
    (grad,) = torch.autograd.grad(loss, options[name], create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once only"):
        grad.sum().backward()


def test_second_derivative_through_the_upstream_gradient_raises() -> None:
    """d(c * dloss)/dc is linear in c, and still not implemented: it must not come out as nothing."""
    logits, target = make()
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loss = factor * LF.margin_cross_entropy(logits, target)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once only"):
        torch.autograd.grad(grad.sum(), factor)


def test_forward_mode_raises() -> None:
    logits, target = make()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits.detach(), torch.ones_like(logits))
        with pytest.raises(NotImplementedError, match="does not implement forward-mode differentiation"):
            LF.margin_cross_entropy(dual, target)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: LF.margin_cross_entropy(x, target), (logits.detach(),), (torch.ones_like(logits),))
