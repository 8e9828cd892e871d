"""Calls of the row operation: inputs of any shape as rows of classes, then the operator or the definition."""

from __future__ import annotations

import math
from numbers import Integral, Rational, Real

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ltkernels import _ops, reference
from ltkernels._checks import boolean, check_layouts, values_of

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def margin_softmax(
    input, target, weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight, row_class,
    neighbor_offsets, neighbor_classes, scale, neighbor_weight, back_from, reduction, ignore_index, label_smoothing,
    return_lse,
):  # fmt: skip
    """The row operation on inputs of any shape: the operator, or the definition where no kernel serves."""
    reduction_code = REDUCTIONS.get(reduction) if isinstance(reduction, str) else None
    if reduction_code is None:
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
    if not isinstance(input, Tensor) or not isinstance(target, Tensor):
        name, value = ("target", target) if isinstance(input, Tensor) else ("input", input)
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    boolean("return_lse", return_lse)
    if isinstance(scale, Tensor):
        logit_scale, target_margin = fold_scale(scale, logit_scale, target_margin, input)
        scale = 1.0

    if target_margin is not None and input.dim() > 0:
        target_margin = margin_of_each_class(target_margin, input.shape[0 if input.dim() == 1 else 1])

    if isinstance(neighbor_weight, Tensor) or isinstance(label_smoothing, Tensor):
        # The dispatcher would take a 0-d tensor for a number, and its gradient would be lost.
        check_numbers(scale, neighbor_weight, ignore_index, label_smoothing)

    shape = None
    if input.dim() != 2:
        check_layouts(input=input, target=target)
        check_types(weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight, row_class)
        shape = (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()
        input, target, mask, sample_weight, row_class = _as_rows(input, target, mask, sample_weight, row_class)

    try:
        arguments = (
            input, target, weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight,
            row_class, neighbor_offsets, neighbor_classes, scale, neighbor_weight, back_from,
        )  # fmt: skip
        if _ops.uses_kernel(input):
            result = NotImplemented
            if not is_compiling():
                result = _ops.margin_softmax_direct(*arguments, reduction, ignore_index, label_smoothing, return_lse)
            if result is NotImplemented:
                result = _ops.margin_softmax(*arguments, reduction_code, ignore_index, label_smoothing, return_lse)
            elif not return_lse:
                result = result, None
            loss, lse = result
        else:
            _ops.margin_softmax_check(*arguments, reduction_code, ignore_index, label_smoothing)
            check_values(*arguments[:2], *arguments[3:8], row_class, ignore_index)
            loss, lse = reference.margin_softmax(*arguments, reduction, ignore_index, label_smoothing)
    except RuntimeError:
        # The dispatcher's answer to a wrong Python type; checked after the fact, as it would cost every call.
        check_layouts(input=input, target=target)
        check_types(weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight, row_class)
        check_numbers(scale, neighbor_weight, ignore_index, label_smoothing)
        raise

    if shape is not None and reduction == "none":
        loss = loss.reshape(shape)
    if not return_lse:
        return loss
    return loss, lse if shape is None else lse.reshape(shape)


_OPTIONAL = (
    "weight", "logit_scale", "logit_bias", "target_margin", "pairwise_margin", "mask", "sample_weight", "row_class",
)  # fmt: skip


def check_types(*optional) -> None:
    for name, x in zip(_OPTIONAL, optional, strict=True):
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a Tensor or None, got {type(x).__name__}")
    check_layouts(**dict(zip(_OPTIONAL, optional, strict=True)))


def check_numbers(scale, neighbor_weight, ignore_index, label_smoothing) -> None:
    _check_real("scale", scale, "a number or a 0-d Tensor")
    _check_real("neighbor_weight", neighbor_weight, "a number")
    check_ignore_index(ignore_index)
    _check_real("label_smoothing", label_smoothing, "a number")


def check_ignore_index(ignore_index: int) -> None:
    if not isinstance(ignore_index, Integral):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: expected an int of 64 bits, got one of {int(ignore_index).bit_length() + 1}")


def _check_real(name: str, x: float, expected: str) -> None:
    if not isinstance(x, Real):
        raise TypeError(f"{name}: expected {expected}, got {type(x).__name__}")
    if isinstance(x, Rational) and not -(2**1023) < x < 2**1023:
        raise ValueError(f"{name}: expected a finite number, got one too large for float64")


def check_values(
    input: Tensor,
    target: Tensor,
    logit_scale: Tensor | None,
    logit_bias: Tensor | None,
    target_margin: Tensor | None,
    pairwise_margin: Tensor | None,
    mask: Tensor | None,
    row_class: Tensor | None,
    ignore_index: int,
) -> None:
    """What the CPU kernel says about values that make no sense; elsewhere reading them would synchronise."""
    if input.device.type != "cpu" or is_compiling():
        return
    index = None if target.is_floating_point() else target.long()
    if index is not None:
        _check_classes("target", index, input.shape[1], ignore_index)
    if row_class is not None:
        _check_classes("row_class", row_class.long(), input.shape[1])
    for name, x in (("logit_bias", logit_bias), ("logit_scale", logit_scale), ("target_margin", target_margin)):
        _check_finite(name, x, minus_infinity_allowed=name == "logit_bias")
    if pairwise_margin is not None and index is not None:
        # As the kernel: what no sample uses may hold anything.
        kept = index != ignore_index
        used = pairwise_margin[torch.where(kept, index, 0)]
        kept = kept[:, None] if mask is None else kept[:, None] & mask
        _check_finite("pairwise_margin", torch.where(kept, used, 0.0), minus_infinity_allowed=True)


def _check_finite(name: str, x: Tensor | None, minus_infinity_allowed: bool) -> None:
    values = values_of(x)
    if values is None:
        return
    allowed = values.isfinite()
    if minus_infinity_allowed:
        allowed |= values == -torch.inf
    if not allowed.all():
        index = int((~allowed).flatten().nonzero()[0])
        at = f" at index {index}" if values.dim() < 2 else ""
        raise ValueError(f"{name}: expected finite values, got {values.flatten()[index].item():g}{at}")


def _check_classes(name: str, x: Tensor, classes: int, ignore_index: int | None = None) -> None:
    values = values_of(x)
    if values is None:
        return
    bad = (values < 0) | (values >= classes)
    if ignore_index is not None:
        bad &= values != ignore_index
    if bad.any():
        row = bad.nonzero()[0].tolist()
        expected = f"[0, {classes})" + ("" if ignore_index is None else f" or ignore_index={ignore_index}")
        at = row[0] if len(row) == 1 else row
        raise IndexError(f"{name}: expected class indices in {expected}, got {int(values[tuple(row)])} at row {at}")


def fold_scale(
    scale: Tensor, logit_scale: Tensor | None, target_margin: Tensor | None, input: Tensor
) -> tuple[Tensor, Tensor | None]:
    """A tensor scale is (s * a, s * m) with s = 1, in differentiable torch."""
    check_layouts(scale=scale)
    if scale.device != input.device:
        raise ValueError(f"scale: expected a tensor on {input.device} like input, got one on {scale.device}")
    if scale.dim() != 0 or not scale.is_floating_point():
        raise ValueError(
            f"scale: expected a number or a 0-d floating tensor, got {scale.dtype} of shape {tuple(scale.shape)}"
        )
    for name, x in (("logit_scale", logit_scale), ("target_margin", target_margin)):
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a Tensor or None, got {type(x).__name__}")
        if x is not None and not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
    # In the precision of the kernels: torch would give the product with 16-bit vectors 16 bits.
    acc = torch.float64 if input.dtype == torch.float64 else torch.float32
    scale = scale.to(acc)
    values = values_of(scale) if scale.is_cpu and not is_compiling() else None
    if values is None:
        scale = torch.where(scale > 0, scale, torch.nan)  # nothing to read without a synchronisation, or at all
    else:
        for value in (values.item(),) if values.dim() == 0 else values.flatten().tolist():
            if not 0 < value < math.inf:
                expected = f"values above 0 in {acc}" if math.isfinite(value) else "finite values"
                raise ValueError(f"scale: expected {expected}, got {value:g}")
    folded_scale = scale if logit_scale is None else scale * logit_scale.to(acc)
    return folded_scale, None if target_margin is None else scale * target_margin.to(acc)


def margin_of_each_class(target_margin: Tensor, classes: int) -> Tensor:
    """(C,) of one margin for all classes; anything else as it is, for the operator to check."""
    if not isinstance(target_margin, Tensor) or target_margin.dim() != 0:
        return target_margin
    check_layouts(target_margin=target_margin)
    return target_margin.expand(classes)


def _as_rows(
    input: Tensor, target: Tensor, mask: Tensor | None, sample_weight: Tensor | None, row_class: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(C,) or (N, C, d1, ...) as (rows, C), and everything with an entry for each row with it."""
    if input.dim() == 0:
        raise ValueError("input: expected logits of shape (C,), (N, C) or (N, C, d1, ...), got a 0-d tensor")
    classes = input.shape[0] if input.dim() == 1 else input.shape[1]
    if classes == 0:
        raise ValueError(f"input: expected at least one class, got shape {tuple(input.shape)}")
    samples = () if input.dim() == 1 else (input.shape[0], *input.shape[2:])

    def rows_of_classes(x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.dim() == 1 else x.movedim(1, -1).flatten(0, -2)

    probabilities = target.is_floating_point()
    expected = input.shape if probabilities else torch.Size(samples)
    if target.shape != expected:
        raise ValueError(
            f"target: expected {'probabilities' if probabilities else 'class indices'} of shape {tuple(expected)} "
            f"for an input of shape {tuple(input.shape)}, got {tuple(target.shape)}"
        )
    if mask is not None and mask.dim() > 1:
        if mask.shape == input.shape:
            mask = rows_of_classes(mask)
        elif mask.shape == input.shape[:2]:
            mask = rows_of_classes(mask.reshape(*mask.shape, *[1] * (input.dim() - 2)).expand_as(input))
        else:
            raise ValueError(
                f"mask: expected shape ({classes},), {tuple(input.shape[:2])} or {tuple(input.shape)}, "
                f"got {tuple(mask.shape)}"
            )
    target = rows_of_classes(target) if probabilities else target.flatten()
    sample_weight = each_sample("sample_weight", sample_weight, samples)
    row_class = each_sample("row_class", row_class, samples)
    return rows_of_classes(input), target, mask, sample_weight, row_class


def each_sample(name: str, x: Tensor | None, samples: tuple[int, ...]) -> Tensor | None:
    """A value a sample, (N,) or ``samples`` = (N, d1, ...), as (rows,)."""
    if x is None:
        return None
    if x.dim() == 1 and len(samples) > 1 and x.shape[0] == samples[0]:
        x = x.reshape(-1, *[1] * (len(samples) - 1)).expand(samples)
    if x.shape != torch.Size(samples):
        expected = f"({samples[0]},) or {tuple(samples)}" if len(samples) > 1 else f"{tuple(samples)}"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(x.shape)}")
    return x.flatten()
