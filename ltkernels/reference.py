"""The definition of every operation in plain torch.

This file is the specification: it is differentiated by autograd, runs on any device and in any floating dtype,
and every kernel of the library is tested against it in float64. It also serves the devices no kernel is written
for, and all of them under ``LTKERNELS_BACKEND=reference``. It holds N x C temporaries and makes no claim to speed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def margin_softmax(
    logits: Tensor,  # (N, C), any floating dtype
    target: Tensor,  # (N,) integer class indices or (N, C) probabilities
    weight: Tensor | None,  # w: (C,)
    logit_scale: Tensor | None,  # a: (C,) or 0-d
    logit_bias: Tensor | None,  # b: (C,)
    target_margin: Tensor | None,  # m: (C,)
    pairwise_margin: Tensor | None,  # Delta: (C, C)
    mask: Tensor | None,  # (C,) or (N, C) bool, False removes the class
    sample_weight: Tensor | None,  # u: (N,)
    row_class: Tensor | None,  # (N,) the class that picks a row's silenced classes; None: the target index
    neighbor_offsets: Tensor | None,  # (C + 1,) int32: class k silences
    neighbor_classes: Tensor | None,  # neighbor_classes[neighbor_offsets[k] : neighbor_offsets[k + 1]]
    scale: float,  # s
    neighbor_weight: float,  # lambda
    back_from: int,  # rows of classes from here on silence all others from here on; -1: none
    reduction: str,  # "none", "mean" or "sum"
    ignore_index: int,
    label_smoothing: float,  # eps
) -> tuple[Tensor, Tensor]:
    """Margin-adjusted softmax cross-entropy over rows: returns the reduced loss and the (N,) log-sum-exp.

    v[i,j]  = s * (a[j] * f[i,j] - m[j] * t[i,j]) + b[j] + Delta[y_i, j] + log(lambda) [j in S(y_i)]
    t'[i,j] = w[j] * ((1 - eps) * t[i,j] + eps / |allowed_i|)       (0 in S(y_i) if lambda = 0)
    loss_i  = u_i * (sum_j t'[i,j] * logsumexp_j v[i,j] - sum_j t'[i,j] * v[i,j])

    The mean divides by sum_i u_i w[y_i] over the rows kept for class indices, by sum_i u_i for probabilities.
    Rows whose target is ``ignore_index`` give 0 and no gradient.
    """
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows, classes = logits.shape

    def vector(x: Tensor | None, value: float, n: int) -> Tensor:
        return logits.new_full((n,), value, dtype=acc) if x is None else x.to(acc).expand(n)

    w, a, b, m = (
        vector(x, value, classes)
        for x, value in ((weight, 1.0), (logit_scale, 1.0), (logit_bias, 0.0), (target_margin, 0.0))
    )
    u = vector(sample_weight, 1.0, rows)

    indices = not target.is_floating_point()
    if indices:
        target = target.long()  # ignore_index does not fit every integer dtype
        kept = target != ignore_index
        y = torch.where(kept, target, 0)
        t = torch.nn.functional.one_hot(y, classes).to(acc)
    else:
        kept = torch.ones(rows, dtype=torch.bool, device=logits.device)
        t = target.to(acc)
    allowed = torch.ones_like(t, dtype=torch.bool) if mask is None else mask.expand(rows, classes)

    silenced = torch.zeros_like(allowed)
    if neighbor_offsets is not None:
        silenced = silenced_classes(y if indices else row_class.long(), neighbor_offsets, neighbor_classes, back_from)

    # Ignored rows and silenced classes may hold anything, NaN included: they are out of the graph altogether.
    present = kept[:, None] if neighbor_weight > 0 else kept[:, None] & ~silenced
    f = torch.where(present, logits.to(acc), 0.0)
    # d(a f)/da is f, which is defined as 0 where f = -inf so that a removed class does not poison a's gradient.
    removed = f == -torch.inf
    af = torch.where(removed, a.detach() * f, a * torch.where(removed, 0.0, f))
    mt = torch.where(t != 0, m * t, 0.0)  # a term with t = 0 is 0, in m's gradient too, whatever the row holds
    v = scale * (af - mt) + b
    if pairwise_margin is not None:
        v = v + pairwise_margin.to(acc)[y]
    v = v.masked_fill(~allowed, -torch.inf)
    v = torch.where(silenced, v + math.log(neighbor_weight) if neighbor_weight > 0 else -torch.inf, v)

    spread = allowed.to(acc) / allowed.sum(1, keepdim=True).clamp(min=1)
    smoothed = (1 - label_smoothing) * t + label_smoothing * spread
    if not indices:
        smoothed = torch.where(allowed, smoothed, 0.0)  # probability on a removed class is dropped
    if neighbor_weight == 0:
        smoothed = torch.where(silenced, 0.0, smoothed)
    weighted = w * smoothed
    lse = torch.logsumexp(v, dim=1)
    lse = torch.where(lse == -torch.inf, torch.nan, lse)  # a row with no class left has no distribution
    # Likewise a term with t' = 0, also where v = -inf.
    expected = torch.where(weighted != 0, weighted * v, 0.0).sum(1)
    row_loss = torch.where(kept, u, 0.0) * torch.where(kept, weighted.sum(1) * lse - expected, 0.0)
    lse = torch.where(kept, lse, 0.0)

    if reduction == "none":
        return row_loss, lse
    if reduction == "sum":
        return row_loss.sum(), lse
    normalizer = torch.where(kept, u * w[y], 0.0).sum() if indices else u.sum()
    return row_loss.sum() / normalizer, lse


def linear_logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, cosine: bool) -> Tensor:
    """(N, C) logits of a linear classifier, or of a cosine classifier: <x / |x|, W_j / |W_j|>."""
    if cosine:
        input, linear_weight = directions(input), directions(linear_weight)
    return torch.nn.functional.linear(input, linear_weight, linear_bias)


def directions(x: Tensor, eps: float = 1e-8) -> Tensor:
    """Rows of unit length. Dividing by max(norm, eps) would give a zero row a gradient of 1/eps; here it gets 0."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return (x / torch.where(norm > eps, norm, torch.inf)).to(x.dtype)


def silenced_classes(row_class: Tensor, offsets: Tensor, classes: Tensor, back_from: int) -> Tensor:
    """(N, C) bool: the classes that each row's class silences."""
    n = offsets.shape[0] - 1
    entries = torch.arange(classes.shape[0], device=classes.device)
    owner = torch.searchsorted(offsets[1:].contiguous(), entries.to(offsets.dtype), right=True)
    table = torch.zeros(n, n, dtype=torch.bool, device=classes.device)
    named = (offsets[0] <= entries) & (entries < offsets[-1])  # offsets need not cover all entries
    table[owner[named], classes[named].long()] = True
    if back_from >= 0:
        table[back_from:, back_from:] |= ~torch.eye(n - back_from, dtype=torch.bool, device=classes.device)
    return table[row_class]
