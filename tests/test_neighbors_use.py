"""Neighbour maps in files, pictures, compiled and exported code."""

from __future__ import annotations

import io
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ltkernels.functional as LF
from ltkernels.neighbors import NeighborMap

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = [(0, 3), (0, 4), (2, 4), (2, 6)]


def small() -> NeighborMap:
    return NeighborMap.from_pairs(SMALL, num_classes=3, num_auxiliary=4)


# Files


@pytest.mark.parametrize("name", ["map.npz", "without_suffix", "ü $.npz"])
@pytest.mark.parametrize("kind", [str, Path])
def test_save_and_load(tmp_path: Path, name: str, kind: type) -> None:
    path = kind(tmp_path / name)
    for pairs in ([], SMALL):  # the second replaces the first
        neighbors = NeighborMap.from_pairs(pairs, num_classes=3, num_auxiliary=4)
        neighbors.save(path)
        assert NeighborMap.load(path) == neighbors
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_save_keeps_links_and_permissions(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.npz"
    link.symlink_to(tmp_path / "real" / "map.npz")
    before = os.umask(0o027)
    try:
        small().save(link)
    finally:
        os.umask(before)
    assert link.is_symlink() and NeighborMap.load(tmp_path / "real" / "map.npz") == small()
    assert (tmp_path / "real" / "map.npz").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    path = tmp_path / "map.npz"
    small().save(path)

    def fail(*_) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, fails, fail)
    with pytest.raises(OSError, match="no space left"):
        NeighborMap.from_pairs([], num_classes=1, num_auxiliary=0).save(path)
    assert NeighborMap.load(path) == small() and [file.name for file in tmp_path.iterdir()] == ["map.npz"]


def test_save_to_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        small().save(tmp_path / "missing" / "map.npz")
    with pytest.raises(FileNotFoundError):
        NeighborMap.load(tmp_path / "map.npz")
    with pytest.raises(IsADirectoryError):
        NeighborMap.load(tmp_path)


def test_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "map.npz"
    small().save(path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(
            ValueError, match=r"^path: expected a whole file of NeighborMap.save, version 1, got '.*map"
        ):
            NeighborMap.load(path)


def test_damaged_file(tmp_path: Path) -> None:
    """Whatever byte changes: an error, or one that carries nothing of the map, as a time of day does."""
    path = tmp_path / "map.npz"
    small().save(path)
    content = path.read_bytes()
    errors = 0
    for place, byte in enumerate(content):
        path.write_bytes(content[:place] + bytes([byte ^ 1 << place % 8]) + content[place + 1 :])
        try:
            assert NeighborMap.load(path) == small()
        except ValueError as error:
            assert str(error).startswith("path: expected a whole file of NeighborMap.save")
            errors += 1
    assert errors > len(content) / 2


def test_damage_that_makes_the_map_smaller(tmp_path: Path) -> None:
    """Half of the pairs can be read without ever coming to the checksum."""
    path = tmp_path / "map.npz"
    small().save(path)
    content = path.read_bytes()
    assert content.count(b"(4, 2)") == 1
    path.write_bytes(content.replace(b"(4, 2)", b"(2, 2)"))
    with pytest.raises(ValueError, match="^path: expected a whole file.*: pairs.npy has a wrong checksum"):
        NeighborMap.load(path)


GOOD = {"format": "ltkernels.NeighborMap", "version": 1, "num_classes": 3, "num_auxiliary": 4, "pairs": np.array(SMALL)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"pairs": np.array([(0, 2)])}, "auxiliary classes"),
        ({"pairs": np.array([(3, 4)])}, "target classes"),
        ({"pairs": np.array([(0.0, 3.0)])}, "integers"),
        ({"pairs": np.array([(0, 3)], dtype=object)}, "allow_pickle"),
        ({"pairs": None}, "pairs"),
        ({"num_classes": 0}, "num_classes"),
        ({"num_auxiliary": None}, "num_auxiliary"),
        ({"format": "another"}, "format another"),
        ({"format": None}, "format"),
        ({"version": 2}, "version 2"),
    ],
)
def test_foreign_archives(tmp_path: Path, change: dict, reason: str | None) -> None:
    path = tmp_path / "map.npz"
    np.savez(path, **{name: value for name, value in (GOOD | change).items() if value is not None})
    if reason is None:
        assert NeighborMap.load(path) == small()
        return
    with pytest.raises(ValueError, match=f"^path: expected a whole file.*{reason}"):
        NeighborMap.load(path)


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("evil",)


