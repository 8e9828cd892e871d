"""Contrastive losses over embeddings, and the log-sum-exp of similarities that others are built from."""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ltkernels import _ops, reference
from ltkernels._checks import are_integers, boolean, check_layouts, has_no_values, integer
from ltkernels._rows import REDUCTIONS

DENOMINATORS = {"all": reference.ALL, "own": reference.OWN, "negatives": reference.NEGATIVES}
_EXCLUDED = {
    None: (reference.LOGSUMEXP, False),
    "self": (reference.LOGSUMEXP, True),
    "same_label": (reference.LOGSUMEXP_OTHER_LABEL, True),
    "different_label": (reference.LOGSUMEXP_SAME_LABEL, True),
}
LAYOUTS = ("stacked", "interleaved")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ContrastiveStats(NamedTuple):
    """What a contrastive loss knows of each row: (M,) each, float32 (float64 for float64 queries), no gradient."""

    row_loss: Tensor  # L_i, tau_i L_i under scale_by_temperature, without its weight u_i; 0 for rows without a positive
    logsumexp: Tensor  # LSE_i over the keys of the denominator; -inf if there is none
    positive: Tensor  # S_i, the mean of <q_i, k_p> / tau_i over the positives; 0 if there is none
    expected: Tensor  # E_i, the mean of <q_i, k_j> / tau_i under softmax(l_i) over the keys of the denominator


