"""Loads the extension and completes its operators in Python: shapes for tracing, Triton for CUDA, rules for vmap.

The table of contents of the operators is csrc/ops.cpp.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ltkernels import _build_info

_build_info.check_versions()
from ltkernels import _C  # noqa: E402  (a mismatch is to be reported before the library is loaded)

BACKENDS = ("auto", "reference")
BACKEND = os.environ.get("LTKERNELS_BACKEND", "auto")
if BACKEND not in BACKENDS:
    raise ImportError(f"LTKERNELS_BACKEND: expected one of {', '.join(BACKENDS)}, got {BACKEND!r}")

KERNELS_ENABLED = BACKEND == "auto"

# The overload itself: looking it up through torch.ops costs a microsecond a call.
margin_softmax = torch.ops.ltkernels.margin_softmax.default
margin_softmax_check = torch.ops.ltkernels.margin_softmax_check.default
log_prior = torch.ops.ltkernels.log_prior.default

# The same without torch.ops' generic call, for eager execution; Dynamo cannot look inside.
margin_softmax_direct = _C.margin_softmax
log_prior_direct = _C.direct_log_prior(log_prior)

GRAD_LOGITS, GRAD_CLASS, GRAD_PAIRWISE = 1, 2, 4  # bits of margin_softmax_bwd's `grads`, as in margin_softmax_op.h

# Bits of linear_margin_softmax_fwd's and _bwd's `grads`, as in linear_margin_softmax.h.
GRAD_INPUT, GRAD_WEIGHT, GRAD_BIAS, GRAD_CLASSES, GRAD_PAIRS = 1, 2, 4, 8, 16

linear_margin_softmax = torch.ops.ltkernels.linear_margin_softmax.default
contrastive = torch.ops.ltkernels.contrastive.default


def uses_kernel(x: Tensor) -> bool:
    """Whether a kernel, not the definition in reference.py, serves tensors on the device of ``x``."""
    return KERNELS_ENABLED and (x.is_cpu or x.is_cuda or x.is_meta)


def kernel_calls() -> dict[str, int]:
    """How often each kernel of the library has run in this process, by name."""
    calls = dict(torch.ops.ltkernels.kernel_calls())
    if _triton_loaded:
        from ltkernels.triton._launch import kernel_calls as triton_calls  # of every module

        calls |= triton_calls
    return {name: count for name, count in calls.items() if count}


# -------------------------------------------------------------------------------------------------- shapes for tracing


def _accumulation_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@torch.library.register_fake("ltkernels::margin_softmax_fwd")
def _(
    logits, target, weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight, row_class,
    neighbor_offsets, neighbor_classes, scale, neighbor_weight, back_from, reduction, ignore_index, label_smoothing,
    with_grad,
):  # fmt: skip
    rows, classes = logits.shape
    acc = _accumulation_dtype(logits)
    loss = logits.new_empty((rows,) if reduction == 0 else (), dtype=acc)
    grad = logits.new_empty((rows, classes) if with_grad else (0,))
    return loss, logits.new_empty((3, rows), dtype=acc), grad


@torch.library.register_fake("ltkernels::margin_softmax_bwd")
def _(
    grad_loss, grad_lse, stats, logits, target, weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask,
    sample_weight, row_class, neighbor_offsets, neighbor_classes, scale, neighbor_weight, back_from, reduction,
    ignore_index, label_smoothing, grads,
):  # fmt: skip
    rows, classes = logits.shape
    acc = _accumulation_dtype(logits)
    return (
        logits.new_empty((rows, classes) if grads & GRAD_LOGITS else (0,)),
        logits.new_empty((3, classes) if grads & GRAD_CLASS else (0,), dtype=acc),
        logits.new_empty((classes, classes) if grads & GRAD_PAIRWISE else (0,), dtype=acc),
    )


@torch.library.register_fake("ltkernels::margin_softmax_fwd_")
def _(
    logits, target, weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight, row_class,
    neighbor_offsets, neighbor_classes, scale, neighbor_weight, back_from, reduction, ignore_index, label_smoothing,
):  # fmt: skip
    rows = logits.shape[0]
    acc = _accumulation_dtype(logits)
    return logits.new_empty((rows,) if reduction == 0 else (), dtype=acc), logits.new_empty((3, rows), dtype=acc)


@torch.library.register_fake("ltkernels::linear_margin_softmax_fwd")
def _(input, linear_weight, linear_bias, cosine, chunk_rows, *options):
    *_, reduction, _, _, predict, grads = options
    rows = input.shape[0]
    acc = _accumulation_dtype(input)
    return (
        input.new_empty((rows,) if reduction == 0 else (), dtype=acc),
        input.new_empty((3, rows), dtype=acc),
        input.new_empty((rows if predict > 0 else 0,), dtype=torch.int64),
        *_linear_gradients(input, linear_weight, linear_bias, grads),
    )


@torch.library.register_fake("ltkernels::linear_margin_softmax_bwd")
def _(grad_loss, grad_lse, stats, input, linear_weight, linear_bias, cosine, chunk_rows, *options):
    grads = options[-1]
    classes = linear_weight.shape[0]
    acc = _accumulation_dtype(input)
    return (
        *_linear_gradients(input, linear_weight, linear_bias, grads),
        input.new_empty((3, classes) if grads & GRAD_CLASSES else (0,), dtype=acc),
        input.new_empty((classes, classes) if grads & GRAD_PAIRS else (0,), dtype=acc),
    )


def _linear_gradients(input, linear_weight, linear_bias, grads):
    return (
        input.new_empty(input.shape if grads & GRAD_INPUT else (0,)),
        linear_weight.new_empty(linear_weight.shape if grads & GRAD_WEIGHT else (0,)),
        linear_bias.new_empty(linear_bias.shape) if grads & GRAD_BIAS else input.new_empty((0,)),
    )


@torch.library.register_fake("ltkernels::margin_softmax_scale_")
def _(grad, grad_output):
    return None


@torch.library.register_fake("ltkernels::contrastive_fwd")
def _(query, *rest):
    reduction, grads = rest[-2:]
    rows, acc = query.shape[0], _accumulation_dtype(query)
    loss = query.new_empty((rows,) if reduction == 0 else (), dtype=acc)
    return loss, query.new_empty((5, rows), dtype=acc), *_contrastive_gradients(query, *rest[:-1], grads=grads)


@torch.library.register_fake("ltkernels::contrastive_bwd")
def _(grad_loss, stats, query, *rest):
    return _contrastive_gradients(query, *rest[:-1], grads=rest[-1])


def _contrastive_gradients(
    query, key, temperature, labels, key_labels, positive_index, allowed, key_bias, pair_margin, sample_weight,
    log_normalizer, extra_positive, denominator, exclude_self, scale_by_temperature, reduction, *, grads,
):  # fmt: skip
    acc = _accumulation_dtype(query)
    leaves = (query, key, temperature, key_bias, pair_margin, extra_positive)
    dtypes = (query.dtype, query.dtype, acc, acc, acc, query.dtype)
    return tuple(
        query.new_empty(leaf.shape if leaf is not None and grads >> bit & 1 else (0,), dtype=dtype)
        for bit, (leaf, dtype) in enumerate(zip(leaves, dtypes, strict=True))
    )


# ------------------------------------------------------------------------------------------------------ Triton for CUDA

_triton_loaded = False


def _triton():
    """The Triton kernels, imported at the first CUDA call: importing triton takes a second."""
    global _triton_loaded
    from ltkernels.triton import margin_softmax as kernels

    _triton_loaded = True
    return kernels


def _contrastive_triton():
    global _triton_loaded
    from ltkernels.triton import contrastive as kernels

    _triton_loaded = True
    return kernels


@torch.library.impl("ltkernels::margin_softmax_fwd", "CUDA")
def _(*args):
    return _triton().margin_softmax_fwd(*args)


@torch.library.impl("ltkernels::margin_softmax_fwd_", "CUDA")
def _(*args):
    return _triton().margin_softmax_fwd_(*args)


@torch.library.impl("ltkernels::margin_softmax_bwd", "CUDA")
def _(*args):
    return _triton().margin_softmax_bwd(*args)


@torch.library.impl("ltkernels::margin_softmax_scale_", "CUDA")
def _(grad, grad_output):
    _triton().margin_softmax_scale_(grad, grad_output)


@torch.library.impl("ltkernels::contrastive_fwd", "CUDA")
def _(*args):
    return _contrastive_triton().contrastive_fwd(*args)


@torch.library.impl("ltkernels::contrastive_bwd", "CUDA")
def _(*args):
    return _contrastive_triton().contrastive_bwd(*args)


from ltkernels import _vmap  # noqa: E402,F401  (registers the batching rules of the operators above)
