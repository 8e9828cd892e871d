"""auxiliary_cross_entropy and its peers: ``(logits, target, what is silenced, prior, reduction) -> loss``.

The shape of the neighbour map is that of a published one for ImageNet-LT: 1000 target classes, 5012 auxiliary classes,
6851 pairs, at most 8 neighbours of a target class. ``LTKERNELS_NEIGHBORS`` names a file with a map to use instead, CSV
with columns target_class and auxiliary_class, both numbered as the logits are.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ltkernels.functional as LF
from benchmarks.problems import Case, Exact, RowProblem, exact_rows, long_tail, random_matrix
from benchmarks.variants import Family, Variant, by_name
from ltkernels import reference
from ltkernels.neighbors import MODES, NeighborMap

TARGETS, AUXILIARIES, PAIRS = 1000, 5012, 6851
MOST_NEIGHBORS = 8
SHAPES = (f"512x{TARGETS + AUXILIARIES}", f"4096x{TARGETS + AUXILIARIES}")
AUXILIARY_SAMPLES = 50  # of an auxiliary class


def ours(logits: Tensor, target: Tensor, neighbors: NeighborMap, counts: Tensor, reduction: str) -> Tensor:
    """Silenced classes are left out of the distribution; the prior is computed in the call."""
    return LF.auxiliary_cross_entropy(
        logits, target, neighbors, neighbor_weight=0, prior_counts=counts, reduction=reduction
    )


def dense(logits: Tensor, target: Tensor, silenced: Tensor, log_prior: Tensor, reduction: str) -> Tensor:
    """Category Extrapolation (arXiv:2410.15980) as its authors write it: a dense K x K mask, gathered by the target."""
    adjusted = (logits + log_prior).masked_fill(silenced[target] > 0, -torch.inf)
    return F.cross_entropy(adjusted, target, reduction=reduction)


def plain(logits: Tensor, target: Tensor, log_prior: Tensor, reduction: str) -> Tensor:
    """The same kernel with nothing silenced: another loss, for what silencing costs."""
    return LF.margin_cross_entropy(logits, target, logit_bias=log_prior, reduction=reduction)


_DENSE = ("silenced", "log_prior")
VARIANTS = by_name(
    (
        Variant("ours", ours, "silenced", inputs=("neighbors", "counts")),
        Variant("plain", plain, "plain", inputs=("log_prior",)),
        Variant("dense", dense, "silenced", inputs=_DENSE, rounds=True),
        Variant("dense-float64", dense, "silenced", inputs=("silenced_float64", "log_prior"), rounds=True),
        Variant("dense-compiled", dense, "silenced", inputs=_DENSE, rounds=True, compiled=True),
    )
)


class AuxiliaryProblem(RowProblem):
    """Logits over K classes, a neighbour map, and targets drawn from the counts of both kinds of classes.

    With other than 6012 classes the map is generated, in the same proportions.
    """

    def __init__(self, case: Case, device: str = "cpu", blank: bool = False) -> None:
        self.num_classes = round(case.classes * TARGETS / (TARGETS + AUXILIARIES))
        auxiliaries = case.classes - self.num_classes
        counts = torch.cat([long_tail(self.num_classes), torch.full((auxiliaries,), AUXILIARY_SAMPLES).double()])
        super().__init__(case, device, counts)
        self.logits = random_matrix(case, case.rows, case.classes, device, blank).requires_grad_()
        self.log_prior = (counts / counts.sum()).log().float().to(device)
        file = os.environ.get("LTKERNELS_NEIGHBORS")
        real = file and (self.num_classes, auxiliaries) == (TARGETS, AUXILIARIES)
        self.pairs = read_pairs(Path(file), case.classes) if real else generated_pairs(self.num_classes, auxiliaries)
        neighbors = NeighborMap.from_pairs(self.pairs, num_classes=self.num_classes, num_auxiliary=auxiliaries)
        self.neighbors = neighbors if device == "cpu" else neighbors.to(device)
        self._source = "read from a file" if real else "generated"

    @cached_property
    def silenced(self) -> Tensor:
        """K x K, 1 where the row's class silences the column's. Not computed from the map's own tensors."""
        dense = torch.zeros(self.case.classes, self.case.classes)
        a, b = self.pairs.unbind(1)
        dense[a, b] = dense[b, a] = 1
        return dense.to(self.logits.device)

    @cached_property
    def silenced_float64(self) -> Tensor:
        return self.silenced.double()

    def exact(self, method: str) -> Exact:
        bias, allowed = self.log_prior.double(), None
        if method == "silenced":
            allowed = self.silenced[self.target] == 0

        def row_loss(block: Tensor, rows: slice) -> Tensor:
            mask = None if allowed is None else allowed[rows]
            return reference.margin_softmax(
                block, self.target[rows], None, None, bias, None, None, mask, None, None, None, None,
                1.0, 1.0, -1, "none", -100, 0.0,
            )[0]  # fmt: skip

        return exact_rows(self.logits, row_loss)

    def info(self, inputs: Sequence[str]) -> dict[str, Any]:
        held = getattr(self, inputs[0])
        found = {"pairs": len(self.pairs), "map": self._source}
        if isinstance(held, NeighborMap):
            return found | {"map_bytes": map_bytes(held)}
        return found | {"map_bytes": held.nbytes if held.dim() == 2 else 0}


def map_bytes(neighbors: NeighborMap) -> int:
    """Bytes of the tensors of all modes, each counted once."""
    tensors = [tensor for mode in MODES for tensor in neighbors.rows(mode)[:2]]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def read_pairs(path: Path, classes: int) -> Tensor:
    """(P, 2) target class and auxiliary class."""
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        wanted = ("target_class", "auxiliary_class")
        if missing := set(wanted) - set(rows.fieldnames or ()):
            raise ValueError(f"{path}: expected columns {', '.join(wanted)}, found no {', '.join(sorted(missing))}")
        pairs = torch.tensor([[int(row[name]) for name in wanted] for row in rows]).reshape(-1, 2)
    low, high = pairs.amin(0).tolist(), pairs.amax(0).tolist()
    if not (0 <= low[0] and high[0] < TARGETS <= low[1] and high[1] < classes):
        raise ValueError(f"{path}: expected target classes below {TARGETS}, auxiliary ones from there to {classes - 1}")
    return pairs


def generated_pairs(targets: int, auxiliaries: int) -> Tensor:
    """Each auxiliary class has an anchor, some have several; a target class has up to 8 neighbours."""
    generator = torch.Generator().manual_seed(0)
    count = round(auxiliaries * PAIRS / AUXILIARIES)
    slots = torch.arange(targets).repeat_interleave(MOST_NEIGHBORS)
    anchors = slots[torch.randperm(len(slots), generator=generator)][:count]
    first = torch.arange(auxiliaries)
    while True:  # until no pair is there twice: hardly ever more than a few times
        further = torch.randint(auxiliaries, (len(anchors) - auxiliaries,), generator=generator)
        pairs = torch.stack([anchors, targets + torch.cat([first, further])], 1)
        if len(pairs.unique(dim=0)) == len(pairs):
            return pairs


def _leave_out(case: Case, variant: Variant, device: str, quick: bool) -> bool:
    return quick and variant.compiled and case.dtype != "float32"


FAMILY = Family(
    "auxiliary",
    AuxiliaryProblem,
    VARIANTS,
    shapes=SHAPES,
    gpu_shapes=(*reversed(SHAPES),),
    quick_shapes=("64x601",),
    small_shape="64x48",
    leave_out=_leave_out,
)
