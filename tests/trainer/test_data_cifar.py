"""CIFAR files: every form they are around in, damage of every kind, and pickles that want to run something."""

import contextlib
import os
import pickle
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="needs Pillow: pip install 'ltkernels[trainer]'")

from data_files import CIFAR10_TRAIN, dump, python2_pickle, random_rows, write_cifar10, write_cifar100  # noqa: E402

from ltkernels.trainer import TrainerError  # noqa: E402
from ltkernels.trainer.data import cifar  # noqa: E402
from ltkernels.trainer.data.images import MissingDataError  # noqa: E402

REAL = Path(os.environ.get("LTKERNELS_DATA") or "data")


def is_the_image(image, row):
    """Rows hold the red plane, then green, then blue, each row by row."""
    return all(
        image[y, x, channel] == row[channel * 1024 + y * 32 + x]
        for y in range(0, 32, 7)
        for x in range(0, 32, 5)
        for channel in range(3)
    )


@pytest.mark.parametrize("protocol", range(6))
def test_cifar100_in_every_protocol(tmp_path, protocol):
    rows, labels = write_cifar100(tmp_path, protocol=protocol)
    data = cifar.load_cifar100(tmp_path)
    assert data.train.images.shape == (200, 32, 32, 3) and data.train.images.dtype == np.uint8
    assert data.train.labels.dtype == np.int64 and data.train.labels.tolist() == labels
    assert all(is_the_image(image, row) for image, row in zip(data.train.images, rows, strict=True))
    assert data.train.class_names == data.test.class_names == tuple(f"class{k}" for k in range(100))
    assert len(data.test) == 200 and not set(data.test.hashes) & set(data.train.hashes)
    assert data.train.num_classes == 100 and data.train.max_value == 255
    assert data.train.source == str(tmp_path / "cifar-100-python")
    assert data.mean == (0.5071, 0.4865, 0.4409) and data.std == (0.2673, 0.2564, 0.2762)


def test_cifar10_with_shorter_batches(tmp_path):
    sizes = (12,) * 5 + (4,) * 5
    rows, labels = write_cifar10(tmp_path, sizes)
    data = cifar.load_cifar10(tmp_path)
    assert data.train.class_sizes.tolist() == list(sizes)
    assert data.train.labels.tolist() == labels
    assert all(is_the_image(image, row) for image, row in zip(data.train.images, rows, strict=True))
    assert data.train.class_names[1] == "automobile"
    assert data.test.class_sizes.tolist() == [2] * 10
    assert data.mean == (0.4914, 0.4822, 0.4465) and data.std == (0.2023, 0.1994, 0.2010)


def test_files_of_python_2_and_numpy_1(tmp_path):
    write_cifar10(tmp_path)
    rows, labels = random_rows(7, 11), [3, 1, 4, 1, 5, 9, 2]
    content = python2_pickle(rows, labels, b"labels")
    with warnings.catch_warnings(action="ignore"):  # numpy dislikes the flags of its own old files
        assert (pickle.loads(content, encoding="bytes")[b"data"] == rows).all()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    data = cifar.load_cifar10(tmp_path)
    assert data.test.labels.tolist() == labels
    assert all(is_the_image(image, row) for image, row in zip(data.test.images, rows, strict=True))


@pytest.mark.parametrize("protocol", [2, 3])
def test_files_of_python_3_and_numpy_1(tmp_path, protocol):
    rows, _ = write_cifar100(tmp_path, protocol=protocol)
    file = tmp_path / "cifar-100-python" / "train"
    file.write_bytes(file.read_bytes().replace(b"numpy._core", b"numpy.core"))
    assert b"numpy.core.multiarray" in file.read_bytes()
    assert is_the_image(cifar.load_cifar100(tmp_path).train.images[5], rows[5])


def test_arrays_in_the_order_of_fortran_and_keys_that_are_text(tmp_path):
    rows, labels = write_cifar100(tmp_path)
    for protocol in (4, 5):
        content = {"data": np.asfortranarray(rows), "fine_labels": labels}
        dump(content, tmp_path / "cifar-100-python" / "train", protocol)
        data = cifar.load_cifar100(tmp_path)
        assert all(is_the_image(image, row) for image, row in zip(data.train.images, rows, strict=True))


