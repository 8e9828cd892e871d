"""The definition of every operation in plain torch.

This file is the specification: it is differentiated by autograd, runs on any device and in any floating dtype,
and every kernel of the library is tested against it in float64. It also serves the devices no kernel is written
for, and all of them under ``LTKERNELS_BACKEND=reference``. It holds N x C temporaries and makes no claim to speed.
"""

from __future__ import annotations

import contextlib
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
        known = (target >= 0) & (target < classes)
        y = torch.where(kept & known, target, 0)
        t = (y[:, None] == torch.arange(classes, device=logits.device)).to(acc)
        t = torch.where((kept & ~known)[:, None], torch.nan, t)  # no class: NaN where no error can be raised
    else:
        kept = torch.ones(rows, dtype=torch.bool, device=logits.device)
        t = target.to(acc)
    allowed = torch.ones_like(t, dtype=torch.bool) if mask is None else mask.expand(rows, classes)

    silenced = torch.zeros_like(allowed)
    if neighbor_offsets is not None:
        silenced = silenced_classes(y if indices else row_class.long(), neighbor_offsets, neighbor_classes, back_from)

    # Ignored rows and classes that are out may hold anything, NaN included: they are out of the graph altogether.
    present = allowed & kept[:, None] if neighbor_weight > 0 else allowed & kept[:, None] & ~silenced
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


def autocast_available(device: str) -> bool:
    """``torch.amp.is_autocast_available``, which Dynamo of torch 2.11 cannot trace."""
    try:
        torch.is_autocast_enabled(device)
    except RuntimeError:
        return False
    return True


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    return torch.autocast(device, enabled=False) if autocast_available(device) else contextlib.nullcontext()


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


# What the log-sum-exp of a contrastive loss runs over, and what the loss makes of it.
ALL, OWN, NEGATIVES, LOGSUMEXP, LOGSUMEXP_OTHER_LABEL, LOGSUMEXP_SAME_LABEL = range(6)


