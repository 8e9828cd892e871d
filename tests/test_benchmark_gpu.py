"""`make gpu` where there is no GPU: what it runs, in which order, and what is left if the time runs out."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import re
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are part of the repository, not of the installed package

from benchmarks import linear, results, run_gpu  # noqa: E402
from benchmarks import report as reports  # noqa: E402
from benchmarks.families import FAMILIES  # noqa: E402


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_run_gpu_says_that_there_is_no_gpu(capsys):
    assert run_gpu.main([]) == 2
    assert "sees no NVIDIA GPU" in capsys.readouterr().err


STOPPED = """
import time

def test_first():
    pass

def test_second():
    time.sleep(60)
"""


@pytest.mark.parametrize(
    "parallel", [[], ["-n", "2", "--dist", "load", "--maxschedchunk", "4"]], ids=["alone", "side by side"]
)
def test_what_runs_out_of_time_on_a_gpu_still_writes_its_results(tmp_path, parallel):
    (tmp_path / "test_slow.py").write_text(STOPPED)
    junit = tmp_path / "junit.xml"
    pytest_arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", f"--junitxml={junit}"]
    start = time.monotonic()
    status = run_gpu.run("Tests", [*pytest_arguments, *parallel, str(tmp_path / "test_slow.py")], 15, quiet=True)
    assert status == 124 and time.monotonic() - start < 15 + run_gpu.INTERRUPT_SECONDS
    counts = run_gpu.count_tests(junit, status)
    assert counts["passed"] >= 1 and counts["stopped"]
    assert run_gpu.count_tests(junit, 0) == {name: n for name, n in counts.items() if name != "stopped"}


FAULTS = """
import importlib.util, sys, torch

spec = importlib.util.spec_from_file_location("suite", {conftest!r})
suite = importlib.util.module_from_spec(spec)
spec.loader.exec_module(suite)
pytest_runtest_call = suite.pytest_runtest_call

def synchronize():
    if hasattr(sys, "fault"):
        raise RuntimeError("an illegal memory access")

torch.cuda.is_available, torch.cuda.synchronize = lambda: True, synchronize
"""
FAULTY = """
import sys, pytest
pytestmark = pytest.mark.gpu

def test_faulty():
    sys.fault = True

@pytest.mark.parametrize("number", range(5))
def test_good(number):
    assert not hasattr(sys, "fault")
