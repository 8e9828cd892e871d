"""Batching rules: vmap over samples is one kernel call over all rows, not a loop.

A batch of B problems of N rows is one problem of B * N rows. Each problem's own mean is folded into the sample weights,
u / Z, so that rows of several problems share a call. Class vectors (scale, bias, margins) that are batched themselves,
or whose gradient is wanted per problem, have no such form: those cases call the kernel once a problem.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NONE, _MEAN = 0, 1
_LOGITS, _TARGET, _WEIGHT, _MASK, _SAMPLE_WEIGHT, _ROW_CLASS = 0, 1, 2, 7, 8, 9
_ROW_ARGUMENTS = (_LOGITS, _TARGET, _MASK, _SAMPLE_WEIGHT, _ROW_CLASS)  # an entry a row; other tensors are per class
_REDUCTION, _IGNORE_INDEX = 15, 16  # positions in the arguments that all operators share

_ops = torch.ops.ltkernels


def _foldable(in_dims: tuple) -> bool:
    return all(dim is None for position, dim in enumerate(in_dims) if position not in _ROW_ARGUMENTS)


def _loop(op, info, in_dims: tuple, args: tuple) -> tuple[tuple, tuple]:
    """One call a problem."""

    def problem(b: int) -> list:
        return [a if dim is None else a.select(dim, b) for a, dim in zip(args, in_dims, strict=True)]

    if not info.batch_size:
        raise ValueError("vmap: expected at least one problem, got none")
    results = [op(*problem(b)) for b in range(info.batch_size)]
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _fold(info, in_dims: tuple, args: tuple, undefined: float) -> tuple[list, int, Tensor]:
    """The shared arguments as one problem of B * N rows under reduction "none", N, and whose loss is defined: (B,).

    A mean over rows that count nothing, Z = 0, is not: its rows get the share ``undefined``.
    """
    batch = info.batch_size
    args = list(args)

    def batched(position: int) -> Tensor:
        x, dim = args[position], in_dims[position]
        return x.unsqueeze(0).expand(batch, *x.shape) if dim is None else x.movedim(dim, 0)

    logits, target = batched(_LOGITS), batched(_TARGET)
    rows, classes = logits.shape[1:]
    share, defined = _share_of_row(args, batched, target, rows, logits, undefined)
    args[_LOGITS] = logits.reshape(batch * rows, classes)
    args[_TARGET] = target.reshape(batch * rows, *target.shape[2:])
    if args[_MASK] is not None:
        mask = batched(_MASK)  # (B, C) or (B, N, C)
        if in_dims[_MASK] is not None or mask.dim() == 3:
            mask = mask.unsqueeze(1).expand(batch, rows, classes) if mask.dim() == 2 else mask
            args[_MASK] = mask.reshape(batch * rows, classes)
    if args[_ROW_CLASS] is not None:
        args[_ROW_CLASS] = batched(_ROW_CLASS).reshape(batch * rows)
    args[_SAMPLE_WEIGHT] = share.reshape(-1)
    args[_REDUCTION] = _NONE
    return args, rows, defined


def _share_of_row(
    args: list, batched, target: Tensor, rows: int, logits: Tensor, undefined: float
) -> tuple[Tensor, Tensor]:
    """u, or u / Z of the row's own problem under a mean, (B, N); whether there is something to divide by, (B,)."""
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if args[_SAMPLE_WEIGHT] is None:
        u = logits.new_ones((logits.shape[0], rows), dtype=acc)
    else:
        u = batched(_SAMPLE_WEIGHT).to(acc)
    if args[_REDUCTION] != _MEAN:
        return u, u.new_ones(u.shape[0], dtype=torch.bool)
    k = u
    if not target.is_floating_point():
        index = target.long()  # ignore_index does not fit every integer dtype
        kept = index != args[_IGNORE_INDEX]
        u = k = torch.where(kept, u, 0.0)  # whatever weight an ignored row has
        if args[_WEIGHT] is not None:
            w = args[_WEIGHT].to(acc)
            # The kernel names or marks a target out of range; as an index here it would end the use of a GPU.
            k = k * w[torch.where(kept, index, 0).remainder(w.shape[0])]
    total = k.sum(1, keepdim=True)
    defined = total != 0
    # Divided by 1 where it is undefined: a NaN there would reach the gradient of what other problems share.
    return torch.where(defined, u / torch.where(defined, total, 1.0), undefined), defined.squeeze(1)


