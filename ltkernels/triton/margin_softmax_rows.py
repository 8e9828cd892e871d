"""What the kernels of margin_softmax.py share: a row's scalars, the normaliser Z, and a tile of v and t'."""

from __future__ import annotations

import triton
import triton.language as tl

from ltkernels.triton import _launch
from ltkernels.triton._launch import kernel_calls


@triton.jit
def _length(n, flags, BIT: tl.constexpr):
    """The extent of an optional operand: n, or 0 so that no load of it is in bounds."""
    return n * ((flags >> BIT) & 1)


@triton.jit
def row_stride(units, VEC: tl.constexpr):
    """In elements, 64 bits: the rows of a view may be any distance apart."""
    return tl.cast(units, tl.int64) * VEC


@triton.jit
def row_operands(
    p,  # Operands
    rows,  # (ROWS,) int64
    present,  # (ROWS,) bool
    n_rows,
    n_classes,
    ignore_index,
    flags,
    ACC: tl.constexpr,
    WEIGHT: tl.constexpr = _launch.WEIGHT,
    SAMPLE_WEIGHT: tl.constexpr = _launch.SAMPLE_WEIGHT,
    MARGIN: tl.constexpr = _launch.MARGIN,
):
    """(ROWS,) each: class y (-1 if there is none, it is ignored or out of range), kept, u, w[y] and m[y].

    y is the class index, or row_class where the target is a distribution.
    """
    u = tl.load(p.sample_weight + rows, mask=present & (rows < _length(n_rows, flags, SAMPLE_WEIGHT)), other=1.0)
    u = u.to(ACC)
    zero = tl.zeros_like(u)
    if p.target.dtype.element_ty.is_floating():
        kept = present
        label = (zero - 1).to(tl.int64)
        if p.neighbor_offsets.dtype.element_ty.is_int():
            label = tl.load(p.row_class + rows, mask=present, other=0).to(tl.int64)
        valid = kept & (label >= 0) & (label < n_classes)
        w_y = zero + 1
        m_y = zero
    else:
        label = tl.load(p.target + rows, mask=present, other=0).to(tl.int64)
        kept = present & (label != ignore_index)
        valid = kept & (label >= 0) & (label < n_classes)
        has_weight = valid & (label < _length(n_classes, flags, WEIGHT))
        has_margin = valid & (label < _length(n_classes, flags, MARGIN))
        w_y = tl.load(p.weight + label, mask=has_weight, other=1.0).to(ACC)
        m_y = tl.load(p.target_margin + label, mask=has_margin, other=0.0).to(ACC)
    # 32 bits, because every element of a tile is compared with it.
    y = tl.where(valid, label, -1).to(tl.int32)
    return y, kept, u, w_y, m_y


@triton.jit
def nan_if_out_of_range(p, row, x):
    """x, or NaN where a row that is kept has a class out of range."""
    if not p.target.dtype.element_ty.is_floating() or p.neighbor_offsets.dtype.element_ty.is_int():
        x = tl.where(row[1] & (row[0] < 0), float("nan"), x)
    return x


