"""The Triton kernels compiled for GPUs that are not here: no spills, shared memory that fits, wide memory accesses."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

from ahead_of_time import compiled, recorded_launches, resources  # noqa: E402

from ltkernels.triton.margin_softmax import margin_softmax_bwd, margin_softmax_fwd, margin_softmax_scale_  # noqa: E402

SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
ROWS = 1024  # above the limit of an inline normaliser


@dataclass(frozen=True)
class Call:
    """A call of a launcher, of which the kernel of that name is compiled."""

    kernel: str
    classes: int
    dtype: torch.dtype = torch.bfloat16
    options: tuple[str, ...] = ()
    wide: bool = True  # rows are 16-byte aligned: accesses of 16 bytes are expected
    capabilities: tuple[int, ...] = (90,)

    def __str__(self) -> str:
        return "-".join(
            [self.kernel.strip("_"), str(self.dtype).removeprefix("torch."), str(self.classes), *self.options]
        )

    def launch(self) -> Callable[[], object]:
        tensors, smoothing = self.tensors(), 0.125 if "smoothed" in self.options else 0.0
        logits = tensors[0]
        if self.kernel.startswith("_forward") or self.kernel == "_normalizer_parts":
            return lambda: margin_softmax_fwd(*tensors, 1.0, 0.0, 8, 1, -100, smoothing, True)
        if self.kernel == "_scale_in_place":
            return lambda: margin_softmax_scale_(logits, torch.ones(()))
        stats = torch.zeros(3, ROWS, dtype=torch.float64 if self.dtype == torch.float64 else torch.float32)
        return lambda: margin_softmax_bwd(
            stats[0], None, stats, *tensors, 1.0, 0.0, 8, 1, -100, smoothing, 7 if tensors[6] is not None else 3
        )

    def tensors(self) -> tuple[Tensor | None, ...]:
        """logits, target, w, a, b, m, Delta, mask, u, row classes, neighbours' offsets and classes."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        vector = torch.zeros(self.classes, dtype=wide)

        def given(name: str, x: Tensor) -> Tensor | None:
            return x if name in self.options else None

        logits = torch.empty(ROWS, self.classes, dtype=self.dtype)
        target = given("probabilities", torch.empty_like(logits))
        target = torch.zeros(ROWS, dtype=torch.int64) if target is None else target
        mask = given("mask", torch.empty(1, self.classes, dtype=torch.bool).expand(ROWS, -1))
        pairwise = given("pairwise", torch.empty(self.classes, self.classes))
        neighbors = [given("neighbors", torch.zeros(n, dtype=torch.int32)) for n in (self.classes + 1, 8)]
        row_class = torch.zeros(ROWS, dtype=torch.int64) if {"neighbors", "probabilities"} <= {*self.options} else None
        bias = given("bias", vector)
        return logits, target, vector, None, bias, vector, pairwise, mask, None, row_class, *neighbors


ALL = (80, 90, 100)
EVERYTHING = ("bias", "mask", "probabilities")
CALLS = [
    Call("_forward_whole_rows", 100, torch.float32, ("bias",), capabilities=ALL),
    Call("_forward_whole_rows", 1000, capabilities=ALL),
    Call("_forward_whole_rows", 8192),
    Call("_forward_whole_rows", 4096, torch.bfloat16, EVERYTHING, capabilities=(80, 100)),
    Call("_forward_whole_rows", 1000, torch.bfloat16, ("bias", "mask", "smoothed")),
    Call("_forward_two_sweeps", 8142, wide=False),
    Call("_forward_whole_rows", 2048, torch.float64, EVERYTHING),
    Call("_forward_two_sweeps", 50304, torch.bfloat16, ("bias",), capabilities=(80, 90)),
    Call("_forward_two_sweeps", 50304, torch.float32, EVERYTHING, capabilities=(90, 100)),
    Call("_backward", 1000, torch.bfloat16, ("bias",), capabilities=(80, 90)),
    Call("_forward_two_sweeps", 6016, torch.bfloat16, ("neighbors",), capabilities=ALL),
    Call("_forward_whole_rows", 3000, torch.bfloat16, ("neighbors", *EVERYTHING), capabilities=(80,)),
    Call("_backward", 1000, torch.float32, EVERYTHING),
    Call("_backward", 1000, torch.bfloat16, ("neighbors", "bias", "mask", "smoothed")),
    Call("_pairwise_backward", 1000, torch.bfloat16, ("pairwise", "smoothed")),
    Call("_row_coefficients", 1000, torch.bfloat16, EVERYTHING),
    Call("_normalizer_parts", 1000, wide=False),
    Call("_scale_in_place", 1000),
]
TARGETS = [(call, capability) for call in CALLS for capability in call.capabilities]


@pytest.mark.parametrize(("call", "capability"), TARGETS, ids=[f"{call}-sm_{sm}" for call, sm in TARGETS])
def test_resources(call: Call, capability: int, tmp_path) -> None:
    launches = [launch for launch in recorded_launches(call.launch()) if launch[0].__name__ == call.kernel]
    assert len(launches) == 1
    used = resources(compiled(launches[0], capability), tmp_path)
    print(used)
    assert used.stack == 0 and used.local == 0, "registers spill"
    assert used.shared <= SHARED_MEMORY[capability]
    assert used.registers * used.warps * 32 <= 65536, "not one program fits a processor"
    if call.wide:
        assert used.wide_loads > 0, "loads are split"
    if call.wide and call.kernel not in ("_row_coefficients", "_pairwise_backward"):
        assert used.wide_stores > 0, "stores are split"


def test_at_most_28_kernels() -> None:
    assert len(TARGETS) <= 28


def test_numbers_do_not_recompile() -> None:
    """Calls that differ in scale, rows, ignore_index and absent per-row operands share a kernel."""

    def key(rows: int, scale: float, ignore_index: int, smoothing: float, *operands: Tensor | None) -> str:
        logits, target = torch.zeros(rows, 96), torch.zeros(rows, dtype=torch.int64)
        weight, margin, sample_weight = operands
        launch = recorded_launches(
            lambda: margin_softmax_fwd(
                logits,
                target,
                weight,
                None,
                None,
                margin,
                None,
                None,
                sample_weight,
                None,
                None,
                None,
                scale,
                1.0,
                -1,
                2,
                ignore_index,
                smoothing,
                True,
            )
        )[0]
        return compiled(launch, 90).hash

    vector = torch.ones(96)
    plain = key(64, 1.0, -100, 0.0, None, None, None)
    assert plain == key(1, 30.0, 1, 0.0, vector, vector, torch.ones(1))
    assert plain == key(17, 0.5, 16, 0.0, None, vector, None)
    assert plain != key(64, 1.0, -100, 0.1, None, None, None)


def test_silencing_does_not_recompile() -> None:
    """Calls that differ in lambda, back_from and the number of pairs share a kernel."""

    def key(pairs: int, neighbor_weight: float, back_from: int) -> str:
        tensors = torch.zeros(64, 96), torch.zeros(64, dtype=torch.int64)
        neighbors = torch.zeros(97, dtype=torch.int32), torch.zeros(pairs, dtype=torch.int32)
        numbers = 1.0, neighbor_weight, back_from, 2, -100, 0.0
        launch = recorded_launches(lambda: margin_softmax_fwd(*tensors, *[None] * 8, *neighbors, *numbers, True))[0]
        return compiled(launch, 90).hash

    assert len({key(8, 0.0, -1), key(16, 0.0, 1), key(7, 0.1, 16), key(1, 1.0, 17)}) == 1
