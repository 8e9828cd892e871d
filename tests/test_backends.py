"""LTKERNELS_BACKEND: each value in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

PROGRAM = """
import json, torch
import ltkernels.functional as LF
from ltkernels import _ops

torch.manual_seed(0)
numbers = []
for shape in ((5, 7), (7,), (5, 7, 3)):
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    options = dict(
        weight=torch.rand(7), logit_scale=torch.rand(7) + 0.5, logit_bias=torch.randn(7), target_margin=torch.rand(7),
        pairwise_margin=torch.randn(7, 7), scale=torch.tensor(1.5, requires_grad=True), mask=torch.arange(7) != 6,
        sample_weight=torch.rand(rows), label_smoothing=0.1,
    )
    for reduction in ("mean", "sum", "none"):
        target = torch.randint(6, rows)
        loss, lse = LF.margin_cross_entropy(logits, target, reduction=reduction, return_lse=True, **options)
        loss = loss.sum() + lse.sum()
        grads = torch.autograd.grad(loss, [logits, options["scale"]])
        numbers += [loss.item(), *(x for grad in grads for x in grad.flatten().tolist())]
print(json.dumps({"numbers": numbers, "calls": _ops.kernel_calls(), "backend": _ops.BACKEND}))
"""

SECOND_DERIVATIVE = """
import torch
import torch.nn.functional as F
import ltkernels.functional as LF

logits, target = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.arange(4)
for function in (LF.margin_cross_entropy, F.cross_entropy):
    (grad,) = torch.autograd.grad(function(logits, target), logits, create_graph=True)
    print(torch.autograd.grad(grad.square().sum(), logits)[0].tolist())
assert torch.autograd.gradgradcheck(lambda x: LF.margin_cross_entropy(x, target, logit_bias=torch.arange(6.0)), logits)
torch.func.hessian(lambda x: LF.margin_cross_entropy(x, target))(logits.detach())
torch.func.jvp(lambda x: LF.margin_cross_entropy(x, target), (logits.detach(),), (torch.ones(4, 6).double(),))
"""


def test_reference_gives_the_same_numbers(run_python: Callable[..., str]) -> None:
    kernel = json.loads(run_python("-c", PROGRAM, LTKERNELS_BACKEND="auto"))
    reference = json.loads(run_python("-c", PROGRAM, LTKERNELS_BACKEND="reference"))
    assert kernel["calls"] and kernel["backend"] == "auto"
    assert reference["calls"] == {} and reference["backend"] == "reference"
    torch.testing.assert_close(torch.tensor(kernel["numbers"]), torch.tensor(reference["numbers"]))


def test_reference_has_second_derivatives_and_forward_mode(run_python: Callable[..., str]) -> None:
    ours, torchs = run_python("-c", SECOND_DERIVATIVE, LTKERNELS_BACKEND="reference").splitlines()[-2:]
    torch.testing.assert_close(torch.tensor(json.loads(ours)), torch.tensor(json.loads(torchs)))


def test_reference_gives_the_same_errors(run_python: Callable[..., str]) -> None:
    file = Path(__file__).with_name("test_errors.py")
    assert " passed" in run_python("-m", "pytest", "-q", str(file), LTKERNELS_BACKEND="reference")


def test_unknown_backend(run_python: Callable[..., str]) -> None:
    error = run_python("-c", "import ltkernels.functional", LTKERNELS_BACKEND="cudnn", fails=True)
    assert "ImportError: LTKERNELS_BACKEND: expected one of auto, reference, got 'cudnn'" in error


UNREAD = """
import torch
import ltkernels.functional as LF

logits = torch.randn(4, 5, requires_grad=True)
for number in (9, -1):
    target = torch.tensor([0, 1, 2, number])
    for reduction in ("none", "sum", "mean"):
        loss = torch.compile(LF.margin_cross_entropy, backend="eager")(logits, target, reduction=reduction)
        finite = loss.isfinite().tolist()
        assert finite == ([True, True, True, False] if reduction == "none" else False), (reduction, loss)
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad[3].isnan().any(), grad


def contrasted(z, tau):
    return LF.contrastive_loss(z, temperature=tau, positive_index=LF.view_pairs(4))


loss = torch.compile(contrasted, backend="eager")(torch.randn(4, 3), torch.tensor(-0.1))
assert loss.isnan(), loss
"""


def test_the_definition_gives_no_number_for_values_that_nobody_reads(run_python: Callable[..., str]) -> None:
    run_python("-c", UNREAD, LTKERNELS_BACKEND="reference")
