"""Memory of the contrastive loss: the peak of resident memory of forward and backward, in a process of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
from contrastive_oracle import KERNEL
from peak_memory import PRELUDE

from ltkernels import nn as lnn

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.skipif(not KERNEL, reason="the definition holds the matrix of similarities"),
]

MEMORY = (
    PRELUDE
    + """
from ltkernels import nn as lnn

torch.set_num_threads(2)

def module(kind, rows):
    # And what it is called with besides the embeddings.
    labels, index = torch.arange(rows) % 100, torch.arange(rows // 2)
    if kind == "BalancedContrastiveLoss":
        return lnn.BalancedContrastiveLoss(), (labels, torch.randn(100, 16).requires_grad_())
    if kind == "BalancedContrastiveLoss, the authors' code":
        return lnn.BalancedContrastiveLoss(count_anchor=False), (labels, torch.randn(100, 16).requires_grad_())
    if kind == "NTXentLoss, pairs":
        return lnn.NTXentLoss(0.2, "pairs"), (labels,)
    if kind == "TemperatureContrastiveLoss":
        return lnn.TemperatureContrastiveLoss(torch.full((rows,), 0.2)), (index,)
    if kind == "ISogCLRLoss":
        return lnn.ISogCLRLoss(rows, 0.3), (index,)
    if kind == "MoCoLoss":
        return lnn.MoCoLoss(16, rows), (torch.randn(rows, 16), labels)
    arguments = {"NTXentLoss": (0.2,), "SupConLoss": (0.2,), "TemperatureScheduledLoss": (10,), "MACLLoss": ()}
    return getattr(lnn, kind)(*arguments[kind]), (labels,) if kind == "SupConLoss" else ()

def peak(rows, kind, width=16):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(rows, width, generator=generator).requires_grad_()
    if "Loss" in kind:
        criterion, arguments = module(kind, rows)
        before = resident()
        criterion(z, *arguments).backward()
        return status("VmHWM") - before
    tau = torch.full((rows,), 0.5).requires_grad_()
    options = {"labels": torch.randint(100, (rows,), generator=generator), "temperature": tau}
    if kind == "two_sided":
        options |= {"key": torch.randn(2 * rows, width).requires_grad_(), "key_labels": torch.arange(2 * rows) % 100}
        options |= {"key_bias": torch.zeros(2 * rows).requires_grad_(), "allowed": torch.arange(2 * rows) % 9 > 0}
    elif kind != "all":
        options |= {"denominator": kind, "reduction": "none"}
    before = resident()
    loss, stats = LF.contrastive_loss(z, **options, return_stats=True)
    loss.sum().backward()
    return status("VmHWM") - before

sizes, kinds = json.loads(sys.argv[1])
for kind in kinds:
    peak(300, kind)
print(json.dumps({kind: [peak(rows, kind) for rows in sizes] for kind in kinds}))
"""
)


MODULES = [
    "BalancedContrastiveLoss", "BalancedContrastiveLoss, the authors' code", "ISogCLRLoss", "MACLLoss", "MoCoLoss",
    "NTXentLoss", "NTXentLoss, pairs", "SupConLoss", "TemperatureContrastiveLoss", "TemperatureScheduledLoss",
]  # fmt: skip


def peaks(run_python: Callable[..., str], sizes: list[int], kinds: list[str]) -> dict[str, list[int]]:
    return json.loads(run_python("-c", MEMORY, json.dumps([sizes, kinds])))


def check(found: dict[str, list[int]], sizes: list[int]) -> None:
    """A few vectors of the size of the embeddings, and tiles: at most a small part of the matrix, and linear in M."""
    for kind, bytes_used in found.items():
        first, last = bytes_used[0], bytes_used[-1]
        assert last < 0.05 * 4 * sizes[-1] ** 2, (kind, bytes_used)
        # 20 vectors of 16 numbers a row (accumulators of each thread among them), and 2 MiB of tiles.
        assert last < 20 * 16 * 4 * sizes[-1] + 2**21, (kind, bytes_used)
        # The kernel counts resident pages in batches, a few hundred KiB off: from 1 MiB a ratio says something.
        assert last - first < 1.5 * sizes[-1] / sizes[0] * max(first, 2**20), (kind, bytes_used)


def test_memory_is_linear(run_python: Callable[..., str]) -> None:
    sizes = [4700, 9400]
    check(peaks(run_python, sizes, ["all", "own", "two_sided"]), sizes)


def test_memory_of_the_modules_is_linear(run_python: Callable[..., str]) -> None:
    names = {name for name in lnn.__all__ if "_contrastive" in getattr(lnn, name).__module__}
    assert names == {kind.split(",")[0] for kind in MODULES}
    sizes = [4500, 6000]
    check(peaks(run_python, sizes, MODULES), sizes)


def test_small_matrices_are_kept_up_to_40_MiB(run_python: Callable[..., str]) -> None:
    """Half of the similarities of 4096 rows are kept from the forward sweep for the gradient, those of more are not."""
    small, medium, large = peaks(run_python, [1024, 4096, 4700], ["all"])["all"]
    assert small < 4 * 2**20
    assert 24 * 2**20 < medium < 42 * 2**20
    assert large < 4 * 2**20


def test_memory_of_1_000_to_32_000_rows(run_python: Callable[..., str]) -> None:
    """At most 40 MiB of products and what is linear in M: the similarities of 32768 rows would be 4 GiB."""
    sizes = [1024, 2048, 2900, 3584, 4224, 4700, 8192, 32768]
    found = peaks(run_python, sizes, ["all"])["all"]
    kept = 0  # products stay for the next call: each peak is above those before
    for rows, used in zip(sizes, found, strict=True):
        kept += used
        assert kept < 40 * 2**20 + 20 * 16 * 4 * rows + 2**21, (rows, found)
    assert sum(found[:5]) > 24 * 2**20, found  # half of the similarities of 4224 rows
    check({"all": found[5:]}, sizes[5:])  # of more nothing is kept
