"""Every published method against its own formula, written as its authors write it and independent of the package.

A new method is one row in ``METHODS``: the arguments the package makes from class counts, and the authors' loss.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ltkernels.functional as LF
from ltkernels import margins as M

N, C = 64, 12


def one_hot(y: Tensor, f: Tensor) -> Tensor:
    return F.one_hot(y, f.shape[1]).to(f.dtype)


def cross_entropy(f: Tensor, y: Tensor, n: Tensor) -> Tensor:
    p = torch.exp(f) / torch.exp(f).sum(1, keepdim=True)
    return -torch.log(p[torch.arange(len(y)), y]).mean()


def menon(f: Tensor, y: Tensor, n: Tensor, tau: float, margin: Tensor | None = None) -> Tensor:
    """log(1 + sum over j != y of e^Delta[y, j] e^(f_j - f_y)), arXiv:2007.07314."""
    losses = []
    for row, target in zip(f, y.tolist(), strict=True):
        others = [j for j in range(len(row)) if j != target]
        delta = tau * torch.log(n[others] / n[target]) + (0 if margin is None else margin[target])
        losses.append(torch.log(1 + (torch.exp(delta) * torch.exp(row[others] - row[target])).sum()))
    return torch.stack(losses).mean()


def balanced_softmax(f: Tensor, y: Tensor, n: Tensor) -> Tensor:
    """log(sum n_j e^f_j) - log(n_y e^f_y), arXiv:2007.10740."""
    weighted = n * torch.exp(f)
    return -torch.log(weighted.gather(1, y[:, None])[:, 0] / weighted.sum(1)).mean()


def ldam_margins(n: Tensor, max_m: float) -> Tensor:
    m_list = 1.0 / torch.sqrt(torch.sqrt(n))
    return m_list * (max_m / torch.max(m_list))


def ldam(f: Tensor, y: Tensor, n: Tensor, max_m: float, s: float, weight: Tensor | None = None) -> Tensor:
    """The released code of arXiv:1906.07413: a one-hot mask, its float copy, a matrix product for the margins."""
    index = torch.zeros_like(f, dtype=torch.bool).scatter_(1, y[:, None], True)
    index_float = index.to(f.dtype)
    batch_m = (ldam_margins(n, max_m)[None, :] @ index_float.T).view(-1, 1)
    return F.cross_entropy(s * torch.where(index, f - batch_m, f), y, weight=weight)


def cdt(f: Tensor, y: Tensor, n: Tensor, gamma: float) -> Tensor:
    """Temperatures a_j = (n_max / n_j)^gamma divide the logits, arXiv:2001.01385."""
    return F.cross_entropy(f / (n.max() / n) ** gamma, y)


def vector_scaling(f: Tensor, y: Tensor, n: Tensor, gamma: float, tau: float) -> Tensor:
    """The released code of arXiv:2103.01550: x / Delta + iota."""
    temperature = (1.0 / n) ** gamma
    return F.cross_entropy(f / (temperature / temperature.min()) + tau * torch.log(n / n.sum()), y)


def cosface(f: Tensor, y: Tensor, n: Tensor, m: float, s: float) -> Tensor:
    """-log e^(s(cos_y - m)) / (e^(s(cos_y - m)) + sum over j != y of e^(s cos_j)), arXiv:1801.09414."""
    target = s * (f.gather(1, y[:, None]) - m)
    others = (s * f).masked_fill(one_hot(y, f).bool(), -torch.inf)
    return (torch.logsumexp(torch.cat([target, others], dim=1), dim=1) - target[:, 0]).mean()


def cui_weight(n: Tensor, beta: float) -> Tensor:
    """The released code of arXiv:1901.05555, in NumPy."""
    effective_num = 1.0 - np.power(beta, n.double().numpy())
    weights = (1.0 - beta) / effective_num
    return torch.from_numpy(weights / np.sum(weights) * len(n)).to(n.dtype)


def class_balanced(f: Tensor, y: Tensor, n: Tensor, beta: float) -> Tensor:
    losses = -torch.log_softmax(f, 1)[torch.arange(len(y)), y]
    weight = cui_weight(n, beta)[y]
    return (weight * losses).sum() / weight.sum()  # PyTorch's mean, as in LDAM's code; Cui's divides by len(y)


def equalization(f: Tensor, y: Tensor, n: Tensor, threshold: float, gamma: float) -> Tensor:
    """w_k = 1 - beta T_lambda(f_k) (1 - y_k), p_j = e^z_j / sum_k w_k e^z_k, arXiv:2003.05176."""
    beta = (torch.rand(f.shape, generator=torch.Generator().manual_seed(0)) < gamma).to(f.dtype)
    w = 1 - beta * (n / n.sum() < threshold).to(f.dtype) * (1 - one_hot(y, f))
    p = torch.exp(f) / (w * torch.exp(f)).sum(1, keepdim=True)
    return F.nll_loss(torch.log(p), y)


def equalization_arguments(n: Tensor, y: Tensor) -> dict[str, Tensor]:
    tail = M.tail_classes(n, threshold=0.05)
    return {"mask": M.equalization_mask(y, tail, 0.9, generator=torch.Generator().manual_seed(0))}


@dataclass(frozen=True)
class Method:
    arguments: Callable[[Tensor, Tensor], dict]  # (class counts, target) -> keywords of margin_cross_entropy
    authors: Callable[[Tensor, Tensor, Tensor], Tensor]  # (logits, target, class counts) -> mean loss
    plain_if_balanced: bool = True  # equal class counts give cross-entropy


def from_counts(constructor: Callable[[Tensor], M.Margins]) -> Callable[[Tensor, Tensor], dict]:
    return lambda n, y: constructor(n).as_arguments()


METHODS = {
    "cross_entropy": Method(lambda n, y: {}, cross_entropy),
    "logit_adjustment": Method(from_counts(M.logit_adjustment), lambda f, y, n: menon(f, y, n, 1.0)),
    "logit_adjustment_tau": Method(
        from_counts(lambda n: M.logit_adjustment(n, tau=1.7)), lambda f, y, n: menon(f, y, n, 1.7)
    ),
    "pairwise_logit_adjustment": Method(
        from_counts(lambda n: M.pairwise_logit_adjustment(n, tau=0.6)), lambda f, y, n: menon(f, y, n, 0.6)
    ),
    "balanced_softmax": Method(from_counts(M.balanced_softmax), balanced_softmax),
    "ldam": Method(from_counts(M.ldam), lambda f, y, n: ldam(f, y, n, 0.5, 30), plain_if_balanced=False),
    "ldam_drw": Method(
        lambda n, y: M.ldam(n).replace(weight=M.DeferredReweighting(n, 160).weight(170)).as_arguments(),
        lambda f, y, n: ldam(f, y, n, 0.5, 30, cui_weight(n, 0.9999)),
        plain_if_balanced=False,
    ),
    "cdt": Method(from_counts(M.class_dependent_temperatures), lambda f, y, n: cdt(f, y, n, 0.2)),
    "vector_scaling": Method(
        from_counts(lambda n: M.vector_scaling(n, gamma=0.3, tau=1.2)),
        lambda f, y, n: vector_scaling(f, y, n, 0.3, 1.2),
    ),
    "adaptive_logit_adjustment": Method(
        from_counts(lambda n: M.adaptive_logit_adjustment(n, tau=1.3, max_margin=0.8)),
        lambda f, y, n: menon(f, y, n, 1.3, ldam_margins(n, 0.8)),
        plain_if_balanced=False,
    ),
    "equalization": Method(
        equalization_arguments, lambda f, y, n: equalization(f, y, n, 0.05, 0.9), plain_if_balanced=False
    ),
    "cosface": Method(
        from_counts(lambda n: M.cosface(0.35, 16.0, num_classes=len(n))),
        lambda f, y, n: cosface(f, y, n, 0.35, 16.0),
        plain_if_balanced=False,
    ),
    "cosface_of_any_number_of_classes": Method(
        from_counts(lambda n: M.cosface(0.35, 16.0)),
        lambda f, y, n: cosface(f, y, n, 0.35, 16.0),
        plain_if_balanced=False,
    ),
    "class_balanced": Method(
        lambda n, y: {"weight": M.class_balanced_weight(n, beta=0.999)}, lambda f, y, n: class_balanced(f, y, n, 0.999)
    ),
}

# Not sorted: a method must not depend on the order of the classes.
PROFILES = {
    "exponential": torch.tensor([5.0, 500, 61, 7, 330, 219, 41, 27, 145, 96, 18, 12]),
    "step": torch.tensor([5000.0, 50] * (C // 2)),
    "tied_minimum": torch.tensor([1.0, 1] + [1280] * (C - 2)),
}


def batch(dtype: torch.dtype, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits uniform in [-spread, spread], cosines for spread 1, and targets with every class among them."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * (2 * torch.rand(N, C, dtype=torch.float64, generator=generator) - 1)
    target = torch.cat([torch.arange(C), torch.randint(C, (N - C,), generator=generator)])
    return logits.to(dtype), target


def loss_and_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    value = loss(logits)
    return value.detach(), torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize("spread", [1.0, 8.0])
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", METHODS)
def test_equals_authors_formula(name: str, dtype: torch.dtype, profile: str, spread: float) -> None:
    method, counts = METHODS[name], PROFILES[profile]
    logits, target = batch(dtype, spread)
    arguments = method.arguments(counts, target)
    value, gradient = loss_and_gradient(lambda f: LF.margin_cross_entropy(f, target, **arguments), logits)
    assert value.dtype == gradient.dtype == dtype

    def authors(f: Tensor) -> Tensor:
        return method.authors(f, target, counts.to(f.dtype))

    exact_value, exact_gradient = loss_and_gradient(authors, logits.double())
    # Class vectors are float32, also for float64 logits: one rounding of each term of v, of which the largest counts.
    largest = arguments.get("scale", 1.0) * spread + 10
    rounding = largest * 2.0**-24
    if dtype == torch.float32:
        eager_value, eager_gradient = loss_and_gradient(authors, logits)
        assert (value - exact_value).abs() <= 2 * (eager_value - exact_value).abs() + 4 * rounding
        error, eager_error = (gradient - exact_gradient).abs().max(), (eager_gradient - exact_gradient).abs().max()
        assert error <= 2 * eager_error + 4 * rounding * exact_gradient.abs().max()
    else:
        assert (value - exact_value).abs() <= 2 * rounding
        assert (gradient - exact_gradient).abs().max() <= 2 * rounding * exact_gradient.abs().max()


@pytest.mark.parametrize("name", [name for name in METHODS if name != "equalization"])
def test_class_permutation(name: str) -> None:
    """Renaming the classes renames the gradient's columns. (Equalisation draws by position: excluded.)"""
    counts = PROFILES["exponential"]
    logits, target = batch(torch.float64, 2.0)
    permutation = torch.randperm(C, generator=torch.Generator().manual_seed(1))
    renamed = torch.argsort(permutation)[target]

    def loss(n: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda f: LF.margin_cross_entropy(f, y, **METHODS[name].arguments(n, y))

    value, gradient = loss_and_gradient(loss(counts, target), logits)
    permuted_value, permuted_gradient = loss_and_gradient(loss(counts[permutation], renamed), logits[:, permutation])
    torch.testing.assert_close(permuted_value, value, rtol=1e-6, atol=0)  # sums over classes round in another order
    torch.testing.assert_close(permuted_gradient, gradient[:, permutation], rtol=1e-5, atol=1e-9)


def test_every_function_of_class_counts_is_in_a_row() -> None:
    """A margin loss that nobody compares with its authors' formula is not one of this library."""
    rows = Path(__file__).read_text()
    helpers = {"effective_number", "post_hoc_logit_adjustment"}  # no arguments of a loss: for tests/test_margins.py
    functions = {name for name in M.__all__ if name.islower()} - helpers
    assert not [name for name in sorted(functions) if re.search(rf"\bM\.{name}\b", rows) is None]


@pytest.mark.parametrize("name", METHODS)
def test_shift_invariance(name: str) -> None:
    """A constant added to all logits of a sample changes nothing, unless classes have temperatures."""
    logits, target = batch(torch.float64, 2.0)
    arguments = METHODS[name].arguments(PROFILES["exponential"], target)
    shift = torch.linspace(-50, 50, N, dtype=torch.float64)[:, None]
    value = LF.margin_cross_entropy(logits, target, **arguments)
    shifted = LF.margin_cross_entropy(logits + shift, target, **arguments)
    assert torch.allclose(shifted, value, rtol=1e-10) == ("logit_scale" not in arguments)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.plain_if_balanced])
