"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) as their authors publish them: pickled dictionaries of 32 x 32 images.

A pickle may name any function to be called while it is read. These files need three of numpy, so nothing else is
admitted, and those three are replaced by stand-ins that only collect bytes.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ltkernels.trainer import TrainerError
from ltkernels.trainer.data.images import ImageDataset, LabelledImages, MissingDataError

SIDE = 32
ROW = 3 * SIDE * SIDE
SHOWN = 80  # characters of a value in an error message


@dataclass(frozen=True)
class Archive:
    """Where an archive of the CIFAR family comes from, and what its files are called."""

    name: str
    url: str
    folder: str
    train_files: tuple[str, ...]
    test_file: str
    names_file: str
    label_key: str
    names_key: str
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def how_to_get_it(self, root: Path) -> str:
        archive = self.url.rpartition("/")[2]
        return (
            f"Fetch {self.url} and unpack it in {root} (tar xzf {archive}), so that {root / self.folder} exists; "
            "another folder is named by --data-root or LTKERNELS_DATA"
        )


CIFAR10 = Archive(
    name="cifar10",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    folder="cifar-10-batches-py",
    train_files=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test_file="test_batch",
    names_file="batches.meta",
    label_key="labels",
    names_key="label_names",
    num_classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
)
CIFAR100 = Archive(
    name="cifar100",
    url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    folder="cifar-100-python",
    train_files=("train",),
    test_file="test",
    names_file="meta",
    label_key="fine_labels",
    names_key="fine_label_names",
    num_classes=100,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)


def load_cifar10(root: Path) -> ImageDataset:
    """CIFAR-10 from ``root/cifar-10-batches-py``; its batches may be shorter than the published ones.

    Raises:
        MissingDataError: a file is not there.
        TrainerError: a file is not of the format.
    """
    return _load(CIFAR10, root)


def load_cifar100(root: Path) -> ImageDataset:
    """CIFAR-100 with its 100 fine labels from ``root/cifar-100-python``; errors as :func:`load_cifar10`."""
    return _load(CIFAR100, root)


def _load(archive: Archive, root: Path) -> ImageDataset:
    folder = root / archive.folder
    for name in (*archive.train_files, archive.test_file, archive.names_file):
        if not (folder / name).is_file():
            missing = f"no {name} in it" if folder.is_dir() else "no such folder"
            raise MissingDataError(f"{folder}: {missing}. {archive.how_to_get_it(root)}")
    names = _class_names(archive, folder / archive.names_file)
    train = [_batch(archive, folder / name) for name in archive.train_files]
    test = [_batch(archive, folder / archive.test_file)]

    def images(batches: list[tuple[np.ndarray, np.ndarray]]) -> LabelledImages:
        planes = np.split(np.concatenate([pixels for pixels, _ in batches]), 3, axis=1)
        return LabelledImages(
            source=str(folder),
            images=np.stack(planes, axis=-1).reshape(-1, SIDE, SIDE, 3),
            labels=np.concatenate([labels for _, labels in batches]),
            num_classes=archive.num_classes,
            max_value=255,
            class_names=names,
        )

    return ImageDataset(archive.name, images(train), images(test), archive.mean, archive.std)