def contrastive_loss(
    query: Tensor,
    key: Tensor | None = None,
    *,
    temperature: float | Tensor,
    labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    positive_index: Tensor | None = None,
    allowed: Tensor | None = None,
    key_bias: Tensor | None = None,
    pair_margin: Tensor | None = None,
    sample_weight: Tensor | None = None,
    denominator: str = "all",
    normalize: bool = False,
    scale_by_temperature: bool = False,
    log_normalizer: Tensor | None = None,
    extra_positive: Tensor | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    r"""Contrastive loss with a temperature of each query, without the M x N similarities.

    .. math::
        \ell_{ij} = \langle q_i, k_j \rangle / \tau_i + c_j + \rho_{y_i y_j}, \qquad
        L_i = \log \sum_{j \in A(i)} e^{\ell_{ij}} -
        \frac{1}{|P(i)|} \sum_{p \in P(i)} \langle q_i, k_p \rangle / \tau_i

    P(i) are the positives of row i, A(i) the keys in its denominator. Without ``key`` the queries are contrasted with
    each other and no row is its own key. The loss is :math:`\sum_i u_i L_i / Z` over the rows that have a positive;
    with ``reduction="mean"`` Z is the sum of their :math:`u_i`, 1 with ``"sum"``. ``reduction="none"`` gives
    :math:`u_i L_i`, 0 for rows without a positive. With no positive at all the loss and its gradients are 0.

    SimCLR (arXiv:2002.05709): one ``positive_index``. Supervised contrastive learning (arXiv:2004.11362, the loss with
    the sum outside the logarithm): ``labels``. MoCo (arXiv:1911.05722): keys from a queue and ``extra_positive``.
    Decoupled contrastive learning (arXiv:2110.06848): ``denominator="negatives"``. ``ltkernels.nn`` has modules.

    Args:
        query: ``(M, D)``; float16, bfloat16, float32 or float64. Similarities are computed in float32 at least.
        key: ``(N, D)`` of the dtype of ``query``, or ``None`` for the queries themselves.
        temperature: :math:`\tau > 0`: a number, or a tensor ``()`` or ``(M,)``.
        labels: ``(M,)`` integers from -1 to 2^31 - 1: keys of the same label are positives, and -1 has none.
        key_labels: ``(N,)`` labels of ``key``.
        positive_index: ``(M,)`` the positive key of each row, instead of ``labels``.
        allowed: Boolean ``(N,)`` or ``(M, N)``; ``False`` removes a key, as a negative and as a positive.
        key_bias: ``(N,)``, c; ``-inf`` takes a key out of the denominator.
        pair_margin: ``(L, L)``, :math:`\rho`, for labels below L; pairs with a label of -1 have none.
        sample_weight: ``(M,)``, u.
        denominator: ``"all"``: A(i) is every key that is allowed, positives too. ``"negatives"``: without the
            positives. ``"own"``: each positive beside the negatives only,
            :math:`L_i = |P(i)|^{-1} \sum_p \log(1 + \sum_{j \in A(i)} e^{\ell_{ij}} / e^{\langle q_i, k_p \rangle
            / \tau_i})`. In the last two a row without a negative gives 0.
        normalize: Divide queries, keys and extra positives by their length first, in float32 at least. On GPUs unit
            vectors of 16-bit embeddings are rounded to 16 bits, for the tensor cores; elsewhere they are not.
        scale_by_temperature: Multiply :math:`L_i` by :math:`\tau_i`.
        log_normalizer: ``(M,)``, :math:`\nu`, a moving average in the place of the log-sum-exp, relative to the
            positive (iSogCLR, arXiv:2305.11965): with :math:`w_{ij} = e^{\ell_{ij} - S_i - \nu_i}`, which are
            constants, and S_i the mean of the positives, :math:`L_i = \sum_{j \in A(i)} w_{ij} (\langle q_i, k_j
            \rangle - \tau_i S_i)`. The weights have c and :math:`\rho` in them, as the log-sum-exp has that is
            averaged: a key of bias c counts :math:`e^c` times. For ``denominator="negatives"``; the temperature,
            ``key_bias`` and ``pair_margin`` get no gradient.
        extra_positive: ``(M, D)``, one more positive of each row, which no other row sees.
        return_stats: Also return ``ContrastiveStats``.

    Gradients flow to ``query``, ``key``, ``temperature``, ``key_bias``, ``pair_margin``, ``sample_weight`` and
    ``extra_positive``. The loss is float32, float64 for float64 queries.

    Raises:
        ValueError: wrong shapes, devices or names, a temperature that is not positive, ``positive_index`` out of range
            or at the row itself, labels below -1 or not below L, both ``labels`` and ``positive_index`` or nothing
            that names a positive. Values are checked on CPUs. On GPUs reading them would synchronise: a bad
            temperature, label or ``positive_index`` makes the loss of its row, all means and sums, and their gradients
            NaN, and the label of a key those of every row.
        TypeError: wrong dtypes, such as a queue of another dtype than the queries.

    Example::

        >>> import torch, ltkernels.functional as LF
        >>> embeddings, labels = torch.randn(8, 16, requires_grad=True), torch.randint(3, (8,))
        >>> tau = torch.full((8,), 0.1)
        >>> LF.contrastive_loss(embeddings, temperature=tau, labels=labels, normalize=True).backward()
    """
    if not isinstance(denominator, str) or denominator not in DENOMINATORS:
        raise ValueError(f"denominator: expected 'all', 'own' or 'negatives', got {denominator!r}")
    if labels is not None and positive_index is not None:
        raise ValueError("labels, positive_index: expected one of them, got both")
    if labels is None and positive_index is None and extra_positive is None:
        raise ValueError("expected labels, positive_index or extra_positive: nothing says what the positives are")
    if log_normalizer is not None and (denominator != "negatives" or scale_by_temperature):
        raise ValueError("log_normalizer: expected denominator='negatives' and no scale_by_temperature")
    options = _Options(
        labels, key_labels, positive_index, allowed, key_bias, pair_margin, sample_weight, log_normalizer,
        extra_positive,
    )  # fmt: skip
    boolean("scale_by_temperature", scale_by_temperature)
    boolean("normalize", normalize)
    boolean("return_stats", return_stats)
    loss, stats = _call(
        query, key, temperature, options, DENOMINATORS[denominator], True, scale_by_temperature, reduction, normalize,
        return_stats,
    )  # fmt: skip
    return (loss, ContrastiveStats(stats[2], stats[0], stats[1], stats[3])) if return_stats else loss


def similarity_logsumexp(
    query: Tensor,
    key: Tensor | None = None,
    *,
    temperature: float | Tensor,
    key_bias: Tensor | None = None,
    exclude: str | None = "self",
    labels: Tensor | None = None,
    key_labels: Tensor | None = None,
) -> Tensor:
    r"""``(M,)`` log-sum-exps :math:`\log \sum_j e^{\langle q_i, k_j \rangle / \tau_i + c_j}`, without the M x N matrix.

    Differentiable in ``query``, ``key``, ``temperature`` and ``key_bias``: what other contrastive losses are built
    from. A row that has no key gives ``-inf``, and no gradient.

    Args:
        exclude: ``"self"``: the row itself, if there is no ``key``; ``None``: nothing. ``"same_label"``: keys of the
            row's label; ``"different_label"``: all others, and both the row itself. -1 is nobody's label.

    The other arguments and errors are those of :func:`contrastive_loss`.

    Example::

        >>> import torch, ltkernels.functional as LF
        >>> z, y = torch.randn(8, 16, requires_grad=True), torch.randint(3, (8,))
        >>> LF.similarity_logsumexp(z, temperature=0.5, labels=y, exclude="same_label").shape
        torch.Size([8])
    """
    if not (exclude is None or isinstance(exclude, str)) or exclude not in _EXCLUDED:
        raise ValueError(f"exclude: expected 'self', 'same_label', 'different_label' or None, got {exclude!r}")
    if exclude in ("same_label", "different_label") and labels is None:
        raise ValueError(f"labels: expected a Tensor for exclude={exclude!r}, got None")
    denominator, exclude_self = _EXCLUDED[exclude]
    options = _Options(labels=labels, key_labels=key_labels, key_bias=key_bias)
    return _call(query, key, temperature, options, denominator, exclude_self, False, "none", False, False)[0]


def stack_views(views: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Views ``(N, V, D)`` of N samples as embeddings ``(V * N, D)``, all first views first, and their labels.

    ``labels``: ``(N,)``; without them every sample is a class of its own, for :func:`contrastive_loss` with as many
    positives as there are other views.
    """
    if not isinstance(views, Tensor) or views.dim() != 3:
        found = tuple(views.shape) if isinstance(views, Tensor) else type(views).__name__
        raise ValueError(f"views: expected a Tensor of shape (N, V, D), got {found}")
    samples, count, width = views.shape
    if labels is None:
        labels = torch.arange(samples, device=views.device)
    elif not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a Tensor, got {type(labels).__name__}")
    elif labels.shape != (samples,):
        raise ValueError(f"labels: expected shape ({samples},), got {tuple(labels.shape)}")
    return views.transpose(0, 1).reshape(count * samples, width), labels.repeat(count)


def view_pairs(rows: int, layout: str = "stacked", device: torch.device | str | None = None) -> Tensor:
    """``positive_index`` of two views of ``rows / 2`` samples: ``(rows,)`` int64.

    ``layout``: ``"stacked"``: all first views, then all second ones; ``"interleaved"``: the views of a sample in turn.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected 'stacked' or 'interleaved', got {layout!r}")
    if integer("rows", rows, minimum=2) % 2:
        raise ValueError(f"rows: expected an even number, two views of each sample, got {rows}")
    index = torch.arange(rows, device=device)
    return index ^ 1 if layout == "interleaved" else (index + rows // 2) % rows


class _Options(NamedTuple):
    """Optional tensors, in the operator's order."""

    labels: Tensor | None = None
    key_labels: Tensor | None = None
    positive_index: Tensor | None = None
    allowed: Tensor | None = None
    key_bias: Tensor | None = None
    pair_margin: Tensor | None = None
    sample_weight: Tensor | None = None
    log_normalizer: Tensor | None = None
    extra_positive: Tensor | None = None


def _call(
    query, key, temperature, options, denominator, exclude_self, scale_by_temperature, reduction, normalize, with_stats
):
    reduction_code = REDUCTIONS.get(reduction) if isinstance(reduction, str) else None
    if reduction_code is None:
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
    check_layouts(query=query, key=key, temperature=temperature, **options._asdict())
    _check_embeddings(query, key, options)
    temperature = _temperature(temperature, query)
    _check_shapes(query, key, options)
    if query.is_cpu and not is_compiling() and not has_no_values(query, temperature, *options):
        _check_values(query, key, temperature, options)
    if normalize:
        query = unit_vectors(query)
        key = None if key is None else unit_vectors(key)
        if options.extra_positive is not None:
            options = options._replace(extra_positive=unit_vectors(options.extra_positive))
    arguments = (query, key, temperature, *options, denominator, exclude_self, scale_by_temperature)
    if _ops.uses_kernel(query):
        return _ops.contrastive(*arguments, reduction_code, with_stats)
    return reference.contrastive(*arguments, reduction)


def unit_vectors(x: Tensor) -> Tensor:
    """Embeddings divided by their length, in the dtype that similarities are multiplied in."""
    return reference.directions(as_multiplied(x))


def as_multiplied(x: Tensor) -> Tensor:
    """Embeddings in the dtype that their similarities are computed in: 16 bits only for the tensor cores of a GPU."""
    return x if x.is_cuda and _ops.uses_kernel(x) else x.to(torch.promote_types(x.dtype, torch.float32))


def _temperature(temperature: float | Tensor, query: Tensor) -> Tensor:
    """(M,)"""
    rows = query.shape[0]
    if isinstance(temperature, Tensor):
        if temperature.dtype not in _DTYPES:
            raise TypeError(f"temperature: expected a floating dtype, got {temperature.dtype}")
        if temperature.device != query.device:
            raise ValueError(
                f"temperature: expected a tensor on {query.device} like query, got one on {temperature.device}"
            )
        if temperature.dim() and temperature.shape != (rows,):
            raise ValueError(f"temperature: expected shape () or ({rows},), got {tuple(temperature.shape)}")
        return temperature.expand(rows)
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(f"temperature: expected a number or a Tensor, got {type(temperature).__name__}")
    dtype, largest = _accumulation(query)
    if not 1 / largest < temperature < largest:
        raise ValueError(
            f"temperature: expected a finite number above 0 with a finite inverse in {dtype}, got {temperature}"
        )
    return query.new_full((rows,), temperature, dtype=dtype)


def _accumulation(query: Tensor) -> tuple[torch.dtype, float]:
    """The dtype that a call computes in, and its largest number."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return dtype, torch.finfo(dtype).max


def _check_embeddings(query, key, options: _Options) -> None:
    if not isinstance(query, Tensor):
        raise TypeError(f"query: expected a Tensor, got {type(query).__name__}")
    if query.dim() != 2 or query.shape[1] == 0:
        raise ValueError(f"query: expected embeddings of shape (M, D) with D > 0, got {tuple(query.shape)}")
    if query.dtype not in _DTYPES:
        raise TypeError(f"query: expected float16, bfloat16, float32 or float64, got {query.dtype}")
    for name, x, rows in (("key", key, None), ("extra_positive", options.extra_positive, query.shape[0])):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a Tensor or None, got {type(x).__name__}")
        if x.dim() != 2 or x.shape[1] != query.shape[1] or rows not in (None, x.shape[0]):
            expected = f"({'N' if rows is None else rows}, {query.shape[1]})"
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(x.shape)}")
        if x.device != query.device:
            raise ValueError(f"{name}: expected a tensor on {query.device} like query, got one on {x.device}")
        if x.dtype != query.dtype:
            raise TypeError(f"{name}: expected dtype {query.dtype} like query, got {x.dtype}")


def _check_shapes(query: Tensor, key: Tensor | None, options: _Options) -> None:
    rows, keys = query.shape[0], (query if key is None else key).shape[0]
    if options.key_labels is not None and (key is None or options.labels is None):
        raise ValueError("key_labels: expected None without key and labels")
    if options.labels is not None and key is not None and options.key_labels is None:
        raise ValueError("key_labels: expected the labels of key, got None")
    if options.pair_margin is not None and options.labels is None:
        raise ValueError("pair_margin: expected labels with it, got None")
    shapes = {"key_labels": [(keys,)], "key_bias": [(keys,)], "allowed": [(keys,), (rows, keys)]}
    for name, x in zip(options._fields, options, strict=True):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a Tensor or None, got {type(x).__name__}")
        if x.device != query.device:
            raise ValueError(f"{name}: expected a tensor on {query.device} like query, got one on {x.device}")
        if name in ("labels", "key_labels", "positive_index"):
            if not are_integers(x):
                raise TypeError(f"{name}: expected an integer dtype, got {x.dtype}")
        elif name == "allowed":
            if x.dtype != torch.bool:
                raise TypeError(f"allowed: expected torch.bool, got {x.dtype}")
        elif x.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
        if name == "pair_margin":
            if x.dim() != 2 or x.shape[0] != x.shape[1]:
                raise ValueError(f"pair_margin: expected shape (L, L), got {tuple(x.shape)}")
        elif name != "extra_positive" and x.shape not in (expected := shapes.get(name, [(rows,)])):
            raise ValueError(f"{name}: expected shape {' or '.join(map(str, expected))}, got {tuple(x.shape)}")


def _check_values(query: Tensor, key: Tensor | None, temperature: Tensor, options: _Options) -> None:
    """Values that make no sense; on a GPU reading them would synchronise."""
    with torch.no_grad():
        dtype, largest = _accumulation(query)
        expected = f"finite values above 0 with a finite inverse in {dtype}"
        _refuse_outside(temperature, "temperature", expected, above=1 / largest, below=largest)
        for name in ("labels", "key_labels"):
            if (x := getattr(options, name)) is None:
                continue
            x = x.long()  # -1 is no number of uint8
            _refuse_outside(x, name, "labels from -1 to 2^31 - 1", above=-2, below=2**31)
            if options.pair_margin is not None:
                count = options.pair_margin.shape[0]
                _refuse_outside(x, name, f"labels below {count}, the size of pair_margin", above=-2, below=count)
        if (index := options.positive_index) is not None and not _ops.uses_kernel(query):  # the kernel checks its own
            keys, index = (query if key is None else key).shape[0], index.long()
            _refuse_outside(index, "positive_index", f"keys from 0 to {keys - 1}", above=-1, below=keys)
            own = index == torch.arange(index.shape[0], device=index.device)
            if key is None and own.any():
                _refuse(own, "positive_index", index, "another row than the row itself")
        for name in ("key_bias", "pair_margin", "sample_weight", "log_normalizer"):
            if (x := getattr(options, name)) is not None:
                if name == "key_bias":
                    x = torch.where(x == -math.inf, 0, x)  # takes a key out
                _refuse_outside(x, name, "finite values", above=-math.inf, below=math.inf)


def _refuse_outside(x: Tensor, name: str, expected: str, *, above: float, below: float) -> None:
    """By the smallest and the largest, NaN if there is one: comparisons of all values would take several passes."""
    if x.numel() == 0:
        return
    smallest, largest = torch.aminmax(x)
    if not (smallest.item() > above and largest.item() < below):
        _refuse(~((x > above) & (x < below)), name, x, expected)


def _refuse(bad: Tensor, name: str, x: Tensor, expected: str) -> None:
    row = int(bad.flatten().nonzero()[0])
    value = x.flatten()[row].item()
    found = f"{value:g}" if isinstance(value, float) else value
    raise ValueError(f"{name}: expected {expected}, got {found} at index {row}")
