"""The guide to contrastive losses: its code runs, its links lead somewhere, and it knows every module."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ltkernels.functional as LF
from ltkernels import nn as lnn

GUIDE = Path(__file__).parent.parent / "docs" / "contrastive.md"
TEXT = GUIDE.read_text()


def test_code_runs(tmp_path, monkeypatch, one_thread) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = [part.split("```")[0] for part in TEXT.split("```python\n")[1:]]
    assert len(blocks) >= 12
    namespace: dict = {}
    torch.manual_seed(0)
    for block in blocks:
        exec(block, namespace)
    criterion = lnn.ISogCLRLoss(num_samples=1000, rho=0.3)
    criterion.load_state_dict(torch.load("loss.pt", weights_only=True))
    assert (criterion.temperature != 0.1).any()


def test_links_and_names() -> None:
    links = [part.split(")")[0] for part in TEXT.split("](")[1:]]
    assert links
    for link in links:
        assert link.startswith("https://") or (GUIDE.parent / link).is_file(), f"docs/contrastive.md links to {link}"
    modules = [name for name in lnn.__all__ if "_contrastive" in getattr(lnn, name).__module__]
    assert len(modules) == 8
    for name in modules:
        assert f"| `{name}` |" in TEXT, f"docs/contrastive.md does not mention {name}"


# -------------------------------------------------------------------- losses that the guide builds from a log-sum-exp

LABELS = {
    "mixed": [0, 1, 0, 2, 2, 0, 3, 1, 2, 0, 4, 1],
    "unlabelled": [0, 1, -1, 2, 2, 0, -1, 1, -1, 0, 3, 0],
    "one_class": [0] * 12,
}
every_labels = pytest.mark.parametrize("labels", LABELS.values(), ids=list(LABELS))
TAU = 0.1


def helpers() -> dict:
    """The functions that the guide defines."""
    namespace: dict = {"torch": torch, "LF": LF}
    for block in TEXT.split("```python\n")[1:]:
        for part in block.split("```")[0].split("\n\n\n"):
            if part.startswith("def "):
                exec(part, namespace)
    return namespace


def unit(rows: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=1)


def others(i: int, labels: list[int]) -> list[int]:
    return [j for j in range(len(labels)) if j != i]


def same(got: object, want: object, *inputs: Tensor) -> None:
    results = []
    for function in (got, want):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = function(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves)])
    assert all(x.abs().max() > 0 for x in results[1])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)


def test_decoupled_helper() -> None:
    for labels in (LABELS["mixed"], LABELS["unlabelled"]):

        def by_hand(z: Tensor, labels: list[int] = labels) -> Tensor:
            rows = []
            for i, y in enumerate(labels):
                positives = [j for j in others(i, labels) if labels[j] == y >= 0]
                negatives = [j for j in others(i, labels) if j not in positives]
                if positives:
                    s = z @ z[i] / TAU
                    rows.append(s[negatives].exp().sum().log() - s[positives].mean())
            return torch.stack(rows).mean()

        same(lambda z, labels=labels: helpers()["decoupled"](z, torch.tensor(labels)), by_hand, unit(12, 0))


@every_labels
def test_parametric_helper(labels: list[int]) -> None:
    """PaCo: -sum_k w_k log(e^s_k / sum e^s) / sum_k w_k; w is 1 of the own centre, alpha of positives in the batch."""

    def by_hand(z: Tensor, centers: Tensor, alpha: float = 0.05) -> Tensor:
        rows = []
        for i, y in enumerate(labels):
            if y < 0:
                continue
            s, c = z @ z[i] / TAU, centers @ z[i] / TAU
            total = (s[others(i, labels)].exp().sum() + c.exp().sum()).log()
            terms = [(1.0, c[y])] + [(alpha, s[j]) for j in others(i, labels) if labels[j] == y]
            rows.append(-sum(w * (x - total) for w, x in terms) / sum(w for w, _ in terms))
        return torch.stack(rows).mean()

    same(lambda z, c: helpers()["parametric"](z, torch.tensor(labels), c), by_hand, unit(12, 0), unit(5, 1))


@pytest.mark.parametrize("layout", ["stacked", "interleaved"])
def test_margin_helper(layout: str) -> None:
    """A cross-entropy in which a margin is taken off the cosine of the positive; one for all, or one of each row."""
    pair = LF.view_pairs(12, layout)
    for margin in (torch.tensor(0.2).double(), torch.linspace(0, 0.5, 12).double()):

        def by_hand(z: Tensor, margin: Tensor = margin) -> Tensor:
            cosines = z @ z.T - margin.expand(12)[:, None] * F.one_hot(pair, 12)
            return F.cross_entropy((cosines / TAU).masked_fill(torch.eye(12, dtype=torch.bool), -torch.inf), pair)

        same(lambda z, margin=margin: helpers()["with_margin"](z, pair, margin), by_hand, unit(12, 0))
