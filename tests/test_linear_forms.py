"""The linear form: statistics of samples, shapes and layouts of its inputs, and the memory it needs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracle import definition
from peak_memory import PRELUDE
from torch import Tensor

import ltkernels.functional as LF
from ltkernels import reference
from ltkernels.neighbors import NeighborMap

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
N, D, C = 23, 6, 9
TARGETS = 4
MAP = NeighborMap.from_pairs([(0, 4), (0, 6), (1, 5), (1, 6), (3, 7)], num_classes=TARGETS, num_auxiliary=C - TARGETS)
COUNTS = torch.tensor([500.0, 300, 120, 70, 40, 22, 9, 4, 1], dtype=torch.float64)
Y = torch.randint(C, (N,), generator=torch.Generator().manual_seed(0))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("cosine", [False, True], ids=["linear", "cosine"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(dtype: torch.dtype, cosine: bool) -> None:
    x, w, u = randn(N, D, dtype=dtype), randn(C, D, seed=1, dtype=dtype), torch.rand(N) + 0.5
    # Class 0 is longer than the others, which decides about logits but not about cosines.
    w[0] *= 4
    y = Y.clone()
    y[3] = -100
    options = {"sample_weight": u, "logit_bias": 100 * torch.arange(C).float(), "cosine": cosine, "chunk_size": 7}
    loss, stats = LF.linear_margin_cross_entropy(
        x.requires_grad_(), w.requires_grad_(), y, return_stats=True, label_smoothing=0.1, **options
    )
    rows = LF.linear_margin_cross_entropy(x, w, y, reduction="none", label_smoothing=0.1, **options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert stats.row_loss.dtype == wide and stats.predicted.dtype == torch.int64 and stats.correct.dtype == torch.bool
    torch.testing.assert_close(stats.row_loss, rows.detach())
    logits = reference.linear_logits(x.detach().to(wide), w.detach().to(wide), None, cosine)
    first, second = logits.topk(2).values.unbind(1)
    clear = first - second > 16 * torch.finfo(dtype).eps * first.abs()  # the logits are rounded
    assert clear.sum() > N // 2
    assert torch.equal(stats.predicted[clear], logits.argmax(1)[clear])
    assert torch.equal(stats.correct, stats.predicted == y)
    assert loss.requires_grad and not any(s.requires_grad for s in stats)
    assert any(stats.predicted == 0) or cosine


def test_statistics_of_ignored_rows_and_probabilities() -> None:
    x, w = randn(N, D), randn(C, D, seed=1)
    best = (x @ w.T).argmax(1)
    ignored = int(best[0])  # a class of its own number is ignored, though predicted
    for y in (best, best.int(), *map(best.to, (torch.uint8, torch.uint16, torch.uint32, torch.uint64))):
        _, stats = LF.linear_margin_cross_entropy(x, w, y, ignore_index=ignored, return_stats=True)
        assert torch.equal(stats.correct, best != ignored) and stats.row_loss[0] == 0
        assert LF.linear_margin_cross_entropy(x, w, y, return_stats=True)[1].correct.all()
    t = F.one_hot(best, C) * 0.6 + 0.4 / C
    t[4] = t[4].roll(1)
    _, stats = LF.linear_margin_cross_entropy(x, w, t, return_stats=True)
    assert torch.equal(stats.correct, torch.arange(N) != 4)


def test_statistics_of_the_auxiliary_form() -> None:
    """Predictions are target classes, whatever the logits of auxiliary ones and the prior."""
    x, w = randn(N, D), randn(C, D, seed=1)
    loss, lse, stats = LF.linear_auxiliary_cross_entropy(
        x, w, Y, MAP, prior_counts=COUNTS, chunk_size=7, return_lse=True, return_stats=True
    )
    assert torch.equal(stats.predicted, (x @ w[:TARGETS].T).argmax(1))
    assert torch.equal(stats.correct, stats.predicted == Y) and (Y >= TARGETS).any()
    rows, want = LF.auxiliary_cross_entropy(x @ w.T, Y, MAP, prior_counts=COUNTS, reduction="none", return_lse=True)
    torch.testing.assert_close((stats.row_loss, lse, loss), (rows, want, rows.mean()))


# -------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("samples", [(), (0,), (1,), (5,), (3, 4), (2, 0), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_shapes(samples: tuple[int, ...], kind: str) -> None:
    x, w = randn(*samples, D), randn(C, D, seed=1)
    f = x @ w.T
    y = f.flip(-1).softmax(-1) if kind == "probabilities" else f.argmin(-1)
    u, mask = torch.rand(samples).double(), torch.rand(*samples, C) < 0.9
    options = {"sample_weight": u, "label_smoothing": 0.1, "return_lse": True}
    for m in (None, mask[..., :] if samples else mask.reshape(C), torch.arange(C) != 5):
        rows = {"mask": m if m is None or m.dim() == 1 else m.reshape(-1, C), "sample_weight": u.reshape(-1)}
        flat = y.reshape(-1, C) if kind == "probabilities" else y.reshape(-1)
        for reduction in ("mean", "none"):
            out, lse, stats = LF.linear_margin_cross_entropy(
                x, w, y, mask=m, reduction=reduction, return_stats=True, **options
            )
            loss, want = definition(f.reshape(-1, C), flat, reduction=reduction, **options | rows)
            torch.testing.assert_close(out, loss.reshape(samples) if reduction == "none" else loss, equal_nan=True)
            torch.testing.assert_close(lse, want.reshape(samples))
            assert all(s.shape == samples for s in stats)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": lambda x: torch.stack([x, x * torch.nan], 1).reshape(-1, x.shape[1])[::2],
    "column_strided": lambda x: torch.stack([x, x * torch.nan], 2).flatten(1)[:, ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "unaligned": lambda x: F.pad(x, (1, 2), value=torch.nan)[:, 1:-2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"cosine": True}, {"reduction": "none"}], ids=["plain", "cosine", "rows"])
def test_layouts(layout: str, dtype: torch.dtype, options: dict) -> None:
    """The numbers of contiguous tensors, and contiguous gradients."""
    leaves = [LAYOUTS[layout](randn(N, D, dtype=dtype)), LAYOUTS[layout](randn(C, D, seed=1, dtype=dtype))]
    results = []
    for x, w in (leaves, [leaf.contiguous() for leaf in leaves]):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        loss = LF.linear_margin_cross_entropy(x, w, Y, chunk_size=7, **options).sum()
        results.append([loss, *torch.autograd.grad(loss, (x, w))])
    assert not leaves[0].is_contiguous() and all(g.is_contiguous() for g in results[0][1:])
    tolerance = {"rtol": 0.02, "atol": 0.01} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(*results, **tolerance)


def test_no_features_at_all() -> None:
    """D = 0: all logits are 0."""
    for options in ({}, {"cosine": True}, {"reduction": "none"}):
        x, w = torch.zeros(N, 0, requires_grad=True), torch.zeros(C, 0, requires_grad=True)
        loss = LF.linear_margin_cross_entropy(x, w, Y, **options).mean()
        torch.testing.assert_close(loss.detach(), torch.tensor(C).log())
        assert [g.shape for g in torch.autograd.grad(loss, (x, w))] == [(N, 0), (C, 0)]


def native_bfloat16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return torch.backends.mkldnn.is_available() and cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()


@pytest.mark.parametrize("chunk", [300, "auto", 8], ids=str)
def test_bfloat16_is_multiplied_as_such_where_the_processor_can(chunk: int | str) -> None:
    """The logits tell: rounded as F.linear does, or in float32 without oneDNN, its products, or enough to do."""
    x, w, y = randn(700, 256, dtype=torch.bfloat16), randn(64, 256, seed=1), torch.arange(700) % 64
    w = (w / 8).bfloat16()
    rounded = LF.margin_cross_entropy(F.linear(x, w), y, reduction="none")
    exact = LF.margin_cross_entropy(F.linear(x.float(), w.float()), y, reduction="none")
    assert (rounded - exact).abs().max() > 1e-3
    with torch.backends.mkldnn.flags(enabled=False):
        got = LF.linear_margin_cross_entropy(x, w, y, reduction="none", chunk_size=chunk)
    torch.testing.assert_close(got, exact)
    got = LF.linear_margin_cross_entropy(x, w, y, reduction="none", chunk_size=chunk)
    torch.testing.assert_close(got, rounded if native_bfloat16() and chunk != 8 else exact)


@pytest.mark.parametrize("cosine", [False, True], ids=["linear", "cosine"])
@pytest.mark.parametrize("chunk", [300, 700])
def test_bfloat16_gradients_of_larger_products(chunk: int, cosine: bool) -> None:
    """No further from the definition than those of torch in bfloat16, but for what roundings do by chance."""
    x, w, y = (
        randn(700, 256, dtype=torch.bfloat16),
        randn(64, 256, seed=1, dtype=torch.bfloat16),
        torch.arange(700) % 64,
    )

    def eager(x: Tensor, w: Tensor) -> Tensor:
        if cosine:
            return F.cross_entropy(8 * F.linear(F.normalize(x), F.normalize(w)), y)
        return F.cross_entropy(F.linear(x, w) / 8, y)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return LF.linear_margin_cross_entropy(x, w, y, cosine=cosine, scale=8 if cosine else 1 / 8, chunk_size=chunk)

    def gradients(loss: Callable[..., Tensor], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
        return [grad.double() for grad in torch.autograd.grad(loss(*leaves), leaves)]

    for got, plain, exact in zip(gradients(ours), gradients(eager), gradients(eager, torch.float64), strict=True):
        assert (got - exact).norm() <= 1.1 * (plain - exact).norm() + 1e-3 * exact.norm()


# -------------------------------------------------------------------------------------------------------------- memory

MEMORY = (
    PRELUDE
    + """