@triton.jit
def _sum_row_weights(p, begin, end, n_classes, ignore_index, flags, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of u_i w[y_i] over the rows kept among [begin, end), always in the same order."""
    lanes = tl.zeros([BLOCK], ACC)
    for start in range(begin, end, BLOCK):
        rows = start + tl.arange(0, BLOCK).to(tl.int64)
        row = row_operands(p, rows, rows < end, end, n_classes, ignore_index, flags, ACC)
        lanes += tl.where(row[1], row[2] * row[3], 0.0)
    return tl.sum(lanes, axis=0)


@triton.jit(do_not_specialize=_launch.RUNTIME_ARGUMENTS)
def _normalizer_parts(
    p,
    parts_ptr,  # (num_programs,)
    n_rows,
    n_classes,
    ignore_index,
    flags,
    BLOCK: tl.constexpr,
):
    length = tl.cdiv(n_rows, tl.num_programs(0))
    begin = tl.program_id(0) * length
    end = tl.minimum(begin + length, n_rows)
    part = _sum_row_weights(p, begin, end, n_classes, ignore_index, flags, parts_ptr.dtype.element_ty, BLOCK)
    tl.store(parts_ptr + tl.program_id(0), part)


def launch_normalizer(x: _launch.Inputs, stats, reduction: int, ignore_index: int):
    """Z as `inverse_normalizer` takes it: parts, how many they are, rows that each program sums, and a constant."""
    n_rows, n_classes = x.operands.logits.shape
    if reduction != 1:
        return stats, 0, 0, 1.0
    if x.operands.target.is_floating_point() and not x.flags & 1 << _launch.SAMPLE_WEIGHT:
        return stats, 0, 0, float(n_rows)
    if n_rows <= _launch.INLINE_NORMALIZER_ROWS:
        return stats, 0, n_rows, 0.0
    n_parts = _launch.NORMALIZER_PARTS
    parts = stats.new_empty(n_parts)
    kernel_calls["triton.margin_softmax.normalizer"] += 1
    _normalizer_parts[(n_parts,)](
        x.operands, parts, n_rows, n_classes, ignore_index, x.flags, BLOCK=1024, num_warps=4, enable_fp_fusion=True
    )
    return parts, n_parts, 0, 0.0


@triton.jit
def inverse_normalizer(
    p,
    parts_ptr,
    n_parts,
    inline_rows,
    constant,
    n_classes,
    ignore_index,
    flags,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_PARTS: tl.constexpr = _launch.NORMALIZER_PARTS,
):
    """1/Z, where Z is the sum of a constant, of the parts, and of the weights of the rows to sum here."""
    z = tl.cast(constant, ACC)
    if n_parts > 0:
        parts = tl.arange(0, MAX_PARTS)
        z += tl.sum(tl.load(parts_ptr + parts, mask=parts < n_parts, other=0.0), axis=0)
    if inline_rows > 0:
        z += _sum_row_weights(p, 0, inline_rows, n_classes, ignore_index, flags, ACC, BLOCK)
    return 1.0 / z


@triton.jit
def smoothing_share(
    p,
    rows,  # (ROWS,)
    present,  # (ROWS,)
    n_classes,
    mask_stride,
    smoothing,
    flags,
    ADDITIVE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    MASK: tl.constexpr = _launch.MASK,
):
    """(ROWS,) eps / |allowed_i|."""
    allowed = tl.zeros_like(rows).to(tl.int32) + n_classes
    if ADDITIVE:
        if _length(1, flags, MASK) != 0:
            lanes = tl.zeros([rows.shape[0], BLOCK], tl.int32)
            for start in range(0, n_classes, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                inside = present[:, None] & (cols < n_classes)[None, :]
                mask = tl.load(p.mask + rows[:, None] * mask_stride + cols[None, :], mask=inside, other=0)
                lanes += (mask != 0).to(tl.int32)
            allowed = tl.sum(lanes, axis=1)
    return tl.cast(smoothing, ACC) / tl.maximum(allowed, 1).to(ACC)


@triton.jit
def _silence(p, offset, cols, y, n_classes, silencing, ACC: tl.constexpr):
    """`offset` with log(lambda) for the classes in S(y)."""
    log_neighbor = tl.cast(silencing[0], ACC)
    back_from = silencing[1]
    # All classes but y from here on.
    silenced_from = tl.where(y >= back_from, back_from, n_classes)[:, None]
    offset = tl.where((cols >= silenced_from) & (cols != y[:, None]), log_neighbor, offset)
    begin = tl.load(p.neighbor_offsets + y, mask=y >= 0, other=0).to(tl.int32)
    end = tl.load(p.neighbor_offsets + y + 1, mask=y >= 0, other=0).to(tl.int32)
    # Rows have few neighbours: comparing each with the whole tile needs no exchange between threads.
    for entry in range(0, tl.max(end - begin, axis=0)):
        place = begin + entry
        neighbor = tl.load(p.neighbor_classes + place, mask=place < end, other=-1).to(tl.int32)
        offset = tl.where(cols == neighbor[:, None], log_neighbor, offset)
    return offset


@triton.jit
def row_tile(
    p,  # Operands
    rows,  # (ROWS,) int64
    cols,  # (BLOCK,)
    present,  # (ROWS,) bool
    row,  # of row_operands
    share,  # (ROWS,) of smoothing_share
    shape,  # n_classes and the row strides of logits, target and mask
    scale,  # s
    smoothing,  # eps
    silencing,  # log(lambda) and back_from
    flags,
    AFFINE: tl.constexpr,
    ADDITIVE: tl.constexpr,
    DENSE: tl.constexpr,
    ACC: tl.constexpr,
    WEIGHT: tl.constexpr = _launch.WEIGHT,
    MARGIN: tl.constexpr = _launch.MARGIN,
    BIAS: tl.constexpr = _launch.BIAS,
    CLASS_SCALE: tl.constexpr = _launch.CLASS_SCALE,
    ONE_SCALE: tl.constexpr = _launch.ONE_SCALE,
    MASK: tl.constexpr = _launch.MASK,
    PAIRWISE: tl.constexpr = _launch.PAIRWISE,
):
    """(ROWS, BLOCK) each: v (-inf where not allowed), t' for u = 1, allowed, s * a, f and t.

    Not allowed are masked classes, and those in S(y) if lambda = 0.
    """
    n_classes, logits_stride, target_stride, mask_stride = shape
    y, kept, u, w_y, m_y = row
    # Loads per class are full tiles as well: they then get the thread layout of the logits, without an exchange.
    cols = tl.broadcast_to(cols[None, :], [rows.shape[0], cols.shape[0]])
    inside = present[:, None] & (cols < n_classes)
    f = tl.load(p.logits + rows[:, None] * logits_stride + cols, mask=inside, other=0.0)
    silences: tl.constexpr = p.neighbor_offsets.dtype.element_ty.is_int()
    allowed = inside
    if ADDITIVE:
        has_mask = inside & (cols < _length(n_classes, flags, MASK))
        mask = tl.load(p.mask + rows[:, None] * mask_stride + cols, mask=has_mask, other=1)
        allowed = inside & (mask != 0)
        if silences:
            # From a loaded tile, whose thread layout the loop over the neighbours then keeps.
            offset = tl.where(allowed, 0.0, float("-inf")).to(ACC)
            offset = _silence(p, offset, cols, y, n_classes, silencing, ACC)
            allowed = allowed & (offset > float("-inf"))

    f = f.to(ACC)
    s = tl.cast(scale, ACC)
    slope = s * tl.load(p.logit_scale, mask=_length(1, flags, ONE_SCALE) != 0, other=1.0).to(ACC)
    if AFFINE:
        a = tl.load(p.logit_scale + cols, mask=cols < _length(n_classes, flags, CLASS_SCALE), other=1.0).to(ACC)
        b = tl.load(p.logit_bias + cols, mask=cols < _length(n_classes, flags, BIAS), other=0.0).to(ACC)
        slope = slope * a
        v = f * slope + b
    else:
        v = f * slope
    probabilities: tl.constexpr = p.target.dtype.element_ty.is_floating()
    if probabilities:
        t = tl.load(p.target + rows[:, None] * target_stride + cols, mask=inside, other=0.0).to(ACC)
        m = tl.load(p.target_margin + cols, mask=cols < _length(n_classes, flags, MARGIN), other=0.0).to(ACC)
        v -= s * m * t
    else:
        is_target = cols == y[:, None]
        t = is_target.to(ACC)
        v = tl.where(is_target, v - (s * m_y)[:, None], v)

    if ADDITIVE:
        has_pairwise = inside & (cols < _length(n_classes, flags, PAIRWISE))
        offsets = tl.maximum(y, 0).to(tl.int64)[:, None] * n_classes + cols
        v += tl.load(p.pairwise_margin + offsets, mask=has_pairwise, other=0.0).to(ACC)
        if silences:
            v += offset
    # Also where v is NaN: what is not allowed may hold anything.
    v = tl.where(allowed, v, float("-inf"))

    if DENSE:
        weighted = tl.cast(1.0 - smoothing, ACC) * t + tl.where(allowed, share[:, None], 0.0)
        if probabilities:
            weighted = tl.where(allowed, weighted, 0.0)
        w = tl.load(p.weight + cols, mask=cols < _length(n_classes, flags, WEIGHT), other=1.0).to(ACC)
        weighted *= w
    else:
        weighted = tl.where(is_target, w_y[:, None], 0.0)
    return v, weighted, allowed, slope, f, t
