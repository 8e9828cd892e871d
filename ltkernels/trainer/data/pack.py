"""Packs: the images that some long-tailed versions of a data set need, in one file, for machines without the rest.

A pack is a zip without compression: ``index.json``, ``labels`` (N,) uint16, the images as lossless WebP, 64 of them in
a sheet, one sheet after the other in ``sheets``, and for each version number i ``train-i`` and ``evaluate-i``, the
numbers of its images in their order, uint32. All numbers are little-endian. An image with its label is stored once.
"""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ltkernels.trainer import TrainerError
from ltkernels.trainer.checkpoint import write_atomically
from ltkernels.trainer.data.datasets import LongTail, data_root_of, load_dataset, long_tailed_split
from ltkernels.trainer.data.images import ImageDataset, LabelledImages, MissingDataError
from ltkernels.trainer.data.longtail import Split

SUFFIX = ".ltpack"
LARGEST = 60 * 2**20  # bytes of a pack
_FORMAT = 1
_ROW = 8  # images in a row of a sheet; sheets of one image each are 7 % larger
_SHEET = _ROW * _ROW
_LARGEST_SIDE = 512  # pixels of an image
_LABELS, _NUMBERS = np.dtype("<u2"), np.dtype("<u4")
_PARTS = ("train", "evaluate")


def load_split(dataset: str, long_tail: LongTail, data_root: Path | None = None) -> tuple[ImageDataset, Split]:
    """A data set and its long-tailed version, from the files of the data set, else from its pack.

    Args:
        dataset: Key of ``DATASETS``.
        long_tail: Which version.
        data_root: Folder with the data sets and packs; default: the one that ``LTKERNELS_DATA`` names, else ``data``.

    Returns:
        The data set, which from a pack has no other images than the split, and the split: the same images, labels,
        counts and fingerprints wherever they come from.

    Raises:
        MissingDataError: neither the data set nor its pack is there.
        TrainerError: a file cannot be read, the pack lacks this version, or the data set has too few images for it.
    """
    try:
        data = load_dataset(dataset, data_root)
    except MissingDataError as error:
        file = pack_file(data_root_of(data_root), dataset)
        if not file.is_file():
            raise MissingDataError(f"{error}; there is no pack {file} either") from error
        return read_pack(file, dataset, long_tail)
    return data, long_tailed_split(data, long_tail)


def pack_file(folder: Path, dataset: str) -> Path:
    """Where the pack of a data set lies."""
    return folder / f"{dataset}{SUFFIX}"


# Writing


