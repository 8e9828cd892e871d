"""Public functions. ``import ltkernels.functional as LF``.

Each function documents its formula, prepares shapes, and makes one call into an operator. Every backend answers a
wrong type, dtype, shape, layout or device with the same errors. Values are read, and those that make no sense are
errors, where that needs no synchronisation; elsewhere they give NaN. Of ``pairwise_margin``, only the values that a
sample uses are looked at.
"""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from ltkernels import _ops
from ltkernels._checks import check_layouts, finite
from ltkernels._contrastive import (
    ContrastiveStats,
    contrastive_loss,
    similarity_logsumexp,
    stack_views,
    view_pairs,
)
from ltkernels._linear import LinearStats, linear_margin_softmax
from ltkernels._rows import margin_softmax
from ltkernels.neighbors import NeighborMap, SilencedRows

__all__ = [
    "ContrastiveStats",
    "LinearStats",
    "auxiliary_cross_entropy",
    "auxiliary_predict",
    "contrastive_loss",
    "linear_auxiliary_cross_entropy",
    "linear_margin_cross_entropy",
    "margin_cross_entropy",
    "mask_auxiliary",
    "similarity_logsumexp",
    "stack_views",
    "view_pairs",
]


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

    Without margins this is :func:`torch.nn.functional.cross_entropy`; 16-bit logits give a float32 loss, bad input
    raises ``ValueError``, ``TypeError`` or ``IndexError``, and ``docs/differs-from-torch.md`` lists every other
    difference. The constructors in :mod:`ltkernels.margins` give the arguments of the published losses:
    logit adjustment (Menon et al., arXiv:2007.07314), balanced softmax (Ren et al., arXiv:2007.10740),
    LDAM (Cao et al., arXiv:1906.07413), CDT (Ye et al., arXiv:2001.01385), VS (Kini et al., arXiv:2103.01550),
    CosFace (Wang et al., arXiv:1801.09414).

    Args:
        input: Logits, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``; float16, bfloat16, float32 or float64. Never
            modified. Arithmetic is float32 for 16-bit types.
        target: Class indices ``()``, ``(N,)`` or ``(N, d1, ...)`` of an integer dtype, or probabilities in the shape
            and a floating dtype of ``input`` (no gradient flows to them).
        weight: ``(C,)`` class weights; no gradient flows to them.
        logit_scale: ``(C,)`` or 0-d multiplicative scale of each logit.
        logit_bias: ``(C,)`` additive adjustment of each logit, not multiplied by ``scale``.
        target_margin: ``(C,)`` or 0-d margin taken off the target's logit before scaling.
        pairwise_margin: ``(C, C)``; row ``y`` is added to the adjusted logits of samples of class ``y``. Class
            indices only.
        scale: Number above 0, also once rounded to the dtype of the loss, or 0-d tensor if it is learned. A tensor of
            another value gives ``NaN`` where reading it would synchronise.
        mask: Boolean ``(C,)``, ``(N, C)`` or the shape of ``input``; ``False`` removes a class: probability and
            gradient exactly 0. A removed target gives ``+inf``, a row with no class left ``NaN``.
        sample_weight: ``()``, ``(N,)`` or ``(N, d1, ...)`` weight of each sample.
        reduction: ``"mean"`` (by the sum of ``sample_weight * weight[target]`` over the rows kept, of ``sample_weight``
            alone for probabilities), ``"sum"`` or ``"none"``.
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
        TypeError: wrong types or dtypes, tensors that are sparse or nested.
        IndexError: a class index out of range (on a GPU such a row is ``NaN``: checking would synchronise).

    Example::

        >>> import torch, ltkernels.functional as LF
        >>> counts = torch.tensor([500., 50., 5.])
        >>> logits, target = torch.randn(8, 3, requires_grad=True), torch.randint(3, (8,))
        >>> loss = LF.margin_cross_entropy(logits, target, logit_bias=counts.log())  # balanced softmax
        >>> loss.backward()
    """
    # Most calls end here. Dynamo cannot look inside; tensors of other tracers are not plain, and come back.
    if _ops.KERNELS_ENABLED and not is_dynamo_compiling():
        result = _ops.margin_softmax_direct(
            input, target, weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight, None,
            None, None, scale, 1.0, -1, reduction, ignore_index, label_smoothing, return_lse,
        )  # fmt: skip
        if result is not NotImplemented:
            return result
    return margin_softmax(
        input, target, weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight, None, None,
        None, scale, 1.0, -1, reduction, ignore_index, label_smoothing, return_lse,
    )  # fmt: skip


def auxiliary_cross_entropy(
    input: Tensor,
    target: Tensor,
    neighbors: NeighborMap,
    weight: Tensor | None = None,
    *,
    neighbor_weight: float = 0.0,
    mode: str = "plain",
    row_class: Tensor | None = None,
    prior_counts: Tensor | None = None,
    tau: float = 1.0,
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
    r"""Cross-entropy over target and auxiliary classes in which similar classes do not compete (neighbour silencing).

    The logits are those of :math:`K = C + A` classes, the :math:`C` target classes first. A sample does not push down
    the classes :math:`S(y)` that its own class :math:`y` silences: the auxiliary classes anchored on a target class,
    and the anchors of an auxiliary one. With :math:`\lambda` = ``neighbor_weight`` and :math:`\pi` the class priors,
    the adjusted logits of :func:`margin_cross_entropy` become

    .. math::
        v_{ij} \leftarrow v_{ij} + \tau \log \pi_j + \log \lambda \, [j \in S(y_i)]

    At :math:`\lambda = 0` silenced classes are out of the distribution altogether: their gradient is exactly 0, and
    mass that probabilities or label smoothing put on them is dropped. Any :math:`\lambda > 0` keeps that mass, so
    the loss is not continuous at 0 where there is such mass. At :math:`\lambda = 1` nothing is silenced. Proposed in
    "Learning from Neighbors: Category Extrapolation for Long-Tail Learning" (arXiv:2410.15980). The default is that of
    the released code, :math:`\lambda = 0`; the paper is reported to weigh with 0.1.

    Args:
        input: Logits over ``neighbors.num_classes + neighbors.num_auxiliary`` classes, as in
            :func:`margin_cross_entropy`.
        target: Class indices (target or auxiliary classes) or probabilities over all classes.
        neighbors: Which classes silence each other, on the device of ``input``.
        weight: ``(K,)`` class weights.
        neighbor_weight: :math:`\lambda` in ``[0, 1]``.
        mode: ``"plain"``: rows of target classes silence their neighbours, rows of auxiliary classes their anchors.
            ``"target_only"`` and ``"auxiliary_only"`` do one of the two. ``"back"``: as plain, and rows of an
            auxiliary class silence all other auxiliary classes too; with ``neighbor_weight=0`` only.
        row_class: ``(N,)`` or ``(N, d1, ...)`` class of each sample, which picks what it silences: with probabilities
            as target only. Under mixup, the sample's own first label.
        prior_counts: ``(K,)`` training samples of each class, all above 0, for :math:`\pi`; ``None`` adds no prior.
        tau: Strength of the prior.

    The other arguments, the return value, gradients and errors are those of :func:`margin_cross_entropy`;
    ``logit_bias`` and the prior add up.

    Raises:
        ValueError: also a map of another number of classes, ``neighbor_weight`` outside ``[0, 1]``, an unknown mode,
            mode ``"back"`` with ``neighbor_weight > 0``, probabilities without ``row_class``.

    Example::

        >>> import torch, ltkernels.functional as LF
        >>> from ltkernels.neighbors import NeighborMap
        >>> neighbors = NeighborMap.from_pairs([(0, 3), (1, 4)], num_classes=3, num_auxiliary=2)
        >>> logits, target = torch.randn(8, 5, requires_grad=True), torch.randint(5, (8,))
        >>> LF.auxiliary_cross_entropy(logits, target, neighbors).backward()
        >>> LF.auxiliary_predict(logits, num_classes=3).shape
        torch.Size([8])
    """
    offsets, classes, back_from = _silenced_rows(neighbors, mode, neighbor_weight)
    if prior_counts is not None:
        logit_bias = _with_prior(logit_bias, prior_counts, tau, neighbors.num_classes + neighbors.num_auxiliary)
    return margin_softmax(
        input, target, weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight, row_class,
        offsets, classes, scale, neighbor_weight, back_from, reduction, ignore_index, label_smoothing, return_lse,
    )  # fmt: skip


def _silenced_rows(neighbors: NeighborMap, mode: str, neighbor_weight: float) -> SilencedRows:
    if not isinstance(neighbors, NeighborMap):
        raise TypeError(f"neighbors: expected a NeighborMap, got {type(neighbors).__name__}")
    rows = neighbors.rows(mode)
    if rows.back_from >= 0 and neighbor_weight != 0:
        raise ValueError(f"mode 'back': expected neighbor_weight=0, got {neighbor_weight}")
    return rows


def _with_prior(logit_bias: Tensor | None, prior_counts: Tensor, tau: float, classes: int) -> Tensor:
    if not isinstance(prior_counts, Tensor) or prior_counts.shape != (classes,):
        found = tuple(prior_counts.shape) if isinstance(prior_counts, Tensor) else type(prior_counts).__name__
        raise ValueError(f"prior_counts: expected a Tensor of shape ({classes},), got {found}")
    if not isinstance(tau, Real):  # a 0-d tensor the dispatcher would take for a number, and lose its gradient
        raise TypeError(f"tau: expected a number, got {type(tau).__name__}")
    if finite(tau) is None:
        raise ValueError(f"tau: expected a finite number, got {tau}")
    check_layouts(prior_counts=prior_counts, logit_bias=logit_bias)
    if logit_bias is not None and (not isinstance(logit_bias, Tensor) or logit_bias.shape != (classes,)):
        found = f"shape {tuple(logit_bias.shape)}" if isinstance(logit_bias, Tensor) else type(logit_bias).__name__
        raise ValueError(f"logit_bias: expected a Tensor of shape ({classes},), got {found}")
    if logit_bias is not None and not logit_bias.is_floating_point():
        raise TypeError(f"logit_bias: expected a floating dtype, got {logit_bias.dtype}")
    if logit_bias is not None and logit_bias.device != prior_counts.device:
        found = f"{logit_bias.device} and {prior_counts.device}"
        raise ValueError(f"logit_bias, prior_counts: expected tensors on one device, got {found}")
    prior = (_ops.log_prior if is_compiling() else _ops.log_prior_direct)(prior_counts, tau)
    return prior if logit_bias is None else logit_bias + prior


def linear_margin_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    cosine: bool = False,
    chunk_size: int | str = "auto",
    weight: Tensor | None = None,
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
    return_stats: bool = False,
) -> Tensor | tuple:
    r"""A linear classifier and :func:`margin_cross_entropy` in one, on a chunk of the N x C logits at a time.

    The same loss and gradients as ``margin_cross_entropy(F.linear(input, linear_weight, linear_bias), target, ...)``,
    computed a chunk of rows at a time: the logits of the chunk, its loss, their gradient in the same memory, and from
    it the gradients to ``input`` and ``linear_weight``, which are ready after the forward pass. The memory needed
    beyond inputs and gradients is about that of one chunk; ``chunk_size="auto"`` makes chunks of some 8 million logits
    on CPUs and 67 million on others, so that smaller problems are one chunk. The gradient to ``linear_weight`` is added
    up in float32: for 16-bit inputs that takes C x D numbers more, and as many for a copy of the weights on CPUs that
    do not multiply in that dtype. Those that do round the part of each chunk before it is added.

    With ``cosine`` the logits are :math:`\langle x_i / |x_i|, W_j / |W_j| \rangle`, the normalised classifier of LDAM
    (Cao et al., arXiv:1906.07413) and CosFace (Wang et al., arXiv:1801.09414), with exact gradients to the vectors
    that are not normalised. A vector no longer than 1e-8 has no direction: its logits and its gradient are 0. As for
    ``F.linear``, all features must be finite, those of ignored samples too: NaN reaches ``linear_weight``'s gradient.

    Args:
        input: Features, ``(D,)``, ``(N, D)`` or ``(N, d1, ..., D)``; float16, bfloat16, float32 or float64. On GPUs,
            and for bfloat16 on CPUs with AVX512-BF16 if a chunk has some four million multiply-adds, the logits are
            rounded to this dtype, as by ``F.linear``; otherwise those of 16-bit features are float32 on CPUs. Under
            autocast, features and classifier are cast first.
        linear_weight: ``(C, D)`` classifier, of the dtype of ``input``; frozen if it does not require grad.
        target: Class indices ``()``, ``(N,)`` or ``(N, d1, ...)``, or probabilities with the classes in the last
            dimension.
        linear_bias: ``(C,)``; not with ``cosine``. Rounded as the logits are: class counts belong in ``logit_bias``.
        cosine: Normalise features and classifier.
        chunk_size: Rows of a chunk, or ``"auto"``.
        mask: Boolean ``(C,)`` or ``(N, d1, ..., C)``; the classes are in the last dimension.
        return_stats: Also return a ``LinearStats`` with ``row_loss`` (what ``reduction="none"`` gives), ``predicted``
            (the class of the largest logit, margins aside) and ``correct``, one entry a sample, without gradients.

    The other arguments, gradients and errors are those of :func:`margin_cross_entropy`. A scalar loss whose gradient
    goes to ``input``, ``linear_weight`` and ``linear_bias`` alone takes :math:`6 N D C` operations; otherwise
    (``reduction="none"``, ``return_lse``, learned margins or sample weights, float16) the backward pass computes the
    logits a second time.

    Returns:
        The loss, or a tuple of the loss and, as asked for, the log-sum-exps and the ``LinearStats``.

    Example::

        >>> import torch, ltkernels.functional as LF
        >>> features, classifier = torch.randn(8, 16, requires_grad=True), torch.randn(5, 16, requires_grad=True)
        >>> target = torch.randint(5, (8,))
        >>> loss, stats = LF.linear_margin_cross_entropy(features, classifier, target, return_stats=True)
        >>> loss.backward()
        >>> stats.correct.shape
        torch.Size([8])
    """
    return linear_margin_softmax(
        input, linear_weight, linear_bias, cosine, chunk_size, target, weight, logit_scale, logit_bias, target_margin,
        pairwise_margin, mask, sample_weight, None, None, None, scale, 1.0, -1, reduction, ignore_index,
        label_smoothing, return_lse, return_stats, None,
    )  # fmt: skip


def linear_auxiliary_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    neighbors: NeighborMap,
    *,
    neighbor_weight: float = 0.0,
    mode: str = "plain",
    row_class: Tensor | None = None,
    prior_counts: Tensor | None = None,
    tau: float = 1.0,
    linear_bias: Tensor | None = None,
    cosine: bool = False,
    chunk_size: int | str = "auto",
    weight: Tensor | None = None,
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
    return_stats: bool = False,
) -> Tensor | tuple:
    """A linear classifier and :func:`auxiliary_cross_entropy` in one, on a chunk of the N x K logits at a time.

    Args, return value and errors are those of :func:`linear_margin_cross_entropy` and
    :func:`auxiliary_cross_entropy`; ``linear_weight`` is ``(K, D)``. The predicted class of ``return_stats`` is that
    of the largest logit among the target classes, without a prior.
    """
    offsets, classes, back_from = _silenced_rows(neighbors, mode, neighbor_weight)
    if prior_counts is not None:
        logit_bias = _with_prior(logit_bias, prior_counts, tau, neighbors.num_classes + neighbors.num_auxiliary)
    return linear_margin_softmax(
        input, linear_weight, linear_bias, cosine, chunk_size, target, weight, logit_scale, logit_bias, target_margin,
        pairwise_margin, mask, sample_weight, row_class, offsets, classes, scale, neighbor_weight, back_from,
        reduction, ignore_index, label_smoothing, return_lse, return_stats, neighbors.num_classes,
    )  # fmt: skip


def mask_auxiliary(logits: Tensor, num_classes: int) -> Tensor:
    """``logits`` with those of auxiliary classes, from ``num_classes`` on, at ``-inf``, for softmax or argmax at test.

    Args:
        logits: ``(K,)``, ``(N, K)`` or ``(N, K, d1, ...)``; not modified.
        num_classes: The number of target classes C, from 1 to K.

    Raises:
        ValueError: ``num_classes`` outside ``[1, K]``.
        TypeError: a wrong type.
    """
    dim = _class_dim(logits, num_classes)
    auxiliary = torch.arange(logits.shape[dim], device=logits.device) >= num_classes
    return logits.masked_fill(auxiliary.reshape(-1, *[1] * (logits.dim() - 1 - dim)), -torch.inf)


def auxiliary_predict(logits: Tensor, num_classes: int) -> Tensor:
    """The most likely target class of each sample, without a prior: ``()``, ``(N,)`` or ``(N, d1, ...)`` int64.

    Args and errors as for :func:`mask_auxiliary`.
    """
    dim = _class_dim(logits, num_classes)
    return logits.narrow(dim, 0, num_classes).argmax(dim)


def _class_dim(logits: Tensor, num_classes: int) -> int:
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: expected a Tensor, got {type(logits).__name__}")
    check_layouts(logits=logits)
    if isinstance(num_classes, bool) or not isinstance(num_classes, (int, torch.SymInt)):
        raise TypeError(f"num_classes: expected an int, got {type(num_classes).__name__}")
    if not logits.is_floating_point():
        raise TypeError(f"logits: expected a floating dtype, got {logits.dtype}")
    if logits.dim() == 0:
        raise ValueError("logits: expected shape (K,), (N, K) or (N, K, d1, ...), got a 0-d tensor")
    dim = 0 if logits.dim() == 1 else 1
    if not 1 <= num_classes <= logits.shape[dim]:
        raise ValueError(f"num_classes: expected a number from 1 to {logits.shape[dim]}, got {num_classes}")
    return dim
