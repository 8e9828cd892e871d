"""The definition as an oracle: problems, their exact answer, and how far a kernel may be from it.

The rule: a kernel's largest error against float64 is no larger than twice that of plain torch in the kernel's own
dtype, plus 4 ulp of the largest value. Infinities and NaN must be where the definition has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import ltkernels.functional as LF
from ltkernels import _ops, reference

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
) -> Tensor | tuple[Tensor, Tensor]:
    """ltkernels.reference with the signature of margin_cross_entropy, for logits (N, C)."""
    if isinstance(scale, Tensor):  # by definition (s * a, s * m)
        logit_scale = scale if logit_scale is None else scale * logit_scale
        target_margin = None if target_margin is None else scale * target_margin
        scale = 1.0
    loss, lse = reference.margin_softmax(
        input, target, weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight,
        scale, reduction, ignore_index, label_smoothing,
    )  # fmt: skip
    return (loss, lse) if return_lse else loss


# ----------------------------------------------------------------------------------------------------------- evaluation


def upstream_of(output: Tensor) -> Tensor:
    """Upstream gradients: uneven, and exact in every dtype."""
    ramp = torch.arange(output.numel(), dtype=output.dtype) % 7 + 1
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
        grads = torch.autograd.grad(outputs, list(leaves.values()), [upstream_of(x) for x in outputs])
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


def run_kernel(problem: Problem) -> Results:
    """margin_cross_entropy on poisoned memory; a kernel must have run, and the input must be as it was."""
    before, calls = problem.logits.clone(), sum(_ops.kernel_calls().values())
    with poisoned_memory():
        results = evaluate(LF.margin_cross_entropy, problem)
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
    expected_dtypes = {name: problem.logits.dtype for name in got if name == "dlogits"}
    wrong = [] if got.keys() == exact.keys() else [f"results: expected {list(exact)}, got {list(got)}"]
    terms: dict[str, float] | None = None
    for name in got.keys() & exact.keys():
        dtype = expected_dtypes.get(name, eager[name].dtype)
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
    limit = 1e-12 * (1 + largest) if precision.eps < 1e-15 else 2 * eager_error + 4 * precision.eps * largest
    return None if error <= limit else f"error {error:.3g} above {limit:.3g} (plain torch: {eager_error:.3g})"


def largest_terms(problem: Problem) -> dict[str, float]:
    """The largest sum of absolute terms of each result, with the rounding of the adjusted logits v as a term.

    Gradients are sums over rows of differences between probability and target: where they cancel, no summation in a
    finite precision gives the digits of the result.
    """
    problem = problem.double()
    options, f = problem.options, problem.logits.nan_to_num(0, 0, 0)
    rows, classes = f.shape

    def option(name: str, default: float, *shape: int) -> Tensor:
        value = options.get(name)
        return f.new_full(shape, default) if value is None else torch.as_tensor(value).double().expand(shape)

    a, b, m, w = (
        option(name, default, classes)
        for name, default in [("logit_scale", 1), ("logit_bias", 0), ("target_margin", 0), ("weight", 1)]
    )
    u, s = option("sample_weight", 1, rows), option("scale", 1)
    indices = not problem.target.is_floating_point()
    kept = problem.target != options.get("ignore_index", -100) if indices else torch.ones(rows, dtype=torch.bool)
    y = torch.where(kept, problem.target, 0).long() if indices else None
    t = torch.nn.functional.one_hot(y, classes).double() if indices else problem.target
    delta = torch.zeros_like(f) if options.get("pairwise_margin") is None else options["pairwise_margin"][y]
    allowed = torch.ones_like(f, dtype=torch.bool) if options.get("mask") is None else options["mask"].expand_as(f)

    v = (s * (a * f - m * t) + b + delta).masked_fill(~allowed, -torch.inf).masked_fill(problem.logits == -torch.inf, -torch.inf)
    adjusted = any(options.get(name) is not None for name in ADJUSTMENTS) or s != 1
    rounding = ((s * a * f).abs() + (s * m * t).abs() + b.abs() + delta.abs()).nan_to_num() * adjusted
    p = v.softmax(1)
    eps = options.get("label_smoothing", 0.0)
    mass = w * torch.where(allowed, (1 - eps) * t + eps / allowed.sum(1, keepdim=True).clamp(min=1), 0)
    if indices:
        mass = torch.where(t != 0, w * (1 - eps + eps / classes) * t, mass)
    total = mass.sum(1)
    shift = v.amax(1, keepdim=True)
    row = total * (v - shift).logsumexp(1) + (mass * (v - shift)).nan_to_num(0, 0, 0).abs().sum(1)

    loss, lse = (torch.ones(()) if options.get("reduction", "mean") != "none" else torch.ones(rows)), torch.ones(rows)
    upstream = upstream_of(loss.double())
    k = (w[y] * kept if indices else torch.ones(rows)).double()
    z = (u * k).sum() if options.get("reduction", "mean") == "mean" else torch.ones(()).double()
    c = (upstream * u * kept / z).abs()
    e = upstream_of(lse.double()) * kept if options.get("return_lse") else torch.zeros(rows).double()
    spread = p * (rounding + (p * rounding).sum(1, keepdim=True))
    g = c[:, None] * mass + (c * total + e)[:, None] * (p + spread)  # |G|, term by term
    loss_terms = u.abs() * (row + ((total[:, None] * p + mass) * rounding).sum(1)).nan_to_num(0, 0, 0) * kept
    whole = loss_terms if loss.dim() else loss_terms.sum() / z.abs()
    dv = s * g.nan_to_num(0, 0, 0)
    pairwise = None if y is None else torch.zeros(classes, classes).double().index_add_(0, y, g.nan_to_num(0, 0, 0))
    da, dm = (dv * f).abs(), (dv * t).abs()
    result = {
        "loss": whole,
        "lse": shift.nan_to_num(0, 0, 0).abs() + (p * rounding).sum(1).nan_to_num()[:, None] + 30,
        "dlogits": dv * a.abs(),
        "dlogit_scale": da.sum(0) if a is None or torch.as_tensor(options.get("logit_scale", 0)).dim() else da.sum(),
        "dlogit_bias": (dv / s).sum(0),
        "dtarget_margin": dm.sum(0),
        "dpairwise_margin": pairwise,
        "dsample_weight": (upstream / z * (loss_terms / u + k * whole)).abs(),
        "dscale": ((a * da).abs() + (m * dm).abs()).sum() / s,
    }
    return {name: x.nan_to_num(0, 0, 0).max().item() if x is not None and x.numel() else 0.0 for name, x in result.items()}


ADJUSTMENTS = ("logit_scale", "logit_bias", "target_margin", "pairwise_margin")
