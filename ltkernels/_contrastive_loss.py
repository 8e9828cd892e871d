"""The loss modules of ``contrastive_loss`` that keep no state of single samples, and one that looks it up."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

import ltkernels.functional as LF
from ltkernels._checks import are_integers, boolean, check_layouts, has_no_values, kind_of, number
from ltkernels._contrastive import LAYOUTS


class ContrastiveLossModule(nn.Module):
    """What the modules share: the layout of views, and buffers that stay float32 at least."""

    def __init__(self, normalize: bool = True, layout: str = "stacked") -> None:
        super().__init__()
        boolean("normalize", normalize)
        if layout not in LAYOUTS:
            raise ValueError(f"layout: expected 'stacked' or 'interleaved', got {layout!r}")
        self.normalize = normalize
        self.layout = layout

    def _set_temperature(self, temperature: float | Tensor) -> None:
        if not isinstance(temperature, Tensor):
            self.temperature = number("temperature", temperature, "> 0")
            return
        if temperature.dim() or not temperature.is_floating_point():
            found = f"{tuple(temperature.shape)} of {temperature.dtype}"
            raise ValueError(f"temperature: expected a number or a floating Tensor of shape (), got {found}")
        if isinstance(temperature, nn.Parameter):
            self.temperature = temperature
        elif temperature.requires_grad:
            raise ValueError("temperature: expected an nn.Parameter or a tensor without gradient")
        else:
            self.register_buffer("temperature", temperature.clone())

    def _batch(
        self, embeddings: Tensor, labels: Tensor | None, positive_index: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Embeddings (M, D) and what names their positives; without either, two views in the module's layout."""
        check_embeddings(embeddings)
        if embeddings.dim() == 3:
            if positive_index is not None:
                raise ValueError("positive_index: expected None with embeddings of shape (N, V, D)")
            embeddings, labels = LF.stack_views(embeddings, labels)
        elif labels is None and positive_index is None:
            positive_index = LF.view_pairs(embeddings.shape[0], self.layout, embeddings.device)
        return embeddings, as_int64(labels), as_int64(positive_index)

    def _two_views(self, embeddings: Tensor) -> Tensor:
        """(2 N, D) in the module's layout from (N, 2, D); (M, D) as they are."""
        check_embeddings(embeddings, expected="(M, D) or (N, 2, D)")
        if embeddings.dim() == 2:
            return embeddings
        if embeddings.shape[1] != 2:
            raise ValueError(f"embeddings: expected shape (M, D) or (N, 2, D), got {tuple(embeddings.shape)}")
        return (embeddings.transpose(0, 1) if self.layout == "stacked" else embeddings).flatten(0, 1)

    def _rows(self, name: str, x: Tensor, rows: int, views: tuple[int, int] | None = None) -> Tensor:
        """Numbers of samples (rows,), or (rows / 2,) for two views of each, as numbers of rows.

        ``views``: N and V of embeddings (N, V, D); the numbers are (N,) then.
        """
        if not are_integers(x):
            raise TypeError(f"{name}: expected an integer Tensor, got {kind_of(x)}")
        if views is not None:
            if x.shape != views[:1]:
                raise ValueError(f"{name}: expected shape ({views[0]},), got {tuple(x.shape)}")
            return x.repeat(views[1])
        if x.shape == (rows,):
            return x
        if rows % 2 or x.shape != (rows // 2,):
            expected = f"({rows},)" if rows % 2 else f"({rows},) or ({rows // 2},)"
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(x.shape)}")
        return self._spread(x)

    def _spread(self, x: Tensor) -> Tensor:
        return x.repeat(2) if self.layout == "stacked" else x.repeat_interleave(2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ContrastiveLossModule:
        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not moved.is_floating_point() or moved.dtype in (torch.float32, torch.float64):
                return moved
            return tensor.to(device=moved.device, dtype=torch.promote_types(tensor.dtype, torch.float32))

        return super()._apply(at_least_float32, recurse)

    def extra_repr(self) -> str:
        layout = "" if self.layout == "stacked" else f", layout={self.layout!r}"
        return f"normalize={self.normalize}{layout}"


class NTXentLoss(ContrastiveLossModule):
    r"""Normalised temperature-scaled cross-entropy of embeddings, :func:`ltkernels.functional.contrastive_loss`.

    ``average="rows"``: every row contrasts with all others, and rows are averaged. With one positive a row that is
    SimCLR's loss (arXiv:2002.05709), with ``labels`` the supervised one of :class:`SupConLoss`:

    .. math:: L_i = \log \sum_{j \ne i} e^{s_{ij}} - \frac{1}{|P(i)|} \sum_{p \in P(i)} s_{ip}, \qquad
        s_{ij} = \langle z_i, z_j \rangle / \tau

    ``average="pairs"``: every pair (i, p) of positives contrasts with the negatives of i only, and *pairs* are
    averaged, so that rows count as often as they have positives (``NTXentLoss`` of pytorch-metric-learning):

    .. math:: L_{ip} = \log\Bigl(1 + \sum_{j \notin P(i), j \ne i} e^{s_{ij} - s_{ip}}\Bigr)

    Args:
        temperature: :math:`\tau > 0`: a number, a tensor of shape (), which is copied, or an ``nn.Parameter`` of shape
            (), which is learned.
        average: ``"rows"`` or ``"pairs"``.
        normalize: Divide embeddings by their length first.
        layout: How the two views of the samples are ordered if nothing else names the positives: ``"stacked"``, all
            first views before all second ones, or ``"interleaved"``, the views of a sample in turn.

    Raises:
        ValueError: a value out of range, wrong shapes, an odd number of rows where two views are expected.
        TypeError: a wrong type or dtype.

    Example::

        >>> loss = NTXentLoss(temperature=0.5)
        >>> loss(torch.cat([network(first), network(second)])).backward()
    """

    temperature: float | Tensor

    def __init__(
        self, temperature: float | Tensor, average: str = "rows", normalize: bool = True, *, layout: str = "stacked"
    ) -> None:
        super().__init__(normalize, layout)
        if average not in ("rows", "pairs"):
            raise ValueError(f"average: expected 'rows' or 'pairs', got {average!r}")
        self.average = average
        self._set_temperature(temperature)

    def forward(self, embeddings: Tensor, labels: Tensor | None = None, positive_index: Tensor | None = None) -> Tensor:
        """The loss, a scalar: float32, or float64 for float64 embeddings; 0 if no row has a positive.

        Args:
            embeddings: (M, D) of any floating dtype, or (N, V, D), V views of N samples.
            labels: (M,), or (N,) with views: integers from -1 on; rows of the same label are positives, -1 has none.
            positive_index: (M,) the one positive of each row, instead of ``labels``. With neither, rows are two views
                of M / 2 samples in the module's ``layout``, and (N, V, D) are views of N different samples.
        """
        embeddings, labels, positive_index = self._batch(embeddings, labels, positive_index)
        pairs = self.average == "pairs"
        return LF.contrastive_loss(
            embeddings,
            temperature=self.temperature,
            labels=labels,
            positive_index=positive_index,
            sample_weight=_positives(labels) if pairs and are_integers(labels) else None,
            denominator="own" if pairs else "all",
            normalize=self.normalize,
        )

    def extra_repr(self) -> str:
        return f"temperature={shown(self.temperature)}, average={self.average!r}, {super().extra_repr()}"


class SupConLoss(ContrastiveLossModule):
    r"""Supervised contrastive loss, the form with the sum over positives outside the logarithm.

    .. math:: L_i = \log \sum_{j \ne i} e^{s_{ij}} - \frac{1}{|P(i)|} \sum_{p \in P(i)} s_{ip}, \qquad
        s_{ij} = \langle z_i, z_j \rangle / \tau

    averaged over the rows that have a positive. Khosla et al., arXiv:2004.11362. The authors' code multiplies the loss
    by a constant, temperature / base_temperature with a base of 0.07: it is 1 at their default temperature, and
    ``base_temperature=0.07`` gives it for others.

    Args:
        temperature: :math:`\tau > 0`: a number, or a tensor or ``nn.Parameter`` of shape ().
        normalize: Divide embeddings by their length first.
        base_temperature: ``None`` for no factor, or a positive number.

    Raises ``ValueError`` or ``TypeError`` naming the argument that is out of range or of a wrong type.

    Example::

        >>> loss = SupConLoss(temperature=0.1)
        >>> loss(network(image), labels).backward()  # (M, D) and (M,)
        >>> loss(torch.stack([network(first), network(second)], 1), labels).backward()  # (N, 2, D) and (N,)
    """

    temperature: float | Tensor

    def __init__(
        self, temperature: float | Tensor, normalize: bool = True, *, base_temperature: float | None = None
    ) -> None:
        super().__init__(normalize)
        self._set_temperature(temperature)
        self.base_temperature = base_temperature
        if base_temperature is not None:
            self.base_temperature = number("base_temperature", base_temperature, "> 0")

    def forward(self, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss, a scalar; 0 if no row has a positive.

        Args:
            embeddings: (M, D) of any floating dtype, or (N, V, D), V views of N samples.
            labels: (M,), or (N,) with views: integers from -1 on, of which -1 has no positives. Only with views it may
                be ``None``: every sample is a class then, which is SimCLR's loss.
        """
        if labels is None and isinstance(embeddings, Tensor) and embeddings.dim() != 3:
            raise ValueError("labels: expected a Tensor, or embeddings of shape (N, V, D), got None")
        embeddings, labels, _ = self._batch(embeddings, labels)
        loss = LF.contrastive_loss(embeddings, temperature=self.temperature, labels=labels, normalize=self.normalize)
        return loss if self.base_temperature is None else self.temperature / self.base_temperature * loss

    def extra_repr(self) -> str:
        base = "" if self.base_temperature is None else f", base_temperature={self.base_temperature}"
        return f"temperature={shown(self.temperature)}, {super().extra_repr()}{base}"


class TemperatureScheduledLoss(NTXentLoss):
    r"""NT-Xent with a temperature that follows a cosine over the epochs (TS).

    .. math:: \tau(t) = \tau_{\min} + \tfrac{1}{2} (\tau_{\max} - \tau_{\min}) (1 + \cos(\pi t / t_{\max}))

    A high temperature separates groups, a low one instances; the cosine goes from ``maximum`` at epoch 0 to ``minimum``
    at ``t_max`` and back, again and again. Its period is 2 ``t_max``. Kukleva et al., arXiv:2303.13664, for
    self-supervised learning on long-tailed data.

    Args:
        t_max: Half a period, in epochs; positive.
        minimum, maximum: The lowest and the highest temperature; positive.
        average, normalize, layout: as in :class:`NTXentLoss`.

    The temperature is a buffer: it is saved, and :meth:`set_epoch` changes it in place, so that a compiled step need
    not be compiled again.

    Raises ``ValueError`` or ``TypeError`` naming the argument that is out of range or of a wrong type.

    Example::

        >>> loss = TemperatureScheduledLoss(t_max=200)
        >>> for epoch in range(2000):
        ...     loss.set_epoch(epoch)
        ...     for first, second in loader:
        ...         loss(torch.cat([network(first), network(second)])).backward()
    """

    temperature: Tensor

    def __init__(
        self,
        t_max: float,
        minimum: float = 0.1,
        maximum: float = 1.0,
        average: str = "rows",
        normalize: bool = True,
        *,
        layout: str = "stacked",
    ) -> None:
        t_max = number("t_max", t_max, "> 0")
        minimum, maximum = number("minimum", minimum, "> 0"), number("maximum", maximum, "> 0")
        if minimum > maximum:
            raise ValueError(f"minimum, maximum: expected minimum <= maximum, got {minimum} and {maximum}")
        super().__init__(torch.tensor(maximum, dtype=state_dtype()), average, normalize, layout=layout)
        self.t_max, self.minimum, self.maximum = t_max, minimum, maximum

    def set_epoch(self, epoch: float) -> None:
        """Set the temperature for ``epoch``, counted from 0; fractions are allowed."""
        phase = math.pi * number("epoch", epoch, ">= 0") / self.t_max
        self.temperature.fill_(self.minimum + (self.maximum - self.minimum) / 2 * (1 + math.cos(phase)))

    def extra_repr(self) -> str:
        return f"t_max={self.t_max}, minimum={self.minimum}, maximum={self.maximum}, {super().extra_repr()}"


class TemperatureContrastiveLoss(ContrastiveLossModule):
    r"""A temperature and a weight of each training sample, looked up by its number.

    .. math:: L_i = \log \sum_{j \ne i} e^{\langle z_i, z_j \rangle / \tau_i} - \frac{1}{|P(i)|} \sum_{p \in P(i)}
        \langle z_i, z_p \rangle / \tau_i, \qquad \text{loss} = \sum_i u_i L_i / \sum_i u_i

    What sets :math:`\tau` and u is the method: rare samples get low temperatures and high weights, from pseudo-labels
    in the manner of TASE (arXiv:2410.22883). Both are constants for the gradient.

    Args:
        temperature: (num_samples,), finite and positive.
        sample_weight: (num_samples,), finite and not negative; ``None``: 1.
        normalize: Divide embeddings by their length first.
        layout: How two views are ordered, as in :class:`NTXentLoss`.

    Both vectors are buffers, copied from the arguments: saved, moved with the module, float32 at least, and changed in
    place by :meth:`set_temperature` and :meth:`set_sample_weight`. Under ``DistributedDataParallel`` call these with
    the same values on every rank; the forward pass only reads, so that ``broadcast_buffers`` changes nothing.

    Raises:
        ValueError: wrong shapes or values, a number of a sample out of range (checked on CPUs).
        TypeError: a wrong type or dtype.

    Example::

        >>> loss = TemperatureContrastiveLoss(torch.full((len(dataset),), 0.2))
        >>> for first, second, index in loader:
        ...     loss(torch.cat([network(first), network(second)]), index).backward()
        >>> loss.set_temperature(temperature_of_pseudo_class[pseudo_label])
    """

    temperature: Tensor
    sample_weight: Tensor

    def __init__(
        self,
        temperature: Tensor,
        sample_weight: Tensor | None = None,
        normalize: bool = True,
        *,
        layout: str = "stacked",
    ) -> None:
        super().__init__(normalize, layout)
        _check_vector("temperature", temperature, None)
        if sample_weight is None:
            sample_weight = torch.ones_like(temperature)
        _check_vector("sample_weight", sample_weight, temperature.shape[0])
        self.register_buffer("temperature", at_least_float32(temperature))
        self.register_buffer("sample_weight", at_least_float32(sample_weight))

    @torch.no_grad()
    def set_temperature(self, temperature: Tensor) -> None:
        """Write (num_samples,) temperatures into the buffer."""
        _check_vector("temperature", temperature, self.temperature.shape[0])
        self.temperature.copy_(temperature)

    @torch.no_grad()
    def set_sample_weight(self, sample_weight: Tensor) -> None:
        """Write (num_samples,) weights into the buffer."""
        _check_vector("sample_weight", sample_weight, self.sample_weight.shape[0])
        self.sample_weight.copy_(sample_weight)

    def forward(
        self,
        embeddings: Tensor,
        index: Tensor,
        labels: Tensor | None = None,
        positive_index: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar; 0 if no row has a positive.

        Args:
            embeddings: (M, D) of any floating dtype, or (N, V, D), V views of N samples.
            index: The sample of each row, (M,), or (M / 2,) for two views of each sample in the module's ``layout``,
                or (N,) with views: numbers below ``num_samples``.
            labels, positive_index: as in :class:`NTXentLoss`; with neither, views of the same sample are positives.
        """
        check_embeddings(embeddings)
        views = embeddings.shape[:2] if embeddings.dim() == 3 else None
        embeddings, labels, positive_index = self._batch(embeddings, labels, positive_index)
        index = as_int64(index)
        rows = self._rows("index", index, embeddings.shape[0], views)
        rows = checked_index(rows, self.temperature.shape[0])
        return LF.contrastive_loss(
            embeddings,
            temperature=self.temperature[rows],
            labels=labels,
            positive_index=positive_index,
            sample_weight=self.sample_weight[rows],
            normalize=self.normalize,
        )

    def extra_repr(self) -> str:
        return f"num_samples={self.temperature.shape[0]}, {super().extra_repr()}"


def as_int64(x: Tensor | None) -> Tensor | None:
    """Integers of any width as int64: as an index uint8 is a mask for torch. Anything else is for a check to name."""
    return x.long() if are_integers(x) else x


def check_embeddings(embeddings: Tensor, expected: str = "(M, D) or (N, V, D)") -> None:
    if not isinstance(embeddings, Tensor):
        raise TypeError(f"embeddings: expected a Tensor, got {type(embeddings).__name__}")
    check_layouts(embeddings=embeddings)
    if not embeddings.is_floating_point():
        raise TypeError(f"embeddings: expected a floating dtype, got {embeddings.dtype}")
    if embeddings.dim() not in (2, 3):
        raise ValueError(f"embeddings: expected shape {expected}, got {tuple(embeddings.shape)}")


def check_labels(labels: Tensor, rows: int, classes: int | None) -> None:
    if not are_integers(labels):
        raise TypeError(f"labels: expected an integer Tensor, got {kind_of(labels)}")
    if labels.shape != (rows,):
        raise ValueError(f"labels: expected shape ({rows},), got {tuple(labels.shape)}")
    if is_compiling() or not labels.is_cpu or has_no_values(labels):
        return
    bad = (labels < -1) | (labels >= classes) if classes is not None else labels < -1
    if bad.any():
        expected = "from -1 on" if classes is None else f"from -1 to {classes - 1}"
        raise ValueError(f"labels: expected labels {expected}, got {int(labels[bad][0])}")


def checked_index(index: Tensor, samples: int) -> Tensor:
    """The index, or one that is out of range wherever it is, as negative ones would count from the end."""
    if is_compiling() or not index.is_cpu or has_no_values(index):  # reading values of a GPU would synchronise
        return torch.where(index < 0, samples, index)
    bad = (index < 0) | (index >= samples)
    if bad.any():
        raise ValueError(f"index: expected samples from 0 to {samples - 1}, got {int(index[bad][0])}")
    return index


def _check_vector(name: str, x: Tensor, samples: int | None) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating Tensor, got {kind_of(x)}")
    if x.dim() != 1 or x.numel() == 0 or samples not in (None, x.shape[0]):
        raise ValueError(f"{name}: expected shape ({samples or 'num_samples'},), got {tuple(x.shape)}")
    positive = name == "temperature"
    bad = ~(x.isfinite() & ((x > 0) if positive else (x >= 0)))
    if not x.is_meta and bad.any():
        index = int(bad.nonzero()[0])
        interval = "above 0" if positive else "of at least 0"
        raise ValueError(f"{name}: expected finite values {interval}, got {x[index].item():g} for sample {index}")


def state_dtype() -> torch.dtype:
    """Of new buffers: torch's default dtype, float32 at least."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def at_least_float32(x: Tensor) -> Tensor:
    """A copy without gradient."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True)


def _positives(labels: Tensor) -> Tensor:
    """(M,) float32: how many other rows have the label of each row; 0 for label -1."""
    ordered = labels.sort().values
    equal = torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels)
    return torch.where(labels >= 0, equal - 1, 0).float()


def shown(temperature: float | Tensor) -> str:
    return "Tensor" if isinstance(temperature, Tensor) else f"{temperature}"
