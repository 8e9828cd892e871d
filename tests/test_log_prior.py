"""log_prior, the vector of prior_counts: its accuracy, its dtypes, and the transforms that see through it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from ltkernels._ops import log_prior, log_prior_direct


def definition(counts: Tensor, tau: float) -> Tensor:
    counts = counts.double()
    return tau * (counts / counts.sum()).log()


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 16, 100, 1003])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64, torch.bfloat16])
def test_values(size: int, dtype: torch.dtype) -> None:
    counts = torch.randint(1, 200, (size,), generator=torch.Generator().manual_seed(size)).to(dtype)
    prior = log_prior(counts, 0.7)
    assert prior.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-14 if dtype == torch.float64 else 5e-7
    torch.testing.assert_close(prior.double(), definition(counts, 0.7), rtol=tolerance, atol=tolerance)


def test_logarithm_of_all_magnitudes() -> None:
    """With a total of 1, the prior is the logarithm itself: within 2 units in the last place for all exponents."""
    exponents = torch.linspace(-148, -3, 4096, dtype=torch.float64)
    counts = torch.exp2(exponents).float()
    counts = torch.cat([counts, counts.new_tensor([2.0**-149, 2.0**-126, 0.5])])
    counts *= 1 / counts.double().sum().float()
    counts = counts[counts > 0]
    got, want = log_prior(counts, 1.0).double(), definition(counts, 1.0)
    ulp = torch.finfo(torch.float32).eps * want.abs().clamp(min=0.5)
    assert ((got - want).abs() <= 2 * ulp).all()


def test_near_one_class() -> None:
    """One class that has nearly all samples: log of a number close to 1."""
    counts = torch.tensor([1e7, 1.0])
    torch.testing.assert_close(log_prior(counts, 1.0).double(), definition(counts, 1.0), rtol=0, atol=2e-6)


def test_strides_and_memory() -> None:
    counts = torch.arange(1, 41).float()
    before = counts.clone()
    assert torch.equal(log_prior(counts[::2], 1.0), log_prior(counts[::2].clone(), 1.0))
    assert torch.equal(counts, before)


def test_gradient() -> None:
    counts = torch.tensor([3.0, 4.0, 50.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda n: log_prior(n, 1.3), (counts,))


def test_transforms() -> None:
    counts = torch.arange(1, 13).float().reshape(2, 6)
    want = torch.stack([definition(row, 1.0) for row in counts]).float()
    torch.testing.assert_close(torch.vmap(lambda n: log_prior(n, 1.0))(counts), want)
    compiled = torch.compile(lambda n: log_prior(n, 1.0) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(counts[0]), want[0] + 1)
    row = counts[0]
    with FakeTensorMode() as mode:
        assert log_prior(mode.from_tensor(row), 1.0).shape == (6,)
    assert log_prior(counts[0].to("meta"), 1.0).shape == (6,)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 7, 8, 9])
def test_bad_counts(bad: float, at: int) -> None:
    counts = torch.ones(10)
    counts[at] = bad
    with pytest.raises(ValueError, match=f"prior_counts: expected finite counts above 0, got {bad:g} for class {at}"):
        log_prior(counts, 1.0)


@pytest.mark.parametrize(
    "bad", [torch.ones(2, 2), torch.tensor(3.0), torch.ones(3, dtype=torch.bool), torch.ones(3) * 1j]
)
def test_bad_tensors(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="prior_counts: expected real numbers of shape"):
        log_prior(bad, 1.0)


def test_direct_call() -> None:
    """Without torch.ops: the same numbers, and what is not a plain tensor and a float goes the generic way."""
    counts = torch.arange(1, 101)
    for arguments in ((counts, 0.5), (counts, 1), (torch.nn.Parameter(counts.float()), 0.5)):
        assert torch.equal(log_prior_direct(*arguments), log_prior(*arguments))
    learned = counts[:3].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda n: log_prior_direct(n, 0.5), (learned,))
    for wrong in ((), (counts,), (counts, "1"), ([1.0], 1.0), (counts, 1.0, 1.0)):
        with pytest.raises((TypeError, RuntimeError)):
            log_prior_direct(*wrong)
    with pytest.raises(ValueError, match="got 0 for class 0"):
        log_prior_direct(counts - 1, 1.0)
