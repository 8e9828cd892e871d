"""Cases of the contrastive kernels in Triton, run by contrastive_worker.py; each raises AssertionError if it fails.

The launchers are called directly, and compared with the definition in float64 of the same numbers. The tests on a
GPU run the same cases with DEVICE set.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from ltkernels import reference
from ltkernels.reference import ALL, LOGSUMEXP, LOGSUMEXP_OTHER_LABEL, LOGSUMEXP_SAME_LABEL, NEGATIVES, OWN

DEVICE = "cpu"  # of the launchers' tensors; everything else stays on the CPU
RANDOM_CASES = 48
CASES: dict[str, Callable[[], None]] = {}
INF = float("inf")

# In the order of the operators.
ARGUMENTS = (
    "query", "key", "temperature", "labels", "key_labels", "positive_index", "allowed", "key_bias", "pair_margin",
    "sample_weight", "log_normalizer", "extra_positive", "denominator", "exclude_self", "scale_by_temperature",
    "reduction",
)  # fmt: skip
# In the order of the bits of `grads`.
GRADIENTS = ("query", "key", "temperature", "key_bias", "pair_margin", "extra_positive")
EXPECTED = 64


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def example(rows: int = 9, keys: int | None = None, width: int = 7, seed: int = 0, **options) -> dict:
    """Unit vectors with three labels and -1; `keys`: a call with a key."""
    g = torch.Generator().manual_seed(seed)
    n = rows if keys is None else keys
    call = dict.fromkeys(ARGUMENTS) | {
        "query": torch.nn.functional.normalize(normal(g, rows, width)),
        "temperature": 0.2 + torch.rand(rows, generator=g),
        "labels": torch.randint(-1, 3, (rows,), generator=g),
        "denominator": ALL,
        "exclude_self": True,
        "scale_by_temperature": False,
        "reduction": 1,
    }
    if keys is not None:
        call["key"] = torch.nn.functional.normalize(normal(g, n, width))
        call["key_labels"] = torch.randint(-1, 3, (n,), generator=g)
    call |= {name: x(g, rows, n, width) if callable(x) else x for name, x in options.items()}
    if call["labels"] is None or call["positive_index"] is not None:
        call["labels"] = call["key_labels"] = None
    return call


# Values of the options of `example`.
OPTIONS: dict[str, Callable] = {
    "positive_index": lambda g, m, n, d: (torch.arange(m) + 1 + torch.randint(n - 1, (m,), generator=g)) % n,
    "allowed": lambda g, m, n, d: torch.rand(m, n, generator=g) < 0.7,
    "key_bias": lambda g, m, n, d: normal(g, n),
    "pair_margin": lambda g, m, n, d: normal(g, 3, 3),
    "sample_weight": lambda g, m, n, d: torch.rand(m, generator=g) * (torch.rand(m, generator=g) < 0.8),
    "log_normalizer": lambda g, m, n, d: normal(g, m),
    "extra_positive": lambda g, m, n, d: torch.nn.functional.normalize(normal(g, m, d)),
}


def definition(call: dict, upstream: Tensor | None) -> dict[str, Tensor]:
    """Loss, statistics and gradients in float64."""
    call = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in call.items()}
    leaves = {n: call[n].detach().clone().requires_grad_() for n in GRADIENTS if call[n] is not None}
    arguments = [(call | leaves)[name] for name in ARGUMENTS[:-1]]
    loss, stats = reference.contrastive(*arguments, ("none", "mean", "sum")[call["reduction"]])
    upstream = torch.ones_like(loss) if upstream is None else upstream.double()
    grads = torch.autograd.grad((loss * upstream).sum(), list(leaves.values()), allow_unused=True)
    result = {"loss": loss.detach(), "lse": stats[0], "positive": stats[1], "row_loss": stats[2]}
    result |= {"expected": stats[3], "count": stats[4]}
    for (name, x), grad in zip(leaves.items(), grads, strict=True):
        result[f"d{name}"] = torch.zeros_like(x) if grad is None else grad
    return result


def wanted(call: dict, names: tuple[str, ...] = GRADIENTS) -> int:
    return sum(1 << bit for bit, name in enumerate(GRADIENTS) if name in names and call[name] is not None)


def named(call: dict, loss: Tensor, stats: Tensor, gradients: tuple[Tensor, ...], grads: int) -> dict[str, Tensor]:
    result = {"loss": loss, "lse": stats[0], "positive": stats[1], "row_loss": stats[2], "count": stats[4]}
    if grads & EXPECTED:
        result["expected"] = stats[3]
    for bit, (name, grad) in enumerate(zip(GRADIENTS, gradients, strict=True)):
        if grads & 1 << bit:
            assert grad.shape == call[name].shape, name
            like_input = name in ("query", "key", "extra_positive")
            assert grad.dtype == (call[name] if like_input else stats).dtype, name
            result[f"d{name}"] = grad
        else:
            assert grad.shape == (0,), name
    return result


def arguments_of(call: dict) -> list:
    return [moved(x) if isinstance(x := call[name], Tensor) else x for name in ARGUMENTS]


def moved(x: Tensor) -> Tensor:
    """On DEVICE, with the same strides."""
    if DEVICE == "cpu":
        return x
    kept = x[tuple(slice(None) if stride else slice(1) for stride in x.stride())]
    return torch.empty_strided(kept.shape, kept.stride(), dtype=x.dtype, device=DEVICE).copy_(kept).expand(x.shape)


def forward(call: dict, grads: int) -> dict[str, Tensor]:
    from ltkernels.triton import contrastive

    loss, stats, *gradients = (x.cpu() for x in contrastive.contrastive_fwd(*arguments_of(call), grads))
    assert stats.dtype == loss.dtype == (torch.float64 if call["query"].dtype == torch.float64 else torch.float32)
    return named(call, loss, stats, tuple(gradients), grads)


def backward(call: dict, upstream: Tensor, grads: int) -> dict[str, Tensor]:
    """From statistics whose E was not asked for."""
    from ltkernels.triton import contrastive

    arguments = arguments_of(call)
    loss, stats, *_ = contrastive.contrastive_fwd(*arguments, 0)
    stats[3] = math.nan
    gradients = contrastive.contrastive_bwd(upstream.to(DEVICE), stats, *arguments, grads)
    return named(call, loss.cpu(), stats.cpu(), tuple(x.cpu() for x in gradients), grads)


def compare(call: dict, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """A logit has a relative error, so that its exponential has an absolute one of 1 / tau."""
    unit = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
    sharp = max(1.0, 1 / call["temperature"].min().item())
    for name, x in got.items():
        y = want[name]
        unchanged = x.isinf() & (x == y)
        x, y = torch.where(unchanged, 0.0, x.double()), torch.where(unchanged, 0.0, y)
        assert x.isfinite().all(), f"{name}: {x}"
        eps = unit[got[name].dtype]
        if got[name].dtype in (torch.float16, torch.bfloat16):
            bound = eps * y.abs().amax().item() + 1e-7
        else:
            bound = eps * sharp * (1.0 + y.abs().amax().item())
        error = (x - y).abs().amax().item()
        assert error <= bound, f"{name}: {error:.3g} > {bound:.3g}\ngot  {x}\nwant {y}"


def check(call: dict) -> None:
    """Forward pass with gradients, if the loss is a scalar, and backward pass with another upstream gradient."""
    grads = wanted(call)
    rows = call["query"].shape[0]
    scalar = call["reduction"] != 0
    compare(call, forward(call, grads | EXPECTED if scalar else EXPECTED), definition(call, None))
    upstream = torch.tensor(-1.5) if scalar else torch.linspace(-1, 2, rows)
    compare(call, backward(call, upstream.to(call["temperature"].dtype), grads), definition(call, upstream))


# --------------------------------------------------------------------------------------------------------- random calls


def random_case(seed: int) -> None:
    pick = random.Random(seed)

    def chance(probability: float) -> bool:
        return pick.random() < probability

    two_sided = chance(0.5)
    options: dict = {"denominator": seed % 6, "reduction": pick.choice([0, 1, 2])}
    loss = options["denominator"] < LOGSUMEXP
    for name, value in OPTIONS.items():
        if name in ("sample_weight", "log_normalizer", "extra_positive", "positive_index") and not loss:
            continue
        if chance(0.35):
            options[name] = value
    if "positive_index" in options:
        options.pop("pair_margin", None)
    if loss and chance(0.4):
        options["scale_by_temperature"] = True
    if options["denominator"] != NEGATIVES or "scale_by_temperature" in options:
        options.pop("log_normalizer", None)
    if options["denominator"] == LOGSUMEXP:
        options["exclude_self"] = chance(0.5)
    if "extra_positive" in options and chance(0.3) and "pair_margin" not in options:
        options["labels"] = None
    rows, width = pick.choice([2, 3, 9, 17, 33]), pick.choice([1, 7, 16, 19, 33])
    call = example(rows, pick.choice([2, 5, 37, 70]) if two_sided else None, width, seed, **options)
    if chance(0.2) and call["allowed"] is not None:
        call["allowed"] = call["allowed"][0].clone()
    if chance(0.2):
        call = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in call.items()}
    check(call)


CASES |= {f"random[{seed}]": partial(random_case, seed) for seed in range(RANDOM_CASES)}

# ----------------------------------------------------------------------------------------------------------- edge cases

DENOMINATORS = (ALL, OWN, NEGATIVES, LOGSUMEXP, LOGSUMEXP_OTHER_LABEL, LOGSUMEXP_SAME_LABEL)


@case
def sharp_and_flat_temperatures() -> None:
    for denominator in DENOMINATORS:
        for tau in (torch.full((9,), 0.01), torch.logspace(-2, 1, 9)):
            for keys in (None, 21):
                check(example(9, keys, denominator=denominator, temperature=tau))


@case
def one_row() -> None:
    """Nothing to contrast with, or one key only."""
    for denominator in DENOMINATORS:
        for reduction in (0, 1):
            check(example(1, denominator=denominator, reduction=reduction))
            check(example(1, 1, denominator=denominator, reduction=reduction))
        check(example(1, 5, denominator=denominator, labels=torch.zeros(1, dtype=torch.int64)))


@case
def no_positive_and_no_negative() -> None:
    for denominator in (ALL, OWN, NEGATIVES):
        for reduction in (0, 1):
            for label in (-1, 0):
                labels = torch.full((9,), label)
                check(example(denominator=denominator, labels=labels, reduction=reduction))
                check(example(9, 5, denominator=denominator, labels=labels, key_labels=labels[:5]))
            lonely = torch.tensor([0, 0, 1, 2, 3, -1, -1, 4, 4])
            check(example(denominator=denominator, labels=lonely, reduction=reduction))


@case
def weights_that_sum_to_nothing() -> None:
    call = example(sample_weight=torch.zeros(9))
    got = forward(call, wanted(call))
    assert got["loss"] == 0 and not got["dquery"].any()
    check(example(sample_weight=torch.tensor([1.0, -1.0] * 4 + [0.0]), labels=torch.zeros(9, dtype=torch.int64)))


@case
def whole_blocks_without_a_key() -> None:
    """Blocks of -inf before, between and after the keys that a row sees, and rows that see nothing."""
    for keys in (None, 150):
        n = keys or 80
        allowed = torch.zeros(n, dtype=torch.bool)
        allowed[70:75] = True
        bias = torch.zeros(n).masked_fill(~allowed, -INF)
        pairwise = torch.zeros(80 if keys is None else 9, n, dtype=torch.bool)
        pairwise[::2, 3], pairwise[1::3, n - 2] = True, True
        for denominator in (ALL, OWN, LOGSUMEXP_OTHER_LABEL) if keys else (NEGATIVES,):
            m = pairwise.shape[0]
            check(example(m, keys, 5, denominator=denominator, allowed=allowed))
            check(example(m, keys, 5, denominator=denominator, allowed=pairwise))
            check(example(m, keys, 5, denominator=denominator, key_bias=bias))


@case
def every_gradient_by_itself() -> None:
    for denominator in (ALL, OWN, LOGSUMEXP):
        for keys in (None, 21):
            call = example(9, keys, denominator=denominator, **{n: OPTIONS[n] for n in ("key_bias", "pair_margin")})
            if denominator == ALL:
                call["extra_positive"] = call["query"].flip(0)
            want = definition(call, None)
            for name in GRADIENTS:
                if call[name] is not None:
                    compare(call, forward(call, wanted(call, (name,))), want)
                    compare(call, backward(call, torch.ones(()), wanted(call, (name, "temperature"))), want)


@case
def both_gradients_of_vectors_per_key() -> None:
    call = example(key_bias=OPTIONS["key_bias"])
    compare(call, forward(call, wanted(call, ("temperature", "key_bias"))), definition(call, None))


@case
def log_normalizers() -> None:
    for keys in (None, 21):
        for options in ({}, {"positive_index": OPTIONS["positive_index"]}, {"extra_positive": OPTIONS["query_like"]}):
            call = example(9, keys, denominator=NEGATIVES, log_normalizer=OPTIONS["log_normalizer"], **options)
            check(call)
            check(call | {"reduction": 0})


OPTIONS["query_like"] = OPTIONS["extra_positive"]


@case
def margins_of_pairs_in_several_launches() -> None:
    with mock.patch("ltkernels.triton.contrastive.PAIRS_OF_A_LAUNCH", 4):  # of nine
        check(example(5, None, denominator=OWN, pair_margin=OPTIONS["pair_margin"]))


@case
def wide_embeddings() -> None:
    """More columns than a tile multiplies at once, and a gradient in several parts of the width."""
    for width in (130, 257):
        check(example(5, None, width, denominator=OWN, pair_margin=OPTIONS["pair_margin"]))
        check(example(5, 9, width, extra_positive=OPTIONS["extra_positive"], temperature=torch.full((5,), 0.05)))


@case
def sixteen_bits() -> None:
    """Storage, and coefficients rounded to 16 bits; the interpreter's products are in float32."""
    for dtype in (torch.float16, torch.bfloat16):
        for keys in (None, 70):
            call = example(33, keys, 18, key_bias=OPTIONS["key_bias"], temperature=torch.full((33,), 0.5))
            call["extra_positive"] = call["query"].flip(0)
            call = {n: x.to(dtype) if n in ("query", "key", "extra_positive") and x is not None else x
                    for n, x in call.items()}  # fmt: skip
            check(call)


