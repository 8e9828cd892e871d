"""Calls of the linear form: inputs of any shape as rows of features, then the operator or the definition."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ltkernels import _ops, reference
from ltkernels._checks import boolean
from ltkernels._rows import (
    REDUCTIONS,
    check_layouts,
    check_numbers,
    check_types,
    check_values,
    each_sample,
    fold_scale,
    margin_of_each_class,
)

_ALL = 2**62  # rows or classes; a number of them as an argument of the operator would be traced as a constant


class LinearStats(NamedTuple):
    """By-products of a linear form, one entry a sample; no gradient flows through them."""

    row_loss: Tensor  # as reduction="none" would give, float32 (float64 for float64 features)
    predicted: Tensor  # int64: the largest logit, margins and priors aside, among the target classes
    correct: Tensor  # bool: predicted is the target (the likeliest class of a probability target); False if ignored


def linear_margin_softmax(
    input, linear_weight, linear_bias, cosine, chunk_size, target, weight, logit_scale, logit_bias, target_margin,
    pairwise_margin, mask, sample_weight, row_class, neighbor_offsets, neighbor_classes, scale, neighbor_weight,
    back_from, reduction, ignore_index, label_smoothing, return_lse, return_stats, predict,
):  # fmt: skip
    """``predict``: among how many leading classes to predict, if ``return_stats``; ``None`` means all."""
    reduction_code = REDUCTIONS.get(reduction) if isinstance(reduction, str) else None
    if reduction_code is None:
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
    for name, x in (("input", input), ("linear_weight", linear_weight), ("target", target)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if linear_bias is not None and not isinstance(linear_bias, Tensor):
        raise TypeError(f"linear_bias: expected a Tensor or None, got {type(linear_bias).__name__}")
    check_layouts(input=input, linear_weight=linear_weight, linear_bias=linear_bias, target=target)
    if linear_weight.dim() != 2 or input.dim() == 0 or input.shape[-1] != linear_weight.shape[1]:
        raise ValueError(
            "input, linear_weight: expected shapes (D,), (N, D) or (N, ..., D) and (C, D), "
            f"got {tuple(input.shape)} and {tuple(linear_weight.shape)}"
        )
    for name, x in (("cosine", cosine), ("return_lse", return_lse), ("return_stats", return_stats)):
        boolean(name, x)
    check_types(weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight, row_class)
    rows_of_chunk = chunk_rows(chunk_size)
    if isinstance(scale, Tensor):
        logit_scale, target_margin = fold_scale(scale, logit_scale, target_margin, input)
        scale = 1.0
    target_margin = margin_of_each_class(target_margin, linear_weight.shape[0])
    check_numbers(scale, neighbor_weight, ignore_index, label_smoothing)
    input, linear_weight = _autocast(input), _autocast(linear_weight)

    samples, classes = input.shape[:-1], linear_weight.shape[0]
    input = input.reshape(math.prod(samples), input.shape[-1])
    probabilities = target.is_floating_point()
    target = _rows("target", target, samples, classes if probabilities else None)
    if mask is not None and mask.dim() != 1:
        mask = _rows("mask", mask, samples, classes)
    sample_weight = each_sample("sample_weight", sample_weight, samples)
    row_class = each_sample("row_class", row_class, samples)

    options = (
        target, weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight, row_class,
        neighbor_offsets, neighbor_classes, scale, neighbor_weight, back_from,
    )  # fmt: skip
    predict = (_ALL if predict is None else predict) if return_stats else 0
    if _ops.uses_kernel(input):
        loss, lse, row_loss, predicted = _ops.linear_margin_softmax(
            input, linear_weight, linear_bias, cosine, rows_of_chunk, *options, reduction_code, ignore_index,
            label_smoothing, return_lse, predict,
        )  # fmt: skip
    else:
        _check_classifier(input, linear_weight, linear_bias, cosine)
        logits = reference.linear_logits(input, linear_weight, linear_bias, cosine)
        _ops.margin_softmax_check(logits, *options, reduction_code, ignore_index, label_smoothing)
        check_values(
            logits, target, logit_scale, logit_bias, target_margin, pairwise_margin, mask, row_class, ignore_index
        )
        loss, lse = reference.margin_softmax(logits, *options, reduction, ignore_index, label_smoothing)
        with torch.no_grad():
            row_loss, _ = reference.margin_softmax(logits, *options, "none", ignore_index, label_smoothing)
            predicted = logits[:, :predict].argmax(1) if return_stats else None

    results = [loss.reshape(samples) if reduction == "none" else loss]
    if return_lse:
        results.append(lse.reshape(samples))
    if return_stats:
        correct = predicted == (target.argmax(1) if probabilities else target.long())
        if not probabilities:
            correct &= target.long() != ignore_index  # which may be a class, and does not fit every integer dtype
        results.append(LinearStats(*(x.reshape(samples) for x in (row_loss, predicted, correct))))
    return results[0] if len(results) == 1 else tuple(results)


def chunk_rows(chunk_size) -> int:
    if chunk_size == "auto":
        return -1
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size: expected 'auto' or a number of rows above 0, got {chunk_size!r}")
    return min(chunk_size, _ALL)


def _autocast(x: Tensor) -> Tensor:
    """What autocast makes of an argument of ``F.linear``: float64 stays as it is."""
    device = x.device.type
    if not (reference.autocast_available(device) and torch.is_autocast_enabled(device)):
        return x
    return x.to(torch.get_autocast_dtype(device)) if x.is_floating_point() and x.dtype != torch.float64 else x


def _check_classifier(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, cosine: bool) -> None:
    """What the operator says about a classifier that does not fit; the margins have a check of their own."""
    for name, x in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if x is not None and x.device != input.device:
            raise ValueError(f"{name}: expected a tensor on {input.device} like input, got one on {x.device}")
    if linear_weight.dtype != input.dtype:
        raise TypeError(f"linear_weight: expected dtype {input.dtype} like input, got {linear_weight.dtype}")
    if linear_bias is None:
        return
    classes = linear_weight.shape[0]
    if linear_bias.shape != (classes,):
        raise ValueError(f"linear_bias: expected shape ({classes},), got {tuple(linear_bias.shape)}")
    if not linear_bias.is_floating_point():
        raise TypeError(f"linear_bias: expected a floating dtype, got {linear_bias.dtype}")
    if cosine:
        raise ValueError("linear_bias: expected None for a cosine classifier")


def _rows(name: str, x: Tensor, samples: torch.Size, classes: int | None = None) -> Tensor:
    """A value, or one for each class, of each sample as rows."""
    expected = samples if classes is None else (*samples, classes)
    if x.shape != torch.Size(expected):
        raise ValueError(f"{name}: expected shape {tuple(expected)}, got {tuple(x.shape)}")
    return x.reshape(-1) if classes is None else x.reshape(math.prod(samples), classes)
