"""The contrastive loss modules against the formulas of their papers, one pair of rows at a time in float64."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ltkernels.functional as LF
from ltkernels import nn as lnn

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = torch.tensor([0, 1, 0, 2, 2, 0, 3, 1, -1, -1, 2, 0])  # 3 alone, -1 twice


def embeddings(rows: int = 12, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


def positives(labels: Tensor) -> list[list[int]]:
    y = labels.tolist()
    return [[p for p in range(len(y)) if p != i and y[p] == y[i] >= 0] for i in range(len(y))]


def supervised(z: Tensor, labels: Tensor, tau: float | Tensor, weight: Tensor | None = None) -> Tensor:
    """SupCon, the sum outside: -1/|P| sum_p log(exp(s_ip) / sum_{a != i} exp(s_ia)), over rows with a positive."""
    z = F.normalize(z, dim=1)
    losses, weights = [], []
    for i, p_of_i in enumerate(positives(labels)):
        if not p_of_i:
            continue
        t = tau[i] if isinstance(tau, Tensor) and tau.dim() else tau
        total = sum(torch.exp(z[i] @ z[a] / t) for a in range(len(z)) if a != i)
        losses.append(mean([-torch.log(torch.exp(z[i] @ z[p] / t) / total) for p in p_of_i]))
        weights.append(1.0 if weight is None else float(weight[i]))
    return sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)


def pairwise(z: Tensor, labels: Tensor, tau: float) -> Tensor:
    """pytorch-metric-learning's NT-Xent: every pair against the negatives of its anchor, averaged over pairs."""
    z = F.normalize(z, dim=1)
    losses = []
    for i, p_of_i in enumerate(positives(labels)):
        negatives = sum(torch.exp(z[i] @ z[a] / tau) for a in range(len(z)) if a != i and a not in p_of_i)
        for p in p_of_i:
            own = torch.exp(z[i] @ z[p] / tau)
            losses.append(-torch.log(own / (own + negatives)))
    return mean(losses)


def two_views(samples: int, layout: str = "stacked") -> Tensor:
    """Labels under which the positives are the views."""
    return torch.arange(samples).repeat(2) if layout == "stacked" else torch.arange(samples).repeat_interleave(2)


def assert_same(one: Callable[..., Tensor], other: Callable[..., Tensor], *inputs: Tensor, rtol: float = 1e-9) -> None:
    """Values, and gradients of every input."""
    results = []
    for function in (one, other):
        given = [x.clone().requires_grad_() for x in inputs]
        value = function(*given)
        results.append([value.detach(), *torch.autograd.grad(value, given)])
    assert all(x.abs().sum() > 0 for x in results[1])
    torch.testing.assert_close(results[0], results[1], rtol=rtol, atol=1e-10)


@pytest.mark.parametrize("tau", [0.07, 0.5])
def test_ntxent_over_rows(tau: float) -> None:
    loss = lnn.NTXentLoss(tau)
    for layout in ("stacked", "interleaved"):
        views = two_views(6, layout)
        assert_same(lnn.NTXentLoss(tau, layout=layout), lambda z, y=views: supervised(z, y, tau), embeddings())
    assert_same(lambda z: loss(z, LABELS), lambda z: supervised(z, LABELS, tau), embeddings())
    index = LF.view_pairs(12, "interleaved")
    assert_same(lambda z: loss(z, positive_index=index), lnn.NTXentLoss(tau, layout="interleaved"), embeddings())


@pytest.mark.parametrize("tau", [0.07, 0.5])
def test_ntxent_over_pairs(tau: float) -> None:
    loss = lnn.NTXentLoss(tau, average="pairs")
    assert_same(lambda z: loss(z, LABELS), lambda z: pairwise(z, LABELS, tau), embeddings())
    assert_same(loss, lambda z: pairwise(z, two_views(6), tau), embeddings())
    # Rows and pairs differ with unequal numbers of positives.
    assert not torch.isclose(loss(embeddings(), LABELS), LF.contrastive_loss(
        embeddings(), temperature=tau, labels=LABELS, denominator="own", normalize=True
    ))  # fmt: skip