def test_foreign_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    archive, array, state = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme.txt", "no arrays")
    np.save(array, np.array(SMALL))
    torch.save(torch.ones(3), state)
    contents = [archive.getvalue(), array.getvalue(), state.getvalue(), pickle.dumps(Evil()), b"", b"target,auxiliary"]
    for content in contents:
        Path("map").write_bytes(content)
        with pytest.raises(ValueError, match="^path: expected a whole file of NeighborMap.save, version 1, got 'map'"):
            NeighborMap.load("map")
    assert not Path("evil").exists()


# Pictures


def test_plot(tmp_path: Path) -> None:
    """Formats, sizes, extremes; what they look like is for the eye."""
    pytest.importorskip("matplotlib")
    names = ["$cat", "a name that is longer than the space for it", "wolf"]
    small().plot(tmp_path / "small.png", class_counts=[1, 500, 20], class_names=names)
    small().plot(str(tmp_path / "small.svg"))
    NeighborMap.from_pairs([], num_classes=1, num_auxiliary=0).plot(tmp_path / "empty.pdf", class_counts=[3])
    numbers = torch.arange(6851)
    pairs = torch.stack([numbers % 1000, 1000 + numbers % 4000], dim=1)
    large = NeighborMap.from_pairs(pairs, num_classes=1000, num_auxiliary=5012)
    large.plot(tmp_path / "large.png", class_counts=torch.arange(1, 1001))
    assert (tmp_path / "empty.pdf").read_bytes().startswith(b"%PDF")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("small.png", "large.png"))
    assert "svg" in (tmp_path / "small.svg").read_text()
    assert "matplotlib.pyplot" not in sys.modules or sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_plot_draws_every_pair(tmp_path: Path) -> None:
    """Dots are at the pairs, with target classes sorted by count and auxiliary ones by first anchor."""
    pytest.importorskip("matplotlib")
    from ltkernels import _neighbor_plot

    axes = _neighbor_plot.Figure().subplots()
    _neighbor_plot._dots(axes, small(), np.array([2, 1, 0]))  # places of classes 0, 1, 2: 2, 1, 0
    dots = set(zip(*(values.tolist() for values in axes.lines[0].get_data()), strict=True))
    # Columns: 4 and 6 (first anchor class 2), 3 (class 0), 5 (none).
    assert dots == {(2, 2), (0, 2), (0, 0), (1, 0)}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4", "6", "3", "5"]


def test_plot_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "map.png"
    for options, error, message in (
        ({"class_counts": [1, 2]}, ValueError, r"^class_counts: expected shape \(3,\), got \(2,\)"),
        ({"class_counts": [1, 2, 0]}, ValueError, "^class_counts: expected positive"),
        ({"class_names": ["a", "b"]}, ValueError, "^class_names: expected 3 names, got 2"),
        ({"class_names": ["a", "b", 3]}, TypeError, "^class_names: expected names, got int"),
    ):
        with pytest.raises(error, match=message):
            small().plot(path, **options)
    monkeypatch.delitem(sys.modules, "ltkernels._neighbor_plot", raising=False)
    monkeypatch.delattr("ltkernels._neighbor_plot", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="^NeighborMap.plot needs matplotlib: pip install matplotlib"):
        small().plot(path)
    assert not path.exists()


# Compiled and exported code


class Model(nn.Module):
    def __init__(self, neighbors: NeighborMap, mode: str) -> None:
        super().__init__()
        self.neighbors, self.mode = neighbors, mode

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return LF.auxiliary_cross_entropy(logits, target, self.neighbors, mode=self.mode, reduction="none")


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(7, 7, generator=torch.Generator().manual_seed(0)), torch.arange(7)


MODES = pytest.mark.parametrize("mode", ["plain", "back", "target_only", "auxiliary_only"])


@MODES
def test_compiles_without_graph_breaks(mode: str) -> None:
    torch._dynamo.reset()
    logits, target = batch()

    def loss(logits: Tensor, target: Tensor, neighbors: NeighborMap) -> Tensor:
        return LF.auxiliary_cross_entropy(logits, target, neighbors, mode=mode, reduction="none")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    values = []
    for neighbors in (small(), NeighborMap.from_pairs([(1, 5)], num_classes=3, num_auxiliary=4)):  # map: an argument
        values.append(compiled(logits, target, neighbors))
        torch.testing.assert_close(values[-1], loss(logits, target, neighbors))
    assert not torch.equal(*values)
    model = Model(small(), mode)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(logits, target), values[0])


@MODES
@pytest.mark.parametrize("strict", [True, False])
def test_exports(mode: str, strict: bool) -> None:
    logits, target = batch()
    model = Model(small(), mode)
    exported = torch.export.export(model, (logits, target), strict=strict)
    torch.testing.assert_close(exported.module()(logits.flip(1), target), model(logits.flip(1), target))
