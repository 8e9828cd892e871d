"""The same bits for any number of threads, and calls from several threads at once."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from oracle import Problem, evaluate, public, same_bits
from problems import DIFFERENTIABLE, FEATURES, make_problem
from torch import Tensor

import ltkernels.functional as LF

PLAIN = {name: values[0] for name, values in FEATURES.items()}
FULL = PLAIN | {"affine": "scale_bias", "margin": "both_margins", "weight": "both_weights", "grads": "grad_all"}

# Rows and classes that many, some and no threads can share; a block of the column sums is 64 rows.
PROBLEMS: dict[str, dict] = {
    "many_rows": FULL | {"rows": 1000, "classes": 100},
    "odd_blocks": FULL | {"rows": 197, "classes": 333, "mask": "row_mask", "smoothing": 0.1, "reduction": "none"},
    "all_blocks": FULL | {"rows": 4096, "classes": 10, "target": "ignored", "lse": "lse"},
    "few_rows": FULL | {"rows": 3, "classes": 1000, "reduction": "sum"},
    "learned_scale": FULL | {"rows": 500, "classes": 64, "affine": "learned_scale"},
    "probabilities": FULL | {"rows": 300, "classes": 77, "margin": "target_margin", "target": "probabilities"},
    "precomputed": PLAIN | {"rows": 2000, "classes": 128, "grads": "grad_logits", "weight": "both_weights"},
    "bfloat16": FULL | {"rows": 700, "classes": 100, "dtype": torch.bfloat16},
    "neighbors": FULL | {"rows": 700, "classes": 100, "neighbors": "silence_back", "weight": "class_weight"},
    "float64": FULL | {"rows": 700, "classes": 100, "dtype": torch.float64},
}
every_problem = pytest.mark.parametrize("features", PROBLEMS.values(), ids=PROBLEMS)


@pytest.fixture(autouse=True)
def threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(problem: Problem) -> dict[str, Tensor]:
    return evaluate(public, problem)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not same_bits(one[name], other[name])] == []


def test_problems_cover_every_gradient() -> None:
    names = {name for features in PROBLEMS.values() for name in make_problem(features).requires_grad}
    assert names == {"logits", *DIFFERENTIABLE}


@every_problem
def test_same_bits_for_any_number_of_threads(features: dict) -> None:
    problem = make_problem(features)
    torch.set_num_threads(1)
    want = run(problem)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        for _ in range(3):
            assert_same(run(problem), want)


@pytest.mark.parametrize("name", ["many_rows", "odd_blocks", "all_blocks", "bfloat16", "float64"])
def test_same_bits_whatever_else_is_in_the_batch(name: str) -> None:
    """A row's loss depends on no other row: its place in a block does not matter."""
    changes = {"reduction": "none", "mask": "no_mask", "lse": "no_lse", "grads": "no_grad"}
    problem = make_problem(PROBLEMS[name] | changes)
    whole = run(problem)["loss"]
    for rows in (slice(0, 1), slice(1, 3), slice(2, None)):
        options = problem.options | {"sample_weight": problem.options["sample_weight"][rows]}
        part = LF.margin_cross_entropy(problem.logits[rows], problem.target[rows], **options)
        assert same_bits(part, whole[rows])


# ------------------------------------------------------------------------------------------------- several threads


@pytest.mark.parametrize("inner", [1, 3])
def test_calls_from_several_threads(inner: int) -> None:
    """Forward and backward in eight Python threads at once, each with a parallel region of its own."""
    torch.set_num_threads(inner)
    problems = [make_problem(features) for features in PROBLEMS.values()]
    wanted = [run(problem) for problem in problems]
    barrier = threading.Barrier(8)

    def work(worker: int) -> None:
        torch.set_num_threads(inner)
        barrier.wait()
        for step in range(2 * len(problems)):
            k = (worker + step) % len(problems)
            assert_same(run(problems[k]), wanted[k])

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, worker) for worker in range(8)]:
            done.result(timeout=300)


