"""The guide's replacements of other libraries' contrastive losses: both sides of every diff block are executed.

What a library has comes from the library, if it is installed; the authors' code is written down here from its formulas.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ltkernels.functional as LF
from ltkernels import nn as lnn

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = (Path(__file__).parent.parent / "docs" / "contrastive.md").read_text()
BLOCKS = [part.split("```")[0] for part in TEXT.split("```diff\n")[1:]]
SAMPLES, WIDTH, CLASSES = 8, 6, 5
# What a block is, by a word of it: the loss on its left side, and how far values and gradients may be apart.
KINDS = {
    "pytorch_metric_learning.losses.NTXentLoss(temperature=0.07)": (1e-12, 1e-12),
    "pytorch_metric_learning.losses.SupConLoss": (1e-12, 1e-12),
    "pytorch_metric_learning.losses.SelfSupervisedLoss": (1e-12, 1e-12),
    "lightly.loss.NTXentLoss": (1e-12, 1e-12),
    "lightly.loss.MACLLoss": (None, 4e-9),  # another value, the same gradient
    "lightly.loss.DCLLoss": (1e-12, 1e-12),
    "-criterion = SupConLoss": (1e-12, 1e-12),
    "_dequeue_and_enqueue": (1e-12, 1e-12),
    "BalSCL": (1e-12, 1e-12),
    "nt_xent": (1e-6, 1e-6),  # both keep the temperature in float32
    "temperature[index]": (1e-12, 1e-12),
    "GCLoss_v1": (None, None),  # another rule: test_isogclr_differs_as_the_guide_says
}


def side(block: str, sign: str) -> str:
    return "\n".join(line[1:] for line in block.splitlines() if line[0] in (" ", sign))


class AuthorsSupCon:
    """-temperature / 0.07 times the mean over anchors of the mean over positives of log p; (N, V, D) features."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, features: Tensor, labels: Tensor) -> Tensor:
        z, y = torch.cat(features.unbind(1)), labels.repeat(features.shape[1])
        others = ~torch.eye(len(z), dtype=torch.bool)
        log_p = (z @ z.T / self.temperature).masked_fill(~others, -torch.inf).log_softmax(1)
        positive = (y[:, None] == y) & others
        mean = torch.where(positive, log_p, 0.0).sum(1) / positive.sum(1)
        return -self.temperature / 0.07 * mean.mean()


class AuthorsBalSCL:
    """Exponentials over the class's count, which the anchor is in only where the key is not of its class."""

    def __init__(self, cls_num_list: list[int], temperature: float) -> None:
        self.classes, self.temperature = len(cls_num_list), temperature

    def __call__(self, centers: Tensor, features: Tensor, targets: Tensor) -> Tensor:
        z = torch.cat(features.unbind(1))
        y, keys = targets.repeat(2), torch.cat([z, centers])
        key_y = torch.cat([y, torch.arange(self.classes)])
        count = torch.bincount(key_y)[key_y].double()
        rows = []
        for i in range(len(z)):
            logits = keys @ z[i] / self.temperature
            own = key_y == y[i]
            weights = count - own.double()
            seen = torch.arange(len(keys)) != i
            total = (logits.exp() / weights)[seen].sum().log()
            rows.append(total - logits[own & seen].mean())
        return torch.stack(rows).mean()


