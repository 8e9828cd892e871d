"""The loss module of ``margin_cross_entropy``, which every other loss module extends."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor, nn

import ltkernels.functional as LF
from ltkernels import margins as M
from ltkernels._checks import number
from ltkernels._rows import REDUCTIONS, check_ignore_index


class LossOptions(TypedDict, total=False):
    """Keywords that every loss passes on to :class:`MarginCrossEntropyLoss`."""

    weight: Tensor | M.DeferredReweighting | None
    reduction: str
    ignore_index: int
    label_smoothing: float


class MarginCrossEntropyLoss(nn.Module):
    r"""Softmax cross-entropy over margin-adjusted logits, :func:`ltkernels.functional.margin_cross_entropy`.

    .. math:: v_{ij} = s\,(a_j f_{ij} - m_j t_{ij}) + b_j + \Delta_{y_i j}

    Args:
        margins: Margins of a method, e.g. ``ltkernels.margins.cosface(0.35, 64.0)``.
        logit_scale, logit_bias, target_margin, pairwise_margin, scale: The same as single arguments; they may add to
            ``margins`` but not repeat it. A learned scale is ``scale=nn.Parameter(torch.tensor(30.0))``.
        weight: (C,) class weights, to which no gradient flows, or a :class:`ltkernels.margins.DeferredReweighting`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Class index of the samples to leave out.
        label_smoothing: In [0, 1].

    Shapes: see :func:`ltkernels.functional.margin_cross_entropy`.

    Raises:
        ValueError: a wrong shape or value, an argument given twice, or a tensor that requires grad and is no Parameter;
            class weights that require grad.
        TypeError: a wrong type.

    Example::

        >>> loss = MarginCrossEntropyLoss(margins.ldam(counts), weight=margins.DeferredReweighting(counts, 160))
        >>> for epoch in range(200):
        ...     loss.set_epoch(epoch)
        ...     for image, target in loader:
        ...         loss(network(image), target).backward()
    """

    logit_scale: Tensor | None
    logit_bias: Tensor | None
    target_margin: Tensor | None
    pairwise_margin: Tensor | None
    weight: Tensor | None
    scale: float | Tensor

    def __init__(
        self,
        margins: M.Margins | None = None,
        *,
        logit_scale: Tensor | None = None,
        logit_bias: Tensor | None = None,
        target_margin: Tensor | None = None,
        pairwise_margin: Tensor | None = None,
        scale: float | Tensor = 1.0,
        weight: Tensor | M.DeferredReweighting | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if margins is not None and not isinstance(margins, M.Margins):
            raise TypeError(f"margins: expected ltkernels.margins.Margins, got {type(margins).__name__}")
        self.schedule = weight if isinstance(weight, M.DeferredReweighting) else None
        given = M.Margins(
            logit_scale=logit_scale,
            logit_bias=logit_bias,
            target_margin=target_margin,
            pairwise_margin=pairwise_margin,
            scale=scale,
            weight=self.schedule.weight(0) if self.schedule is not None else weight,
        )
        self._register(given if margins is None else margins.combine(given))
        if not isinstance(reduction, str) or reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
        self.reduction = reduction
        check_ignore_index(ignore_index)
        self.ignore_index = int(ignore_index)
        self.label_smoothing = number("label_smoothing", label_smoothing, "in [0, 1]")

    def _register(self, margins: M.Margins) -> None:
        for name in (*M.Margins.TENSORS, "scale"):
            value = getattr(margins, name)
            learned = isinstance(value, Tensor) and value.requires_grad
            if learned and name == "weight":
                raise ValueError("weight: expected a tensor without gradient, as none flows to class weights")
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif learned:
                raise ValueError(
                    f"{name}: expected an nn.Parameter or a tensor without gradient, got one that requires grad"
                )
            elif isinstance(value, Tensor) or value is None:
                # A copy: load_state_dict and set_epoch write in place, which the giver of the tensor must not see.
                self.register_buffer(name, None if value is None else value.clone())
            else:
                self.scale = value
        self._put_empty_buffers_last()

    def _put_empty_buffers_last(self) -> None:
        """torch.export fails on a module of its own whose buffers have a None before a tensor."""
        for name in [name for name, buffer in self._buffers.items() if buffer is None]:
            self._buffers[name] = self._buffers.pop(name)

    def set_epoch(self, epoch: int) -> None:
        """Set ``weight`` to what the schedule has for ``epoch`` (counted from 0); without a schedule, do nothing."""
        if self.schedule is not None:
            # In place: a compiled or captured step keeps reading the same memory.
            self.weight.copy_(self.schedule.weight(epoch))

    def forward(
        self, input: Tensor, target: Tensor, *, mask: Tensor | None = None, sample_weight: Tensor | None = None
    ) -> Tensor:
        """The loss of logits (N, C); ``mask`` and ``sample_weight`` as in ``margin_cross_entropy``."""
        return LF.margin_cross_entropy(
            input,
            target,
            self.weight,
            logit_scale=self.logit_scale,
            logit_bias=self.logit_bias,
            target_margin=self.target_margin,
            pairwise_margin=self.pairwise_margin,
            scale=self.scale,
            mask=mask,
            sample_weight=sample_weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MarginCrossEntropyLoss:
        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not moved.is_floating_point() or moved.dtype in (torch.float32, torch.float64):
                return moved
            return tensor.to(device=moved.device, dtype=torch.promote_types(tensor.dtype, torch.float32))

        if recurse:  # a classifier inside takes any dtype
            for module in self.children():
                module._apply(fn)
        return super()._apply(at_least_float32, recurse=False)

    def extra_repr(self) -> str:
        shown = {name: getattr(self, name) for name in (*M.Margins.TENSORS, "scale")}
        shown["weight"] = self.weight if self.schedule is None else self.schedule
        defaults = {"scale": 1.0, "ignore_index": -100, "label_smoothing": 0.0}
        shown.update(reduction=self.reduction, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing)
        return ", ".join(
            f"{name}={tuple(value.shape) if isinstance(value, Tensor) else repr(value)}"
            for name, value in shown.items()
            if isinstance(value, Tensor) or value != defaults.get(name)
        )
