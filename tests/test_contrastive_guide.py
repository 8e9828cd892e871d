"""The guide to contrastive losses: its code runs, its links lead somewhere, and it knows every module."""

from pathlib import Path

import torch

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
