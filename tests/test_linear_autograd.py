"""The linear form under autograd: every gradient, graphs kept or used twice, what is computed, what must raise."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ltkernels.functional as LF

N, D, C = 6, 4, 9


def make(seed: int = 0, rows: int = N) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, D, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(C, D, generator=generator, dtype=torch.float64, requires_grad=True)
    return x, w, torch.randint(C, (rows,), generator=generator)


def rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def linear(x: Tensor, w: Tensor, y: Tensor, **options: object) -> Tensor | tuple:
    """The tested function, in several chunks."""
    return LF.linear_margin_cross_entropy(x, w, y, **{"chunk_size": 4} | options)


def composed(x: Tensor, w: Tensor, y: Tensor, **options: object) -> Tensor | tuple:
    """The same from a function with tests of its own."""
    bias = options.pop("linear_bias", None)
    if options.pop("cosine", False):
        x, w = F.normalize(x, dim=-1), F.normalize(w, dim=-1)
    return LF.margin_cross_entropy(F.linear(x, w, bias), y, **options)


def learned(name: str, *shape: int) -> dict[str, Tensor]:
    return {name: rand(*shape).requires_grad_()}


# The forward pass computes the gradients of the first four; the backward pass those of the others.
PATHS: dict[str, dict] = {
    "plain": {},
    "sum": {"reduction": "sum", "scale": 3.0, "label_smoothing": 0.1, "weight": rand(C)},
    "linear_bias": learned("linear_bias", C),
    "cosine": {"cosine": True, "scale": 8.0, "target_margin": rand(C)},
    "logit_scale": learned("logit_scale", C),
    "cosine_scale": learned("logit_scale", C) | {"cosine": True, "logit_bias": rand(C)},
    "learned_scale": learned("scale") | learned("target_margin", C) | {"cosine": True},
    "pairwise": learned("pairwise_margin", C, C),
    "sample_weight": learned("sample_weight", N) | learned("logit_bias", C),
}
every_path = pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)


def leaves_of(options: dict, *leaves: Tensor) -> list[Tensor]:
    return [*leaves, *(v for v in options.values() if isinstance(v, Tensor) and v.requires_grad)]


def assert_gradients(got: tuple, loss: Tensor, leaves: list[Tensor]) -> None:
    for a, b in zip(got, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- gradients


@every_path
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(options: dict, reduction: str) -> None:
    """Analytic against numeric gradients; no other function involved."""
    x, w, y = make()
    names = [name for name, v in options.items() if isinstance(v, Tensor) and v.requires_grad]

    def function(x: Tensor, w: Tensor, *values: Tensor) -> Tensor | tuple:
        given = options | dict(zip(names, values, strict=True)) | {"reduction": reduction}
        return linear(x, w, y, return_lse=reduction == "none", **given)

    assert torch.autograd.gradcheck(function, leaves_of(options, x, w))


@every_path
@pytest.mark.parametrize("factor", [3.0, 0.5, 0.0, -2.0])
def test_upstream_factor(options: dict, factor: float) -> None:
    x, w, y = make()
    leaves = leaves_of(options, x, w)
    got = torch.autograd.grad(factor * linear(x, w, y, **options), leaves)
    assert_gradients(got, factor * composed(x, w, y, **options), leaves)


@every_path
def test_loss_used_twice(options: dict) -> None:
    x, w, y = make()
    leaves = leaves_of(options, x, w)
    mine, other = linear(x, w, y, **options), composed(x, w, y, **options)
    assert_gradients(torch.autograd.grad(mine * 2 + mine**2, leaves), other * 2 + other**2, leaves)


@every_path
def test_backward_twice_over_a_kept_graph(options: dict) -> None:
    """Never a gradient scaled twice: 3, then 5, then 1 times the gradient; then a clear error."""
    x, w, y = make()
    leaves = leaves_of(options, x, w)
    loss, want = linear(x, w, y, **options), torch.autograd.grad(composed(x, w, y, **options), leaves)
    kept = []
    for factor, keep in ((3.0, True), (5.0, True), (1.0, False)):
        kept.append((factor, torch.autograd.grad(loss, leaves, torch.tensor(factor).double(), retain_graph=keep)))
    for factor, grads in kept:  # after the last: no result may have changed since
        for a, b in zip(grads, want, strict=True):
            torch.testing.assert_close(a, factor * b, rtol=1e-11, atol=1e-12)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


def test_gradients_accumulate() -> None:
    """AccumulateGrad takes gradients over without a copy: later steps must not write into them."""
    x, w, y = make()
    want = torch.autograd.grad(composed(x, w, y), (x, w))
    for step in range(3):
        (linear(x, w, y) * (step + 1)).backward()
        for leaf, g in zip((x, w), want, strict=True):
            torch.testing.assert_close(leaf.grad, g * sum(range(step + 2)))


@pytest.mark.parametrize("cosine", [False, True], ids=["linear", "cosine"])
def test_one_tensor_in_two_places(cosine: bool) -> None:
    """The classifier as features, and in another term of the loss."""
    _, w, _ = make()
    y = torch.arange(C)
    results = []
    for function in (linear, composed):
        loss = function(w, w, y, cosine=cosine) + function(w * 2, w, y, cosine=cosine) + w.square().sum()
        results.append(torch.autograd.grad(loss, w))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_vectors_without_a_direction(dtype: torch.dtype, reduction: str) -> None:
    """Rows of zeros: cosines 0, gradients 0, and other rows as if nothing were."""
    x, w, y = make()
    with torch.no_grad():
        x[2] = 0
        w[3] = 0
        w[5] = 1e-30 if dtype in (torch.float64, torch.float32) else 0
    x, w = (leaf.detach().to(dtype).requires_grad_() for leaf in (x, w))
    y[:3] = torch.tensor([3, 5, 1])
    loss = linear(x, w, y, cosine=True, scale=4.0, reduction=reduction).sum()
    dx, dw = torch.autograd.grad(loss, (x, w))
    assert (dx[2] == 0).all() and (dw[[3, 5]] == 0).all()
    rows, classes = [0, 1, 3, 4, 5], [0, 1, 2, 4, 6, 7, 8]
    want = composed(x, w, y, cosine=True, scale=4.0, reduction=reduction).sum() if dtype == torch.float64 else None
    if want is not None:
        torch.testing.assert_close(loss, want)
        wx, ww = torch.autograd.grad(want, (x, w))
        torch.testing.assert_close((dx[rows], dw[classes]), (wx[rows], ww[classes]))
    assert dx.isfinite().all() and dw.isfinite().all() and loss.isfinite()


@pytest.mark.parametrize("cosine", [False, True], ids=["linear", "cosine"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["input", "linear_weight"])
def test_not_a_number(name: str, value: float, cosine: bool) -> None:
    """A network that diverges gives a NaN loss, as in torch, and no error about an argument it has not."""
    x, w, y = make()
    with torch.no_grad():
        (x if name == "input" else w)[1] = value
    assert linear(x, w, y, cosine=cosine).isnan()


# ----------------------------------------------------------------------------------------- what is computed, and saved


class Calls(TorchDispatchMode):
    """Shapes of what the operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[str, list] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func.namespace == "ltkernels":
            self.shapes[func._overloadpacket.__name__] = [tuple(o.shape) for o in out]
        return out


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, True, True)]
)
def test_only_wanted_gradients_are_computed(wanted: tuple[int, ...], reduction: str) -> None:
    """A frozen classifier has no gradient, and no memory for one."""
    x, w, y = make()
    leaves = [leaf.detach().requires_grad_(bool(g)) for leaf, g in zip((x, w, rand(C)), wanted, strict=True)]
    with Calls() as calls:
        loss = linear(leaves[0], leaves[1], y, linear_bias=leaves[2], reduction=reduction).sum()
        loss.backward()
    shapes = [tuple(leaf.shape) if g else (0,) for leaf, g in zip(leaves, wanted, strict=True)]
    forward, none = calls.shapes["linear_margin_softmax_fwd"][3:], [(0,)] * 3
    assert forward == (shapes if reduction == "mean" else none)
    if reduction == "none":
        assert calls.shapes["linear_margin_softmax_bwd"] == [*shapes, (0,), (0,)]
    assert [leaf.grad is not None for leaf in leaves] == [bool(g) for g in wanted]


