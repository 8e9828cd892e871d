"""``ltkernels data``: which data sets are there, how to get the others, and what their long tails look like."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ltkernels.trainer import TrainerError
from ltkernels.trainer.data.datasets import DATASETS, LongTail, data_root_of, load_dataset, long_tailed_split
from ltkernels.trainer.data.images import ImageDataset, LabelledImages, MissingDataError
from ltkernels.trainer.data.longtail import Profile, Split
from ltkernels.trainer.data.pack import pack_file, read_index
from ltkernels.trainer.metrics import FEW_BELOW, MANY_ABOVE, shot_group
from ltkernels.trainer.runfolder import RunFolder

ALL = "all"
FINGERPRINT_SHOWN = 12
# Told apart by colour-blind readers.
GROUPS = (
    ("many", f"many (> {MANY_ABOVE})", "#0072b2"),
    ("medium", f"medium ({FEW_BELOW}..{MANY_ABOVE})", "#e69f00"),
    ("few", f"few (< {FEW_BELOW})", "#d55e00"),
)


@dataclass(frozen=True)
class DataOptions:
    """List the data sets that are there and draw how many images the classes of their long-tailed versions have."""

    data_root: Path | None = None
    """Folder with the data sets; default: the one that LTKERNELS_DATA names, else data."""
    dataset: str = ALL
    """One of them by its name, or all."""
    imbalance_factor: float = 100.0
    """Images of the largest class over those of the smallest."""
    profile: Profile = "exp"
    """How the classes get smaller: exponentially, or in one step in the middle."""
    out: Path | None = None
    """Folder for the pictures, which must not exist yet; default: runs/data with the time."""
    download: bool = False
    """Let torchvision fetch the data set if it is missing; give its name by dataset."""

    def __post_init__(self) -> None:
        if self.dataset not in (ALL, *DATASETS):
            raise TrainerError(f"dataset: expected one of {', '.join((*DATASETS, ALL))}; got {self.dataset!r}")
        if self.download and self.dataset == ALL:
            raise TrainerError("download: which data set? name it by --dataset")


def run_data(options: DataOptions, console: Console) -> int:
    """List the data sets and draw their histograms. Returns the exit status: 2 if a data set cannot be read.

    Raises:
        TrainerError: the one data set that was asked for is missing or cannot be read, or the folder for the pictures
            cannot be made.
    """
    found: list[ImageDataset] = []
    missing: dict[str, TrainerError] = {}
    broken: dict[str, TrainerError] = {}
    for name in DATASETS if options.dataset == ALL else (options.dataset,):
        try:
            found.append(load_dataset(name, options.data_root, download=options.download))
        except TrainerError as error:
            if options.dataset != ALL:
                raise
            (missing if isinstance(error, MissingDataError) else broken)[name] = error

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    say(f"data root: {data_root_of(options.data_root)}")
    if found:
        console.print(_table(found))
        _draw_all(found, options, say)
    for name in DATASETS if options.dataset == ALL else (options.dataset,):
        _tell_of_pack(pack_file(data_root_of(options.data_root), name), say)
    for kind, errors in (("missing", missing), ("cannot be read", broken)):
        for name, error in errors.items():
            say(f"{name}, {kind}: {error}")
    return 2 if broken else 0


def _table(found: list[ImageDataset]) -> Table:
    """One row for the training and one for the test images of each data set."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("data set", "part", "images", "classes", "a class", "shape", "sha256"):
        table.add_column(heading, justify="right" if heading in ("images", "classes", "a class") else "left")
    for dataset in found:
        for part, images in (("train", dataset.train), ("test", dataset.test)):
            table.add_row(
                dataset.name,
                part,
                str(len(images)),
                str(images.num_classes),
                _range_of(images),
                " x ".join(map(str, images.images.shape[1:])),
                images.fingerprint[:FINGERPRINT_SHOWN],
            )
    return table


def _tell_of_pack(file: Path, say: Callable[[str], None]) -> None:
    """A line on a pack, if it is there."""
    if not file.is_file():
        return
    try:
        index = read_index(file)
    except TrainerError as error:
        say(f"pack, cannot be read: {error}")
        return
    say(f"{file}: a pack, {index.images} images of {index.dataset} for these long-tailed versions:")
    for version in index.versions:
        fields = ", ".join(f"{name} {value}" for name, value in vars(version.long_tail).items())
        fingerprint = version.train.fingerprint[:FINGERPRINT_SHOWN]
        say(f"  {fields}: {version.train.images} training images, sha256 {fingerprint}")


def _range_of(images: LabelledImages) -> str:
    smallest, largest = images.class_sizes.min(), images.class_sizes.max()
    return str(largest) if smallest == largest else f"{smallest}..{largest}"


def _draw_all(found: list[ImageDataset], options: DataOptions, say: Callable[[str], None]) -> None:
    folder: RunFolder | None = None
    tail = LongTail(options.imbalance_factor, options.profile)
    for dataset in found:
        title = f"{dataset.name}, {options.profile} profile, imbalance factor {options.imbalance_factor:g}"
        say(f"{dataset.name}: from {dataset.train.source}")
        try:
            split = long_tailed_split(dataset, tail)
        except TrainerError as error:
            say(f"{title}: no picture, {error}")
            continue
        folder = folder or RunFolder.create(options.out, "data")
        name = f"{dataset.name}-{options.profile}-{options.imbalance_factor:g}.png"
        folder.write(name, class_histogram(dataset, split, title))
        say(
            f"{title}: {len(split.train)} training images ({_range_of(split.train)} a class), subset 0 has sha256 "
            f"{split.train.fingerprint[:FINGERPRINT_SHOWN]}; {folder.path / name}"
        )


def class_histogram(dataset: ImageDataset, split: Split, title: str) -> bytes:
    """PNG: training images of each class, all of them (grey) and the long-tailed ones, in the colour of their group."""
    figure = Figure(figsize=(9, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    classes, counts = np.arange(len(split.counts)), np.array(split.counts)
    axes.bar(classes, dataset.train.class_sizes, width=1.0, color="0.88", label="all training images")
    groups = np.array([shot_group(count) for count in split.counts])
    for group, label, colour in GROUPS:
        members = groups == group
        if members.any():
            label = f"{label}: {members.sum()} classes"
            axes.bar(classes[members], counts[members], width=0.9, color=colour, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(bottom=0.8)  # one image is a bar, too
    axes.set_xlim(-0.6, len(classes) - 0.4)
    if dataset.train.class_names and len(classes) <= 20:
        axes.set_xticks(classes, dataset.train.class_names, rotation=30, ha="right")
    else:
        axes.set_xlabel("class")
    axes.set_ylabel("training images (log scale)")
    axes.set_title(f"{title}: {counts.sum():,} of {len(dataset.train):,} training images", loc="left")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, columnspacing=1.2, handlelength=1.2)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
