"""Loss modules for long-tailed training, and the cosine classifier some of them need.

Each loss of logits is :class:`MarginCrossEntropyLoss` with the margins of one method of :mod:`ltkernels.margins`, or
:class:`NeighborSilencingLoss` over target and auxiliary classes. What holds for all of them:

- Class vectors are buffers, saved in the ``state_dict`` and copied from the arguments. One that is given as an
  ``nn.Parameter``, or a ``scale`` that is, is a parameter of the module and is learned; ``weight`` cannot be.
- ``.half()``, ``.bfloat16()`` and ``.to(dtype)`` move class vectors but keep them float32 at least: rounding log-priors
  to 16 bits would change the loss silently. Logits of every dtype go with them.
- ``weight`` may be a :class:`ltkernels.margins.DeferredReweighting`; call ``set_epoch`` at the start of every epoch.

Each contrastive loss of embeddings is a few lines over :func:`ltkernels.functional.contrastive_loss`:
:class:`NTXentLoss`, :class:`SupConLoss`, :class:`BalancedContrastiveLoss` and :class:`MoCoLoss`, and with a temperature
that changes :class:`TemperatureScheduledLoss`, :class:`TemperatureContrastiveLoss`, :class:`MACLLoss` and
:class:`ISogCLRLoss`. What they know of single samples is in buffers, and float32 at least as well, but for the queue of
:class:`MoCoLoss`.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from ltkernels import margins as M
from ltkernels._auxiliary_loss import NeighborSilencingLoss
from ltkernels._checks import ClassCounts, kind_of, number
from ltkernels._contrastive_keys import BalancedContrastiveLoss, ISogCLRLoss, MACLLoss
from ltkernels._contrastive_loss import NTXentLoss, SupConLoss, TemperatureContrastiveLoss, TemperatureScheduledLoss
from ltkernels._contrastive_queue import MoCoLoss
from ltkernels._cosine_linear import CosineLinear
from ltkernels._linear_loss import LinearMarginCrossEntropyLoss
from ltkernels._margin_loss import LossOptions, MarginCrossEntropyLoss

__all__ = [
    "BalancedContrastiveLoss",
    "BalancedSoftmaxLoss",
    "CDTLoss",
    "CosineLinear",
    "EqualizationLoss",
    "ISogCLRLoss",
    "LDAMLoss",
    "LinearMarginCrossEntropyLoss",
    "LogitAdjustedLoss",
    "MACLLoss",
    "MarginCrossEntropyLoss",
    "MoCoLoss",
    "NTXentLoss",
    "NeighborSilencingLoss",
    "SupConLoss",
    "TemperatureContrastiveLoss",
    "TemperatureScheduledLoss",
    "VSLoss",
]


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
        gamma: Not negative.
        tau: Not negative.
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
        self._put_empty_buffers_last()
        self.threshold = threshold
        self.gamma = number("gamma", gamma, "in [0, 1]")

    def forward(
        self, input: Tensor, target: Tensor, *, mask: Tensor | None = None, sample_weight: Tensor | None = None
    ) -> Tensor:
        """The loss of logits (N, C) and class indices (N,); a class is left out where ``mask`` or the draw says so."""
        drawn = M.equalization_mask(target, self.tail, self.gamma)
        if mask is not None:  # (C,) or (N, C) as well: classes are dimension 1 of the draw
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                raise TypeError(f"mask: expected a boolean Tensor or None, got {kind_of(mask)}")
            shapes = [tuple(shape) for shape in (drawn.shape[1:2], drawn.shape[:2], drawn.shape)]
            if mask.shape not in shapes:
                expected = " or ".join(map(str, dict.fromkeys(shapes)))
                raise ValueError(f"mask: expected shape {expected}, got {tuple(mask.shape)}")
            drawn = drawn & mask.reshape(*mask.shape, *[1] * (drawn.dim() - max(mask.dim(), 2)))
        return super().forward(input, target, mask=drawn, sample_weight=sample_weight)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, gamma={self.gamma}, {super().extra_repr()}"
