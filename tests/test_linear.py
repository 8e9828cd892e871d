"""The linear form against formulas in float64: every option, any chunk size, and its accuracy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import definition, deviation, kernels_run, poisoned_memory, same_bits
from torch import Tensor

import ltkernels.functional as LF
from ltkernels.neighbors import NeighborMap

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CHUNKS = (1, 7, "N", "N + 1", "auto")
every_chunk = pytest.mark.parametrize("chunk", CHUNKS, ids=str)


def chunk_rows(chunk: int | str, rows: int) -> int | str:
    return {"N": max(rows, 1), "N + 1": rows + 1}.get(chunk, chunk)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def randint(high: int, rows: int, seed: int = 0) -> Tensor:
    return torch.randint(high, (rows,), generator=torch.Generator().manual_seed(seed))


def gradients(loss: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """Loss, and its gradients for uneven upstream gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    value = loss(*leaves)
    upstream = (torch.arange(value.numel(), dtype=value.dtype) % 5 + 0.5).reshape(value.shape)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


# ------------------------------------------------------------------------------------------------------------ formulas

N, D, C = 23, 6, 9
Y = randint(C, N)
COUNTS = torch.tensor([500.0, 300, 120, 70, 40, 22, 9, 4, 1], dtype=torch.float64)
LOG_PRIOR = (COUNTS / COUNTS.sum()).log()
MARGIN = 0.5 * (COUNTS.min() / COUNTS) ** 0.25
GAMMA = (COUNTS / COUNTS.max()) ** 0.15


def nll(v: Tensor) -> Tensor:
    return v.exp().sum(1).log() - v[torch.arange(N), Y]


def cosines(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w.T) / (x.square().sum(1).sqrt()[:, None] * w.square().sum(1).sqrt())


METHODS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], dict]] = {
    "plain": (lambda x, w: nll(x @ w.T), {}),
    "linear_bias": (lambda x, w: nll(x @ w.T + LOG_PRIOR), {"linear_bias": LOG_PRIOR}),
    "logit_adjustment": (lambda x, w: nll(x @ w.T + 1.5 * LOG_PRIOR), {"logit_bias": 1.5 * LOG_PRIOR}),
    "ldam": (
        lambda x, w: nll(30 * (cosines(x, w) - F.one_hot(Y, C) * MARGIN)),
        {"cosine": True, "scale": 30.0, "target_margin": MARGIN},
    ),
    "vs": (lambda x, w: nll(GAMMA * (x @ w.T) + LOG_PRIOR), {"logit_scale": GAMMA, "logit_bias": LOG_PRIOR}),
    "class_balanced": (lambda x, w: MARGIN[Y] * nll(x @ w.T), {"weight": MARGIN}),
}


@every_chunk
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", METHODS)
def test_method(one_thread: None, name: str, reduction: str, chunk: int | str) -> None:
    rows, options = METHODS[name]
    reduce = {
        "none": lambda r: r,
        "sum": torch.sum,
        "mean": lambda r: r.sum() / (options["weight"][Y].sum() if "weight" in options else N),
    }[reduction]
    options = options | {"reduction": reduction, "chunk_size": chunk_rows(chunk, N)}
    x, w = randn(N, D), randn(C, D, seed=1)
    with poisoned_memory():
        got = gradients(lambda x, w: LF.linear_margin_cross_entropy(x, w, Y, **options), x, w)
    torch.testing.assert_close(got, gradients(lambda x, w: reduce(rows(x, w)), x, w), rtol=1e-12, atol=1e-13)


# Target class 2 and auxiliary class 8 have no neighbours; auxiliary class 6 has two.
PAIRS = ((0, 4), (0, 6), (1, 5), (1, 6), (3, 7))
TARGETS = 4


def neighbor_map(pairs: object, target: int, auxiliary: int) -> NeighborMap:
    return NeighborMap.from_pairs(pairs, num_classes=target, num_auxiliary=auxiliary)


def is_silenced(k: int, j: int, mode: str) -> bool:
    if k < TARGETS:
        return mode != "auxiliary_only" and (k, j) in PAIRS
    if mode == "back" and j >= TARGETS and j != k:
        return True
    return mode != "target_only" and (j, k) in PAIRS