def test_one_graph_from_several_threads() -> None:
    """Backward passes over one retained graph, at once: each right, none scaled twice."""
    problem = make_problem(PROBLEMS["precomputed"])
    logits = problem.logits.requires_grad_()
    loss = LF.margin_cross_entropy(logits, problem.target, **problem.options)
    (want,) = torch.autograd.grad(loss, logits, retain_graph=True)

    def work(factor: float) -> Tensor:
        return torch.autograd.grad(loss, logits, torch.tensor(factor), retain_graph=True)[0]

    factors = [2.0**k for k in range(-8, 8)]
    with ThreadPoolExecutor(8) as pool:
        for factor, got in zip(factors, pool.map(work, factors), strict=True):
            assert same_bits(got, want * factor)


PARALLEL_REGION = """
void run(int n, void (*task)(int)) {
#pragma omp parallel for num_threads(n)
  for (int i = 0; i < n; ++i) task(i);
}
"""


def test_inside_a_parallel_region(tmp_path: Path) -> None:
    """A nested parallel region of the same OpenMP runtime: the kernel runs on the thread it is called from."""
    runtimes = loaded_openmp_runtimes()
    if shutil.which("gcc") is None or len(runtimes) != 1:
        pytest.skip("needs gcc and one OpenMP runtime")
    source, library = tmp_path / "region.c", tmp_path / "region.so"
    source.write_text(PARALLEL_REGION)
    subprocess.run(["gcc", "-fopenmp", "-fPIC", "-c", source, "-o", tmp_path / "region.o"], check=True)
    subprocess.run(["gcc", "-shared", tmp_path / "region.o", *runtimes, "-o", library], check=True)
    torch.set_num_threads(3)
    problems = [make_problem(features) for features in PROBLEMS.values()]
    wanted = [run(problem) for problem in problems]
    got: dict[int, list] = {}

    inside = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))["_ZN2at18in_parallel_regionEv"]
    inside.restype = ctypes.c_bool

    def task(i: int) -> None:
        got[i] = [run(problem) for problem in problems] if inside() else []

    callback = ctypes.CFUNCTYPE(None, ctypes.c_int)(task)
    ctypes.CDLL(str(library)).run(4, callback)
    assert sorted(got) == [0, 1, 2, 3]
    for results in got.values():
        for result, want in zip(results, wanted, strict=True):
            assert_same(result, want)


def test_error_in_one_thread_leaves_the_others_alone() -> None:
    problem = make_problem(PROBLEMS["many_rows"])
    want = run(problem)
    bad = problem.target.clone()
    bad[7] = 100

    def work(worker: int) -> None:
        for _ in range(5):
            if worker % 2:
                with pytest.raises(IndexError, match="at row 7"):
                    LF.margin_cross_entropy(problem.logits.detach(), bad)
            else:
                assert_same(run(problem), want)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def loaded_openmp_runtimes() -> list[str]:
    maps = Path("/proc/self/maps")
    files = {line.split()[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()
    return sorted(file for file in files if re.match(r"lib(gomp|omp|iomp5)[.-]", file.rpartition("/")[2]))


OPENMP = """
import torch, ltkernels.functional as LF
from test_threads import loaded_openmp_runtimes
loss = LF.margin_cross_entropy(torch.randn(1000, 100, requires_grad=True), torch.zeros(1000, dtype=torch.long))
loss.backward()
print(*loaded_openmp_runtimes())
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_one_openmp_runtime(run_python: Callable[..., str]) -> None:
    """A second runtime would start threads of its own, and twice as many as there are cores."""
    libraries = run_python("-c", OPENMP).split()
    assert len(libraries) == 1 and "gomp" in libraries[0]


DATA_PARALLEL_FORK = """
import os, torch, ltkernels.functional as LF
torch.set_num_threads(2)
logits, target = torch.randn(1000, 100), torch.zeros(1000, dtype=torch.long)
want = LF.margin_cross_entropy(logits, target)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as a DataLoader worker does
    os._exit(int(LF.margin_cross_entropy(logits, target) != want))
assert os.waitpid(child, 0)[1] == 0
print("same")
"""


def test_in_a_forked_process(run_python: Callable[..., str]) -> None:
    """As in a DataLoader worker, after the parent has used its threads."""
    assert run_python("-c", DATA_PARALLEL_FORK, timeout=120).split() == ["same"]
