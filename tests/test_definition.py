"""The definition, ltkernels.reference, against loops over Python floats and against torch.

The loops are written from the formulas in the documentation, value and gradient, and share no code with the definition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Problem, definition, evaluate, silenced_sets, upstream_of
from problems import FEATURES, make_problem, possible
from torch import Tensor

INF, NAN = math.inf, math.nan
SMALL = FEATURES | {"rows": (0, 1, 2, 4), "classes": (1, 2, 3, 5), "dtype": (torch.float64,)}
SMALL |= {"content": ("normal", "wide", "equal", "minus_inf"), "layout": ("contiguous",)}


def small_problems(**features: tuple) -> st.SearchStrategy[Problem]:
    values = SMALL | features
    choices = st.fixed_dictionaries({name: st.sampled_from(options) for name, options in values.items()})
    return st.builds(make_problem, choices.filter(possible), st.integers(0, 2**20))


# ------------------------------------------------------------------------------------------------------ loops, values


@dataclass
class Row:
    """One row, in Python floats."""

    f: list[float]
    t: list[float]  # target distribution
    y: int | None  # class index, None for probabilities
    allowed: list[bool]
    u: float
    silenced: set[int]


@dataclass
class Vectors:
    """The class vectors in Python floats, with the values that stand for absent ones."""

    a: list[float]
    b: list[float]
    m: list[float]
    w: list[float]
    delta: list[list[float]]
    s: float
    eps: float
    lam: float


def vectors_of(problem: Problem) -> Vectors:
    classes, options = problem.logits.shape[1], problem.options

    def vector(name: str, default: float) -> list[float]:
        value = options.get(name)
        return [default] * classes if value is None else value.expand(classes).tolist()

    delta = options.get("pairwise_margin")
    return Vectors(
        a=vector("logit_scale", 1.0),
        b=vector("logit_bias", 0.0),
        m=vector("target_margin", 0.0),
        w=vector("weight", 1.0),
        delta=[[0.0] * classes for _ in range(classes)] if delta is None else delta.tolist(),
        s=float(options.get("scale", 1.0)),
        eps=options.get("label_smoothing", 0.0),
        lam=options.get("neighbor_weight", 1.0),
    )


def rows_of(problem: Problem) -> list[Row | None]:
    """None for an ignored row."""
    rows: list[Row | None] = []
    classes, mask, u = problem.logits.shape[1], problem.options.get("mask"), problem.options.get("sample_weight")
    neighbors, row_class = problem.options.get("neighbors"), problem.options.get("row_class")
    silenced = None if neighbors is None else silenced_sets(neighbors, problem.options["mode"])
    for i, (f, target) in enumerate(zip(problem.logits.tolist(), problem.target.tolist(), strict=True)):
        if target == problem.options.get("ignore_index", -100):
            rows.append(None)
            continue
        probabilities = isinstance(target, list)
        t = target if probabilities else [1.0 if j == target else 0.0 for j in range(classes)]
        allowed = [True] * classes
        if mask is not None:
            allowed = mask[i].tolist() if mask.dim() == 2 else mask.tolist()
        k = int(row_class[i]) if probabilities and silenced is not None else target
        out = set() if silenced is None else silenced[k]
        rows.append(Row(f, t, None if probabilities else target, allowed, 1.0 if u is None else u[i].item(), out))
    return rows


def adjusted(row: Row, p: Vectors) -> list[float]:
    v = []
    for j, f in enumerate(row.f):
        pair = 0.0 if row.y is None else p.delta[row.y][j]
        if j in row.silenced:
            pair += math.log(p.lam) if p.lam else -INF
        v.append(p.s * (p.a[j] * f - p.m[j] * row.t[j]) + p.b[j] + pair if row.allowed[j] else -INF)
    return v


def masses(row: Row, p: Vectors) -> list[float]:
    """t' without u. A masked target keeps its mass, which makes the loss +inf; masked probabilities are dropped.

    So is all mass on classes that are silenced altogether.
    """
    count = sum(row.allowed)
    mass = []
    for j, t in enumerate(row.t):
        kept = t if row.allowed[j] or row.y is not None else 0.0
        present = 0.0 if p.lam == 0 and j in row.silenced else 1.0
        mass.append(present * p.w[j] * ((1 - p.eps) * kept + (p.eps / count if row.allowed[j] else 0.0)))
    return mass


def log_sum_exp(v: list[float]) -> float:
    top = max(v)
    return NAN if top == -INF else top + math.log(math.fsum(math.exp(x - top) for x in v))


def row_loss(row: Row, p: Vectors) -> float:
    v, mass = adjusted(row, p), masses(row, p)
    lse = log_sum_exp(v)
    return math.fsum(mass) * lse - sum(t * x for t, x in zip(mass, v, strict=True) if t != 0)


def brute_force(problem: Problem) -> tuple[list[float] | float, list[float]]:
    p, rows = vectors_of(problem), rows_of(problem)
    losses = [0.0 if row is None else row.u * row_loss(row, p) for row in rows]
    lse = [0.0 if row is None else log_sum_exp(adjusted(row, p)) for row in rows]
    reduction = problem.options.get("reduction", "mean")
    if reduction == "none":
        return losses, lse
    z = normalizer(rows, p) if reduction == "mean" else 1.0
    return (sum(losses) / z if z else NAN), lse


def normalizer(rows: list[Row | None], p: Vectors) -> float:
    return math.fsum(row.u * (1.0 if row.y is None else p.w[row.y]) for row in rows if row is not None)


@settings(max_examples=1000)
@given(problem=small_problems(grads=("no_grad",), lse=("lse",)))
def test_value(one_thread: None, problem: Problem) -> None:
    loss, lse = brute_force(problem)
    got = evaluate(definition, problem)
    close(got["loss"], loss)
    close(got["lse"], lse)


def close(got: Tensor, expected: list | float, largest_term: float = 1.0) -> None:
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12 * max(1.0, largest_term), equal_nan=True)


# --------------------------------------------------------------------------------------------------- loops, gradients


def brute_force_gradients(problem: Problem) -> dict[str, list]:
    """The closed formulas: g = T' softmax(v) - t', and what each argument gets of it."""
    p, rows = vectors_of(problem), rows_of(problem)
    classes, reduction = problem.logits.shape[1], problem.options.get("reduction", "mean")
    z = normalizer(rows, p) if reduction == "mean" else 1.0
    upstream = upstream_of(torch.ones(len(rows) if reduction == "none" else (), dtype=torch.float64))
    upstream = upstream.expand(len(rows)).tolist()
    upstream_lse = upstream_of(torch.ones(len(rows), dtype=torch.float64)).tolist()
    mean_loss = sum(row.u * row_loss(row, p) for row in rows if row is not None) / z if z else NAN
    grads = {"logits": [], "sample_weight": [], "scale": 0.0, "pairwise_margin": [[0.0] * classes for _ in p.delta]}
    grads |= {name: [0.0] * classes for name in ("logit_scale", "logit_bias", "target_margin")}
    for i, row in enumerate(rows):
        if row is None:
            grads["logits"].append([0.0] * classes)
            grads["sample_weight"].append(0.0)
            continue
        v, mass = adjusted(row, p), masses(row, p)
        c, lse = upstream[i] * row.u / z, log_sum_exp(v)
        e = upstream_lse[i] if problem.options.get("return_lse") else 0.0
        g = [
            (c * math.fsum(mass) + e) * math.exp(v[j] - lse) - c * mass[j] if row.allowed[j] else 0.0
            for j in range(classes)
        ]
        grads["logits"].append([p.s * p.a[j] * g[j] for j in range(classes)])
        k = 1.0 if row.y is None else p.w[row.y]
        share = row_loss(row, p) - (k * mean_loss if reduction == "mean" else 0.0)
        grads["sample_weight"].append(upstream[i] * share / z)
        for j in range(classes):
            f = 0.0 if row.f[j] == -INF else row.f[j]
            grads["logit_scale"][j] += p.s * f * g[j]
            grads["logit_bias"][j] += g[j]
            grads["target_margin"][j] -= p.s * row.t[j] * g[j]
            grads["scale"] += (p.a[j] * f - p.m[j] * row.t[j]) * g[j]
            if row.y is not None:
                grads["pairwise_margin"][row.y][j] += g[j]
    return grads


# Finite gradients: every row has a class, and no row a loss of infinity.
FINITE = {"content": ("normal", "wide", "equal"), "mask": ("no_mask",), "rows": (1, 2, 4)}


@settings(max_examples=1000)
@given(problem=small_problems(grads=("grad_all",), target=("int64", "ignored", "probabilities"), **FINITE))
def test_gradient(one_thread: None, problem: Problem) -> None:
    if problem.options["reduction"] == "mean" and not normalizer(rows_of(problem), vectors_of(problem)):
        return  # all rows ignored: NaN, see test_all_rows_ignored
    compare_gradients(problem)


@settings(max_examples=500)
@given(problem=small_problems(grads=("grad_all",), **FINITE | {"mask": ("class_mask", "row_mask")}))
def test_gradient_under_a_mask(one_thread: None, problem: Problem) -> None:
    mask = problem.options["mask"].expand(problem.logits.shape).clone()
    mask[:, 0] = True  # a class for each row
    if (row_class := problem.options.get("row_class")) is not None:
        mask[torch.arange(len(mask)), row_class] = True  # the first may be silenced
    if not problem.target.is_floating_point():
        kept = problem.target != -100
        mask[kept.nonzero()[:, 0], problem.target[kept].long()] = True
    problem.options["mask"] = mask
    if problem.options["reduction"] == "mean" and not normalizer(rows_of(problem), vectors_of(problem)):
        return
    compare_gradients(problem)


def compare_gradients(problem: Problem) -> None:
    got, expected = evaluate(definition, problem), brute_force_gradients(problem)
    for name in problem.requires_grad:
        want = sum(expected[name]) if got[f"d{name}"].dim() == 0 and name == "logit_scale" else expected[name]
        close(got[f"d{name}"], want, largest_term=cancelling_term(problem) if name == "sample_weight" else 1.0)


def cancelling_term(problem: Problem) -> float:
    """The largest r_i / Z: du_i = (r_i - k_i loss) / Z is 0 for a single row, but for the rounding of its terms."""
    p, rows = vectors_of(problem), rows_of(problem)
    z = normalizer(rows, p) if problem.options.get("reduction", "mean") == "mean" else 1.0
    return max((abs(row_loss(row, p) / z) for row in rows if row is not None), default=0.0)


# --------------------------------------------------------------------------------------------------------- known cases


def test_documented_example_by_hand() -> None:
    """LDAM on two classes: the loss is log(1 + exp(s (f_other - (f_target - m))))."""
    logits, margin = torch.tensor([[0.5, 0.2]], dtype=torch.float64), torch.tensor([0.1, 0.4], dtype=torch.float64)
    loss = definition(logits, torch.tensor([0]), target_margin=margin, scale=30.0)
    assert loss.item() == pytest.approx(math.log1p(math.exp(30 * (0.2 - 0.4))), rel=1e-12)


def test_scale_does_not_multiply_the_bias() -> None:
    logits, bias = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([0.0, 2.0], dtype=torch.float64)
    loss = definition(logits, torch.tensor([0]), logit_bias=bias, scale=3.0)
    assert loss.item() == pytest.approx(math.log1p(math.exp(2 - 3)), rel=1e-12)


def test_pairwise_margin_is_the_row_of_the_target() -> None:
    logits, delta = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.0, 5.0], [7.0, 0.0]], dtype=torch.float64)
    assert definition(logits, torch.tensor([0]), pairwise_margin=delta).item() == pytest.approx(math.log1p(math.e**5))
    assert definition(logits, torch.tensor([1]), pairwise_margin=delta).item() == pytest.approx(math.log1p(math.e**7))


# --------------------------------------------------------------------------------------------------------------- torch


@settings(max_examples=500)
@given(
    problem=small_problems(
        neighbors=("no_neighbors",),
        affine=("no_affine",),
        margin=("no_margin",),
        mask=("no_mask",),
        weight=("no_weight", "class_weight"),
        target=("int64", "ignored", "probabilities"),
        content=("normal", "wide", "equal"),
        grads=("grad_logits",),
        lse=("no_lse",),
        rows=(0, 1, 4, 16),
        classes=(1, 2, 5, 12),
    )
)
def test_equals_torch(one_thread: None, problem: Problem) -> None:
    options = {name: problem.options.get(name) for name in ("weight", "reduction", "label_smoothing")}
    problem = Problem(problem.logits, problem.target, options)
    got, expected = evaluate(definition, problem), evaluate(F.cross_entropy, problem)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-12, equal_nan=True)