def test_balanced_classes_give_cross_entropy(name: str) -> None:
    logits, target = batch(torch.float64, 3.0)
    value = LF.margin_cross_entropy(logits, target, **METHODS[name].arguments(torch.full((C,), 40.0), target))
    torch.testing.assert_close(value, F.cross_entropy(logits, target), rtol=1e-6, atol=0)


counts_strategy = st.lists(st.floats(1, 1e6), min_size=2, max_size=20)
seeds = st.integers(0, 2**31)


def draw(counts: list[float], seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(16, len(counts), dtype=torch.float64, generator=generator)
    return logits, torch.randint(len(counts), (16,), generator=generator)


@settings(deadline=None, max_examples=30)
@given(counts_strategy, seeds)
def test_zero_strength_is_cross_entropy(counts: list[float], seed: int) -> None:
    logits, target = draw(counts, seed)
    expected = F.cross_entropy(logits, target)
    for margins in (
        M.logit_adjustment(counts, tau=0),
        M.pairwise_logit_adjustment(counts, tau=0),
        M.class_dependent_temperatures(counts, gamma=0),
        M.vector_scaling(counts, gamma=0, tau=0),
        M.ldam(counts, max_margin=0, scale=1),
        M.adaptive_logit_adjustment(counts, tau=0, max_margin=0),
        M.cosface(0, 1, num_classes=len(counts)),
        M.Margins(weight=M.class_balanced_weight(counts, beta=0)),
    ):
        value = LF.margin_cross_entropy(logits, target, **margins.as_arguments())
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(counts_strategy, seeds, st.floats(0, 3))
def test_equivalent_forms(counts: list[float], seed: int, tau: float) -> None:
    """Balanced softmax is logit adjustment at tau = 1; pairwise margins log pi_j / pi_y are biases log pi_j."""
    logits, target = draw(counts, seed)

    def loss(margins: M.Margins) -> tuple[Tensor, Tensor]:
        return loss_and_gradient(lambda f: LF.margin_cross_entropy(f, target, **margins.as_arguments()), logits)

    for one, other in (
        (M.balanced_softmax(counts), M.logit_adjustment(counts, tau=1)),
        (M.pairwise_logit_adjustment(counts, tau), M.logit_adjustment(counts, tau)),
        (M.adaptive_logit_adjustment(counts, tau, max_margin=0), M.logit_adjustment(counts, tau)),
        (M.vector_scaling(counts, gamma=0.2, tau=0), M.class_dependent_temperatures(counts, gamma=0.2)),
    ):
        for a, b in zip(loss(one), loss(other), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # float32 class vectors of size up to 3 log 1e7


@settings(deadline=None, max_examples=30)
@given(counts_strategy, seeds, st.floats(0, 3))
def test_post_hoc_undoes_the_loss(counts: list[float], seed: int, tau: float) -> None:
    """Cross-entropy of h is logit adjustment of f where h = f + tau log pi; post-hoc adjustment takes h to f."""
    f, target = draw(counts, seed)
    margins = M.logit_adjustment(counts, tau)
    h = f + margins.logit_bias.double()
    value = LF.margin_cross_entropy(f, target, **margins.as_arguments())
    torch.testing.assert_close(value, F.cross_entropy(h, target), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(M.post_hoc_logit_adjustment(h, counts, tau), f, rtol=0, atol=1e-5)


def test_both_forms_find_the_balanced_bayes_classifier() -> None:
    """With p(x|y) known: post-hoc adjustment of log p(y|x) predicts argmax p(x|y), where the plain argmax does not;
    and f = log p(x|y) is a stationary point of the expected logit-adjusted loss, so training finds it."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([1000.0, 100, 10, 1])
    likelihood = torch.softmax(2 * torch.randn(50, 4, dtype=torch.float64, generator=generator), dim=0)  # p(x|y)
    joint = likelihood * (counts / counts.sum())
    log_posterior = torch.log(joint / joint.sum(1, keepdim=True))
    bayes = likelihood.argmax(1)
    assert (log_posterior.argmax(1) != bayes).any()
    assert torch.equal(M.post_hoc_logit_adjustment(log_posterior, counts).argmax(1), bayes)

    target = torch.arange(4).repeat(50)

    def expected_loss(f: Tensor) -> Tensor:
        rows = f.repeat_interleave(4, dim=0)
        bias = M.logit_adjustment(counts).logit_bias
        return LF.margin_cross_entropy(rows, target, logit_bias=bias, sample_weight=joint.flatten(), reduction="sum")

    assert loss_and_gradient(expected_loss, likelihood.log())[1].abs().max() < 1e-8
    assert loss_and_gradient(expected_loss, log_posterior)[1].abs().max() > 1e-3


def test_guide() -> None:
    """The code of the guide runs, and the guide names every public function."""
    guide = (Path(__file__).parent.parent / "docs" / "margins.md").read_text()
    for name in M.__all__:
        assert name in guide, f"docs/margins.md does not mention {name}"
    blocks = guide.split("```python\n")[1:]
    assert len(blocks) >= 3
    namespace: dict = {}
    for block in blocks:
        exec(block.split("```")[0], namespace)
