"""Cases of the linear form: the gradient in place of the logits of a chunk."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from row_cases import case

import ltkernels.functional as LF


def gradients(loss: torch.Tensor, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


@case
def linear_form_in_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    for classes in (5, 37, 130):
        features = torch.randn(11, 6, generator=generator, requires_grad=True)
        classifier = torch.randn(classes, 6, generator=generator, requires_grad=True)
        bias = torch.randn(classes, generator=generator)
        target = torch.randint(classes, (11,), generator=generator)
        target[3] = -100
        got = LF.linear_margin_cross_entropy(features, classifier, target, logit_bias=bias, chunk_size=4)
        want = F.cross_entropy(F.linear(features.double(), classifier.double()) + bias, target)
        torch.testing.assert_close(got.double(), want)
        for g, w in zip(gradients(got, features, classifier), gradients(want, features, classifier), strict=True):
            torch.testing.assert_close(g, w)


@case
def gradient_in_place_of_the_logits() -> None:
    logits = torch.randn(7, 37, generator=torch.Generator().manual_seed(0))
    arguments = (torch.arange(7), *(None,) * 10, 1.0, 1.0, -1, 1, -100, 0.1)
    ops = torch.ops.ltkernels
    loss, stats, grad = ops.margin_softmax_fwd(logits, *arguments, True)
    overwritten = logits.clone()
    loss_, stats_ = ops.margin_softmax_fwd_(overwritten, *arguments)
    assert torch.equal(loss, loss_) and torch.equal(stats, stats_) and torch.equal(grad, overwritten)
