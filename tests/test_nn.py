"""Loss modules: agreement with the functional form, and the conventions of ``torch.nn`` modules."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ltkernels.functional as LF
from ltkernels import margins as M
from ltkernels import nn as lnn

COUNTS = [500, 20, 1280, 5, 80]

# name: (module with the given options, the keywords it should pass on)
LOSSES: dict[str, tuple[Callable[..., lnn.MarginCrossEntropyLoss], M.Margins]] = {
    "plain": (lnn.MarginCrossEntropyLoss, M.Margins()),
    "margins": (
        lambda **options: lnn.MarginCrossEntropyLoss(M.cosface(0.3, 8.0, num_classes=5), **options),
        M.cosface(0.3, 8.0, num_classes=5),
    ),
    "tensors": (
        lambda **options: lnn.MarginCrossEntropyLoss(
            M.ldam(COUNTS, scale=1.0),
            logit_scale=torch.tensor(0.7),
            logit_bias=torch.arange(5.0),
            pairwise_margin=torch.arange(25.0).reshape(5, 5) / 10,
            scale=torch.tensor(1.5),
            **options,
        ),
        M.ldam(COUNTS).replace(
            logit_scale=torch.tensor(0.7),
            logit_bias=torch.arange(5.0),
            pairwise_margin=torch.arange(25.0).reshape(5, 5) / 10,
            scale=1.5,
        ),
    ),
    "logit_adjusted": (lambda **o: lnn.LogitAdjustedLoss(COUNTS, 1.5, **o), M.logit_adjustment(COUNTS, 1.5)),
    "balanced_softmax": (lambda **o: lnn.BalancedSoftmaxLoss(COUNTS, **o), M.balanced_softmax(COUNTS)),
    "ldam": (lambda **o: lnn.LDAMLoss(COUNTS, 0.4, 20.0, **o), M.ldam(COUNTS, 0.4, 20.0)),
    "cdt": (lambda **o: lnn.CDTLoss(COUNTS, 0.3, **o), M.class_dependent_temperatures(COUNTS, 0.3)),
    "vs": (lambda **o: lnn.VSLoss(COUNTS, 0.15, 1.25, **o), M.vector_scaling(COUNTS, 0.15, 1.25)),
    "equalization": (lambda **o: lnn.EqualizationLoss(COUNTS, 0.0, 0.9, **o), M.Margins()),  # no tail: no mask
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(16, 5, generator=generator).to(dtype).requires_grad_()
    return logits, torch.randint(5, (16,), generator=generator)


def value_and_gradient(loss: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)  # the equalisation mask
    logits, target = batch(dtype)
    value = loss(logits, target)
    return value.detach(), torch.autograd.grad(value.sum(), logits)[0]


def assert_same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


# Agreement with the functional form


@every_loss
def test_equals_function(name: str) -> None:
    make, margins = LOSSES[name]
    logits, target = batch()
    options = {"reduction": "none", "ignore_index": 2, "label_smoothing": 0.1}
    weight = torch.tensor([0.5, 1, 2, 3, 4])
    call = {"mask": torch.tensor([True, True, False, True, True]), "sample_weight": torch.rand(16)}
    value = make(weight=weight, **options)(logits, target, **call)
    expected = LF.margin_cross_entropy(logits, target, weight, **margins.as_arguments(), **options, **call)
    assert value.shape == (16,) and value.isfinite().all()
    torch.testing.assert_close(value, expected)
    plain = make()(logits, target)
    torch.testing.assert_close(plain, LF.margin_cross_entropy(logits, target, **margins.as_arguments()))
    assert not torch.allclose(value.mean(), plain)


def test_defaults_are_the_papers() -> None:
    assert_same(value_and_gradient(lnn.LDAMLoss(COUNTS)), value_and_gradient(lnn.LDAMLoss(COUNTS, 0.5, 30)))
    assert_same(value_and_gradient(lnn.LogitAdjustedLoss(COUNTS)), value_and_gradient(lnn.BalancedSoftmaxLoss(COUNTS)))
    assert_same(value_and_gradient(lnn.CDTLoss(COUNTS)), value_and_gradient(lnn.VSLoss(COUNTS, 0.2, 0)))
    assert_same(value_and_gradient(lnn.MarginCrossEntropyLoss()), value_and_gradient(nn.CrossEntropyLoss()))


@pytest.mark.parametrize("mask_shape", [None, (5,), (6, 5), (6, 5, 2)])
def test_equalization_loss(mask_shape: tuple[int, ...] | None) -> None:
    loss = lnn.EqualizationLoss(COUNTS, threshold=0.05, gamma=0.6)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, 2, generator=generator)
    target = torch.zeros(6, 2, dtype=torch.int64)
    torch.manual_seed(7)
    drawn = M.equalization_mask(target, torch.tensor([False, True, False, True, True]), 0.6)
    assert not drawn.all()
    mask, allowed = None, drawn
    if mask_shape is not None:
        mask = torch.rand(mask_shape, generator=generator) < 0.7
        mask[(slice(None), 0) if len(mask_shape) > 1 else 0] = True  # not the target
        allowed = drawn & mask.reshape({1: (1, 5, 1), 2: (6, 5, 1), 3: (6, 5, 2)}[mask.dim()])
    torch.manual_seed(7)
    value = loss(logits, target, mask=mask)
    torch.testing.assert_close(value, F.cross_entropy(logits.masked_fill(~allowed, -torch.inf), target))
    assert loss(logits, target, mask=mask) != value  # a new draw at every call


# Conventions of torch.nn


@every_loss
def test_state_dict_round_trip(name: str) -> None:
    make, _ = LOSSES[name]
    loss, other = make(), make()
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(state)
    assert_same(value_and_gradient(other), value_and_gradient(loss))
    assert set(state) == {key for key, _ in loss.named_buffers()}


@every_loss
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_pickle_and_deepcopy(name: str, duplicate: Callable) -> None:
    loss = LOSSES[name][0](weight=M.DeferredReweighting(COUNTS, 3))
    again = duplicate(loss)
    again.set_epoch(3)
    assert torch.equal(loss.weight, torch.ones(5))
    loss.set_epoch(3)
    assert_same(value_and_gradient(again), value_and_gradient(loss))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_keeps_class_vectors_float32(name: str, dtype: torch.dtype) -> None:
    make, _ = LOSSES[name]
    model = nn.Sequential(nn.Linear(2, 2), make(weight=M.class_balanced_weight(COUNTS)))
    before = {key: x.clone() for key, x in model[1].named_buffers()}
    model.to(dtype)
    assert model[0].weight.dtype == dtype
    for key, buffer in model[1].named_buffers():
        assert buffer.dtype == (torch.bool if key == "tail" else torch.float32)
        assert torch.equal(buffer, before[key])
    value, gradient = value_and_gradient(model[1], dtype)
    assert value.dtype == torch.float32 and gradient.dtype == dtype and gradient.abs().sum() > 0


@every_loss
def test_double_and_back(name: str) -> None:
    loss = LOSSES[name][0]().double()
    assert all(buffer.dtype == torch.float64 for key, buffer in loss.named_buffers() if key != "tail")
    assert value_and_gradient(loss, torch.float64)[0].dtype == torch.float64
    assert_same(value_and_gradient(loss.float()), value_and_gradient(LOSSES[name][0]()))


@every_loss
def test_moves_to_a_device(name: str) -> None:
    loss = LOSSES[name][0](weight=torch.ones(5)).to("meta")
    assert {buffer.device.type for buffer in loss.buffers()} == {"meta"}


@every_loss
def test_compiles_without_graph_breaks(name: str) -> None:
    loss = LOSSES[name][0](weight=M.DeferredReweighting(COUNTS, 3))
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for epoch in (0, 3):  # the weights change in place: the compiled step sees them
        loss.set_epoch(epoch)
        assert_same(value_and_gradient(compiled), value_and_gradient(loss))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda: lnn.MarginCrossEntropyLoss(), "MarginCrossEntropyLoss(reduction='mean')"),
        (
            lambda: lnn.LogitAdjustedLoss(COUNTS, 1.5, label_smoothing=0.1, ignore_index=7),
            "LogitAdjustedLoss(tau=1.5, logit_bias=(5,), reduction='mean', ignore_index=7, label_smoothing=0.1)",
        ),
        (
            lambda: lnn.MarginCrossEntropyLoss(M.cosface(0.3, 8, num_classes=2)),
            "MarginCrossEntropyLoss(target_margin=(2,), scale=8.0, reduction='mean')",
        ),
        (lambda: lnn.BalancedSoftmaxLoss(COUNTS), "BalancedSoftmaxLoss(logit_bias=(5,), reduction='mean')"),
        (
            lambda: lnn.LDAMLoss(COUNTS, scale=1, weight=M.DeferredReweighting(COUNTS, 9), reduction="sum"),
            "LDAMLoss(max_margin=0.5, target_margin=(5,), weight=DeferredReweighting(start_epoch=9, beta=0.9999), "
            + "reduction='sum')",
        ),
        (
            lambda: lnn.CDTLoss(COUNTS, weight=torch.ones(5), reduction="sum"),
            "CDTLoss(gamma=0.2, logit_scale=(5,), weight=(5,), reduction='sum')",
        ),
        (
            lambda: lnn.VSLoss(COUNTS, 0.1, 1.2),
            "VSLoss(gamma=0.1, tau=1.2, logit_scale=(5,), logit_bias=(5,), reduction='mean')",
        ),
        (
            lambda: lnn.EqualizationLoss(COUNTS, 0.05, 0.9),
            "EqualizationLoss(threshold=0.05, gamma=0.9, reduction='mean')",
        ),
        (lambda: lnn.CosineLinear(3, 4), "CosineLinear(in_features=3, out_features=4)"),
    ],
)
def test_repr(loss: Callable[[], nn.Module], expected: str) -> None:
    assert repr(loss()) == expected


def test_module_does_not_share_memory_with_its_arguments() -> None:
    """load_state_dict writes in place: it must not reach the margins, nor another loss made of them."""
    margins = M.logit_adjustment(COUNTS)
    before = margins.logit_bias.clone()
    one, other = lnn.MarginCrossEntropyLoss(margins), lnn.MarginCrossEntropyLoss(margins)
    one.load_state_dict({"logit_bias": torch.zeros(5)})
    assert torch.equal(margins.logit_bias, before) and torch.equal(other.logit_bias, before)


# Learned margins, schedule


def test_parameters_are_learned() -> None:
    bias, scale = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.tensor(10.0))
    loss = lnn.MarginCrossEntropyLoss(M.ldam(COUNTS, scale=1.0), logit_bias=bias, scale=scale)
    assert dict(loss.named_parameters()).keys() == {"logit_bias", "scale"}
    assert loss.logit_bias is bias and loss.scale is scale
    assert set(loss.state_dict()) == {"logit_bias", "scale", "target_margin"}
    loss.half()
    assert loss.scale.dtype == torch.float32
    logits, target = batch()
    before = loss(logits, target)
    before.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (bias, scale, logits))
    torch.optim.SGD(loss.parameters(), lr=0.01).step()
    assert loss(logits, target) < before


@every_loss
def test_deferred_reweighting(name: str) -> None:
    make, margins = LOSSES[name]
    loss = make(weight=M.DeferredReweighting(COUNTS, start_epoch=3, beta=0.99))
    memory = loss.weight.data_ptr()
    logits, target = batch()
    for epoch, weight in ((0, None), (2, None), (3, M.class_balanced_weight(COUNTS, 0.99)), (1, None)):
        loss.set_epoch(epoch)
        expected = LF.margin_cross_entropy(logits, target, weight, **margins.as_arguments())
        torch.testing.assert_close(loss(logits, target), expected)
    assert loss.weight.data_ptr() == memory
    loss.double().set_epoch(3)
    assert loss.weight.dtype == torch.float64
    with pytest.raises(ValueError, match="^epoch: expected at least 0, got -1"):
        loss.set_epoch(-1)


def test_resuming_after_the_switch() -> None:
    """A state saved late loads into a module made anew, although uniform weights need no tensor."""
    loss = lnn.LDAMLoss(COUNTS, weight=M.DeferredReweighting(COUNTS, 3))
    loss.set_epoch(5)
    resumed = lnn.LDAMLoss(COUNTS, weight=M.DeferredReweighting(COUNTS, 3))
    resumed.load_state_dict(loss.state_dict())
    assert torch.equal(resumed.weight, M.class_balanced_weight(COUNTS))


def test_set_epoch_without_schedule_does_nothing() -> None:
    weight = torch.arange(5.0)
    loss = lnn.LDAMLoss(COUNTS, weight=weight)
    loss.set_epoch(500)
    assert torch.equal(loss.weight, weight)
    lnn.BalancedSoftmaxLoss(COUNTS).set_epoch(3)


# Errors


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: lnn.LogitAdjustedLoss([1, 0]), ValueError, "^class_counts: "),
        (lambda: lnn.LogitAdjustedLoss(COUNTS, tau=-1), ValueError, "^tau: "),
        (lambda: lnn.BalancedSoftmaxLoss("500"), TypeError, "^class_counts: "),
        (lambda: lnn.LDAMLoss(COUNTS, max_margin=-0.5), ValueError, "^max_margin: "),
        (lambda: lnn.LDAMLoss(COUNTS, scale=0), ValueError, "^scale: "),
        (lambda: lnn.LDAMLoss(COUNTS, weight=torch.ones(4)), ValueError, r"^weight: expected shape \(5,\).*got \(4,\)"),
        (lambda: lnn.LDAMLoss(COUNTS, weight=[1.0] * 5), TypeError, "^weight: expected a floating Tensor, got list"),
        (lambda: lnn.LDAMLoss(COUNTS, weight=M.DeferredReweighting([1, 2], 3)), ValueError, r"^weight: .*got \(2,\)"),
        (lambda: lnn.CDTLoss(COUNTS, gamma=-1), ValueError, "^gamma: "),
        (lambda: lnn.VSLoss(COUNTS, 0.1, tau=None), TypeError, "^tau: "),
        (lambda: lnn.EqualizationLoss(COUNTS, threshold=2, gamma=0.9), ValueError, "^threshold: "),
        (lambda: lnn.EqualizationLoss(COUNTS, threshold=0.1, gamma=-1), ValueError, "^gamma: "),
        (
            lambda: lnn.MarginCrossEntropyLoss(COUNTS),
            TypeError,
            "^margins: expected ltkernels.margins.Margins, got list",
        ),
        (lambda: lnn.MarginCrossEntropyLoss(M.ldam(COUNTS), scale=3), ValueError, "^scale: set in both"),
        *(
            (lambda r=r: lnn.MarginCrossEntropyLoss(reduction=r), ValueError, f"^reduction: .*'mean'.*got {r!r}$")
            for r in ("average", None, 1)
        ),
        *(
            (lambda e=e: lnn.VSLoss(COUNTS, 0.1, 1.0, label_smoothing=e), ValueError, rf"^label_smoothing: .*got {e}$")
            for e in (-0.1, 1.5, float("nan"))
        ),
        (lambda: lnn.LDAMLoss(COUNTS, label_smoothing=torch.tensor(0.1)), TypeError, "^label_smoothing: expected a nu"),
        (
            lambda: lnn.MarginCrossEntropyLoss(weight=nn.Parameter(torch.ones(3))),
            ValueError,
            "^weight: expected a tensor without gradient",
        ),
        (
            lambda: lnn.MarginCrossEntropyLoss(logit_bias=torch.ones(3, requires_grad=True)),
            ValueError,
            "^logit_bias: expected an nn.Parameter or a tensor without gradient",
        ),
        (lambda: lnn.CosineLinear(0, 3), ValueError, "^in_features: expected at least 1, got 0"),
        (lambda: lnn.CosineLinear(3, 2.0), TypeError, "^out_features: expected an integer, got float"),
        (lambda: lnn.CosineLinear(3, 2, eps=0), ValueError, "^eps: expected a finite number > 0, got 0"),
        (lambda: lnn.CosineLinear(2, 3)(torch.ones(4, 5)), ValueError, r"^input: .*\(\.\.\., 2\), got \(4, 5\)"),
        (lambda: lnn.CosineLinear(2, 3)(torch.tensor(1.0)), ValueError, r"^input: expected shape .*, got \(\)"),
        (lambda: lnn.CosineLinear(2, 3)(torch.ones(4, 2).long()), TypeError, "^input: expected a float.*torch.int64"),
        (lambda: lnn.CosineLinear(2, 3)([1.0, 2.0]), TypeError, "^input: expected a floating Tensor, got list"),
        *(
            (lambda x=x: lnn.LogitAdjustedLoss(COUNTS, ignore_index=x), error, f"^ignore_index: expected an int.*{got}")
            for x, error, got in (("a", TypeError, "str"), (1.5, TypeError, "float"), (2**70, ValueError, "72"))
        ),
    ],
)
def test_errors(make: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(4, dtype=torch.bool), ValueError, r"^mask: expected shape \(5,\) or \(16, 5\), got \(4,\)$"),
        (torch.ones(5, 16, dtype=torch.bool), ValueError, r"^mask: expected shape .*got \(5, 16\)$"),
        (torch.tensor(True), ValueError, r"^mask: expected shape .*got \(\)$"),
        ([True] * 5, TypeError, "^mask: expected a boolean Tensor or None, got list$"),
        (torch.ones(5), TypeError, "^mask: expected a boolean Tensor or None, got torch.float32$"),
        (torch.ones(5, dtype=torch.uint8), TypeError, "^mask: .*got torch.uint8$"),
    ],
)
def test_equalization_mask_errors(mask: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lnn.EqualizationLoss(COUNTS, threshold=0.05, gamma=0.9)(*batch(), mask=mask)


# CosineLinear


@pytest.mark.parametrize("shape", [(8, 6), (6,), (2, 3, 6)])
def test_cosine_linear(shape: tuple[int, ...]) -> None:
    layer = lnn.CosineLinear(6, 4)
    x = torch.randn(shape)
    expected = F.cosine_similarity(x[..., None, :], 3 * layer.weight, dim=-1)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(1e-6 * x), expected)
    assert layer(x).shape == (*shape[:-1], 4)


def test_cosine_linear_gradient() -> None:
    layer = lnn.CosineLinear(3, 2, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(forward, (x, layer.weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_cosine_linear_in_every_dtype(dtype: torch.dtype) -> None:
    """A zero vector has no direction: value and gradient 0, also in float16, where eps itself is 0."""
    layer = lnn.CosineLinear(64, 4).to(dtype)
    x = torch.randn(5, 64).to(dtype)
    x[0], x[1] = 0, 40000 if dtype == torch.float16 else 1e5  # whose square overflows float16
    x.requires_grad_()
    cosine = layer(x)
    assert cosine.dtype == dtype and not cosine[0].any() and cosine.isfinite().all()
    expected = F.linear(F.normalize(x[1:].double(), dim=1), F.normalize(layer.weight.double(), dim=1))
    assert (cosine[1:] - expected).abs().max() <= 2 * torch.finfo(dtype).eps
    cosine.sum().backward()
    assert not x.grad[0].any() and x.grad.isfinite().all() and layer.weight.grad.isfinite().all()


def test_cosine_linear_zero_weight_row() -> None:
    layer = lnn.CosineLinear(3, 2)
    with torch.no_grad():
        layer.weight[0] = 0
    cosine = layer(torch.randn(4, 3))
    cosine.sum().backward()
    assert not cosine[:, 0].any() and not layer.weight.grad[0].any() and layer.weight.grad[1].any()


def test_cosine_linear_module() -> None:
    layer = lnn.CosineLinear(6, 4)
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(4))
    assert {name for name, _ in layer.named_parameters()} == {"weight"} and layer.weight.shape == (4, 6)
    other = lnn.CosineLinear(6, 4, device="cpu", dtype=torch.float64)
    assert other.weight.dtype == torch.float64
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 6)
    torch.testing.assert_close(other(x.double()).float(), layer(x))
    assert lnn.CosineLinear(6, 4, device="meta").weight.device.type == "meta"
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_training_end_to_end() -> None:
    """LDAM-DRW on a toy problem with a cosine classifier learns the rare class as well."""
    generator = torch.Generator().manual_seed(0)
    counts = [200, 10]
    target = torch.cat([torch.zeros(200), torch.ones(10)]).long()
    x = torch.randn(210, 8, generator=generator)
    x[:, 0] += 3 * (2 * target - 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), lnn.CosineLinear(16, 2))
    loss = lnn.LDAMLoss(counts, weight=M.DeferredReweighting(counts, 20))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for epoch in range(40):
        loss.set_epoch(epoch)
        optimizer.zero_grad()
        loss(model(x), target).backward()
        optimizer.step()
    assert (model(x).argmax(1) == target)[target == 1].float().mean() > 0.9
