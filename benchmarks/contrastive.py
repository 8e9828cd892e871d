"""contrastive_loss and its peers: ``(embeddings, labels, what else it takes, reduction) -> loss``.

Shapes are M x D: two views of M / 2 samples, D features; all first views come first. The rows are contrasted with each
other, and each has one positive, its other view. Not every peer computes the same: some know one temperature only,
some divide the embeddings by their length. Each is held against this library doing what it does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ltkernels.functional as LF
from benchmarks import variants
from benchmarks.interleave import Effort
from benchmarks.problems import Case, Problem, long_tail, random_matrix
from benchmarks.variants import Family, Variant, by_name

SHAPES = ("512x128", "1024x128", "4096x128", "4096x512", "16384x128")
WIDE = "4096x512"
LARGEST = "32768x128"  # on a GPU, in bfloat16
CLASSES = 100
TEMPERATURES = 0.1, 1.0  # smallest and largest
TEMPERATURE = 0.1  # of the losses that take one only
LONG = 2e11  # floating-point operations of a pass from which it takes seconds on a CPU
FEW_ROWS = 1000  # above, a pass in plain torch takes more than some milliseconds


def ours(z: Tensor, labels: Tensor, positive: Tensor, tau: Tensor, reduction: str) -> Tensor:
    """The similarities exist a tile at a time."""
    return LF.contrastive_loss(z, temperature=tau, positive_index=positive, reduction=reduction)


def eager(z: Tensor, labels: Tensor, positive: Tensor, tau: Tensor, reduction: str) -> Tensor:
    """Cross-entropy over the similarities, as one writes it in plain torch."""
    logits = (z @ z.T / tau[:, None]).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, positive, reduction=reduction)


def simclr_lt(z: Tensor, labels: Tensor, tau: Tensor, negative: Tensor, reduction: str) -> Tensor:
    """NT-Xent as repositories for long-tailed SimCLR write it: exponentials, of which a mask selects the negatives."""
    first, second = z.chunk(2)
    negatives = torch.exp(z @ z.T / tau[:, None]).masked_select(negative).view(len(z), -1).sum(1)
    positives = torch.exp((first * second).sum(1).repeat(2) / tau)
    return -torch.log(positives / (positives + negatives)).mean()


def ours_scalar(z: Tensor, labels: Tensor, positive: Tensor, reduction: str) -> Tensor:
    return LF.contrastive_loss(z, temperature=TEMPERATURE, positive_index=positive, normalize=True, reduction=reduction)


def pml_ntxent(z: Tensor, labels: Tensor, pairs: Tensor, reduction: str) -> Tensor:
    """pytorch-metric-learning's NT-Xent: it compares each positive pair with every negative pair, M^3 of them."""
    from pytorch_metric_learning.losses import NTXentLoss

    return NTXentLoss(TEMPERATURE)(z, pairs)