def test_float32_pairs() -> None:
    value = lnn.NTXentLoss(0.2, "pairs")(embeddings().float(), LABELS)
    torch.testing.assert_close(value, pairwise(embeddings(), LABELS, 0.2).float())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16], ids=str)
def test_integers_of_any_width(dtype: torch.dtype) -> None:
    """The numbers count, not their type: an index of uint8 is a mask for torch, and -1 is 255 in it."""
    z, prototypes = embeddings(), embeddings()[:9]
    rows = len(z)
    labels = LABELS.clamp(min=0)
    mates = torch.arange(rows).roll(-1)  # no row is its own, and 0 occurs: a mask of uint8 would drop a row
    moco = {kind: lnn.MoCoLoss(z.shape[1], 3 * rows, dtype=z.dtype) for kind in (torch.int64, dtype)}
    moco[dtype].load_state_dict(moco[torch.int64].state_dict())
    for kind, loss in moco.items():
        loss.enqueue(z.flip(0), labels.to(kind))
    tau = torch.linspace(0.1, 0.9, rows).double()
    calls = [
        lambda i: lnn.NTXentLoss(0.2, "pairs")(z, i(labels)),
        lambda i: lnn.NTXentLoss(0.2)(z, None, i(mates)),
        lambda i: lnn.SupConLoss(0.2)(z, i(labels)),
        lambda i: lnn.TemperatureContrastiveLoss(tau)(z, i(mates), i(labels)),
        lambda i: lnn.MACLLoss()(z, i(mates)),
        lambda i: lnn.ISogCLRLoss(rows, 0.3)(z, i(mates[: rows // 2])),
        lambda i: lnn.BalancedContrastiveLoss()(z, i(labels), prototypes),
        lambda i: moco[i(mates).dtype](z, z.roll(1, 0), i(labels)),
    ]
    for call in calls:
        assert torch.equal(call(lambda x: x.to(dtype)), call(lambda x: x))


@pytest.mark.parametrize("average", ["rows", "pairs"])
def test_nothing_to_contrast_gives_zero(average: str) -> None:
    z = embeddings().requires_grad_()
    value = lnn.NTXentLoss(0.1, average)(z, torch.arange(12))
    value.backward()
    assert value == 0 and not z.grad.any()
    assert lnn.SupConLoss(0.1)(embeddings(), torch.full((12,), -1)) == 0


def test_without_normalisation() -> None:
    z, loss = 0.5 * embeddings(), lnn.NTXentLoss(0.5, normalize=False)
    value = torch.stack([
        torch.cat([z[i] @ z[:i].T, z[i] @ z[i + 1 :].T]).div(0.5).logsumexp(0) - z[i] @ z[(i + 6) % 12] / 0.5
        for i in range(12)
    ]).mean()  # fmt: skip
    torch.testing.assert_close(loss(z), value)
    assert not torch.isclose(loss(z), lnn.NTXentLoss(0.5)(z))


def test_supcon() -> None:
    loss = lnn.SupConLoss(0.2)
    assert_same(lambda z: loss(z, LABELS), lambda z: supervised(z, LABELS, 0.2), embeddings())
    authors = lnn.SupConLoss(0.2, base_temperature=0.07)
    assert_same(lambda z: authors(z, LABELS), lambda z: 0.2 / 0.07 * supervised(z, LABELS, 0.2), embeddings())


@pytest.mark.parametrize("views", [1, 2, 3])
def test_supcon_of_views(views: int) -> None:
    """(N, V, D) as in the authors' code: contrast mode "all"."""
    z, labels = embeddings(4 * views).view(4, views, 6), torch.tensor([0, 1, 0, 2])
    flat = lambda x: torch.cat([x[:, v] for v in range(views)])  # noqa: E731
    loss = lnn.SupConLoss(0.3)
    assert_same(lambda x: loss(x, labels), lambda x: supervised(flat(x), labels.repeat(views), 0.3), z)
    if views > 1:
        alone = torch.arange(4).repeat(views)
        assert_same(loss, lambda x: supervised(flat(x), alone, 0.3), z)
        assert_same(lnn.NTXentLoss(0.3, "pairs"), lambda x: pairwise(flat(x), alone, 0.3), z)


def test_learned_temperature() -> None:
    tau = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    loss = lnn.SupConLoss(tau)
    assert dict(loss.named_parameters()).keys() == {"temperature"}
    assert_same(
        lambda z, t: torch.func.functional_call(loss, {"temperature": t}, (z, LABELS)),
        lambda z, t: supervised(z, LABELS, t),
        embeddings(),
        tau.detach(),
    )
    loss(embeddings(), LABELS).backward()
    assert tau.grad != 0


def test_scheduled_temperature() -> None:
    loss = lnn.TemperatureScheduledLoss(t_max=200)
    z = embeddings()
    for epoch, tau in ((0, 1.0), (100, 0.55), (200, 0.1), (300, 0.55), (400, 1.0), (50, 0.1 + 0.45 * (1 + 0.5**0.5))):
        loss.set_epoch(epoch)
        torch.testing.assert_close(loss.temperature.item(), tau, rtol=1e-6, atol=0)
        torch.testing.assert_close(loss(z), supervised(z, two_views(6), tau), rtol=1e-5, atol=0)
    loss = lnn.TemperatureScheduledLoss(10, 0.2, 0.4, average="pairs", layout="interleaved").double()
    loss.set_epoch(2.5)
    tau = 0.3 + 0.1 * math.cos(math.pi / 4)
    torch.testing.assert_close(loss(z, LABELS), pairwise(z, LABELS, tau))
    torch.testing.assert_close(loss(z), pairwise(z, two_views(6, "interleaved"), tau))


@pytest.mark.parametrize("layout", ["stacked", "interleaved"])
def test_temperature_of_each_sample(layout: str) -> None:
    generator = torch.Generator().manual_seed(1)
    tau, u = torch.rand(40, generator=generator).double() + 0.1, torch.rand(40, generator=generator).double()
    loss = lnn.TemperatureContrastiveLoss(tau, u, layout=layout)
    index = torch.tensor([39, 0, 7, 7, 3, 21])
    rows = index.repeat(2) if layout == "stacked" else index.repeat_interleave(2)
    views = two_views(6, layout)
    expected = lambda z: supervised(z, views, tau[rows], u[rows])  # noqa: E731
    assert_same(lambda z: loss(z, index), expected, embeddings())
    assert_same(lambda z: loss(z, rows), expected, embeddings())
    assert_same(lambda z: loss(z, index, positive_index=LF.view_pairs(12, layout)), expected, embeddings())
    every = torch.arange(12)
    assert_same(lambda z: loss(z, every, LABELS), lambda z: supervised(z, LABELS, tau[:12], u[:12]), embeddings())


@pytest.mark.parametrize("layout", ["stacked", "interleaved"])
@pytest.mark.parametrize("views", [2, 3])
def test_temperature_of_each_sample_with_views(views: int, layout: str) -> None:
    """(N, V, D), whatever the layout of rows: one number for all views of a sample."""
    tau, u = torch.linspace(0.1, 0.9, 12).double(), torch.linspace(2, 1, 12).double()
    loss, index = lnn.TemperatureContrastiveLoss(tau, u, layout=layout), torch.tensor([7, 0, 11, 3])
    flat = lambda x: torch.cat([x[:, v] for v in range(views)])  # noqa: E731
    rows, z = index.repeat(views), embeddings(4 * views).view(4, views, 6)
    alone, labels = torch.arange(4).repeat(views), torch.tensor([0, 1, 0, 2])
    assert_same(lambda x: loss(x, index), lambda x: supervised(flat(x), alone, tau[rows], u[rows]), z)
    expected = lambda x: supervised(flat(x), labels.repeat(views), tau[rows], u[rows])  # noqa: E731
    assert_same(lambda x: loss(x, index, labels), expected, z)


@pytest.mark.parametrize("layout", ["stacked", "interleaved"])
def test_two_views_as_a_dimension(layout: str) -> None:
    """(N, 2, D) is the same as the rows in the module's layout, state included."""
    views, index = embeddings().view(6, 2, 6), torch.tensor([4, 0, 7, 3, 9, 1])
    rows = lambda x: x.flatten(0, 1) if layout == "interleaved" else torch.cat([x[:, 0], x[:, 1]])  # noqa: E731
    macl = lnn.MACLLoss(0.2, layout=layout)
    assert_same(macl, lambda x: macl(rows(x)), views)
    losses = [lnn.ISogCLRLoss(12, 0.3, layout=layout) for _ in range(2)]
    for _ in range(2):
        assert_same(lambda x: losses[0](x, index), lambda x: losses[1](rows(x), index), views)
    assert torch.equal(losses[0].temperature, losses[1].temperature) and (losses[0].temperature[index] != 0.1).all()


def test_set_temperature_and_weight() -> None:
    first, second = torch.full((12,), 0.5), torch.linspace(0.1, 0.6, 12)
    loss = lnn.TemperatureContrastiveLoss(first)
    z, index = embeddings(), torch.arange(12)
    torch.testing.assert_close(loss(z, index), supervised(z, two_views(6), 0.5), rtol=1e-6, atol=0)
    memory = loss.temperature.data_ptr(), loss.sample_weight.data_ptr()
    loss.set_temperature(second)
    loss.set_sample_weight(index.float())
    expected = supervised(z, two_views(6), second.double(), index.double())
    torch.testing.assert_close(loss(z, index), expected, rtol=1e-6, atol=0)
    assert memory == (loss.temperature.data_ptr(), loss.sample_weight.data_ptr()) and (first == 0.5).all()
    with pytest.raises(ValueError, match=r"^temperature: expected finite values above 0, got 0 for sample 0"):
        loss.set_temperature(index.float())
    with pytest.raises(ValueError, match=r"^sample_weight: expected shape \(12,\), got \(3,\)"):
        loss.set_sample_weight(torch.ones(3))


def test_macl() -> None:
    """InfoNCE weighted by 1 / (1 - P), both the weight and the temperature constant: the same gradient."""

    def weighted(z: Tensor, tau0: float, alpha: float, threshold: float, layout: str) -> Tensor:
        z = F.normalize(z, dim=1)
        pair = LF.view_pairs(12, layout)
        tau = tau0 * (1 + alpha * (mean([z[i] @ z[pair[i]] for i in range(12)]).detach() - threshold))
        losses = []
        for i in range(12):
            total = sum(torch.exp(z[i] @ z[j] / tau) for j in range(12) if j != i)
            p = torch.exp(z[i] @ z[pair[i]] / tau) / total
            losses.append(-torch.log(p) / (1 - p).detach())
        return mean(losses)

    for layout in ("stacked", "interleaved"):
        z, other = embeddings().requires_grad_(), embeddings().requires_grad_()
        loss = lnn.MACLLoss(0.2, 0.7, 0.1, layout=layout)
        loss(z).backward()
        weighted(other, 0.2, 0.7, 0.1, layout).backward()
        torch.testing.assert_close(z.grad, other.grad)
        torch.testing.assert_close(loss(z, LF.view_pairs(12, layout)), loss(z))
    unit = F.normalize(embeddings(), dim=1)
    tau = 0.1 * (1 + 0.5 * (unit * unit.roll(6, 0)).sum(1).mean().item())
    assert_same(
        lnn.MACLLoss(),
        lambda z: LF.contrastive_loss(
            z, temperature=tau, positive_index=LF.view_pairs(12), denominator="negatives", normalize=True
        ),
        embeddings(),
    )


class ISogCLRByHand:
    """The update rule of the module's docstring, without logarithms, one sample at a time."""

    def __init__(self, samples: int, rho: float, gamma: float, eta: float, beta: float, clip: float) -> None:
        self.tau, self.s, self.v = [0.3] * samples, [None] * samples, [0.0] * samples
        self.rho, self.gamma, self.eta, self.beta, self.clip = rho, gamma, eta, beta, clip

    def __call__(self, z: Tensor, index: list[int], update: bool = True) -> Tensor:
        z, batch = F.normalize(z, dim=1), len(index)
        losses = []
        for b, n in enumerate(index):
            rows = []
            for i, p in ((b, b + batch), (b + batch, b)):
                h = [z[i] @ z[j] - z[i] @ z[p] for j in range(2 * batch) if j not in (i, p)]
                rows.append((h, [math.exp(x.item() / self.tau[n]) for x in h]))
            g = sum(sum(e) / len(e) for _, e in rows) / 2
            s = g if self.s[n] is None else (1 - self.gamma) * self.s[n] + self.gamma * g
            slope = 0.0
            for h, e in rows:
                losses.append(sum(x * w / s for x, w in zip(h, e, strict=True)) / len(h))
                slope += sum(w / s * x.item() / self.tau[n] for x, w in zip(h, e, strict=True)) / len(h) / 2
            if update:
                gradient = math.log(s) + self.rho - slope
                self.s[n] = s
                self.v[n] = (1 - self.beta) * self.v[n] + self.beta * max(-self.clip, min(self.clip, gradient))
                self.tau[n] = max(0.05, min(1.0, self.tau[n] - self.eta * self.v[n]))
        return mean(losses)


@pytest.mark.parametrize("layout", ["stacked", "interleaved"])
@pytest.mark.parametrize("gamma", [0.4, 1.0])
def test_isogclr(layout: str, gamma: float) -> None:
    settings = dict(rho=0.2, gamma=gamma, beta=0.7)
    loss = lnn.ISogCLRLoss(
        20, temperature=0.3, learning_rate=0.05, gradient_clip=1.5, layout=layout, **settings
    ).double()  # fmt: skip
    loss.temperature.fill_(0.3)  # the float32 one is another number
    hand = ISogCLRByHand(20, eta=0.05, clip=1.5, **settings)
    order = two_views(6).argsort(stable=True) if layout == "interleaved" else torch.arange(12)
    moved = []
    for step, index in enumerate(([0, 1, 2, 3, 4, 5], [3, 19, 0, 7, 8, 5], [5, 4, 3, 2, 1, 0])):
        z, other = embeddings(seed=step).requires_grad_(), embeddings(seed=step).requires_grad_()
        value, expected = loss(z[order], torch.tensor(index)), hand(other, index)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value, z), torch.autograd.grad(expected, other))
        torch.testing.assert_close(loss.temperature.tolist(), hand.tau)
        torch.testing.assert_close(loss.averaged_gradient.tolist(), hand.v)
        seen = [math.log(s) if s is not None else -math.inf for s in hand.s]
        torch.testing.assert_close(loss.log_average.tolist(), seen)
        moved.append(loss.temperature.clone())
    assert not torch.equal(moved[0], moved[2])
    loss.eval()
    value = loss(embeddings(seed=9)[order], torch.arange(6))
    torch.testing.assert_close(value, hand(embeddings(seed=9), list(range(6)), update=False))
    torch.testing.assert_close(loss.temperature, moved[2], rtol=0, atol=0)


def test_isogclr_keeps_temperatures_in_their_range() -> None:
    for rho, bound in ((5.0, 0.08), (0.0, 0.12)):
        loss = lnn.ISogCLRLoss(6, rho, temperature=0.1, temperature_range=(0.08, 0.12), learning_rate=1.0)
        loss(embeddings().float(), torch.arange(6))
        torch.testing.assert_close(loss.temperature, torch.full((6,), bound))


def test_isogclr_with_the_whole_batch_descends_on_its_objective() -> None:
    """gamma = 1: both gradients are those of tau log mean exp(h / tau) + tau rho."""
    z = embeddings().requires_grad_()
    loss = lnn.ISogCLRLoss(6, rho=0.3, temperature=0.25, gamma=1.0, beta=1.0, learning_rate=1e-3).double()
    tau = torch.full((6,), 0.25, dtype=torch.float64, requires_grad=True)
    unit = F.normalize(z, dim=1)
    total = 0
    for b in range(6):
        both = []
        for i, p in ((b, b + 6), (b + 6, b)):
            both += [torch.exp((unit[i] @ unit[j] - unit[i] @ unit[p]) / tau[b]) for j in range(12) if j not in (i, p)]
        total = total + tau[b] * torch.log(mean(both)) + tau[b] * 0.3
    expected = torch.autograd.grad(total, (z, tau))
    value = loss(z, torch.arange(6))
    torch.testing.assert_close(torch.autograd.grad(value, z)[0], expected[0] / 6)
    torch.testing.assert_close(loss.temperature, 0.25 - 1e-3 * expected[1])


def moco(query: Tensor, key: Tensor, queue: Tensor, tau: float) -> Tensor:
    """The authors': cross-entropy of one positive logit before those of the queue."""
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1).detach()
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / tau
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64))


