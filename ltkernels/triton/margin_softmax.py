"""Margin-adjusted softmax cross-entropy over rows of logits, for CUDA in Triton.

    v[i,j]  = s * (a[j] * f[i,j] - m[j] * t[i,j]) + b[j] + Delta[y_i, j] + log(lambda) [j in S(y_i)]
              (-inf where mask is False, and in S(y_i) if lambda = 0: such t'[i,j] are 0)
    t'[i,j] = w[j] * ((1 - eps) * t[i,j] + eps / |allowed_i|)             T_i = sum_j t'[i,j]
    r_i     = T_i * logsumexp_j v[i,j] - sum_j t'[i,j] * v[i,j]           loss_i = u_i * r_i / Z
    G[i,j]  = (c_i * T_i + e_i) * softmax_j(v_i) - c_i * t'[i,j]          dloss/df[i,j] = s * a[j] * G[i,j]

with c_i the upstream gradient of the row's loss times u_i / Z, and e_i that of its log-sum-exp. Z is sum_i u_i w[y_i]
over the rows kept (class indices) or sum_i u_i (probabilities) under a mean, else 1. S(y) are the classes that rows of
class y silence: a sparse map, and for classes from back_from on all others from there on.

The forward pass reads the logits once and, if asked, writes the gradient for an upstream gradient of 1. The backward
pass (margin_softmax_backward.py) serves everything which that gradient does not cover: it recomputes G from the
logits and the row statistics. The kernels are compiled for {a or b per class} x {mask, Delta or S} x {one class or a
distribution as target} x {gradient}, and apart for S; whatever else differs between calls is a number or a flag read
at run time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltkernels.triton import _launch
from ltkernels.triton._launch import ceil_div, kernel_calls
from ltkernels.triton.margin_softmax_backward import margin_softmax_bwd
from ltkernels.triton.margin_softmax_rows import (
    inverse_normalizer,
    launch_normalizer,
    nan_if_out_of_range,
    row_operands,
    row_stride,
    row_tile,
    smoothing_share,
)

__all__ = [
    "kernel_calls",
    "margin_softmax_bwd",
    "margin_softmax_fwd",
    "margin_softmax_fwd_",
    "margin_softmax_scale_",
]


@triton.jit
def _shift(top):
    """What exponents are taken against: the row's maximum, or 0 if there is nothing above -inf, against inf - inf."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _log_sum(top, mass):
    """log sum exp(v - top); NaN for a row with no class left, which has no distribution."""
    return tl.where(top == float("-inf"), float("nan"), tl.log(mass))


@triton.jit
def _store_row(loss_ptr, stats_ptr, rows, present, row, n_rows, inverse_z, top, logsum, total, expected):
    y, kept, u, w_y, m_y = row
    r = tl.where(kept, total * logsum - expected, 0.0)
    tl.store(stats_ptr + rows, tl.where(kept, top, 0.0), mask=present)
    tl.store(stats_ptr + n_rows + rows, tl.where(kept, logsum, 0.0), mask=present)
    tl.store(stats_ptr + n_rows + (n_rows + rows), r, mask=present)
    # Under a mean 0/0 is NaN where no row is kept, as in torch.
    tl.store(loss_ptr + rows, tl.where(kept, u * r, 0.0) * inverse_z, mask=present)


@triton.jit
def _store_gradient(grad_ptr, rows, cols, present, row, allowed, g, slope, n_classes):
    g = tl.where(allowed & row[1][:, None], g * slope, 0.0)
    inside = present[:, None] & (cols < n_classes)[None, :]
    tl.store(grad_ptr + rows[:, None] * n_classes + cols[None, :], g.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_launch.RUNTIME_ARGUMENTS)
