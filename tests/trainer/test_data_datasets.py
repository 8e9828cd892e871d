"""The registry, downloads, and long-tailed subsets by the published counts and rules."""

import dataclasses
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="needs Pillow: pip install 'ltkernels[trainer]'")

from data_files import write_cifar10, write_cifar100  # noqa: E402

from ltkernels.trainer import TrainerError  # noqa: E402
from ltkernels.trainer.data import idx  # noqa: E402
from ltkernels.trainer.data.datasets import DATASETS, LongTail, load_dataset, long_tailed_split  # noqa: E402
from ltkernels.trainer.data.images import ImageDataset, LabelledImages, MissingDataError  # noqa: E402
from ltkernels.trainer.data.longtail import class_counts  # noqa: E402

REAL = Path(os.environ.get("LTKERNELS_DATA") or "data")


@pytest.fixture(autouse=True)
def no_data_variable(monkeypatch):
    monkeypatch.delenv("LTKERNELS_DATA", raising=False)


def labelled(labels, seed):
    """An image of 4 x 4 random pixels for each label."""
    labels = np.asarray(labels, dtype=np.int64)
    images = np.random.RandomState(seed).randint(0, 256, (len(labels), 4, 4, 3)).astype(np.uint8)
    return LabelledImages("random", images, labels, int(labels.max()) + 1, 255, ("a", "b", "c", "d"))