def contrastive(
    query: Tensor,  # q: (M, D), any floating dtype
    key: Tensor | None,  # k: (N, D); None: the queries
    temperature: Tensor,  # tau: (M,), above 0
    labels: Tensor | None,  # y: (M,) integers from -1 on; -1 has no positives
    key_labels: Tensor | None,  # (N,); None: labels, if key is None
    positive_index: Tensor | None,  # (M,) the one positive key of each row, instead of labels
    allowed: Tensor | None,  # (N,) or (M, N) bool: False removes the key
    key_bias: Tensor | None,  # c: (N,)
    pair_margin: Tensor | None,  # rho: (L, L)
    sample_weight: Tensor | None,  # u: (M,)
    log_normalizer: Tensor | None,  # nu: (M,), with NEGATIVES
    extra_positive: Tensor | None,  # e: (M, D), one more positive key of each row alone
    denominator: int,
    exclude_self: bool,  # whether row i is no key of itself, if key is None
    scale_by_temperature: bool,
    reduction: str,  # "none", "mean" or "sum"
) -> tuple[Tensor, Tensor]:
    """Contrastive loss over rows: the reduced loss and (5, M) statistics, without gradient: LSE_i, S_i, r_i, E_i and
    the number of positives (LOGSUMEXP: 1).

    s[i,j] = <q_i, k_j> / tau_i,  l[i,j] = s[i,j] + c_j + rho[y_i, y_j],  LSE_i = logsumexp_{j in A(i)} l[i,j]
    P(i): positives among the keys that row i may see;  S_i = mean_{p in P(i)} s[i,p]
    E_i = sum_j softmax(l)[i,j] s[i,j] over A(i)

    ALL:        A(i) is all that row i sees, positives too;  r_i = LSE_i - S_i
    NEGATIVES:  A(i) without positives;  r_i = LSE_i - S_i
    OWN:        A(i) without positives;  r_i = mean_p softplus(LSE_i - s[i,p])
    nu given:   w[i,j] = exp(l[i,j] - S_i - nu_i), constant;  r_i = sum_{j in A(i)} w[i,j] tau_i (s[i,j] - S_i)
    LOGSUMEXP...: A(i) is all that row i sees, or those of another label, or those of its label;  r_i = LSE_i

    loss = sum_i u_i r_i (tau_i if scale_by_temperature) / Z over rows with a positive (LOGSUMEXP: over all rows);
    Z = sum of their u_i for the mean. r_i = 0 without a positive, and without a negative for NEGATIVES and OWN.

    Labels below -1 or not below L, and positives that are no key of the row, are errors where values can be read. Where
    they cannot, r_i and its gradients are NaN: in the row, and in all rows if it is the label of a key.
    """
    acc = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, tau = query.to(acc), temperature.to(acc)[:, None]
    tau = torch.where(tau > 0, tau, torch.nan)  # as the kernels, where no error can be raised
    k = q if key is None else key.to(acc)
    if labels is not None:
        labels = labels.long()
        key_labels = labels if key is None else key_labels.long()
    rows, keys = q.shape[0], k.shape[0]

    wrong = wrong_keys = torch.zeros(rows, dtype=torch.bool, device=query.device)
    if labels is not None:
        limit = math.inf if pair_margin is None else pair_margin.shape[0]
        wrong, wrong_keys = ((y < -1) | (y >= limit) for y in (labels, key_labels))
        labels, key_labels = torch.where(wrong, -1, labels), torch.where(wrong_keys, -1, key_labels)
    if positive_index is not None:
        positive_index = positive_index.long()  # of which unsigned dtypes torch compares few
        own = exclude_self & (positive_index == torch.arange(rows, device=query.device)) if key is None else wrong
        wrong = (positive_index < 0) | (positive_index >= keys) | own

    seen = torch.ones(rows, keys, dtype=torch.bool, device=query.device)
    if key is None and exclude_self:
        seen = ~torch.eye(rows, dtype=torch.bool, device=query.device)
    if allowed is not None:
        seen = seen & allowed
    same = torch.zeros_like(seen)
    if labels is not None:
        same = (labels[:, None] == key_labels) & (labels[:, None] >= 0)
    positive = torch.zeros_like(seen)
    if denominator in (ALL, OWN, NEGATIVES):
        positive = seen & same
        if positive_index is not None:
            positive = seen & (positive_index[:, None] == torch.arange(keys, device=query.device))

    with _without_autocast(query.device.type):
        product = q @ k.T
    additive = q.new_zeros(rows, keys)
    if key_bias is not None:
        additive = additive + key_bias.to(acc)
    if pair_margin is not None:
        labelled = (labels[:, None] >= 0) & (key_labels >= 0)
        margin = pair_margin.to(acc)[labels.clamp(min=0)[:, None], key_labels.clamp(min=0)]
        additive = additive + torch.where(labelled, margin, 0.0)
    if extra_positive is not None:
        own = torch.ones(rows, 1, dtype=torch.bool, device=query.device)
        product = torch.cat([product, (q * extra_positive.to(acc)).sum(1, keepdim=True)], 1)
        additive = torch.cat([additive, q.new_zeros(rows, 1)], 1)
        seen, positive = torch.cat([seen, own], 1), torch.cat([positive, own], 1)
        same = torch.cat([same, own], 1)
    s = product / tau

    if denominator in (OWN, NEGATIVES):
        summed = seen & ~positive
    elif denominator in (LOGSUMEXP_OTHER_LABEL, LOGSUMEXP_SAME_LABEL):
        summed = seen & (same if denominator == LOGSUMEXP_SAME_LABEL else ~same)
    else:
        summed = seen
    # A row with nothing to sum is out of the graph: the gradient of its log-sum-exp would be NaN.
    full = (summed & (additive > -torch.inf)).any(1)
    logits = torch.where(summed & full[:, None], s + additive, torch.where(full[:, None], -torch.inf, 0.0))
    lse = torch.where(full, torch.logsumexp(logits, 1), -torch.inf)
    count = positive.sum(1)
    count = torch.where(wrong, count.clamp(min=1), count)
    mean_positive = torch.where(positive, s, 0.0).sum(1) / count.clamp(min=1)

    if denominator >= LOGSUMEXP:
        counted, row_loss = torch.ones_like(full), lse
    elif log_normalizer is not None:
        counted = count > 0
        shift = (mean_positive + log_normalizer.to(acc))[:, None]
        mass = torch.where(summed & full[:, None], logits - shift, -torch.inf).exp().detach()
        mean_product = torch.where(positive, product, 0.0).sum(1) / count.clamp(min=1)
        row_loss = torch.where(mass != 0, mass * (product - mean_product[:, None]), 0.0).sum(1)
    elif denominator == OWN:
        counted = count > 0
        gap = torch.where(positive & full[:, None], lse[:, None] - s, -torch.inf)  # softplus(-inf) = 0
        row_loss = torch.logaddexp(gap, torch.zeros_like(gap)).sum(1) / count.clamp(min=1)
        row_loss = torch.where(full, row_loss, 0.0)
    else:
        counted = count > 0
        row_loss = torch.where(full, lse - mean_positive, 0.0)
    wrong = wrong | wrong_keys.any()
    nan = torch.where(wrong, torch.nan, 0.0).to(acc)
    row_loss, lse = torch.where(wrong, (s + additive).sum(1) * nan, row_loss), lse + nan
    if denominator < LOGSUMEXP:
        row_loss = torch.where(counted, row_loss, 0.0)
    if scale_by_temperature:
        row_loss = tau[:, 0] * row_loss

    with torch.no_grad():
        p = torch.where(full[:, None], torch.softmax(logits, 1), 0.0)
        expected = torch.where(p != 0, p * s, 0.0).sum(1)
        number = count if denominator < LOGSUMEXP else torch.ones_like(count)
        stats = torch.stack([lse, mean_positive, row_loss, expected, number.to(acc)]).detach()
    u = torch.ones_like(row_loss) if sample_weight is None else sample_weight.to(acc)
    u = torch.where(counted, u, 0.0)
    weighted = torch.where(counted, u * row_loss, 0.0)
    if reduction == "none":
        return weighted, stats
    total, normalizer = weighted.sum(), u.sum() if reduction == "mean" else u.new_ones(())
    return torch.where(normalizer != 0, total / torch.where(normalizer != 0, normalizer, 1.0), 0.0), stats