def _forward_whole_rows(
    p,  # Operands
    loss_ptr,  # (N,) u_i r_i / Z
    stats_ptr,  # (3, N) row max, log-sum, r
    grad_ptr,  # (N, C)
    z_parts_ptr,  # (n_parts,)
    n_rows,
    class_units,  # C / VEC; row strides are in units of VEC elements too
    logits_units,
    target_units,
    mask_units,
    ignore_index,
    flags,
    n_parts,
    inline_rows,
    z_constant: tl.float64,
    scale: tl.float64,
    smoothing: tl.float64,
    log_neighbor: tl.float64,  # log(lambda)
    back_from,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # at least C
    Z_BLOCK: tl.constexpr,
    AFFINE: tl.constexpr,
    ADDITIVE: tl.constexpr,
    DENSE: tl.constexpr,
    GRAD: tl.constexpr,
):
    """ROWS whole rows in registers: logits read once, gradient written once."""
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    n_classes = class_units * VEC
    shape = (n_classes, row_stride(logits_units, VEC), row_stride(target_units, VEC), row_stride(mask_units, VEC))
    silencing = (log_neighbor, back_from)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    present = rows < n_rows
    row = row_operands(p, rows, present, n_rows, n_classes, ignore_index, flags, ACC)
    y, kept, u, w_y, m_y = row
    share = u
    if DENSE:
        share = smoothing_share(p, rows, present, n_classes, shape[3], smoothing, flags, ADDITIVE, ACC, BLOCK)
    v, weighted, allowed, slope, f, t = row_tile(
        p, rows, cols, present, row, share, shape, scale, smoothing, silencing, flags, AFFINE, ADDITIVE, DENSE, ACC
    )

    top = tl.max(v, axis=1)
    z = v - _shift(top)[:, None]
    e = tl.exp(z)
    mass = tl.sum(e, axis=1)
    logsum = _log_sum(top, mass)
    if DENSE:
        total = tl.sum(weighted, axis=1)
        expected = tl.sum(tl.where(weighted != 0, weighted * z, 0.0), axis=1)
    else:
        total = w_y
        expected = tl.sum(tl.where(cols[None, :] == y[:, None], z, 0.0), axis=1)
        expected = tl.where(w_y != 0, w_y * expected, 0.0)
    total = nan_if_out_of_range(p, row, total)
    inverse_z = inverse_normalizer(
        p, z_parts_ptr, n_parts, inline_rows, z_constant, n_classes, ignore_index, flags, ACC, Z_BLOCK
    )
    _store_row(loss_ptr, stats_ptr, rows, present, row, n_rows, inverse_z, top, logsum, total, expected)
    if GRAD:
        c = u * inverse_z
        g = e * (c * total / mass)[:, None] - c[:, None] * weighted
        _store_gradient(grad_ptr, rows, cols, present, row, allowed, g, slope, n_classes)


