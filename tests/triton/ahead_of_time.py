"""Compiles, without a GPU, exactly the kernels that a launcher would start, and reads their resources."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

Launch = tuple[JITFunction, tuple, dict]


def recorded_launches(function: Callable[[], object]) -> list[Launch]:
    """The launches of ``function`` with their arguments; nothing runs."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args, grid, warmup, **kwargs) -> None:
        launches.append((kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", record):
        function()
    return launches


def compiled(launch: Launch, capability: int) -> CompiledKernel:
    """The kernel as JITFunction.run would specialise it to these arguments, for another device."""
    kernel, args, kwargs = launch
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, debug=False, **kwargs)
    options, signature, constexprs, attributes = kernel._pack_args(
        backend, kwargs | {"debug": False}, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


@dataclass(frozen=True)
class Resources:
    registers: int  # per thread
    stack: int  # bytes per thread: spills show here
    shared: int  # bytes per program
    warps: int
    local: int  # instructions that access local memory
    wide_loads: int  # 128-bit loads from global memory
    wide_stores: int


def resources(kernel: CompiledKernel, folder: Path) -> Resources:
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    usage, code = (cuobjdump(flag, path) for flag in ("-res-usage", "-sass"))

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    return Resources(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        local=count(r"\b(?:STL|LDL)\b"),
        wide_loads=count(r"\bLDG\.E[.\w]*\.128\b"),
        wide_stores=count(r"\bSTG\.E[.\w]*\.128\b"),
    )


def cuobjdump(flag: str, path: Path) -> str:
    """cuobjdump comes with Triton."""
    command = [triton.knobs.nvidia.cuobjdump.path, flag, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout + result.stderr
