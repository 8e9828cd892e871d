"""The guide to auxiliary classes: its code runs, and so does its example, on Fashion-MNIST where that is installed."""

import json
import os
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "auxiliary.md"
EXAMPLE = ROOT / "examples" / "auxiliary_fashion.py"
NAME = "train-images-idx3-ubyte"


def data_root() -> Path | None:
    root = Path(os.environ.get("LTKERNELS_DATA", "/usr/share/datasets"))
    files = [folder / f"{NAME}{end}" for folder in (root, root / "fashion-mnist") for end in ("", ".gz")]
    return root if any(file.is_file() for file in files) else None


@pytest.fixture(autouse=True)
def needs_trainer_dependencies() -> None:
    for name in ("matplotlib", "scipy"):
        pytest.importorskip(name, reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")


def test_guide(tmp_path, monkeypatch, one_thread) -> None:
    """The code blocks of the guide run in order; what it links to is there."""
    monkeypatch.chdir(tmp_path)
    text = GUIDE.read_text()
    blocks = text.split("```python\n")[1:]
    assert len(blocks) >= 8
    namespace: dict = {}
    torch.manual_seed(0)
    for block in blocks:
        exec(block.split("```")[0], namespace)
    assert {"map.png", "map.npz", "model.pt"} <= {path.name for path in tmp_path.iterdir()}

    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert links
    for link in links:
        assert link.startswith("https://") or (GUIDE.parent / link).is_file(), f"docs/auxiliary.md links to {link}"


def test_example_without_data(tmp_path, run_python) -> None:
    message = run_python(str(EXAMPLE), "--data-root", str(tmp_path), "--out", str(tmp_path / "out"), fails=True)
    assert "Traceback" not in message
    assert str(tmp_path) in message
    for part in ("Fetch", "--data-root", "LTKERNELS_DATA", "apt install dataset-fashion-mnist"):
        assert part in message
    assert not (tmp_path / "out").exists()


def test_example(tmp_path, run_python) -> None:
    root = data_root()
    if root is None:
        pytest.skip("needs Fashion-MNIST: apt install dataset-fashion-mnist, or its folder in LTKERNELS_DATA")
    run_python(str(EXAMPLE), "--data-root", str(root), "--seeds", "2", "--epochs", "1", "--out", str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accuracy.png", "map.png", "results.json", "results.md"]
    assert (tmp_path / "accuracy.png").read_bytes()[:4] == (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"

    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["accuracy"]) == 6
    for arm, runs in results["accuracy"].items():
        assert [len(run) for run in runs] == [7, 7], arm
        assert all(0 <= accuracy <= 100 for run in runs for accuracy in run)
    # Seven classes: chance is 14 %.
    assert sum(map(sum, results["accuracy"]["logit adj."])) / 14 > 30
    table = (tmp_path / "results.md").read_text()
    assert all(f"| {arm} |" in table for arm in results["accuracy"])
    assert "nan" not in table


def test_guide_shows_the_results() -> None:
    """The tables of the guide are what the example makes of the results that are kept beside it."""
    results = json.loads((GUIDE.parent / "auxiliary-results.json").read_text())
    for part in runpy.run_path(str(EXAMPLE))["table"](results["accuracy"]).split("\n\n"):
        assert part.strip() in GUIDE.read_text()
