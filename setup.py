"""Builds csrc/ into ltkernels/_C: the operators once, every kernel file once per instruction set.

A kernel file may contain vector code of an instruction set that the machine lacks, so it is compiled apart, with its
own flags, and linked in as an object; ltkernels picks the variant when it is loaded.
"""

import concurrent.futures
import json
import os
import platform
import shlex
import subprocess
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
KERNEL_FILES = ["csrc/cpu/margin_softmax_kernel.cpp", "csrc/cpu/contrastive_kernel.cpp"]
CAPABILITIES = {"DEFAULT": []}
if platform.machine() in ("x86_64", "AMD64"):
    CAPABILITIES["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
    CAPABILITIES["AVX512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]

# LTKERNELS_SANITIZE=address,undefined builds an instrumented extension (see `make sanitize`).
SANITIZE = os.environ.get("LTKERNELS_SANITIZE")
SANITIZER_FLAGS = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g"] if SANITIZE else []
# A maybe-uninitialized warning is GCC's own: its AVX-512 intrinsics leave a don't-care operand undefined on purpose.
COMMON_FLAGS = ["-O3", "-std=c++20", "-Wall", "-Wextra", "-Wno-unused-parameter", "-g0", *SANITIZER_FLAGS]

# at::parallel_for is a header: without this it is compiled to a serial loop. The runtime is the one torch has loaded.
OPENMP_FLAGS = ["-fopenmp"] if platform.system() == "Linux" else []


class BuildKernels(BuildExtension):
    """Compiles KERNEL_FILES for each capability, then builds the extension with the objects linked in."""

    def finalize_options(self):
        super().finalize_options()
        # Without ninja, which looks for itself, what is there would pass for new: setuptools compares it with the
        # sources only, not with headers, kernel files and the version of torch.
        self.force = True

    def build_extension(self, ext):
        if ext.name == "ltkernels._C":
            ext.extra_objects = [*ext.extra_objects, *self._compile_kernels()]
        super().build_extension(ext)

    def run(self):
        super().run()
        library = Path(self.get_ext_fullpath("ltkernels._C"))  # in the source tree under --inplace
        library.with_name("_build.json").write_text(json.dumps(self._describe(), indent=2) + "\n")

    def get_ext_filename(self, ext_name):
        # A name without the Python version: ltkernels/_build_info.py reports a mismatch in clear words.
        return str(Path(super().get_ext_filename(ext_name)).with_name("_C.so"))

    def _compile_kernels(self):
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        out = Path(self.build_temp) / "kernels"
        out.mkdir(parents=True, exist_ok=True)
        jobs = []
        for source in KERNEL_FILES:
            for capability, flags in CAPABILITIES.items():
                target = out / f"{Path(source).stem}.{capability}.o"
                command = [*compiler, *COMMON_FLAGS, "-Wno-maybe-uninitialized", "-fPIC", *flags]
                command += [f"-DLTK_CAPABILITY={capability}", "-c", str(ROOT / source), "-o", str(target)]
                jobs.append((command, target))
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for done in [pool.submit(subprocess.run, command, check=True) for command, _ in jobs]:
                done.result()
        return [str(target) for _, target in jobs]

    @staticmethod
    def _describe():
        python = ".".join(platform.python_version_tuple()[:2])
        return {"torch": torch.__version__, "python": python, "capabilities": list(CAPABILITIES), "sanitize": SANITIZE}


def sources():
    return sorted(
        str(path.relative_to(ROOT))
        for path in [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc/cpu").glob("*.cpp")]
        if str(path.relative_to(ROOT)) not in KERNEL_FILES
    )


setup(
    ext_modules=[
        CppExtension(
            "ltkernels._C",
            sources(),
            extra_compile_args=[*COMMON_FLAGS, *OPENMP_FLAGS],
            extra_link_args=[*SANITIZER_FLAGS, *OPENMP_FLAGS],
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