def lightly_ntxent(z: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """lightly's NT-Xent, of two views."""
    from lightly.loss import NTXentLoss

    return NTXentLoss(TEMPERATURE)(*z.chunk(2))


def ours_supcon(z: Tensor, labels: Tensor, reduction: str) -> Tensor:
    return LF.contrastive_loss(z, temperature=TEMPERATURE, labels=labels, normalize=True, reduction=reduction)


def pml_supcon(z: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """pytorch-metric-learning's supervised contrastive loss."""
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(TEMPERATURE)(z, labels)


def ours_cross(z: Tensor, labels: Tensor, aligned: Tensor, reduction: str) -> Tensor:
    first, second = z.chunk(2)
    return LF.contrastive_loss(first, second, temperature=TEMPERATURE, positive_index=aligned, reduction=reduction)


def inf_cl(z: Tensor, labels: Tensor, aligned: Tensor, reduction: str) -> Tensor:
    """Inf-CL: the first views against the second ones only, as in CLIP; the similarities exist a tile at a time."""
    from inf_cl import cal_flash_loss

    first, second = z.chunk(2)
    return cal_flash_loss(first, second, aligned, scale=1 / TEMPERATURE, head_dim=min(256, z.shape[1])).mean()


def _variant(name: str, loss: Callable[..., Tensor], method: str, inputs: tuple[str, ...], **options: Any) -> Variant:
    # Where the embeddings are divided by their length first, that rounds them, in ltkernels too.
    rounds = name not in ("ours", "ours-cross")
    return Variant(name, loss, method, ("embeddings",), inputs, rounds=rounds, **options)


PML = "pytorch_metric_learning"
VARIANTS = by_name(
    (
        _variant("ours", ours, "temperatures", ("positive", "temperatures")),
        _variant("eager", eager, "temperatures", ("positive", "temperatures")),
        _variant("eager-compiled", eager, "temperatures", ("positive", "temperatures"), compiled=True),
        _variant("simclr-lt", simclr_lt, "temperatures", ("temperatures", "negative")),
        _variant("ours-scalar", ours_scalar, "scalar", ("positive",)),
        _variant("pml-ntxent", pml_ntxent, "scalar", ("pairs",), package=PML),
        _variant("lightly", lightly_ntxent, "scalar", (), package="lightly.loss"),
        _variant("ours-supcon", ours_supcon, "supcon", ()),
        _variant("pml-supcon", pml_supcon, "supcon", (), package=PML),
        # Inf-CL multiplies in TF32: in float32 it would be another computation.
        _variant("ours-cross", ours_cross, "cross", ("aligned",), gpu_only=True, dtypes=("bfloat16",)),
        _variant("inf-cl", inf_cl, "cross", ("aligned",), package="inf_cl", gpu_only=True, dtypes=("bfloat16",)),
    )
)


# ------------------------------------------------------------------------------------------------------------- problem


@dataclass(frozen=True)
class ExactContrastive:
    """By the definition in float64, upstream gradient 1: the mean loss, and the gradient of some embeddings."""

    loss: Tensor
    rows: Tensor
    gradient: Tensor  # of those rows


class ContrastiveProblem(Problem):
    """Embeddings of length 1 of two views that resemble each other, labels from a long tail, a temperature of each row.

    The temperature grows with the number of samples of the class. The numbers are exact in bfloat16.
    """

    unit = "gflop_per_s"
    COMPARED = 512  # rows of the gradient, evenly spread

    def __init__(self, case: Case, device: str = "cpu", blank: bool = False) -> None:
        counts = long_tail(CLASSES)
        super().__init__(case, device, counts)
        m, d = case.sizes
        first, noise = (random_matrix(case, m // 2, d, device, blank, seed).float() for seed in (0, 1))
        z = F.normalize(torch.cat([first, first + noise]), dim=1)
        self.embeddings = z.to(case.torch_dtype).requires_grad_()
        self.target = self.target[: m // 2].repeat(2)
        self.positive = LF.view_pairs(m, device=device)
        self.pairs, self.aligned = (torch.arange(m // 2, device=device).repeat(views) for views in (2, 1))
        share = (self.counts / self.counts.min()).log() / (self.counts.max() / self.counts.min()).log()
        smallest, largest = TEMPERATURES
        tau = smallest * (largest / smallest) ** share[self.target]
        self.temperatures = tau.bfloat16().float()

    @property
    def negative(self) -> Tensor:
        """(M, M) mask. Made before the clock starts; not held for those that do not ask for it."""
        same = torch.arange(self.case.rows, device=self.positive.device)
        return (same != same[:, None]) & (same != self.positive[:, None])

    def work(self) -> float:
        """Three matrix products: the similarities, and the gradients of the embeddings as queries and as keys."""
        m, d = self.case.sizes
        return 6e-9 * m * m * d

    def roofline(self) -> dict[str, Any]:
        """One matrix product, in each layout of its factors; on a CPU in float32, whatever the embeddings are in."""
        m, d = self.case.sizes
        z = self.embeddings.detach()
        if z.device.type == "cpu" and (self.case.dtype != "float32" or 6.0 * m * m * d >= LONG):
            return {}
        transposed, similarities = z.T.contiguous(), z @ z.T
        factors = {"nn": (z, transposed), "nt": (z, z.T), "tn": (transposed.T, transposed)}
        return {f"mm_{layout}": MatrixProduct(a, b, similarities) for layout, (a, b) in factors.items()}

    def roofline_work(self) -> float:
        return self.work() / 3

    def exact(self, method: str) -> ExactContrastive:
        x = self.embeddings.detach().double()
        length = x.norm(dim=1, keepdim=True)
        if method in ("scalar", "supcon"):
            z = x / length
        else:
            z = x
        m, half = len(x), len(x) // 2
        tau = self.temperatures.double() if method == "temperatures" else z.new_full((m,), TEMPERATURE)
        if method == "cross":
            rows = _spread(half, self.COMPARED // 2, x.device)
            loss, query, key = _exact(z[:half], z[half:], tau[:half], lambda i, j: i[:, None] == j, False, rows)
            return ExactContrastive(loss, torch.cat([rows, rows + half]), torch.cat([query, key]))

        def positive(i: Tensor, j: Tensor) -> Tensor:
            if method == "supcon":
                return self.target[i, None] == self.target[j]
            return self.positive[i, None] == j

        rows = _spread(m, self.COMPARED, x.device)
        loss, query, key = _exact(z, z, tau, positive, True, rows)
        gradient = query + key
        if z is not x:
            gradient = (gradient - z[rows] * (z[rows] * gradient).sum(1, keepdim=True)) / length[rows]
        return ExactContrastive(loss, rows, gradient)

    def errors(
        self, case: Case, exact: ExactContrastive, loss: Tensor, gradients: Sequence[Tensor]
    ) -> tuple[float, float]:
        (gradient,) = gradients
        loss_error = (loss.double() - exact.loss).abs() / exact.loss.abs()
        worst = (gradient[exact.rows].double() - exact.gradient).abs().max() / exact.gradient.abs().max()
        return loss_error.item(), worst.item()  # NaN stays NaN


def _spread(rows: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(0, rows, max(1, rows // count), device=device)


def _exact(
    query: Tensor,
    key: Tensor,
    tau: Tensor,
    positive: Callable[[Tensor, Tensor], Tensor],  # rows, keys -> whether each pair is one
    exclude_self: bool,
    rows: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss, and the gradients of some rows as queries and as keys. The similarities exist in blocks only."""
    every, keys = (torch.arange(len(x), device=x.device) for x in (query, key))
    lse, mean_positive = torch.empty_like(tau), torch.empty_like(tau)
    count = torch.empty_like(every)

    def scaled(i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and which pairs are positive."""
        s, pairs = query[i] @ key[j].T / tau[i, None], positive(i, j)
        if exclude_self:
            own = i[:, None] == j
            s, pairs = s.masked_fill_(own, -torch.inf), pairs & ~own
        return s, pairs

    for i in every.split(256):
        s, pairs = scaled(i, keys)
        lse[i], count[i] = s.logsumexp(1), pairs.sum(1)
        mean_positive[i] = torch.where(pairs, s, 0.0).sum(1) / count[i].clamp(min=1)
    counted = count > 0
    total = counted.sum()

    def gradient(i: Tensor, j: Tensor) -> Tensor:
        """Of the loss by the products of some queries and keys."""
        s, pairs = scaled(i, j)
        p = (s - lse[i, None]).exp_() - pairs / count[i, None].clamp(min=1)
        return torch.where(counted[i], 1 / (tau[i] * total), 0.0)[:, None] * p

    loss = torch.where(counted, lse - mean_positive, 0.0).sum() / total
    return loss, gradient(rows, keys) @ key, gradient(every, rows).T @ query


class MatrixProduct:
    """Similarities alone, into memory that has been written before."""

    def __init__(self, a: Tensor, b: Tensor, product: Tensor) -> None:
        self._a, self._b, self._product = a, b, product

    def reset(self) -> None:
        pass

    def run(self) -> None:
        torch.mm(self._a, self._b, out=self._product)


# -------------------------------------------------------------------------------------------------------------- family


def _operations(case: Case) -> int:
    m, d = case.sizes
    return 6 * m * m * d


def _leave_out(case: Case, variant: Variant, device: str, quick: bool) -> bool:
    if quick:
        return variant.compiled and case.dtype != "float32"
    if variant.name == "pml-ntxent" and case.rows > (512 if device == "cpu" else 1024):
        return True  # M^3 numbers several times over
    if device == "cuda":
        many = case.shape == LARGEST
        return many and (case.dtype == "float32" or variant.name in ("simclr-lt", "lightly", "pml-supcon"))
    if _operations(case) >= LONG:
        measured = ("ours", "eager")  # a pass takes seconds, and the others up to ten matrices of 1 GB
    elif case.shape == WIDE:
        measured = ("ours", "eager", "eager-compiled")  # the rest would tell the same as at 128 features
    else:
        measured = tuple(VARIANTS)
    if variant.name not in measured:
        return True
    return case.dtype == "bfloat16" and variant.name != "ours" and _slow_in_bfloat16()


def _slow_in_bfloat16() -> bool:
    """Whether eager torch is; the other losses multiply as it does."""
    return variants.slow_in_bfloat16(VARIANTS["eager"], ContrastiveProblem, "128x512", "contrastive")


def _effort(case: Case, effort: Effort, device: str) -> Effort:
    """By rounds, not by time, where a pass in plain torch takes half a second on a CPU, or several."""
    if device == "cuda" or case.rows <= FEW_ROWS:
        return effort
    return replace(effort, min_rounds=min(effort.min_rounds, 3) if _operations(case) >= LONG else 11)


FAMILY = Family(
    "contrastive",
    ContrastiveProblem,
    VARIANTS,
    shapes=SHAPES,
    gpu_shapes=("16384x128", "4096x512", "4096x128", LARGEST, "1024x128", "512x128"),
    quick_shapes=("64x32",),
    small_shape="64x32",
    leave_out=_leave_out,
    effort=_effort,
    tolerance=1 / min(*TEMPERATURES, TEMPERATURE),  # an error of a product is one of the logit, divided by that
    bytes_per_logit=60,
)