torch.set_num_threads(1)

def peak(n, c, d, dtype=torch.float32, **options):
    x, w = torch.randn(n, d).to(dtype).requires_grad_(), torch.randn(c, d).to(dtype).requires_grad_()
    y = torch.randint(c, (n,))
    before = resident()
    out = LF.linear_margin_cross_entropy(x, w, y, **options)
    (out if isinstance(out, torch.Tensor) else out[0]).sum().backward()
    gradients = sum(leaf.grad.nbytes for leaf in (x, w))
    return (status("VmHWM") - before - gradients) / (n * c * x.element_size())

cases = [{}, {"reduction": "none"}, {"cosine": True}, {"return_stats": True, "return_lse": True}]
for options in cases:
    peak(64, 1000, 32, chunk_size=16, **options)
shares = [peak(1024, 20000, 32, chunk_size=64, **options) for options in cases]
shares.append(peak(1024, 20000, 32, torch.bfloat16, chunk_size=32))
shares.append(peak(4096, 20000, 8))
print(json.dumps(shares))
"""
)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(run_python: Callable[..., str]) -> None:
    """Beyond inputs and gradients, a small part of the logits, whichever pass computes the gradients."""
    shares = json.loads(run_python("-c", MEMORY))
    assert max(shares) < 0.25, shares


def test_a_weight_for_each_sample_of_positions() -> None:
    """(N,) for targets (N, d1), as in the row operation."""
    x, w, y, u = randn(2, 3, D), randn(C, D, seed=1), torch.zeros(2, 3, dtype=torch.int64), torch.tensor([1.0, 3.0])
    got = LF.linear_margin_cross_entropy(x, w, y, sample_weight=u)
    torch.testing.assert_close(got, LF.margin_cross_entropy((x @ w.T).movedim(-1, 1), y, sample_weight=u))
