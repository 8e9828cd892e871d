"""``NeighborSilencingLoss``: the definition by hand, and the conventions of ``torch.nn`` modules."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ltkernels.functional as LF
from ltkernels import margins as M
from ltkernels import nn as lnn
from ltkernels.neighbors import NeighborMap

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = [(0, 3), (0, 4), (2, 4), (2, 6)]  # 3 target and 4 auxiliary classes
SILENCED = {0: {3, 4}, 1: set(), 2: {4, 6}, 3: {0}, 4: {0, 2}, 5: set(), 6: {2}}
COUNTS = [500, 40, 5, 50, 50, 20, 50]


def neighbors() -> NeighborMap:
    return NeighborMap.from_pairs(PAIRS, num_classes=3, num_auxiliary=4)


LOSSES: dict[str, Callable[..., lnn.NeighborSilencingLoss]] = {
    "plain": lambda **o: lnn.NeighborSilencingLoss(neighbors(), **o),
    "prior": lambda **o: lnn.NeighborSilencingLoss(neighbors(), prior_counts=COUNTS, tau=1.5, **o),
    "damped": lambda **o: lnn.NeighborSilencingLoss(neighbors(), neighbor_weight=0.1, **o),
    "back": lambda **o: lnn.NeighborSilencingLoss(neighbors(), mode="back", prior_counts=COUNTS, **o),
    "target_only": lambda **o: lnn.NeighborSilencingLoss(neighbors(), mode="target_only", **o),
    "auxiliary_only": lambda **o: lnn.NeighborSilencingLoss(neighbors(), mode="auxiliary_only", **o),
    "margins": lambda **o: lnn.NeighborSilencingLoss(
        neighbors(), prior_counts=COUNTS, margins=M.ldam(COUNTS, scale=2.0), logit_bias=torch.arange(7.0), **o
    ),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def by_hand(name: str, logits: Tensor, target: Tensor) -> Tensor:
    """The loss of each row, in float64 and one class at a time."""
    mode = name if name in ("back", "target_only", "auxiliary_only") else "plain"
    tau = {"prior": 1.5, "back": 1.0, "margins": 1.0}.get(name, 0.0)
    losses = []
    for row, y in zip(logits.double(), target.tolist(), strict=True):
        silenced = SILENCED[y] if mode in ("plain", "back") or (y < 3) == (mode == "target_only") else set()
        if mode == "back" and y >= 3:
            silenced = silenced | ({3, 4, 5, 6} - {y})
        values = []
        for j in range(7):
            value = row[j] + tau * math.log(COUNTS[j] / sum(COUNTS))
            if name == "margins":
                margin = 0.5 * (min(COUNTS) / COUNTS[j]) ** 0.25 if j == y else 0
                value = 2.0 * (row[j] - margin) + math.log(COUNTS[j] / sum(COUNTS)) + j
            if j in silenced:
                value = value + (math.log(0.1) if name == "damped" else -math.inf)
            values.append(value)
        losses.append(torch.stack(values).logsumexp(0) - values[y])
    return torch.stack(losses).float()


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    logits = torch.randn(14, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    return logits.requires_grad_(), torch.arange(14) % 7


def value_and_gradient(loss: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    logits, target = batch(dtype)
    value = loss(logits, target)
    return value.detach(), torch.autograd.grad(value.sum(), logits)[0]


def assert_same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


# Values


@every_loss
def test_definition(name: str) -> None:
    logits, target = batch()
    value = LOSSES[name](reduction="none")(logits, target)
    torch.testing.assert_close(value, by_hand(name, logits, target))
    torch.testing.assert_close(LOSSES[name]()(logits, target), value.mean())


def test_passes_everything_on() -> None:
    logits, target = batch()
    options = {"reduction": "none", "ignore_index": 2, "label_smoothing": 0.1}
    weight = torch.arange(1.0, 8)
    call = {"mask": torch.tensor([True] * 6 + [False]), "sample_weight": torch.rand(14)}
    loss = lnn.NeighborSilencingLoss(
        neighbors(), neighbor_weight=0.3, prior_counts=COUNTS, tau=0.5, weight=weight, scale=2.0, **options
    )
    expected = LF.auxiliary_cross_entropy(
        logits, target, neighbors(), weight, neighbor_weight=0.3, prior_counts=torch.tensor(COUNTS), tau=0.5,
        scale=2.0, **options, **call,
    )  # fmt: skip
    torch.testing.assert_close(loss(logits, target, **call), expected)


def test_row_class_with_probabilities() -> None:
    """Mixup: a sample silences what its own first label silences."""
    logits, target = batch()
    mixed = 0.7 * nn.functional.one_hot(target, 7) + 0.3 * nn.functional.one_hot(target.flip(0), 7)
    loss = LOSSES["prior"](reduction="none")
    expected = LF.auxiliary_cross_entropy(
        logits, mixed, neighbors(), row_class=target, prior_counts=torch.tensor(COUNTS), tau=1.5, reduction="none"
    )
    torch.testing.assert_close(loss(logits, mixed, target), expected)
    assert not torch.equal(loss(logits, mixed, target.flip(0)), expected)
    with pytest.raises(ValueError, match="row_class"):
        loss(logits, mixed)


def test_published_form_is_the_default() -> None:
    """Hard silencing over balanced softmax: silenced logits get no gradient at all."""
    loss = lnn.NeighborSilencingLoss(neighbors(), prior_counts=COUNTS)
    _, gradient = value_and_gradient(loss)
    zero = [[j in SILENCED[y] for j in range(7)] for y in range(7)] * 2
    assert torch.equal(gradient == 0, torch.tensor(zero))


def test_mask_and_predict() -> None:
    loss = LOSSES["prior"]()
    logits = batch()[0].detach()
    logits[:, 5] += 100
    before = logits.clone()
    prediction = loss.predict(logits)
    assert torch.equal(prediction, logits[:, :3].argmax(1)) and prediction.dtype == torch.int64
    probabilities = loss.mask(logits).softmax(1)
    torch.testing.assert_close(probabilities[:, :3], logits[:, :3].softmax(1))
    assert not probabilities[:, 3:].any() and torch.equal(logits, before)
    images = torch.randn(2, 7, 3, 3)
    assert loss.predict(images).shape == (2, 3, 3) and loss.predict(logits[0]).shape == ()
    with pytest.raises(ValueError, match="^num_classes: expected a number from 1 to 2, got 3"):
        loss.predict(logits[:, :2])


# Conventions of torch.nn


@every_loss
def test_state_dict_round_trip(name: str) -> None:
    loss, other = LOSSES[name](), LOSSES[name]()
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert set(state) == {key for key, _ in loss.named_buffers()} >= {"neighbor_offsets", "neighbor_classes"}
    assert ("prior" in state) == (name in ("prior", "back", "margins"))
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(state)
    assert other.neighbors == neighbors()
    assert_same(value_and_gradient(other), value_and_gradient(loss))


def test_state_of_another_map_of_the_same_size() -> None:
    another = NeighborMap.from_pairs([(0, 5), (1, 5), (1, 6), (2, 3)], num_classes=3, num_auxiliary=4)
    map_before = neighbors()
    loss = lnn.NeighborSilencingLoss(map_before)
    kept = loss.neighbors
    loss.load_state_dict(lnn.NeighborSilencingLoss(another).state_dict())
    assert loss.neighbors == another
    assert_same(value_and_gradient(loss), value_and_gradient(lnn.NeighborSilencingLoss(another)))
    assert map_before == neighbors() == kept  # maps are immutable, also while the module's buffers change


@pytest.mark.parametrize("strict", [True, False])
def test_state_of_a_map_with_other_pairs_leaves_all_as_it_was(strict: bool) -> None:
    """Not half of it either: offsets of another size of map fit, and with the old classes they are a wrong map."""
    loss = lnn.NeighborSilencingLoss(neighbors())
    before = value_and_gradient(loss)
    for pairs in ([(2, 3)], [(0, 5), (1, 5), (1, 6), (2, 3), (2, 4)]):
        state = lnn.NeighborSilencingLoss(NeighborMap.from_pairs(pairs, num_classes=3, num_auxiliary=4)).state_dict()
        with pytest.raises(RuntimeError, match="size mismatch for neighbor_classes"):
            loss.load_state_dict(state, strict=strict)
        assert loss.neighbors == neighbors()
        assert_same(value_and_gradient(loss), before)
    another = NeighborMap.from_pairs([(0, 5), (1, 5), (1, 6), (2, 3)], num_classes=3, num_auxiliary=4)
    half = {"neighbor_classes": lnn.NeighborSilencingLoss(another).state_dict()["neighbor_classes"]}
    with pytest.raises(RuntimeError, match="not a map|symmetric"):
        loss.load_state_dict(half, strict=False)
    assert loss.neighbors == neighbors()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["neighbor_classes"].__setitem__(0, 2**30), "expected auxiliary classes"),
        (lambda state: state["neighbor_classes"].__setitem__(-1, 2**30), "not a map of 3 target and 4 auxiliary"),
        (lambda state: state["neighbor_offsets"].__setitem__(-1, 2**30), "not a map of 3 target and 4 auxiliary"),
        (lambda state: state["neighbor_offsets"].__setitem__(1, -5), "not a map of 3 target and 4 auxiliary"),
        (lambda state: state.update(neighbor_classes=torch.ones(8)), "expected an int32 Tensor, got torch.float32"),
        (lambda state: state.update(neighbor_classes=torch.ones(6, dtype=torch.int32)), "not a map"),
        (lambda state: state.update(neighbor_offsets=torch.ones(6, dtype=torch.int32)), "size mismatch"),
        (lambda state: state.pop("neighbor_offsets"), "Missing key"),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_damaged_state_does_not_load(change: Callable, message: str, assign: bool) -> None:
    """Kernels read where a map says: no wrong map may get there."""
    model = nn.Sequential(nn.Linear(7, 7), LOSSES["prior"]())
    state = {key: x.clone() for key, x in model[1].state_dict().items()}
    change(state)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(
            model[0].state_dict(prefix="0.") | {f"1.{key}": x for key, x in state.items()}, assign=assign
        )
    assert model[1].neighbors == neighbors()
    assert_same(value_and_gradient(model[1]), value_and_gradient(LOSSES["prior"]()))


@every_loss
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_pickle_and_deepcopy(name: str, duplicate: Callable) -> None:
    loss = LOSSES[name](weight=M.DeferredReweighting(COUNTS, 3))
    again = duplicate(loss)
    again.set_epoch(3)
    assert torch.equal(loss.weight, torch.ones(7))
    loss.set_epoch(3)
    assert_same(value_and_gradient(again), value_and_gradient(loss))
    assert repr(again) == repr(loss) and again.neighbors == neighbors()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_keeps_the_prior_float32(name: str, dtype: torch.dtype) -> None:
    loss = LOSSES[name]()
    before = {key: x.clone() for key, x in loss.named_buffers()}
    loss.to(dtype)
    for key, buffer in loss.named_buffers():
        assert buffer.dtype == (torch.int32 if key.startswith("neighbor") else torch.float32)
        assert torch.equal(buffer, before[key])
    value, gradient = value_and_gradient(loss, dtype)
    assert value.dtype == torch.float32 and gradient.dtype == dtype and gradient.abs().sum() > 0
    loss.double()
    assert value_and_gradient(loss, torch.float64)[0].dtype == torch.float64
    assert_same(value_and_gradient(loss.float()), value_and_gradient(LOSSES[name]()))


@every_loss
def test_moves_to_a_device(name: str) -> None:
    loss = LOSSES[name](weight=torch.ones(7)).to("meta")
    assert {buffer.device.type for buffer in loss.buffers()} == {"meta"}
    assert loss(torch.ones(2, 7, device="meta"), torch.ones(2, device="meta", dtype=torch.int64)).shape == ()


@every_loss
def test_compiles_without_graph_breaks(name: str) -> None:
    loss = LOSSES[name](weight=M.DeferredReweighting(COUNTS, 3))
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for epoch in (0, 3):
        loss.set_epoch(epoch)
        assert_same(value_and_gradient(compiled), value_and_gradient(loss))
    another = NeighborMap.from_pairs([(0, 5), (1, 5), (1, 6), (2, 3)], num_classes=3, num_auxiliary=4)
    if name == "plain":  # buffers, not constants: a loaded state reaches the compiled step
        loss.load_state_dict(lnn.NeighborSilencingLoss(another, weight=torch.ones(7)).state_dict())
        expected = value_and_gradient(lnn.NeighborSilencingLoss(another))
        assert_same(value_and_gradient(compiled), expected)


@every_loss
@pytest.mark.parametrize("strict", [True, False])
def test_exports(name: str, strict: bool) -> None:
    loss, (logits, target) = LOSSES[name](), batch()
    exported = torch.export.export(loss, (logits, target), strict=strict)
    assert set(exported.graph_signature.inputs_to_buffers.values()) == {key for key, _ in loss.named_buffers()}
    torch.testing.assert_close(exported.module()(2 * logits, target), loss(2 * logits, target))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (
            lambda: lnn.NeighborSilencingLoss(neighbors()),
            "NeighborSilencingLoss(num_classes=3, num_auxiliary=4, num_pairs=4, neighbor_weight=0.0, mode='plain', "
            "reduction='mean')",
        ),
        (
            lambda: lnn.NeighborSilencingLoss(
                neighbors(), mode="back", prior_counts=COUNTS, tau=2, margins=M.ldam(COUNTS), reduction="sum"
            ),
            "NeighborSilencingLoss(num_classes=3, num_auxiliary=4, num_pairs=4, neighbor_weight=0.0, mode='back', "
            "tau=2.0, prior=(7,), target_margin=(7,), scale=30.0, reduction='sum')",
        ),
    ],
)
def test_repr(loss: Callable[[], nn.Module], expected: str) -> None:
    assert repr(loss()) == expected


def test_learned_bias_and_prior_add_up() -> None:
    bias, scale = nn.Parameter(torch.zeros(7)), nn.Parameter(torch.tensor(2.0))
    loss = lnn.NeighborSilencingLoss(neighbors(), prior_counts=COUNTS, logit_bias=bias, scale=scale)
    assert dict(loss.named_parameters()).keys() == {"logit_bias", "scale"} and loss.logit_bias is bias
    logits, target = batch()
    before = loss(logits, target)
    torch.testing.assert_close(before, lnn.NeighborSilencingLoss(neighbors(), prior_counts=COUNTS)(2 * logits, target))
    before.backward()
    assert bias.grad.abs().sum() > 0 and scale.grad != 0
    torch.optim.SGD(loss.parameters(), lr=0.1).step()
    assert loss(logits, target) < before


def test_deferred_reweighting() -> None:
    loss = LOSSES["prior"](weight=M.DeferredReweighting(COUNTS, start_epoch=3, beta=0.99))
    logits, target = batch()
    for epoch, weight in ((0, None), (3, M.class_balanced_weight(COUNTS, 0.99)), (1, None)):
        loss.set_epoch(epoch)
        torch.testing.assert_close(loss(logits, target), LOSSES["prior"](weight=weight)(logits, target))


def test_does_not_share_memory_with_the_map() -> None:
    given = neighbors()
    loss = lnn.NeighborSilencingLoss(given)
    for buffer in loss.buffers():
        buffer.zero_()
    assert given == neighbors()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"neighbors": PAIRS}, TypeError, "^neighbors: expected a NeighborMap, got list"),
        ({"neighbor_weight": 1.5}, ValueError, r"^neighbor_weight: expected a finite number in \[0, 1\], got 1.5"),
        ({"neighbor_weight": "0"}, TypeError, "^neighbor_weight: expected a number, got str"),
        ({"mode": "forward"}, ValueError, "^mode: expected one of plain, back"),
        ({"mode": "back", "neighbor_weight": 0.1}, ValueError, "^mode 'back': expected neighbor_weight=0, got 0.1"),
        ({"prior_counts": [1, 2, 3]}, ValueError, r"^prior_counts: expected shape \(7,\) for 3 target .*got \(3,\)"),
        ({"prior_counts": [1] * 6 + [0]}, ValueError, "^prior_counts: expected positive finite counts, got 0 for clas"),
        ({"prior_counts": "500"}, TypeError, "^prior_counts: expected C real numbers, got str"),
        ({"tau": -1}, ValueError, "^tau: expected a finite number >= 0, got -1"),
        ({"weight": torch.ones(3)}, ValueError, r"^weight: expected shape \(7,\) for 3 target and 4 auxiliary"),
        ({"margins": M.ldam([1, 2, 3])}, ValueError, r"^target_margin: expected shape \(7,\)"),
        ({"pairwise_margin": torch.ones(3, 3)}, ValueError, r"^pairwise_margin: expected shape \(7, 7\).*got \(3, 3\)"),
        ({"margins": M.ldam(COUNTS), "scale": 3}, ValueError, "^scale: set in both"),
        ({"reduction": "mean", "gamma": 1}, TypeError, "gamma"),
    ],
)
def test_errors(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lnn.NeighborSilencingLoss(**{"neighbors": neighbors()} | options)


def test_training_end_to_end() -> None:
    """Two auxiliary classes next to the rare target class: silenced, they do not push it down."""
    generator = torch.Generator().manual_seed(0)
    counts = [200, 10, 100, 100]
    target = torch.arange(4).repeat_interleave(torch.tensor(counts))
    centres = torch.tensor([[-2.0, 0], [2, 0], [2, 0.3], [2, -0.3]])
    x = centres[target] + 0.5 * torch.randn(410, 2, generator=generator)
    loss = lnn.NeighborSilencingLoss(
        NeighborMap.from_hierarchy(["a", "b", "b", "b"], num_classes=2), prior_counts=counts
    )
    torch.manual_seed(0)
    model = nn.Linear(2, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        loss(model(x), target).backward()
        optimizer.step()
    test = (centres[:2].repeat_interleave(100, 0)) + 0.5 * torch.randn(200, 2, generator=generator)
    accuracy = (loss.predict(model(test)) == torch.arange(2).repeat_interleave(100)).float().mean()
    assert accuracy > 0.95