def _reduced(loss: Tensor, rows: int, defined: Tensor, reduction: int) -> Tensor:
    loss = loss.reshape(defined.shape[0], rows)
    if reduction == _NONE:
        return loss
    return torch.where(defined, loss.sum(1), torch.nan)


def _check_slices(info, in_dims: tuple, args: tuple) -> None:
    """Shapes, dtypes and devices, which all slices share; values are for check_values, which looks below the batch."""
    if not info.batch_size:
        return
    _ops.margin_softmax_check(*(a if dim is None else a.select(dim, 0) for a, dim in zip(args, in_dims, strict=True)))


@torch.library.register_vmap("ltkernels::margin_softmax")
def _(info, in_dims, *args):
    *_, return_lse = args
    if not _foldable(in_dims):
        return _loop(_ops.margin_softmax, info, in_dims, args)
    _check_slices(info, in_dims[:-1], args[:-1])  # folding reshapes, which takes more than it should
    folded, rows, defined = _fold(info, in_dims, args, undefined=0.0)
    loss, lse = _ops.margin_softmax(*folded)
    lse = lse.reshape(info.batch_size, rows) if return_lse else lse.new_empty((info.batch_size, 0))
    return (_reduced(loss, rows, defined, args[_REDUCTION]), lse), (0, 0)


@torch.library.register_vmap("ltkernels::margin_softmax_fwd")
def _(info, in_dims, *args):
    *_, with_grad = args
    if not _foldable(in_dims):
        return _loop(_ops.margin_softmax_fwd, info, in_dims, args)
    folded, rows, defined = _fold(info, in_dims, args, undefined=torch.nan)
    batch = info.batch_size
    loss, stats, grad = _ops.margin_softmax_fwd(*folded)
    grad = grad.reshape(batch, rows, folded[_LOGITS].shape[1]) if with_grad else grad.new_empty((batch, 0))
    loss = _reduced(loss, rows, defined, args[_REDUCTION])
    return (loss, stats.reshape(3, batch, rows), grad), (0, 1, 0)


@torch.library.register_vmap("ltkernels::margin_softmax_bwd")
def _(info, in_dims, grad_loss, grad_lse, stats, *args):
    upstream_dims, shared_dims = in_dims[:3], in_dims[3:]
    grads = args[-1]
    if not _foldable(shared_dims) or grads != 1:
        return _loop(_ops.margin_softmax_bwd, info, in_dims, (grad_loss, grad_lse, stats, *args))
    batch = info.batch_size
    folded, rows, _ = _fold(info, shared_dims, args, undefined=torch.nan)

    def rows_of(x: Tensor, dim: int | None) -> Tensor:
        x = x.unsqueeze(0).expand(batch, *x.shape) if dim is None else x.movedim(dim, 0)
        x = x.unsqueeze(1) if x.dim() == 1 else x
        return x.expand(batch, rows).reshape(-1)

    stats = (
        stats.unsqueeze(0).expand(batch, *stats.shape)
        if upstream_dims[2] is None
        else stats.movedim(upstream_dims[2], 0)
    )
    grad, *_ = _ops.margin_softmax_bwd(
        rows_of(grad_loss, upstream_dims[0]),
        None if grad_lse is None else rows_of(grad_lse, upstream_dims[1]),
        stats.movedim(0, 1).reshape(3, batch * rows),
        *folded,
    )
    empty = stats.new_empty((batch, 0))
    return (grad.reshape(batch, rows, folded[_LOGITS].shape[1]), empty, empty), (0, 0, 0)


@torch.library.register_vmap("ltkernels::margin_softmax_check")
def _(info, in_dims, *args):
    _check_slices(info, in_dims, args)
    return None, None


def _call_each(name: str) -> None:
    """A kernel call a problem: for linear forms, with a classifier of each, and for embeddings that see each other."""

    @torch.library.register_vmap(f"ltkernels::{name}")
    def _(info, in_dims, *args):
        return _loop(getattr(_ops, name), info, in_dims, args)


for _operation in ("linear_margin_softmax", "contrastive"):
    for _pass in ("", "_fwd", "_bwd"):
        _call_each(_operation + _pass)


@torch.library.register_vmap("ltkernels::margin_softmax_scale_")
def _(info, in_dims, grad, grad_output):
    scale = grad_output.movedim(in_dims[1], 0) if in_dims[1] is not None else grad_output
    grad = grad if in_dims[0] is None else grad.movedim(in_dims[0], 0)
    grad.mul_(scale.reshape(-1, *[1] * (grad.dim() - 1)) if in_dims[1] is not None else scale)
    return None, None
