"""``ltkernels data``: what it lists, what it tells about the rest, and the pictures."""

import io

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install 'ltkernels[trainer]'")
tyro = pytest.importorskip("tyro", reason="needs tyro: pip install 'ltkernels[trainer]'")

from data_files import write_cifar10, write_cifar100  # noqa: E402
from rich.console import Console  # noqa: E402

from ltkernels.trainer import TrainerError  # noqa: E402
from ltkernels.trainer.data import idx  # noqa: E402
from ltkernels.trainer.data.datasets import LongTail, load_dataset, long_tailed_split  # noqa: E402
from ltkernels.trainer.datacommand import GROUPS, DataOptions, class_histogram, run_data  # noqa: E402


@pytest.fixture(autouse=True)
def nowhere_else(monkeypatch, tmp_path):
    monkeypatch.delenv("LTKERNELS_DATA", raising=False)
    monkeypatch.setattr(idx, "SYSTEM_FOLDER", tmp_path / "none")
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    """Exit status and what was printed."""
    console = Console(file=io.StringIO(), width=140)
    return run_data(tyro.cli(DataOptions, args=arguments), console), console.file.getvalue()


def test_what_is_there_and_what_is_missing(tmp_path):
    write_cifar10(tmp_path, (120,) * 5 + (30,) * 5)
    status, text = run("--data-root", str(tmp_path), "--out", "pictures", "--imbalance-factor", "20")
    data = load_dataset("cifar10", tmp_path)
    split = long_tailed_split(data, LongTail(20))
    train, test = (
        next(line.split() for line in text.splitlines() if f" {part} " in line) for part in ("train", "test")
    )
    shape = ["32", "x", "32", "x", "3"]
    assert train == ["cifar10", "train", "750", "10", "30..120", *shape, data.train.fingerprint[:12]]
    assert test == ["cifar10", "test", "20", "10", "2", *shape, data.test.fingerprint[:12]]
    assert f"{sum(split.counts)} training images (6..120 a class)" in text
    assert split.train.fingerprint[:12] in text
    for name, hint in (("cifar100", "cifar-100-python.tar.gz"), ("fashion-mnist", "Debian"), ("list", "path label")):
        assert any(line.startswith(f"{name}, missing: ") and hint in line for line in text.splitlines())
    assert status == 0
    assert [file.name for file in (tmp_path / "pictures").iterdir()] == ["cifar10-exp-20.png"]
    assert Image.open(tmp_path / "pictures" / "cifar10-exp-20.png").size == (990, 462)


def test_nothing_there_makes_no_folder(tmp_path):
    status, text = run("--data-root", str(tmp_path))
    shipped = ("cifar10", "cifar100", "fashion-mnist", "folder", "list")
    assert status == 0 and all(f"{name}, missing: " in text for name in shipped)
    assert not (tmp_path / "runs").exists()


def test_pictures_go_to_a_new_folder_of_runs(tmp_path):
    write_cifar100(tmp_path / "data", per_class=20)
    assert run("--profile", "step", "--imbalance-factor", "10")[0] == 0  # from the default root
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("data-") and (folder / "cifar100-step-10.png").is_file()


def test_a_long_tail_that_is_impossible_is_told_and_the_rest_goes_on(tmp_path):
    write_cifar10(tmp_path, (120,) * 5 + (30,) * 5)
    write_cifar100(tmp_path, per_class=20)
    status, text = run("--data-root", str(tmp_path), "--out", "pictures", "--imbalance-factor", "2")
    assert status == 0
    assert "cifar10, exp profile, imbalance factor 2: no picture, max_count: class 5 has 30 images" in text
    assert [file.name for file in (tmp_path / "pictures").iterdir()] == ["cifar100-exp-2.png"]


def test_a_damaged_data_set_fails_and_the_rest_is_listed(tmp_path):
    write_cifar10(tmp_path)
    write_cifar100(tmp_path)
    (tmp_path / "cifar-100-python" / "test").write_bytes(b"\x80\x04")
    status, text = run("--data-root", str(tmp_path), "--out", "pictures", "--imbalance-factor", "2")
    assert status == 2
    assert "cifar100, cannot be read: " in text and "cifar-100-python/test: truncated" in text
    assert "cifar10 " in text
    with pytest.raises(TrainerError, match="cifar-100-python/test: truncated"):
        run("--data-root", str(tmp_path), "--dataset", "cifar100")


def test_one_data_set(tmp_path):
    write_cifar10(tmp_path)
    write_cifar100(tmp_path)
    options = ("--data-root", str(tmp_path), "--out", "pictures", "--imbalance-factor", "2", "--dataset")
    status, text = run(*options, "cifar10")
    assert status == 0 and "cifar100" not in text and "missing" not in text
    with pytest.raises(TrainerError, match="fashion-mnist: not all of the files"):
        run(*options, "fashion-mnist")


def test_wrong_options_are_told(tmp_path):
    with pytest.raises(TrainerError, match="dataset: expected one of cifar10, .*all; got 'mnist'"):
        DataOptions(dataset="mnist")
    with pytest.raises(TrainerError, match="download: which data set"):
        DataOptions(download=True)
    write_cifar10(tmp_path)
    (tmp_path / "pictures").mkdir()
    with pytest.raises(TrainerError, match="pictures exists"):
        run("--data-root", str(tmp_path), "--imbalance-factor", "2", "--out", "pictures")


@pytest.mark.parametrize(
    ("factor", "groups"), [(1, {"many"}), (4, {"many", "medium"}), (120, {"many", "medium", "few"})]
)
def test_the_picture_shows_the_groups_that_there_are(tmp_path, factor, groups):
    write_cifar10(tmp_path, (120,) * 10)
    data = load_dataset("cifar10", tmp_path)
    png = class_histogram(data, long_tailed_split(data, LongTail(factor)), "title")
    image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    for group, _, colour in GROUPS:
        painted = (image == tuple(bytes.fromhex(colour[1:]))).all(axis=2).sum()
        assert (painted > 0) == (group in groups)
