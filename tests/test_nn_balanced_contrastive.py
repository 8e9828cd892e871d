"""Balanced contrastive learning against the equation of its paper, one pair of rows at a time in float64."""

from __future__ import annotations

import pytest
import torch
from test_nn_contrastive import LABELS, assert_same, embeddings, mean
from torch import Tensor, nn
from torch.nn import functional as F

from ltkernels import nn as lnn

pytestmark = pytest.mark.usefixtures("one_thread")


def balanced(z: Tensor, labels: Tensor, prototypes: Tensor, tau: float, anchor: bool) -> Tensor:
    """Equation of the paper, with class sets that hold a prototype each; ``anchor=False``: as in the authors' code."""
    z, c = F.normalize(z, dim=1), F.normalize(prototypes, dim=1)
    losses = []
    for i, y in enumerate(labels.tolist()):
        if y < 0:
            continue
        total = 0
        for k in range(len(c)):
            members = [j for j in range(len(z)) if labels[j] == k]
            count = len(members) + 1 - (k == y and not anchor)
            mass = sum(torch.exp(z[i] @ z[j] / tau) for j in members if j != i) + torch.exp(z[i] @ c[k] / tau)
            total = total + mass / count
        for j in range(len(z)):  # without a class: one of its own
            if labels[j] < 0:
                total = total + torch.exp(z[i] @ z[j] / tau)
        terms = [z[i] @ z[j] / tau for j in range(len(z)) if j != i and labels[j] == y] + [z[i] @ c[y] / tau]
        losses.append(mean([torch.log(total) - s for s in terms]))
    return mean(losses)


@pytest.mark.parametrize("anchor", [True, False])
def test_balanced(anchor: bool) -> None:
    loss, prototypes = lnn.BalancedContrastiveLoss(0.2, count_anchor=anchor), embeddings(6, seed=1)
    assert_same(
        lambda z, c: loss(z, LABELS, c), lambda z, c: balanced(z, LABELS, c, 0.2, anchor), embeddings(), prototypes
    )
    views, labels = embeddings().view(6, 2, 6), LABELS[:6]
    flat = lambda x: torch.cat([x[:, 0], x[:, 1]])  # noqa: E731
    assert_same(
        lambda z, c: loss(z, labels, c),
        lambda z, c: balanced(flat(z), labels.repeat(2), c, 0.2, anchor),
        views,
        prototypes,
    )


@pytest.mark.parametrize("anchor", [True, False])
@pytest.mark.parametrize(
    "labels",
    [[0, 0, 0, 0], [-1, -1, -1, 0], [0, 1, 2, 3], [2, 2, -1, 0], [3]],
    ids=["one_class", "unlabelled", "singletons", "mixed", "one_row"],
)
def test_balanced_with_few_of_a_kind(labels: list[int], anchor: bool) -> None:
    loss, y = lnn.BalancedContrastiveLoss(0.3, count_anchor=anchor), torch.tensor(labels)
    for classes in (max(labels) + 1, 6):
        z, c = embeddings(len(labels)), embeddings(classes, seed=1)
        assert_same(lambda z, c: loss(z, y, c), lambda z, c: balanced(z, y, c, 0.3, anchor), z, c)
    z = z.requires_grad_()
    value = loss(z, torch.full((len(labels),), -1), c)
    value.backward()
    assert value == 0 and not z.grad.any()


@pytest.mark.parametrize("anchor", [True, False])
def test_balanced_of_other_dtypes(anchor: bool) -> None:
    """Sums of classes are float32; 16 bits are those of the gradient alone. A learned temperature gets its gradient."""
    tau = nn.Parameter(torch.tensor(0.2))
    loss, c = lnn.BalancedContrastiveLoss(tau, count_anchor=anchor), embeddings(6, seed=1)
    for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)):
        given = [x.to(dtype).requires_grad_() for x in (embeddings(), c)]
        wide = [x.detach().double().requires_grad_() for x in given]
        exact_tau = tau.detach().double().requires_grad_()
        exact = balanced(wide[0], LABELS, wide[1], exact_tau, anchor)
        value = loss(given[0], LABELS, given[1])
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
        got = torch.autograd.grad(value, [*given, tau])
        for x, y in zip(got, torch.autograd.grad(exact, [*wide, exact_tau]), strict=True):
            atol = 2e-6 * y.abs().max().item()
            torch.testing.assert_close(x.double(), y, rtol=max(rtol, 1e-5) * 1.01, atol=atol)


def test_balanced_under_vmap() -> None:
    loss = lnn.BalancedContrastiveLoss(0.2)
    z, y, c = embeddings(24).view(2, 12, 6), torch.stack([LABELS, LABELS.roll(1)]), embeddings(6, seed=1)
    looped = torch.stack([loss(z[i], y[i], c) for i in range(2)])
    torch.testing.assert_close(torch.vmap(lambda z, y: loss(z, y, c))(z, y), looped)


@pytest.mark.parametrize("anchor", [True, False])
@pytest.mark.parametrize("label", [-2, 6, 2**40])
def test_labels_that_no_check_sees_give_nan(label: int, anchor: bool) -> None:
    """Or an error of a kernel that can raise one; as on a GPU, where values are not read."""
    loss, labels, c = lnn.BalancedContrastiveLoss(0.2, count_anchor=anchor), LABELS.clone(), embeddings(6, seed=1)
    z, labels[3] = embeddings(), label
    try:
        value = torch.vmap(lambda y: loss(z, y, c))(labels[None])
    except ValueError as error:
        assert "expected labels" in str(error)
    else:
        assert value.isnan().all()
