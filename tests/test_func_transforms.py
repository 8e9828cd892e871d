"""torch.func: vmap is one kernel call, and composes with grad in any order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import kernels_run
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, hessian, jacrev, vmap

import ltkernels.functional as LF

N, C = 6, 9
PRECOMPUTED, RECOMPUTED = {"forward_gradient": 1}, {"forward": 1, "backward": 1}


def make(*batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*batch, N, C, generator=generator, dtype=torch.float64)
    return logits, torch.randint(C, (*batch, N), generator=generator)


def rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def mean_loss(logits: Tensor, target: Tensor) -> Tensor:
    return LF.margin_cross_entropy(logits, target)


VECTORS = {"logit_scale": rand(C), "logit_bias": rand(C, seed=2), "target_margin": rand(C, seed=3)}
MASK = torch.arange(C) != 4


def looped(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    return torch.stack([function(*parts) for parts in zip(*arguments, strict=True)])


VMAPPED: dict[str, dict] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "weighted_mean": {"weight": rand(C), "sample_weight": rand(N)},
    "vectors": VECTORS | {"scale": 2.0, "label_smoothing": 0.1},
    "pairwise": {"pairwise_margin": rand(C, C)},
    "mask": {"mask": MASK},
    "row_mask": {"mask": MASK.expand(N, C)},
}
every_vmapped = pytest.mark.parametrize("options", VMAPPED.values(), ids=VMAPPED)


@every_vmapped
@pytest.mark.parametrize("kind", ["indices", "ignored", "probabilities"])
def test_vmap_is_one_kernel_call(options: dict, kind: str) -> None:
    logits, target = make(5)
    if kind == "ignored":
        target[1:, 2] = -100
        target[3] = -100  # a problem without rows: NaN for a mean
    if kind == "probabilities":
        options = {name: x for name, x in options.items() if name != "pairwise_margin"}
        target = logits.flip(0).softmax(-1)

    def function(x: Tensor, y: Tensor) -> Tensor:
        return LF.margin_cross_entropy(x, y, **options)

    with kernels_run() as ran:
        got = vmap(function)(logits, target)
    assert ran == {"forward": 1}
    torch.testing.assert_close(got, looped(function, logits, target), equal_nan=True)

    with kernels_run() as ran:
        got = vmap(grad(lambda x, y: function(x, y).sum()))(logits, target)
    assert ran in (PRECOMPUTED, RECOMPUTED)
    expected = looped(grad(lambda x, y: function(x, y).sum()), logits, target)
    torch.testing.assert_close(got, expected, equal_nan=True)

    finite = [b for b in range(5) if kind != "ignored" or b != 3]
    with kernels_run() as ran:
        got = grad(lambda x: vmap(function)(x, target[finite]).sum())(logits[finite])
    assert ran in (PRECOMPUTED, RECOMPUTED)
    torch.testing.assert_close(got, expected[finite])


def test_vmap_over_other_arguments() -> None:
    """Batches of masks and sample weights share the call; in_dims may be anything, and other arguments unbatched."""
    logits, target = make(5)
    masks, weights = rand(5, N, C) < 1.3, rand(5, N)
    masks[..., :] |= F.one_hot(target, C).bool()

    def function(x: Tensor, y: Tensor, m: Tensor, u: Tensor) -> Tensor:
        return LF.margin_cross_entropy(x, y, mask=m, sample_weight=u)

    with kernels_run() as ran:
        got = vmap(function, in_dims=(2, 1, 0, 1))(logits.movedim(0, 2), target.t(), masks, weights.t())
    assert ran == {"forward": 1}
    torch.testing.assert_close(got, looped(function, logits, target, masks, weights))

    # One mask of the classes for each problem, with rows of their own or shared.
    class_masks = rand(5, C, seed=5) < 1.2
    for x, y in ((logits, target), (logits[0], target[0])):
        dim = 0 if x.dim() == 3 else None
        with kernels_run() as ran:
            got = vmap(function, in_dims=(dim, dim, 0, 0))(x, y, class_masks, weights)
        assert ran == {"forward": 1}
        torch.testing.assert_close(got, looped(function, x.expand(5, N, C), y.expand(5, N), class_masks, weights))
    assert got.isinf().any() and not got.isinf().all()  # removed targets in some problems


@pytest.mark.parametrize("ignored_weight", [0.7, float("inf")])
def test_vmap_shared_sample_weights_beside_a_problem_without_rows(ignored_weight: float) -> None:
    """Its mean is NaN; the gradient of another problem's, to what both share, is not."""
    logits, target = make(3)
    target[1] = -100
    target[:, 2] = -100
    shared = rand(N, seed=3)
    shared[2] = ignored_weight  # of a row that is ignored everywhere

    def losses(u: Tensor) -> Tensor:
        return vmap(lambda x, y: LF.margin_cross_entropy(x, y, sample_weight=u))(logits, target)

    got = losses(shared.requires_grad_())
    torch.testing.assert_close(got, looped(lambda x, y: mean_of(x, y, shared), logits, target), equal_nan=True)
    assert got.isnan().tolist() == [False, True, False]
    for problem in (0, 2):
        (gradient,) = torch.autograd.grad(got[problem], shared, retain_graph=True)
        expected = torch.autograd.grad(mean_of(logits[problem], target[problem], shared), shared)[0]
        torch.testing.assert_close(gradient, expected)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_vmap_over_problems_without_rows(reduction: str) -> None:
    got = vmap(lambda x, y: LF.margin_cross_entropy(x, y, reduction=reduction))(
        torch.ones(3, 0, C), torch.ones(3, 0).long()
    )
    expected = {"none": torch.ones(3, 0), "sum": torch.zeros(3), "mean": torch.full((3,), torch.nan)}[reduction]
    torch.testing.assert_close(got, expected, equal_nan=True)


