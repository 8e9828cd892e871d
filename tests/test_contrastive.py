"""The contrastive loss against its formulas, written out row by row, and against published losses, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from contrastive_oracle import Case, assert_formulas, evaluate, formulas, public
from contrastive_problems import COMPLETE, FEATURES, LOGSUMEXP_FEATURES, describe, make_case, possible
from problems import covering_set
from torch import Tensor

import ltkernels.functional as LF

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"rows": (9, 1, 2, 3), "width": (4, 1), "dtype": (torch.float64,), "normalize": (False,)}
DEFINITION = covering_set(FEATURES | SMALL, possible)
LOGSUMEXP = covering_set({k: v for k, v in (LOGSUMEXP_FEATURES | SMALL).items() if k != "normalize"}, possible)


@pytest.mark.parametrize("features", DEFINITION, ids=describe)
def test_definition(features: dict) -> None:
    """Loss, statistics and gradients of every argument; all pairs of options occur."""
    assert_formulas(make_case(features), 1e-9 if features["temperature"] == "small" else 1e-11)


@pytest.mark.parametrize("features", LOGSUMEXP, ids=describe)
def test_logsumexp_definition(features: dict) -> None:
    assert_formulas(make_case(features), 1e-10)


@pytest.mark.parametrize("keys", ["self", "fewer", "more"])
@pytest.mark.parametrize("denominator", FEATURES["denominator"])
def test_normalized(denominator: str, keys: str) -> None:
    """``normalize`` is division by the length before everything else, and has its gradient."""
    features = COMPLETE | {"dtype": torch.float64, "positives": "labels_extra", "keys": keys}
    case = make_case(features | {"denominator": denominator, "sample_weight": "weight"})
    names = [name for name in ("query", "key", "extra_positive") if name in case.arguments]

    def by_hand(arguments: dict) -> dict:
        unit = {name: arguments[name] / arguments[name].square().sum(1, keepdim=True).sqrt() for name in names}
        return public(arguments | unit | {"normalize": False})

    case.arguments["normalize"] = True
    torch.testing.assert_close(evaluate(public, case), evaluate(by_hand, case), rtol=1e-11, atol=1e-12)
    value = Case(case.arguments)
    assert formulas(value)["loss"] == pytest.approx(public(case.arguments)["loss"].item(), rel=1e-12)


def test_vector_without_length() -> None:
    """A row of zeros has no direction: it stays 0 and gets no gradient."""
    x = torch.randn(6, 4, dtype=torch.float64)
    x[2] = 0
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    results = evaluate(public, Case({"query": x, "temperature": 0.1, "labels": y, "normalize": True}, ("query",)))
    assert results["loss"].isfinite() and results["positive"][2] == 0
    assert not results["dquery"][2].any() and results["dquery"].isfinite().all()


# ------------------------------------------------------------------------------------------------- one row, on paper


def one_row(**options: object) -> tuple[float, LF.ContrastiveStats | tuple]:
    """Logits log 8, log 4, log 2 and log 1 at temperature 1/2; keys 0 and 1 are positives."""
    query, key = torch.ones(1, 1).double(), torch.tensor([[8.0], [4.0], [2.0], [1.0]], dtype=torch.float64).log() / 2
    given = {"labels": torch.tensor([7]), "key_labels": torch.tensor([7, 7, 3, -1]), "temperature": 0.5} | options
    loss, stats = LF.contrastive_loss(query, key, **given, return_stats=True)
    return loss.item(), stats


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, math.log(15) - math.log(32) / 2),
        ({"denominator": "negatives"}, math.log(3) - math.log(32) / 2),
        ({"denominator": "own"}, (math.log(1 + 3 / 8) + math.log(1 + 3 / 4)) / 2),
        ({"allowed": torch.tensor([True, False, True, True])}, math.log(11) - math.log(8)),
        ({"allowed": torch.tensor([[False, True, True, False]])}, math.log(6) - math.log(4)),
        ({"key_bias": torch.tensor([-math.inf, 0.0, math.log(3), 0.0])}, math.log(11) - math.log(32) / 2),
        ({"scale_by_temperature": True}, (math.log(15) - math.log(32) / 2) / 2),
        ({"extra_positive": torch.tensor([[math.log(4)]], dtype=torch.float64)}, math.log(31) - math.log(512) / 3),
        ({"labels": None, "key_labels": None, "positive_index": torch.tensor([2])}, math.log(15) - math.log(2)),
        ({"sample_weight": torch.tensor([3.0]), "reduction": "sum"}, 3 * (math.log(15) - math.log(32) / 2)),
        ({"sample_weight": torch.tensor([3.0]), "reduction": "mean"}, math.log(15) - math.log(32) / 2),
        ({"labels": torch.tensor([-1])}, 0.0),
        ({"labels": torch.tensor([9])}, 0.0),
        ({"denominator": "negatives", "allowed": torch.tensor([True, True, False, False])}, 0.0),
        ({"denominator": "own", "key_bias": torch.tensor([0.0, 0.0, -math.inf, -math.inf])}, 0.0),
    ],
)
def test_one_row(options: dict, want: float) -> None:
    assert one_row(**options)[0] == pytest.approx(want, rel=1e-6 if "key_bias" in options else 1e-12, abs=1e-14)


def test_pair_margin_of_one_row() -> None:
    """rho[7, 3] for the key of label 3 and rho[7, 7] for those of label 7; none for the key without a label."""
    rho = torch.zeros(8, 8, dtype=torch.float64)
    rho[7, 3], rho[7, 7], rho[3, 7] = math.log(10), math.log(2), 100.0
    assert one_row(pair_margin=rho)[0] == pytest.approx(math.log(16 + 8 + 20 + 1) - math.log(32) / 2, rel=1e-12)
    loss, _ = one_row(pair_margin=rho, labels=torch.tensor([-1]), extra_positive=torch.zeros(1, 1).double())
    assert loss == pytest.approx(math.log(8 + 4 + 2 + 1 + 1), rel=1e-12)


def test_statistics_of_one_row() -> None:
    _, stats = one_row()
    want = [math.log(15) - math.log(32) / 2, math.log(15), math.log(32) / 2]
    want.append((8 * math.log(8) + 4 * math.log(4) + 2 * math.log(2)) / 15)
    assert stats._fields == ("row_loss", "logsumexp", "positive", "expected")
    assert [x.item() for x in stats] == pytest.approx(want, rel=1e-12)
    assert [x.item() for x in one_row(labels=torch.tensor([-1]))[1]] == pytest.approx(
        [0, math.log(15), 0, want[3]], rel=1e-12
    )
    _, nothing = one_row(denominator="negatives", allowed=torch.tensor([True, True, False, False]))
    assert [x.item() for x in nothing] == pytest.approx([0, -math.inf, math.log(32) / 2, 0], rel=1e-12)


def test_moving_average_of_one_row() -> None:
    """iSogCLR: weights exp(l - S - nu) of the negatives, not normalized, times similarity differences."""
    s = math.log(32) / 2
    weights = [2 / math.exp(s + 0.3), 1 / math.exp(s + 0.3)]
    want = sum(w * (math.log(x) / 2 - s / 2) for w, x in zip(weights, (2, 1), strict=True))
    loss, _ = one_row(denominator="negatives", log_normalizer=torch.tensor([0.3], dtype=torch.float64))
    assert loss == pytest.approx(want, rel=1e-12)


# -------------------------------------------------------------------------------------------------- published losses

M, D = 12, 5


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same_value_and_gradients(got: object, want: object, *leaves: Tensor) -> None:
    results = []
    for function in (got, want):
        copies = [x.clone().requires_grad_() for x in leaves]
        loss = function(*copies)
        results.append([loss, *torch.autograd.grad(loss, copies)])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("layout", ["stacked", "interleaved"])
def test_nt_xent(layout: str) -> None:
    """SimCLR: the cross-entropy of cosine similarities without the diagonal, the target being the other view."""
    index = LF.view_pairs(M, layout)
    assert all(index[index[i]] == i and index[i] != i for i in range(M))

    def by_hand(z: Tensor) -> Tensor:
        z = F.normalize(z, dim=1)
        return F.cross_entropy((z @ z.T / 0.2).masked_fill(torch.eye(M, dtype=torch.bool), -torch.inf), index)

    def ours(z: Tensor) -> Tensor:
        return LF.contrastive_loss(z, temperature=0.2, positive_index=index, normalize=True)

    same_value_and_gradients(ours, by_hand, randn(M, D))


def test_supervised_contrastive() -> None:
    """The authors' code: https://github.com/HobbitLong/SupContrast, losses.py, with base temperature as temperature."""
    views, y = randn(M // 2, 2, D), torch.tensor([0, 1, 0, 2, 2, 0])

    def authors(features: Tensor, temperature: float = 0.1, base_temperature: float = 0.1) -> Tensor:
        features = F.normalize(features, dim=2)
        mask = torch.eq(y[:, None], y[None]).double()
        contrast = torch.cat(torch.unbind(features, dim=1), dim=0)
        anchor_dot_contrast = contrast @ contrast.T / temperature
        logits = anchor_dot_contrast - anchor_dot_contrast.max(1, keepdim=True).values.detach()
        logits_mask = 1 - torch.eye(M, dtype=torch.float64)
        mask = mask.repeat(2, 2) * logits_mask
        log_prob = logits - (logits.exp() * logits_mask).sum(1, keepdim=True).log()
        return -(temperature / base_temperature) * ((mask * log_prob).sum(1) / mask.sum(1)).mean()

    def ours(features: Tensor) -> Tensor:
        z, labels = LF.stack_views(features, y)
        return LF.contrastive_loss(z, temperature=0.1, labels=labels, normalize=True)

    same_value_and_gradients(ours, authors, views)
    same_value_and_gradients(
        lambda v: LF.contrastive_loss(
            LF.stack_views(v)[0], temperature=0.1, labels=LF.stack_views(v, y)[1], normalize=True,
            scale_by_temperature=True,
        ),
        lambda v: authors(v, base_temperature=1.0),
        views,
    )  # fmt: skip


def test_decoupled() -> None:
    """DCL: the positive pair is no term of the denominator."""
    index = LF.view_pairs(M)

    def by_hand(z: Tensor) -> Tensor:
        z = F.normalize(z, dim=1)
        s, rows = z @ z.T / 0.2, torch.arange(M)
        negatives = ~torch.eye(M, dtype=torch.bool)
        negatives[rows, index] = False
        return (-s[rows, index] + (s.exp() * negatives).sum(1).log()).mean()

    same_value_and_gradients(
        lambda z: LF.contrastive_loss(
            z, temperature=0.2, positive_index=index, normalize=True, denominator="negatives"
        ),
        by_hand,
        randn(M, D),
    )  # fmt: skip


def test_momentum_contrast() -> None:
    """MoCo's code: logits are those of the positive beside those of the queue, and the target is class 0."""
    queue = randn(40, D, seed=2)

    def by_hand(q: Tensor, k: Tensor) -> Tensor:
        logits = torch.cat([torch.einsum("nc,nc->n", q, k)[:, None], torch.einsum("nc,kc->nk", q, queue)], 1)
        return F.cross_entropy(logits / 0.07, torch.zeros(M, dtype=torch.long))

    same_value_and_gradients(
        lambda q, k: LF.contrastive_loss(q, queue, temperature=0.07, extra_positive=k),
        by_hand,
        F.normalize(randn(M, D)),
        F.normalize(randn(M, D, seed=1)),
    )


def test_own_denominators() -> None:
    """pytorch-metric-learning's NTXentLoss of one row: each positive pair beside that row's negatives."""
    z, y = randn(M, D), torch.arange(M) % 3

    def by_hand(z: Tensor) -> Tensor:
        s, rows = z @ z.T / 0.7, []
        for i in range(M):
            negatives = torch.stack([s[i, j] for j in range(M) if y[j] != y[i]]).exp().sum()
            terms = [-(s[i, p].exp() / (s[i, p].exp() + negatives)).log() for p in range(M) if p != i and y[p] == y[i]]
            rows.append(sum(terms) / len(terms))
        return torch.stack(rows).mean()

    same_value_and_gradients(lambda z: LF.contrastive_loss(z, temperature=0.7, labels=y, denominator="own"), by_hand, z)


def test_balanced() -> None:
    """BCL: exponentials averaged within each class, by c_j = -log(number of keys of j's class)."""
    z, y = randn(M, D), torch.tensor([0] * 6 + [1] * 4 + [2] * 2)
    key, key_labels = randn(M + 3, D, seed=1), torch.cat([y, torch.arange(3)])
    count = torch.bincount(key_labels)

    def by_hand(q: Tensor, k: Tensor) -> Tensor:
        s = q @ k.T / 0.5
        averages = torch.stack([s[:, key_labels == c].exp().mean(1) for c in range(3)], 1).sum(1)
        return (averages.log() - torch.stack([s[i, key_labels == y[i]].mean() for i in range(M)])).mean()

    bias = -count[key_labels].double().log()
    same_value_and_gradients(
        lambda q, k: LF.contrastive_loss(q, k, temperature=0.5, labels=y, key_labels=key_labels, key_bias=bias),
        by_hand,
        z,
        key,
    )


def test_logsumexp_is_the_building_block() -> None:
    """Losses put together from it equal the loss of the library."""
    z, index, y = F.normalize(randn(M, D)), LF.view_pairs(M), torch.arange(M) % 3
    tau = torch.linspace(0.1, 1, M, dtype=torch.float64)

    def nt_xent(z: Tensor, tau: Tensor) -> Tensor:
        return (LF.similarity_logsumexp(z, temperature=tau) - (z * z[index]).sum(1) / tau).mean()

    same_value_and_gradients(
        lambda z, tau: LF.contrastive_loss(z, temperature=tau, positive_index=index), nt_xent, z, tau
    )

    def negatives(z: Tensor, tau: Tensor) -> Tensor:
        sums = torch.stack([z[(y == y[i]) & (torch.arange(M) != i)].mean(0) for i in range(M)])
        lse = LF.similarity_logsumexp(z, temperature=tau, labels=y, exclude="same_label")
        return (lse - (z * sums).sum(1) / tau).mean()

    same_value_and_gradients(
        lambda z, tau: LF.contrastive_loss(z, temperature=tau, labels=y, denominator="negatives"), negatives, z, tau
    )