@case
def coefficients_below_half_precision() -> None:
    """Of 1e-8, of long vectors: float16 would lose them if they were not scaled."""
    call = example(33, 70, 16, reduction=0)
    call["temperature"] = call["temperature"] * 1e4
    call = {n: (100 * x).half() if n in ("query", "key") else x for n, x in call.items()}
    upstream = torch.full((33,), 1e-3)
    compare(call, backward(call, upstream, wanted(call)), definition(call, upstream))


@case
def parts_of_the_keys() -> None:
    """Few rows and many keys: several programs share a row, and their sums are joined."""
    for denominator in (OWN, LOGSUMEXP_OTHER_LABEL):
        check(example(2, 290, 5, denominator=denominator, key_bias=OPTIONS["key_bias"]))
    allowed = torch.zeros(2, 290, dtype=torch.bool)
    allowed[0, 280:] = True
    check(example(2, 290, 5, allowed=allowed, extra_positive=OPTIONS["extra_positive"]))
    with mock.patch("ltkernels.triton.contrastive_launch.WORKSPACE", 0):
        check(example(2, 290, 5))


@case
def any_stride_and_any_dtype_of_labels() -> None:
    call = example(9, 21, 6)
    call["query"] = call["query"].t().contiguous().t()
    call["key"] = torch.cat([call["key"], call["key"]], 1)[:, :6]
    call["temperature"] = torch.tensor(0.3).expand(9)
    call["allowed"] = (torch.rand(21, 9, generator=torch.Generator().manual_seed(1)) < 0.8).t()
    for dtype in (torch.int32, torch.int16, torch.int8):
        check(call | {"labels": call["labels"].to(dtype), "key_labels": call["key_labels"].repeat_interleave(2)[::2]})
    check(call | {"query": call["query"][:1].expand(9, -1)})
    big = 2**40  # labels that differ in their upper half only
    check(call | {"labels": call["labels"].clamp(min=0) * big, "key_labels": call["key_labels"].clamp(min=0) * big})


