"""GPU tests and benchmarks in one command of under 9 minutes: ``python -m benchmarks.run_gpu`` (``make gpu``).

Needs a machine with an NVIDIA GPU, a C++ compiler, and a Python with torch, triton, pytest, pytest-benchmark and
hypothesis; works offline. The extension is built in place if it is missing, stale, or built for another torch. What the
trainer lacks is taken from the wheels in packs/, where there are any. The reports are written to benchmarks/results/
even if a test fails, as gpu-NAME.json, .md and .png for margin_cross_entropy and as FAMILY-gpu-NAME.* for the others;
the exit status is then 1. Each family of benchmarks has a process of its own, as nothing works in one after a fault of
the GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks.results import partial_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SETUPTOOLS = 77  # as in pyproject.toml
NEEDED = ("torch", "pytest", "pytest_benchmark", "hypothesis")
TRAINER = ("lightning_fabric", "torchmetrics", "tyro", "rich", "PIL")
FAMILIES = ("margin", "trainer", "contrastive", "linear", "auxiliary")  # the first ones wait for a GPU the most
SECONDS = 520.0
BUILD_SECONDS, TEST_SECONDS = 150.0, 160.0
# Above what is left if build and tests take all of theirs. Each family has an equal share of it, for its most telling
# shape first, and so on, as many as there is time for.
BENCHMARK_SECONDS = 270.0
REPORT_SECONDS = 20.0
# What pytest has for its files once it is interrupted; pytest-xdist waits 10 s for its workers first.
INTERRUPT_SECONDS = 20.0
# What one group of benchmarks may take once it has begun: compilation, checks and its rounds.
GROUP_SECONDS = 50.0
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


class Failed(Exception):
    """The run cannot go on; the message says why."""


def check_machine() -> str:
    """The GPU's name."""
    missing = [name for name in NEEDED if not importlib.util.find_spec(name)]
    if missing:
        raise Failed(f"{sys.executable} has no {', '.join(missing)}. Choose another with `make gpu PYTHON=...`.")
    import torch

    if not torch.cuda.is_available():
        built_for = torch.version.cuda or "no GPU"
        raise Failed(
            f"torch {torch.__version__} (built for {built_for}) sees no NVIDIA GPU here. "
            "On a CPU: `make test` and `make benchmark`."
        )
    if torch.version.hip:
        raise Failed("the Triton kernels are written for NVIDIA GPUs; this torch is built for ROCm.")
    if not importlib.util.find_spec("triton"):
        raise Failed(f"{sys.executable} has no triton, which the kernels for NVIDIA GPUs are written in.")
    absent = [name for name in TRAINER if not importlib.util.find_spec(name)]
    if absent and use_packed_wheels():
        absent = [name for name in TRAINER if not importlib.util.find_spec(name)]
    if absent:
        print(f"without the trainer's tests and benchmark, as there is no {', '.join(absent)}", flush=True)
    name = torch.cuda.get_device_name()
    print(f"{name}; torch {torch.__version__}, Python {sys.version.split()[0]}", flush=True)
    return name


def use_packed_wheels() -> bool:
    """Let this process and those it starts import what `make gpu-pack` has left and is not installed: plain Python."""

    def installed(wheel: Path) -> bool:
        try:
            return bool(importlib.metadata.version(wheel.name.split("-")[0]))
        except importlib.metadata.PackageNotFoundError:
            return False

    wheels = [str(wheel) for wheel in sorted((ROOT / "packs").glob("*-none-any.whl")) if not installed(wheel)]
    sys.path += wheels
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), *wheels)))
    importlib.invalidate_caches()
    return bool(wheels)