def test_gradient_of_a_part() -> None:
    """Only what a backward pass is asked for, whatever else requires grad."""
    x, w, y = make()
    bias = rand(C).requires_grad_()
    loss = linear(x, w, y, logit_bias=bias)
    with Calls() as calls:
        (got,) = torch.autograd.grad(loss, w, retain_graph=True)
    assert calls.shapes["linear_margin_softmax_bwd"] == [(0,), (C, D), (0,), (0,), (0,)]
    torch.testing.assert_close(got, torch.autograd.grad(composed(x, w, y, logit_bias=bias), w)[0])
    with Calls() as calls:
        torch.autograd.grad(loss, bias)
    assert calls.shapes["linear_margin_softmax_bwd"] == [(0,), (0,), (0,), (3, C), (0,)]


def test_no_graph_without_need() -> None:
    x, w, y = make()
    with torch.no_grad(), Calls() as calls:
        assert not linear(x, w, y).requires_grad
    assert calls.shapes["linear_margin_softmax_fwd"][3:] == [(0,)] * 3
    with torch.inference_mode():
        assert linear(x, w, y).is_inference()
    assert not linear(x.detach(), w.detach(), y).requires_grad


@every_path
@pytest.mark.parametrize("name", ["input", "linear_weight"])
def test_input_modified_after_forward(name: str, options: dict) -> None:
    """Right, or an error: never the gradient at other features."""
    x, w, y = make()
    leaves = leaves_of(options, x, w)
    want = torch.autograd.grad(composed(x, w, y, **options), leaves)
    copies = {"input": x * 1, "linear_weight": w * 1}
    loss = linear(*copies.values(), y, **options)
    with torch.no_grad():
        copies[name].zero_()
    try:
        got = torch.autograd.grad(loss, leaves)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(got, want)