@case
def nothing_to_do() -> None:
    check_empty = example(4, 3)
    no_rows = check_empty | {n: check_empty[n][:0] for n in ("query", "temperature", "labels")}
    got = forward(no_rows, wanted(no_rows))
    assert got["loss"] == 0 and got["dkey"].shape == (3, 7) and not got["dkey"].any()
    no_keys = check_empty | {n: check_empty[n][:0] for n in ("key", "key_labels")}
    got = forward(no_keys, wanted(no_keys) | EXPECTED)
    assert got["loss"] == 0 and not got["dquery"].any() and (got["lse"] == -INF).all() and not got["expected"].any()


@case
def a_bad_temperature_stays_in_its_row() -> None:
    others = [0, 1, 3, 4, 5, 6, 7, 8]
    for denominator in (ALL, OWN, NEGATIVES, LOGSUMEXP):
        call = example(reduction=0, labels=torch.arange(9) % 2, denominator=denominator)
        for value in (math.nan, 0.0, -0.5, 1e-39, INF):
            call["temperature"][2] = value
            got = forward(call, wanted(call, ("temperature",)))
            for name in ("loss", "dtemperature"):
                assert got[name][2].isnan() and got[name][others].isfinite().all(), (denominator, value, name)


@case
def a_bad_temperature_stays_in_its_row_in_half_precision() -> None:
    """One scale is taken from the coefficients of all rows."""
    call = example(9, 21, 6, reduction=0)
    call |= {name: call[name].half() for name in ("query", "key")}
    for value in (math.nan, 0.0):
        call["temperature"] = call["temperature"].index_fill(0, torch.tensor(2), value)
        gradient = forward(call, wanted(call, ("query",)))["dquery"]
        assert gradient[2].isnan().all() and gradient[[0, 1, *range(3, 9)]].isfinite().all(), value


