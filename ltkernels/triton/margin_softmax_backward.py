"""Backward pass of margin_softmax.py: the gradient G, recomputed from the logits and the statistics of each row.

    G[i,j]  = (c_i * T_i + e_i) * softmax_j(v_i) - c_i * t'[i,j]
    df[i,j] = s * a[j] * G[i,j]                da[j] = s * sum_i f[i,j] * G[i,j]            db[j] = sum_i G[i,j]
    dDelta[k] = sum of G[i] over y_i = k       dm[j] = -s * sum_i t[i,j] * G[i,j]

A first kernel reduces each row to c_i * T_i + e_i, c_i and eps / |allowed_i|; from there on every element stands for
itself, so that sums over rows can run down the columns. They use no atomics: fixed parts of the rows are summed in
order, and then the parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltkernels.triton import _launch
from ltkernels.triton._launch import ceil_div, kernel_calls
from ltkernels.triton.margin_softmax_rows import (
    inverse_normalizer,
    launch_normalizer,
    nan_if_out_of_range,
    row_operands,
    row_stride,
    row_tile,
    smoothing_share,
)


@triton.jit(do_not_specialize=_launch.RUNTIME_ARGUMENTS)
def _row_coefficients(
    p,  # Operands
    coefficients_ptr,  # (3, N): c_i T_i + e_i, c_i, eps / |allowed_i|
    grad_loss_ptr,  # (N,), or one value with loss_stride 0
    grad_lse_ptr,  # (N,)
    z_parts_ptr,  # (n_parts,)
    n_rows,
    class_units,
    target_units,
    mask_units,
    ignore_index,
    flags,
    n_parts,
    inline_rows,
    loss_stride,
    lse_stride,
    has_lse,
    z_constant: tl.float64,
    smoothing: tl.float64,
    log_neighbor: tl.float64,
    back_from,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    Z_BLOCK: tl.constexpr,
    ADDITIVE: tl.constexpr,
    DENSE: tl.constexpr,
):
    ACC: tl.constexpr = coefficients_ptr.dtype.element_ty
    n_classes = class_units * VEC
    shape = (n_classes, 0, row_stride(target_units, VEC), row_stride(mask_units, VEC))
    silencing = (log_neighbor, back_from)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = rows < n_rows
    row = row_operands(p, rows, present, n_rows, n_classes, ignore_index, flags, ACC)
    y, kept, u, w_y, m_y = row
    total = w_y
    share = u
    if DENSE:
        share = smoothing_share(p, rows, present, n_classes, shape[3], smoothing, flags, ADDITIVE, ACC, BLOCK)
        lanes = tl.zeros([ROWS, BLOCK], ACC)
        for start in range(0, n_classes, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            # Only t' is used: the compiler drops the loads of everything else.
            tile = row_tile(
                p, rows, cols, present, row, share, shape, 1.0, smoothing, silencing, flags, False, ADDITIVE, True, ACC
            )
            lanes += tile[1]
        total = tl.sum(lanes, axis=1)
    inverse_z = inverse_normalizer(
        p, z_parts_ptr, n_parts, inline_rows, z_constant, n_classes, ignore_index, flags, ACC, Z_BLOCK
    )
    c = tl.load(grad_loss_ptr + rows * loss_stride, mask=present, other=0.0).to(ACC) * u * inverse_z
    e = tl.load(grad_lse_ptr + rows * lse_stride, mask=rows < n_rows * has_lse, other=0.0).to(ACC)
    tl.store(
        coefficients_ptr + rows,
        tl.where(kept, c * nan_if_out_of_range(p, row, total) + e, 0.0),
        mask=present,
    )
    tl.store(coefficients_ptr + n_rows + rows, tl.where(kept, c, 0.0), mask=present)
    tl.store(coefficients_ptr + n_rows + (n_rows + rows), share, mask=present)


@triton.jit
def _gradient_tile(
    p, stats_ptr, coefficients_ptr, rows, cols, present, n_rows, shape, ignore_index, scale, smoothing, silencing,
    flags, AFFINE: tl.constexpr, ADDITIVE: tl.constexpr, DENSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(ROWS, BLOCK) each: G, exactly 0 where a class is removed or a row ignored, f with 0 for -inf, t; and s * a."""
    row = row_operands(p, rows, present, n_rows, shape[0], ignore_index, flags, ACC)
    top = tl.load(stats_ptr + rows, mask=present, other=0.0)
    logsum = tl.load(stats_ptr + n_rows + rows, mask=present, other=0.0)
    softmax_weight = tl.load(coefficients_ptr + rows, mask=present, other=0.0)
    target_weight = tl.load(coefficients_ptr + n_rows + rows, mask=present, other=0.0)
    share = tl.load(coefficients_ptr + n_rows + (n_rows + rows), mask=present, other=0.0)
    v, weighted, allowed, slope, f, t = row_tile(
        p, rows, cols, present, row, share, shape, scale, smoothing, silencing, flags, AFFINE, ADDITIVE, DENSE, ACC
    )
    softmax = tl.exp((v - top[:, None]) - logsum[:, None])
    active = allowed & row[1][:, None]
    g = tl.where(active, softmax_weight[:, None] * softmax - target_weight[:, None] * weighted, 0.0)
    return g, tl.where(active & (f != float("-inf")), f, 0.0), t, slope


