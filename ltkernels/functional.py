"""Public functions. ``import ltkernels.functional as LF``.

Each function documents its formula, prepares shapes, and makes one call into an operator. Values, shapes and
devices are checked inside the operator, so that every backend answers bad input with the same errors.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ltkernels import _ops, reference

__all__ = ["margin_cross_entropy"]

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def margin_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    logit_scale: Tensor | None = None,
    logit_bias: Tensor | None = None,
    target_margin: Tensor | None = None,
    pairwise_margin: Tensor | None = None,
    scale: float | Tensor = 1.0,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax cross-entropy over margin-adjusted logits, forward and backward in one kernel.

    With :math:`f` the logits, :math:`y` the class indices and :math:`t` their one-hot vectors (or the given
    probabilities), :math:`s` = ``scale``, :math:`a` = ``logit_scale``, :math:`m` = ``target_margin``,
    :math:`b` = ``logit_bias``, :math:`\Delta` = ``pairwise_margin``, :math:`w` = ``weight``,
    :math:`u` = ``sample_weight`` and :math:`\epsilon` = ``label_smoothing``:

    .. math::
        v_{ij} &= s\,(a_j f_{ij} - m_j t_{ij}) + b_j + \Delta_{y_i j} \\
        t'_{ij} &= u_i w_j \bigl((1 - \epsilon)\, t_{ij} + \epsilon / |\mathrm{allowed}_i|\bigr) \\
        \ell_i &= \sum_j t'_{ij} \log\sum_k e^{v_{ik}} - \sum_j t'_{ij} v_{ij}

    Without margins this is :func:`torch.nn.functional.cross_entropy`, with two differences: 16-bit logits give a
    float32 loss, and bad input raises ``ValueError``, ``TypeError`` or ``IndexError``. The constructors in
    :mod:`ltkernels.margins` give the arguments of the published losses: logit adjustment (Menon et al.,
    arXiv:2007.07314), balanced softmax (Ren et al., arXiv:2007.10740), LDAM (Cao et al., arXiv:1906.07413),
    CDT (Ye et al., arXiv:2001.01385), VS (Kini et al., arXiv:2103.01550), CosFace (Wang et al., arXiv:1801.09414).

    Args:
        input: Logits, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``; float16, bfloat16, float32 or float64. Never
            modified. Arithmetic is float32 for 16-bit types.
        target: Class indices ``()``, ``(N,)`` or ``(N, d1, ...)`` of an integer dtype, or probabilities in the shape
            and a floating dtype of ``input`` (no gradient flows to them).
        weight: ``(C,)`` class weights; no gradient flows to them.
        logit_scale: ``(C,)`` or 0-d multiplicative scale of each logit.
        logit_bias: ``(C,)`` additive adjustment of each logit, not multiplied by ``scale``.
        target_margin: ``(C,)`` margin taken off the target's logit before scaling.
        pairwise_margin: ``(C, C)``; row ``y`` is added to the adjusted logits of samples of class ``y``. Class
            indices only.
        scale: Positive number, or 0-d tensor if it is learned (its sign is not checked).
        mask: Boolean ``(C,)``, ``(N, C)`` or the shape of ``input``; ``False`` removes a class: probability and
            gradient exactly 0. A removed target gives ``+inf``, a row with no class left ``NaN``.
        sample_weight: ``()``, ``(N,)`` or ``(N, d1, ...)`` weight of each sample.
        reduction: ``"mean"`` (by the sum of ``sample_weight * weight[target]`` over the rows kept), ``"sum"`` or
            ``"none"``.
        ignore_index: Rows with this class index contribute nothing and get no gradient.
        label_smoothing: In ``[0, 1]``; spread over the classes that ``mask`` allows.
        return_lse: Also return the log-sum-exp of the adjusted logits of each row (0 for ignored rows); gradients
            flow through it, as a z-loss needs.

    Returns:
        The loss: 0-d, or one value for each row under ``reduction="none"``; float32, or float64 for float64 logits.
        With ``return_lse`` a pair ``(loss, lse)``.

    Gradients flow to ``input``, ``logit_scale``, ``logit_bias``, ``target_margin``, ``pairwise_margin``,
    ``sample_weight`` and a tensor ``scale``. Second derivatives are not implemented and raise.

    Raises:
        ValueError: wrong shapes, devices, values, an unknown ``reduction``, probabilities with ``pairwise_margin``.
        TypeError: wrong dtypes.
        IndexError: a class index out of range (on a GPU such a row is ``NaN``: checking would synchronise).

    Example::

        >>> import torch, ltkernels.functional as LF
        >>> counts = torch.tensor([500., 50., 5.])
        >>> logits, target = torch.randn(8, 3, requires_grad=True), torch.randint(3, (8,))
        >>> loss = LF.margin_cross_entropy(logits, target, logit_bias=counts.log())  # balanced softmax
        >>> loss.backward()
    """
    reduction_code = _REDUCTIONS.get(reduction) if isinstance(reduction, str) else None
    if reduction_code is None:
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
    if not isinstance(input, Tensor) or not isinstance(target, Tensor):
        name, value = ("target", target) if isinstance(input, Tensor) else ("input", input)
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if isinstance(scale, Tensor):
        logit_scale, target_margin = _fold_scale(scale, logit_scale, target_margin, input)
        scale = 1.0

    shape = None
    if input.dim() != 2:
        _check_types(weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight)
        shape = (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()
        input, target, mask, sample_weight = _as_rows(input, target, mask, sample_weight)

    try:
        if _ops.uses_kernel(input):
            call = _ops.margin_softmax if is_compiling() else _ops.margin_softmax_direct
            loss, lse = call(
                input, target, weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight,
                scale, reduction_code, ignore_index, label_smoothing, return_lse,
            )  # fmt: skip
        else:
            arguments = (
                input, target, weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight,
                scale,
            )  # fmt: skip
            _ops.margin_softmax_check(*arguments, ignore_index, label_smoothing)
            _check_values(*arguments[:2], *arguments[3:7], ignore_index)
            loss, lse = reference.margin_softmax(*arguments, reduction, ignore_index, label_smoothing)
    except RuntimeError:
        # The dispatcher's answer to a wrong Python type; checked after the fact, as it would cost every call.
        _check_types(weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight)
        _check_numbers(scale, ignore_index, label_smoothing)
        raise

    if shape is not None and reduction == "none":
        loss = loss.reshape(shape)
    if not return_lse:
        return loss
    return loss, lse if shape is None else lse.reshape(shape)


_OPTIONAL = ("weight", "logit_scale", "logit_bias", "target_margin", "pairwise_margin", "mask", "sample_weight")


def _check_types(*optional) -> None:
    for name, x in zip(_OPTIONAL, optional, strict=True):
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a Tensor or None, got {type(x).__name__}")


def _check_numbers(scale, ignore_index, label_smoothing) -> None:
    if not isinstance(scale, (float, int)):
        raise TypeError(f"scale: expected a number or a 0-d Tensor, got {type(scale).__name__}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    if not isinstance(label_smoothing, (float, int)):
        raise TypeError(f"label_smoothing: expected a number, got {type(label_smoothing).__name__}")


def _check_values(
    input: Tensor,
    target: Tensor,
    logit_scale: Tensor | None,
    logit_bias: Tensor | None,
    target_margin: Tensor | None,
    pairwise_margin: Tensor | None,
    ignore_index: int,
) -> None:
    """What the CPU kernel says about values that make no sense; elsewhere reading them would synchronise."""
    if input.device.type != "cpu" or is_compiling() or type(target) is not Tensor:
        return
    if not target.is_floating_point():
        index, classes = target.long(), input.shape[1]
        bad = ((index < 0) | (index >= classes)) & (index != ignore_index)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise IndexError(
                f"target: expected class indices in [0, {classes}) or ignore_index={ignore_index}, "
                f"got {int(index[row])} at row {row}"
            )
    vectors = {"logit_bias": logit_bias, "logit_scale": logit_scale, "target_margin": target_margin}
    for name, x in (vectors | {"pairwise_margin": pairwise_margin}).items():
        if x is None:
            continue
        allowed = x.isfinite()
        if name in ("logit_bias", "pairwise_margin"):
            allowed |= x == -torch.inf
        if not allowed.all():
            index = int((~allowed).flatten().nonzero()[0])
            raise ValueError(f"{name}: expected finite values, got {x.flatten()[index].item():g} at index {index}")


def _fold_scale(
    scale: Tensor, logit_scale: Tensor | None, target_margin: Tensor | None, input: Tensor
) -> tuple[Tensor, Tensor | None]:
    """A tensor scale is (s * a, s * m) with s = 1, in differentiable torch."""
    if scale.device != input.device:
        raise ValueError(f"scale: expected a tensor on {input.device} like input, got one on {scale.device}")
    if scale.dim() != 0 or not scale.is_floating_point():
        raise ValueError(
            f"scale: expected a number or a 0-d floating tensor, got {scale.dtype} of shape {tuple(scale.shape)}"
        )
    folded_scale = scale if logit_scale is None else scale * logit_scale
    return folded_scale, None if target_margin is None else scale * target_margin


def _as_rows(
    input: Tensor, target: Tensor, mask: Tensor | None, sample_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(C,) or (N, C, d1, ...) as (rows, C), and target, mask and sample_weight with it."""
    if input.dim() == 0:
        raise ValueError("input: expected logits of shape (C,), (N, C) or (N, C, d1, ...), got a 0-d tensor")
    classes = input.shape[0] if input.dim() == 1 else input.shape[1]
    samples = () if input.dim() == 1 else (input.shape[0], *input.shape[2:])

    def rows_of_classes(x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.dim() == 1 else x.movedim(1, -1).reshape(-1, classes)

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
    if sample_weight is not None:
        if sample_weight.dim() == 1 and input.dim() > 2 and sample_weight.shape[0] == input.shape[0]:
            sample_weight = sample_weight.reshape(-1, *[1] * (input.dim() - 2)).expand(samples)
        if sample_weight.shape != torch.Size(samples):
            expected = f"({input.shape[0]},) or {samples}" if samples else "()"
            raise ValueError(f"sample_weight: expected shape {expected}, got {tuple(sample_weight.shape)}")
        sample_weight = sample_weight.reshape(-1)
    target = rows_of_classes(target) if probabilities else target.reshape(-1)
    return rows_of_classes(input), target, mask, sample_weight
