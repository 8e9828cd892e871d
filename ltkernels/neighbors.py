"""Which classes silence each other: maps between target classes and auxiliary classes.

Class numbers are those of the logits: target classes ``0 .. C-1``, then auxiliary classes ``C .. C+A-1``. A map says
which auxiliary classes are neighbours of which target classes; both silence each other in
:func:`ltkernels.functional.auxiliary_cross_entropy`. Maps are sparse, in CSR form: never a K x K matrix.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

MODES = ("plain", "back", "target_only", "auxiliary_only")


class SilencedRows(NamedTuple):
    """What the classes of one mode silence: class k silences ``classes[offsets[k]:offsets[k + 1]]``."""

    offsets: Tensor  # (K + 1,) int32
    classes: Tensor  # (P,) int32
    back_from: int  # rows of classes from here on silence all others from here on too; -1: none do


class NeighborMap:
    """An immutable sparse map between ``num_classes`` target and ``num_auxiliary`` auxiliary classes.

    Build one with :meth:`from_pairs`. ``map.to(device)`` returns it on another device; logits and map must be on the
    same one.
    """

    def __init__(self, offsets: Tensor, classes: Tensor, *, num_classes: int, num_auxiliary: int) -> None:
        self._num_classes, self._num_auxiliary = num_classes, num_auxiliary
        self._offsets, self._classes = offsets, classes
        middle = offsets[num_classes]
        self._rows = {
            "plain": SilencedRows(offsets, classes, -1),
            "back": SilencedRows(offsets, classes, num_classes),
            "target_only": SilencedRows(offsets.clamp(max=middle), classes, -1),
            "auxiliary_only": SilencedRows(offsets.clamp(min=middle), classes, -1),
        }

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[int, int]] | Tensor, *, num_classes: int, num_auxiliary: int):
        """From pairs (target class, auxiliary class)."""
        table = torch.as_tensor(pairs if isinstance(pairs, Tensor) else list(pairs), dtype=torch.int64).reshape(-1, 2)
        both = torch.cat([table, table.flip(1)]).unique(dim=0)  # sorted by class, then by neighbour
        counts = torch.bincount(both[:, 0], minlength=num_classes + num_auxiliary)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        return cls(offsets, both[:, 1].int().contiguous(), num_classes=num_classes, num_auxiliary=num_auxiliary)

    @property
    def num_classes(self) -> int:
        """The number of target classes, C."""
        return self._num_classes

    @property
    def num_auxiliary(self) -> int:
        """The number of auxiliary classes, A."""
        return self._num_auxiliary

    def rows(self, mode: str = "plain") -> SilencedRows:
        """What each class silences in a mode of :func:`ltkernels.functional.auxiliary_cross_entropy`."""
        if mode not in self._rows:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        return self._rows[mode]
