"""LinearMarginCrossEntropyLoss: a classifier and its loss are the two modules they stand for, one after the other."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from ltkernels import margins
from ltkernels import nn as LN

COUNTS = torch.tensor([90, 30, 10, 4, 1])
D, C = 16, len(COUNTS)
METHODS = {
    "plain": (None, {}),
    "bias": (None, {"bias": True}),
    "logit_adjustment": (margins.logit_adjustment(COUNTS), {"bias": True, "label_smoothing": 0.1}),
    "vector_scaling": (margins.vector_scaling(COUNTS, 0.2, 1.0), {"reduction": "sum"}),
    "ldam": (margins.ldam(COUNTS), {"cosine": True}),
    "drw": (margins.ldam(COUNTS), {"cosine": True, "weight": margins.class_balanced_weight(COUNTS)}),
}


def example(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(*shape, D, generator=generator).to(dtype).requires_grad_()
    return input, torch.randint(C, shape, generator=generator)


def gradients(loss: torch.Tensor, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss.sum(), leaves)


@pytest.mark.parametrize("method", METHODS)
def test_is_classifier_then_loss(method: str) -> None:
    torch.manual_seed(0)
    given, options = METHODS[method]
    module = LN.LinearMarginCrossEntropyLoss(D, C, given, chunk_size=3, **options).double()
    separate = LN.MarginCrossEntropyLoss(
        given, **{name: x for name, x in options.items() if name not in ("bias", "cosine")}
    )
    input, target = example(10, dtype=torch.float64)
    leaves = (input, *module.classifier.parameters())
    ours, theirs = module(input, target), separate(module.classifier(input), target)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # margins are float32
    for got, want in zip(gradients(ours, *leaves), gradients(theirs, *leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_shapes_and_stats() -> None:
    module = LN.LinearMarginCrossEntropyLoss(D, C, reduction="none")
    input, target = example(4, 3)
    loss, stats = module(input, target, return_stats=True)
    assert loss.shape == stats.row_loss.shape == stats.predicted.shape == stats.correct.shape == (4, 3)
    assert torch.equal(stats.predicted, module.logits(input).argmax(-1))


def test_a_learned_margin_and_a_tied_weight() -> None:
    embedding = nn.Embedding(C, D)
    bias = nn.Parameter(torch.zeros(C))
    module = LN.LinearMarginCrossEntropyLoss(D, C, logit_bias=bias)
    module.classifier.weight = embedding.weight
    input, target = example(10)
    module(input, target).backward()
    assert embedding.weight.grad is not None and bias.grad is not None
    assert len(list(module.parameters())) == 2


def test_a_frozen_classifier() -> None:
    module = LN.LinearMarginCrossEntropyLoss(D, C).requires_grad_(False)
    input, target = example(10)
    module(input, target).backward()
    assert input.grad is not None and module.classifier.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_the_classifier_and_of_the_margins(dtype: torch.dtype) -> None:
    module = LN.LinearMarginCrossEntropyLoss(D, C, margins.logit_adjustment(COUNTS), bias=True).to(dtype)
    assert module.classifier.weight.dtype == module.classifier.bias.dtype == dtype
    assert module.logit_bias.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    input, target = example(10, dtype=dtype)
    module(input, target).backward()
    assert input.grad.dtype == module.classifier.weight.grad.dtype == dtype


def test_state_copy_and_pickle() -> None:
    module = LN.LinearMarginCrossEntropyLoss(D, C, margins.ldam(COUNTS), cosine=True, chunk_size=4)
    input, target = example(10)
    expected = module(input, target)
    assert set(module.state_dict()) == {"classifier.weight", "target_margin"}
    other = LN.LinearMarginCrossEntropyLoss(D, C, margins.ldam(COUNTS.flip(0)), cosine=True)
    other.load_state_dict(module.state_dict())
    for twin in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(twin(input, target), expected)
    assert "chunk_size=4" in repr(module) and "CosineLinear" in repr(module) and "scale=30" in repr(module)


def test_set_epoch() -> None:
    schedule = margins.DeferredReweighting(COUNTS, 2)
    module = LN.LinearMarginCrossEntropyLoss(D, C, weight=schedule)
    before = module.weight.clone()
    module.set_epoch(2)
    assert not torch.equal(module.weight, before) and torch.equal(module.weight, schedule.weight(2))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"in_features": 0}, ValueError, "in_features"),
        ({"num_classes": 2.5}, TypeError, "num_classes"),
        ({"bias": True, "cosine": True}, ValueError, "bias"),
        ({"margins": "ldam"}, TypeError, "margins"),
    ],
)
def test_errors(arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        LN.LinearMarginCrossEntropyLoss(**({"in_features": D, "num_classes": C} | arguments))


def test_errors_of_a_call() -> None:
    input, target = example(10)
    with pytest.raises(ValueError, match="chunk_size"):
        LN.LinearMarginCrossEntropyLoss(D, C, chunk_size=0)(input, target)
    with pytest.raises(ValueError, match="linear_weight"):
        LN.LinearMarginCrossEntropyLoss(D + 1, C)(input, target)
