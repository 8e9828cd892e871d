"""The built extension: instruction sets kept apart, the torch it was built against, and what importing it costs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable

import pytest
import torch

from ltkernels import _build_info

DESCRIPTION = _build_info.description()

# ---------------------------------------------------------------------------------------------------- instruction sets


@pytest.fixture(scope="module")
def vector_code() -> dict[str, set[str]]:
    """Of each function in the library that uses registers wider than 128 bits: which kinds."""
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump (binutils)")
    if DESCRIPTION["sanitize"] or "AVX2" not in DESCRIPTION["capabilities"]:
        pytest.skip("an instrumented build, or one for another processor")
    found: dict[str, set[str]] = {}
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", str(_build_info.LIBRARY)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        function = ""
        for line in process.stdout:
            if header := re.match(r"^[0-9a-f]+ <(.*)>:$", line):
                function = header[1]
            elif wide := re.findall(r"%([yz]mm)\d|%(k[1-7])\b", line):
                found.setdefault(function, set()).update(a or "mask" for a, _ in wide)
    assert process.returncode == 0
    return found


def test_wide_registers_only_in_their_own_namespace(vector_code: dict[str, set[str]]) -> None:
    """Otherwise a machine without the instructions could run into them."""
    outside = [name for name in vector_code if not re.search(r"ltkernels::(AVX2|AVX512)::", name)]
    assert outside == []
    assert all(kinds == {"ymm"} for name, kinds in vector_code.items() if "ltkernels::AVX2::" in name)


def test_each_instruction_set_has_its_kernels(vector_code: dict[str, set[str]]) -> None:
    """The check above would pass on a library without vector code."""
    for namespace, register in (("AVX2", "ymm"), ("AVX512", "zmm")):
        functions = [name for name, kinds in vector_code.items() if f"{namespace}::" in name and register in kinds]
        for kernel in ("forward<float>", "forward<double>", "backward<float>", "backward<double>"):
            assert any(kernel in name for name in functions), (namespace, kernel)


def test_kernel_objects_share_no_weak_symbol() -> None:
    """A weak symbol in two of them would be linked once, with the instructions of either."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm (binutils)")
    symbols = subprocess.run(
        ["nm", "--demangle", "--defined-only", str(_build_info.LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    weak = [line for line in symbols.splitlines() if re.match(r"^[0-9a-f]+ [WVu] ", line)]
    assert [
        line for line in weak if re.search(r"ltkernels::(DEFAULT|AVX2|AVX512|.*[Ss]imd|.*exp_nonpositive)", line)
    ] == []


# ------------------------------------------------------------------------------------------------------- torch version


def test_description() -> None:
    assert DESCRIPTION["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "DEFAULT" in DESCRIPTION["capabilities"]


@pytest.mark.parametrize("version", ["2.10.0", "2.99.0+cu130"])
def test_other_torch_version(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match="was built against torch .*, but this is torch .*. Rebuild") as caught:
        _build_info.check_versions()
    assert version in str(caught.value) and DESCRIPTION["torch"] in str(caught.value)


def test_same_version_from_another_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", DESCRIPTION["torch"].split("+")[0] + "+cu130")
    _build_info.check_versions()


def test_other_python_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build_info, "python_version", lambda: "3.99")
    with pytest.raises(ImportError, match=r"built against Python 3\.\d+, but this is Python 3.99. Rebuild"):
        _build_info.check_versions()


def test_import_with_another_torch_version(run_python: Callable[..., str]) -> None:
    program = "import torch; torch.__version__ = '2.0.1'; import ltkernels.functional"
    assert "ImportError: ltkernels was built against torch" in run_python("-c", program, fails=True)


@pytest.mark.parametrize("missing", ["LIBRARY", "_DESCRIPTION"])
def test_missing_extension(monkeypatch: pytest.MonkeyPatch, tmp_path, missing: str) -> None:
    monkeypatch.setattr(_build_info, missing, tmp_path / "nowhere")
    with pytest.raises(ImportError, match="the compiled extension is missing .* Build it with"):
        _build_info.check_versions()


# -------------------------------------------------------------------------------------------------------------- import

HEAVY = ("triton", "matplotlib", "sklearn", "lightning", "lightning_fabric", "torchmetrics", "scipy", "pandas", "rich")
HEAVY += ("tyro", "torch._inductor", "torch._dynamo.convert_frame", "torchvision", "kornia", "timm", "tensorboard")
HEAVY += ("ltkernels.triton", "ltkernels.trainer")
PROGRAM = """
import json, sys, torch
before = set(sys.modules)
import ltkernels.functional as LF, ltkernels.margins, ltkernels.nn
imported = sorted(set(sys.modules) - before)
LF.margin_cross_entropy(torch.randn(2, 3, requires_grad=True), torch.tensor([0, 1])).backward()
print(json.dumps({"imported": imported, "loaded": sorted(sys.modules)}))
"""


def test_import_is_light(run_python: Callable[..., str]) -> None:
    """Only torch and ourselves: neither the trainer's packages, nor Triton (even after a call), nor a compiler."""
    modules = json.loads(run_python("-c", PROGRAM))
    assert "ltkernels.functional" in modules["imported"]
    heavy = [m for m in modules["imported"] if any(m == name or m.startswith(name + ".") for name in HEAVY)]
    assert heavy == []
    assert not {"triton", "ltkernels.triton"} & set(modules["loaded"])
