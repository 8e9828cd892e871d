"""Loss modules for long-tailed training, and the cosine classifier some of them need.

Each loss is :class:`MarginCrossEntropyLoss` with the margins of one method of :mod:`ltkernels.margins`. What holds for
all of them:

- Class vectors are buffers, saved in the ``state_dict`` and copied from the arguments. One that is given as an
  ``nn.Parameter`` is a parameter of the module and is learned.
- ``.half()``, ``.bfloat16()`` and ``.to(dtype)`` move class vectors but keep them float32 at least: rounding log-priors
  to 16 bits would change the loss silently. Logits of every dtype go with them.
- ``weight`` may be a :class:`ltkernels.margins.DeferredReweighting`; call ``set_epoch`` at the start of every epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn

import ltkernels.functional as LF
from ltkernels import margins as M
from ltkernels._checks import ClassCounts, integer, number

__all__ = [
    "BalancedSoftmaxLoss",
    "CDTLoss",
    "CosineLinear",
    "EqualizationLoss",
    "LDAMLoss",
    "LogitAdjustedLoss",
    "MarginCrossEntropyLoss",
    "VSLoss",
]


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
        margins: Margins of a method, e.g. ``ltkernels.margins.cosface(0.35, 64.0, num_classes=100)``.
        logit_scale, logit_bias, target_margin, pairwise_margin, scale: The same as single arguments; they may add to
            ``margins`` but not repeat it. A learned scale is ``scale=nn.Parameter(torch.tensor(30.0))``.
        weight: (C,) class weights, or a :class:`ltkernels.margins.DeferredReweighting`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Class index of the samples to leave out.
        label_smoothing: In [0, 1].

    Shapes: see :func:`ltkernels.functional.margin_cross_entropy`.

    Raises:
        ValueError: a wrong shape or value, an argument given twice, or a tensor that requires grad and is no Parameter.
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
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def _register(self, margins: M.Margins) -> None:
        for name in (*M.Margins.TENSORS, "scale"):
            value = getattr(margins, name)
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, Tensor) and value.requires_grad:
                raise ValueError(
                    f"{name}: expected an nn.Parameter or a tensor without gradient, got one that requires grad"
                )
            elif isinstance(value, Tensor) or value is None:
                # A copy: load_state_dict and set_epoch write in place, which the giver of the tensor must not see.
                self.register_buffer(name, None if value is None else value.clone())
            else:
                self.scale = value

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

        return super()._apply(at_least_float32, recurse)

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


class LogitAdjustedLoss(MarginCrossEntropyLoss):
    r"""Logit-adjusted cross-entropy: :math:`f_j + \tau \log \pi_j`. Predict with the raw logits.

    Menon et al., arXiv:2007.07314; :func:`ltkernels.margins.logit_adjustment`.

    Args:
        class_counts: (C,) training samples of each class: tensor, array or sequence.
        tau: Not negative.
        options: ``weight``, ``reduction``, ``ignore_index``, ``label_smoothing`` of :class:`MarginCrossEntropyLoss`.

    Raises ``ValueError`` or ``TypeError`` naming the argument that is out of range or of a wrong type.
    """

    def __init__(self, class_counts: ClassCounts, tau: float = 1.0, **options: Unpack[LossOptions]) -> None:
        super().__init__(M.logit_adjustment(class_counts, tau), **options)
        self.tau = tau

    def extra_repr(self) -> str:
        return f"tau={self.tau}, {super().extra_repr()}"


class BalancedSoftmaxLoss(MarginCrossEntropyLoss):
    r"""Balanced softmax: :math:`f_j + \log n_j`. Predict with the raw logits.

    Ren et al., arXiv:2007.10740; :func:`ltkernels.margins.balanced_softmax`.

    Args:
        class_counts: (C,) training samples of each class: tensor, array or sequence.
        options: ``weight``, ``reduction``, ``ignore_index``, ``label_smoothing`` of :class:`MarginCrossEntropyLoss`.

    Raises ``ValueError`` or ``TypeError`` naming the argument that is out of range or of a wrong type.
    """

    def __init__(self, class_counts: ClassCounts, **options: Unpack[LossOptions]) -> None:
        super().__init__(M.balanced_softmax(class_counts), **options)


class LDAMLoss(MarginCrossEntropyLoss):
    r"""LDAM on cosines (:class:`CosineLinear`): :math:`s\,(f - m_y t)`, :math:`m_j = m_{\max} (n_{\min} / n_j)^{1/4}`.

    LDAM-DRW is ``LDAMLoss(counts, weight=DeferredReweighting(counts, start_epoch=160))`` and ``set_epoch`` at every
    epoch. Cao et al., arXiv:1906.07413; :func:`ltkernels.margins.ldam`.

    Args:
        class_counts: (C,) training samples of each class: tensor, array or sequence.
        max_margin: Margin of the rarest class, not negative.
        scale: Positive.
        options: ``weight``, ``reduction``, ``ignore_index``, ``label_smoothing`` of :class:`MarginCrossEntropyLoss`.

    Raises ``ValueError`` or ``TypeError`` naming the argument that is out of range or of a wrong type.
    """

    def __init__(
        self, class_counts: ClassCounts, max_margin: float = 0.5, scale: float = 30.0, **options: Unpack[LossOptions]
    ) -> None:
        super().__init__(M.ldam(class_counts, max_margin, scale), **options)
        self.max_margin = max_margin

    def extra_repr(self) -> str:
        return f"max_margin={self.max_margin}, {super().extra_repr()}"


class CDTLoss(MarginCrossEntropyLoss):
    r"""Class-dependent temperatures: :math:`(n_j / n_{\max})^\gamma f_j`. Predict with the raw logits.

    Ye et al., arXiv:2001.01385; :func:`ltkernels.margins.class_dependent_temperatures`.

    Args:
        class_counts: (C,) training samples of each class: tensor, array or sequence.
        gamma: Not negative.
        options: ``weight``, ``reduction``, ``ignore_index``, ``label_smoothing`` of :class:`MarginCrossEntropyLoss`.

    Raises ``ValueError`` or ``TypeError`` naming the argument that is out of range or of a wrong type.
    """

    def __init__(self, class_counts: ClassCounts, gamma: float = 0.2, **options: Unpack[LossOptions]) -> None:
        super().__init__(M.class_dependent_temperatures(class_counts, gamma), **options)
        self.gamma = gamma

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, {super().extra_repr()}"


class VSLoss(MarginCrossEntropyLoss):
    r"""Vector scaling: :math:`(n_j / n_{\max})^\gamma f_j + \tau \log \pi_j`. Predict with the raw logits.

    Kini et al., arXiv:2103.01550; :func:`ltkernels.margins.vector_scaling`.

    Args:
        class_counts: (C,) training samples of each class: tensor, array or sequence.
        gamma: Not negative; 0.05 to 0.3 in published runs.
        tau: Not negative; 1 to 1.25 in published runs.
        options: ``weight``, ``reduction``, ``ignore_index``, ``label_smoothing`` of :class:`MarginCrossEntropyLoss`.

    Raises ``ValueError`` or ``TypeError`` naming the argument that is out of range or of a wrong type.
    """

    def __init__(self, class_counts: ClassCounts, gamma: float, tau: float, **options: Unpack[LossOptions]) -> None:
        super().__init__(M.vector_scaling(class_counts, gamma, tau), **options)
        self.gamma = gamma
        self.tau = tau

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, tau={self.tau}, {super().extra_repr()}"


class EqualizationLoss(MarginCrossEntropyLoss):
    r"""Softmax equalisation: rare classes leave the softmax of other classes' samples with probability ``gamma``.

    A new random mask is drawn at every call, from the default generator of the device. Tan et al., arXiv:2003.05176;
    :func:`ltkernels.margins.equalization_mask`.

    Args:
        class_counts: (C,) training samples of each class: tensor, array or sequence.
        threshold: Classes with a relative frequency below it are rare; in [0, 1].
        gamma: Probability in [0, 1].
        options: ``weight``, ``reduction``, ``ignore_index``, ``label_smoothing`` of :class:`MarginCrossEntropyLoss`.

    Raises ``ValueError`` or ``TypeError`` naming the argument that is out of range or of a wrong type.
    """

    tail: Tensor

    def __init__(
        self, class_counts: ClassCounts, threshold: float, gamma: float, **options: Unpack[LossOptions]
    ) -> None:
        super().__init__(**options)
        self.register_buffer("tail", M.tail_classes(class_counts, threshold))
        self.threshold = threshold
        self.gamma = number("gamma", gamma, "in [0, 1]")

    def forward(
        self, input: Tensor, target: Tensor, *, mask: Tensor | None = None, sample_weight: Tensor | None = None
    ) -> Tensor:
        """The loss of logits (N, C) and class indices (N,); a class is left out where ``mask`` or the draw says so."""
        drawn = M.equalization_mask(target, self.tail, self.gamma)
        if mask is not None:  # (C,) or (N, C) as well: classes are dimension 1 of the draw
            drawn = drawn & mask.reshape(*mask.shape, *[1] * (drawn.dim() - max(mask.dim(), 2)))
        return super().forward(input, target, mask=drawn, sample_weight=sample_weight)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, gamma={self.gamma}, {super().extra_repr()}"


class CosineLinear(nn.Module):
    r"""Cosine classifier: :math:`f_{ij} = \langle x_i / |x_i|,\; W_j / |W_j| \rangle`, in [-1, 1].

    It has no scale of its own: the scale belongs to the loss (``LDAMLoss(scale=30)``), where it multiplies the margin
    too, and prediction does not need it. Norms are taken in float32 or wider.

    Args:
        in_features: D.
        out_features: C.
        eps: A vector no longer than this has no direction: its cosines and its gradient are 0.
        device, dtype: Of ``weight``.

    Shape: input (..., D), output (..., C) in the dtype of the input.

    Attributes:
        weight: (C, D), initialised to random directions of length 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = integer("in_features", in_features, minimum=1)
        self.out_features = integer("out_features", out_features, minimum=1)
        self.eps = number("eps", eps, "> 0")
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Directions uniform on the sphere."""
        nn.init.normal_(self.weight)
        with torch.no_grad():
            self.weight.copy_(_directions(self.weight, self.eps))

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(_directions(input, self.eps), _directions(self.weight, self.eps))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _directions(x: Tensor, eps: float) -> Tensor:
    """Rows of unit length. Dividing by max(norm, eps) would give a zero row a gradient of 1/eps; here it gets 0."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return (x / torch.where(norm > eps, norm, torch.inf)).to(x.dtype)