class Call:
    """Pickled as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("place", ["whole", "data", "beside", "dtype argument"])
def test_a_pickle_that_names_a_function_is_refused_and_nothing_runs(tmp_path, protocol, place):
    rows, labels = write_cifar100(tmp_path)
    marker = tmp_path / "ran"
    evil = Call(os.system, f"touch {marker}")
    content = {
        "whole": evil,
        "data": {b"data": evil, b"fine_labels": labels},
        "beside": {b"data": rows, b"fine_labels": labels, b"filenames": evil},
        "dtype argument": {b"data": Call(np.dtype, evil), b"fine_labels": labels},
    }[place]
    file = tmp_path / "cifar-100-python" / "train"
    dump(content, file, protocol)
    with pytest.raises(TrainerError, match=f"{file}: the pickle names posix.system.*refused"):
        cifar.load_cifar100(tmp_path)
    assert not marker.exists()
    with contextlib.suppress(TypeError):  # of numpy, which gets the number that the call returned
        pickle.loads(file.read_bytes())  # the trap works
    assert marker.exists()


@pytest.mark.parametrize(
    "function", [eval, exec, getattr, __import__, open, np.load, np.array, np.frombuffer, type, pickle.loads]
)
def test_no_function_is_admitted(tmp_path, function):
    dump(Call(function, "1"), tmp_path / "evil")
    with pytest.raises(TrainerError, match="evil: the pickle names .*refused"):
        cifar.read_pickle(tmp_path / "evil")


@pytest.mark.parametrize("name", [b"numpy\nndarray", b"numpy\ndtype", b"numpy.core.multiarray\n_reconstruct"])
def test_a_pickle_cannot_change_the_reader(tmp_path, name):
    # BUILD with (None, {name: value}) sets attributes of an object that has no __setstate__, classes included.
    attack = b"\x80\x02c" + name + b"\nN}X\x08\x00\x00\x00poisonedK\x01s\x86b."
    (tmp_path / "evil").write_bytes(attack)
    with pytest.raises(TrainerError, match="evil"):
        cifar.read_pickle(tmp_path / "evil")
    assert not any(hasattr(stand_in, "poisoned") for stand_in in cifar._ADMITTED.values())


def test_persistent_objects_and_other_encodings_are_refused(tmp_path):
    (tmp_path / "evil").write_bytes(b"\x80\x02U\x01xQ.")
    with pytest.raises(TrainerError, match="evil: .*outside the file"):
        cifar.read_pickle(tmp_path / "evil")
    (tmp_path / "evil").write_bytes(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00xU\x03zip\x86R.")
    with pytest.raises(TrainerError, match="evil: .*encodes something else"):
        cifar.read_pickle(tmp_path / "evil")


def test_truncated_files_are_named_wherever_they_end(tmp_path):
    write_cifar100(tmp_path)
    for name, cuts in (("train", 25), ("meta", 25)):
        file = tmp_path / "cifar-100-python" / name
        content = file.read_bytes()
        for length in np.linspace(0, len(content) - 1, cuts).astype(int):
            file.write_bytes(content[:length])
            with pytest.raises(TrainerError, match=f"{file}: truncated or no pickle, {length} bytes"):
                cifar.load_cifar100(tmp_path)
        file.write_bytes(content)
    cifar.load_cifar100(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"<html>not found</html>", b"\x1f\x8b\x08\x00"])
def test_files_that_are_no_pickle(tmp_path, content):
    write_cifar100(tmp_path)
    (tmp_path / "cifar-100-python" / "test").write_bytes(content)
    with pytest.raises(TrainerError, match="cifar-100-python/test: truncated or no pickle"):
        cifar.load_cifar100(tmp_path)


def test_a_length_beyond_any_memory_is_an_error(tmp_path):
    (tmp_path / "evil").write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.")
    with pytest.raises(TrainerError, match="evil: truncated or no pickle"):
        cifar.read_pickle(tmp_path / "evil")


ROWS = random_rows(4)
LABELS = [0, 1, 2, 99]


def array_with(shape, content=None):
    """A pickle's array whose shape does not fit its bytes, which numpy itself would not make."""
    from_buffer = ROWS.__reduce_ex__(5)[0]
    return Call(from_buffer, content or ROWS.tobytes(), np.dtype(np.uint8), shape, "C")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a dictionary, got list"),
        ({b"fine_labels": LABELS}, "no entry 'data'"),
        ({b"data": ROWS}, "no entry 'fine_labels'"),
        ({b"data": ROWS, b"labels": LABELS}, "no entry 'fine_labels'"),
        ({b"data": ROWS[:, :3000].copy(), b"fine_labels": LABELS}, r"expected data of \(images, 3072\).*3000"),
        ({b"data": ROWS[:0], b"fine_labels": []}, r"expected data of \(images, 3072\)"),
        ({b"data": b"pixels", b"fine_labels": LABELS}, r"expected data of \(images, 3072\) uint8, got bytes"),
        ({b"data": ROWS.astype(np.float32), b"fine_labels": LABELS}, "expected arrays of uint8, got one of 'f4'"),
        ({b"data": ROWS.view(np.int8), b"fine_labels": LABELS}, "expected arrays of uint8, got one of 'i1'"),
        ({b"data": ROWS.ravel(), b"fine_labels": LABELS}, r"an array of shape \(12288,\)"),
        ({b"data": array_with((5, 3072)), b"fine_labels": LABELS}, r"shape \(5, 3072\) with 12288 bytes"),
        ({b"data": array_with((-4, -3072)), b"fine_labels": LABELS}, "an array without shape"),
        ({b"data": array_with((2**40, 3072)), b"fine_labels": LABELS}, "with 12288 bytes"),
        ({b"data": array_with((4, 3072), "text"), b"fine_labels": LABELS}, "an array without shape or content"),
        ({b"data": ROWS, b"fine_labels": LABELS[:3]}, "4 images, but 3 fine_labels"),
        ({b"data": ROWS, b"fine_labels": [0, 1, 2, 100]}, r"expected fine_labels in 0..99, got 0..100"),
        ({b"data": ROWS, b"fine_labels": [0, -1, 2, 3]}, r"expected fine_labels in 0..99, got -1..3"),
        ({b"data": ROWS, b"fine_labels": [0, 2**80, 2, 3]}, r"expected fine_labels in 0..99"),
        ({b"data": ROWS, b"fine_labels": [0, 1.5, 2, 3]}, "expected fine_labels to be a list of integers"),
        ({b"data": ROWS, b"fine_labels": [0, True, 2, 3]}, "expected fine_labels to be a list of integers"),
        ({b"data": ROWS, b"fine_labels": b"0123"}, "expected fine_labels to be a list of integers"),
    ],
)
@pytest.mark.parametrize("name", ["train", "test"])
def test_contents_that_do_not_fit_are_named(tmp_path, name, content, message):
    write_cifar100(tmp_path)
    dump(content, tmp_path / "cifar-100-python" / name)
    with pytest.raises(TrainerError, match=f"cifar-100-python/{name}: .*{message}"):
        cifar.load_cifar100(tmp_path)