def poisoned(call: dict, row: int | None) -> None:
    """Loss and gradients are NaN in the row, or in all rows for None; others lose nothing. A mean is NaN."""
    rows, every = call["query"].shape[0], row is None
    got, names = forward(call, 0), ("query", "temperature")
    want = torch.full((rows,), every) if every else torch.arange(rows) == row
    assert torch.equal(got["loss"].isnan(), want), (row, got["loss"])
    assert torch.equal(got["loss"].isnan(), definition(call, None)["loss"].isnan())
    for name, x in backward(call, torch.ones(rows), wanted(call, names)).items():
        assert name not in ("dtemperature", "dquery") or x[want].isnan().all(), (row, name, x)
        assert name != "dtemperature" or x[~want].isfinite().all(), (row, name, x)
    if call["denominator"] < LOGSUMEXP:
        for mean in (forward(call | {"reduction": 1}, wanted(call, names)), definition(call | {"reduction": 1}, None)):
            assert mean["loss"].isnan() and all(mean[f"d{name}"].isnan().any() for name in names), mean


@case
def a_positive_that_is_no_key_gives_nan() -> None:
    """What a CPU has an error for: no row may look as if it had no positive."""
    for denominator in (ALL, OWN, NEGATIVES):
        for keys in (None, 21):
            for bad in (21, 2**40, -1, -(2**40)) if keys else (9, 2**40, -1, 2):
                call = example(9, keys, denominator=denominator, reduction=0, positive_index=OPTIONS["positive_index"])
                call["positive_index"][2] = bad
                poisoned(call, 2)
    poisoned(call | {"extra_positive": call["query"].flip(0)}, 2)


