"""The host side of the row kernels: which operands a call has, and how large a block each kernel gets."""

from __future__ import annotations

import functools
import math
from collections import Counter
from typing import NamedTuple

import triton
from torch import Tensor

# Launches by kernel: tests and diagnostics see which kernel served a call.
kernel_calls: Counter[str] = Counter()

# Rows of up to this many classes stay in registers from load to store; up to the second number if they are plain (no
# a, b, mask, Delta or distribution as target) and 16-byte aligned. Longer rows would leave a processor with one block
# of threads, which waits for its loads and its stores in turn: two sweeps in smaller blocks overlap them, and the
# second sweep hits the caches.
WHOLE_ROW_CLASSES, WHOLE_PLAIN_ROW_CLASSES = 4096, 8192
# Up to this many rows, each program sums Z itself, which saves a launch; beyond, a kernel sums Z in 64 parts first.
INLINE_NORMALIZER_ROWS = 512
NORMALIZER_PARTS = 64

# Bit of each optional operand in `flags`, set where it is there. Kernels get them as default arguments, because
# Triton compares every global that a kernel reads with its compiled value at each launch.
WEIGHT, SAMPLE_WEIGHT, MARGIN, BIAS, CLASS_SCALE, ONE_SCALE, MASK, PAIRWISE = range(8)

# Arguments whose value must not be compiled in: Triton would make one kernel for 1, one for multiples of 16 and one
# for the rest, of each of them.
RUNTIME_ARGUMENTS = (
    "n_rows", "n_classes", "class_units", "logits_units", "target_units", "mask_units", "ignore_index", "flags",
    "n_parts", "inline_rows", "loss_stride", "lse_stride", "has_lse", "rows_per_program", "back_from",
)  # fmt: skip


class Operands(NamedTuple):
    """The inputs as the kernels see them. An absent one is any tensor, and its flag is not set."""

    logits: Tensor  # f (N, C), unit stride along classes
    target: Tensor  # (N,) class indices y, or (N, C) probabilities t with unit stride along classes
    weight: Tensor  # w (C,)
    logit_scale: Tensor  # a (C,) or ()
    logit_bias: Tensor  # b (C,)
    target_margin: Tensor  # m (C,)
    pairwise_margin: Tensor  # Delta (C, C)
    mask: Tensor  # (C,) or (N, C) bool, unit stride along classes
    sample_weight: Tensor  # u (N,)
    row_class: Tensor  # (N,) y where the target is a distribution, to look up S(y)
    neighbor_offsets: Tensor  # (C + 1,) int32: S(y) is
    neighbor_classes: Tensor  # neighbor_classes[neighbor_offsets[y] : neighbor_offsets[y + 1]]


class Inputs(NamedTuple):
    """What every launch of a call needs to know of its inputs."""

    operands: Operands
    flags: int
    affine: bool  # an a or b per class
    additive: bool  # a mask, Delta or silenced neighbours
    dense: bool  # the target is a distribution: probabilities or smoothing
    vec: int  # elements that a thread can load at once
    class_units: int  # C and row strides, in units of vec
    logits_units: int
    target_units: int
    mask_units: int
    log_neighbor: float  # log(lambda), -inf for lambda = 0
    back_from: int  # rows of classes from here on silence all others from here on; C: none


def prepare(
    stats, logits, target, weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight,
    row_class, neighbor_offsets, neighbor_classes, neighbor_weight, back_from, label_smoothing,
) -> Inputs:  # fmt: skip
    """`stats` stands in for absent operands: its dtype is their usual one, so that presence does not recompile.

    For the neighbours it is not: whether they are integers tells the kernels, as a constant, whether there are any.
    """
    flags = 0
    optional = []
    for x, bit in (
        (weight, WEIGHT),
        (logit_scale, CLASS_SCALE if logit_scale is not None and logit_scale.dim() else ONE_SCALE),
        (logit_bias, BIAS),
        (target_margin, MARGIN),
        (pairwise_margin, PAIRWISE),
        (sample_weight, SAMPLE_WEIGHT),
    ):
        if x is None:
            optional.append(stats)
        else:
            flags |= 1 << bit
            optional.append(x.contiguous())
    logits = _unit_stride(logits)
    probabilities = target.is_floating_point()
    target = _unit_stride(target) if probabilities else target.contiguous()
    if mask is not None:
        flags |= 1 << MASK
        mask = _unit_stride(mask)

    n_classes = logits.shape[1]
    logits_stride = logits.stride(0)
    target_stride = target.stride(0) if probabilities else 0
    mask_stride = mask.stride(0) if mask is not None and mask.dim() == 2 else 0
    # The largest power of two, up to 16 bytes, that divides C and every row stride. The kernels multiply it back in,
    # which proves the alignment to the compiler: by itself it only sees whether an integer is a multiple of 16.
    bits = n_classes | logits_stride | target_stride | mask_stride | (16 // logits.element_size())
    vec = bits & -bits
    weight, logit_scale, logit_bias, target_margin, pairwise_margin, sample_weight = optional
    silencing = (row_class, neighbor_offsets, neighbor_classes)
    return Inputs(
        Operands(
            logits, target, weight, logit_scale, logit_bias, target_margin, pairwise_margin,
            stats if mask is None else mask, sample_weight,
            *(stats if x is None else x.contiguous() for x in silencing),
        ),
        flags,
        bool(flags & (1 << CLASS_SCALE | 1 << BIAS)),
        bool(flags & (1 << MASK | 1 << PAIRWISE)) or neighbor_offsets is not None,
        probabilities or label_smoothing != 0.0,
        vec,
        n_classes // vec,
        logits_stride // vec,
        target_stride // vec,
        mask_stride // vec,
        math.log(neighbor_weight) if neighbor_weight > 0 else -math.inf,
        back_from if back_from >= 0 else n_classes,
    )  # fmt: skip


def ceil_div(x: int, y: int) -> int:
    return -(-x // y)  # triton.cdiv unwraps constexprs first, at 2 us a call


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class Blocks(NamedTuple):
    rows: int
    classes: int
    warps: int


@functools.cache
def row_blocks(n_classes: int, double: bool, limit: int) -> Blocks:
    """Blocks of the forward pass: whole rows up to ``limit`` classes, else parts of one row.

    8 values a thread (4 in float64) take 40 to 90 registers, by variant: a processor then holds 16 to 40 warps, and
    about 16 KB of bfloat16 are on their way to it, which is what the latency of memory times its bandwidth asks for.
    """
    values = 4 if double else 8
    if double:
        limit //= 2
    block = max(16, triton.next_power_of_2(n_classes))
    if block > limit:
        return Blocks(1, min(16 * 32 * values, block // 2), 16)
    rows = min(max(1, 4 * 32 * values // block), 32)  # short rows share a program
    return Blocks(rows, block, min(16, max(4, block // (32 * values))))


@functools.cache
def tile_blocks(n_classes: int, double: bool) -> Blocks:
    """Tiles of the backward kernels: as many values a thread as in the forward pass, on 4 warps."""
    block = min(max(16, triton.next_power_of_2(n_classes)), 256)
    return Blocks(min((512 if double else 1024) // block, 32), block, 4)
