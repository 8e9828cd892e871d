"""Small data sets in the formats of the large ones, for the tests of their readers."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np

CIFAR10_TRAIN = [f"data_batch_{number}" for number in range(1, 6)]


def random_rows(images: int, seed: int = 0) -> np.ndarray:
    """(images, 3072) uint8."""
    return np.random.RandomState(seed).randint(0, 256, (images, 3072)).astype(np.uint8)


def dump(content: object, file: Path, protocol: int = 4) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(content, protocol=protocol))


def write_cifar100(root: Path, per_class: int = 2, protocol: int = 4) -> tuple[np.ndarray, list[int]]:
    """A CIFAR-100 of random images, as many in the test set; gives the training rows and labels."""
    folder = root / "cifar-100-python"
    labels = np.random.RandomState(5).permutation(np.repeat(np.arange(100), per_class)).tolist()
    for name, seed in (("test", 1), ("train", 0)):
        rows = random_rows(len(labels), seed)
        content = {
            b"filenames": [b"x.png"] * len(labels),
            b"batch_label": b"one",
            b"fine_labels": labels,
            b"coarse_labels": [0] * len(labels),
            b"data": rows,
        }
        dump(content, folder / name, protocol)
    dump({b"fine_label_names": [b"class%d" % k for k in range(100)]}, folder / "meta", protocol)
    return rows, labels


def write_cifar10(root: Path, sizes: tuple[int, ...] = (12,) * 10, protocol: int = 4) -> tuple[np.ndarray, list[int]]:
    """A CIFAR-10 of random images with ``sizes[k]`` training images in class k, in five batches of unequal length."""
    folder = root / "cifar-10-batches-py"
    labels = np.random.RandomState(6).permutation(np.repeat(np.arange(10), sizes)).tolist()
    rows = random_rows(len(labels), 2)
    borders = [0, *sorted(np.random.RandomState(7).choice(np.arange(1, len(labels)), 4, replace=False)), len(labels)]
    for name, start, end in zip(CIFAR10_TRAIN, borders, borders[1:], strict=False):
        dump({b"data": rows[start:end].copy(), b"labels": labels[start:end]}, folder / name, protocol)
    dump({b"data": random_rows(20, 3), b"labels": [k % 10 for k in range(20)]}, folder / "test_batch", protocol)
    names = [b"airplane", b"automobile", b"bird", b"cat", b"deer", b"dog", b"frog", b"horse", b"ship", b"truck"]
    dump({b"num_cases_per_batch": 10000, b"label_names": names, b"num_vis": 3072}, folder / "batches.meta", protocol)
    return rows, labels


def python2_pickle(rows: np.ndarray, labels: list[int], label_key: bytes) -> bytes:
    """The dictionary as Python 2 and numpy 1 wrote it in the published archives: protocol 2, str in place of bytes."""

    def text(value: bytes) -> bytes:
        if len(value) < 256:
            return b"U" + bytes([len(value)]) + value
        return b"T" + struct.pack("<i", len(value)) + value

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def dtype(state: bytes) -> bytes:
        return b"cnumpy\ndtype\n" + text(b"u1") + integer(0) + integer(1) + b"\x87R" + state

    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + integer(0) + b"\x85" + text(b"b") + b"\x87R"
    state = b"(" + integer(3) + text(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    shape = integer(rows.shape[0]) + integer(rows.shape[1]) + b"\x86"
    array += b"(" + integer(1) + shape + dtype(state) + b"\x89" + text(rows.tobytes()) + b"tb"
    numbers = b"](" + b"".join(map(integer, labels)) + b"e"
    entries = text(b"batch_label") + text(b"training batch 1 of 5") + text(label_key) + numbers + text(b"data") + array
    return b"\x80\x02}(" + entries + b"u."


def idx_bytes(array: np.ndarray, type_code: int = 8) -> bytes:
    """An array of uint8 as IDX file."""
    header = bytes([0, 0, type_code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()
