"""The loss module of ``linear_margin_cross_entropy``: a classifier and its loss in one."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor, nn

import ltkernels.functional as LF
from ltkernels import margins as M
from ltkernels._auxiliary_loss import AuxiliaryLossOptions
from ltkernels._checks import boolean, integer
from ltkernels._cosine_linear import CosineLinear
from ltkernels._linear import chunk_rows
from ltkernels._margin_loss import MarginCrossEntropyLoss


class LinearMarginCrossEntropyLoss(MarginCrossEntropyLoss):
    r"""A linear (or cosine) classifier with its margin loss, :func:`ltkernels.functional.linear_margin_cross_entropy`.

    Of the N x C logits a chunk is held at a time. As :class:`torch.nn.LinearCrossEntropyLoss`, the module owns the
    classifier.

    Args:
        in_features: D.
        num_classes: C.
        margins: Margins of a method, e.g. ``ltkernels.margins.ldam(class_counts)``, which wants ``cosine=True``.
        bias: Give the classifier a learned bias (C,); not with ``cosine``.
        cosine: Logits :math:`\langle x / |x|, W_j / |W_j| \rangle`.
        chunk_size: Rows of logits that exist at a time, or ``"auto"``.
        device, dtype: Of the classifier.
        options: ``logit_scale``, ``logit_bias``, ``target_margin``, ``pairwise_margin``, ``scale``, ``weight``,
            ``reduction``, ``ignore_index``, ``label_smoothing`` of :class:`MarginCrossEntropyLoss`.

    Shapes: input (N, D) or (N, d1, ..., D), target (N,) or (N, d1, ...); see the function.

    Attributes:
        classifier: :class:`torch.nn.Linear` or :class:`ltkernels.nn.CosineLinear`; to tie it, assign another module's
            Parameter to its ``weight``. ``.half()`` and the like move it, but keep the margins float32 at least.

    Raises:
        ValueError: a wrong value, or ``bias`` with ``cosine``.
        TypeError: a wrong type.

    Example::

        >>> loss = LinearMarginCrossEntropyLoss(16, 5, margins.logit_adjustment(torch.tensor([90, 30, 10, 4, 1])))
        >>> loss(torch.randn(8, 16), torch.randint(5, (8,))).backward()
        >>> loss.logits(torch.randn(2, 16)).argmax(1)  # at test: without margins
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        margins: M.Margins | None = None,
        *,
        bias: bool = False,
        cosine: bool = False,
        chunk_size: int | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[AuxiliaryLossOptions],
    ) -> None:
        super().__init__(margins, **options)
        boolean("bias", bias)
        boolean("cosine", cosine)
        chunk_rows(chunk_size)
        if bias and cosine:
            raise ValueError("bias: expected False for a cosine classifier")
        in_features = integer("in_features", in_features, minimum=1)
        num_classes = integer("num_classes", num_classes, minimum=1)
        vectors = [getattr(self, name) for name in M.Margins.TENSORS]
        for found in (x.shape[-1] for x in vectors if x is not None and x.dim()):
            if found != num_classes:
                raise ValueError(f"num_classes: expected {found} as the margins have, got {num_classes}")
        self.chunk_size = chunk_size
        self.classifier: nn.Linear | CosineLinear
        if cosine:
            self.classifier = CosineLinear(in_features, num_classes, device=device, dtype=dtype)
        else:
            self.classifier = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        return_stats: bool = False,
    ) -> Any:
        """The loss of features (N, D); with ``return_stats`` also a :class:`ltkernels.functional.LinearStats`."""
        return LF.linear_margin_cross_entropy(
            input,
            self.classifier.weight,
            target,
            linear_bias=getattr(self.classifier, "bias", None),
            cosine=isinstance(self.classifier, CosineLinear),
            chunk_size=self.chunk_size,
            weight=self.weight,
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
            return_stats=return_stats,
        )

    def logits(self, input: Tensor) -> Tensor:
        """(N, C) or (N, d1, ..., C) logits without margins, to predict with."""
        return self.classifier(input)

    def extra_repr(self) -> str:
        chunk = "" if self.chunk_size == "auto" else f"chunk_size={self.chunk_size}, "
        return chunk + super().extra_repr()
