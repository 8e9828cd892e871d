"""torch.func against a loop over the problems, whichever backend serves.

The last test runs this file once more on the plain-torch backend.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

import ltkernels.functional as LF
from ltkernels.neighbors import NeighborMap

B, N, C, D = 3, 6, 5, 4
NEIGHBORS = NeighborMap.from_pairs([(0, 3), (1, 4)], num_classes=3, num_auxiliary=2)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def logits(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


TARGET = torch.randint(C, (B, N), generator=torch.Generator().manual_seed(1))
IGNORED = TARGET.index_fill(1, torch.tensor([2]), -100)

MASK = (rand(B, N, C) < 1.2) | (TARGET[0][:, None] == torch.arange(C))  # targets stay

# The batched arguments of a call, all in dimension 0, and the others.
CASES: dict[str, tuple[dict[str, Tensor], dict]] = {
    "logits": ({"input": logits(B, N, C)}, {"target": TARGET[0]}),
    "logits_and_target": ({"input": logits(B, N, C), "target": TARGET}, {"label_smoothing": 0.1}),
    "samples": ({"input": logits(N, C), "target": TARGET[0]}, {}),
    "images": ({"input": logits(B, 2, C, 3), "target": TARGET.view(B, 2, 3)}, {"reduction": "none"}),
    "ignored": ({"input": logits(B, N, C), "target": IGNORED}, {"weight": rand(C), "sample_weight": rand(N)}),
    "probabilities": ({"input": logits(B, N, C), "target": logits(B, N, C).flip(0).softmax(-1)}, {}),
    "target": ({"target": TARGET}, {"input": logits(N, C)}),
    "bias": ({"logit_bias": rand(B, C)}, {"input": logits(N, C), "target": TARGET[0]}),
    "vectors": (
        {"logit_scale": rand(B, C), "target_margin": rand(B, C, seed=1), "input": logits(B, N, C)},
        {"target": TARGET[0], "scale": 2.0},
    ),
    "one_margin": ({"target_margin": rand(B)}, {"input": logits(N, C), "target": IGNORED[0], "scale": 3.0}),
    "pairwise": ({"pairwise_margin": rand(B, C, C), "target": TARGET}, {"input": logits(N, C)}),
    "scale": ({"scale": rand(B)}, {"input": logits(N, C), "target": TARGET[0]}),
    "mask": ({"mask": MASK, "sample_weight": rand(B, N)}, {"input": logits(N, C), "target": TARGET[0]}),
    "silenced": (
        {"input": logits(B, N, C), "target": IGNORED},
        {"neighbors": NEIGHBORS, "neighbor_weight": 0.3, "prior_counts": rand(C)},
    ),
    "linear": ({"input": logits(B, N, D), "target": TARGET}, {"linear_weight": rand(C, D), "cosine": True}),
    "classifiers": ({"linear_weight": rand(B, C, D)}, {"input": logits(N, D), "target": IGNORED[0]}),
}


def loss_of(batched: dict[str, Tensor], shared: dict) -> Callable[..., Tensor]:
    names = batched.keys() | shared.keys()
    function = LF.auxiliary_cross_entropy if "neighbors" in names else LF.margin_cross_entropy
    function = LF.linear_margin_cross_entropy if "linear_weight" in names else function
    return lambda *parts: function(**dict(zip(batched, parts, strict=True)), **shared)


def looped(function: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([function(*parts) for parts in zip(*arguments, strict=True)])


@pytest.mark.parametrize("batched, shared", CASES.values(), ids=CASES)
def test_vmap_and_gradients(batched: dict[str, Tensor], shared: dict) -> None:
    loss, arguments = loss_of(batched, shared), tuple(batched.values())
    torch.testing.assert_close(vmap(loss)(*arguments), looped(loss, arguments), rtol=1e-12, atol=1e-12)

    total = [k for k, x in enumerate(arguments) if x.is_floating_point()][:1]
    if not total:
        return
    gradient = grad(lambda *parts: loss(*parts).sum(), argnums=total[0])
    want = looped(gradient, arguments)
    torch.testing.assert_close(vmap(gradient)(*arguments), want, rtol=1e-12, atol=1e-12)

    def all_losses(x: Tensor) -> Tensor:
        return vmap(loss)(*arguments[: total[0]], x, *arguments[total[0] + 1 :]).sum()

    torch.testing.assert_close(grad(all_losses)(arguments[total[0]]), want, rtol=1e-12, atol=1e-12)


def test_nested_vmap_and_jacobian() -> None:
    x, y, biases = logits(B, N, C), TARGET, rand(2, C)

    def loss(f: Tensor, t: Tensor, b: Tensor) -> Tensor:
        return LF.margin_cross_entropy(f, t, logit_bias=b)

    got = vmap(lambda b: vmap(lambda f, t: loss(f, t, b))(x, y))(biases)
    want = torch.stack([looped(lambda f, t, b=b: loss(f, t, b), (x, y)) for b in biases])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    rows = jacrev(lambda f: LF.margin_cross_entropy(f, y[0], reduction="none"))(x[0])
    per_row = vmap(grad(lambda f, t: LF.margin_cross_entropy(f, t)))(x[0], y[0])
    torch.testing.assert_close(rows, torch.diag_embed(per_row.T).permute(1, 2, 0), rtol=1e-12, atol=1e-12)


NAN, INF = float("nan"), float("inf")
BAD: dict[str, tuple[dict[str, Tensor], type[Exception], str]] = {
    "target": ({"target": TARGET.index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(C))}, IndexError, "got 5"),
    "logit_bias": ({"logit_bias": torch.stack([rand(C), torch.full((C,), NAN)])}, ValueError, "got nan"),
    "logit_scale": ({"logit_scale": torch.tensor([1.0, INF])}, ValueError, "got inf"),
    "pairwise_margin": (
        {"pairwise_margin": torch.zeros(2, C, C).index_fill(0, torch.tensor([1]), INF)},
        ValueError,
        "inf",
    ),
    "scale": ({"scale": torch.tensor([1.0, -1.0])}, ValueError, "got -1"),
    "weight": ({"weight": rand(B, C + 1)}, ValueError, "(5,)"),
    "mask": ({"mask": rand(B, C)}, TypeError, "bool"),
}


def test_target_out_of_range_beside_class_weights_is_named() -> None:
    """By the kernel: an index out of range before it would end the use of a GPU, where the row is NaN."""
    targets, x, weight = BAD["target"][0]["target"], logits(N, C), rand(C)
    with pytest.raises(IndexError, match=r"^target: expected .*got 5"):
        vmap(lambda t: LF.margin_cross_entropy(x, t, weight))(targets)


@pytest.mark.parametrize("nested", [False, True], ids=["vmap", "vmap_of_grad"])
@pytest.mark.parametrize("name", BAD)
def test_bad_values_of_any_problem_raise(name: str, nested: bool) -> None:
    """A value that makes no sense is an error in whichever problem it is, not a number without a word."""
    batched, exception, words = BAD[name]
    good = {"input": logits(N, C), "target": TARGET[0]}

    def loss(f: Tensor, part: Tensor) -> Tensor:
        return LF.margin_cross_entropy(**good | {"input": f, name: part})

    function = grad(loss) if nested else loss
    with pytest.raises(exception) as caught:
        vmap(function, in_dims=(None, 0))(good["input"], batched[name])
    assert name in str(caught.value) and words in str(caught.value)


# Each has as many numbers as the right one, or numbers that would spread to as many.
MISSHAPED: dict[str, tuple[dict[str, Tensor], int | None, type[Exception]]] = {
    "transposed mask": ({"mask": torch.ones(B, C, N, dtype=torch.bool)}, 0, ValueError),
    "shared transposed mask": ({"mask": torch.ones(C, N, dtype=torch.bool)}, None, ValueError),
    "mask of one class": ({"mask": torch.ones(B, 1, dtype=torch.bool)}, 0, ValueError),
    "mask of one for each row": ({"mask": torch.ones(B, N, 1, dtype=torch.bool)}, 0, ValueError),
    "integer sample_weight": ({"sample_weight": torch.ones(B, N, dtype=torch.int64)}, 0, TypeError),
    "bool sample_weight": ({"sample_weight": torch.ones(B, N, dtype=torch.bool)}, 0, TypeError),
    "sample_weight with columns": ({"sample_weight": rand(B, N, 1)}, 0, ValueError),
}


@pytest.mark.parametrize("transform", [lambda f: f, grad], ids=["vmap", "grad_of_vmap"])
@pytest.mark.parametrize("name", MISSHAPED)
def test_shapes_are_those_of_one_problem(name: str, transform: Callable) -> None:
    """Folding problems into rows must not make sense of what none of them would take."""
    option, dim, exception = MISSHAPED[name]
    ((argument, value),) = option.items()

    def total(f: Tensor) -> Tensor:
        def loss(f: Tensor, t: Tensor, x: Tensor) -> Tensor:
            return LF.margin_cross_entropy(f, t, reduction="sum", **{argument: x})

        return vmap(loss, in_dims=(0, 0, dim))(f, TARGET, value).sum()

    with pytest.raises(exception, match=f"^{argument}: expected"):
        transform(total)(logits(B, N, C))


@pytest.mark.parametrize("shape", [(B, 0, C), (0, N, C), (B, 0, C, 2), (0, N, C, 2)])
def test_no_rows_and_no_problems(shape: tuple[int, ...]) -> None:
    x, target = torch.zeros(shape), torch.zeros(shape[:2] + shape[3:], dtype=torch.int64)

    def loss(f: Tensor, t: Tensor) -> Tensor:
        return LF.margin_cross_entropy(f, t, reduction="sum")

    assert torch.equal(vmap(loss)(x, target), torch.zeros(shape[0]))
    if shape[0]:  # torch's own product of no problems with their upstream gradients fails
        assert vmap(grad(loss))(x, target).shape == shape


@pytest.mark.skipif(os.environ.get("LTKERNELS_BACKEND") == "reference", reason="runs this file")
def test_reference_gives_the_same(run_python: Callable[..., str]) -> None:
    printed = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, LTKERNELS_BACKEND="reference")
    assert " passed" in printed and "1 skipped" in printed, printed
