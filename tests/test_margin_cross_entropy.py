"""The kernels of margin_cross_entropy against the definition in float64, over shapes, dtypes, layouts and options."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import Problem, check, definition, deviation, evaluate, upstream_of
from problems import FEATURES, covering_set, describe, make_problem, one_at_a_time, possible

import ltkernels.functional as LF
from ltkernels import _ops

# Which instruction sets this processor has; torch obeys ATEN_CPU_CAPABILITY even where it lacks them.
CPU_FLAGS = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
VARIANTS = {"default": True, "avx2": "avx2" in CPU_FLAGS, "avx512": "avx512bw" in CPU_FLAGS}


@pytest.mark.parametrize("features", covering_set(), ids=describe)
def test_every_pair_of_features(features: dict) -> None:
    check(make_problem(features))


@pytest.mark.parametrize("features", one_at_a_time(rows=19, classes=100, grads="grad_logits"), ids=describe)
def test_each_feature_alone(features: dict) -> None:
    """What pairs hide: a fault in one option that every other option in its company makes up for."""
    check(make_problem(features))


# Around every vector width: 1 to 16 lanes, one and two vectors a step, a tail of every length.
CLASSES = (*range(1, 36), 63, 64, 65, 100, 127, 257)
SMALL = FEATURES | {"rows": (0, 1, 2, 3, 5, 33, 130), "classes": CLASSES}
PLAIN = {name: values[0] for name, values in FEATURES.items()}
EXAMPLES = 1000 if "ATEN_CPU_CAPABILITY" in os.environ else 3000  # the others run in test_every_instruction_set


@pytest.mark.variants
@settings(max_examples=EXAMPLES)
@given(
    features=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in SMALL.items()}).filter(possible),
    seed=st.integers(0, 2**20),
)
@example(features=PLAIN | {"rows": 5, "classes": 3, "content": "minus_inf"}, seed=0)
def test_random_options(one_thread: None, features: dict, seed: int) -> None:
    check(make_problem(features, seed))


@pytest.mark.variants
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [10, 64, 100])
def test_sixteen_bit_gradients_are_rounded_to_nearest(dtype: torch.dtype, classes: int) -> None:
    """All but those whose exact value lies within float32's errors of the middle between two numbers."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(512, classes, generator=generator).to(dtype).requires_grad_()
    target, bias = torch.randint(classes, (512,), generator=generator), torch.randn(classes, generator=generator)
    (got,) = torch.autograd.grad(LF.margin_cross_entropy(logits, target, logit_bias=bias), logits)
    exact = F.one_hot(target, classes).double().neg_().add_((logits.double() + bias).softmax(1)).div_(512)
    assert (got == exact.to(dtype)).double().mean() > 0.998


@pytest.mark.variants
def test_kernel_of_this_instruction_set() -> None:
    """The kernel that runs is the one torch's own capability asks for, in forward and backward."""
    variant = torch.ops.ltkernels.cpu_capability().lower()
    before = _ops.kernel_calls()
    logits = torch.randn(4, 5, requires_grad=True)
    LF.margin_cross_entropy(logits.detach(), torch.arange(4))
    LF.margin_cross_entropy(logits, torch.arange(4)).backward()
    LF.margin_cross_entropy(logits, torch.arange(4), reduction="none").sum().backward()
    ran = {name: count - before.get(name, 0) for name, count in _ops.kernel_calls().items()}
    assert {name: count for name, count in ran.items() if count} == {
        f"cpu.{variant}.margin_softmax.forward": 2,
        f"cpu.{variant}.margin_softmax.forward_gradient": 1,
        f"cpu.{variant}.margin_softmax.backward": 1,
    }
    if requested := os.environ.get("ATEN_CPU_CAPABILITY"):
        assert requested == variant


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_instruction_set(variant: str, run_python: Callable[..., str]) -> None:
    """The tests marked `variants` once more, with the kernels of another instruction set."""
    if not VARIANTS[variant]:
        pytest.skip(f"this processor has no {variant}")
    if variant == torch.ops.ltkernels.cpu_capability().lower():
        pytest.skip("the instruction set of this process")
    tests = Path(__file__).parent
    files = [str(tests / name) for name in ("test_margin_cross_entropy.py", "test_edge_cases.py")]
    summary = run_python("-m", "pytest", "-q", "-m", "variants", *files, ATEN_CPU_CAPABILITY=variant)
    assert " passed" in summary and "skipped" not in summary


# ---------------------------------------------------------------------------------------------------- large problems


@pytest.mark.large
@pytest.mark.parametrize(
    ("rows", "classes", "dtype"),
    [
        (128, 50304, torch.float32),
        (128, 50304, torch.float16),
        (4096, 8142, torch.float32),
        (4096, 8142, torch.float64),
        (4096, 50304, torch.bfloat16),
    ],
)
def test_large(rows: int, classes: int, dtype: torch.dtype) -> None:
    """Against the definition in blocks of rows, which fit in memory."""
    features = PLAIN | {"rows": rows, "classes": classes, "dtype": dtype, "affine": "scale_bias", "reduction": "sum"}
    problem = make_problem(features | {"margin": "target_margin", "weight": "both_weights", "target": "ignored"})
    logits = problem.logits.requires_grad_()
    loss = LF.margin_cross_entropy(logits, problem.target, **problem.options)
    (grad,) = torch.autograd.grad(loss, logits, upstream_of(loss))
    total = torch.zeros((), dtype=torch.float64)
    eager_total = torch.zeros((), dtype=loss.dtype)
    for start in range(0, rows, 64):
        block = slice(start, start + 64)
        options = problem.options | {"sample_weight": problem.options["sample_weight"][block]}
        part = Problem(logits.detach()[block], problem.target[block], options)
        exact, eager = (evaluate(definition, p) for p in (part.double(), part))
        total += exact["loss"]
        eager_total += eager["loss"]
        assert deviation(grad[block], exact["dlogits"], eager["dlogits"]) is None
    assert deviation(loss.detach(), total, eager_total) is None


@pytest.mark.large
def test_more_than_2_to_the_31_logits() -> None:
    """The last rows lie beyond a 32-bit offset; 4.3 GB each of logits and gradient, most of them untouched zeros."""
    classes = 50304
    rows = 2**31 // classes + 3
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16)
    logits[-2:] = torch.randn(2, classes)
    target = torch.arange(rows) % classes
    loss = LF.margin_cross_entropy(logits, target, reduction="none")
    expected = torch.nn.functional.cross_entropy(logits[-3:].double(), target[-3:], reduction="none")
    torch.testing.assert_close(loss[-3:].double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss[:-2], torch.full((rows - 2,), classes).log(), rtol=1e-6, atol=0)

    (grad,) = torch.autograd.grad(LF.margin_cross_entropy(logits.requires_grad_(), target, reduction="sum"), logits)
    tail = logits.detach()[-3:].double().requires_grad_()
    torch.nn.functional.cross_entropy(tail, target[-3:], reduction="sum").backward()
    torch.testing.assert_close(grad[-3:].double(), tail.grad, rtol=2**-8, atol=1e-9)
    for row in (1, rows // 2):  # equal rows with their own targets
        assert torch.equal(grad[row, target[row]], grad[0, 0]) and torch.equal(grad[row, 0], grad[0, 1])
