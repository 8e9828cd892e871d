"""The digits: sources, errors that tell what to do, and splits without leakage."""

import sys

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'ltkernels[trainer]'")

from ltkernels.trainer import TrainerError, data  # noqa: E402
from ltkernels.trainer.data import digits  # noqa: E402
from ltkernels.trainer.recipes import RECIPES  # noqa: E402

RECIPE = RECIPES["digits"]


@pytest.fixture(autouse=True)
def no_data_variable(monkeypatch):
    monkeypatch.delenv("LTKERNELS_DATA", raising=False)


@pytest.fixture(scope="module")
def images():
    return data.load("digits")


def write_csv(folder, images, name="digits.csv", seed=0):
    """The images in the archive's format, shuffled."""
    rows = np.column_stack([images.images.reshape(len(images), -1), images.labels])
    np.savetxt(folder / name, np.random.RandomState(seed).permutation(rows), fmt="%d", delimiter=",")


def test_the_copy_of_scikit_learn(images):
    assert len(images) == 1797
    assert images.images.dtype == np.uint8 and images.images.max() == 16
    assert len(set(images.hashes)) == 1797


@pytest.mark.parametrize("name", ["digits.csv", "optdigits.tes"])
def test_a_folder_in_any_order_gives_the_same_splits(images, tmp_path, name):
    write_csv(tmp_path, images, name)
    read = data.load("digits", tmp_path)
    assert read.source == str(tmp_path / name)
    assert read.fingerprint == images.fingerprint
    ours, expected = data.split(RECIPE, read, 3), data.split(RECIPE, images, 3)
    assert ours.train.hashes.tolist() == expected.train.hashes.tolist()
    assert ours.evaluate.labels.tolist() == expected.evaluate.labels.tolist()


def test_the_variable_names_the_folder(images, tmp_path, monkeypatch):
    monkeypatch.setenv("LTKERNELS_DATA", str(tmp_path))
    assert data.load("digits").source.startswith("scikit-learn")  # the folder is for all data sets
    write_csv(tmp_path, images)
    assert data.load("digits").source == str(tmp_path / "digits.csv")
    monkeypatch.setenv("LTKERNELS_DATA", str(tmp_path / "none"))
    with pytest.raises(TrainerError, match="LTKERNELS_DATA names .*none, which is no folder.*[Ff]etch https"):
        data.load("digits")


def test_a_missing_root_tells_what_to_fetch_and_where_to_put_it(tmp_path):
    missing = tmp_path / "nowhere"
    with pytest.raises(TrainerError, match=f"data root {missing}: no such folder. Fetch https://.* into {missing}"):
        data.load("digits", missing)
    with pytest.raises(TrainerError, match=f"neither digits.csv nor optdigits.tes.* Fetch https://.* into {tmp_path}"):
        data.load("digits", tmp_path)


def test_missing_scikit_learn_tells_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(TrainerError, match=r"pip install 'ltkernels\[trainer\]'.*--data-root"):
        digits.load()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,c\n", "cannot be read as integers"),
        ("1,2,3\n", "expected lines of 65 integers"),
        (",".join(["17"] + ["0"] * 63 + ["1"]) + "\n", r"expected pixels in 0..16, got 0..17"),
        (",".join(["0"] * 64 + ["10"]) + "\n", r"expected labels in 0..9, got 10..10"),
        (",".join(["0"] * 64 + ["1"]) + "\n1,2\n", "cannot be read as integers"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, message):
    (tmp_path / "digits.csv").write_text(text)
    with pytest.raises(TrainerError, match=f"digits.csv: {message}"):
        data.load("digits", tmp_path)


def test_an_image_that_is_twice_in_a_file_is_read_once(images, tmp_path):
    write_csv(tmp_path, images.subset(np.arange(100)))
    lines = (tmp_path / "digits.csv").read_text().splitlines(keepends=True)
    (tmp_path / "digits.csv").write_text("".join([*lines, *lines[:10]]))
    assert len(data.load("digits", tmp_path)) == 100


@pytest.mark.filterwarnings("ignore:loadtxt")
def test_an_empty_file_is_an_error(tmp_path):
    (tmp_path / "digits.csv").write_text("")
    with pytest.raises(TrainerError, match="digits.csv"):
        data.load("digits", tmp_path)


def test_no_image_is_in_two_sets(images):
    test = data.split(RECIPE, images, 0).evaluate
    for seed in range(4):
        final, tuning = data.split(RECIPE, images, seed), data.split(RECIPE, images, seed, tuning=True)
        assert final.evaluate.fingerprint == test.fingerprint  # the same test images for every seed
        assert not set(final.train.hashes) & set(test.hashes)
        assert not set(tuning.train.hashes) & set(test.hashes)
        assert not set(tuning.evaluate.hashes) & set(test.hashes)
        assert not set(tuning.evaluate.hashes) & set(tuning.train.hashes)


def test_sizes_of_the_splits(images):
    final, tuning = data.split(RECIPE, images, 0), data.split(RECIPE, images, 0, tuning=True)
    assert final.counts == (120, 86, 61, 44, 31, 22, 16, 11, 8, 6)
    assert tuning.counts == (90, 64, 46, 33, 23, 17, 12, 8, 6, 4)
    for split in (final, tuning):
        assert split.train.class_sizes.tolist() == list(split.counts)
    assert final.evaluate.class_sizes.tolist() == [50] * 10
    assert tuning.evaluate.class_sizes.tolist() == [30] * 10


def test_the_test_set_is_the_one_of_the_documented_results(images):
    assert data.split(RECIPE, images, 0).evaluate.fingerprint.startswith("a564823a0382")


def test_tensors(images):
    import torch

    pixels, labels = images.tensors(torch.device("cpu"))
    assert pixels.shape == (1797, 1, 8, 8) and pixels.dtype == torch.float32
    assert pixels.min() == -1 and pixels.max() == 1
    assert labels.dtype == torch.int64 and labels.tolist() == images.labels.tolist()


def test_an_unknown_data_set_is_named():
    with pytest.raises(TrainerError, match="expected 'digits', got 'letters'"):
        data.load("letters")
