"""Loss modules of ``contrastive_loss`` with keys or temperatures of their own: prototypes, learned temperatures."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import ltkernels.functional as LF
from ltkernels._checks import are_integers, boolean, check_layouts, integer, kind_of, number
from ltkernels._contrastive import as_multiplied, unit_vectors
from ltkernels._contrastive_loss import (
    ContrastiveLossModule,
    as_int64,
    check_embeddings,
    check_labels,
    checked_index,
    shown,
    state_dtype,
)


class BalancedContrastiveLoss(ContrastiveLossModule):
    r"""Supervised contrastive loss that averages over classes in the denominator and has a prototype of each class.

    .. math:: L_i = \log \sum_{j \ne i} \frac{1}{n_{y_j}} e^{s_{ij}} - \frac{1}{|P(i)|} \sum_{p \in P(i)} s_{ip}, \qquad
        s_{ij} = \langle z_i, k_j \rangle / \tau

    Keys are the batch and one prototype of each class, which is a positive of its class: every row has one, and every
    class is in every denominator. :math:`n_c` counts the keys of class c, row i itself included. Rows are averaged over
    the batch. Zhu et al., "Balanced Contrastive Learning for Long-Tailed Visual Recognition", arXiv:2207.09052.

    The formula as printed sums :math:`e^{s_{ii}}` too, which says nothing and is left out here as in the authors' code;
    that code divides the term of the own class by the keys without row i, :math:`n_{y_i} - 1`: ``count_anchor=False``.

    Two :func:`ltkernels.functional.similarity_logsumexp`, one over the batch and one over the prototypes, and sums of
    the embeddings of each class, without an M x (M + C) matrix. ``count_anchor=False`` takes a third one,
    and with it some 1.3 to 1.8 times as long as one fused call would, where its matrix fits the memory.

    Args:
        temperature: :math:`\tau > 0`: a number, or a tensor or ``nn.Parameter`` of shape ().
        normalize: Divide embeddings and prototypes by their length first.
        count_anchor: Whether :math:`n_{y_i}` counts row i.

    Raises:
        ValueError: a value out of range, wrong shapes, labels that are not below C (on CPUs; the loss is NaN on GPUs).
        TypeError: a wrong type or dtype.

    Example::

        >>> loss = BalancedContrastiveLoss(temperature=0.1)
        >>> loss(network(image), labels, prototypes=head(classifier.weight)).backward()
    """

    temperature: float | Tensor

    def __init__(self, temperature: float | Tensor = 0.1, normalize: bool = True, *, count_anchor: bool = True) -> None:
        super().__init__(normalize)
        self._set_temperature(temperature)
        self.count_anchor = boolean("count_anchor", count_anchor)

    def forward(self, embeddings: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
        """The loss, a scalar, with gradients to embeddings, prototypes and a learned temperature.

        Args:
            embeddings: (M, D) of any floating dtype, or (N, V, D), V views of N samples.
            labels: (M,), or (N,) with views: integers from -1 to C - 1. A row of -1 is a key of its own class, and has
                no loss.
            prototypes: (C, D) of the dtype of ``embeddings``: class c is row c.
        """
        check_embeddings(embeddings)
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels: expected a Tensor, got {type(labels).__name__}")
        embeddings, labels, _ = self._batch(embeddings, labels)
        _check_like("prototypes", prototypes, embeddings)
        classes, rows = prototypes.shape[0], embeddings.shape[0]
        check_labels(labels, rows, classes)
        z, c = (unit_vectors(x) if self.normalize else as_multiplied(x) for x in (embeddings, prototypes))
        acc = torch.promote_types(z.dtype, torch.float32)
        # Labels that are none make the loss NaN where no check has seen them.
        refused = (labels < -1) | (labels >= classes)
        known = (labels >= 0) | refused
        place = torch.where(refused, 0, labels + 1)  # 0 is for label -1
        ones = torch.ones_like(labels, dtype=acc)
        keys = z.new_ones(classes + 1, dtype=acc).index_add(0, place, ones)  # of each class, the prototype among them
        n = torch.where(known, keys.index_select(0, place), 2.0)
        n = torch.where(refused, torch.nan, n)
        # Sums of classes in the place of all pairs: memory O(M D), whatever the number of rows.
        sums = torch.cat([z.new_zeros(1, z.shape[1], dtype=acc), c.to(acc)])
        own = _rows_of(sums, place)
        sums = _with_rows_added(sums, place, z.to(acc))
        positive = (z * (_rows_of(sums, place) - z)).sum(1) / self.temperature / (n - 1)
        terms = [
            LF.similarity_logsumexp(z, temperature=self.temperature, key_bias=torch.where(known, -n.log(), 0.0)),
            LF.similarity_logsumexp(z, c, temperature=self.temperature, key_bias=-keys[1:].log(), exclude=None),
        ]
        if not self.count_anchor:  # 1 / (n - 1) = 1 / n + 1 / (n (n - 1)), the latter for keys of the own class
            share = (n * (n - 1)).log()
            same = LF.similarity_logsumexp(z, temperature=self.temperature, labels=labels, exclude="different_label")
            terms += [same - share, (z * own).sum(1) / self.temperature - share]
        loss = torch.where(known, torch.logsumexp(torch.stack(terms), 0) - positive, 0.0)
        return loss.sum() / known.sum().clamp(min=1)

    def extra_repr(self) -> str:
        return f"temperature={shown(self.temperature)}, {super().extra_repr()}, count_anchor={self.count_anchor}"


class MACLLoss(ContrastiveLossModule):
    r"""Model-aware contrastive loss: the better the views of a sample agree, the higher the temperature.

    .. math:: \tau = \tau_0 \, (1 + \alpha (A - A_0)), \qquad L_i = \log \sum_{j \ne i, p_i} e^{s_{ij}} - s_{i p_i},
        \qquad s_{ij} = \langle z_i, z_j \rangle / \tau

    A is the mean cosine similarity of the positive pairs in the batch, a constant for the gradient. The authors weight
    InfoNCE, :math:`-\log P_i`, by the constant :math:`1 / (1 - P_i)` in order not to lose its gradient. That gradient
    is the one of the loss above, whose denominator has no positive; the values of the two differ. Huang et al.,
    arXiv:2207.07874.

    Args:
        temperature: :math:`\tau_0 > 0`.
        alpha: How much the temperature changes, in [0, 1].
        threshold: :math:`A_0` in [0, 1]; ``alpha * (1 + threshold) < 1``, which keeps the temperature positive.
        layout: How two views are ordered, as in :class:`NTXentLoss`.

    Raises ``ValueError`` or ``TypeError`` naming the argument that is out of range or of a wrong type.

    Example::

        >>> loss = MACLLoss()
        >>> loss(torch.cat([network(first), network(second)])).backward()
    """

    def __init__(
        self, temperature: float = 0.1, alpha: float = 0.5, threshold: float = 0.0, *, layout: str = "stacked"
    ) -> None:
        super().__init__(True, layout)
        self.base_temperature = number("temperature", temperature, "> 0")
        self.alpha = number("alpha", alpha, "in [0, 1]")
        self.threshold = number("threshold", threshold, "in [0, 1]")
        if self.alpha * (1 + self.threshold) >= 1:
            raise ValueError(f"alpha, threshold: expected alpha * (1 + threshold) < 1, got {alpha} and {threshold}")

    def forward(self, embeddings: Tensor, positive_index: Tensor | None = None) -> Tensor:
        """The loss, a scalar.

        Args:
            embeddings: (M, D) of any floating dtype, or (N, 2, D), two views of N samples; normalised here.
            positive_index: (M,) the positive of each row; without it rows are two views in the module's ``layout``.
        """
        if positive_index is not None and isinstance(embeddings, Tensor) and embeddings.dim() == 3:
            raise ValueError("positive_index: expected None with embeddings of shape (N, 2, D)")
        embeddings, _, positive_index = self._batch(self._two_views(embeddings), None, positive_index)
        if not are_integers(positive_index):
            raise TypeError(f"positive_index: expected an integer Tensor, got {kind_of(positive_index)}")
        if positive_index.shape != embeddings.shape[:1]:
            found = tuple(positive_index.shape)
            raise ValueError(f"positive_index: expected shape ({embeddings.shape[0]},), got {found}")
        embeddings = unit_vectors(embeddings)
        return LF.contrastive_loss(
            embeddings,
            temperature=self._temperature(embeddings.detach(), positive_index),
            positive_index=positive_index,
            denominator="negatives",
        )

    def _temperature(self, embeddings: Tensor, positive_index: Tensor) -> Tensor:
        x = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        # An index that is out of range gets its error from the loss, and no crash here.
        positive = x[positive_index.clamp(0, x.shape[0] - 1)]
        return self.base_temperature * (1 + self.alpha * ((x * positive).sum(1).mean() - self.threshold))

    def extra_repr(self) -> str:
        layout = super().extra_repr().removeprefix("normalize=True")
        return f"temperature={self.base_temperature}, alpha={self.alpha}, threshold={self.threshold}{layout}"


class ISogCLRLoss(ContrastiveLossModule):
    r"""A temperature of each training sample that is learned by its own robust objective (iSogCLR).

    With :math:`h_{ij} = \langle z_i, z_j \rangle - \langle z_i, z_{p_i} \rangle` over the n negatives j of a row i, the
    objective of a sample is :math:`\tau \log \frac{1}{n} \sum_j e^{h_{ij} / \tau} + \tau \rho`, minimised over the
    network and over :math:`\tau` in ``temperature_range``. Qiu et al., arXiv:2305.11965.

    In training mode every call does the following for each sample of the batch, before it computes the loss:

    1. :math:`g` is the mean of :math:`e^{h_{ij} / \tau}` over the negatives, and over both views.
    2. :math:`s \leftarrow (1 - \gamma) s + \gamma g`; when the sample comes for the first time :math:`s \leftarrow g`.
    3. The gradient of the temperature, averaged over both views, is :math:`G = \log s + \rho - \frac{1}{n} \sum_j
       (e^{h_{ij} / \tau} / s) \, h_{ij} / \tau`.
    4. :math:`v \leftarrow (1 - \beta) v + \beta \, \mathrm{clip}(G, -c, c)` and :math:`\tau \leftarrow
       \mathrm{clip}(\tau - \eta v, \tau_{\min}, \tau_{\max})`. The loss of this call still has the old :math:`\tau`.

    The loss is the mean over rows of :math:`\frac{1}{n} \sum_j (e^{h_{ij} / \tau} / s) \, h_{ij}`, whose weights are
    constants: its gradient is that of the objective with the moving average s in the place of the batch's own mean, so
    that small batches do not bias it. Its value says little. In evaluation mode no state changes.

    This is the rule of the paper, with a clip of G, an upper limit of the temperatures and one average s for both views
    added to it. The authors' code (``SogCLR_DRO_Loss``) and LibAUC's ``GCLoss_v1`` average
    :math:`e^{\langle z_i, z_j \rangle / \tau}`, not relative to the positive, weight each view by an average of its
    own, and return the sum over the views. Gradients differ by 18 to 37 percent in the guide's example.

    Args:
        num_samples: Size of the training set.
        rho: :math:`\rho \ge 0`; the greater, the lower the temperatures.
        temperature: First temperature of every sample.
        temperature_range: :math:`(\tau_{\min}, \tau_{\max})`, positive.
        gamma: Weight of the batch in the moving average, in [0, 1], not 0.
        learning_rate: :math:`\eta \ge 0` of the temperatures; 0 gives SogCLR, with one constant temperature.
        beta: Weight of the batch in the averaged gradient v, in [0, 1], not 0.
        gradient_clip: c, positive.
        layout: How two views are ordered, as in :class:`NTXentLoss`.

    State, in buffers of ``num_samples`` numbers, saved and float32 at least: ``temperature``, ``log_average`` (log s;
    -inf: not seen yet) and ``averaged_gradient`` (v). A batch should have a sample only once.

    With several processes gather embeddings and indices first, so that all of them do the same updates. Without, each
    process has a state of the samples it saw itself, as long as the loss is outside of ``DistributedDataParallel`` or
    that is made with ``broadcast_buffers=False``; rank 0 saves its own. DDP's default, ``broadcast_buffers=True``,
    overwrites the state by that of rank 0 before every forward pass: what other ranks have learned is lost.

    Raises:
        ValueError: a value out of range, wrong shapes, fewer than two samples, a number of a sample out of range.
        TypeError: a wrong type or dtype.

    Example::

        >>> loss = ISogCLRLoss(len(dataset), rho=0.3)
        >>> for first, second, index in loader:
        ...     loss(torch.cat([network(first), network(second)]), index).backward()
    """

    temperature: Tensor
    log_average: Tensor
    averaged_gradient: Tensor

    def __init__(
        self,
        num_samples: int,
        rho: float,
        *,
        temperature: float = 0.1,
        temperature_range: tuple[float, float] = (0.05, 1.0),
        gamma: float = 0.9,
        learning_rate: float = 0.01,
        beta: float = 0.9,
        gradient_clip: float = 5.0,
        layout: str = "stacked",
    ) -> None:
        super().__init__(True, layout)
        self.num_samples = integer("num_samples", num_samples, minimum=1)
        self.rho = number("rho", rho, ">= 0")
        if not isinstance(temperature_range, (tuple, list)) or len(temperature_range) != 2:
            raise ValueError(f"temperature_range: expected two numbers, got {temperature_range!r}")
        low, high = (number("temperature_range", x, "> 0") for x in temperature_range)
        if not low <= number("temperature", temperature, "> 0") <= high:
            raise ValueError(f"temperature: expected a number in the range ({low}, {high}), got {temperature}")
        self.temperature_range = (low, high)
        self.gamma, self.beta = number("gamma", gamma, "in [0, 1]"), number("beta", beta, "in [0, 1]")
        for name in ("gamma", "beta"):
            number(name, getattr(self, name), "> 0")
        self.learning_rate = number("learning_rate", learning_rate, ">= 0")
        self.gradient_clip = number("gradient_clip", gradient_clip, "> 0")
        dtype = state_dtype()
        self.register_buffer("temperature", torch.full((num_samples,), float(temperature), dtype=dtype))
        self.register_buffer("log_average", torch.full((num_samples,), -torch.inf, dtype=dtype))
        self.register_buffer("averaged_gradient", torch.zeros(num_samples, dtype=dtype))

    def forward(self, embeddings: Tensor, index: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            embeddings: (2 B, D) of any floating dtype, two views of B samples in the module's ``layout``, or
                (B, 2, D); normalised here.
            index: (B,) the samples: integers below ``num_samples``.
        """
        embeddings, _, positive_index = self._batch(self._two_views(embeddings), None)
        rows, negatives = embeddings.shape[0], embeddings.shape[0] - 2
        if not negatives:
            raise ValueError("embeddings: expected two views of at least two samples, got one sample")
        index = as_int64(index)
        self._rows("index", index, rows)
        if index.shape[0] == rows:
            raise ValueError(f"index: expected shape ({rows // 2},), one number for both views, got ({rows},)")
        index = checked_index(index, self.num_samples)
        embeddings, temperature = unit_vectors(embeddings), self.temperature[self._spread(index)]
        options = {"temperature": temperature, "positive_index": positive_index, "denominator": "negatives"}
        with torch.no_grad():
            _, stats = LF.contrastive_loss(embeddings.detach(), **options, reduction="none", return_stats=True)
            log_mean = stats.logsumexp - stats.positive - math.log(negatives)
            average = self._moving_average(self.log_average[index], log_mean)
            row_average = self._spread(average)
            weighted = (log_mean - row_average).exp() * (stats.expected - stats.positive)
            gradient = average + self.rho - self._views(weighted).mean(0)
            if self.training:
                self._update(index, average, gradient)
        return LF.contrastive_loss(embeddings, **options, log_normalizer=row_average + math.log(negatives))

    def _views(self, x: Tensor) -> Tensor:
        """(2 B,) numbers of rows as (2, B)."""
        return x.view(2, -1) if self.layout == "stacked" else x.view(-1, 2).T

    def _moving_average(self, old: Tensor, log_mean: Tensor) -> Tensor:
        """log s of the samples of the batch, (B,), from the rows' log g."""
        new = torch.logsumexp(self._views(log_mean), 0) - math.log(2)
        kept = math.log1p(-self.gamma) if self.gamma < 1 else -math.inf
        moved = torch.logaddexp(old.to(new.dtype) + kept, new + math.log(self.gamma))
        return torch.where(old == -torch.inf, new, moved)

    def _update(self, index: Tensor, average: Tensor, gradient: Tensor) -> None:
        dtype = self.temperature.dtype
        step = gradient.to(dtype).clamp(-self.gradient_clip, self.gradient_clip)
        step = torch.lerp(self.averaged_gradient[index], step, self.beta)
        temperature = (self.temperature[index] - self.learning_rate * step).clamp(*self.temperature_range)
        self.log_average[index] = average.to(dtype)
        self.averaged_gradient[index] = step
        self.temperature[index] = temperature

    def extra_repr(self) -> str:
        names = ("num_samples", "rho", "temperature_range", "gamma", "learning_rate", "beta", "gradient_clip")
        layout = super().extra_repr().removeprefix("normalize=True")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names) + layout


def _rows_of(table: Tensor, place: Tensor) -> Tensor:
    """Rows, their gradients summed in a fixed order: by index_add on CPUs; sorted on GPUs, where that has atomics.

    In ``torch.compile`` on a GPU the order is fixed under ``torch.use_deterministic_algorithms`` only.
    """
    return table.index_select(0, place) if table.is_cpu else table[place]


def _with_rows_added(table: Tensor, place: Tensor, x: Tensor) -> Tensor:
    """The table with the rows x added, in the order of :func:`_rows_of`."""
    return table.index_add(0, place, x) if table.is_cpu else table.index_put((place,), x, accumulate=True)


def _check_like(name: str, x: Tensor, embeddings: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    width = embeddings.shape[1]
    if x.dim() != 2 or x.shape[1] != width or not x.shape[0]:
        raise ValueError(f"{name}: expected shape (C, {width}) with C > 0, got {tuple(x.shape)}")
    check_layouts(**{name: x})
    if x.device != embeddings.device:
        raise ValueError(f"{name}: expected a tensor on {embeddings.device} like embeddings, got one on {x.device}")
    if x.dtype != embeddings.dtype:
        raise TypeError(f"{name}: expected dtype {embeddings.dtype} like embeddings, got {x.dtype}")