@every_chunk
@pytest.mark.parametrize("cosine", [False, True], ids=["linear", "cosine"])
@pytest.mark.parametrize(
    ("mode", "damping"), [("plain", 0.0), ("plain", 0.1), ("back", 0.0), ("target_only", 0.0), ("auxiliary_only", 0.3)]
)
def test_auxiliary(one_thread: None, mode: str, damping: float, cosine: bool, chunk: int | str) -> None:
    silenced = torch.tensor([[is_silenced(k, j, mode) for j in range(C)] for k in range(C)])[Y]
    options = {"mode": mode, "neighbor_weight": damping, "cosine": cosine, "scale": 4.0}
    options |= {"prior_counts": COUNTS, "tau": 0.7, "chunk_size": chunk_rows(chunk, N)}

    def formula(x: Tensor, w: Tensor) -> Tensor:
        v = 4.0 * (cosines(x, w) if cosine else x @ w.T) + 0.7 * LOG_PRIOR
        factor = 1 + (damping - 1) * silenced.double()
        return ((factor * v.exp()).sum(1).log() - v[torch.arange(N), Y]).mean()

    neighbors = neighbor_map(PAIRS, TARGETS, C - TARGETS)
    x, w = randn(N, D), randn(C, D, seed=1)
    with poisoned_memory():
        got = gradients(lambda x, w: LF.linear_auxiliary_cross_entropy(x, w, Y, neighbors, **options), x, w)
    torch.testing.assert_close(got, gradients(formula, x, w), rtol=1e-12, atol=1e-13)


# -------------------------------------------------------------------------------------------------- all options at once

maybe = st.sampled_from([None, "given", "learned"])
PROBLEMS = st.fixed_dictionaries(
    {
        "rows": st.integers(0, 65),
        "width": st.integers(1, 17),
        "classes": st.integers(1, 40),
        "dtype": st.sampled_from((torch.float64, *DTYPES)),
        "chunk": st.sampled_from(CHUNKS),
        "target": st.sampled_from(["int64", "int32", "ignored", "all_ignored", "probabilities"]),
        "classifier": st.sampled_from(["plain", "bias", "learned_bias", "cosine"]),
        "frozen": st.sampled_from([None, "input", "linear_weight", "tied"]),
        "mask": st.sampled_from([None, None, "classes", "rows"]),
        "weight": st.booleans(),
        "neighbors": st.sampled_from([None, None, "plain", "back", "damped"]),
        **{name: maybe for name in ("logit_scale", "logit_bias", "target_margin", "pairwise_margin", "sample_weight")},
        "scale": st.sampled_from([1.0, 3.0, "learned"]),
        "smoothing": st.sampled_from([0.0, 0.1]),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "lse": st.booleans(),
        "seed": st.integers(0, 999),
    }
)


def make_problem(f: dict) -> tuple[dict, dict]:
    """Tensors that may require grad, by name, and the other arguments."""
    generator = torch.Generator().manual_seed(f["seed"])
    n, d, c = f["rows"], f["width"], f["classes"]
    wide = torch.float64 if f["dtype"] == torch.float64 else torch.float32
    tensors = {"input": torch.randn(n, d, generator=generator), "linear_weight": torch.randn(c, d, generator=generator)}
    tensors["linear_weight"] /= d**0.5
    if "bias" in f["classifier"]:
        tensors["linear_bias"] = torch.randn(c, generator=generator)
    tensors = {name: x.to(f["dtype"]) for name, x in tensors.items()}
    probabilities = f["target"] == "probabilities"
    shapes = {"logit_scale": (c,), "logit_bias": (c,), "target_margin": (c,), "sample_weight": (n,)}
    shapes |= {} if probabilities else {"pairwise_margin": (c, c)}
    for name, shape in shapes.items():
        if f[name] is not None:
            tensors[name] = torch.rand(shape, generator=generator).to(wide) + 0.25
    if f["scale"] == "learned":
        tensors["scale"] = torch.tensor(2.5, dtype=wide)
    target = torch.randint(c, (n,), generator=generator)
    options = {"reduction": f["reduction"], "label_smoothing": f["smoothing"], "return_lse": f["lse"]}
    if f["weight"]:
        options["weight"] = torch.rand(c, generator=generator).to(wide) + 0.25
    if f["mask"] is not None:
        options["mask"] = torch.rand(*((n,) if f["mask"] == "rows" else ()), c, generator=generator) < 0.9
    if f["neighbors"] is not None and c > 1:
        first = (c + 1) // 2
        pairs = [(int(k), j) for j, k in enumerate(torch.randint(first, (c - first,), generator=generator), first)]
        options["neighbors"] = neighbor_map(pairs, first, c - first)
        options["mode"] = "back" if f["neighbors"] == "back" else "plain"
        options["neighbor_weight"] = 0.3 if f["neighbors"] == "damped" else 0.0
        if probabilities:
            options["row_class"] = target
    if probabilities:
        target = torch.randn(n, c, generator=generator).softmax(1).to(f["dtype"])
    elif f["target"] == "int32":
        target = target.int()
    elif f["target"] != "int64":
        target[:: 1 if f["target"] == "all_ignored" else 3] = -100
    return tensors, options | {"target": target} | ({} if "scale" in tensors else {"scale": f["scale"]})


