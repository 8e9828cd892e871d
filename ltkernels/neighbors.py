"""Which classes silence each other: maps between target classes and auxiliary classes.

Class numbers are those of the logits: target classes ``0 .. C-1``, then auxiliary classes ``C .. C+A-1``. A map says
which auxiliary classes are neighbours of which target classes; both silence each other in
:func:`ltkernels.functional.auxiliary_cross_entropy`. Maps are sparse, in CSR form: never a K x K matrix. ::

    >>> from ltkernels.neighbors import NeighborMap
    >>> neighbors = NeighborMap.from_names({"cat": ["lynx", "dog"], "wolf": ["dog"]}, class_names=["cat", "wolf"])
    >>> neighbors
    NeighborMap(num_classes=2, num_auxiliary=2, num_pairs=3)
    >>> neighbors.neighbors_of(0)  # of cat: lynx is class 2, dog class 3
    tensor([2, 3])

Maps are made once, on the host; constructors read the values they are given (on a GPU that synchronises). Auxiliary
classes that are neighbours of target classes were proposed in "Learning from Neighbors: Category Extrapolation for
Long-Tail Learning" (arXiv:2410.15980).
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ltkernels import _neighbor_file as files
from ltkernels import _neighbor_pairs as P
from ltkernels._checks import ClassCounts, integer

__all__ = ["MODES", "NeighborMap", "NeighborStatistics", "SilencedRows"]

MODES = ("plain", "back", "target_only", "auxiliary_only")


class SilencedRows(NamedTuple):
    """What the classes of one mode silence: class k silences ``classes[offsets[k]:offsets[k + 1]]``."""

    offsets: Tensor  # (K + 1,) int32
    classes: Tensor  # (2 * pairs,) int32
    back_from: int  # rows of classes from here on silence all others from here on too; -1: none do


@dataclass(frozen=True)
class NeighborStatistics:
    """A map in numbers; minima, means and maxima are over all target or auxiliary classes, and 0 where there is none.

    Args:
        pairs: Pairs of a target and an auxiliary class.
        targets_with_neighbors: Target classes with a neighbour.
        auxiliaries_without_anchor: Auxiliary classes that are a neighbour of no target class.
        min_neighbors, mean_neighbors, max_neighbors: Neighbours of a target class.
        min_anchors, mean_anchors, max_anchors: Anchors of an auxiliary class.
        bytes: Memory of the map's tensors.
    """

    pairs: int
    targets_with_neighbors: int
    auxiliaries_without_anchor: int
    min_neighbors: int
    mean_neighbors: float
    max_neighbors: int
    min_anchors: int
    mean_anchors: float
    max_anchors: int
    bytes: int


class NeighborMap:
    """An immutable sparse map between ``num_classes`` target and ``num_auxiliary`` auxiliary classes.

    Build one with :meth:`from_pairs`, :meth:`from_names`, :meth:`from_hierarchy` or :meth:`from_prototypes`, or
    :meth:`load` it. ``map.to(device)`` returns it on another device; logits and map must be on the same one. Maps are
    equal, and have the same hash, if they have the same classes and pairs, on whatever devices. They can be pickled.

    Args:
        offsets: (C + A + 1,) int32.
        classes: (2 * pairs,) int32; row k, ``classes[offsets[k]:offsets[k + 1]]``, has the neighbours of a target
            class k, or the anchors of an auxiliary one, in ascending order.
        num_classes: C, at least 1.
        num_auxiliary: A, at least 0.

    Raises ``ValueError``, ``TypeError`` or ``IndexError`` unless the two tensors are such a map.
    """

    __slots__ = ("_classes", "_num_auxiliary", "_num_classes", "_offsets")

    _classes: Tensor
    _num_auxiliary: int
    _num_classes: int
    _offsets: Tensor

    def __init__(self, offsets: Tensor, classes: Tensor, *, num_classes: int, num_auxiliary: int) -> None:
        num_classes, num_auxiliary = _sizes(num_classes, num_auxiliary)
        P.check_csr(offsets, classes, num_classes, num_auxiliary)
        # Copies: who writes to them afterwards writes to a checked map that does not change.
        self._set(offsets.clone(), classes.clone(), num_classes, num_auxiliary)

    def _set(self, offsets: Tensor, classes: Tensor, num_classes: int, num_auxiliary: int) -> None:
        object.__setattr__(self, "_offsets", offsets)
        object.__setattr__(self, "_classes", classes)
        object.__setattr__(self, "_num_classes", num_classes)
        object.__setattr__(self, "_num_auxiliary", num_auxiliary)

    @classmethod
    def _unchecked(cls, offsets: Tensor, classes: Tensor, num_classes: int, num_auxiliary: int) -> NeighborMap:
        """A map of tensors known to be one: takes no time, and can be traced."""
        self = object.__new__(cls)
        self._set(offsets, classes, num_classes, num_auxiliary)
        return self

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name}: a NeighborMap is immutable")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{name}: a NeighborMap is immutable")

    @classmethod
    def _of_table(cls, table: Tensor, num_classes: int, num_auxiliary: int, like: object = None) -> NeighborMap:
        new = cls._unchecked(*P.csr_of(table, num_classes, num_auxiliary), num_classes, num_auxiliary)
        return new.to(like.device) if isinstance(like, Tensor) else new

    # Constructors

    @classmethod
    def from_pairs(
        cls, pairs: Iterable[Sequence[int]] | Tensor | np.ndarray, *, num_classes: int, num_auxiliary: int
    ) -> NeighborMap:
        """From pairs (target class, auxiliary class); their order does not matter and duplicates are merged.

        Args:
            pairs: A list of pairs, or an integer (P, 2) tensor or array; P may be 0.
            num_classes: C, at least 1.
            num_auxiliary: A, at least 0. Auxiliary classes are numbered from C to C+A-1.

        Returns a map on the device of ``pairs`` if that is a tensor, else on the CPU.

        Raises:
            IndexError: a target class outside ``[0, C)`` or an auxiliary class outside ``[C, C+A)``.
            ValueError: a class that is its own neighbour, a wrong shape, or a number of classes out of range.
            TypeError: class numbers that are not integers.

        Example::

            >>> NeighborMap.from_pairs([(0, 3), (1, 3), (1, 4)], num_classes=3, num_auxiliary=2)
            NeighborMap(num_classes=3, num_auxiliary=2, num_pairs=3)
        """
        num_classes, num_auxiliary = _sizes(num_classes, num_auxiliary)
        return cls._of_table(P.pairs_of(pairs, num_classes, num_auxiliary), num_classes, num_auxiliary, like=pairs)

    @classmethod
    def from_names(
        cls,
        neighbors: Mapping[str, Iterable[str]],
        *,
        class_names: Sequence[str],
        auxiliary_names: Sequence[str] | None = None,
    ) -> NeighborMap:
        """From the names of the neighbours of each target class.

        Args:
            neighbors: Names of auxiliary classes by name of a target class. A name may appear under several target
                classes; a target class without neighbours may be left out. Sets are taken in alphabetical order.
            class_names: Names of the C target classes, in the order of their numbers.
            auxiliary_names: Names of the A auxiliary classes in the order of their numbers, those without an anchor
                included. ``None``: the names in ``neighbors``, in the order of their first appearance.

        Returns a map on the CPU.

        Raises:
            ValueError: an unknown or duplicate name, a class that is its own neighbour, a target class as neighbour.
            TypeError: what should be a name is no string.
        """
        pairs, *sizes = P.pairs_of_names(neighbors, class_names, auxiliary_names)
        return cls._of_table(P.pairs_of(pairs, *sizes), *sizes)

    @classmethod
    def from_hierarchy(cls, superclasses: Sequence[Hashable] | Tensor | np.ndarray, *, num_classes: int) -> NeighborMap:
        """From superclasses: an auxiliary class is a neighbour of every target class of the same superclass.

        An auxiliary class of a superclass without target classes has no anchor.

        Args:
            superclasses: Superclass of each of the C + A classes: a name, a number or any hashable value.
            num_classes: C, at least 1; the classes after the first C are the auxiliary ones.

        Returns a map on the device of ``superclasses`` if that is a tensor, else on the CPU.

        Raises:
            ValueError: fewer superclasses than target classes.
            TypeError: no sequence, or a superclass that is not hashable.
        """
        num_classes = integer("num_classes", num_classes, minimum=1)
        pairs, num_auxiliary = P.pairs_of_hierarchy(superclasses, num_classes)
        table = P.pairs_of(pairs, num_classes, num_auxiliary)
        return cls._of_table(table, num_classes, num_auxiliary, like=superclasses)

    @classmethod
    def from_prototypes(
        cls,
        prototypes: Tensor | np.ndarray,
        *,
        num_classes: int,
        lower: float = 0.7,
        upper: float = 0.98,
        max_neighbors: int = 8,
        class_counts: ClassCounts | None = None,
    ) -> NeighborMap:
        r"""From class means in some feature space: the auxiliary classes most similar to each target class.

        Neighbours of target class k are the :math:`m_k` auxiliary classes of the largest cosine similarity within
        ``[lower, upper]``, the lower class number first among equals. An auxiliary class above ``upper`` is taken for
        the target class itself under another name. Without ``class_counts`` :math:`m_k = m` = ``max_neighbors``; with
        counts :math:`n` the rarest class has up to :math:`m` neighbours, the most frequent one up to 1, and the
        number falls linearly with the logarithm of the count between them:

        .. math:: m_k = 1 + \mathrm{round}\left((m - 1) \frac{\log(n_{\max} / n_k)}{\log(n_{\max} / n_{\min})}\right)

        This way to choose them is ours; counts that are all equal give :math:`m`. Similarities are float64 and
        computed some target classes at a time: memory grows with K D, not with K^2.

        Args:
            prototypes: (K, D) mean feature of each class, target classes first; any floating dtype.
            num_classes: C, at least 1 and at most K; A is K - C.
            lower, upper: Bounds of the similarity, both in [-1, 1] and inclusive.
            max_neighbors: At least 1.
            class_counts: (C,) training samples of each target class.

        Returns a map on the device of ``prototypes`` if that is a tensor, else on the CPU.

        Raises:
            ValueError: a prototype of length 0 or with values that are not finite, bounds outside [-1, 1] or crossed,
                a wrong shape, counts that are not positive.
            TypeError: wrong types.
        """
        num_classes = integer("num_classes", num_classes, minimum=1)
        most = integer("max_neighbors", max_neighbors, minimum=1)
        table, num_auxiliary = P.pairs_of_prototypes(prototypes, num_classes, (lower, upper), most, class_counts)
        return cls._of_table(table, num_classes, num_auxiliary, like=prototypes)

    # What it holds

    @property
    def num_classes(self) -> int:
        """The number of target classes, C."""
        return self._num_classes

    @property
    def num_auxiliary(self) -> int:
        """The number of auxiliary classes, A."""
        return self._num_auxiliary

    @property
    def num_pairs(self) -> int:
        """The number of pairs of a target and an auxiliary class that silence each other."""
        return self._classes.numel() // 2

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self._offsets.device

    def rows(self, mode: str = "plain") -> SilencedRows:
        """What each class silences in a mode of :func:`ltkernels.functional.auxiliary_cross_entropy`.

        The tensors are the map's own: read them only.

        Raises ``ValueError`` on an unknown mode.
        """
        # Rows of target classes fill the first half of `classes`: clamped offsets leave one half without entries.
        if mode == "plain":
            return SilencedRows(self._offsets, self._classes, -1)
        if mode == "back":
            return SilencedRows(self._offsets, self._classes, self._num_classes)
        if mode == "target_only":
            return SilencedRows(self._offsets.clamp(max=self.num_pairs), self._classes, -1)
        if mode == "auxiliary_only":
            return SilencedRows(self._offsets.clamp(min=self.num_pairs), self._classes, -1)
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")

    def pairs(self) -> Tensor:
        """All pairs (target class, auxiliary class) in ascending order: (P, 2) int64, a copy."""
        return P.pairs_of_csr(self._offsets, self._classes, self._num_classes)

    def neighbors_of(self, k: int) -> Tensor:
        """The neighbours of target class ``k``, or the anchors of auxiliary class ``k``: ascending, int64, a copy.

        Raises ``IndexError`` unless ``k`` is in ``[0, C+A)``.
        """
        total = self._num_classes + self._num_auxiliary
        if not 0 <= integer("k", k, minimum=k) < total:  # the type only: a class out of range is an IndexError
            raise IndexError(f"k: expected a class in [0, {total}), got {k}")
        start, stop = self._offsets[k : k + 2].tolist()
        return self._classes[start:stop].long()

    def statistics(self) -> NeighborStatistics:
        """Its pairs, neighbours, anchors and memory in numbers."""
        counts = self._offsets.diff().cpu()
        neighbors, anchors = counts[: self._num_classes], counts[self._num_classes :]
        return NeighborStatistics(
            self.num_pairs,
            int((neighbors > 0).sum()),
            int((anchors == 0).sum()),
            *_min_mean_max(neighbors),
            *_min_mean_max(anchors),
            self._offsets.nbytes + self._classes.nbytes,
        )

    def plot(
        self,
        path: str | os.PathLike[str],
        *,
        class_counts: ClassCounts | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """Writes a picture of the map: a dot for each pair, and the number of neighbours of each target class.

        Auxiliary classes are sorted by their first anchor, so that neighbours of one target class alone form a
        staircase and shared ones lie off it; those without an anchor come last.

        Args:
            path: File to write; its suffix chooses the format: ``.png``, ``.pdf``, ``.svg``.
            class_counts: (C,) training samples of each target class: sorts target classes by them, most samples first,
                and adds them to the picture.
            class_names: C names, shown if there are few enough of them to be read.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError, TypeError: bad counts or names, or a format that matplotlib does not know.
        """
        try:
            from ltkernels import _neighbor_plot
        except ImportError as error:
            raise ImportError("NeighborMap.plot needs matplotlib: pip install matplotlib") from error
        _neighbor_plot.draw(self.to("cpu"), path, class_counts, class_names)

    # Copies and files

    def to(self, device: torch.device | str | int) -> NeighborMap:
        """The map on ``device``; itself if it is there already."""
        offsets, classes = self._offsets.to(device), self._classes.to(device)
        if offsets is self._offsets and classes is self._classes:
            return self
        return self._unchecked(offsets, classes, self._num_classes, self._num_auxiliary)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the map to exactly ``path``, a NumPy ``.npz`` file without pickles.

        The file appears complete or not at all; one that was there is replaced.
        """
        files.write(path, self._num_classes, self._num_auxiliary, self.pairs().cpu().numpy())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NeighborMap:
        """The map that :meth:`save` wrote to ``path``, on the CPU.

        Raises:
            ValueError: the file is truncated, damaged, or no file of :meth:`save`.
            OSError: it cannot be read.
        """
        return files.read(path, lambda sizes, pairs: cls.from_pairs(pairs, **sizes))

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self), self._offsets, self._classes, self._num_classes, self._num_auxiliary)

    def _value(self) -> tuple[int, int, bytes]:
        return self._num_classes, self._num_auxiliary, self.pairs().cpu().numpy().tobytes()

    def __eq__(self, other: object) -> bool:
        return self._value() == other._value() if isinstance(other, NeighborMap) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._value())

    def __repr__(self) -> str:
        sizes = f"num_classes={self._num_classes}, num_auxiliary={self._num_auxiliary}, num_pairs={self.num_pairs}"
        return f"NeighborMap({sizes})" if self.device.type == "cpu" else f"NeighborMap({sizes}, device='{self.device}')"


def _rebuild(cls: type[NeighborMap], *state) -> NeighborMap:
    return cls._unchecked(*state)


def _sizes(num_classes: int, num_auxiliary: int) -> tuple[int, int]:
    classes, auxiliary = integer("num_classes", num_classes, minimum=1), integer("num_auxiliary", num_auxiliary, 0)
    P.check_sizes(classes + auxiliary, 0)
    return classes, auxiliary


def _min_mean_max(counts: Tensor) -> tuple[int, float, int]:
    if counts.numel() == 0:
        return 0, 0.0, 0
    return int(counts.min()), counts.double().mean().item(), int(counts.max())
