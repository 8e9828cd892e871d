"""What few callers do: arguments of odd types, layouts and devices get an answer or an error that names them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ltkernels.functional as LF
import ltkernels.nn as LN
from ltkernels import margins as M
from ltkernels.neighbors import NeighborMap

COUNTS = torch.tensor([50.0, 20, 9, 3, 1])
LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 4, 2, 1, 3, 0])
Z = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
NEIGHBORS = NeighborMap.from_pairs([(0, 3), (1, 4)], num_classes=3, num_auxiliary=2)
HUGE = 10**400


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_function_takes_the_counts_of_each_call() -> None:
    def loss(logits: Tensor, counts: Tensor) -> Tensor:
        return LF.auxiliary_cross_entropy(logits, TARGET.clamp(max=2), NEIGHBORS, prior_counts=counts)

    traced = torch.jit.trace(loss, (LOGITS, COUNTS))
    assert torch.allclose(traced(LOGITS, COUNTS.flip(0)), loss(LOGITS, COUNTS.flip(0)))
    assert not torch.allclose(loss(LOGITS, COUNTS), loss(LOGITS, COUNTS.flip(0)))


# Nothing to read: the meta device


@pytest.mark.parametrize(
    "make",
    [
        lambda: LN.MarginCrossEntropyLoss(scale=nn.Parameter(torch.tensor(30.0))),
        lambda: LN.MarginCrossEntropyLoss(logit_bias=nn.Parameter(torch.zeros(3))),
        lambda: LN.LDAMLoss([5, 3, 1]).to("meta"),
        lambda: M.ldam([5, 3, 1]).to("meta"),
    ],
)
def test_modules_are_built_without_values(make: Callable) -> None:
    with torch.device("meta"):
        make()


def test_counts_without_values_are_refused() -> None:
    with pytest.raises(ValueError, match="class_counts: expected counts, got a meta tensor"):
        M.ldam(torch.ones(3, device="meta"))


# Layouts


@pytest.mark.parametrize(
    "convert", [Tensor.to_sparse, Tensor.to_sparse_csr, Tensor.to_mkldnn], ids=["coo", "csr", "mkldnn"]
)
@pytest.mark.parametrize("name", ["query", "key", "extra_positive"])
def test_contrastive_embeddings_of_other_layouts(name: str, convert: Callable) -> None:
    arguments = {"query": Z, "key": Z.clone(), "extra_positive": Z.clone()}
    arguments[name] = convert(arguments[name])
    with pytest.raises(TypeError, match=f"{name}: expected a dense tensor"):
        LF.contrastive_loss(**arguments, temperature=0.5)


@pytest.mark.parametrize(
    "name", ["labels", "allowed", "key_bias", "pair_margin", "sample_weight", "temperature", "log_normalizer"]
)
def test_contrastive_options_of_other_layouts(name: str) -> None:
    options = {"labels": TARGET, "temperature": torch.full((6,), 0.5), "allowed": torch.ones(6, 6, dtype=torch.bool)}
    options |= {"key_bias": torch.ones(6), "pair_margin": torch.ones(5, 5), "sample_weight": torch.ones(6)}
    if name == "log_normalizer":
        options |= {"log_normalizer": torch.ones(6), "denominator": "negatives"}
    options[name] = options[name].to_sparse()
    with pytest.raises(TypeError, match=f"{name}: expected a dense tensor"):
        LF.contrastive_loss(Z, **options)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("query", lambda: LF.similarity_logsumexp(Z.to_sparse(), temperature=0.5)),
        (
            "query",
            lambda: LF.contrastive_loss(torch.nested.nested_tensor([Z[:2], Z[2:]]), temperature=0.5, labels=TARGET),
        ),
        ("embeddings", lambda: LN.BalancedContrastiveLoss()(Z.to_sparse(), TARGET, Z[:5])),
        ("prototypes", lambda: LN.BalancedContrastiveLoss()(Z, TARGET, Z[:5].to_sparse())),
        ("embeddings", lambda: LN.SupConLoss(0.1)(Z.to_sparse(), TARGET)),
        ("logits", lambda: LF.auxiliary_predict(LOGITS.to_sparse(), 3)),
        ("logits", lambda: LF.mask_auxiliary(LOGITS.to_sparse(), 3)),
        ("class_counts", lambda: M.ldam(COUNTS.to_sparse())),
        ("logit_bias", lambda: M.Margins(logit_bias=COUNTS.to_sparse())),
        (
            "prior_counts",
            lambda: LF.auxiliary_cross_entropy(LOGITS, TARGET.clamp(max=2), NEIGHBORS, prior_counts=COUNTS.to_sparse()),
        ),
    ],
)
def test_other_functions_and_layouts(name: str, call: Callable) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected a dense tensor"):
        call()


# Types


@pytest.mark.parametrize("value", ["False", 0, 1, None, torch.tensor(True)], ids=repr)
@pytest.mark.parametrize("name", ["normalize", "scale_by_temperature", "return_stats"])
def test_flags_of_contrastive_loss(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected a bool"):
        LF.contrastive_loss(Z, temperature=0.5, labels=TARGET, **{name: value})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_targets_of_the_equalization_loss(dtype: torch.dtype) -> None:
    loss = LN.EqualizationLoss(COUNTS, 0.1, 0.0)
    assert torch.equal(loss(LOGITS, TARGET.to(dtype)), loss(LOGITS, TARGET))


def test_ignore_index_of_numpy() -> None:
    loss = LN.LDAMLoss(COUNTS, ignore_index=np.int64(2))
    assert type(loss.ignore_index) is int and "ignore_index=2" in repr(loss)
    assert torch.equal(torch.compile(loss, backend="eager")(LOGITS, TARGET), loss(LOGITS, TARGET))


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([1, 0, 3, 2, 5, 4], TypeError, "expected an integer Tensor, got list"),
        (torch.tensor([1.0, 0, 3, 2, 5, 4]), TypeError, "expected an integer Tensor, got torch.float32"),
        (torch.tensor([1, 0, 3]), ValueError, r"expected shape \(6,\), got \(3,\)"),
    ],
)
def test_positive_index_of_macl(index: object, error: type, message: str) -> None:
    with pytest.raises(error, match=f"positive_index: {message}"):
        LN.MACLLoss()(Z, index)


@pytest.mark.parametrize(
    "call",
    [
        lambda z: LN.MACLLoss()(z),
        lambda z: LN.ISogCLRLoss(9, 0.1)(z, torch.arange(3)),
        lambda z: LN.BalancedContrastiveLoss()(z, TARGET, z[:5]),
        lambda z: LN.SupConLoss(0.1)(z, TARGET),
    ],
)
def test_integer_embeddings(call: Callable) -> None:
    assert call(Z).isfinite()
    with pytest.raises(TypeError, match="embeddings: expected a floating dtype, got torch.int64"):
        call(Z.long())


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("scale", lambda: LN.LDAMLoss([5, 3, 1], scale=HUGE)),
        ("scale", lambda: M.Margins(scale=HUGE)),
        ("tau", lambda: M.logit_adjustment([5, 3, 1], tau=HUGE)),
        ("label_smoothing", lambda: LN.LDAMLoss([5, 3, 1], label_smoothing=HUGE)),
        ("temperature", lambda: LN.NTXentLoss(HUGE)),
        ("temperature", lambda: LF.contrastive_loss(Z, temperature=HUGE, labels=TARGET)),
        (
            "tau",
            lambda: LF.auxiliary_cross_entropy(LOGITS, TARGET.clamp(max=2), NEIGHBORS, prior_counts=COUNTS, tau=HUGE),
        ),
        ("temperature_range", lambda: LN.ISogCLRLoss(9, 0.1, temperature_range=(1, 2, 3))),
        ("temperature_range", lambda: LN.ISogCLRLoss(9, 0.1, temperature_range=0.5)),
        ("num_classes", lambda: LN.LinearMarginCrossEntropyLoss(4, 4, M.ldam(COUNTS))),
        ("num_classes", lambda: LN.LinearMarginCrossEntropyLoss(4, 6, logit_bias=COUNTS)),
        ("chunk_size", lambda: LN.LinearMarginCrossEntropyLoss(4, 5, chunk_size="x")),
    ],
)
def test_values_that_no_argument_can_have(name: str, call: Callable) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        call()


@pytest.mark.parametrize("name", ["bias", "cosine"])
def test_flags_of_the_linear_module(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected a bool, got str"):
        LN.LinearMarginCrossEntropyLoss(4, 5, **{name: "no"})


def test_flag_of_the_balanced_contrastive_loss() -> None:
    with pytest.raises(TypeError, match="count_anchor: expected a bool, got str"):
        LN.BalancedContrastiveLoss(count_anchor="no")


# Devices


@pytest.mark.parametrize(
    ("names", "call"),
    [
        ("prototypes", lambda: LN.BalancedContrastiveLoss()(Z, TARGET, Z[:5].to("meta"))),
        ("tail", lambda: M.equalization_mask(TARGET, torch.ones(5, dtype=torch.bool, device="meta"), 0.5)),
        (
            "logit_bias, prior_counts",
            lambda: LF.auxiliary_cross_entropy(
                LOGITS, TARGET.clamp(max=2), NEIGHBORS, prior_counts=COUNTS, logit_bias=COUNTS.to("meta")
            ),
        ),
    ],
)
def test_other_devices(names: str, call: Callable) -> None:
    with pytest.raises(ValueError, match=f"{names}: expected .* on "):
        call()
