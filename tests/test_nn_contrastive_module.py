"""The contrastive loss modules as ``torch.nn`` modules: state, copies, dtypes, devices, compilation, errors."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ltkernels import nn as lnn

pytestmark = pytest.mark.usefixtures("one_thread")

PROTOTYPES = torch.linspace(-1, 1, 20).view(4, 5).sin()
LABELS = torch.arange(8) % 3
INDEX = torch.tensor([5, 0, 11, 2])

# Each with what it is called with besides the embeddings.
LOSSES: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], tuple[Tensor, ...]]]] = {
    "ntxent": (lambda: lnn.NTXentLoss(0.2), lambda z: ()),
    "ntxent pairs": (lambda: lnn.NTXentLoss(0.2, "pairs"), lambda z: (LABELS,)),
    "ntxent buffer": (lambda: lnn.NTXentLoss(torch.tensor(0.2)), lambda z: (LABELS,)),
    "supcon": (lambda: lnn.SupConLoss(0.2, base_temperature=0.07), lambda z: (LABELS,)),
    "scheduled": (lambda: lnn.TemperatureScheduledLoss(10), lambda z: ()),
    "temperature": (
        lambda: lnn.TemperatureContrastiveLoss(torch.linspace(0.1, 0.5, 12), torch.linspace(0, 2, 12)),
        lambda z: (INDEX,),
    ),
    "balanced": (lambda: lnn.BalancedContrastiveLoss(0.2), lambda z: (LABELS, PROTOTYPES.to(z.dtype))),
    "balanced code": (
        lambda: lnn.BalancedContrastiveLoss(0.2, count_anchor=False),
        lambda z: (LABELS, PROTOTYPES.to(z.dtype)),
    ),
    "macl": (lambda: lnn.MACLLoss(0.2), lambda z: ()),
    "isogclr": (lambda: lnn.ISogCLRLoss(12, rho=0.3, gamma=0.5), lambda z: (INDEX,)),
    "moco": (lambda: lnn.MoCoLoss(5, 10), lambda z: (z.detach().flip(0), LABELS)),
}
BUFFERS = {
    "ntxent buffer": {"temperature"},
    "scheduled": {"temperature"},
    "temperature": {"temperature", "sample_weight"},
    "isogclr": {"temperature", "log_average", "averaged_gradient"},
    "moco": {"queue", "queue_labels", "pointer"},
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def make(name: str) -> nn.Module:
    """A loss with a state that is not that of a new one."""
    torch.manual_seed(0)
    loss = LOSSES[name][0]()
    if name == "scheduled":
        loss.set_epoch(3)
    elif name == "isogclr":
        call(loss, name)
    elif name == "moco":
        loss.enqueue(torch.randn(7, 5), torch.arange(7))
    return loss


def call(loss: nn.Module, name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Value and gradient."""
    z = torch.randn(8, 5, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    value = loss(z, *LOSSES[name][1](z))
    return value.detach(), torch.autograd.grad(value, z)[0]


def assert_same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], **tolerance: float) -> None:
    torch.testing.assert_close(one, other, **tolerance)
    assert one[1].abs().sum() > 0


@every_loss
def test_state_dict_round_trip(name: str) -> None:
    loss = make(name)
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert set(state) == BUFFERS.get(name, set())
    other = LOSSES[name][0]()
    other.load_state_dict(state)
    for _ in range(2):  # the state goes on alike, too
        assert_same(call(other, name), call(loss, name), rtol=0, atol=0)
    for key, x in loss.state_dict().items():
        assert torch.equal(x, other.state_dict()[key])


@every_loss
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_pickle_and_deepcopy(name: str, duplicate: Callable) -> None:
    loss = make(name)
    again = duplicate(loss)
    assert repr(again) == repr(loss) and again.state_dict().keys() == loss.state_dict().keys()
    expected = call(loss, name)
    if name == "isogclr":
        assert not torch.equal(loss.temperature, again.temperature)  # two states
    assert_same(call(again, name), expected, rtol=0, atol=0)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_keeps_the_state(name: str, dtype: torch.dtype) -> None:
    loss, reference = make(name), make(name)
    assert loss.to(dtype) is loss
    for key, x in reference.state_dict().items():
        assert loss.state_dict()[key].dtype == x.dtype and torch.equal(loss.state_dict()[key], x)
    value, gradient = call(loss, name, dtype)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    expected = call(reference, name)
    torch.testing.assert_close(value, expected[0], rtol=0.1, atol=0.03)
    torch.testing.assert_close(gradient.float(), expected[1], rtol=0.1, atol=0.03)


