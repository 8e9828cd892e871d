"""The loss module of ``auxiliary_cross_entropy``."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

import ltkernels.functional as LF
from ltkernels import _neighbor_pairs
from ltkernels import margins as M
from ltkernels._checks import ClassCounts, number
from ltkernels._margin_loss import LossOptions, MarginCrossEntropyLoss
from ltkernels.neighbors import NeighborMap


class AuxiliaryLossOptions(LossOptions, total=False):
    """Further keywords of :class:`MarginCrossEntropyLoss`."""

    logit_scale: Tensor | None
    logit_bias: Tensor | None
    target_margin: Tensor | None
    pairwise_margin: Tensor | None
    scale: float | Tensor


class NeighborSilencingLoss(MarginCrossEntropyLoss):
    r"""Cross-entropy over target and auxiliary classes in which neighbours do not compete,
    :func:`ltkernels.functional.auxiliary_cross_entropy`.

    .. math:: v_{ij} \leftarrow v_{ij} + \tau \log \pi_j + \log \lambda \, [j \in S(y_i)]

    With :math:`\lambda = 0` a sample leaves the classes :math:`S(y_i)`, which its own class silences, out of its
    softmax. Predict with :meth:`predict`: the raw logits of the target classes. Proposed in "Learning from
    Neighbors: Category Extrapolation for Long-Tail Learning" (arXiv:2410.15980); its released code has
    ``prior_counts`` (balanced softmax) and ``neighbor_weight=0``; the paper is reported to weigh with 0.1.

    Args:
        neighbors: Which classes silence each other: C target and A auxiliary classes, K = C + A logits.
        neighbor_weight: :math:`\lambda` in [0, 1]; 1 silences nothing.
        mode: ``"plain"``, ``"back"``, ``"target_only"`` or ``"auxiliary_only"``; see the function. ``"back"`` needs
            ``neighbor_weight=0``.
        prior_counts: (K,) training samples of each class, auxiliary ones as often as they are drawn, for
            :math:`\pi`; ``None`` adds no prior.
        tau: Strength of the prior, not negative.
        margins: Margins over all K classes.
        options: ``logit_scale``, ``logit_bias``, ``target_margin``, ``pairwise_margin``, ``scale``, ``weight``,
            ``reduction``, ``ignore_index``, ``label_smoothing`` of :class:`MarginCrossEntropyLoss`; vectors have K
            entries. ``logit_bias`` and the prior add up.

    The map and the prior are buffers: ``neighbor_offsets`` and ``neighbor_classes`` (int32), ``prior`` (K,). A state
    whose map is damaged, or of other sizes, does not load.

    Raises:
        ValueError: a value out of range, mode ``"back"`` with ``neighbor_weight > 0``, a vector without K entries.
        TypeError: a wrong type.

    Example::

        >>> neighbors = NeighborMap.from_pairs([(0, 3), (1, 4)], num_classes=3, num_auxiliary=2)
        >>> loss = NeighborSilencingLoss(neighbors, prior_counts=[500, 50, 5, 50, 50])
        >>> loss(network(image), target).backward()  # 5 logits, targets 0..4
        >>> loss.predict(network(test_image))  # 0..2
    """

    neighbor_offsets: Tensor
    neighbor_classes: Tensor
    prior: Tensor | None

    def __init__(
        self,
        neighbors: NeighborMap,
        *,
        neighbor_weight: float = 0.0,
        mode: str = "plain",
        prior_counts: ClassCounts | None = None,
        tau: float = 1.0,
        margins: M.Margins | None = None,
        **options: Unpack[AuxiliaryLossOptions],
    ) -> None:
        super().__init__(margins, **options)
        if not isinstance(neighbors, NeighborMap):
            raise TypeError(f"neighbors: expected a NeighborMap, got {type(neighbors).__name__}")
        self.num_classes, self.num_auxiliary = neighbors.num_classes, neighbors.num_auxiliary
        self.neighbor_weight = number("neighbor_weight", neighbor_weight, "in [0, 1]")
        self.mode = mode
        if neighbors.rows(mode).back_from >= 0 and self.neighbor_weight > 0:
            raise ValueError(f"mode 'back': expected neighbor_weight=0, got {neighbor_weight}")
        self.tau = number("tau", tau, ">= 0")
        prior = None if prior_counts is None else _prior(prior_counts, self.tau).to(neighbors.device)
        self._check_classes(prior)
        offsets, classes, _ = neighbors.rows()
        # Copies: load_state_dict writes in place, and a map is immutable.
        self.register_buffer("neighbor_offsets", offsets.clone())
        self.register_buffer("neighbor_classes", classes.clone())
        self.register_buffer("prior", prior)
        self._put_empty_buffers_last()

    def _check_classes(self, prior: Tensor | None) -> None:
        classes = self.num_classes + self.num_auxiliary
        vectors: dict[str, Any] = {name: getattr(self, name) for name in M.Margins.TENSORS} | {"prior_counts": prior}
        for name, x in vectors.items():
            if x is not None and x.dim() > 0 and x.shape[0] != classes:
                expected = (classes,) * x.dim()
                raise ValueError(
                    f"{name}: expected shape {expected} for {self.num_classes} target and {self.num_auxiliary} "
                    f"auxiliary classes, got {tuple(x.shape)}"
                )

    @property
    def neighbors(self) -> NeighborMap:
        """The map in the buffers: a copy, which a loaded state does not change."""
        return self._map(self.neighbor_offsets.clone(), self.neighbor_classes.clone())

    def _map(self, offsets: Tensor, classes: Tensor) -> NeighborMap:
        return NeighborMap._unchecked(offsets, classes, self.num_classes, self.num_auxiliary)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        row_class: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of logits (N, K); ``row_class``, ``mask`` and ``sample_weight`` as in ``auxiliary_cross_entropy``.

        ``row_class`` (N,) is needed, and allowed, with probabilities as target only.
        """
        bias, prior = self.logit_bias, self.prior
        return LF.auxiliary_cross_entropy(
            input,
            target,
            self._map(self.neighbor_offsets, self.neighbor_classes),
            self.weight,
            neighbor_weight=self.neighbor_weight,
            mode=self.mode,
            row_class=row_class,
            logit_scale=self.logit_scale,
            logit_bias=prior if bias is None else bias if prior is None else bias + prior,
            target_margin=self.target_margin,
            pairwise_margin=self.pairwise_margin,
            scale=self.scale,
            mask=mask,
            sample_weight=sample_weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def mask(self, logits: Tensor) -> Tensor:
        """``logits`` (N, K) with those of auxiliary classes at ``-inf``, for softmax at test."""
        return LF.mask_auxiliary(logits, self.num_classes)

    def predict(self, logits: Tensor) -> Tensor:
        """The most likely target class of each row of logits (N, K), without the prior: (N,) int64."""
        return LF.auxiliary_predict(logits, self.num_classes)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        # Kernels read where the map says: one that points outside must not get there, nor one half of another map.
        try:
            self._check_map(
                state_dict.get(f"{prefix}neighbor_offsets", self.neighbor_offsets),
                state_dict.get(f"{prefix}neighbor_classes", self.neighbor_classes),
            )
        except (ValueError, TypeError, IndexError) as error:
            errors.append(f"{prefix}neighbor_offsets, {prefix}neighbor_classes: {error}")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _check_map(self, offsets: Tensor, classes: Tensor) -> None:
        def check_size(name: str, x: Tensor, own: Tensor) -> None:
            if isinstance(x, Tensor) and x.shape != own.shape:
                raise ValueError(f"size mismatch for {name}: expected {tuple(own.shape)}, got {tuple(x.shape)}")

        check_size("neighbor_offsets", offsets, self.neighbor_offsets)
        _neighbor_pairs.check_csr(offsets, classes, self.num_classes, self.num_auxiliary)
        check_size("neighbor_classes", classes, self.neighbor_classes)

    def extra_repr(self) -> str:
        shown = {"num_classes": self.num_classes, "num_auxiliary": self.num_auxiliary}
        shown |= {"num_pairs": self.neighbor_classes.numel() // 2, "neighbor_weight": self.neighbor_weight}
        prior = "" if self.prior is None else f"tau={self.tau}, prior={tuple(self.prior.shape)}, "
        numbers = ", ".join(f"{name}={value}" for name, value in shown.items())
        return f"{numbers}, mode={self.mode!r}, {prior}{super().extra_repr()}"


def _prior(prior_counts: ClassCounts, tau: float) -> Tensor:
    """tau log pi, (K,) float32."""
    try:
        return M.logit_adjustment(prior_counts, tau).logit_bias
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("class_counts", "prior_counts", 1)) from error