def build(seconds: float) -> None:
    """Builds the extension in place unless it is there, newer than its sources, and of this torch."""
    library = ROOT / "ltkernels" / "_C.so"
    sources = [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.h")]
    if library.exists() and library.stat().st_mtime > max(path.stat().st_mtime for path in sources):
        if run("Import", ["-c", "import ltkernels.functional"], 60, quiet=True) == 0:
            return
    version = importlib.metadata.version("setuptools") if importlib.util.find_spec("setuptools") else "0"
    if int(version.split(".")[0]) < SETUPTOOLS:
        found = f"only setuptools {version}" if version != "0" else "no setuptools"
        raise Failed(f"{sys.executable} has {found}: version {SETUPTOOLS} or newer builds the extension.")
    if not shutil.which("ninja"):
        print("without ninja the extension is built one file at a time", flush=True)
    if run("Build", ["setup.py", "build_ext", "--inplace"], seconds) != 0:
        raise Failed("the extension could not be built.")


def run(what: str, arguments: list[str], seconds: float, quiet: bool = False, **environment: str) -> int:
    """Exit status of a Python process in the root of the repository; 124 if it ran out of time.

    It is interrupted then, so that pytest writes what it has; what still runs some seconds later is killed.
    """
    start = time.monotonic()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    stream = subprocess.DEVNULL if quiet else None
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path} | environment,
        stdout=stream,
        stderr=stream,
        start_new_session=True,  # so that its compiler processes end with it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        status = 124
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(INTERRUPT_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it has started may outlive it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if not quiet:
        outcome = {0: "done", 124: f"stopped at its limit of {seconds:.0f} s"}.get(status, f"failed ({status})")
        print(f"== {what}: {outcome} after {time.monotonic() - start:.0f} s", flush=True)
    return status


def gpu_tests() -> list[str]:
    """Files with GPU tests. The others need not even be importable here: the trainer's dependencies may be missing."""
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    if not files:
        raise Failed("no file under tests/ has a test marked gpu.")
    # Those of the contrastive kernels last: they compile the most, and the time may run out.
    return [str(path.relative_to(ROOT)) for path in sorted(files, key=lambda path: ("contrastive" in path.name, path))]


def test_arguments(junit: Path) -> list[str]:
    """All GPU tests, the large ones included; side by side where pytest-xdist is, as most of their time compiles."""
    arguments = ["-m", "gpu and (large or not large)", "--continue-on-collection-errors", f"--junitxml={junit}"]
    if importlib.util.find_spec("xdist"):
        # In their order, and no more than a few of them waiting at a worker: what the time cuts off is at the end.
        arguments += ["-n", str(min(16, os.cpu_count() or 1)), "--dist", "load", "--maxschedchunk", "4"]
    return arguments + gpu_tests()


def benchmark_file(family: str) -> str:
    return str(next(Path(__file__).parent.glob(f"bench_{family}*.py")).relative_to(ROOT))


def raw_file(family: str, name: str) -> Path:
    from benchmarks.report import file_name

    return RESULTS / f"{file_name(family, name)}-raw.json"


def measure(name: str, seconds: float) -> list[str]:
    """Benchmark the families one after the other, each in its share of the time that is left; those that failed."""
    end, failed = time.monotonic() + seconds, []
    for index, family in enumerate(FAMILIES):
        left = max(1.0, end - time.monotonic())
        share = left / (len(FAMILIES) - index)
        # A group that has begun may go on into the share of the next family, if there is one.
        limit = min(left, share + GROUP_SECONDS)
        begin_until = max(share - GROUP_SECONDS / 2, share / 2)
        status = run(
            f"Benchmarks of {family}",
            [*PYTEST, benchmark_file(family), "--benchmark-only", "--device=cuda", "--seconds=1.5",
             f"--time-limit={begin_until:.0f}", f"--benchmark-json={raw_file(family, name)}"],
            limit,
        )  # fmt: skip
        failed += [family] if status != 0 else []
    return failed


def count_tests(junit: Path, status: int) -> dict[str, int] | None:
    """passed, failed, skipped, and stopped if time ran out; None if the tests were stopped before they could say."""
    if not junit.exists():
        return None
    suites = list(ElementTree.parse(junit).getroot().iter("testsuite"))
    total, skipped = (sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "skipped"))
    failed = sum(int(suite.get(name, 0)) for suite in suites for name in ("failures", "errors"))
    counts = {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}
    return counts | {"stopped": 1} if status == 124 else counts


def report(name: str, tests: dict[str, int] | None) -> list[str]:
    """Write the pages; families without one. What one of them fails at is no reason to lose the others.

    Raises:
        Failed: there is none at all.
    """
    from benchmarks.report import main_table, write
    from benchmarks.results import load

    missing = []
    for family in FAMILIES:
        try:
            for results in load([raw_file(family, name)]).values():
                results.tests = tests
                for path in write(results, name, RESULTS):
                    print(path)
                print(main_table(results))
        except Exception:
            traceback.print_exc()
            missing.append(family)
    if len(missing) == len(FAMILIES):
        raise Failed("no report: not one family of benchmarks has results that can be read.")
    return missing


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run_gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all of it; default: {SECONDS:.0f}")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.seconds

    def left(at_most: float, reserved: float) -> float:
        return max(1.0, min(at_most, deadline - time.monotonic() - reserved))

    try:
        name = "gpu-" + re.sub(r"[^a-z0-9]+", "-", check_machine().lower()).strip("-")
        RESULTS.mkdir(parents=True, exist_ok=True)
        raws, junit = [raw_file(family, name) for family in FAMILIES], ROOT / "build" / "gpu-tests.xml"
        for stale in (*raws, *map(partial_of, raws), junit):
            stale.unlink(missing_ok=True)
        build(left(BUILD_SECONDS, 0))
        # A share of the time is kept for the benchmarks, even if the tests hang.
        reserved = REPORT_SECONDS + INTERRUPT_SECONDS
        # One thread each: what they compute on the host is the definition in float64, and all cores compile.
        seconds = left(TEST_SECONDS, 100 + reserved)
        tested = run("Tests", [*PYTEST, *test_arguments(junit)], seconds, OMP_NUM_THREADS="1")
        failed = measure(name, left(BENCHMARK_SECONDS, reserved))
        failed += report(name, count_tests(junit, tested))
    except Failed as failure:
        print(f"benchmarks.run_gpu: {failure}", file=sys.stderr)
        return 2
    return int(tested != 0 or bool(failed))


if __name__ == "__main__":
    sys.exit(main())