@every_path
def test_gradient_of_the_operation_before(options: dict) -> None:
    """Its saved output is our input: writing into that would corrupt its gradient."""
    x, w, y = make()
    leaves = leaves_of(options, x, w)
    got = torch.autograd.grad(linear(x.sigmoid(), w.exp(), y, **options), leaves)
    assert_gradients(got, composed(x.sigmoid(), w.exp(), y, **options), leaves)


@every_path
def test_saved_tensors_hooks(options: dict) -> None:
    """Tensors saved in another form; what a hook has seen is not scaled in place."""
    x, w, y = make()
    leaves, seen = leaves_of(options, x, w), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.detach()) or t.numpy().copy(), torch.tensor):
        loss = linear(x, w, y, **{k: v.detach() if k == "weight" else v for k, v in options.items()})
    copies = [t.clone() for t in seen]
    assert_gradients(torch.autograd.grad(3 * loss, leaves), 3 * composed(x, w, y, **options), leaves)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.detach()) or t, lambda t: t):
        loss = linear(x, w, y, **options)
    copies = [t.clone() for t in seen]
    torch.autograd.grad(3 * loss, leaves)
    assert seen and all(torch.equal(a, b) for a, b in zip(seen, copies, strict=True))


@every_path
@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_checkpoint(options: dict, reentrant: bool) -> None:
    x, w, y = make()
    leaves = leaves_of(options, x, w)
    checkpoint(lambda x, w: linear(x * 2, w, y, **options), x, w, use_reentrant=reentrant).backward()
    grads = tuple(leaf.grad for leaf in leaves)
    for leaf in leaves:
        leaf.grad = None
    assert_gradients(grads, composed(x * 2, w, y, **options), leaves)


@every_path
def test_gradient_penalty_raises(options: dict) -> None:
    x, w, y = make()
    loss = linear(x * 2, w, y, **options)
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(g, torch.autograd.grad(composed(x * 2, w, y, **options), x)[0])
    with pytest.raises(RuntimeError, match="linear_margin_cross_entropy can be differentiated once only"):
        (loss + g.square().sum()).backward()


@pytest.mark.parametrize("name", ["input", "linear_weight", "linear_bias"])
def test_forward_mode_raises(name: str) -> None:
    x, w, y = make()
    tensors = {"input": x.detach(), "linear_weight": w.detach(), "linear_bias": rand(C)}
    with torch.autograd.forward_ad.dual_level():
        tensors[name] = torch.autograd.forward_ad.make_dual(tensors[name], torch.ones_like(tensors[name]))
        with pytest.raises(NotImplementedError, match="does not implement forward-mode differentiation"):
            LF.linear_margin_cross_entropy(target=y, **tensors)