def authors_nt_xent(x: Tensor, t: Tensor) -> Tensor:
    """Rows are the views of a sample in turn: -log of the positive over the positive and all of other samples."""
    z = F.normalize(x, dim=1)
    losses = []
    for i in range(len(z)):
        e = (z @ z[i] / t).exp()
        others = [j for j in range(len(z)) if j // 2 != i // 2]
        losses.append(-(e[i ^ 1] / (e[i ^ 1] + e[others].sum())).log())
    return torch.stack(losses).mean()


def namespace(leaf: Tensor) -> dict:
    """Everything the blocks name, made of one tensor (2 SAMPLES + CLASSES, D)."""
    generator = torch.Generator().manual_seed(1)
    first, second, centers = leaf.split([SAMPLES, SAMPLES, CLASSES])
    unit = F.normalize(leaf, dim=1)
    index = torch.randperm(20, generator=generator)[:SAMPLES]
    torch.manual_seed(2)
    moco = lnn.MoCoLoss(WIDTH, 12, temperature=0.07, dtype=torch.float64)
    q, k = unit[:SAMPLES], unit[SAMPLES : 2 * SAMPLES].detach()
    queue = moco.queue.clone()
    temperature, weight = (torch.rand(20, generator=generator).double() + 0.1 for _ in range(2))
    return {
        "torch": torch, "LF": LF, "lnn": lnn, "cross_entropy": F.cross_entropy,
        "first": first, "second": second, "embeddings": leaf[: 2 * SAMPLES], "index": index,
        "labels": torch.tensor([0, 1, 0, 2, 2, 0, 3, 1]), "targets": torch.tensor([0, 1, 0, 2, 2, 0, 3, 1]),
        "features": torch.stack([unit[:SAMPLES], unit[SAMPLES : 2 * SAMPLES]], 1), "z": unit[: 2 * SAMPLES],
        "centers": F.normalize(centers, dim=1), "cls_num_list": [7] * CLASSES,
        "inputs": None, "model": lambda _: torch.stack([first, second], 1).flatten(0, 1), "epoch": 37,
        "SupConLoss": AuthorsSupCon, "BalSCL": AuthorsBalSCL, "nt_xent": authors_nt_xent,
        "temperature": temperature, "weight": weight,
        "q": q, "k": k, "T": 0.07, "l_pos": (q * k).sum(1, keepdim=True), "l_neg": q @ queue.T,
        "self": SimpleNamespace(_dequeue_and_enqueue=lambda keys: None), "moco": moco,
    }  # fmt: skip


def run(code: str, kind: str) -> tuple[Tensor, Tensor]:
    """The loss and its gradient."""
    leaf = torch.randn(2 * SAMPLES + CLASSES, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    names = namespace(leaf.requires_grad_())
    if "pytorch_metric_learning" in kind or "lightly" in kind:
        names[kind.split(".")[0]] = sys.modules[kind.split(".")[0]]
    if "pytorch_metric_learning" in kind:  # labels of rows, some without a second sample
        names["labels"] = torch.tensor([0, 1, 0, 2, 2, 0, 3, 1, 8, 9, 2, 0, 5, 6, 7, 1])
    names["criterion"] = {
        "nt_xent": lnn.TemperatureScheduledLoss(t_max=200, layout="interleaved"),
        "temperature[index]": lnn.TemperatureContrastiveLoss(names["temperature"], names["weight"]),
        "_dequeue_and_enqueue": names["moco"],
    }.get(kind)
    exec(code.replace("loss.backward()", "loss.backward(retain_graph=True)"), names)
    return names["loss"].detach(), torch.autograd.grad(names["loss"], leaf)[0]


def kind_of(block: str) -> str:
    found = [kind for kind in KINDS if kind in block]
    return "pytorch_metric_learning.losses.SelfSupervisedLoss" if "SelfSupervised" in block else found[0]


def test_every_module_has_its_replacement() -> None:
    assert [kind_of(block) for block in BLOCKS] == list(KINDS)
    after = "".join(TEXT.split("```diff\n")[1:])
    for name in lnn.__all__:
        if "_contrastive" in getattr(lnn, name).__module__:
            assert f"lnn.{name}(" in after, name


@pytest.mark.parametrize("block", [block for block in BLOCKS if "GCLoss" not in block], ids=kind_of)
def test_replacement(block: str) -> None:
    kind = kind_of(block)
    if "pytorch_metric_learning" in kind or "lightly" in kind:
        library = kind.split(".")[0]
        pytest.importorskip(library)
        importlib.import_module({"lightly": "lightly.loss"}.get(library, f"{library}.losses"))
    before, after = run(side(block, "-"), kind), run(side(block, "+"), kind)
    assert before[1].abs().max() > 1e-3
    for x, y, bound in zip(before, after, KINDS[kind], strict=True):
        if bound is not None:
            torch.testing.assert_close(y, x, rtol=bound, atol=bound)
    if "MACL" in kind:
        assert not torch.isclose(before[0], after[0])


def test_differences_of_pytorch_metric_learning() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = losses.SupConLoss(temperature=0.05)
    # Classes of two equal vectors, but for one that is between two classes.
    y, rows = torch.arange(8) // 2, torch.eye(8, dtype=torch.float64)[torch.arange(8) // 2]
    rows[0] = F.normalize(rows[0] + rows[2], dim=0)
    values = [loss(rows.to(dtype), y).item() for dtype in (torch.float32, torch.float64)
              for loss in (theirs, lnn.SupConLoss(0.05))]  # fmt: skip
    assert values == pytest.approx([0.276, 0.138, 0.138, 0.138], abs=5e-4)
    z = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one_class = torch.zeros(8, dtype=torch.int64)
    assert theirs(z, one_class) == 0 < 1 < lnn.SupConLoss(0.05)(z, one_class)
    y = torch.tensor([0, 0, 1, 1, 2, 2, -1, -1])
    torch.testing.assert_close(theirs(z, y), lnn.SupConLoss(0.05)(z, torch.where(y < 0, 3, y)))
    assert not torch.isclose(theirs(z, y), lnn.SupConLoss(0.05)(z, y))


class AuthorsISogCLR:
    """SogCLR_DRO_Loss: exp(sim / tau) and an average of each view; half of its loss, which is the sum over views."""

    def __init__(self, samples: int) -> None:
        self.s, self.v = torch.zeros(samples).double(), torch.zeros(samples).double()
        self.tau, self.first = torch.full((samples,), 0.1).double(), True

    def __call__(self, z: Tensor) -> Tensor:
        z, batch = F.normalize(z, dim=1), len(z) // 2
        similarity, negatives = z @ z.T, (1 - torch.eye(batch).double()).repeat(2, 2)
        tau = self.tau.repeat(2)
        scaled = (similarity / tau[:, None]).detach()
        e = scaled.exp() * negatives
        g = e.sum(1) / (2 * batch - 2)
        s = g if self.first else 0.1 * self.s.repeat(2) + 0.9 * g
        self.first, self.s = False, s.view(2, -1).mean(0)
        weights = e / s[:, None] / (2 * batch - 2)
        positive = torch.cat([similarity.diagonal(batch), similarity.diagonal(-batch)])
        slope = (s.log() + 0.3 - (weights * scaled).sum(1)).view(2, -1).mean(0)
        self.v = 0.1 * self.v + 0.9 * slope.clamp(-5, 5)
        self.tau = (self.tau - 0.01 * self.v).clamp(0.05, 1.0)
        return ((weights * similarity).sum(1) - positive).mean()


def test_isogclr_differs_as_the_guide_says() -> None:
    samples, index = 16, torch.arange(16)
    authors, ours = AuthorsISogCLR(samples), lnn.ISogCLRLoss(samples, rho=0.3).double()
    ours.temperature.fill_(0.1)
    torch.manual_seed(0)
    base, apart = torch.randn(samples, 8, dtype=torch.float64), []
    for step in range(4):
        torch.manual_seed(step)
        views = [base + 0.5 * torch.randn(samples, 8, dtype=torch.float64) for _ in range(2)]
        one, other = (torch.cat(views).requires_grad_() for _ in range(2))
        want, got = torch.autograd.grad(authors(one), one)[0], torch.autograd.grad(ours(other, index), other)[0]
        apart.append(((got - want).norm() / want.norm()).item())
    found = [*apart, authors.tau.mean().item(), ours.temperature.mean().item()]
    assert found[0] == pytest.approx(0.18, abs=0.01)
    assert 0.18 < min(found[1:4]) and max(found[1:4]) < 0.38
    assert found[4:] == pytest.approx([0.139, 0.151], abs=1e-3)
