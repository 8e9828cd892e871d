"""The contrastive loss row by row from its formulas, the definition, and how far a kernel may be from it.

``formulas`` is written from the mathematics alone, loss and gradients, in numpy. ``check`` holds a kernel to the rule
of oracle.py against the definition in float64; where sums cancel, the sums of absolute terms say what a precision can
do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from oracle import deviation, poisoned_memory, same_bits, widened
from torch import Tensor

import ltkernels.functional as LF
from ltkernels import _ops, reference

Results = dict[str, Tensor]

KERNEL = _ops.uses_kernel(torch.empty(0))  # a kernel, not the definition, is what these tests run
OPTIONS = (
    "labels", "key_labels", "positive_index", "allowed", "key_bias", "pair_margin", "sample_weight", "log_normalizer",
    "extra_positive",
)  # fmt: skip
DIFFERENTIABLE = ("query", "key", "temperature", "key_bias", "pair_margin", "sample_weight", "extra_positive")
STATS = ("row_loss", "logsumexp", "positive", "expected")


@dataclass(frozen=True)
class Case:
    """Arguments of one call, the names of those that require grad, and the gradient of the loss (None: no backward)."""

    arguments: dict
    requires_grad: tuple[str, ...] = ()
    upstream: Tensor | float = 1.0

    @property
    def dtype(self) -> torch.dtype:
        return self.arguments["query"].dtype

    def double(self) -> Case:
        """The same values in float64; exact."""
        arguments = {name: widened(value) for name, value in self.arguments.items()}
        return Case(arguments, self.requires_grad, widened(self.upstream))


def public(arguments: dict) -> Results:
    """The public function: contrastive_loss, or similarity_logsumexp where the arguments name what it excludes."""
    if "exclude" in arguments:
        return {"loss": LF.similarity_logsumexp(**arguments)}
    loss, stats = LF.contrastive_loss(**arguments, return_stats=True)
    return {"loss": loss} | stats._asdict()


def definition(arguments: dict) -> Results:
    """The same from reference.py."""
    given = dict(arguments)
    query, key, temperature = given.pop("query"), given.pop("key", None), given.pop("temperature")
    if not isinstance(temperature, Tensor):
        temperature = torch.tensor(temperature, dtype=torch.promote_types(query.dtype, torch.float32))
    exclude_self, denominator = True, reference.ALL
    if is_logsumexp := "exclude" in given:
        exclude = given.pop("exclude")
        exclude_self = exclude is not None
        denominator = {"same_label": reference.LOGSUMEXP_OTHER_LABEL, "different_label": reference.LOGSUMEXP_SAME_LABEL}
        denominator = denominator.get(exclude, reference.LOGSUMEXP)
        given["reduction"] = "none"
    else:
        name = given.pop("denominator", "all")
        denominator = {"all": reference.ALL, "own": reference.OWN, "negatives": reference.NEGATIVES}[name]
    if given.pop("normalize", False):
        query, key, given["extra_positive"] = (
            None if x is None else reference.directions(x.to(accumulation(x.dtype)))  # not rounded to 16 bits again
            for x in (query, key, given.get("extra_positive"))
        )
    tail = given.pop("scale_by_temperature", False), given.pop("reduction", "mean")
    options = [given.pop(name, None) for name in OPTIONS]
    assert not given
    temperature = temperature.expand(len(query))
    loss, stats = reference.contrastive(query, key, temperature, *options, denominator, exclude_self, *tail)
    if is_logsumexp:
        return {"loss": loss}
    return {"loss": loss} | dict(zip(("logsumexp", "positive", "row_loss", "expected"), stats[:4], strict=True))


def evaluate(function: Callable[[dict], Results], case: Case) -> Results:
    """Results of ``function`` and the gradients of what requires grad, which share the memory of the arguments."""
    arguments, leaves = dict(case.arguments), {}
    for name in case.requires_grad:
        arguments[name] = leaves[name] = arguments[name].detach().requires_grad_()
    results = function(arguments)
    loss = results["loss"]
    results = {name: x.detach() for name, x in results.items()}
    if leaves:
        upstream = torch.as_tensor(case.upstream, dtype=loss.dtype).expand(loss.shape)
        grads = torch.autograd.grad(loss, list(leaves.values()), upstream)
        results |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results


# ------------------------------------------------------------------------------------------------------------ formulas


def formulas(case: Case, absolute: bool = False) -> dict[str, np.ndarray]:
    """All results from the formulas, a row at a time. ``absolute``: sums of the absolute values of their terms."""

    def array(name: str) -> np.ndarray | None:
        x = case.arguments.get(name)
        return x.detach().double().numpy() if isinstance(x, Tensor) and x.is_floating_point() else _numpy(x)

    def sized(x: np.ndarray) -> np.ndarray:  # for sums of absolute terms
        return abs(x) if absolute else x

    minus = 1.0 if absolute else -1.0
    options = case.arguments
    q, e, u = array("query"), array("extra_positive"), array("sample_weight")
    k = q if options.get("key") is None else array("key")
    if options.get("normalize"):
        q, k, e = _unit(q), _unit(k), None if e is None else _unit(e)
    rows, keys = len(q), len(k)
    tau = np.broadcast_to(np.asarray(options["temperature"], dtype=float), (rows,))
    labels, index, allowed, rho = (array(x) for x in ("labels", "positive_index", "allowed", "pair_margin"))
    key_labels = labels if options.get("key_labels") is None else array("key_labels")
    bias = np.zeros(keys) if options.get("key_bias") is None else array("key_bias")
    u = np.ones(rows) if u is None else u
    nu, scaled, kind = array("log_normalizer"), options.get("scale_by_temperature"), options.get("denominator", "all")
    exclude = options.get("exclude", "self")
    is_logsumexp = "exclude" in options

    row_loss, lse, mean, expected = np.zeros(rows), np.full(rows, -np.inf), np.zeros(rows), np.zeros(rows)
    slope, per_tau = np.zeros((rows, keys + 1)), np.zeros(rows)  # dL_i / d<q_i, k_j>, the last for e_i; dL_i / dtau_i
    share = np.zeros((rows, keys + 1))  # dL_i / dc_j
    counted, size = np.zeros(rows, bool), np.zeros(rows)
    for i in range(rows):
        seen = np.ones(keys + 1, bool)
        seen[keys] = e is not None
        if options.get("key") is None and exclude is not None:
            seen[i] = False
        if allowed is not None:
            seen[:keys] &= allowed if allowed.ndim == 1 else allowed[i]
        positive, c = np.zeros(keys + 1, bool), np.append(bias, 0.0)
        if labels is not None and labels[i] >= 0:
            positive[:keys] = key_labels == labels[i]
            if rho is not None:
                known = key_labels >= 0
                c[:keys][known] += rho[labels[i], key_labels[known]]
        if index is not None:
            positive[index[i]] = True
        positive[keys] = e is not None
        same, positive = positive, positive & seen
        x = np.append(k @ q[i], q[i] @ e[i] if e is not None else 0.0)
        s, among = x / tau[i], seen.copy()
        if kind != "all":
            among &= ~positive
        if is_logsumexp and exclude in ("same_label", "different_label"):
            among &= same if exclude == "different_label" else ~same
        among &= c > -np.inf
        logits = np.where(among, s + np.where(among, c, 0.0), -np.inf)
        p = np.zeros(keys + 1)
        if among.any():
            lse[i] = logits.max() + np.log(np.exp(logits - logits.max()).sum())
            p = np.exp(logits - lse[i])
        count = positive.sum()
        t = positive / max(count, 1)
        mean[i], expected[i] = (t * s).sum(), (p * s).sum()
        counted[i] = is_logsumexp or count > 0
        terms = np.append(abs(k) @ abs(q[i]), abs(q[i]) @ abs(e[i]) if e is not None else 0.0)
        size[i] = terms.max() / tau[i] + abs(c[among]).max(initial=0.0)
        if is_logsumexp:
            row_loss[i], slope[i], share[i] = lse[i], p / tau[i], p
        elif counted[i] and among.any():
            if nu is not None:
                w = np.where(among, np.exp(logits - mean[i] - nu[i]), 0.0)
                row_loss[i] = (w * sized(x + minus * tau[i] * mean[i])).sum()
                slope[i] = w + minus * w.sum() * t
            elif kind == "own":
                gap = lse[i] - s
                row_loss[i] = (t * np.logaddexp(0.0, gap)).sum()
                sigmoid = t * np.exp(-np.logaddexp(0.0, -gap))
                share[i] = sigmoid.sum() * p
                slope[i] = (share[i] + minus * sigmoid) / tau[i]
            else:
                row_loss[i] = sized(lse[i]) + minus * sized(mean[i])
                share[i], slope[i] = p, (p + minus * t) / tau[i]
        if nu is None:
            per_tau[i] = minus * (slope[i] * sized(s)).sum()
        if scaled:
            per_tau[i] = row_loss[i] + tau[i] * per_tau[i]
            row_loss[i], slope[i], share[i] = tau[i] * row_loss[i], tau[i] * slope[i], tau[i] * share[i]

    is_mean = not is_logsumexp and options.get("reduction", "mean") == "mean"
    z = u[counted].sum() if is_mean else 1.0
    u, inverse = np.where(counted, sized(u), 0.0), sized(1 / z) if z else 0.0
    upstream = sized(np.broadcast_to(np.asarray(case.upstream, dtype=float), (rows,)))
    weighted = np.where(counted, u * np.where(counted, row_loss, 0.0), 0.0)
    each = is_logsumexp or options.get("reduction") == "none"
    loss = weighted if each else weighted.sum() * inverse
    alpha = upstream * u * inverse
    alpha_slope = alpha[:, None] * slope
    dq, dk = alpha_slope[:, :keys] @ sized(k), alpha_slope[:, :keys].T @ sized(q)
    de = alpha_slope[:, keys:] * sized(q)
    if e is not None:
        dq = dq + alpha_slope[:, keys:] * sized(e)
    drho = None
    if rho is not None:
        drho = np.zeros_like(rho)
        for i in range(rows):
            if labels[i] >= 0:
                np.add.at(drho[labels[i]], key_labels[key_labels >= 0], alpha[i] * share[i, :keys][key_labels >= 0])
    results = {"loss": loss, "row_loss": row_loss, "logsumexp": lse, "positive": mean, "expected": expected}
    results |= {"dquery": dq if options.get("key") is not None else dq + dk, "dkey": dk, "dextra_positive": de}
    results |= {"dtemperature": alpha * per_tau, "dkey_bias": (alpha[:, None] * share)[:, :keys].sum(0)}
    centred = row_loss + minus * loss if is_mean else row_loss
    results |= {"dpair_margin": drho, "dsample_weight": np.where(counted, upstream * centred * inverse, 0.0)}
    if np.ndim(options["temperature"]) == 0:
        results["dtemperature"] = results["dtemperature"].sum()
    return results | {"size": size}


def _numpy(x: object) -> np.ndarray | None:
    return None if x is None else np.asarray(x)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).sum(1, keepdims=True))


# ---------------------------------------------------------------------------------------------------------- comparison


def assert_formulas(case: Case, tolerance: float = 1e-12) -> None:
    """The public function in float64 gives what the formulas give: loss, statistics and all gradients."""
    assert case.dtype == torch.float64 and not (case.arguments.get("normalize") and case.requires_grad)
    got, want = evaluate(public, case), formulas(case)
    for name, x in got.items():
        expected = torch.as_tensor(want[name], dtype=torch.float64)
        torch.testing.assert_close(x.double(), expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")  # noqa: B023


def run_public(case: Case) -> Results:
    """The public function on poisoned memory; a kernel must have run, if there is one, and no input may change."""
    before = {name: x.clone() for name, x in case.arguments.items() if isinstance(x, Tensor)}
    calls = sum(_ops.kernel_calls().values())
    with poisoned_memory():
        results = evaluate(public, case)
    if KERNEL and len(case.arguments["query"]):
        assert sum(_ops.kernel_calls().values()) > calls, "no kernel ran"
    changed = [name for name, x in before.items() if not unchanged(x, case.arguments[name])]
    assert not changed, f"modified: {changed}"
    return results


def unchanged(before: Tensor, after: Tensor) -> bool:
    return same_bits(before, after) if before.is_floating_point() else torch.equal(before, after)


def check(case: Case) -> Results:
    """Run the public function and assert that its results obey the rule."""
    got = run_public(case)
    exact = evaluate(definition, case.double())
    eager = exact if case.dtype == torch.float64 else evaluate(definition, case)
    assert got.keys() == exact.keys()
    wrong, terms = [], None
    for name, x in got.items():
        dtype = accumulation(case.dtype) if name[0] != "d" else case.arguments[name[1:]].dtype
        if x.dtype != dtype or x.shape != exact[name].shape:
            wrong.append(f"{name}: expected {dtype} {exact[name].shape}, got {x.dtype} {x.shape}")
            continue
        message = deviation(x, exact[name], eager[name])
        if message is not None and exact[name].isfinite().all() == x.isfinite().all():
            terms = largest_terms(case) if terms is None else terms
            # `deviation` counts in ulp of the result; terms are rounded in those of the accumulation.
            ratio = torch.finfo(accumulation(case.dtype)).eps / torch.finfo(x.dtype).eps
            message = deviation(x, exact[name], eager[name], terms[name] * ratio)
        if message is not None:
            wrong.append(f"{name}: {message}")
    assert not wrong, "\n".join(wrong)
    return got


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def largest_terms(case: Case) -> dict[str, float]:
    """The largest sum of absolute terms of each result. A logit is known to an ulp of its own terms, which grow as
    1 / tau; its exponential inherits that error."""
    terms = formulas(case, absolute=True)
    growth = 1 + terms.pop("size").max(initial=0.0)
    if case.arguments.get("normalize"):  # the derivative of x / |x|
        for name in ("query", "key", "extra_positive"):
            if isinstance(x := case.arguments.get(name), Tensor):
                terms[f"d{name}"] = 2 * terms[f"d{name}"] / x.double().norm(dim=1).min().item()
    return {
        name: growth * float(np.abs(x[np.isfinite(x)]).max(initial=0.0))
        for name, x in ((name, np.asarray(x, dtype=float)) for name, x in terms.items() if x is not None)
    }
