"""Contrastive losses over tiles of similarities, for CUDA in Triton; reference.py has the definition.

A first sweep over the tiles (contrastive_tiles.py) gives each row its log-sum-exp and what its positives add up to, a
second one the gradients. What a row then needs beyond its tiles is O(M D) and plain torch, without synchronisation:
the loss, the coefficients of its gradient, and the extra positive that no other row sees.

A sweep for key = None takes both roles of a row, query and key, from one matrix product. Wide embeddings are multiplied
in parts of the width, and each part of their gradient computes the similarities anew.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from ltkernels.reference import (
    LOGSUMEXP,
    LOGSUMEXP_OTHER_LABEL,
    LOGSUMEXP_SAME_LABEL,
    NEGATIVES,
)
from ltkernels.reference import (
    OWN as OWN_DENOMINATOR,
)
from ltkernels.triton._launch import ceil_div, kernel_calls
from ltkernels.triton.contrastive_launch import Operands, Tiles, parts_of, tiles, unit_stride
from ltkernels.triton.contrastive_tiles import (
    ALLOWED,
    BIAS,
    BOTH,
    INDEX,
    KEY,
    LABELS,
    MARGIN,
    OTHER_LABEL,
    OWN,
    QUERY,
    SAME_LABEL,
    SELF,
    WITHOUT_POSITIVES,
    _gradient,
    _own_terms,
    _pair_margin_gradient,
    _statistics,
)

__all__ = ["contrastive_bwd", "contrastive_fwd", "kernel_calls"]

# Bits of `grads`, as in csrc/contrastive.h.
GRAD_QUERY, GRAD_KEY, GRAD_TEMPERATURE, GRAD_KEY_BIAS, GRAD_PAIR_MARGIN, GRAD_EXTRA, EXPECTED = (
    1 << bit for bit in range(7)
)
GRADIENTS = 63
# Pairs of labels; a grid has fewer than 2^31 programs.
PAIRS_OF_A_LAUNCH = 1 << 30
# Triton's interpreter multiplies 16-bit matrices wrongly.
UPCAST = os.environ.get("TRITON_INTERPRET") == "1"


class Call:
    """The inputs of a call, and the launches of its kernels."""

    def __init__(
        self, query, key, temperature, labels, key_labels, positive_index, allowed, key_bias, pair_margin,
        sample_weight, log_normalizer, extra_positive, denominator, exclude_self, scale_by_temperature, reduction,
    ):  # fmt: skip
        self.acc = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.query_dtype, self.margin = query.dtype, pair_margin is not None
        self.self_contrast = key is None
        self.denominator, self.scale, self.reduction = denominator, scale_by_temperature, reduction
        query = unit_stride(query)
        key = query if key is None else unit_stride(key)
        self.rows, self.width = query.shape
        self.keys = key.shape[0]
        tau = self._vector(temperature)
        # Before the labels of the log-sum-exps: only a loss has positives.
        by_index = positive_index is not None and denominator < LOGSUMEXP
        by_label = labels is not None and not by_index and denominator != LOGSUMEXP
        self.options = (
            (SELF if self.self_contrast and exclude_self else 0)
            | (ALLOWED if allowed is not None else 0)
            | (BIAS if key_bias is not None else 0)
            | (MARGIN if pair_margin is not None else 0)
            | (LABELS if by_label else 0)
            | (INDEX if by_index else 0)
            | {
                OWN_DENOMINATOR: WITHOUT_POSITIVES | OWN,
                NEGATIVES: WITHOUT_POSITIVES,
                LOGSUMEXP_OTHER_LABEL: OTHER_LABEL,
                LOGSUMEXP_SAME_LABEL: SAME_LABEL,
            }.get(denominator, 0)
        )
        if not by_index and not by_label:
            self.options &= ~(WITHOUT_POSITIVES | OTHER_LABEL)  # nobody shares a label
        label = key_label = tau
        if labels is not None:
            label = labels.long().contiguous()
            key_label = label if key_labels is None else key_labels.long().contiguous()
        self.allowed_stride = 0
        if allowed is not None:
            if self.acc == torch.float64:
                # Triton 3.6 compiles no float64 product of what was computed from bytes.
                shared = allowed.dim() == 2 and allowed.stride(0) == 0
                allowed = allowed[:1].int().expand_as(allowed) if shared else allowed.int()
            allowed = unit_stride(allowed)
            self.allowed_stride = allowed.stride(0) if allowed.dim() == 2 else 0
        self.p = Operands(
            query,
            key,
            tau,
            1 / tau,
            label,
            key_label,
            positive_index.long().contiguous() if by_index else tau,
            tau if allowed is None else allowed,
            tau if key_bias is None else self._vector(key_bias),
            tau if pair_margin is None else self._vector(pair_margin),
        )
        self.n_labels = 0 if pair_margin is None else pair_margin.shape[0]
        self.weight = None if sample_weight is None else self._vector(sample_weight)
        self.log_normalizer = None if log_normalizer is None else self._vector(log_normalizer)
        self.extra = extra_positive
        self.extra_product = None
        if extra_positive is not None:
            self.extra_product = (query.to(self.acc) * extra_positive.to(self.acc)).sum(1)
        # Not `allow_tf32`, which raises where the switch has been set by this name.
        tf32 = query.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        self.precision = "tf32" if tf32 else "ieee"

    def _vector(self, x: Tensor) -> Tensor:
        return x.to(self.acc).contiguous()

    def _tiles(self, gradient: bool) -> Tiles:
        rich = self.options & (ALLOWED | MARGIN | BIAS | OWN) != 0
        return tiles(self.width, self.query_dtype, self.precision, gradient, rich)

    def _strides(self) -> tuple[int, ...]:
        return self.width, self.p.query.stride(0), self.p.key.stride(0), self.allowed_stride

    def _constants(self, t: Tiles) -> dict:
        return dict(
            ROWS=t.rows, KEYS=t.keys, DEPTH=t.depth, OPTIONS=self.options, PRECISION=self.precision, UPCAST=UPCAST,
            num_warps=t.warps, num_stages=t.stages, enable_fp_fusion=True,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------- what rows need

    def statistics(self, expected: bool) -> Statistics:
        """The first sweep, joined with the extra positive."""
        t = self._tiles(False)
        parts, per_part = parts_of(ceil_div(self.rows, t.rows), self.keys, t.keys, 4 * self.rows * 8)
        out = self.p.temperature.new_empty(4, parts, self.rows)
        if self.rows:
            kernel_calls["triton.contrastive.statistics"] += 1
            _statistics[(ceil_div(self.rows, t.rows), parts)](
                self.p, out, self.rows, self.keys, self.n_labels, *self._strides(), per_part,
                WHOLE=t.depth >= self.width, EXPECTED=expected, **self._constants(t),
            )  # fmt: skip
        positives = self.options & (LABELS | INDEX) and self.denominator < LOGSUMEXP
        total = out[1].sum(0) if positives else torch.zeros_like(self.p.temperature)
        count = out[2].sum(0) if positives else torch.zeros_like(total)
        lse, mean = out[0], out[3]
        if self.extra is not None:
            x = self.extra_product
            if self._extra_is_summed():
                s = (x * self.p.inverse_temperature)[None]
                lse = torch.cat([lse, s])
                mean = torch.cat([mean, x[None]])
        if self.extra is not None:
            total, count = total + self.extra_product, count + 1
        joined = torch.logsumexp(lse, 0) if lse.shape[0] > 1 else lse[0]
        e = torch.zeros_like(total)
        if expected:
            share = torch.where(lse == -torch.inf, 0.0, (lse - joined).exp())
            e = torch.where(share == 0, 0.0, share * mean).sum(0) * self.p.inverse_temperature
        return Statistics(joined, total / count.clamp(min=1) * self.p.inverse_temperature, count, e)

    def _extra_is_summed(self) -> bool:
        return self.denominator not in (OWN_DENOMINATOR, NEGATIVES, LOGSUMEXP_OTHER_LABEL)

    def own_terms(self, lse: Tensor, positive: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Means over the positives of each row: softplus(LSE_i - s), and its derivative. One more sweep for labels."""
        loss = slope = torch.zeros_like(lse)
        s = None if self.extra is None else self.extra_product * self.p.inverse_temperature
        if self.options & LABELS:
            t = self._tiles(False)
            parts, per_part = parts_of(ceil_div(self.rows, t.rows), self.keys, t.keys, 2 * self.rows * 8)
            out = lse.new_empty(2, parts, self.rows)
            if self.rows:
                kernel_calls["triton.contrastive.own_terms"] += 1
                _own_terms[(ceil_div(self.rows, t.rows), parts)](
                    self.p, lse, out, self.rows, self.keys, self.n_labels, *self._strides(), per_part,
                    WHOLE=t.depth >= self.width, **self._constants(t),
                )  # fmt: skip
            loss, slope = out.sum(1)
        elif self.options & INDEX:
            # S_i is the positive by index itself, or its mean with the extra one.
            seen = count > (0 if s is None else 1)
            gap = lse - (positive if s is None else 2 * positive - s)
            loss, slope = torch.where(seen, _softplus(gap), 0.0), torch.where(seen, gap.sigmoid(), 0.0)
        if s is not None:
            loss, slope = loss + _softplus(lse - s), slope + (lse - s).sigmoid()
        return loss / count.clamp(min=1), slope / count.clamp(min=1)

    def row_weights(self, counted: Tensor) -> tuple[Tensor, Tensor]:
        """u_i of the rows that count, and 1 / Z, or 0 where Z is."""
        one = torch.ones_like(self.p.temperature)
        weight = torch.where(counted, one if self.weight is None else self.weight, 0.0)
        if self.reduction != 1:
            return weight, one.new_ones(())
        z = weight.sum()
        return weight, torch.where(z != 0, 1 / z, 0.0)

    def coefficients(self, upstream: Tensor, lse, positive, count, slope) -> Coefficients:
        """`upstream`: dloss/dr_i, without the factor tau_i of scale_by_temperature."""
        full = lse != -torch.inf
        upstream = torch.where(full, upstream, 0.0)
        share = 1 / count.clamp(min=1)
        if self.log_normalizer is not None:
            negative = torch.where(full, upstream * (lse - positive - self.log_normalizer).exp(), 0.0)
            pull = negative * share
        else:
            factor = upstream if self.scale else upstream * self.p.inverse_temperature
            negative, pull = factor if slope is None else factor * slope, factor * share
        rows = torch.stack([torch.where(full, lse, 0.0), negative, pull])
        extra = None
        if self.extra is not None:
            s = self.extra_product * self.p.inverse_temperature
            extra = torch.zeros_like(s)
            if self._extra_is_summed():
                extra = negative * torch.where(full, (s - lse).exp(), 0.0)
            if self.denominator == OWN_DENOMINATOR:
                extra = extra - pull * torch.where(full, (lse - s).sigmoid(), 0.0)
            elif self.denominator < LOGSUMEXP:
                extra = extra - pull
        return Coefficients(rows, extra)

    # -------------------------------------------------------------------------------------------------------- gradients

    def gradients(self, grads: int, c: Coefficients, upstream: Tensor, row_loss: Tensor) -> tuple[Tensor, ...]:
        """The six gradients; `upstream` is dloss/dr_i of the rows that count."""
        vector = self.p.temperature
        constant = self.log_normalizer is not None  # nothing flows to tau, c and rho through constant weights
        wants_tau = bool(grads & GRAD_TEMPERATURE) and not constant
        wants_bias = bool(grads & GRAD_KEY_BIAS) and self.options & BIAS and not constant
        query, key = bool(grads & GRAD_QUERY), bool(grads & GRAD_KEY) and not self.self_contrast
        grad_query, grad_key, grad_extra = (self.p.query.new_empty(0) for _ in range(3))  # results must not alias
        products = key_sums = None
        if self.self_contrast:
            role = (BOTH if query else 0) | (QUERY if wants_tau else 0) | (KEY if wants_bias else 0)
            if role:
                grad_query, products, key_sums = self._gradient(role, c, query, wants_tau, wants_bias)
        else:
            if query or wants_tau:
                grad_query, products, _ = self._gradient(QUERY, c, query, wants_tau, False)
            if key or wants_bias:
                grad_key, _, key_sums = self._gradient(KEY, c, key, False, wants_bias)
        grad_tau, grad_bias, grad_margin = (vector.new_empty(0) for _ in range(3))
        if grads & GRAD_TEMPERATURE:
            grad_tau = torch.zeros_like(self.p.temperature)
            if wants_tau:
                if self.extra is not None:
                    products = products + c.extra * self.extra_product
                scaled = upstream * row_loss * self.p.inverse_temperature if self.scale else 0.0
                grad_tau = scaled - products * self.p.inverse_temperature
        if grads & GRAD_KEY_BIAS:
            grad_bias = key_sums if wants_bias else vector.new_zeros(self.keys)
        if grads & GRAD_PAIR_MARGIN:
            grad_margin = vector.new_zeros(self.n_labels, self.n_labels)
            if self.margin and not constant and self.n_labels:
                grad_margin = self._pair_margin_gradient(c)
        if grads & GRAD_EXTRA:
            grad_extra = (c.extra[:, None] * self.p.query.to(self.acc)).to(self.query_dtype)
        return grad_query, grad_key, grad_tau, grad_bias, grad_margin, grad_extra

    def _gradient(self, role, c, output, products, key_sums) -> tuple[Tensor, Tensor | None, Tensor | None]:
        p, t = self.p, self._tiles(True)
        a, b = (p.query, p.key) if role & QUERY else (p.key, p.query)
        n_a, n_b = a.shape[0], b.shape[0]
        chunks = ceil_div(self.width, t.out) if output else 1
        programs = ceil_div(n_a, t.rows) * chunks
        parts, per_part = parts_of(programs, n_b, t.keys, (self.width if output else 2) * n_a * self.acc.itemsize)
        dtype = self.query_dtype if parts == 1 else self.acc
        out = a.new_empty((parts, n_a, self.width) if output else (0,), dtype=dtype)
        sums = [p.temperature.new_empty(parts, n_a) for _ in range(2)]  # apart: each 16-byte aligned
        scale = p.temperature
        if self.query_dtype == torch.float16:
            sizes = torch.nan_to_num(c.rows[1:], nan=0.0, posinf=0.0, neginf=0.0).abs()  # a bad row spoils no other
            scale = (sizes.amax() / 1024).clamp(min=1e-30) if self.rows else c.rows.new_ones(1)
        extra = self.extra if role & QUERY and output else None
        if n_a:
            kernel_calls["triton.contrastive.gradient"] += 1
            _gradient[(ceil_div(n_a, t.rows), parts, chunks)](
                p, c.rows, scale, p.query if extra is None else extra.contiguous(),
                p.temperature if extra is None else c.extra, out, sums[0], sums[1], self.rows, self.keys, n_a, n_b,
                self.n_labels, self.width, a.stride(0), b.stride(0), self.allowed_stride, per_part,
                OUT=t.out, WHOLE=t.depth >= self.width and t.out == t.depth, ROLE=role, OUTPUT=output,
                PRODUCTS=products, KEY_SUMS=bool(key_sums), EXTRA=extra is not None, **self._constants(t),
            )  # fmt: skip
        if output:
            out = out[0] if parts == 1 else out.sum(0).to(self.query_dtype)
        return out, sums[0].sum(0) if products else None, sums[1].sum(0) if key_sums else None

    def _pair_margin_gradient(self, c: Coefficients) -> Tensor:
        p, n = self.p, self.n_labels
        labels = torch.arange(n + 1, device=p.label.device)
        ordered, order = p.label.sort(stable=True)
        bounds = torch.searchsorted(ordered, labels)
        key_ordered, key_order = (ordered, order) if p.key_label is p.label else p.key_label.sort(stable=True)
        key_bounds = torch.searchsorted(key_ordered, labels)
        out = c.rows.new_empty(n, n)
        constants = self._constants(self._tiles(False))
        depth = min(constants["DEPTH"], 32)
        kernel_calls["triton.contrastive.pair_margin_gradient"] += 1
        for first in range(0, n * n, PAIRS_OF_A_LAUNCH):
            _pair_margin_gradient[(min(PAIRS_OF_A_LAUNCH, n * n - first),)](
                p, c.rows, order, bounds, key_order, key_bounds, out, self.rows, self.keys, n, *self._strides(), first,
                **(constants | dict(ROWS=16, KEYS=16, DEPTH=depth, num_warps=2)),
            )  # fmt: skip
        return out


