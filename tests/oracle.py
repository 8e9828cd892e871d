"""The definition as an oracle: problems, their exact answer, and how far a kernel may be from it.

The rule: a kernel's largest error against float64 is no larger than twice that of plain torch in the kernel's own
dtype, plus 4 ulp of the largest value. Infinities and NaN must be where the definition has them. Two exceptions:
where sums cancel, the largest sum of absolute terms stands in for the largest value (``largest_terms``), and float64
results, for which there is nothing more exact to measure plain torch by, may be off by 1e-12 of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import ltkernels.functional as LF
from ltkernels import _ops, reference
from ltkernels.neighbors import NeighborMap

Results = dict[str, Tensor]
Loss = Callable[..., Tensor | tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Problem:
    """One call: logits (N, C), target, keyword arguments, and the names of what requires grad."""

    logits: Tensor
    target: Tensor
    options: dict = field(default_factory=dict)
    requires_grad: tuple[str, ...] = ("logits",)

    def double(self) -> Problem:
        """The same values in float64; exact."""
        options = {name: widened(value) for name, value in self.options.items()}
        return replace(self, logits=self.logits.double(), target=widened(self.target), options=options)


def widened(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def definition(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    logit_scale: Tensor | None = None,
    logit_bias: Tensor | None = None,
    target_margin: Tensor | None = None,
    pairwise_margin: Tensor | None = None,
    scale: float | Tensor = 1.0,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    return_lse: bool = False,
    neighbors: NeighborMap | None = None,
    neighbor_weight: float = 0.0,
    mode: str = "plain",
    row_class: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """ltkernels.reference with the signature of the public functions, for logits (N, C)."""
    if isinstance(scale, Tensor):  # by definition (s * a, s * m)
        logit_scale = scale if logit_scale is None else scale * logit_scale
        target_margin = None if target_margin is None else scale * target_margin
        scale = 1.0
    offsets, classes, back_from = (None, None, -1) if neighbors is None else neighbors.rows(mode)
    loss, lse = reference.margin_softmax(
        input, target, weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight, row_class,
        offsets, classes, scale, neighbor_weight, back_from, reduction, ignore_index, label_smoothing,
    )  # fmt: skip
    return (loss, lse) if return_lse else loss


def public(input: Tensor, target: Tensor, **options: object) -> Tensor | tuple[Tensor, Tensor]:
    """The public function that takes these options."""
    function = LF.auxiliary_cross_entropy if "neighbors" in options else LF.margin_cross_entropy
    return function(input, target, **options)


# ----------------------------------------------------------------------------------------------------------- evaluation


def upstream_of(output: Tensor) -> Tensor:
    """Upstream gradients: uneven, and exact in every dtype."""
    ramp = torch.arange(output.numel(), dtype=output.dtype, device=output.device) % 7 + 1
    return (ramp * 0.375).reshape(output.shape)


def evaluate(function: Loss, problem: Problem) -> Results:
    """Outputs of ``function``, and gradients for the upstream gradients of ``upstream_of``."""
    leaves, options = {}, dict(problem.options)
    logits = problem.logits.detach()  # the same memory: strides and alignment matter
    for name in problem.requires_grad:
        leaves[name] = logits if name == "logits" else options[name].detach().clone()
        leaves[name].requires_grad_()
        if name != "logits":
            options[name] = leaves[name]
    outputs = function(logits, problem.target, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = dict(zip(("loss", "lse"), (x.detach() for x in outputs), strict=False))
    if leaves:
        roots = [x for x in outputs if x.requires_grad]
        grads = torch.autograd.grad(roots, list(leaves.values()), [upstream_of(x) for x in roots])
        results |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN: an element that a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def kernels_run() -> Iterator[dict[str, int]]:
    """How often each kernel ran in the block, by the last part of its name; filled when the block ends."""
    before, ran = _ops.kernel_calls(), {}
    yield ran
    for name, count in _ops.kernel_calls().items():
        if count > before.get(name, 0):
            ran[name.rpartition(".")[2]] = count - before.get(name, 0)


def run_kernel(problem: Problem) -> Results:
    """The public function on poisoned memory; a kernel must have run, and the input must be as it was."""
    before, calls = problem.logits.clone(), sum(_ops.kernel_calls().values())
    with poisoned_memory():
        results = evaluate(public, problem)
    assert sum(_ops.kernel_calls().values()) > calls, "no kernel ran"
    assert same_bits(before, problem.logits), "the input was modified"
    return results


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


# ----------------------------------------------------------------------------------------------------------- comparison


def check(problem: Problem, function: Callable[[Problem], Results] = run_kernel) -> Results:
    """Run ``function`` (a kernel) and assert that its results obey the rule."""
    got = function(problem)
    wrong = deviations(problem, got)
    assert not wrong, "\n".join(wrong)
    return got


def deviations(problem: Problem, got: Results) -> list[str]:
    """What breaks the rule, in words."""
    exact = evaluate(definition, problem.double())
    eager = exact if problem.logits.dtype == torch.float64 else evaluate(definition, problem)
    wrong = [] if got.keys() == exact.keys() else [f"results: expected {list(exact)}, got {list(got)}"]
    terms: dict[str, float] | None = None
    for name in got.keys() & exact.keys():
        dtype = dtype_of_result(problem, name)
        if got[name].dtype != dtype or got[name].shape != exact[name].shape:
            wrong.append(f"{name}: expected {dtype} {exact[name].shape}, got {got[name].dtype} {got[name].shape}")
            continue
        message = deviation(got[name], exact[name], eager[name])
        if message is not None:
            # Sums that cancel: what counts is the largest sum of absolute terms.
            terms = largest_terms(problem) if terms is None else terms
            message = deviation(got[name], exact[name], eager[name], terms[name])
        if message is not None:
            wrong.append(f"{name}: {message}")
    return wrong


def dtype_of_result(problem: Problem, name: str) -> torch.dtype:
    """A gradient has the dtype of its argument, loss and log-sum-exp that of the accumulation."""
    if name in ("loss", "lse"):
        return torch.float64 if problem.logits.dtype == torch.float64 else torch.float32
    return problem.logits.dtype if name == "dlogits" else problem.options[name.removeprefix("d")].dtype


def deviation(got: Tensor, exact: Tensor, eager: Tensor, largest: float = 0.0) -> str | None:
    """What breaks the rule for one result; ``largest`` stands in for the largest value if it is larger."""
    precision = torch.finfo(got.dtype)
    got, eager = got.double(), eager.double()
    finite = exact.isfinite()
    same = (got == exact) | (got.isnan() & exact.isnan())
    if not same[~finite].all() or not got[finite].isfinite().all():
        at = (~torch.where(finite, got.isfinite(), same)).nonzero()[0].tolist()
        return f"expected {exact[tuple(at)].item()} at {at}, got {got[tuple(at)].item()}"
    if not finite.any():
        return None
    error = (got - exact)[finite].abs().max().item()
    eager_error = (eager - exact)[finite].nan_to_num().abs().max().item()
    largest = max(largest, exact[finite].abs().max().item())
    limit = 1e-12 * largest if precision.eps < 1e-15 else 2 * eager_error + 4 * precision.eps * largest
    return None if error <= limit else f"error {error:.3g} above {limit:.3g} (plain torch: {eager_error:.3g})"


# ------------------------------------------------------------------------------------------------------- absolute terms


def largest_terms(problem: Problem) -> dict[str, float]:
    """The largest sum of absolute terms of each result, where the rounding of the adjusted logits v is a term too.

    Gradients are differences between probability and target summed over rows: where they cancel, no summation in a
    finite precision has all digits of the result.
    """
    problem = problem.double()
    options, f = problem.options, finite(problem.logits)
    a, m, s, u = (option(problem, name) for name in ("logit_scale", "target_margin", "scale", "sample_weight"))
    t, y, kept = one_hot_target(problem)
    p, mass, rounding, row = row_terms(problem)
    total = mass.sum(1, keepdim=True)

    mean = options.get("reduction", "mean") == "mean"
    k = kept * (1.0 if y is None else option(problem, "weight").expand(f.shape[1])[y])
    z = (u * k).sum() if mean else f.new_ones(())
    upstream = upstream_of(f.new_ones(len(f) if options.get("reduction") == "none" else ()))
    c = finite(upstream * u * kept / z).abs()[:, None]
    e = (upstream_of(k) * kept)[:, None] if options.get("return_lse") else 0.0
    uncertain = p * (1 + rounding + (p * rounding).sum(1, keepdim=True))
    g = finite(c * mass + (c * total + e) * uncertain)  # |dloss/dv|, term by term
    loss = (u.abs() * (row + ((total * p + mass) * rounding).sum(1)) * kept) / z.abs()
    du = upstream * (loss / u + k * loss.sum() / z if mean else loss / u)
    da, dm = s * f.abs() * g, s * t * g
    terms = {
        "loss": loss if options.get("reduction") == "none" else loss.sum(),
        "lse": row + (p * rounding).sum(1) + problem.logits.abs().amax(1),
        "dlogits": s * a.abs() * g,
        "dlogit_scale": da.sum() if a.dim() == 0 else da.sum(0),
        "dlogit_bias": g.sum(0),
        "dtarget_margin": dm.sum(0),
        "dpairwise_margin": g if y is None else g.new_zeros(g.shape[1], g.shape[1]).index_add_(0, y, g),
        "dsample_weight": du,
        "dscale": ((a * da).abs() + (m * dm).abs()).sum() / s,
    }
    return {name: finite(x).abs().max().item() if x.numel() else 0.0 for name, x in terms.items()}


def row_terms(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each row: probabilities, target masses t', rounding of v in ulp of 1, and the absolute terms of the loss."""
    a, b, m, s, w = (option(problem, x) for x in ("logit_scale", "logit_bias", "target_margin", "scale", "weight"))
    f, eps, mask = problem.logits, problem.options.get("label_smoothing", 0.0), problem.options.get("mask")
    t, y, _ = one_hot_target(problem)
    delta = problem.options.get("pairwise_margin")
    delta = torch.zeros_like(f) if delta is None else delta[y]
    allowed = torch.ones_like(f, dtype=torch.bool) if mask is None else mask.expand_as(f)
    silenced, log_weight = silencing(problem)
    v = (s * (a * f - m * t) + b + delta + torch.where(silenced, log_weight, 0.0)).masked_fill(~allowed, -torch.inf)
    as_given = s == 1 and all(problem.options.get(name) is None for name in ADJUSTMENTS)
    rounding = torch.zeros_like(f) if as_given else (s * a * f).abs() + (s * m * t).abs() + b.abs() + delta.abs()
    if log_weight > -torch.inf:
        rounding = rounding + silenced * (v.abs() - log_weight)
    else:
        v = v.masked_fill(silenced, -torch.inf)  # a NaN is out too
    spread = allowed / allowed.sum(1, keepdim=True).clamp(min=1)
    mass = (
        ~(silenced & v.isneginf())
        * finite(w * ((1 - eps) * t + eps * spread))
        * (t > 0 if y is not None and eps == 0 else allowed)
    )
    shift = v.amax(1, keepdim=True)
    # The largest term of the sum of exponentials is 1, and its logarithm is rounded like one.
    row = finite(mass.sum(1) * (1 + (v - shift).logsumexp(1))).abs() + finite(mass * (v - shift)).abs().sum(1)
    return finite(v.softmax(1)), mass, finite(rounding), row