def dataset_of(sizes=(40, 40, 40, 40), seed=0):
    labels = np.random.RandomState(seed + 1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    test = labelled(np.arange(len(sizes)).repeat(5), seed + 2)
    return ImageDataset("random", labelled(labels, seed + 3), test, (0.5,) * 3, (0.25,) * 3)


# Registry


def test_the_root_is_the_argument_else_the_variable_else_data(tmp_path, monkeypatch):
    write_cifar100(tmp_path / "argument")
    write_cifar100(tmp_path / "variable")
    write_cifar100(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert load_dataset("cifar100").train.source == "data/cifar-100-python"
    monkeypatch.setenv("LTKERNELS_DATA", str(tmp_path / "variable"))
    assert load_dataset("cifar100").train.source == str(tmp_path / "variable" / "cifar-100-python")
    argument = tmp_path / "argument"
    assert load_dataset("cifar100", argument).train.source == str(argument / "cifar-100-python")


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(TrainerError, match="expected one of cifar10, cifar100, fashion-mnist, .*; got 'imagenet'"):
        load_dataset("imagenet")


SHIPPED = ("cifar10", "cifar100", "fashion-mnist", "folder", "list")


def test_a_new_data_set_is_one_entry(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setitem(DATASETS, "mine", lambda root: seen.append(root) or dataset_of())
    assert len(load_dataset("mine", tmp_path).train) == 160 and seen == [tmp_path]


def test_every_data_set_is_tested():
    assert DATASETS.keys() == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_missing_data_names_the_variable_and_the_place(tmp_path, monkeypatch, name):
    monkeypatch.setattr(idx, "SYSTEM_FOLDER", tmp_path / "none")
    with pytest.raises(MissingDataError, match=f"{tmp_path}.*LTKERNELS_DATA"):
        load_dataset(name, tmp_path)


# Downloads


def fake_torchvision(monkeypatch, fetch):
    """A torchvision whose downloads call ``fetch(url, root, filename=, md5=)``; its data sets cannot be made."""

    class CIFAR100:
        url, filename, tgz_md5 = "https://example.org/cifar.tar.gz", "cifar.tar.gz", "0123"

        def __init__(self, *arguments, **options):
            raise AssertionError("torchvision would unpickle the files")

    class FashionMNIST:
        def __init__(self, root, download):
            fetch("fashion", root)

    modules = {name: types.ModuleType(name) for name in ("torchvision", "torchvision.datasets.utils")}
    modules["torchvision.datasets"] = types.ModuleType("torchvision.datasets")
    modules["torchvision.datasets"].CIFAR100, modules["torchvision.datasets"].FashionMNIST = CIFAR100, FashionMNIST
    modules["torchvision"].datasets = modules["torchvision.datasets"]
    modules["torchvision.datasets.utils"].download_and_extract_archive = fetch
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_torchvision_fetches_what_is_missing_when_asked(tmp_path, monkeypatch):
    calls = []

    def fetch(url, root, **options):
        calls.append((url, options))
        write_cifar100(Path(root))

    fake_torchvision(monkeypatch, fetch)
    with pytest.raises(MissingDataError):
        load_dataset("cifar100", tmp_path)
    assert not calls
    assert len(load_dataset("cifar100", tmp_path, download=True).train) == 200
    assert calls == [("https://example.org/cifar.tar.gz", {"filename": "cifar.tar.gz", "md5": "0123"})]
    load_dataset("cifar100", tmp_path, download=True)
    assert len(calls) == 1  # what is there is not fetched again


def test_downloads_that_fail_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(idx, "SYSTEM_FOLDER", tmp_path / "none")

    def fetch(url, root, **options):
        raise OSError("no route to host")

    fake_torchvision(monkeypatch, fetch)
    for name in ("cifar100", "fashion-mnist"):
        with pytest.raises(TrainerError, match=f"could not fetch {name} into {tmp_path} .no route to host"):
            load_dataset(name, tmp_path, download=True)
    with pytest.raises(TrainerError, match="folder is made of your own images"):
        load_dataset("folder", tmp_path, download=True)


def test_a_missing_torchvision_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(TrainerError, match="download: needs torchvision, which is not installed"):
        load_dataset("cifar10", tmp_path, download=True)


# Long-tailed subsets


@pytest.mark.parametrize(
    ("num_classes", "max_count", "imbalance_factor", "profile", "total"),
    [
        (10, 5000, 100, "exp", 12406),
        (10, 5000, 50, "exp", 13996),
        (10, 5000, 10, "exp", 20431),
        (100, 500, 100, "exp", 10847),
        (100, 500, 50, "exp", 12608),
        (100, 500, 10, "exp", 19573),
        (10, 5000, 100, "step", 25250),
        (100, 500, 100, "step", 25250),
        (100, 450, 100, "exp", 9754),
        (10, 4500, 100, "exp", 11165),
    ],
)
def test_published_totals(num_classes, max_count, imbalance_factor, profile, total):
    assert sum(class_counts(num_classes, max_count, imbalance_factor, profile)) == total


def ldam_indices(labels, counts, seed):
    """The selection as LDAM's repository writes it, on NumPy's global generator."""
    chosen = []
    np.random.seed(seed)
    for the_class, the_count in zip(np.unique(labels), counts, strict=True):
        index = np.where(labels == the_class)[0]
        np.random.shuffle(index)
        chosen.extend(index[:the_count])
    return chosen


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_archive_selection_is_the_one_of_ldam(seed):
    data = dataset_of((40, 31, 22, 13))
    split = long_tailed_split(data, LongTail(10, "exp", 40, seed, "archive"))
    assert split.counts == (40, 18, 8, 4)
    expected = data.train.subset(np.array(ldam_indices(data.train.labels, split.counts, seed)))
    assert (split.train.images == expected.images).all() and (split.train.labels == expected.labels).all()
    assert split.evaluate is data.test


def test_archive_selection_of_what_validation_leaves_keeps_the_order_of_the_files():
    data = dataset_of()
    split = long_tailed_split(data, LongTail(10, selection="archive", validation_per_class=6))
    rest = data.train.subset(np.flatnonzero(~np.isin(data.train.hashes, split.evaluate.hashes)))
    expected = rest.subset(np.array(ldam_indices(rest.labels, split.counts, 0)))
    assert split.train.hashes.tolist() == expected.hashes.tolist()


def permuted(data, seed=9):
    order = np.random.RandomState(seed).permutation(len(data.train))
    return ImageDataset(data.name, data.train.subset(order), data.test, data.mean, data.std)


@pytest.mark.parametrize("validation", [0, 5])
def test_only_archive_selection_depends_on_the_order_of_the_files(validation):
    data = dataset_of()
    for selection, same in (("hash", True), ("archive", False)):
        tail = LongTail(10, selection=selection, validation_per_class=validation)
        one, other = long_tailed_split(data, tail), long_tailed_split(permuted(data), tail)
        assert (one.train.hashes.tolist() == other.train.hashes.tolist()) is same
        assert one.evaluate.hashes.tolist() == other.evaluate.hashes.tolist()


def test_hash_selection_is_its_definition():
    data = dataset_of()
    split = long_tailed_split(data, LongTail(10, max_count=30, subset_seed=3))
    expected = []
    for label, count in enumerate(split.counts):
        hashes = sorted(data.train.hashes[data.train.labels == label].tolist())
        expected += [hashes[k] for k in np.random.RandomState(3).permutation(40)[:count]]
    assert split.counts[0] == 30 and split.train.hashes.tolist() == expected


def test_the_default_size_is_that_of_the_largest_class_that_is_left():
    data = dataset_of((20, 50, 30, 40))
    with pytest.raises(TrainerError, match="class 0 has 20 images to train on, 50 are asked for"):
        long_tailed_split(data, LongTail(10))
    assert long_tailed_split(dataset_of(), LongTail(10)).counts[0] == 40
    assert long_tailed_split(dataset_of(), LongTail(10, validation_per_class=4)).counts[0] == 36


@pytest.mark.parametrize("selection", ["hash", "archive"])
@pytest.mark.parametrize("profile", ["exp", "step"])
def test_validation_images_are_balanced_the_same_for_all_subsets_and_not_trained_on(selection, profile):
    data = dataset_of()
    validations, subsets = set(), set()
    for seed in range(4):
        tail = LongTail(10, profile, subset_seed=seed, selection=selection, validation_per_class=6)
        split = long_tailed_split(data, tail)
        assert split.evaluate.class_sizes.tolist() == [6] * 4
        assert split.train.class_sizes.tolist() == list(split.counts)
        assert not set(split.train.hashes) & set(split.evaluate.hashes)
        assert set(split.train.hashes) | set(split.evaluate.hashes) <= set(data.train.hashes)
        validations.add(split.evaluate.fingerprint)
        subsets.add(split.train.fingerprint)
    assert len(validations) == 1 and len(subsets) == 4


def test_copies_of_an_image_are_kept_together_and_none_is_dropped():
    data = dataset_of()
    images = data.train.images.copy()
    images[1::4] = images[::4]  # every other pair is twice the same image, often in two classes
    doubled = ImageDataset(
        "doubled", LabelledImages("", images, data.train.labels, 4, 255), data.test, data.mean, data.std
    )
    split = long_tailed_split(doubled, LongTail(None, validation_per_class=10))
    assert len(split.train) == 120 and len(split.evaluate) == 40
    assert not set(split.train.hashes) & set(split.evaluate.hashes)


def test_a_set_with_a_tail_of_its_own_is_taken_whole():
    data = dataset_of((5, 40, 1, 9))
    split = long_tailed_split(data, LongTail(imbalance_factor=None))
    assert split.counts == (5, 40, 1, 9) == tuple(split.train.class_sizes) and split.evaluate is data.test
    assert split.train.label_fingerprint == data.train.label_fingerprint


def test_a_set_with_a_tail_of_its_own_has_the_same_order_whatever_that_of_its_files():
    data = dataset_of((5, 40, 1, 9))
    backwards = data.train.subset(np.arange(len(data.train))[::-1])
    turned = ImageDataset("turned", backwards, data.test, data.mean, data.std)
    first, second = (long_tailed_split(found, LongTail(imbalance_factor=None)).train for found in (data, turned))
    assert (first.images == second.images).all() and (first.labels == second.labels).all()
    archive = long_tailed_split(turned, LongTail(imbalance_factor=None, selection="archive")).train
    assert (archive.images == backwards.images).all()  # which is asked for by its name


PIXELS, LABELS = np.zeros((3, 8, 8), dtype=np.uint8), np.array([0, 1, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": PIXELS.astype(np.float32)}, r"here: expected images .* uint8, got \(3, 8, 8\) float32"),
        ({"images": PIXELS[0]}, r"images .* got \(8, 8\) uint8"),
        ({"images": PIXELS[..., None]}, r"images .* got \(3, 8, 8, 1\)"),
        ({"labels": LABELS.astype(np.float64)}, r"labels \(3,\) int64, got \(3,\) float64"),
        ({"labels": LABELS[:2]}, r"labels \(3,\) int64, got \(2,\)"),
        ({"labels": LABELS + 1}, r"labels in 0\.\.1, got 1\.\.2"),
        ({"labels": LABELS - 1}, r"labels in 0\.\.1, got -1\.\.0"),
        ({"class_names": ("cat",)}, "2 class names or none, got 1"),
    ],
)
def test_what_a_reader_may_get_wrong_is_named(change, message):
    """A reader of one's own is a few lines, and what it returns is the first thing to be wrong."""
    with pytest.raises(TrainerError, match=message):
        LabelledImages(
            **({"source": "here", "images": PIXELS, "labels": LABELS, "num_classes": 2, "max_value": 255} | change)
        )


def test_parts_of_a_data_set_that_do_not_fit_are_named():
    grey = LabelledImages("", PIXELS, LABELS, 2, 255)
    larger = LabelledImages("", np.zeros((3, 9, 8), dtype=np.uint8), LABELS, 2, 255)
    colour = LabelledImages("", np.zeros((3, 8, 8, 3), dtype=np.uint8), LABELS, 2, 255)
    for test in (larger, colour, dataclasses.replace(grey, num_classes=3)):
        with pytest.raises(TrainerError, match="mine: expected test images"):
            ImageDataset("mine", grey, test, (0.5,), (0.5,))
    for part, values in ((grey, (0.5,) * 3), (colour, (0.5,))):
        with pytest.raises(TrainerError, match="mine: expected mean and std of"):
            ImageDataset("mine", part, part, values, values)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_class_without_images_is_named(tmp_path, monkeypatch, part):
    whole = dataset_of((3, 3, 3, 3))
    lacking = getattr(whole, part)
    lacking = lacking.subset(np.flatnonzero(lacking.labels != 2))
    monkeypatch.setitem(DATASETS, "lacking", lambda root: dataclasses.replace(whole, **{part: lacking}))
    with pytest.raises(TrainerError, match=f"random: class 2 has no {part.replace('train', 'training')} image"):
        load_dataset("lacking", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subset_seed": -1}, "subset_seed"),
        ({"subset_seed": 2**32 - 1}, "subset_seed"),  # the seed of the validation images
        ({"validation_per_class": -1}, "validation_per_class"),
        ({"validation_per_class": 40}, "held-out images"),
        ({"selection": "random"}, "selection: expected 'hash' or 'archive'"),
        ({"profile": "linear"}, "profile"),
        ({"imbalance_factor": 0.5}, "imbalance_factor"),
        ({"max_count": 41}, "max_count: class 0 has 40"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(TrainerError, match=message):
        long_tailed_split(dataset_of(), LongTail(**({"imbalance_factor": 10} | options)))


def test_names_and_channels_stay_with_a_subset():
    import torch

    split = long_tailed_split(dataset_of(), LongTail(10))
    assert split.train.class_names == ("a", "b", "c", "d")
    pixels, labels = split.train.tensors(torch.device("cpu"))
    assert pixels.shape == (len(split.train), 3, 4, 4) and labels.tolist() == split.train.labels.tolist()
    expected = split.train.images[5, 2, 3] / 255 * 2 - 1
    assert pixels[5, :, 2, 3].numpy() == pytest.approx(expected, abs=1e-6)


def test_shorter_batches_of_cifar10_are_enough_for_a_long_tail(tmp_path):
    write_cifar10(tmp_path, (100,) * 5 + (30,) * 5)
    data = load_dataset("cifar10", tmp_path)
    assert long_tailed_split(data, LongTail(10)).counts == class_counts(10, 100, 10)
    with pytest.raises(TrainerError, match="class 5 has 30 images to train on"):
        long_tailed_split(data, LongTail(1))


# The real files


@pytest.mark.skipif(not (REAL / "cifar-100-python").is_dir(), reason="LTKERNELS_DATA holds no CIFAR-100")
def test_the_real_cifar100():
    data = load_dataset("cifar100", REAL)
    for factor, total in ((100, 10847), (50, 12608), (10, 19573)):
        split = long_tailed_split(data, LongTail(factor))
        assert len(split.train) == sum(split.counts) == total and split.counts[0] == 500
    # Images and subset of the documented results, whatever the order of the files.
    assert data.train.fingerprint.startswith("c6565a0d397a") and data.test.fingerprint.startswith("9f7e17c248ca")
    assert long_tailed_split(data, LongTail()).train.fingerprint.startswith("f82c8694c90c")
    step = long_tailed_split(data, LongTail(100, "step"))
    assert len(step.train) == 25250
    for selection in ("hash", "archive"):
        split = long_tailed_split(data, LongTail(100, "exp", 450, 0, selection, 50))
        assert len(split.train) == 9754 and split.evaluate.class_sizes.tolist() == [50] * 100
        assert not set(split.train.hashes) & set(split.evaluate.hashes)


@pytest.mark.skipif(not (REAL / "cifar-10-batches-py").is_dir(), reason="LTKERNELS_DATA holds no CIFAR-10")
def test_the_real_cifar10():
    data = load_dataset("cifar10", REAL)
    for factor, profile, total in ((100, "exp", 12406), (50, "exp", 13996), (10, "exp", 20431), (100, "step", 25250)):
        split = long_tailed_split(data, LongTail(factor, profile))
        assert len(split.train) == sum(split.counts) == total and split.counts[0] == 5000
    split = long_tailed_split(data, LongTail(100, "exp", 4500, 0, "hash", 500))
    assert len(split.train) == 11165 and split.evaluate.class_sizes.tolist() == [500] * 10
    assert not set(split.train.hashes) & set(split.evaluate.hashes)