class Statistics(NamedTuple):
    """(M,) each."""

    lse: Tensor
    positive: Tensor  # S_i
    count: Tensor  # |P(i)|
    expected: Tensor  # E_i


class Coefficients(NamedTuple):
    rows: Tensor  # (3, M) log-sum-exp (0 if there is no key), negative_i, positive_i
    extra: Tensor | None  # (M,) dloss/d<q_i, e_i>


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def contrastive_fwd(
    query: Tensor,
    key: Tensor | None,
    temperature: Tensor,
    labels: Tensor | None,
    key_labels: Tensor | None,
    positive_index: Tensor | None,
    allowed: Tensor | None,
    key_bias: Tensor | None,
    pair_margin: Tensor | None,
    sample_weight: Tensor | None,
    log_normalizer: Tensor | None,
    extra_positive: Tensor | None,
    denominator: int,
    exclude_self: bool,
    scale_by_temperature: bool,
    reduction: int,
    grads: int,
) -> tuple[Tensor, ...]:
    """Loss, (5, M) statistics and the six gradients for an upstream gradient of 1."""
    with torch.cuda.device_of(query):
        call = Call(
            query, key, temperature, labels, key_labels, positive_index, allowed, key_bias, pair_margin,
            sample_weight, log_normalizer, extra_positive, denominator, exclude_self, scale_by_temperature, reduction,
        )  # fmt: skip
        s = call.statistics(bool(grads & EXPECTED) or log_normalizer is not None)
        full, slope = s.lse != -torch.inf, None
        counted = s.count > 0 if denominator < LOGSUMEXP else torch.ones_like(full)
        if denominator >= LOGSUMEXP:
            row_loss = s.lse
        elif call.log_normalizer is not None:
            mass = (s.lse - s.positive - call.log_normalizer).exp()
            row_loss = torch.where(full, mass * call.p.temperature * (s.expected - s.positive), 0.0)
        elif denominator == OWN_DENOMINATOR:
            row_loss, slope = call.own_terms(s.lse, s.positive, s.count)
            row_loss = torch.where(full, row_loss, 0.0)
        else:
            row_loss = torch.where(full, s.lse - s.positive, 0.0)
        if denominator < LOGSUMEXP:
            row_loss = torch.where(counted, row_loss, 0.0)
        if scale_by_temperature:
            row_loss = call.p.temperature * row_loss
        weight, inverse_z = call.row_weights(counted)
        loss = torch.where(counted, weight * row_loss, 0.0)
        if reduction != 0:
            # Z = 0 gives 0, whatever the rows sum to.
            loss = torch.where(inverse_z != 0, loss.sum() * inverse_z, 0.0)
        count = s.count if denominator < LOGSUMEXP else torch.ones_like(s.count)
        stats = torch.stack([s.lse, s.positive, row_loss, s.expected, count])
        if not grads & GRADIENTS:
            return loss, stats, *call.gradients(0, Coefficients(stats, None), weight, row_loss)
        upstream = weight * inverse_z
        c = call.coefficients(upstream, s.lse, s.positive, s.count, slope)
        return loss, stats, *call.gradients(grads, c, upstream, row_loss)


def contrastive_bwd(grad_loss: Tensor, stats: Tensor, *arguments) -> tuple[Tensor, ...]:
    """The six gradients; `arguments` are those of contrastive_fwd."""
    *arguments, grads = arguments
    with torch.cuda.device_of(stats):
        call = Call(*arguments)
        lse, positive, row_loss, _, count = stats
        slope = None
        if call.denominator == OWN_DENOMINATOR:
            _, slope = call.own_terms(lse.contiguous(), positive, count)
        counted = count > 0
        weight, inverse_z = call.row_weights(counted)
        # Rows that do not count get 0 under an infinite or NaN gradient too.
        upstream = torch.where(counted, grad_loss.to(call.acc) * weight * inverse_z, 0.0)
        c = call.coefficients(upstream, lse, positive, count, slope)
        return call.gradients(grads, c, upstream, row_loss)
