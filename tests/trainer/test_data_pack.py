"""Packs: the same split as from the data set, to the bit, and what is told about files that are damaged."""

import dataclasses
import io
import json
import zipfile

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install 'ltkernels[trainer]'")
pytest.importorskip("lightning_fabric", reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")

import tiny_images  # noqa: E402, F401
from data_files import write_cifar10  # noqa: E402

from ltkernels.trainer import TrainerError  # noqa: E402
from ltkernels.trainer.cli import main  # noqa: E402
from ltkernels.trainer.data import idx, pack  # noqa: E402
from ltkernels.trainer.data.datasets import LongTail, load_dataset, long_tailed_split  # noqa: E402
from ltkernels.trainer.data.images import ImageDataset, LabelledImages, MissingDataError  # noqa: E402
from ltkernels.trainer.data.pack import load_split, pack_file, read_index, read_pack, write_pack  # noqa: E402
from ltkernels.trainer.packcommand import PACKED_TABLES, needed  # noqa: E402

TAILS = (
    LongTail(5.0, max_count=20),
    LongTail(5.0, max_count=20, subset_seed=1),
    LongTail(4.0, "step", max_count=12, validation_per_class=3),
    LongTail(None),
)


@pytest.fixture(autouse=True)
def nowhere_else(monkeypatch, tmp_path):
    monkeypatch.delenv("LTKERNELS_DATA", raising=False)
    monkeypatch.setattr(idx, "SYSTEM_FOLDER", tmp_path / "none")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def colour(tmp_path):
    """CIFAR-10 in the form of its authors in ``full``; two images are there twice, one of them in two classes."""
    rows, labels = write_cifar10(tmp_path / "full", (24,) * 10)
    data = load_dataset("cifar10", tmp_path / "full")
    images, classes = data.train.images.copy(), data.train.labels
    first, second = np.flatnonzero(classes == 0)[:2]
    images[second] = images[first]
    images[np.flatnonzero(classes == 1)[0]] = images[first]
    return dataclasses.replace(data, train=dataclasses.replace(data.train, images=images))


def assert_same(ours, theirs):
    for part in ("train", "evaluate"):
        first, second = getattr(ours, part), getattr(theirs, part)
        for name in ("images", "labels"):
            assert getattr(first, name).dtype == getattr(second, name).dtype
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
        for name in ("fingerprint", "num_classes", "max_value", "class_names"):
            assert getattr(first, name) == getattr(second, name)
    assert ours.counts == theirs.counts


def test_a_split_from_a_pack_is_that_of_the_data_set(colour, tmp_path):
    file = pack_file(tmp_path / "packs", "cifar10")
    index = write_pack(file, colour, TAILS)
    assert read_index(file) == index
    for tail in TAILS:
        data, split = load_split("cifar10", tail, tmp_path / "packs")
        assert_same(split, long_tailed_split(colour, tail))
        assert (data.name, data.mean, data.std) == (colour.name, colour.mean, colour.std)
        assert split.train.source == str(file)
    whole = {
        (y, name) for part in (colour.train, colour.test) for y, name in zip(part.labels, part.hashes, strict=True)
    }
    assert index.images == len(whole) == 240 + 20 - 1


def test_grey_images_and_few_of_them(tmp_path):
    random = np.random.RandomState(0)

    def images(number):
        labels = np.arange(number) % 2
        return LabelledImages("made for tests", random.randint(0, 200, (number, 5, 7)).astype(np.uint8), labels, 2, 199)

    data = ImageDataset("fashion-mnist", images(20), images(6), (0.1,), (0.3,))
    tail = LongTail(3.0, max_count=9)
    write_pack(tmp_path / "fashion-mnist.ltpack", data, [tail])
    assert_same(load_split("fashion-mnist", tail, tmp_path)[1], long_tailed_split(data, tail))


def test_only_the_images_that_are_needed_are_packed(colour, tmp_path):
    index = write_pack(tmp_path / "cifar10.ltpack", colour, TAILS[:1])
    split = long_tailed_split(colour, TAILS[0])
    assert index.images <= len(split.train) + len(split.evaluate) < 240 + 20


def test_the_data_set_comes_before_its_pack(colour, tmp_path):
    write_pack(tmp_path / "full" / "cifar10.ltpack", colour, TAILS[:1])
    data, split = load_split("cifar10", TAILS[1], tmp_path / "full")  # which the pack lacks
    assert len(data.train) == 240 and split.train.source.endswith("cifar-10-batches-py")


def test_what_is_missing_is_told(colour, tmp_path):
    with pytest.raises(MissingDataError, match="cifar-10-python.tar.gz.*there is no pack .*cifar10.ltpack either"):
        load_split("cifar10", TAILS[0], tmp_path)
    file = tmp_path / "cifar10.ltpack"
    write_pack(file, colour, TAILS[:2])
    message = "cifar10.ltpack: no version with .*subset_seed 7.*; it has those with .*subset_seed 0.*subset_seed 1"
    with pytest.raises(TrainerError, match=message):
        load_split("cifar10", dataclasses.replace(TAILS[0], subset_seed=7), tmp_path)
    with pytest.raises(TrainerError, match="a pack of cifar10, expected one of cifar100"):
        read_pack(file, "cifar100", TAILS[0])


def test_a_pack_that_would_be_too_large_is_not_written(colour, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "LARGEST", 100_000)
    with pytest.raises(TrainerError, match="limit is 0; pack fewer tables"):
        write_pack(tmp_path / "cifar10.ltpack", colour, TAILS)
    assert not list(tmp_path.glob("*.ltpack"))
    with pytest.raises(TrainerError, match="long_tails: expected one version or more"):
        write_pack(tmp_path / "cifar10.ltpack", colour, [])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_pack_is_told(colour, tmp_path, share):
    file = tmp_path / "cifar10.ltpack"
    write_pack(file, colour, TAILS[:1])
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(TrainerError, match="cifar10.ltpack: truncated or no pack"):
        load_split("cifar10", TAILS[0], tmp_path)


def test_a_byte_that_changed_is_told(colour, tmp_path):
    file = tmp_path / "cifar10.ltpack"
    write_pack(file, colour, TAILS[:1])
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(TrainerError, match="cifar10.ltpack: damaged, sheets cannot be read"):
        load_split("cifar10", TAILS[0], tmp_path)


def rewritten(file, edit, compression=zipfile.ZIP_STORED):
    """The pack with other members, whose checksums are right."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    edit(members)
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def index_with(**values):
    def edit(members):
        members["index.json"] = json.dumps(json.loads(members["index.json"]) | values).encode()

    return edit


def another_picture(members):
    png = io.BytesIO()
    Image.new("RGB", (256, 256)).save(png, "PNG")
    index = json.loads(members["index.json"])
    members["sheets"] = png.getvalue() + b"\0" * (len(members["sheets"]) - len(png.getvalue()))
    index["sheets"] = [len(png.getvalue()), *index["sheets"][1:]]
    index["sheets"][-1] += len(members["sheets"]) - sum(index["sheets"])
    members["index.json"] = json.dumps(index).encode()


def other_numbers(value):
    def edit(members):
        members["train-0"] = np.full(len(members["train-0"]) // 4, value, "<u4").tobytes()

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda members: members.pop("labels"), "nothing called labels"),
        (lambda members: members.update(labels=b"xy"), "2 bytes of labels for"),
        (lambda members: members.update({"index.json": b"[]"}), "index that cannot be read"),
        (index_with(format=2), "of another format"),
        (index_with(shape=[1 << 20, 32, 3]), "images of shape"),
        (index_with(shape=[16, 16, 3]), r"a sheet of \(256, 256\)"),
        (index_with(images=-1), "not a whole number"),
        (index_with(sheets=[5]), "1 sheets for"),
        (index_with(more=1), "more"),
        (another_picture, "damaged, cannot identify"),
        (other_numbers(1 << 31), "out of range"),
        (other_numbers(0), "are not those it was made of"),
    ],
)
def test_a_pack_that_was_changed_is_told(colour, tmp_path, edit, message):
    file = tmp_path / "cifar10.ltpack"
    write_pack(file, colour, TAILS[:1])
    rewritten(file, edit)
    with pytest.raises(TrainerError, match=f"cifar10.ltpack: .*{message}"):
        load_split("cifar10", TAILS[0], tmp_path)


def test_compressed_members_are_refused(colour, tmp_path):
    file = tmp_path / "cifar10.ltpack"
    write_pack(file, colour, TAILS[:1])
    rewritten(file, lambda members: None, zipfile.ZIP_DEFLATED)
    with pytest.raises(TrainerError, match="index.json is compressed"):
        load_split("cifar10", TAILS[0], tmp_path)


def test_the_command_packs_what_tables_need(tmp_path, capsys):
    write_cifar10(tmp_path / "full", (40,) * 10)
    tails = needed(PACKED_TABLES)
    assert {
        name: [(t.subset_seed, t.max_count, t.validation_per_class) for t in found] for name, found in tails.items()
    } == {
        "cifar100": [(0, 500, 0), (1, 500, 0), (2, 500, 0), (0, 450, 50)],  # tuning holds out images of each class
        "cifar10": [(0, 5000, 0), (1, 5000, 0), (2, 5000, 0)],
    }
    assert main(["pack", "supervised-cifar10", "--data-root", "full", "--out", "packs"]) == 2
    assert "max_count: class 0 has 40 images to train on, 5000 are asked for" in capsys.readouterr().err
    assert main(["pack", "none", "--data-root", "full"]) == 2
    assert "unknown table 'none'" in capsys.readouterr().err


def test_a_run_from_a_pack_and_the_list(tmp_path, capsys, monkeypatch):
    tail = tiny_images.tiny_recipe().long_tail
    write_pack(tmp_path / "tiny.ltpack", tiny_images.load_tiny(), [tail])
    options = ["--no-tensorboard", "--accelerator", "cpu", "--data-root", str(tmp_path)]
    assert main(["train", "tiny-ce", "--out", "one", *options]) == 0

    def missing(root):
        raise MissingDataError("not here")

    monkeypatch.setitem(tiny_images.DATASETS, "tiny", missing)
    assert main(["train", "tiny-ce", "--out", "two", *options]) == 0
    assert main(["posthoc", "two", "--methods", "tau-norm", *options[1:]]) == 0
    first, second = (json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("one", "two"))
    assert first["last"] == second["last"] and first["train_fingerprint"] == second["train_fingerprint"]
    capsys.readouterr()
    assert main(["data", "--data-root", str(tmp_path), "--dataset", "tiny"]) == 2  # there is nothing to draw
    assert main(["data", "--data-root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "tiny.ltpack: a pack, 130 images of tiny" in out and "max_count 40" in out and "70 training images" in out