@triton.jit(do_not_specialize=_launch.RUNTIME_ARGUMENTS)
def _forward_two_sweeps(
    p, loss_ptr, stats_ptr, grad_ptr, z_parts_ptr, n_rows, class_units, logits_units, target_units, mask_units,
    ignore_index, flags, n_parts, inline_rows, z_constant: tl.float64, scale: tl.float64, smoothing: tl.float64,
    log_neighbor: tl.float64, back_from,
    VEC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, Z_BLOCK: tl.constexpr,
    AFFINE: tl.constexpr, ADDITIVE: tl.constexpr, DENSE: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """As _forward_whole_rows for longer rows: an online softmax, then the gradient from logits still in the cache."""
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    n_classes = class_units * VEC
    shape = (n_classes, row_stride(logits_units, VEC), row_stride(target_units, VEC), row_stride(mask_units, VEC))
    silencing = (log_neighbor, back_from)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = rows < n_rows
    row = row_operands(p, rows, present, n_rows, n_classes, ignore_index, flags, ACC)
    y, kept, u, w_y, m_y = row
    share = u
    if DENSE:
        share = smoothing_share(p, rows, present, n_classes, shape[3], smoothing, flags, ADDITIVE, ACC, BLOCK)

    top = tl.full([ROWS], float("-inf"), ACC)
    mass = tl.zeros([ROWS], ACC)
    total = tl.zeros([ROWS], ACC)
    expected = tl.zeros([ROWS], ACC)  # of v - shift under t'; if not DENSE, v[y] itself
    for start in range(0, n_classes, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        tile = row_tile(
            p, rows, cols, present, row, share, shape, scale, smoothing, silencing, flags, AFFINE, ADDITIVE, DENSE, ACC
        )
        v = tile[0]
        new_top = tl.maximum(top, tl.max(v, axis=1))
        z = v - _shift(new_top)[:, None]
        mass = mass * tl.exp(top - _shift(new_top)) + tl.sum(tl.exp(z), axis=1)
        if DENSE:
            weighted = tile[1]
            part = tl.sum(tl.where(weighted != 0, weighted * z, 0.0), axis=1)
            expected += total * (_shift(top) - _shift(new_top)) + part
            total += tl.sum(weighted, axis=1)
        elif tl.max(((y >= start) & (y < start + BLOCK)).to(tl.int32), axis=0) != 0:
            expected += tl.sum(tl.where(cols[None, :] == y[:, None], v, 0.0), axis=1)
        top = new_top
    logsum = _log_sum(top, mass)
    if not DENSE:
        total = w_y
        expected = tl.where(w_y != 0, w_y * (expected - _shift(top)), 0.0)
    total = nan_if_out_of_range(p, row, total)
    inverse_z = inverse_normalizer(
        p, z_parts_ptr, n_parts, inline_rows, z_constant, n_classes, ignore_index, flags, ACC, Z_BLOCK
    )
    _store_row(loss_ptr, stats_ptr, rows, present, row, n_rows, inverse_z, top, logsum, total, expected)

    if GRAD:
        c = u * inverse_z
        k = c * total / mass
        for start in range(0, n_classes, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            v, weighted, allowed, slope, f, t = row_tile(
                p,
                rows,
                cols,
                present,
                row,
                share,
                shape,
                scale,
                smoothing,
                silencing,
                flags,
                AFFINE,
                ADDITIVE,
                DENSE,
                ACC,
            )
            g = tl.exp(v - _shift(top)[:, None]) * k[:, None] - c[:, None] * weighted
            _store_gradient(grad_ptr, rows, cols, present, row, allowed, g, slope, n_classes)


def margin_softmax_fwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    logit_scale: Tensor | None,
    logit_bias: Tensor | None,
    target_margin: Tensor | None,
    pairwise_margin: Tensor | None,
    mask: Tensor | None,
    sample_weight: Tensor | None,
    row_class: Tensor | None,
    neighbor_offsets: Tensor | None,
    neighbor_classes: Tensor | None,
    scale: float,
    neighbor_weight: float,
    back_from: int,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, (3, N) row statistics (max, log-sum, r) and the gradient of the logits for an upstream gradient of 1."""
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format) if with_grad else logits.new_empty(0)
    options = (
        target, weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight, row_class,
        neighbor_offsets, neighbor_classes, scale, neighbor_weight, back_from, reduction, ignore_index,
        label_smoothing,
    )  # fmt: skip
    return *_forward(logits, grad, with_grad, *options), grad


def margin_softmax_fwd_(logits: Tensor, *options) -> tuple[Tensor, Tensor]:
    """As `margin_softmax_fwd` with the gradient where the logits are: a program has read a tile when it writes it."""
    if not logits.is_contiguous():
        raise ValueError("logits: expected contiguous memory to write the gradient to")
    return _forward(logits, logits, True, *options)


def _forward(
    logits, grad, with_grad, target, weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask,
    sample_weight, row_class, neighbor_offsets, neighbor_classes, scale, neighbor_weight, back_from, reduction,
    ignore_index, label_smoothing,
):  # fmt: skip
    n_rows, n_classes = logits.shape
    double = logits.dtype == torch.float64
    stats = logits.new_empty((3, n_rows), dtype=torch.float64 if double else torch.float32)
    row_loss = stats.new_empty(n_rows)
    if n_rows > 0:
        x = _launch.prepare(
            stats, logits, target, weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask,
            sample_weight, row_class, neighbor_offsets, neighbor_classes, neighbor_weight, back_from, label_smoothing,
        )  # fmt: skip
        plain = not (x.affine or x.additive or x.dense) and x.vec * logits.element_size() == 16
        limit = _launch.WHOLE_PLAIN_ROW_CLASSES if plain else _launch.WHOLE_ROW_CLASSES
        rows, block, warps = _launch.row_blocks(n_classes, double, limit)
        kernel = _forward_whole_rows if block >= n_classes else _forward_two_sweeps
        with torch.cuda.device_of(logits):
            z_parts, n_parts, inline_rows, z_constant = launch_normalizer(x, stats, reduction, ignore_index)
            kernel_calls["triton.margin_softmax.forward"] += 1
            kernel[(ceil_div(n_rows, rows),)](
                x.operands, row_loss, stats, grad, z_parts, n_rows, x.class_units, x.logits_units, x.target_units,
                x.mask_units, ignore_index, x.flags, n_parts, inline_rows, z_constant, scale, label_smoothing,
                x.log_neighbor, x.back_from, VEC=x.vec, ROWS=rows, BLOCK=block, Z_BLOCK=128 * min(warps, 4),
                AFFINE=x.affine, ADDITIVE=x.additive, DENSE=x.dense, GRAD=with_grad, num_warps=warps,
                enable_fp_fusion=True,
            )  # fmt: skip
    if reduction == 0:
        return row_loss, stats
    if reduction == 1 and n_rows == 0:
        return stats.new_full((), float("nan")), stats
    return row_loss.sum(), stats


@triton.jit(do_not_specialize=("n_blocks",))
def _scale_in_place(
    grad_ptr,  # (size,)
    factor_ptr,  # ()
    size,
    n_blocks,  # from the host: rounding up here would overflow just below 2^31
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr)
    if factor != 1:
        for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
            offsets = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            grad = tl.load(grad_ptr + offsets, mask=offsets < size, other=0.0).to(factor.dtype)
            # Masked classes and ignored rows stay 0 under an infinite or NaN factor too.
            grad = tl.where(grad == 0, 0.0, grad * factor)
            tl.store(grad_ptr + offsets, grad.to(grad_ptr.dtype.element_ty), mask=offsets < size)


def margin_softmax_scale_(grad: Tensor, grad_output: Tensor) -> None:
    """grad *= grad_output in place, which costs a launch and no traffic where grad_output is 1."""
    size = grad.numel()
    if size > 0:
        block = 4096
        n_blocks = ceil_div(size, block)
        with torch.cuda.device_of(grad):
            kernel_calls["triton.margin_softmax.scale"] += 1
            _scale_in_place[(min(n_blocks, 1024),)](
                grad, grad_output, size, n_blocks, BLOCK=block, num_warps=8, enable_fp_fusion=True
            )
