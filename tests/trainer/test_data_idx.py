"""IDX files: plain and compressed, where they are looked for, and every way in which they can be damaged."""

import gzip

import numpy as np
import pytest

pytest.importorskip("PIL", reason="needs Pillow: pip install 'ltkernels[trainer]'")

from data_files import idx_bytes  # noqa: E402

from ltkernels.trainer import TrainerError  # noqa: E402
from ltkernels.trainer.data import idx  # noqa: E402
from ltkernels.trainer.data.images import MissingDataError  # noqa: E402


@pytest.fixture
def no_system_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(idx, "SYSTEM_FOLDER", tmp_path / "none")


def write(folder, suffix="", train=30, test=20, seed=0):
    """Random images and their labels in the four files; gives the arrays by file name."""
    random = np.random.RandomState(seed)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for part, size in (("train", train), ("t10k", test)):
        arrays[f"{part}-images-idx3-ubyte"] = random.randint(0, 256, (size, 28, 28))
        arrays[f"{part}-labels-idx1-ubyte"] = np.arange(size) % 10
    for name, array in arrays.items():
        content = idx_bytes(array)
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    return arrays


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("folder", ["fashion-mnist", "FashionMNIST/raw", "."])
def test_the_files_in_every_place_and_form(tmp_path, no_system_folder, folder, suffix):
    arrays = write(tmp_path / folder, suffix)
    data = idx.load(tmp_path)
    for part, images in (("train", data.train), ("t10k", data.test)):
        assert images.images.dtype == np.uint8 and (images.images == arrays[f"{part}-images-idx3-ubyte"]).all()
        assert images.labels.dtype == np.int64 and (images.labels == arrays[f"{part}-labels-idx1-ubyte"]).all()
        assert images.num_classes == 10 and images.max_value == 255 and images.class_names[9] == "Ankle boot"
        assert images.images.flags.writeable
    assert data.name == "fashion-mnist" and data.mean == (0.2860,) and data.std == (0.3530,)


def test_the_system_folder_comes_last(tmp_path, monkeypatch):
    monkeypatch.setattr(idx, "SYSTEM_FOLDER", tmp_path / "system")
    write(tmp_path / "system", ".gz", seed=1)
    assert idx.load(tmp_path / "root").train.source == str(tmp_path / "system")
    write(tmp_path / "root" / "fashion-mnist")
    assert idx.load(tmp_path / "root").train.source == str(tmp_path / "root" / "fashion-mnist")


def test_missing_files_tell_what_to_fetch_and_where_to_put_it(tmp_path, no_system_folder):
    with pytest.raises(MissingDataError, match=f"{tmp_path}/fashion-mnist") as error:
        idx.load(tmp_path)
    for part in ("train-images-idx3-ubyte.gz", "dataset-fashion-mnist", "LTKERNELS_DATA", "http://fashion-mnist"):
        assert part in str(error.value)
    write(tmp_path / "fashion-mnist")
    (tmp_path / "fashion-mnist" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(MissingDataError, match="not all of the files"):
        idx.load(tmp_path)


IMAGES = np.zeros((30, 28, 28))
LABELS = np.arange(30) % 10


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("images-idx3", b"", "truncated, 0 bytes"),
        ("images-idx3", idx_bytes(IMAGES)[:10], "truncated, 10 bytes"),
        ("images-idx3", idx_bytes(IMAGES)[:-1], r"sizes \(30, 28, 28\) need 23520 values, the file has 23519"),
        ("images-idx3", idx_bytes(IMAGES) + b"x", "need 23520 values, the file has 23521"),
        ("images-idx3", b"\x00\x00\x08\x03" + b"\xff" * 12, "need 79228162458924105385300197375 values"),
        ("images-idx3", b"<html>not found</html>", "expected the magic number 00000803 .*3 dimensions.*got 3c68746d"),
        ("images-idx3", idx_bytes(IMAGES, type_code=13), "expected the magic number 00000803 .*got 00000d03"),
        ("images-idx3", idx_bytes(LABELS), "expected the magic number 00000803 .*got 00000801"),
        ("images-idx3", idx_bytes(IMAGES[:, :27]), r"expected images of 28 x 28 pixels, got shape \(30, 27, 28\)"),
        ("images-idx3", idx_bytes(IMAGES[:0]), r"expected images of 28 x 28 pixels, got shape \(0, 28, 28\)"),
        ("labels-idx1", idx_bytes(IMAGES), "expected the magic number 00000801 .*got 00000803"),
        ("labels-idx1", idx_bytes(LABELS[:29]), "29 labels, but 30 images in train-images-idx3-ubyte"),
        ("labels-idx1", idx_bytes(LABELS + 1), "expected labels in 0..9, got 10"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_files_are_named(tmp_path, no_system_folder, name, content, message, compressed):
    write(tmp_path)
    if compressed:
        (tmp_path / f"train-{name}-ubyte").unlink()
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    else:
        (tmp_path / f"train-{name}-ubyte").write_bytes(content)
    with pytest.raises(TrainerError, match=f"train-{name}-ubyte[.gz]*: .*{message}"):
        idx.load(tmp_path)


def test_truncated_compression_is_an_error_wherever_it_ends(tmp_path, no_system_folder):
    write(tmp_path, ".gz")
    file = tmp_path / "train-images-idx3-ubyte.gz"
    content = file.read_bytes()
    for length in np.linspace(0, len(content) - 1, 30).astype(int):
        file.write_bytes(content[:length])
        with pytest.raises(TrainerError, match=f"{file}: truncated"):
            idx.load(tmp_path)


def test_a_file_that_is_not_compressed_as_its_name_says(tmp_path, no_system_folder):
    write(tmp_path, ".gz")
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(idx_bytes(LABELS))
    with pytest.raises(TrainerError, match="t10k-labels-idx1-ubyte.gz: truncated or not readable"):
        idx.load(tmp_path)


@pytest.mark.skipif(not idx.SYSTEM_FOLDER.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist(tmp_path):
    data = idx.load(tmp_path)
    assert data.train.class_sizes.tolist() == [6000] * 10 and data.test.class_sizes.tolist() == [1000] * 10
    values = data.train.images[::10] / 255
    assert (values.mean(), values.std()) == pytest.approx((data.mean[0], data.std[0]), abs=3e-3)