def _batch(archive: Archive, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 3072) uint8, colour planes one after the other, and labels (N,) int64 of a file."""
    content = read_pickle(file)
    pixels, labels = _entry(content, "data", file), _entry(content, archive.label_key, file)
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != ROW or len(pixels) == 0:
        found = f"shape {pixels.shape}" if isinstance(pixels, np.ndarray) else _type_name(pixels)
        raise TrainerError(f"{file}: expected data of (images, {ROW}) uint8, got {found}")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise TrainerError(f"{file}: expected {archive.label_key} to be a list of integers, got {_type_name(labels)}")
    if len(labels) != len(pixels):
        raise TrainerError(f"{file}: {len(pixels)} images, but {len(labels)} {archive.label_key}")
    if min(labels) < 0 or max(labels) >= archive.num_classes:
        raise TrainerError(
            f"{file}: expected {archive.label_key} in 0..{archive.num_classes - 1}, got {min(labels)}..{max(labels)}"
        )
    return pixels, np.array(labels, dtype=np.int64)


def _class_names(archive: Archive, file: Path) -> tuple[str, ...]:
    names = _entry(read_pickle(file), archive.names_key, file)
    if not isinstance(names, list) or len(names) != archive.num_classes:
        raise TrainerError(
            f"{file}: expected a list of {archive.num_classes} {archive.names_key}, got {names!r:.{SHOWN}}"
        )
    texts = [name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in names]
    if not all(isinstance(text, str) for text in texts):
        raise TrainerError(f"{file}: expected {archive.names_key} to be texts, got {_type_name(names)}")
    return tuple(texts)


def _entry(content: Any, key: str, file: Path) -> Any:
    """The value of a key, which Python 2 wrote as bytes and Python 3 may have written as text."""
    if not isinstance(content, dict):
        raise TrainerError(f"{file}: expected a dictionary, got {_type_name(content)}")
    for form in (key.encode(), key):
        if form in content:
            value = content[form]
            return value.array(file) if isinstance(value, _Array) else value
    raise TrainerError(f"{file}: no entry {key!r}")


def _type_name(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.{SHOWN}}"


# The restricted unpickler


def read_pickle(file: Path) -> Any:
    """What a pickle holds, made of dict, list, tuple, set, bytes, str and numbers, with uint8 arrays as stand-ins.

    Raises:
        TrainerError: the file is truncated, no pickle, or names anything but an array; that is never called.
    """
    try:
        with file.open("rb") as stream:
            return _Unpickler(stream, encoding="bytes").load()
    except _RefusedError as error:
        raise TrainerError(f"{file}: {error}") from error
    except Exception as error:  # a damaged pickle may fail in any way
        size = file.stat().st_size if file.is_file() else 0
        raise TrainerError(f"{file}: truncated or no pickle, {size} bytes ({error or type(error).__name__})") from error


class _RefusedError(pickle.UnpicklingError):
    """The pickle asks for something that images and labels do not need."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_StandIn]:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            message = f"the pickle names {module}.{name}, which CIFAR files do not; refused, nothing of it was run"
            raise _RefusedError(message) from None

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError("the pickle refers to objects outside the file, which CIFAR files do not")


class _StandIn:
    """Base of what a pickle gets for a name. A pickle can set attributes of objects without this ``__setstate__``."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError(f"the pickle sets the state of {type(self).__name__}")


class _Dtype(_StandIn):
    """``numpy.dtype``: uint8, which has no byte order, so that the state says nothing."""

    __slots__ = ()

    def __init__(self, code: Any, *flags: Any) -> None:
        if code not in (b"u1", "u1"):
            raise _RefusedError(f"expected arrays of uint8, got one of {code!r:.{SHOWN}}")

    def __setstate__(self, state: Any) -> None:
        pass


class _Array(_StandIn):
    """``numpy.ndarray``: shape and bytes, which become an array only when they fit each other."""

    __slots__ = ("shape", "order", "pixels")

    def __init__(self) -> None:
        self.fill(None, None, "C", None)

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, pixels = state
        self.fill(shape, dtype, "F" if fortran else "C", pixels)

    def fill(self, shape: Any, dtype: Any, order: Any, pixels: Any) -> None:
        self.shape, self.order = shape, "F" if order in ("F", b"F") else "C"
        self.pixels = pixels if isinstance(dtype, _Dtype) and isinstance(pixels, bytes | bytearray) else None

    def array(self, file: Path) -> np.ndarray:
        """The array, uint8; raises TrainerError where the bytes are missing or do not fit the shape."""
        shape, pixels = self.shape, self.pixels
        is_shape = isinstance(shape, tuple) and all(type(length) is int and length >= 0 for length in shape)
        if not is_shape or pixels is None:
            raise TrainerError(f"{file}: an array without shape or content")
        if len(shape) != 2 or shape[0] * shape[1] != len(pixels):
            raise TrainerError(f"{file}: an array of shape {shape!r:.{SHOWN}} with {len(pixels)} bytes")
        return np.frombuffer(pixels, dtype=np.uint8).reshape(shape, order=self.order)


class _Reconstruct(_StandIn):
    """``numpy.core.multiarray._reconstruct``: an empty array, whose state follows."""

    __slots__ = ()

    def __new__(cls, kind: Any, shape: Any, code: Any) -> Any:
        return _Array()


class _FromBuffer(_StandIn):
    """``numpy.core.numeric._frombuffer``: an array as pickle protocol 5 has it."""

    __slots__ = ()

    def __new__(cls, buffer: Any, dtype: Any, shape: Any, order: Any, *axes: Any) -> Any:
        array = _Array()
        array.fill(shape, dtype, order, buffer)
        return array


class _Encode(_StandIn):
    """``_codecs.encode``: how Python 3 writes bytes for Python 2, as text in Latin-1."""

    __slots__ = ()

    def __new__(cls, text: Any, encoding: Any) -> Any:
        if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
            raise _RefusedError("the pickle encodes something else than bytes")
        return text.encode("latin1")


# numpy 2 renamed numpy.core to numpy._core; files of both are around.
_ADMITTED: dict[tuple[str, str], type[_StandIn]] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _FromBuffer,
    ("numpy._core.numeric", "_frombuffer"): _FromBuffer,
    ("_codecs", "encode"): _Encode,
}