@pytest.mark.parametrize(("size", "batches"), [(12, [4, 4, 4, 4]), (10, [4, 4, 4, 4, 3]), (5, [5, 2, 5, 1])])
def test_moco_queue(size: int, batches: list[int]) -> None:
    """First in, first out, also where batches do not divide the queue."""
    loss = lnn.MoCoLoss(6, size, temperature=0.2, dtype=torch.float64)
    kept = list(loss.queue.clone())
    torch.testing.assert_close(loss.queue.norm(dim=1), torch.ones(size, dtype=torch.float64))
    labels_kept = [-1] * size
    for step, count in enumerate(batches):
        query, key = embeddings(count, seed=step), embeddings(count, seed=100 + step)
        labels = torch.arange(count) % 3
        old = torch.stack(kept)
        assert_same(lambda q, k=key: loss(q, k), lambda q, k=key, old=old: moco(q, k, old, 0.2), query)
        loss.enqueue(key, labels if step % 2 else None)
        kept = (kept + list(F.normalize(key, dim=1)))[count:]
        labels_kept = (labels_kept + (labels.tolist() if step % 2 else [-1] * count))[count:]
        assert loss.pointer == sum(batches[: step + 1]) % size
        torch.testing.assert_close(loss.queue.roll(-int(loss.pointer), 0), torch.stack(kept))
        assert loss.queue_labels.roll(-int(loss.pointer)).tolist() == labels_kept