@every_loss
def test_double(name: str) -> None:
    loss = make(name).double()
    kept = (
        torch.float32 if name == "moco" else torch.float64
    )  # a queue keeps its dtype, the loss is that of the queries
    assert {x.dtype for x in loss.buffers() if x.is_floating_point()} <= {kept}
    value, gradient = call(loss, name, torch.float64)
    assert value.dtype == gradient.dtype == torch.float64
    # float32 buffers went to float64 as they are
    torch.testing.assert_close(value.float(), call(make(name), name)[0], rtol=1e-4, atol=1e-5)


@every_loss
def test_moves_to_a_device(name: str) -> None:
    loss = make(name).to("meta")
    assert {x.device.type for x in loss.buffers()} <= {"meta"}
    assert loss.state_dict().keys() == make(name).state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_queue_does_not_round_queries(dtype: torch.dtype) -> None:
    """The loss is that of the queries and of what the queue holds, in float64 for float64 queries."""
    loss = lnn.MoCoLoss(5, 10, temperature=0.1, dtype=dtype)
    loss.enqueue(torch.randn(7, 5), torch.arange(7))
    query, key = (torch.randn(8, 5, dtype=torch.float64).requires_grad_() for _ in range(2))
    q, k, queue = nn.functional.normalize(query), nn.functional.normalize(key), loss.queue.double()
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / 0.1
    want = nn.functional.cross_entropy(logits, torch.zeros(8, dtype=torch.int64))
    got = loss(query, key)
    gradients = [torch.autograd.grad(x, query)[0] for x in (got, want)]
    torch.testing.assert_close([got, gradients[0]], [want, gradients[1]], rtol=1e-12, atol=1e-13)
    single = loss(query.float(), key.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), want, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_queue_of_another_dtype(dtype: torch.dtype) -> None:
    loss = lnn.MoCoLoss(5, 10, temperature=0.5, dtype=dtype)
    loss.enqueue(torch.randn(4, 5))
    assert loss.queue.dtype == dtype == copy.deepcopy(loss).float().half().queue.dtype
    exact = lnn.MoCoLoss(5, 10, temperature=0.5, dtype=torch.float64)
    exact.load_state_dict(loss.state_dict())
    one, other = call(loss, "moco"), call(exact, "moco")
    tolerance = 0.05 if dtype != torch.float64 else 1e-6
    torch.testing.assert_close(one[0].double(), other[0].double(), rtol=tolerance, atol=0)
    torch.testing.assert_close(one[1], other[1], rtol=tolerance, atol=tolerance)


# Those with a state, and those with more than a call of the function.
@pytest.mark.parametrize("name", ["scheduled", "temperature", "isogclr", "moco", "balanced", "balanced code"])
def test_compiles_without_graph_breaks(name: str) -> None:
    loss, eager = make(name), make(name)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for step in range(2):
        assert_same(call(compiled, name), call(eager, name))
        if name == "scheduled":
            loss.set_epoch(7 + step)
            eager.set_epoch(7 + step)
    for key, x in eager.state_dict().items():
        torch.testing.assert_close(loss.state_dict()[key], x)


def test_copies_its_arguments() -> None:
    tau, u = torch.full((12,), 0.3), torch.ones(12)
    loss = lnn.TemperatureContrastiveLoss(tau, u)
    loss.temperature.zero_()
    loss.sample_weight.zero_()
    assert (tau == 0.3).all() and (u == 1).all()
    scalar = torch.tensor(0.3)
    lnn.NTXentLoss(scalar).temperature.zero_()
    assert scalar == torch.tensor(0.3)
    assert lnn.TemperatureContrastiveLoss(tau.half()).temperature.dtype == torch.float32


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda: lnn.NTXentLoss(0.5), "NTXentLoss(temperature=0.5, average='rows', normalize=True)"),
        (
            lambda: lnn.NTXentLoss(nn.Parameter(torch.tensor(0.5)), "pairs", False, layout="interleaved"),
            "NTXentLoss(temperature=Tensor, average='pairs', normalize=False, layout='interleaved')",
        ),
        (
            lambda: lnn.SupConLoss(0.1, base_temperature=0.07),
            "SupConLoss(temperature=0.1, normalize=True, base_temperature=0.07)",
        ),
        (
            lambda: lnn.TemperatureScheduledLoss(200),
            "TemperatureScheduledLoss(t_max=200.0, minimum=0.1, maximum=1.0, temperature=Tensor, average='rows', "
            "normalize=True)",
        ),
        (
            lambda: lnn.TemperatureContrastiveLoss(torch.ones(7)),
            "TemperatureContrastiveLoss(num_samples=7, normalize=True)",
        ),
        (
            lambda: lnn.BalancedContrastiveLoss(),
            "BalancedContrastiveLoss(temperature=0.1, normalize=True, count_anchor=True)",
        ),
        (
            lambda: lnn.MACLLoss(layout="interleaved"),
            "MACLLoss(temperature=0.1, alpha=0.5, threshold=0.0, layout='interleaved')",
        ),
        (
            lambda: lnn.ISogCLRLoss(7, 0.3),
            "ISogCLRLoss(num_samples=7, rho=0.3, temperature_range=(0.05, 1.0), gamma=0.9, learning_rate=0.01, "
            "beta=0.9, gradient_clip=5.0)",
        ),
        (
            lambda: lnn.MoCoLoss(4, 16),
            "MoCoLoss(width=4, size=16, temperature=0.07, dtype=torch.float32, normalize=True)",
        ),
    ],
)
def test_repr(loss: Callable[[], nn.Module], expected: str) -> None:
    assert repr(loss()) == expected


