"""How the launches of contrastive.py are cut: into tiles, and into parts of the side that a program loops over."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ltkernels.triton._launch import ceil_div

# Sums of a part of the keys for each row of the gradient: few rows and many keys are shared among this many programs,
# as far as the sums fit in this many bytes.
PROGRAMS = 256
WORKSPACE = 64 << 20


class Tiles(NamedTuple):
    rows: int
    keys: int
    depth: int  # columns multiplied at once
    out: int  # columns of the gradient summed at once; depth, where that is the whole width
    warps: int
    stages: int


@functools.cache
def tiles(width: int, dtype: torch.dtype, precision: str, gradient: bool, rich: bool) -> Tiles:
    """Tiles that leave no register spilled (tests/triton/test_contrastive_ahead_of_time.py).

    `rich`: a mask or margins by pair, whose addresses take two registers for each element of a tile, or key biases or
    sigmoids of positives.
    """
    depth = max(16, triton.next_power_of_2(width))
    if dtype == torch.float64:
        return Tiles(16, 32, min(depth, 16), min(depth, 64), 4, 1)
    if dtype == torch.float32 and precision == "ieee":  # no matrix instruction: operands are in registers
        return Tiles(32, 32, min(depth, 32), min(depth, 128), 8 if rich and gradient else 4, 2)
    wide = depth > (128 if dtype == torch.float32 else 256)
    if dtype == torch.float32:
        depth, out = 32 if wide else depth, min(depth, 128)
    else:
        depth, out = 64 if wide else depth, min(depth, 256)
    if rich and gradient:
        return Tiles(32, 32, depth, out, 8, 2)
    return Tiles(64, 32, depth, out, 8 if rich or wide or (gradient and out == 256) else 4, 2)


class Operands(NamedTuple):
    """The inputs as the kernels see them. An absent one is any tensor, and its bit is not set."""

    query: Tensor  # (M, D), unit stride along D
    key: Tensor  # (N, D); the queries, if there are none
    temperature: Tensor  # (M,)
    inverse_temperature: Tensor  # (M,)
    label: Tensor  # (M,) int64
    key_label: Tensor  # (N,) int64
    positive_index: Tensor  # (M,) int64
    allowed: Tensor  # (N,) or (M, N) bool, unit stride along N
    key_bias: Tensor  # (N,)
    pair_margin: Tensor  # (L, L)


def unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def parts_of(programs: int, length: int, block: int, workspace: int) -> tuple[int, int]:
    """How many parts `length` is shared among, and how long each is: at least 4 blocks, by the shapes alone."""
    parts = min(PROGRAMS // max(programs, 1), length // (4 * block), WORKSPACE // max(workspace, 1))
    per_part = max(1, ceil_div(ceil_div(length, max(parts, 1)), block)) * block
    return max(1, ceil_div(length, per_part)), per_part
