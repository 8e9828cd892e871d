"""The loss module of ``contrastive_loss`` whose keys come from a queue."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import ltkernels.functional as LF
from ltkernels import _ops
from ltkernels._checks import integer, kind_of
from ltkernels._contrastive_loss import ContrastiveLossModule, as_int64, check_labels, shown
from ltkernels.reference import directions


class MoCoLoss(ContrastiveLossModule):
    r"""Momentum contrast: every query has its own key as positive, and a queue of the keys of earlier batches.

    .. math:: L_i = \log\Bigl(e^{s_{ii}} + \sum_{j \in \text{queue}} e^{s_{ij}}\Bigr) - s_{ii}, \qquad
        s_{ij} = \langle q_i, k_j \rangle / \tau

    averaged over the batch. He et al., arXiv:1911.05722. With labels the keys of the queue that have the row's label
    are positives too, as in supervised contrastive learning: the second term is the mean over all positives.

    The queue changes only in :meth:`enqueue`. Call it after ``backward()``: a backend may need the queue as it was for
    the gradient, and autograd then raises an error if it has changed. It is first in, first out; a batch need not
    divide its size. It starts with random directions, as the authors' does, with label -1.

    Args:
        width: D.
        size: Keys in the queue; at least the number of keys in a batch.
        temperature: :math:`\tau > 0`: a number, or a tensor or ``nn.Parameter`` of shape ().
        normalize: Divide queries and keys by their length first; the queue then holds keys of length 1.
        dtype: Of the queue, which stays under ``.half()`` and ``.to(dtype)``; keys are rounded to it when they enter.
            The dtype of the loss does not depend on it: similarities are computed in float32, float64 for float64
            queries, but on GPUs in the dtype of a queue of 16 bits, for the tensor cores.

    State, in buffers that are saved: ``queue`` (size, D), ``queue_labels`` (size,) int64 and ``pointer``, the next
    place to write to. With several processes gather the keys before :meth:`enqueue`, so that all queues stay the same;
    ``DistributedDataParallel(..., broadcast_buffers=False)`` then does not send the queue at every forward pass.

    Raises:
        ValueError: a value out of range, wrong shapes, more keys than the queue holds.
        TypeError: a wrong type or dtype.

    Example::

        >>> loss = MoCoLoss(width=128, size=65536, temperature=0.07)
        >>> key = momentum_network(second)
        >>> loss(network(first), key).backward()
        >>> loss.enqueue(key)
    """

    temperature: float | Tensor
    queue: Tensor
    queue_labels: Tensor
    pointer: Tensor

    def __init__(
        self,
        width: int,
        size: int = 65536,
        temperature: float | Tensor = 0.07,
        normalize: bool = True,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(normalize)
        width, size = integer("width", width, minimum=1), integer("size", size, minimum=1)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
        self._set_temperature(temperature)
        self.register_buffer("queue", directions(torch.randn(size, width)).to(dtype))
        self.register_buffer("queue_labels", torch.full((size,), -1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def forward(self, query: Tensor, key: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss, a scalar, with gradients to ``query`` and a learned temperature, none to keys and queue.

        Args:
            query: (M, D) of any floating dtype. The loss is float32, float64 for float64 queries.
            key: (M, D) of any floating dtype: row i is the positive of query i.
            labels: (M,) integers from -1 on, of which -1 has no further positives in the queue.
        """
        query, key = self._entry("query", query), self._entry("key", key.detach() if isinstance(key, Tensor) else key)
        dtype = query.dtype
        if query.is_cuda and _ops.uses_kernel(query) and dtype == torch.float32 and self.queue.dtype.itemsize == 2:
            dtype = self.queue.dtype
        query, key, queue = query.to(dtype), key.to(dtype), self.queue.to(dtype)
        if key.shape != query.shape:
            raise ValueError(f"key: expected shape {tuple(query.shape)} like query, got {tuple(key.shape)}")
        return LF.contrastive_loss(
            query,
            queue,
            temperature=self.temperature,
            labels=labels,
            key_labels=None if labels is None else self.queue_labels,
            extra_positive=key,
        )

    @torch.no_grad()
    def enqueue(self, key: Tensor, labels: Tensor | None = None) -> None:
        """Put keys (B, D), and their labels (B,) or -1, in the place of the oldest ones."""
        key = self._entry("key", key)
        count, size = key.shape[0], self.queue.shape[0]
        if count > size:
            raise ValueError(f"key: expected at most {size} keys, the size of the queue, got {count}")
        if labels is None:
            labels = self.queue_labels.new_full((count,), -1)
        labels = as_int64(labels)
        check_labels(labels, count, None)
        place = (self.pointer + torch.arange(count, device=self.pointer.device)) % size
        self.queue.index_copy_(0, place, key.to(self.queue.dtype))
        self.queue_labels.index_copy_(0, place, labels)
        self.pointer.add_(count).remainder_(size)

    def _entry(self, name: str, x: Tensor) -> Tensor:
        """Embeddings in the form of the queue, float32 at least."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating Tensor, got {kind_of(x)}")
        if x.dim() != 2 or x.shape[1] != self.queue.shape[1]:
            raise ValueError(f"{name}: expected shape (M, {self.queue.shape[1]}), got {tuple(x.shape)}")
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return directions(x) if self.normalize else x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoCoLoss:
        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        queue = moved(self.queue)
        super()._apply(fn, recurse)
        self.queue = queue
        return self

    def extra_repr(self) -> str:
        size, width = self.queue.shape
        queue = f"width={width}, size={size}, temperature={shown(self.temperature)}, dtype={self.queue.dtype}"
        return f"{queue}, {super().extra_repr()}"