"""


def test_a_fault_of_the_gpu_fails_its_own_test_only(tmp_path):
    pytest.importorskip("xdist", reason="needs pytest-xdist")
    (tmp_path / "conftest.py").write_text(FAULTS.format(conftest=str(ROOT / "tests" / "conftest.py")))
    (tmp_path / "test_faulty.py").write_text(FAULTY)
    junit = tmp_path / "junit.xml"
    arguments = ["-q", "-n", "1", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", f"--junitxml={junit}"]
    status = run_gpu.run("Tests", ["-m", "pytest", *arguments, str(tmp_path)], 120, quiet=True)
    assert status == 1 and run_gpu.count_tests(junit, status) == {"passed": 5, "failed": 1, "skipped": 0}


def test_gpu_tests_are_all_run_and_side_by_side_where_they_can_be(monkeypatch):
    found = importlib.util.find_spec
    for installed in (False, True):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, there=installed: there if name == "xdist" else found(name)
        )
        arguments = run_gpu.test_arguments(Path("junit.xml"))
        assert ("-n" in arguments) == installed and "gpu and (large or not large)" in arguments
        names = [Path(name).name for name in arguments if name.endswith(".py")]
        assert {"test_margin_softmax_gpu.py", "test_linear_gpu.py", "test_trainer_gpu.py"} < set(names)
        assert names[-1] == "test_contrastive_gpu.py"


def test_every_family_is_measured_with_a_file_of_its_own():
    files = [run_gpu.benchmark_file(family) for family in run_gpu.FAMILIES]
    assert {ROOT / file for file in files} == set((ROOT / "benchmarks").glob("bench_*.py"))
    assert run_gpu.FAMILIES[:2] == ("margin", "trainer") and set(run_gpu.FAMILIES) == {*FAMILIES, "trainer"}
    assert [run_gpu.raw_file(family, "gpu-x").name for family in ("margin", "linear")] == [
        "gpu-x-raw.json",
        "linear-gpu-x-raw.json",
    ]


@pytest.mark.parametrize("spent", [0.2, 1.0, 1.9], ids=["quick", "as planned", "slow"])
def test_families_share_the_time(monkeypatch, spent):
    """Each process may take so much of its limit, which stays within the whole; each has time to begin a group."""
    clock, limits, begins = [1000.0], [], []

    def run(what, arguments, seconds):
        limits.append(seconds)
        begins.append(next(float(a.split("=")[1]) for a in arguments if a.startswith("--time-limit=")))
        clock[0] += min(seconds, spent * begins[-1])
        return int("linear" in what)

    monkeypatch.setattr(run_gpu.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(run_gpu, "run", run)
    assert run_gpu.measure("gpu-x", 240.0) == ["linear"]
    assert clock[0] <= 1240.0 and len(limits) == len(run_gpu.FAMILIES) and min(begins) >= 15
    assert all(begin <= limit for begin, limit in zip(begins, limits, strict=True))
    if spent <= 1:
        assert min(begins) >= 23


def test_a_report_that_fails_does_not_take_the_others_with_it(monkeypatch, tmp_path, capsys):
    def load(paths):
        (path,) = paths
        if "contrastive" in path.name:
            raise KeyError("damaged")
        return {path.name: dataclasses.make_dataclass("Results", ["tests"])(None)}

    written = []
    monkeypatch.setattr(results, "load", load)
    monkeypatch.setattr(reports, "write", lambda results, name, folder: written.append(results.tests) or [])
    monkeypatch.setattr(reports, "main_table", lambda results: "a table")
    assert run_gpu.report("gpu-x", {"passed": 1}) == ["contrastive"]
    assert written == [{"passed": 1}] * 4 and "damaged" in capsys.readouterr().err
    monkeypatch.setattr(results, "load", lambda paths: 1 / 0)
    with pytest.raises(run_gpu.Failed, match="no report"):
        run_gpu.report("gpu-x", None)


def test_packages_that_are_not_installed_come_from_the_packs(tmp_path, monkeypatch):
    monkeypatch.setattr(run_gpu, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "before")
    assert not run_gpu.use_packed_wheels()
    (tmp_path / "packs").mkdir()
    for name in ("somewhere_else-1.0-py3-none-any.whl", "pytest-1.0-py3-none-any.whl"):
        with zipfile.ZipFile(tmp_path / "packs" / name, "w") as wheel:
            wheel.writestr(f"{name.split('-')[0]}.py", "here = True")
    assert run_gpu.use_packed_wheels()
    assert importlib.util.find_spec("somewhere_else") and run_gpu.os.environ["PYTHONPATH"].startswith("before")
    assert "pytest-1.0" not in run_gpu.os.environ["PYTHONPATH"]  # what is installed stays


def test_a_torch_without_the_function_is_no_peer():
    variant = linear.VARIANTS["torch-chunked"]
    assert variant.runs_on("cpu") == hasattr(torch.nn.functional, "linear_cross_entropy")
    assert not dataclasses.replace(variant, package="torch.nn.functional.linear_cross_entropies").runs_on("cpu")


def test_the_most_telling_shapes_come_first_on_a_gpu(run_python):
    listed = run_python(
        *("-m", "pytest", "benchmarks", "--collect-only", "-q", "-p", "no:cacheprovider", "--device=cuda"),
    )
    tests = [line for line in listed.splitlines() if "::" in line]
    assert "bench_trainer.py" in tests[0]
    groups = [re.search(r"bench_(\w+)\.py.*\[([\dx]+)-\w+-(\w+)-", test) for test in tests]
    groups = list(dict.fromkeys(group.groups() for group in groups if group))
    order = [(FAMILIES[name.split("_")[0]], shape, upstream) for name, shape, upstream in groups]
    assert {family.name for family, _, _ in order[:4]} == FAMILIES.keys()  # each has begun before any goes on
    for family in FAMILIES.values():
        shapes = [shape for of, shape, upstream in order if of is family and upstream == "upstream1"]
        assert shapes == list(family.gpu_shapes)
    assert all(upstream == "upstream1" for *_, upstream in order[: sum(len(f.gpu_shapes) for f in FAMILIES.values())])


def test_an_old_setuptools_is_named_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(run_gpu, "ROOT", tmp_path)
    monkeypatch.setattr(run_gpu, "run", lambda *arguments, **options: pytest.fail("built"))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "70.3.0")
    with pytest.raises(run_gpu.Failed, match="only setuptools 70.3.0: version 77 or newer"):
        run_gpu.build(100)
