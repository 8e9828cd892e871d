"""The contrastive kernels compiled for GPUs that are not here: no spills, memory that fits, matrix instructions."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

from ahead_of_time import compiled, recorded_launches, resources  # noqa: E402

from ltkernels.reference import ALL, NEGATIVES, OWN  # noqa: E402
from ltkernels.triton.contrastive import contrastive_bwd, contrastive_fwd  # noqa: E402

SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
ROWS, LABELS = 1024, 100


@dataclass(frozen=True)
class Call:
    """A call of a launcher, of which the kernel of that name is compiled."""

    kernel: str
    width: int
    dtype: torch.dtype = torch.bfloat16
    options: tuple[str, ...] = ()
    capabilities: tuple[int, ...] = (90,)
    launch: int = 0  # which of the launches of the kernel

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join([self.kernel.strip("_"), dtype, str(self.width), *self.options, *"b"[: self.launch]])

    def function(self) -> Callable[[], object]:
        acc = torch.float64 if self.dtype == torch.float64 else torch.float32
        has = {name: name in self.options for name in self.options}.get
        keys = ROWS + 8 if has("key") else ROWS
        labels = None if has("index") else torch.zeros(ROWS, dtype=torch.int64)
        arguments = [
            torch.zeros(ROWS, self.width, dtype=self.dtype),
            torch.zeros(keys, self.width, dtype=self.dtype) if has("key") else None,
            torch.ones(ROWS, dtype=acc),
            labels,
            torch.zeros(keys, dtype=torch.int64) if has("key") and labels is not None else None,
            torch.ones(ROWS, dtype=torch.int64) if has("index") else None,
            torch.ones(1, keys, dtype=torch.bool).expand(ROWS, -1) if has("mask") else None,
            torch.zeros(keys, dtype=acc) if has("bias") else None,
            torch.zeros(LABELS, LABELS, dtype=acc) if has("margin") else None,
            None,
            None,
            torch.zeros(ROWS, self.width, dtype=self.dtype) if has("extra") else None,
            OWN if has("own") else NEGATIVES if has("negatives") else ALL,
            True,
            False,
            2,
        ]
        given = (True, has("key"), has("every"), has("bias"), has("margin"), has("extra"))
        grads = sum(1 << bit for bit, x in enumerate(given) if x)
        return lambda: contrastive_fwd(*arguments, grads | 64)


ALL_GPUS = (80, 90, 100)
EVERYTHING = ("own", "mask", "bias", "margin", "every")
COMMON = ("own", "bias", "every")
CALLS = [
    Call("_statistics", 128, options=("negatives",), capabilities=ALL_GPUS),
    Call("_gradient", 128, options=("every",), capabilities=ALL_GPUS),
    Call("_gradient", 256, options=("negatives", "every"), capabilities=(80,)),
    Call("_gradient", 256, options=COMMON, capabilities=(80,)),
    Call("_gradient", 256, options=("index", "key", "bias", "extra", "every")),
    Call("_gradient", 256, options=("index", "key", "bias", "extra", "every"), launch=1),
    Call("_gradient", 1024, options=EVERYTHING, capabilities=(80, 90)),
    Call("_gradient", 256, options=EVERYTHING),
    Call("_gradient", 128, torch.float32, COMMON),
    Call("_gradient", 512, torch.float32, EVERYTHING, capabilities=(80,)),
    Call("_gradient", 128, torch.float32, ("tf32", "every"), capabilities=(80,)),
    Call("_gradient", 128, torch.float32, ("tf32", *EVERYTHING)),
    Call("_gradient", 256, torch.float32, ("tf32", "every")),
    Call("_statistics", 256, torch.float32, ("tf32", *EVERYTHING)),
    Call("_gradient", 128, torch.float64, EVERYTHING),
    Call("_statistics", 1024, options=EVERYTHING),
    Call("_own_terms", 128, options=EVERYTHING),
    Call("_pair_margin_gradient", 128, options=EVERYTHING, capabilities=(80, 90)),
]
TARGETS = [(call, capability) for call in CALLS for capability in call.capabilities]


@pytest.mark.parametrize(("call", "capability"), TARGETS, ids=[f"{call}-sm_{sm}" for call, sm in TARGETS])
def test_resources(call: Call, capability: int, tmp_path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = "tf32" in call.options
    try:
        recorded = recorded_launches(call.function())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    launches = [launch for launch in recorded if launch[0].__name__ == call.kernel]
    assert len(launches) == (2 if "key" in call.options and call.kernel == "_gradient" else 1)
    kernel = compiled(launches[call.launch], capability)
    used = resources(kernel, tmp_path)
    print(used)
    assert used.stack == 0 and used.local == 0, "registers spill"
    assert used.shared <= SHARED_MEMORY[capability]
    assert used.registers * used.warps * 32 <= 65536, "not one program fits a processor"
    matrix = re.search(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", kernel.asm["ptx"])
    exact = call.dtype == torch.float32 and "tf32" not in call.options
    assert (matrix is None) == exact, "products of float32 are exact unless TF32 is allowed; others use tensor cores"


def test_at_most_24_kernels() -> None:
    assert len(TARGETS) <= 24


def test_numbers_do_not_recompile() -> None:
    """Calls that differ in rows, keys, temperature, reduction and sample weights share their kernels."""

    def keys(rows: int, keys: int, temperature: float, reduction: int, weighted: bool) -> list[str]:
        g = torch.zeros(rows, 32), torch.zeros(keys, 32), torch.full((rows,), temperature)
        labels = torch.zeros(rows, dtype=torch.int64), torch.zeros(keys, dtype=torch.int64)
        weight = torch.ones(rows) if weighted else None
        arguments = (*g, *labels, *(None,) * 4, weight, None, None, ALL, True, weighted, reduction)
        stats = torch.zeros(5, rows)
        launches = recorded_launches(lambda: contrastive_fwd(*arguments, 0))
        launches += recorded_launches(lambda: contrastive_bwd(torch.ones(()), stats, *arguments, 3))
        assert len(launches) == 3
        return [compiled(launch, 90).hash for launch in launches]

    first = keys(64, 96, 1.0, 1, False)
    assert first == keys(1, 1, 0.07, 0, True)
    assert first == keys(17, 4096, 0.5, 2, False)