@case
def a_label_that_is_none_gives_nan() -> None:
    """Below -1, or beyond the margins by pair: in its row, and for a key in every row."""
    for denominator in DENOMINATORS:
        if denominator == LOGSUMEXP:
            continue
        for bad, options in ((-2, {}), (3, {"pair_margin": OPTIONS["pair_margin"]}), (-(2**40), {"key_bias": None})):
            labels, key_labels = torch.arange(9) % 3, torch.arange(21) % 3
            options = options | {"denominator": denominator, "reduction": 0, "labels": labels}
            labels[2] = bad
            poisoned(example(9, 21, **options, key_labels=key_labels), 2)
            poisoned(example(9, **options), None)
            labels[2], key_labels[20] = 2, bad
            poisoned(example(9, 21, **options, key_labels=key_labels), None)
    labels, key_labels = torch.tensor([0, -2]), torch.arange(290) % 3  # in several parts of the keys
    poisoned(example(2, 290, 5, denominator=OWN, reduction=0, labels=labels, key_labels=key_labels), 1)


@case
def the_same_input_gives_the_same_bits() -> None:
    call = example(33, 70, 9, key_bias=OPTIONS["key_bias"], pair_margin=OPTIONS["pair_margin"])
    first, second = (forward(call, wanted(call)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