@pytest.mark.parametrize("names", [[b"one"] * 99, b"names", [b"one"] * 99 + [1]])
def test_names_that_do_not_fit_are_an_error(tmp_path, names):
    write_cifar100(tmp_path)
    dump({b"fine_label_names": names}, tmp_path / "cifar-100-python" / "meta")
    with pytest.raises(TrainerError, match="meta: expected .*fine_label_names"):
        cifar.load_cifar100(tmp_path)


def test_missing_files_tell_what_to_fetch_and_where_to_put_it(tmp_path):
    with pytest.raises(MissingDataError, match="cifar-10-batches-py: no such folder") as error:
        cifar.load_cifar10(tmp_path)
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" in str(error.value)
    assert str(tmp_path) in str(error.value) and "LTKERNELS_DATA" in str(error.value)
    write_cifar10(tmp_path)
    for name in (*CIFAR10_TRAIN, "test_batch", "batches.meta"):
        file = tmp_path / "cifar-10-batches-py" / name
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(MissingDataError, match=f"no {name} in it. Fetch https://"):
            cifar.load_cifar10(tmp_path)
        file.write_bytes(content)
    with pytest.raises(MissingDataError, match="cifar-100-python.tar.gz"):
        cifar.load_cifar100(tmp_path)


@pytest.mark.skipif(not (REAL / "cifar-100-python").is_dir(), reason="LTKERNELS_DATA holds no CIFAR-100")
def test_the_real_cifar100():
    data = cifar.load_cifar100(REAL)
    assert data.train.class_sizes.tolist() == [500] * 100 and data.test.class_sizes.tolist() == [100] * 100
    assert data.train.class_names[0] == "apple" and data.train.class_names[99] == "worm"
    pixels = data.train.images[::5].reshape(-1, 3) / 255
    assert pixels.mean(axis=0) == pytest.approx(data.mean, abs=3e-3)
    assert pixels.std(axis=0) == pytest.approx(data.std, abs=3e-3)


@pytest.mark.skipif(not (REAL / "cifar-10-batches-py").is_dir(), reason="LTKERNELS_DATA holds no CIFAR-10")
def test_the_real_cifar10():
    data = cifar.load_cifar10(REAL)
    assert data.train.class_sizes[:5].tolist() == [5000] * 5 and data.test.class_sizes.tolist() == [1000] * 10
    assert data.train.class_names[0] == "airplane" and data.train.class_names[9] == "truck"