def test_moco_with_labels() -> None:
    loss = lnn.MoCoLoss(6, 9, temperature=0.3, dtype=torch.float64)
    loss.enqueue(embeddings(7, seed=5), torch.tensor([0, 1, 1, 2, -1, 0, 0]))
    query, key, labels = embeddings(4), embeddings(4, seed=1), torch.tensor([0, 2, -1, 3])

    def by_hand(q: Tensor) -> Tensor:
        q, k = F.normalize(q, dim=1), F.normalize(key, dim=1)
        losses = []
        for i, y in enumerate(labels.tolist()):
            s = torch.cat([(q[i] @ k[i])[None], loss.queue @ q[i]]) / 0.3
            own = [0] + [1 + j for j in range(9) if loss.queue_labels[j] == y >= 0]
            losses.append(mean([s.exp().sum().log() - s[p] for p in own]))
        return mean(losses)

    assert_same(lambda q: loss(q, key, labels), by_hand, query)
    assert not torch.isclose(loss(query, key, labels), loss(query, key))


def test_moco_keys_get_no_gradient() -> None:
    loss = lnn.MoCoLoss(6, 20)
    query, key = embeddings(4).float().requires_grad_(), embeddings(4, seed=1).float().requires_grad_()
    loss(query, key).backward()
    assert key.grad is None and query.grad.abs().sum() > 0
    loss.enqueue(key)
    assert not loss.queue.requires_grad


def test_moco_with_a_queue_that_changes_before_backward() -> None:
    """The right gradient where it was computed with the loss already, else an error: never a wrong one."""
    loss = lnn.MoCoLoss(6, 5)
    query, key = embeddings(4).float().requires_grad_(), embeddings(4, seed=1).float()
    expected = torch.autograd.grad(loss(query, key), query)
    value = loss(query, key)
    loss.enqueue(key)
    try:
        gradient = torch.autograd.grad(value, query)
    except RuntimeError as error:
        assert "inplace operation" in str(error)
    else:
        torch.testing.assert_close(gradient, expected)


@pytest.mark.skipif(os.environ.get("LTKERNELS_BACKEND") == "reference", reason="runs these files")
def test_the_definition_gives_the_same_losses(run_python: Callable[..., str]) -> None:
    """The modules on the plain-torch backend, which serves the devices that no kernel is written for."""
    files = [str(Path(__file__).with_name(name)) for name in (Path(__file__).name, "test_nn_balanced_contrastive.py")]
    assert " passed" in run_python("-m", "pytest", "-q", *files, LTKERNELS_BACKEND="reference")
