"""``ltkernels pack``: the images that tables need, one file a data set, for machines that have no network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from ltkernels.trainer import TrainerError
from ltkernels.trainer.data.datasets import LongTail, load_dataset
from ltkernels.trainer.data.pack import pack_file, write_pack
from ltkernels.trainer.tables import table_named

PACKED_TABLES = (
    "supervised-cifar100",
    "supervised-cifar100-subsets",
    "supervised-cifar10",
    "supervised-cifar10-subsets",
    "elm-tuning-cifar100",
    "elm-cifar100",
)


@dataclass(frozen=True)
class PackOptions:
    """Pack the images that tables need, in one file a data set; --data-root FOLDER of another machine finds it."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = PACKED_TABLES
    """Tables."""
    out: Path = Path("packs")
    """Folder for the packs; one of the same data set is replaced."""
    data_root: Path | None = None
    """Folder with the data sets; default: the one that LTKERNELS_DATA names, else data."""

    def __post_init__(self) -> None:
        if not self.names:
            raise TrainerError("names: expected one table or more, got none")


def run_pack(options: PackOptions, console: Console) -> int:
    """Write a pack for each data set of the tables. Returns the exit status, 0.

    Raises:
        TrainerError: an unknown table, a data set that is missing, or a pack that would be too large.
    """
    for dataset, tails in needed(options.names).items():
        file = pack_file(options.out, dataset)
        index = write_pack(file, load_dataset(dataset, options.data_root), tails)
        size = file.stat().st_size
        console.print(
            f"{file}: {index.images} images for {len(tails)} long-tailed version{'s' * (len(tails) > 1)}, "
            f"{size / 2**20:.1f} MiB, {size / index.images:.0f} bytes an image",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    return 0


def needed(names: tuple[str, ...]) -> dict[str, list[LongTail]]:
    """The long-tailed versions that tables need, by data set: in every tier the same.

    Raises:
        TrainerError: an unknown table.
    """
    found: dict[str, list[LongTail]] = {}
    for name in names:
        for planned in table_named(name).runs("full"):
            tails = found.setdefault(planned.recipe.dataset, [])
            if planned.recipe.long_tail not in tails:
                tails.append(planned.recipe.long_tail)
    return found