def linear(input: Tensor, linear_weight: Tensor, target: Tensor, **options: object) -> Tensor | tuple:
    function = LF.linear_auxiliary_cross_entropy if "neighbors" in options else LF.linear_margin_cross_entropy
    return function(input, linear_weight, target, **options)


def composed(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None, cosine: bool, **options
) -> Tensor | tuple:
    if cosine:
        input, linear_weight = F.normalize(input, dim=1), F.normalize(linear_weight, dim=1)
    return definition(F.linear(input, linear_weight, linear_bias), target, **options)


def run(function: Callable, f: dict, tensors: dict, options: dict) -> dict[str, Tensor]:
    """Outputs and gradients; "tied" takes the features from the classifier itself."""
    learned = [x for x in tensors if f.get(x) == "learned" or x == "scale"]
    learned += [x for x in ("input", "linear_weight") if f["frozen"] != x and not (f["frozen"] == "tied" == x)]
    learned += ["linear_bias"] if f["classifier"] == "learned_bias" else []
    leaves = {x: tensors[x].detach().clone().requires_grad_() for x in learned}
    values = tensors | leaves
    if f["frozen"] == "tied":
        rows = torch.arange(f["rows"]) % f["classes"]
        values["input"] = values["linear_weight"][rows] * 2 + values["input"]
    outputs = function(**values, **options, cosine=f["classifier"] == "cosine")
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = dict(zip(("loss", "lse"), (x.detach() for x in outputs[: 1 + f["lse"]]), strict=False))
    if function is linear:
        results["row_loss"] = outputs[-1].row_loss
    roots = [x for x in outputs[: 1 + f["lse"]] if x.requires_grad]
    if roots:
        upstream = [torch.full_like(x, 0.75) for x in roots]
        results |= zip(leaves, torch.autograd.grad(roots, list(leaves.values()), upstream), strict=True)
    return results


def widened(x: object) -> object:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


@settings(max_examples=300)
@given(features=PROBLEMS)
def test_any_problem(one_thread: None, features: dict) -> None:
    tensors, options = make_problem(features)
    rows = options | {"reduction": "none", "return_lse": False}
    double = {name: x.double() for name, x in tensors.items()}, {name: widened(x) for name, x in options.items()}
    exact = run(composed, features, *double)
    exact["row_loss"] = run(composed, features | {"lse": False}, double[0], double[1] | rows)["loss"]
    eager = run(composed, features, tensors, options)
    eager["row_loss"] = run(composed, features | {"lse": False}, tensors, rows)["loss"]
    chunk = {"chunk_size": chunk_rows(features["chunk"], features["rows"]), "return_stats": True}
    before = {name: x.clone() for name, x in tensors.items()}
    with poisoned_memory():
        got = run(linear, features, tensors, options | chunk)
    assert all(same_bits(before[name], x) for name, x in tensors.items()), "an input was modified"
    assert got.keys() == exact.keys()
    wrong = [f"{name}: {why}" for name in got if (why := off(got[name], exact[name], eager[name], features["dtype"]))]
    assert not wrong, "\n".join(wrong)


def off(got: Tensor, exact: Tensor, eager: Tensor, dtype: torch.dtype) -> str | None:
    """Looser than the rule, which is for sizes at which the largest error of plain torch is not a matter of luck."""
    assert got.shape == exact.shape and got.dtype == eager.dtype
    got, eager = got.double(), eager.double()
    finite = exact.isfinite()
    if not ((got == exact) | (got.isnan() & exact.isnan()) | (finite & got.isfinite())).all():
        return f"expected {exact}, got {got}"
    if not finite.any():
        return None
    error, eager_error = ((x - exact)[finite].abs().max().item() for x in (got, eager))
    unit = 1e-12 if dtype == torch.float64 else 32 * torch.finfo(dtype).eps
    limit = 4 * eager_error + unit * (1 + exact[finite].abs().max().item())
    return None if error <= limit else f"error {error:.3g} above {limit:.3g} (plain torch: {eager_error:.3g})"


# -------------------------------------------------------------------------------------------------- accuracy, chunks


