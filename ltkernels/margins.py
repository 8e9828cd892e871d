"""Class counts -> margins, class weights, schedules and masks: every published method is a few lines here.

A :class:`Margins` holds what :func:`ltkernels.functional.margin_cross_entropy` takes, so that a method is a function
from class counts to a ``Margins``::

    >>> from ltkernels import margins
    >>> import ltkernels.functional as LF
    >>> ldam = margins.ldam([500, 50, 5])
    >>> loss = LF.margin_cross_entropy(cosine, target, **ldam.as_arguments())

All of it runs once, on the host, and reads the values it is given (on a GPU that synchronises). ``class_counts`` is a
tensor, NumPy array or sequence of C positive finite numbers, integers or floats: the training samples of each class.
Results are computed in float64 and returned in float32, on the device of ``class_counts`` if that is a tensor, else
on the CPU. Bad input raises ``ValueError`` (value or shape) or ``TypeError``, and the message names the argument.

A new margin method is one function here and one row in ``tests/test_methods.py``.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ltkernels._checks import ClassCounts, are_integers, check_margin_tensor, class_counts_of, integer, kind_of, number

__all__ = [
    "DeferredReweighting",
    "Margins",
    "adaptive_logit_adjustment",
    "balanced_softmax",
    "class_balanced_weight",
    "class_dependent_temperatures",
    "cosface",
    "effective_number",
    "equalization_mask",
    "ldam",
    "logit_adjustment",
    "pairwise_logit_adjustment",
    "post_hoc_logit_adjustment",
    "tail_classes",
    "vector_scaling",
]


@dataclass(frozen=True, eq=False, kw_only=True)
class Margins:
    r"""The margin arguments of :func:`ltkernels.functional.margin_cross_entropy` as one value.

    .. math:: v_{ij} = s\,(a_j f_{ij} - m_j t_{ij}) + b_j + \Delta_{y_i j}

    Two values compare equal only if they are the same object: tensors have no single truth value.

    Args:
        logit_scale: :math:`a`, ``(C,)`` or 0-d.
        logit_bias: :math:`b`, ``(C,)``.
        target_margin: :math:`m`, ``(C,)`` or 0-d.
        pairwise_margin: :math:`\Delta`, ``(C, C)``.
        scale: :math:`s`, a positive number or a 0-d tensor.
        weight: class weights ``(C,)``, not negative.

    Tensors have any floating dtype, finite values, one C and one device.

    Raises:
        ValueError: a wrong shape, value or device.
        TypeError: no tensor, or no floating dtype.
    """

    logit_scale: Tensor | None = None
    logit_bias: Tensor | None = None
    target_margin: Tensor | None = None
    pairwise_margin: Tensor | None = None
    scale: float | Tensor = 1.0
    weight: Tensor | None = None

    TENSORS: ClassVar[tuple[str, ...]] = ("logit_scale", "logit_bias", "target_margin", "pairwise_margin", "weight")

    def __post_init__(self) -> None:
        for name, tensor in self._tensors().items():
            check_margin_tensor(name, tensor, self.num_classes)
        if not isinstance(self.scale, Tensor):
            object.__setattr__(self, "scale", number("scale", self.scale, "> 0"))
        elif not self.scale.is_meta and not self.scale > 0:
            raise ValueError(f"scale: expected a positive number, got {self.scale.item():g}")
        if self.weight is not None and not self.weight.is_meta and (self.weight < 0).any():
            raise ValueError(f"weight: expected no negative weight, got {self.weight.min().item():g}")
        devices = {name: str(tensor.device) for name, tensor in self._tensors().items()}
        if len(set(devices.values())) > 1:
            raise ValueError(f"{', '.join(devices)}: expected one device, got {', '.join(devices.values())}")

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {name: getattr(self, name) for name in self.TENSORS if getattr(self, name) is not None}
        return {**tensors, "scale": self.scale} if isinstance(self.scale, Tensor) else tensors

    @property
    def num_classes(self) -> int | None:
        """C, or None where no tensor tells."""
        for name in self.TENSORS:
            tensor = getattr(self, name)
            if isinstance(tensor, Tensor) and tensor.dim() > 0:
                return tensor.shape[0]
        return None

    def as_arguments(self) -> dict[str, Any]:
        """Keyword arguments for ``margin_cross_entropy``: the tensors that are set, and ``scale`` if it is not 1.

        What is not set is left out, so that the caller may pass it: ``f(x, y, weight=w, **margins.as_arguments())``.
        """
        arguments: dict[str, Any] = dict(self._tensors())
        if not isinstance(self.scale, Tensor) and self.scale != 1.0:
            arguments["scale"] = self.scale
        return arguments

    def replace(self, **changes: Any) -> Margins:
        """A copy with the given fields replaced: ``ldam(counts).replace(weight=w)``."""
        return dataclasses.replace(self, **changes)

    def combine(self, other: Margins) -> Margins:
        """Both values in one: ``ldam(counts).combine(Margins(weight=w))``.

        Raises:
            ValueError: a field is set in both, or they disagree in the number of classes or the device.
        """
        mine, others = self.as_arguments(), other.as_arguments()
        both = ", ".join(sorted(mine.keys() & others.keys()))
        if both:
            raise ValueError(f"{both}: set in both values; use replace() to choose one")
        return Margins(**mine, **others)

    def to(self, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None) -> Margins:
        """A copy with every tensor on ``device`` and of the floating ``dtype``."""
        return self.replace(**{name: x.to(device=device, dtype=dtype) for name, x in self._tensors().items()})

    def __repr__(self) -> str:
        shown = [
            f"{name}={value}" if not isinstance(value, Tensor) else f"{name}={tuple(value.shape)}"
            for name, value in self.as_arguments().items()
        ]
        return f"Margins({', '.join(shown)})"


# Margin methods


def logit_adjustment(class_counts: ClassCounts, tau: float = 1.0) -> Margins:
    r"""Logit adjustment: :math:`b_j = \tau \log \pi_j`, with :math:`\pi_j = n_j / \sum_k n_k`.

    Train with it and predict with the raw logits; :func:`post_hoc_logit_adjustment` is the other form.
    Menon et al., "Long-tail learning via logit adjustment", arXiv:2007.07314.

    Args:
        class_counts: (C,) samples of each class.
        tau: Not negative; 0 gives cross-entropy.

    Returns ``logit_bias`` (C,) float32.
    Raises ``ValueError`` or ``TypeError`` naming the argument that is out of range or of a wrong type.
    """
    return Margins(logit_bias=_like(class_counts, number("tau", tau, ">= 0") * _log_prior(class_counts)))


def balanced_softmax(class_counts: ClassCounts) -> Margins:
    r"""Balanced softmax: :math:`b_j = \log n_j`, i.e. :math:`p_j \propto n_j e^{f_j}`.

    Logit adjustment at tau = 1 up to a constant, which the softmax does not see. Ren et al., "Balanced meta-softmax
    for long-tailed visual recognition", arXiv:2007.10740.

    Args:
        class_counts: (C,) samples of each class.

    Returns ``logit_bias`` (C,) float32.
    Raises ``ValueError`` or ``TypeError`` naming the argument that is out of range or of a wrong type.
    """
    return Margins(logit_bias=_like(class_counts, class_counts_of(class_counts).log()))


def ldam(class_counts: ClassCounts, max_margin: float = 0.5, scale: float = 30.0) -> Margins:
    r"""LDAM: :math:`m_j = m_{\max} (n_{\min} / n_j)^{1/4}`, :math:`v = s\,(f - m_y t)`.

    The logits are cosines: use :class:`ltkernels.nn.CosineLinear`. The paper adds class weights late in training
    (:class:`DeferredReweighting`). Cao et al., "Learning imbalanced datasets with label-distribution-aware margin
    loss", arXiv:1906.07413.

    Args:
        class_counts: (C,) samples of each class.
        max_margin: Margin of the rarest class, not negative.
        scale: Positive.

    Returns ``target_margin`` (C,) float32, and ``scale``.
    Raises ``ValueError`` or ``TypeError`` naming the argument that is out of range or of a wrong type.
    """
    counts = class_counts_of(class_counts)
    margin = number("max_margin", max_margin, ">= 0") * (counts.min() / counts) ** 0.25
    return Margins(target_margin=_like(class_counts, margin), scale=scale)


def class_dependent_temperatures(class_counts: ClassCounts, gamma: float = 0.2) -> Margins:
    r"""CDT: :math:`a_j = (n_j / n_{\max})^\gamma`; the logit of a rare class is shrunk in training only.

    Ye et al., "Identifying and compensating for feature deviation in imbalanced deep learning", arXiv:2001.01385.

    Args:
        class_counts: (C,) samples of each class.
        gamma: Not negative; 0 gives cross-entropy.

    Returns ``logit_scale`` (C,) float32.
    Raises ``ValueError`` or ``TypeError`` naming the argument that is out of range or of a wrong type.
    """
    counts = class_counts_of(class_counts)
    return Margins(logit_scale=_like(class_counts, (counts / counts.max()) ** number("gamma", gamma, ">= 0")))


def vector_scaling(class_counts: ClassCounts, gamma: float, tau: float) -> Margins:
    r"""VS: :math:`a_j = (n_j / n_{\max})^\gamma` and :math:`b_j = \tau \log \pi_j`: CDT and logit adjustment in one.

    No defaults: the best pair depends on the data set, gamma 0 to 0.2 and tau 0.5 to 1.25 in published runs on CIFAR.
    Kini et al., "Label-imbalanced and group-sensitive classification under overparameterization", arXiv:2103.01550.

    Args:
        class_counts: (C,) samples of each class.
        gamma: Not negative.
        tau: Not negative.

    Returns ``logit_scale`` and ``logit_bias``, both (C,) float32.
    Raises ``ValueError`` or ``TypeError`` naming the argument that is out of range or of a wrong type.
    """
    return class_dependent_temperatures(class_counts, gamma).combine(logit_adjustment(class_counts, tau))


def adaptive_logit_adjustment(class_counts: ClassCounts, tau: float = 1.0, max_margin: float = 0.5) -> Margins:
    r"""Logit adjustment with LDAM's margin on the target:
    :math:`b_j = \tau \log \pi_j`, :math:`m_j = m_{\max} (n_{\min} / n_j)^{1/4}`, :math:`s = 1`.

    Menon et al., arXiv:2007.07314, section 6.2, have margins of :math:`\pi_j^{-1/4}`, a ``max_margin`` of 6.8 on
    CIFAR-100-LT; of LDAM's 0.5, the default, no number is published. Not the ALA loss of arXiv:2104.06094.

    Args:
        class_counts: (C,) samples of each class.
        tau: Not negative.
        max_margin: Margin of the rarest class, in units of the logits; not negative.

    Returns ``logit_bias`` and ``target_margin``, both (C,) float32.
    Raises ``ValueError`` or ``TypeError`` naming the argument that is out of range or of a wrong type.
    """
    return logit_adjustment(class_counts, tau).combine(ldam(class_counts, max_margin, scale=1.0))


def pairwise_logit_adjustment(class_counts: ClassCounts, tau: float = 1.0) -> Margins:
    r"""Logit adjustment as pairwise margins: :math:`\Delta_{yj} = \tau \log(\pi_j / \pi_y)`.

    The loss is Menon's unified form
    :math:`\log\bigl[1 + \sum_{j \ne y} e^{\Delta_{yj}} e^{f_j - f_y}\bigr]`, equal to that of
    :func:`logit_adjustment`; it is the form to start from where pairs of classes have margins of their own. Menon et
    al., arXiv:2007.07314.

    Args:
        class_counts: (C,) samples of each class.
        tau: Not negative.

    Returns ``pairwise_margin`` (C, C) float32: 4 C^2 bytes.
    Raises ``ValueError`` or ``TypeError`` naming the argument that is out of range or of a wrong type.
    """
    bias = number("tau", tau, ">= 0") * _log_prior(class_counts)
    return Margins(pairwise_margin=_like(class_counts, bias - bias[:, None]))


def cosface(margin: float, scale: float, *, num_classes: int | None = None) -> Margins:
    r"""CosFace: the same margin for every class, :math:`v = s\,(\cos\theta - m\,t)`; no class counts.

    The logits are cosines: use :class:`ltkernels.nn.CosineLinear`. Wang et al., "CosFace: large margin cosine loss
    for deep face recognition", arXiv:1801.09414.

    Args:
        margin: Not negative; 0.35 in the paper.
        scale: Positive; 64 in the paper.
        num_classes: C, at least 1, for a margin of shape (C,); ``None`` gives a 0-d one, for any number of classes.

    Returns ``target_margin`` (C,) or 0-d, float32 on the CPU, and ``scale``.
    Raises ``ValueError`` or ``TypeError`` naming the argument that is out of range or of a wrong type.
    """
    shape = () if num_classes is None else (integer("num_classes", num_classes, minimum=1),)
    value = number("margin", margin, ">= 0")
    return Margins(target_margin=torch.full(shape, value, dtype=torch.float32, device="cpu"), scale=scale)


# Class weights and schedules


def effective_number(class_counts: ClassCounts, beta: float) -> Tensor:
    r"""Effective number of samples :math:`E_j = (1 - \beta^{n_j}) / (1 - \beta)`, from 1 (beta = 0) up to n_j.

    Cui et al., "Class-balanced loss based on effective number of samples", arXiv:1901.05555.

    Args:
        class_counts: (C,) samples of each class.
        beta: In [0, 1).

    Returns (C,) float32.
    Raises ``ValueError`` or ``TypeError`` naming the argument that is out of range or of a wrong type.
    """
    return _like(class_counts, _effective_number(class_counts, beta))


def class_balanced_weight(class_counts: ClassCounts, beta: float = 0.9999) -> Tensor:
    r"""Class-balanced weights :math:`w_j \propto 1 / E_j = (1 - \beta) / (1 - \beta^{n_j})`, normalised to sum C.

    Use as ``weight`` of a loss or in ``Margins(weight=...)``. beta = 0 gives ones, near 1 the inverse frequency. Cui et
    al., arXiv:1901.05555, whose code divides by the samples of a batch, ``reduction="mean"`` by the sum of weights.

    Args:
        class_counts: (C,) samples of each class.
        beta: In [0, 1).

    Returns (C,) float32.
    Raises ``ValueError`` or ``TypeError`` naming the argument that is out of range or of a wrong type.
    """
    weight = 1 / _effective_number(class_counts, beta)
    return _like(class_counts, weight * (weight.numel() / weight.sum()))


@dataclass(frozen=True, eq=False)
class DeferredReweighting:
    """DRW: uniform class weights until ``start_epoch``, then :func:`class_balanced_weight`.

    Either pass ``weight(epoch)`` to a loss, or give the schedule itself as ``weight`` to a loss of
    :mod:`ltkernels.nn` and call its ``set_epoch``. Cao et al., arXiv:1906.07413, who start at 160 of 200 epochs.

    Args:
        class_counts: (C,) samples of each class.
        start_epoch: First epoch, counted from 0, with class-balanced weights.
        beta: In [0, 1).

    Raises ``ValueError`` or ``TypeError`` naming the argument that is out of range or of a wrong type.
    """

    class_counts: ClassCounts = field(repr=False)
    start_epoch: int
    beta: float = 0.9999

    def __post_init__(self) -> None:
        integer("start_epoch", self.start_epoch, minimum=0)
        class_balanced_weight(self.class_counts, self.beta)  # raises on bad counts and beta
        # A copy: the schedule must not change with the caller's array.
        counts = self.class_counts
        counts = counts.detach().clone() if isinstance(counts, Tensor) else class_counts_of(counts)
        object.__setattr__(self, "class_counts", counts)

    def weight(self, epoch: int) -> Tensor:
        """(C,) float32 class weights, of sum C, for ``epoch`` (counted from 0)."""
        deferred = integer("epoch", epoch, minimum=0) < self.start_epoch
        return class_balanced_weight(self.class_counts, 0.0 if deferred else self.beta)


# Class masks and test time


def tail_classes(class_counts: ClassCounts, threshold: float) -> Tensor:
    r"""The classes with a relative frequency :math:`\pi_j` below ``threshold``: (C,) bool.

    Args:
        class_counts: (C,) samples of each class.
        threshold: In [0, 1].

    Raises ``ValueError`` or ``TypeError`` naming the argument that is out of range or of a wrong type.
    """
    limit = number("threshold", threshold, "in [0, 1]")
    counts = class_counts_of(class_counts)
    return _like(class_counts, counts < limit * counts.sum(), dtype=torch.bool)


def equalization_mask(target: Tensor, tail: Tensor, gamma: float, generator: torch.Generator | None = None) -> Tensor:
    r"""Softmax equalisation: a random mask that spares rare classes being pushed down as negatives.

    :math:`\text{mask}_{ij}` is False, so that class j leaves the softmax of sample i, with probability ``gamma``
    where j is a tail class other than :math:`y_i`; otherwise True. Draw a new one at every step, to be the ``mask`` of
    the loss. Tan et al., "Equalization loss for long-tailed object recognition", arXiv:2003.05176.

    Args:
        target: Class indices ``()``, ``(N,)`` or ``(N, d1, ...)``; an ignored index may be out of range.
        tail: (C,) bool, from :func:`tail_classes`, on the device of ``target``.
        gamma: Probability in [0, 1].
        generator: Source of random numbers, on the device of ``target``.

    Returns:
        Bool ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``.

    Raises:
        ValueError: ``tail`` is not of shape (C,), or ``gamma`` is out of range.
        TypeError: ``target`` has no integer dtype, ``tail`` is not bool, or ``gamma`` is no number.
    """
    probability = number("gamma", gamma, "in [0, 1]")
    if not are_integers(target):
        raise TypeError(f"target: expected class indices of an integer dtype, got {kind_of(target)}")
    if not isinstance(tail, Tensor) or tail.dtype != torch.bool:
        raise TypeError(f"tail: expected a bool Tensor, got {kind_of(tail)}")
    if tail.dim() != 1:
        raise ValueError(f"tail: expected shape (C,), got {tuple(tail.shape)}")
    if tail.device != target.device:
        raise ValueError(f"tail: expected a tensor on {target.device} like target, got one on {tail.device}")
    classes_last = target.long().unsqueeze(-1) == torch.arange(tail.numel(), device=target.device)
    spared = torch.rand(classes_last.shape, device=target.device, generator=generator) < probability
    mask = classes_last | ~(spared & tail)
    return mask.movedim(-1, 1) if target.dim() > 1 else mask


def post_hoc_logit_adjustment(logits: Tensor, class_counts: ClassCounts, tau: float = 1.0) -> Tensor:
    r"""Post-hoc logit adjustment, at test time, of a model trained with cross-entropy: :math:`f_j - \tau \log \pi_j`.

    With :math:`f = \log p(y|x)` and tau = 1 this is :math:`\log p(x|y)` up to a constant: the prediction for balanced
    classes. A model trained with :func:`logit_adjustment` needs no correction. Menon et al., arXiv:2007.07314.

    Args:
        logits: (..., C), any floating dtype.
        class_counts: (C,) samples of each class in training.
        tau: Not negative.

    Returns adjusted logits (..., C); float32 for 16-bit logits, which could not hold the log-priors.
    Raises ``ValueError`` or ``TypeError`` naming the argument that is out of range, or of a wrong shape or type.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"logits: expected a floating Tensor, got {kind_of(logits)}")
    bias = number("tau", tau, ">= 0") * _log_prior(class_counts)
    if logits.shape[-1:] != bias.shape:
        raise ValueError(f"logits: expected shape (..., {bias.numel()}), got {tuple(logits.shape)}")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(dtype) - bias.to(dtype).to(logits.device)


# Computation in float64 on the CPU


def _log_prior(class_counts: ClassCounts) -> Tensor:
    return torch.log_softmax(class_counts_of(class_counts).log(), dim=0)


def _effective_number(class_counts: ClassCounts, beta: float) -> Tensor:
    counts, beta = class_counts_of(class_counts), number("beta", beta, "in [0, 1)")
    # 1 - beta^n as written loses the digits of a fractional n where beta^n is near 1; expm1 loses none.
    return -torch.expm1(counts * (math.log(beta) if beta > 0 else -math.inf)) / (1 - beta)


def _like(class_counts: ClassCounts, values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``values`` in the dtype of a result, on the device of the counts they come from."""
    values = values.to(dtype)  # before the move: not every device knows float64
    if not values.isfinite().all():
        raise ValueError(f"class_counts: expected counts and settings whose results are finite in {dtype}")
    return values.to(class_counts.device) if isinstance(class_counts, Tensor) else values