def silenced_sets(neighbors: NeighborMap, mode: str) -> list[set[int]]:
    """S of each class in a mode, from the map's mode "plain"."""
    offsets, numbers, _ = (x.tolist() if isinstance(x, Tensor) else x for x in neighbors.rows("plain"))
    first, total = neighbors.num_classes, neighbors.num_classes + neighbors.num_auxiliary
    sets = [set(numbers[begin:end]) for begin, end in itertools.pairwise(offsets)]
    for k, silenced in enumerate(sets):
        if mode == ("auxiliary_only" if k < first else "target_only"):
            silenced.clear()
        if mode == "back" and k >= first:
            silenced |= set(range(first, total)) - {k}
    return sets


def silencing(problem: Problem) -> tuple[Tensor, float]:
    """Which classes are silenced in each row, and log(lambda)."""
    silenced = torch.zeros_like(problem.logits, dtype=torch.bool)
    neighbors, weight = problem.options.get("neighbors"), problem.options.get("neighbor_weight", 0.0)
    if neighbors is None:
        return silenced, 0.0
    sets = silenced_sets(neighbors, problem.options.get("mode", "plain"))
    row_class = problem.options.get("row_class")
    row_class = one_hot_target(problem)[1] if row_class is None else row_class
    for row, k in zip(silenced, row_class.tolist(), strict=True):
        row[sorted(sets[k])] = True
    return silenced, math.log(weight) if weight else -math.inf


ADJUSTMENTS = ("logit_scale", "logit_bias", "target_margin", "pairwise_margin")


def option(problem: Problem, name: str) -> Tensor:
    """A tensor that stands for the argument; 0-d where it is absent or a number, but (N,) for sample_weight."""
    value = problem.options.get(name)
    if value is None:
        value = 0.0 if name in ("logit_bias", "target_margin") else 1.0
    value = torch.as_tensor(value, dtype=torch.float64)
    return value.expand(len(problem.logits)) if name == "sample_weight" else value


def one_hot_target(problem: Problem) -> tuple[Tensor, Tensor | None, Tensor]:
    """t (N, C), y (N,) or None for probabilities, and which rows are kept."""
    target, classes = problem.target, problem.logits.shape[1]
    if target.is_floating_point():
        return target.double(), None, torch.ones(len(target), dtype=torch.bool)
    kept = target.long() != problem.options.get("ignore_index", -100)
    y = torch.where(kept, target.long(), 0)
    return torch.nn.functional.one_hot(y, classes).double(), y, kept


def finite(x: Tensor) -> Tensor:
    return x.nan_to_num(0, 0, 0)