def mean_of(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """By F.cross_entropy over the rows that are kept."""
    kept = target != -100
    u = weight[kept]
    return (u * F.cross_entropy(logits[kept], target[kept], reduction="none")).sum() / u.sum()


def test_vmap_over_class_vectors_is_a_loop() -> None:
    """No single call can serve several biases: one a problem, and right."""
    logits, target = make()
    biases = rand(4, C)

    def function(b: Tensor) -> Tensor:
        return LF.margin_cross_entropy(logits, target, logit_bias=b)

    with kernels_run() as ran:
        got = vmap(function)(biases)
    assert ran == {"forward": 4}
    torch.testing.assert_close(got, looped(function, biases))
    torch.testing.assert_close(vmap(grad(function))(biases), looped(grad(function), biases))
    shared = vmap(lambda x: grad(lambda b: LF.margin_cross_entropy(x, target, logit_bias=b))(biases[0]))(make(4)[0])
    expected = [grad(lambda b, x=x: LF.margin_cross_entropy(x, target, logit_bias=b))(biases[0]) for x in make(4)[0]]
    torch.testing.assert_close(shared, torch.stack(expected))


def test_nested_vmap() -> None:
    logits, target = make(2, 3)
    with kernels_run() as ran:
        got = vmap(vmap(mean_loss))(logits, target)
    assert ran == {"forward": 1}
    torch.testing.assert_close(got, torch.stack([looped(mean_loss, x, y) for x, y in zip(logits, target, strict=True)]))


def test_grad_and_jacobian() -> None:
    logits, target = make()
    want = grad(lambda x: F.cross_entropy(x, target))(logits)
    got, value = grad_and_value(mean_loss)(logits, target)
    torch.testing.assert_close((got, value), (want, F.cross_entropy(logits, target)))
    rows = {"reduction": "none"}
    jacobian = jacrev(lambda x: LF.margin_cross_entropy(x, target, **rows))(logits)
    torch.testing.assert_close(jacobian, jacrev(lambda x: F.cross_entropy(x, target, **rows))(logits))
    with pytest.raises(RuntimeError, match="can be differentiated once only|forward-mode"):
        hessian(lambda x: LF.margin_cross_entropy(x, target))(logits)
    with pytest.raises(RuntimeError, match="can be differentiated once only"):
        grad(lambda x: grad(mean_loss)(x, target).sum())(logits)


def test_per_sample_gradients_of_a_module() -> None:
    """The usual recipe: functional_call, grad, vmap over samples; one kernel call for all of them."""
    module = nn.Linear(4, C).double()
    parameters = {name: x.detach() for name, x in module.named_parameters()}
    features, target = rand(N, 4), torch.arange(N)

    def loss(parameters: dict, x: Tensor, y: Tensor) -> Tensor:
        return LF.margin_cross_entropy(functional_call(module, parameters, (x[None],)), y[None], **VECTORS)

    with kernels_run() as ran:
        got = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, features, target)
    assert ran == PRECOMPUTED
    for i in range(N):
        alone = grad(loss)(parameters, features[i], target[i])
        torch.testing.assert_close({name: x[i] for name, x in got.items()}, alone)


def test_compiled_per_sample_gradients() -> None:
    torch.compiler.reset()
    logits, target = make(4)
    compiled = torch.compile(vmap(grad(mean_loss)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, target), looped(grad(mean_loss), logits, target))
