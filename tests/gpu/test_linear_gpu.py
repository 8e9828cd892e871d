"""Classifier and loss in one on a GPU, against the CPU in float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from behaviour import check_no_synchronisation, check_same_bits_every_time
from torch import Tensor

import ltkernels.functional as LF
from ltkernels import _ops
from ltkernels.neighbors import NeighborMap

sys.path.insert(0, str(Path(__file__).parents[1]))
from oracle import same_bits  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]

CUDA = "cuda"
N, D, C = 300, 48, 130
GENERATOR = torch.Generator().manual_seed(0)
FEATURES = torch.randn(N, D, generator=GENERATOR)
CLASSIFIER = torch.randn(C, D, generator=GENERATOR) / D**0.5
TARGET = torch.randint(C - 10, (N,), generator=GENERATOR).index_fill(0, torch.tensor([5]), -100)
BIAS, WEIGHT = torch.linspace(-2, 2, C), torch.linspace(0.5, 2, C)
NEIGHBORS = NeighborMap.from_pairs([(a % 90, a) for a in range(90, C)], num_classes=90, num_auxiliary=C - 90)

OPTIONS: dict[str, dict] = {
    "plain": {},
    "bias and weight": {"logit_bias": BIAS, "weight": WEIGHT, "label_smoothing": 0.1},
    "linear bias": {"linear_bias": torch.linspace(0, 1, C)},
    "cosine": {"cosine": True, "scale": 16.0, "target_margin": torch.linspace(0, 0.5, C)},
    "sum": {"reduction": "sum", "mask": torch.arange(C) < C - 4},
    "none": {"reduction": "none", "sample_weight": torch.linspace(0.5, 2, N)},
    "neighbors": {"neighbors": NEIGHBORS, "neighbor_weight": 0.1},
}


def on(device: str, dtype: torch.dtype, chunk_size: int | str, **options) -> list[Tensor]:
    """Loss, gradients to features and classifier, and by-products, on a device."""
    neighbors = options.pop("neighbors", None)
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    if "linear_bias" in options:
        options["linear_bias"] = options["linear_bias"].to(dtype)
    features, classifier = (x.to(device, dtype).requires_grad_() for x in (FEATURES, CLASSIFIER))
    arguments = (features, classifier, TARGET.to(device))
    options |= {"chunk_size": chunk_size, "return_lse": True, "return_stats": True}
    if neighbors is None:
        loss, lse, stats = LF.linear_margin_cross_entropy(*arguments, **options)
    else:
        loss, lse, stats = LF.linear_auxiliary_cross_entropy(*arguments, neighbors.to(device), **options)
    gradients = torch.autograd.grad(loss.sum(), (features, classifier), retain_graph=True)
    again = torch.autograd.grad(loss.sum(), (features, classifier))
    assert all(same_bits(a, b) for a, b in zip(gradients, again, strict=True))
    return [x.detach() for x in (loss, lse, stats.row_loss, *gradients)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("chunk_size", [64, "auto"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, chunk_size: int | str, dtype: torch.dtype) -> None:
    rounded = [x.to(dtype).double() for x in (FEATURES, CLASSIFIER)]
    want = on_rounded(rounded, name)
    got = on(CUDA, dtype, chunk_size, **OPTIONS[name])
    unit = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 3e-2)  # logits are rounded to 16 bits
    for x, y in zip(got, want, strict=True):
        assert x.dtype == (dtype if x.shape in (FEATURES.shape, CLASSIFIER.shape) else acc(dtype))
        assert (x.cpu().double() - y).abs().amax() <= unit * y.abs().amax()


def acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_rounded(inputs: list[Tensor], name: str) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "FEATURES", inputs[0])
        patch.setattr(sys.modules[__name__], "CLASSIFIER", inputs[1])
        return on("cpu", torch.float64, "auto", **OPTIONS[name])


@pytest.mark.parametrize("cosine", [False, True], ids=["linear", "cosine"])
def test_the_gradient_of_a_mean_is_ready_after_the_forward_pass(cosine: bool) -> None:
    """Without by-products and learned margins: the one-pass path, and its gradients under another upstream one."""
    before = _ops.kernel_calls()
    results = []
    for device, dtype in ((CUDA, torch.float32), ("cpu", torch.float64)):
        features, classifier = (x.to(device, dtype).requires_grad_() for x in (FEATURES, CLASSIFIER))
        loss = LF.linear_margin_cross_entropy(
            features, classifier, TARGET.to(device), cosine=cosine, logit_bias=BIAS.to(device), chunk_size=100
        )
        results.append([loss.detach(), *torch.autograd.grad(loss * -2.5, (features, classifier))])
    assert any(count > before.get(name, 0) for name, count in _ops.kernel_calls().items() if name.startswith("triton."))
    for x, y in zip(*results, strict=True):
        assert (x.cpu().double() - y).abs().amax() <= 1e-5 * y.abs().amax()


def test_predictions() -> None:
    _, stats = LF.linear_margin_cross_entropy(
        FEATURES.to(CUDA), CLASSIFIER.to(CUDA), TARGET.to(CUDA), logit_bias=BIAS.to(CUDA), return_stats=True
    )
    predicted = (FEATURES.double() @ CLASSIFIER.double().T).argmax(1)
    assert stats.predicted.cpu().tolist() == predicted.tolist()
    assert stats.correct.cpu().tolist() == (predicted == TARGET).tolist()


def test_autocast_without_synchronisation() -> None:
    features, classifier = (x.to(CUDA).requires_grad_() for x in (FEATURES, CLASSIFIER))
    target = TARGET.to(CUDA)

    def step() -> tuple[Tensor, ...]:
        with torch.autocast(CUDA, dtype=torch.bfloat16):
            loss = LF.linear_margin_cross_entropy(features, classifier, target)
        return torch.autograd.grad(loss, (features, classifier))

    assert all(gradient.dtype == torch.float32 for gradient in step())
    check_no_synchronisation(step)
    check_same_bits_every_time(step)