@triton.jit(do_not_specialize=_launch.RUNTIME_ARGUMENTS)
def _backward(
    p,  # Operands
    stats_ptr,  # (3, N)
    coefficients_ptr,  # (3, N)
    grad_ptr,  # (N, C)
    sums_ptr,  # (3, parts, C): gradients of a, b and m from each part of the rows
    n_rows,
    class_units,
    logits_units,
    target_units,
    mask_units,
    ignore_index,
    flags,
    rows_per_program,
    scale: tl.float64,
    smoothing: tl.float64,
    log_neighbor: tl.float64,
    back_from,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    AFFINE: tl.constexpr,
    ADDITIVE: tl.constexpr,
    DENSE: tl.constexpr,
    GRAD: tl.constexpr,  # write the gradient of the logits
    CLASS: tl.constexpr,  # sum over the rows
):
    """A block of columns of a part of the rows, ROWS rows at a time in order."""
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    n_classes = class_units * VEC
    shape = (n_classes, row_stride(logits_units, VEC), row_stride(target_units, VEC), row_stride(mask_units, VEC))
    silencing = (log_neighbor, back_from)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.program_id(0).to(tl.int64) * rows_per_program
    end = tl.minimum(begin + rows_per_program, n_rows)
    scale_lanes = tl.zeros([ROWS, BLOCK], ACC)
    bias_lanes = tl.zeros([ROWS, BLOCK], ACC)
    margin_lanes = tl.zeros([ROWS, BLOCK], ACC)
    for start in range(begin, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        present = rows < end
        g, f, t, slope = _gradient_tile(
            p, stats_ptr, coefficients_ptr, rows, cols, present, n_rows, shape, ignore_index, scale, smoothing,
            silencing, flags, AFFINE, ADDITIVE, DENSE, ACC,
        )  # fmt: skip
        if GRAD:
            inside = present[:, None] & (cols < n_classes)[None, :]
            df = (g * slope).to(grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + rows[:, None] * n_classes + cols[None, :], df, mask=inside)
        if CLASS:
            scale_lanes += f * g
            bias_lanes += g
            margin_lanes += t * g
    if CLASS:
        s = tl.cast(scale, ACC)
        in_row = cols < n_classes
        part_size = tl.num_programs(0).to(tl.int64) * n_classes
        sums_ptr += tl.program_id(0).to(tl.int64) * n_classes + cols
        tl.store(sums_ptr, s * tl.sum(scale_lanes, axis=0), mask=in_row)
        tl.store(sums_ptr + part_size, tl.sum(bias_lanes, axis=0), mask=in_row)
        tl.store(sums_ptr + 2 * part_size, -s * tl.sum(margin_lanes, axis=0), mask=in_row)


@triton.jit(do_not_specialize=_launch.RUNTIME_ARGUMENTS)
def _pairwise_backward(
    p,  # Operands
    stats_ptr,  # (3, N)
    coefficients_ptr,  # (3, N)
    grad_ptr,  # (C, C)
    order_ptr,  # (N,) rows sorted by class
    bounds_ptr,  # (C + 1,) where the rows of each class begin in it
    n_rows,
    class_units,
    logits_units,
    mask_units,
    ignore_index,
    flags,
    scale: tl.float64,
    smoothing: tl.float64,
    log_neighbor: tl.float64,
    back_from,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    AFFINE: tl.constexpr,
    DENSE: tl.constexpr,
):
    """A block of columns of the sum of G over the rows of one class, in the order of the batch."""
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    n_classes = class_units * VEC
    shape = (n_classes, row_stride(logits_units, VEC), 0, row_stride(mask_units, VEC))
    silencing = (log_neighbor, back_from)
    label = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(bounds_ptr + label)
    end = tl.load(bounds_ptr + label + 1)
    lanes = tl.zeros([ROWS, BLOCK], ACC)
    for start in range(begin, end, ROWS):
        places = start + tl.arange(0, ROWS)
        present = places < end
        rows = tl.load(order_ptr + places, mask=present, other=0)
        g, f, t, slope = _gradient_tile(
            p, stats_ptr, coefficients_ptr, rows, cols, present, n_rows, shape, ignore_index, scale, smoothing,
            silencing, flags, AFFINE, True, DENSE, ACC,
        )  # fmt: skip
        lanes += g
    tl.store(grad_ptr + label * n_classes + cols, tl.sum(lanes, axis=0), mask=cols < n_classes)


def margin_softmax_bwd(
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    stats: Tensor,
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
    grads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the logits (bit 1 of `grads`), of a, b and m as (3, C) (bit 2) and of Delta (bit 4), or empty."""
    n_rows, n_classes = logits.shape
    grad_logits = logits.new_empty((n_rows, n_classes) if grads & 1 else (0,))
    if n_rows == 0:
        grad_class = stats.new_zeros((3, n_classes) if grads & 2 else (0,))
        return grad_logits, grad_class, stats.new_zeros((n_classes, n_classes) if grads & 4 else (0,))
    x = _launch.prepare(
        stats, logits, target, weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight,
        row_class, neighbor_offsets, neighbor_classes, neighbor_weight, back_from, label_smoothing,
    )  # fmt: skip
    stats = stats.contiguous()
    with torch.cuda.device_of(logits):
        coefficients = _launch_row_coefficients(x, grad_loss, grad_lse, stats, reduction, ignore_index, label_smoothing)
        common = (x, stats, coefficients, scale, ignore_index, label_smoothing)
        grad_class = stats.new_empty(0)
        if grads & 3:
            grad_class = _launch_backward(*common, grad_logits, bool(grads & 1), bool(grads & 2))
        grad_pairwise = _launch_pairwise_backward(*common) if grads & 4 else stats.new_empty(0)
    return grad_logits, grad_class, grad_pairwise


def _launch_row_coefficients(x, grad_loss, grad_lse, stats, reduction, ignore_index, label_smoothing) -> Tensor:
    """(3, N): what the gradient of an element needs to know of its whole row."""
    n_rows, n_classes = x.operands.logits.shape
    z_parts, n_parts, inline_rows, z_constant = launch_normalizer(x, stats, reduction, ignore_index)
    rows, block = (2, 1024 if n_classes > 512 else 512) if x.dense else (128, 16)
    coefficients = torch.empty_like(stats)
    kernel_calls["triton.margin_softmax.row_coefficients"] += 1
    _row_coefficients[(ceil_div(n_rows, rows),)](
        x.operands, coefficients, grad_loss, stats if grad_lse is None else grad_lse, z_parts, n_rows, x.class_units,
        x.target_units, x.mask_units, ignore_index, x.flags, n_parts, inline_rows,
        grad_loss.stride(0) if grad_loss.dim() else 0, 0 if grad_lse is None else grad_lse.stride(0),
        int(grad_lse is not None), z_constant, label_smoothing, x.log_neighbor, x.back_from,
        VEC=x.vec, ROWS=rows, BLOCK=block, Z_BLOCK=512, ADDITIVE=x.additive, DENSE=x.dense, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    return coefficients


def _launch_backward(
    x, stats, coefficients, scale, ignore_index, label_smoothing, grad_logits, with_logits, with_class
) -> Tensor:
    """Writes `grad_logits` and returns the (3, C) sums, each if asked to."""
    n_rows, n_classes = x.operands.logits.shape
    rows, block, warps = _launch.tile_blocks(n_classes, stats.dtype.itemsize == 8)
    column_blocks = ceil_div(n_classes, block)
    rows_per_program = rows
    if with_class:
        # About 512 programs, four for each processor of a large GPU. The parts decide the rounding: they depend on
        # the shape alone, not on the device.
        parts = max(1, min(128, 512 // column_blocks))
        rows_per_program = ceil_div(ceil_div(n_rows, parts), rows) * rows
    parts = ceil_div(n_rows, rows_per_program)
    sums = stats.new_empty((3, parts, n_classes) if with_class else (0,))
    kernel_calls["triton.margin_softmax.backward"] += 1
    _backward[(parts, column_blocks)](
        x.operands, stats, coefficients, grad_logits, sums, n_rows, x.class_units, x.logits_units, x.target_units,
        x.mask_units, ignore_index, x.flags, rows_per_program, scale, label_smoothing, x.log_neighbor,
        x.back_from, VEC=x.vec, ROWS=rows, BLOCK=block, AFFINE=x.affine, ADDITIVE=x.additive, DENSE=x.dense,
        GRAD=with_logits, CLASS=with_class, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    return sums.sum(1) if with_class else sums


def _launch_pairwise_backward(x, stats, coefficients, scale, ignore_index, label_smoothing) -> Tensor:
    """(C, C) gradient of Delta."""
    n_rows, n_classes = x.operands.logits.shape
    labels, order = x.operands.target.long().sort(stable=True)
    bounds = torch.searchsorted(labels, torch.arange(n_classes + 1, device=labels.device))
    rows, block, warps = _launch.tile_blocks(n_classes, stats.dtype.itemsize == 8)
    grad = stats.new_empty((n_classes, n_classes))
    kernel_calls["triton.margin_softmax.pairwise_backward"] += 1
    _pairwise_backward[(n_classes, ceil_div(n_classes, block))](
        x.operands, stats, coefficients, grad, order, bounds, n_rows, x.class_units, x.logits_units, x.mask_units,
        ignore_index, x.flags, scale, label_smoothing, x.log_neighbor, x.back_from, VEC=x.vec, ROWS=rows,
        BLOCK=block, AFFINE=x.affine, DENSE=x.dense, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    return grad
