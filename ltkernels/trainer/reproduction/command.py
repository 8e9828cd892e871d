"""What ``ltkernels report`` does: the pages of docs/reproduction from the stored results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, get_args

import tyro
from rich.console import Console

from ltkernels.trainer import TrainerError
from ltkernels.trainer.reproduction import elm, supervised
from ltkernels.trainer.reproduction.inputs import Inputs, Page
from ltkernels.trainer.results import RESULTS
from ltkernels.trainer.runfolder import RunFolder

PageName: TypeAlias = Literal["supervised", "elm"]

PAGES: dict[PageName, Callable[[Inputs], Page]] = {supervised.NAME: supervised.page, elm.NAME: elm.page}


@dataclass(frozen=True)
class ReportOptions:
    """Write the pages of docs/reproduction from the stored results. The same results give the same files."""

    names: Annotated[tuple[PageName, ...], tyro.conf.Positional] = get_args(PageName)
    """Pages to write."""
    results: Path = RESULTS
    """Folder with the results of the tables, TABLE-TIER.json."""
    out: Path = RESULTS.parent
    """Folder of the pages; notes-PAGE.md in it, where it is there, becomes part of the box at the top of the page."""
    runs: Path | None = None
    """Folder with run folders: pictures of embeddings are drawn from those that are there, else earlier ones stay."""


def run_report(options: ReportOptions, console: Console) -> int:
    """Write the pages and their pictures; files that would not change are left alone. Returns the exit status, 0.

    Raises:
        TrainerError: there is no folder of results, a file in it is damaged, or a page cannot be written.
    """
    if options.runs is not None and not options.runs.is_dir():
        raise TrainerError(f"runs: no such folder: {options.runs}")
    if not options.results.is_dir():
        raise TrainerError(f"results: no such folder: {options.results} (run it in the root of the repository)")
    inputs = Inputs.load(options.results, options.out, options.runs)
    if not inputs.stored:
        console.print(f"no results in {options.results}: the pages say so", highlight=False, markup=False)
    for name in dict.fromkeys(options.names):
        page = PAGES[name](inputs)
        files = {f"{name}.md": page.text.encode(), **page.pictures}
        for file, content in files.items():
            state = "written" if _write(options.out, file, content) else "unchanged"
            console.print(f"{state}: {options.out / file}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _write(folder: Path, name: str, content: bytes) -> bool:
    """Whether the file had other content before."""
    file = folder / name
    try:
        if file.is_file() and file.read_bytes() == content:
            return False
        folder.mkdir(parents=True, exist_ok=True)
        RunFolder(folder).write(name, content)
    except OSError as error:
        raise TrainerError(f"cannot write {file}: {error.strerror}") from error
    return True