def eager(x: Tensor, w: Tensor, y: Tensor, bias: Tensor | None, cosine: bool, reduction: str) -> Tensor:
    f = F.linear(F.normalize(x, dim=1), F.normalize(w, dim=1)) if cosine else F.linear(x, w)
    f = 16 * f if cosine else f
    return F.cross_entropy(f if bias is None else f + bias.to(f.dtype), y, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("form", ["plain", "bias", "cosine"])
@pytest.mark.parametrize(("rows", "chunk"), [(512, 64), (512, "auto"), (4096, 16)], ids=["64", "auto", "many"])
def test_accuracy(one_thread: None, form: str, reduction: str, dtype: torch.dtype, rows: int, chunk: int | str) -> None:
    """The rule of tests/oracle.py. 256 chunks: a gradient to the classifier added up in 16 bits would be far off."""
    x, w, y = randn(rows, 24, dtype=dtype), randn(50, 24, seed=1).mul(0.4).to(dtype), randint(50, rows)
    bias = randn(50, seed=2).float() if form == "bias" else None
    options = {"cosine": form == "cosine", "scale": 16.0 if form == "cosine" else 1.0, "chunk_size": chunk}
    options |= {"logit_bias": bias, "reduction": reduction}
    got = gradients(lambda x, w: LF.linear_margin_cross_entropy(x, w, y, **options), x, w)
    same = bias, form == "cosine", reduction
    plain = gradients(lambda x, w: eager(x, w, y, *same), x, w)
    exact = gradients(lambda x, w: eager(x, w, y, *same), x.double(), w.double())
    for name, a, b, e in zip(("loss", "input", "linear_weight"), got, exact, plain, strict=True):
        # A loss in float32 of 16-bit logits is as good as the logits are.
        a = a.to(dtype) if name == "loss" else a
        assert (why := deviation(a, b, e)) is None, f"{name}: {why}"


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_of_many_chunks(one_thread: None, reduction: str) -> None:
    """Added up in a row, thousands of float32 numbers would cost the last digits."""
    x, w, y = randn(4096, 8, dtype=torch.float32), randn(50, 8, seed=1, dtype=torch.float32), randint(50, 4096)
    exact = F.cross_entropy(x.double() @ w.double().T, y, reduction=reduction)
    loss = LF.linear_margin_cross_entropy(x, w, y, reduction=reduction, chunk_size=1)
    assert abs(loss - exact) <= 2 * torch.finfo(torch.float32).eps * exact


@pytest.mark.parametrize("cosine", [False, True], ids=["linear", "cosine"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_chunk_size_changes_nothing(one_thread: None, reduction: str, cosine: bool) -> None:
    x, w, y = randn(600, 12, dtype=torch.float32), randn(31, 12, seed=1, dtype=torch.float32), randint(31, 600)

    def results(chunk: int | str) -> list[Tensor]:
        options = {"cosine": cosine, "chunk_size": chunk, "reduction": reduction}
        return gradients(lambda x, w: LF.linear_margin_cross_entropy(x, w, y, **options), x, w)

    whole = results(600)
    for chunk in (1, 7, 299, 601, 2**40, 2**80, "auto"):
        for a, b in zip(results(chunk), whole, strict=True):
            assert (a - b).abs().max() <= 1e-6 * b.abs().max()
    assert all(same_bits(a, b) for a, b in zip(results("auto"), whole, strict=True))  # few rows are one chunk


@pytest.mark.parametrize("chunk", [64, "auto"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_threads_change_nothing(reduction: str, chunk: int | str) -> None:
    """Where torch's own matrix products have the same bits for any number of threads."""
    x, w, y = randn(400, 32, dtype=torch.float32), randn(100, 32, seed=1, dtype=torch.float32), randint(100, 400)
    options = {"chunk_size": chunk, "reduction": reduction, "cosine": True, "logit_bias": torch.rand(100)}
    before, results, products = torch.get_num_threads(), [], []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients(lambda x, w: LF.linear_margin_cross_entropy(x, w, y, **options), x, w))
            f = x @ w.T
            rows = 400 if chunk == "auto" else chunk
            products.append([f[:rows], f[:rows] @ w, f[:rows].T @ x[:rows]])
    finally:
        torch.set_num_threads(before)
    if not all(same_bits(a, b) for other in products[1:] for a, b in zip(products[0], other, strict=True)):
        pytest.skip("torch's matrix products depend on the number of threads")
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_kernels_that_run() -> None:
    """One call of the row kernel a chunk, and the logits a second time only where the docstring says so."""
    x, w, y = randn(20, 4).requires_grad_(), randn(5, 4, seed=1).requires_grad_(), randint(5, 20)
    bias = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    for options, expected in (
        ({}, {"forward_gradient": 3}),
        ({"linear_bias": bias, "reduction": "sum", "weight": bias.detach() + 1}, {"forward_gradient": 3}),
        ({"reduction": "none"}, {"forward": 3, "backward": 3}),
        ({"return_lse": True}, {"forward": 3, "backward": 3}),
        ({"logit_bias": bias}, {"forward": 3, "backward": 3}),
    ):
        with kernels_run() as ran:
            outputs = LF.linear_margin_cross_entropy(x, w, y, chunk_size=8, **options)
            (outputs[0] if isinstance(outputs, tuple) else outputs).sum().backward()
        assert ran == expected
    for features in (x.detach().half(), x.detach()):
        with kernels_run() as ran, torch.no_grad():
            LF.linear_margin_cross_entropy(features, w.to(features.dtype), y, chunk_size=8, return_stats=True)
        assert ran == {"forward": 3}