def write_pack(file: Path, data: ImageDataset, long_tails: Sequence[LongTail]) -> PackIndex:
    """Write the pack of these versions of a data set.

    Args:
        file: Its place; a pack that is there is replaced.
        data: Images of one byte a channel, (N, H, W) or (N, H, W, 3).
        long_tails: The versions.

    Raises:
        TrainerError: no version, images that no pack can hold, a pack above 60 MiB, or it cannot be written.
    """
    if not long_tails:
        raise TrainerError("long_tails: expected one version or more, got none")
    splits = [long_tailed_split(data, tail) for tail in long_tails]
    images, labels, numbers = _united([part for split in splits for part in (split.train, split.evaluate)])
    if images.dtype != np.uint8 or max(images.shape[1:3]) > _LARGEST_SIDE:
        raise TrainerError(f"{data.name}: a pack holds uint8 images of up to {_LARGEST_SIDE} pixels a side")
    sheets = [_encode(images[i : i + _SHEET]) for i in range(0, len(images), _SHEET)]
    index = PackIndex(
        dataset=data.name,
        shape=images.shape[1:],
        max_value=data.train.max_value,
        num_classes=data.train.num_classes,
        class_names=data.train.class_names,
        mean=data.mean,
        std=data.std,
        images=len(images),
        sheets=tuple(map(len, sheets)),
        versions=tuple(_version(tail, split) for tail, split in zip(long_tails, splits, strict=True)),
    )
    names = [f"{part}-{i}" for i in range(len(splits)) for part in _PARTS]
    members = {
        "index.json": json.dumps({"format": _FORMAT, **dataclasses.asdict(index)}).encode(),
        "labels": labels.astype(_LABELS).tobytes(),
        **{name: rows.astype(_NUMBERS).tobytes() for name, rows in zip(names, numbers, strict=True)},
        "sheets": b"".join(sheets),
    }
    content = _zipped(members)
    if len(content) > LARGEST:
        raise TrainerError(
            f"{file}: the {len(images)} images of {len(long_tails)} versions of {data.name} take "
            f"{len(content) / 2**20:.1f} MiB, the limit is {LARGEST / 2**20:.0f}; pack fewer tables"
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainerError(f"cannot make the folder {file.parent}: {error.strerror}") from error
    write_atomically(file, lambda stream: stream.write(content))
    return index


def _united(parts: Sequence[LabelledImages]) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Every image with its label once, class after class: images (N, ...), labels (N,), and N' numbers a part."""
    images = np.concatenate([part.images for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    keys = np.array([f"{y:05d} {name}" for part in parts for y, name in zip(part.labels, part.hashes, strict=True)])
    _, first, numbers = np.unique(keys, return_index=True, return_inverse=True)
    borders = np.cumsum([len(part) for part in parts])[:-1]
    return images[first], labels[first], np.split(numbers, borders)


def _version(tail: LongTail, split: Split) -> Version:
    parts = (split.train, split.evaluate)
    return Version(tail, split.counts, *(Part(len(part), part.fingerprint) for part in parts))


def _encode(images: np.ndarray) -> bytes:
    """Lossless WebP of up to 64 images, row after row; black where there are fewer."""
    count, height, width = images.shape[:3]
    colours = images if images.ndim == 4 else np.repeat(images[..., None], 3, axis=3)
    full = np.zeros((_SHEET, height, width, 3), np.uint8)
    full[:count] = colours
    sheet = full.reshape(_ROW, _ROW, height, width, 3).transpose(0, 2, 1, 3, 4)
    file = io.BytesIO()
    Image.fromarray(sheet.reshape(_ROW * height, _ROW * width, 3)).save(file, "WEBP", lossless=True, method=4)
    return file.getvalue()


def _zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # without the time: the same images, the same bytes
    return file.getvalue()


# The index


@dataclass(frozen=True)
class Part:
    """Number of images, and their fingerprint."""

    images: int
    fingerprint: str


@dataclass(frozen=True)
class Version:
    """A long-tailed version in a pack: which, its images of each class, and its two parts."""

    long_tail: LongTail
    counts: tuple[int, ...]
    train: Part
    evaluate: Part


@dataclass(frozen=True)
class PackIndex:
    """What a pack says of itself.

    Args:
        dataset: As in the registry of data sets.
        shape: (H, W) or (H, W, 3).
        max_value: Brightest possible pixel.
        num_classes: C.
        class_names: C names, or none.
        mean, std: Of each channel, as the data set has them.
        images: N, all that are in it.
        sheets: Bytes of each sheet.
        versions: What it was made for.
    """

    dataset: str
    shape: tuple[int, ...]
    max_value: int
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    sheets: tuple[int, ...]
    versions: tuple[Version, ...]


def read_index(file: Path) -> PackIndex:
    """What a pack holds.

    Raises:
        TrainerError: the file is truncated, no pack, or of another version of this library.
    """
    with _opened(file) as pack:
        return pack.index


def _index_of(content: Any) -> PackIndex:
    """The index of its JSON; ValueError, TypeError or KeyError where it is something else."""
    values = dict(content)
    if values.pop("format") != _FORMAT:
        raise ValueError("of another format")
    versions = tuple(
        Version(
            LongTail(**version["long_tail"]),
            _whole(version["counts"]),
            *(Part(*_whole([version[part]["images"]]), str(version[part]["fingerprint"])) for part in _PARTS),
        )
        for version in values.pop("versions")
    )
    for name in ("shape", "sheets"):
        values[name] = _whole(values[name])
    for name in ("class_names", "mean", "std"):
        values[name] = tuple(values[name])
    index = PackIndex(**values, versions=versions)
    _whole([index.images, index.max_value, index.num_classes])
    shape = index.shape
    if len(shape) not in (2, 3) or shape[2:] not in ((), (3,)) or not all(0 < n <= _LARGEST_SIDE for n in shape):
        raise ValueError(f"images of shape {shape}")
    if len(index.sheets) != -(-index.images // _SHEET):
        raise ValueError(f"{len(index.sheets)} sheets for {index.images} images")
    return index


def _whole(values: Sequence[Any]) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError("a number of something is not a whole number")
    return tuple(values)


# Reading


def read_pack(file: Path, dataset: str, long_tail: LongTail) -> tuple[ImageDataset, Split]:
    """A version of a data set, as :func:`load_split` gives it.

    Raises:
        TrainerError: the file is truncated, changed, no pack or of another data set, or it lacks this version.
    """
    with _opened(file) as pack:
        index = pack.index
        if index.dataset != dataset:
            raise TrainerError(f"{file}: a pack of {index.dataset}, expected one of {dataset}")
        number = next((i for i, version in enumerate(index.versions) if version.long_tail == long_tail), None)
        if number is None:
            known = "; ".join(_words(version.long_tail) for version in index.versions)
            raise TrainerError(f"{file}: no version with {_words(long_tail)}; it has those with {known}")
        version = index.versions[number]
        train, evaluate = (pack.part(part, number, getattr(version, part)) for part in _PARTS)
    if tuple(train.class_sizes.tolist()) != version.counts:
        raise TrainerError(f"{file}: damaged, its training images are not as many a class as its index says")
    return ImageDataset(dataset, train, evaluate, index.mean, index.std), Split(train, evaluate, version.counts)


def _words(tail: LongTail) -> str:
    return ", ".join(f"{name} {value}" for name, value in vars(tail).items())


@contextmanager
def _opened(file: Path) -> Iterator[_Pack]:
    try:
        if file.stat().st_size > LARGEST:
            raise TrainerError(f"{file}: larger than any pack, {LARGEST / 2**20:.0f} MiB")
        archive = zipfile.ZipFile(file)
    except (OSError, zipfile.BadZipFile) as error:
        raise TrainerError(f"{file}: truncated or no pack ({error})") from error
    with archive:
        yield _Pack(file, archive)


class _Pack:
    """A pack that is being read; whatever fails names the file."""

    def __init__(self, file: Path, archive: zipfile.ZipFile) -> None:
        self._file, self._archive = file, archive
        content = self._read("index.json")
        try:
            self.index = _index_of(json.loads(content))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise TrainerError(f"{file}: an index that cannot be read ({error})") from error

    def part(self, name: str, number: int, part: Part) -> LabelledImages:
        """The training or evaluation images of a version."""
        index = self.index
        rows = self._numbers(f"{name}-{number}", _NUMBERS, part.images)
        labels = self._numbers("labels", _LABELS, index.images)
        if part.images == 0 or rows.max() >= index.images or labels.max() >= index.num_classes:
            raise TrainerError(f"{self._file}: damaged, a number or a label in {name}-{number} is out of range")
        images = LabelledImages(
            source=str(self._file),
            images=self._images(rows),
            labels=labels[rows],
            num_classes=index.num_classes,
            max_value=index.max_value,
            class_names=index.class_names,
        )
        if images.fingerprint != part.fingerprint:
            raise TrainerError(f"{self._file}: damaged, the images of {name}-{number} are not those it was made of")
        return images

    def _images(self, rows: np.ndarray) -> np.ndarray:
        """The images of these numbers, from the sheets that hold them."""
        content, sizes = self._read("sheets"), self.index.sheets
        if len(content) != sum(sizes):
            raise TrainerError(f"{self._file}: damaged, {len(content)} bytes of images, expected {sum(sizes)}")
        ends = np.cumsum(sizes)
        wanted, sheet = np.unique(rows // _SHEET, return_inverse=True)
        decoded = np.stack([self._decode(content[ends[i] - sizes[i] : ends[i]]) for i in wanted])
        return decoded[sheet, rows % _SHEET]

    def _decode(self, content: bytes) -> np.ndarray:
        """The 64 images of a sheet."""
        height, width, *channels = self.index.shape
        try:
            sheet = Image.open(io.BytesIO(content), formats=["WEBP"])
            if sheet.size != (_ROW * width, _ROW * height) or sheet.mode != "RGB":  # before any pixel is decoded
                raise ValueError(f"a sheet of {sheet.size} in {sheet.mode}")
            pixels = np.asarray(sheet).reshape(_ROW, height, _ROW, width, 3)
        except (OSError, ValueError, SyntaxError) as error:
            raise TrainerError(f"{self._file}: damaged, {error}") from error
        images = pixels.transpose(0, 2, 1, 3, 4).reshape(_SHEET, height, width, 3)
        return images if channels else images[..., 0]

    def _numbers(self, name: str, kind: np.dtype[Any], count: int) -> np.ndarray:
        content = self._read(name)
        if len(content) != count * kind.itemsize:
            raise TrainerError(f"{self._file}: damaged, {len(content)} bytes of {name} for {count} images")
        return np.frombuffer(content, kind).astype(np.int64)

    def _read(self, name: str) -> bytes:
        try:
            member = self._archive.getinfo(name)
            # What is stored uncompressed cannot be larger than the file.
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > LARGEST:
                raise TrainerError(f"{self._file}: {name} is compressed, which packs are not")
            return self._archive.read(member)
        except KeyError as error:
            raise TrainerError(f"{self._file}: no pack, nothing called {name} in it") from error
        except (OSError, zipfile.BadZipFile, EOFError, RuntimeError) as error:
            raise TrainerError(f"{self._file}: damaged, {name} cannot be read ({error})") from error
