"""The direct call of the operator: the answers of torch.ops' generic call, which takes over where it must."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ltkernels.functional as LF
from ltkernels import _ops

pytestmark = pytest.mark.skipif(_ops.BACKEND == "reference", reason="the definition makes no operator call")

REST = (None,) * 10
OFFSETS = torch.tensor([0, 1, 3, 3, 4, 6], dtype=torch.int32)
NEIGHBORS = torch.tensor([3, 3, 4, 0, 1, 1], dtype=torch.int32)
NUMBERS = (1.0, 1.0, -1, "mean", -100, 0.0, False)
OPERATOR_NUMBERS = (1.0, 1.0, -1, 1, -100, 0.0)
REDUCTIONS = ("none", "mean", "sum")  # in the order of the operator's numbers
REDUCTION = 15  # its place among the arguments


def example() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 5


def generic(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
    operands = list(arguments)
    operands[REDUCTION] = REDUCTIONS.index(arguments[REDUCTION])
    return torch.ops.ltkernels.margin_softmax.default(*operands)


def direct(*arguments: object) -> tuple[torch.Tensor, torch.Tensor | None]:
    result = _ops.margin_softmax_direct(*arguments)
    assert result is not NotImplemented
    return result if isinstance(result, tuple) else (result, None)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_same_as_generic(reduction: str, return_lse: bool) -> None:
    logits, target = example()
    optional = (torch.rand(5), torch.rand(5), torch.rand(5), torch.rand(5), torch.rand(5, 5), torch.rand(6, 5) > 0.2)
    arguments = (
        logits,
        target,
        *optional,
        torch.rand(6),
        None,
        OFFSETS,
        NEIGHBORS,
        2.0,
        0.5,
        -1,
        reduction,
        3,
        0.1,
        return_lse,
    )
    ours, theirs = direct(*arguments), generic(*arguments)
    assert torch.equal(ours[0], theirs[0]) and ours[0].dtype == theirs[0].dtype
    if return_lse:
        assert torch.equal(ours[1], theirs[1]) and ours[1].dtype == theirs[1].dtype
    else:
        assert ours[1] is None and theirs[1].numel() == 0


def test_each_optional_argument_reaches_its_place() -> None:
    logits, target = example()
    shapes = ((5,), (5,), (5,), (5,), (5, 5), None, (6,))
    for position, shape in enumerate(shapes):
        value = torch.tensor([True, True, False, True, True]) if shape is None else torch.rand(shape)
        optional = [None] * 10
        optional[position] = value
        arguments = (logits, target, *optional, 1.5, 1.0, -1, "none", -100, 0.25, True)
        ours, theirs = direct(*arguments), generic(*arguments)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("back_from", [-1, 3])
def test_silencing_arguments_reach_their_places(back_from: int) -> None:
    logits, target = example()
    probabilities, row_class = logits.flip(0).softmax(1), torch.tensor([4, 0, 3, 2, 1, 1])
    for t, k in ((target, None), (probabilities, row_class)):
        arguments = (logits, t, *[None] * 7, k, OFFSETS, NEIGHBORS, 1.5, 0.0, back_from, "none", -100, 0.25, True)
        ours, theirs = direct(*arguments), generic(*arguments)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        plain = generic(logits, t, *[None] * 10, 1.5, 0.0, -1, "none", -100, 0.25, True)
        assert not torch.equal(plain[1], theirs[1])


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (0, 3.0),
        (0, None),
        (0, torch.ones(5)),
        (0, torch.ones(6, 5, 2)),
        (0, torch.ones(6, 5).to_sparse()),
        (0, torch.ones(6, 5, device="meta")),
        (1, [1]),
        (2, "w"),
        (5, torch.tensor(0.5)),
        (5, 0.5),
        (7, torch.ones(6, 5).to_sparse()),
        (9, 1),
        (12, "1"),
        (12, None),
        (12, 1),
        (12, True),
        (12, torch.tensor(2.0)),
        (13, "0"),
        (14, 0.5),
        (REDUCTION, 1),
        (REDUCTION, "Mean"),
        (REDUCTION, "meant"),
        (REDUCTION, "none\0"),
        (REDUCTION, "mean\u0301"),
        (REDUCTION, None),
        (16, 2**70),
        (16, -100.0),
        (17, None),
        (17, 0),
        (18, None),
        (18, 1),
    ],
    ids=str,
)
def test_what_is_not_plain_is_left_to_others(position: int, value: object) -> None:
    arguments = [*example(), *REST, *NUMBERS]
    assert _ops.margin_softmax_direct(*arguments) is not NotImplemented
    arguments[position] = value
    assert _ops.margin_softmax_direct(*arguments) is NotImplemented


@pytest.mark.parametrize("count", [0, 1, 18, 20])
def test_wrong_number_of_arguments(count: int) -> None:
    assert _ops.margin_softmax_direct(*(*example(), *REST, *NUMBERS, False)[:count]) is NotImplemented


def test_numbers_of_other_types() -> None:
    logits, target = example()
    expected = LF.margin_cross_entropy(logits, target, scale=2.0, label_smoothing=0.0, ignore_index=1)
    one = torch.ones((), dtype=torch.int64)
    assert torch.equal(LF.margin_cross_entropy(logits, target, scale=2, label_smoothing=0, ignore_index=one), expected)


@pytest.mark.parametrize("return_lse", [False, True])
def test_no_reference_is_leaked(return_lse: bool) -> None:
    import sys

    logits, target = example()
    arguments = (logits, target, *REST, *NUMBERS[:-1], return_lse)
    direct(*arguments)
    before = [sys.getrefcount(x) for x in (logits, target, None)]
    for _ in range(1000):
        loss, lse = direct(*arguments)
        assert sys.getrefcount(loss) == 2 and (lse is None or sys.getrefcount(lse) == 2)
    del lse
    after = [sys.getrefcount(x) for x in (logits, target, None)]
    assert before[:2] == after[:2] and abs(before[2] - after[2]) < 100


class Recorded(torch.Tensor):
    """A subclass that sees the calls it takes part in."""

    seen: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("position", [0, 1, 4])
def test_tensor_subclasses(position: int) -> None:
    Recorded.seen.clear()
    logits, target = example()
    arguments = [logits, target, *REST, *NUMBERS]
    arguments[4] = torch.rand(5)
    expected = generic(*arguments)[0]
    arguments[position] = arguments[position].as_subclass(Recorded)
    loss = LF.margin_cross_entropy(arguments[0], arguments[1], logit_bias=arguments[4])
    assert _ops.margin_softmax in Recorded.seen
    assert isinstance(loss, Recorded) and torch.equal(loss.as_subclass(torch.Tensor), expected)


def test_parameter_is_plain() -> None:
    logits, target = example()
    logits = torch.nn.Parameter(logits)
    LF.margin_cross_entropy(logits, target).backward()
    assert logits.grad is not None


def test_torch_function_mode() -> None:
    class Mode(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode() as mode:
        LF.margin_cross_entropy(*example())
    assert _ops.margin_softmax in mode.seen


def test_torch_dispatch_mode() -> None:
    class Mode(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode() as mode:
        LF.margin_cross_entropy(*example())
    assert torch.ops.ltkernels.margin_softmax_fwd.default in mode.seen


def test_errors_keep_their_type() -> None:
    logits, target = example()
    with pytest.raises(IndexError, match="target: expected class indices in"):
        LF.margin_cross_entropy(logits, target + 1)
    with pytest.raises(ValueError, match="logit_bias: expected shape"):
        LF.margin_cross_entropy(logits, target, logit_bias=torch.rand(4))
    with pytest.raises(TypeError, match="mask: expected dtype bool"):
        LF.margin_cross_entropy(logits, target, mask=torch.ones(5))


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (0, torch.zeros(6, 0)),
        (0, torch.zeros(2_000_000, 5)),
        (1, torch.zeros(1, dtype=torch.int64)),
        (1, torch.full((6, 1), 0.2)),
        (2, torch.ones(1)),
        (4, torch.ones(4)),
        (6, torch.ones(5, 1)),
        (7, torch.ones(6, 1, dtype=torch.bool)),
        (8, torch.ones(1)),
    ],
    ids=str,
)
def test_inner_operators_do_not_read_beyond_their_operands(position: int, value: torch.Tensor) -> None:
    """Nobody has checked those for a call of their own."""
    arguments = [*example(), *REST, *OPERATOR_NUMBERS]
    assert torch.ops.ltkernels.margin_softmax_fwd(*arguments, True)[0].isfinite()
    upstream = torch.ones(()), None, torch.zeros(3, len(arguments[0]))
    arguments[position] = value
    with pytest.raises(ValueError, match="expected operands of"):
        torch.ops.ltkernels.margin_softmax_fwd(*arguments, True)
    with pytest.raises(ValueError, match="expected operands of"):
        torch.ops.ltkernels.margin_softmax_bwd(*upstream, *arguments, 1)


def test_the_inner_backward_checks_its_statistics() -> None:
    arguments, one, stats = [*example(), *REST, *OPERATOR_NUMBERS], torch.ones(()), torch.zeros(3, 6)
    for upstream in ((one, None, stats[:2]), (torch.ones(5), None, stats), (one, torch.ones(1), stats)):
        with pytest.raises(ValueError, match="expected statistics and upstream gradients of 6 rows"):
            torch.ops.ltkernels.margin_softmax_bwd(*upstream, *arguments, 1)
