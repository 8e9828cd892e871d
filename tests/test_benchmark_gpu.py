"""`make gpu` where there is no GPU: what it runs, in which order, and what is left if the time runs out."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import re
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are part of the repository, not of the installed package

from benchmarks import linear, run_gpu  # noqa: E402
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


@pytest.mark.parametrize("parallel", [[], ["-n", "2", "--dist", "worksteal"]], ids=["alone", "side by side"])
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