Z, TAU = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), torch.full((12,), 0.3)
BAD_ARGUMENTS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: lnn.NTXentLoss(0), ValueError, "^temperature: expected a finite number > 0, got 0"),
    (lambda: lnn.NTXentLoss("0.1"), TypeError, "^temperature: expected a number, got str"),
    (lambda: lnn.SupConLoss(torch.ones(2)), ValueError, r"^temperature: expected a number or a floating"),
    (lambda: lnn.SupConLoss(torch.ones((), requires_grad=True)), ValueError, "^temperature: expected an nn.Parameter"),
    (lambda: lnn.SupConLoss(0.1, base_temperature=-1), ValueError, "^base_temperature: expected a finite number > 0"),
    (lambda: lnn.NTXentLoss(0.1, "mean"), ValueError, "^average: expected 'rows' or 'pairs', got 'mean'"),
    (lambda: lnn.NTXentLoss(0.1, layout="split"), ValueError, "^layout: expected 'stacked' or 'interleaved'"),
    (lambda: lnn.NTXentLoss(0.1, normalize=1), TypeError, "^normalize: expected a bool, got int"),
    (lambda: lnn.TemperatureScheduledLoss(0), ValueError, "^t_max: expected a finite number > 0"),
    (lambda: lnn.TemperatureScheduledLoss(9, 0.5, 0.2), ValueError, "^minimum, maximum: expected minimum"),
    (lambda: lnn.TemperatureScheduledLoss(9).set_epoch(-1), ValueError, "^epoch: expected a finite number >= 0"),
    (lambda: lnn.TemperatureContrastiveLoss(0.1), TypeError, "^temperature: expected a floating Tensor, got float"),
    (lambda: lnn.TemperatureContrastiveLoss(-TAU), ValueError, "^temperature: expected finite values above 0"),
    (lambda: lnn.TemperatureContrastiveLoss(TAU, TAU[1:]), ValueError, r"^sample_weight: expected shape \(12,\)"),
    (lambda: lnn.TemperatureContrastiveLoss(TAU, -TAU), ValueError, "^sample_weight: expected finite values"),
    (lambda: lnn.MACLLoss(alpha=2), ValueError, r"^alpha: expected a finite number in \[0, 1\], got 2"),
    (lambda: lnn.MACLLoss(alpha=0.8, threshold=0.5), ValueError, "^alpha, threshold: expected alpha"),
    (lambda: lnn.ISogCLRLoss(0, 0.1), ValueError, "^num_samples: expected at least 1, got 0"),
    (lambda: lnn.ISogCLRLoss(5, -1), ValueError, "^rho: expected a finite number >= 0, got -1"),
    (lambda: lnn.ISogCLRLoss(5, 1, temperature=2), ValueError, r"^temperature: expected a number in the range"),
    (lambda: lnn.ISogCLRLoss(5, 1, gamma=0), ValueError, "^gamma: expected a finite number > 0, got 0"),
    (lambda: lnn.MoCoLoss(0), ValueError, "^width: expected at least 1, got 0"),
    (lambda: lnn.MoCoLoss(5, 8, dtype=torch.int64), TypeError, "^dtype: expected a floating dtype, got torch.int64"),
    # Calls
    (lambda: lnn.NTXentLoss(0.1)([1.0]), TypeError, "^embeddings: expected a Tensor, got list"),
    (lambda: lnn.NTXentLoss(0.1)(Z[0]), ValueError, r"^embeddings: expected shape \(M, D\) or \(N, V, D\), got \(5,\)"),
    (lambda: lnn.NTXentLoss(0.1)(Z[1:]), ValueError, "^rows: expected an even number"),
    (lambda: lnn.NTXentLoss(0.1, "pairs")(Z, LABELS[1:]), ValueError, r"^labels: expected shape \(8,\), got \(7,\)"),
    (lambda: lnn.NTXentLoss(0.1, "pairs")(Z, LABELS.float()), TypeError, "^labels: expected an integer dtype"),
    (lambda: lnn.NTXentLoss(0.1, "pairs")(Z, [1] * 8), TypeError, "^labels: expected a Tensor or None, got list"),
    (lambda: lnn.NTXentLoss(0.1)(Z, LABELS, LABELS), ValueError, "^labels, positive_index: expected one of them"),
    (lambda: lnn.NTXentLoss(0.1)(Z[None], None, LABELS), ValueError, "^positive_index: expected None with embeddings"),
    (lambda: lnn.SupConLoss(0.1)(Z), ValueError, "^labels: expected a Tensor, or embeddings of shape"),
    (lambda: lnn.TemperatureContrastiveLoss(TAU)(Z, INDEX[1:]), ValueError, r"^index: expected shape \(8,\) or \(4,\)"),
    (lambda: lnn.TemperatureContrastiveLoss(TAU)(Z, INDEX + 1), ValueError, "^index: expected samples from 0 to 11"),
    (lambda: lnn.TemperatureContrastiveLoss(TAU)(Z, -INDEX), ValueError, "^index: expected samples from 0 to 11"),
    (lambda: lnn.TemperatureContrastiveLoss(TAU)(Z, TAU[:8]), TypeError, "^index: expected an integer"),
    (lambda: lnn.BalancedContrastiveLoss()(Z, None, Z), TypeError, "^labels: expected a Tensor, got NoneType"),
    (lambda: lnn.BalancedContrastiveLoss()(Z, LABELS, Z[:2]), ValueError, "^labels: expected labels from -1 to 1"),
    (lambda: lnn.BalancedContrastiveLoss()(Z, LABELS, Z[:, 1:]), ValueError, r"^prototypes: expected shape \(C, 5\)"),
    (lambda: lnn.BalancedContrastiveLoss()(Z, LABELS, Z.half()), TypeError, "^prototypes: expected dtype"),
    (lambda: lnn.MACLLoss()(Z, LABELS + 8), ValueError, "^positive_index: expected keys from 0 to 7, got 8"),
    (lambda: lnn.MACLLoss()(Z[None]), ValueError, r"^embeddings: expected shape \(M, D\) or \(N, 2, D\), got \(1, 8"),
    (lambda: lnn.MACLLoss()(Z[:, None], LABELS), ValueError, "^positive_index: expected None with embeddings"),
    (lambda: lnn.ISogCLRLoss(12, 0.3)(Z[None], LABELS[:1]), ValueError, r"^embeddings: expected shape \(M, D\) or"),
    (lambda: lnn.TemperatureContrastiveLoss(TAU)(Z[None], LABELS), ValueError, r"^index: expected shape \(1,\), got"),
    (lambda: lnn.ISogCLRLoss(12, 0.3)(Z, LABELS), ValueError, r"^index: expected shape \(4,\), one number for both"),
    (lambda: lnn.ISogCLRLoss(5, 0.3)(Z, INDEX), ValueError, "^index: expected samples from 0 to 4, got 5"),
    (lambda: lnn.ISogCLRLoss(5, 0.3)(Z[:2], INDEX[:1]), ValueError, "^embeddings: expected two views of at least two"),
    (lambda: lnn.MoCoLoss(5, 9)(Z[:, 1:], Z), ValueError, r"^query: expected shape \(M, 5\), got \(8, 4\)"),
    (lambda: lnn.MoCoLoss(5, 9)(Z, None), TypeError, "^key: expected a floating Tensor, got NoneType"),
    (lambda: lnn.MoCoLoss(5, 9)(Z, Z[1:]), ValueError, r"^key: expected shape \(8, 5\) like query, got \(7, 5\)"),
    (lambda: lnn.SupConLoss(0.1)(Z[None], [0]), TypeError, "^labels: expected a Tensor, got list"),
    (lambda: lnn.MoCoLoss(5, 7).enqueue(Z), ValueError, "^key: expected at most 7 keys, the size of the queue, got 8"),
    (lambda: lnn.MoCoLoss(5, 9).enqueue(Z, INDEX), ValueError, r"^labels: expected shape \(8,\), got \(4,\)"),
    (lambda: lnn.MoCoLoss(5, 9).enqueue(Z, LABELS - 3), ValueError, "^labels: expected labels from -1 on, got -3"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "error", "message"), BAD_ARGUMENTS)
def test_errors(function: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        function()


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name][1](torch.zeros(8, 5))])
def test_labels_and_indices_are_integers(name: str, dtype: torch.dtype) -> None:
    """Of a complex tensor torch would take the real part, with a warning."""
    embeddings = torch.randn(8, 5)
    integers = {torch.int64: dtype}
    arguments = [x.to(integers.get(x.dtype, x.dtype)) for x in LOSSES[name][1](embeddings)]
    with pytest.raises(TypeError, match=f"^(labels|index): expected an integer .*got {dtype}"):
        make(name)(embeddings, *arguments)
