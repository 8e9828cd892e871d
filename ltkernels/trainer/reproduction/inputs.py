"""What a page is made from, and what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ltkernels.trainer.image_recipes import TIERS, Tier
from ltkernels.trainer.reproduction.page import listed, read_notes, table_command
from ltkernels.trainer.reproduction.runs import Section, StoredRun, read, sections
from ltkernels.trainer.tables import TABLES


@dataclass(frozen=True, eq=False)
class Page:
    """A page and its pictures, by the names of their files."""

    text: str
    pictures: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Inputs:
    """Stored results and the folders of a report.

    Args:
        stored: Runs by the name of the table and the tier of the file.
        out: Folder of the pages; it may hold notes and pictures of an earlier report.
        runs: Folder with run folders, for pictures that need embeddings.
    """

    stored: Mapping[tuple[str, Tier], list[StoredRun]]
    out: Path
    runs: Path | None = None

    @classmethod
    def load(cls, results: Path, out: Path, runs: Path | None = None) -> Inputs:
        """Everything that is there of the tables this library knows.

        Raises:
            TrainerError: a file cannot be read, or is not one of results.
        """
        stored = {}
        for table in TABLES:
            for tier in TIERS:
                file = results / f"{table}-{tier}.json"
                if file.is_file() and (found := read(file, table, tier)):
                    stored[table, tier] = found
        return cls(stored, out, runs)

    def sections(self, table: str) -> list[Section]:
        """Of a table, the full tier first."""
        arms = [arm.label for arm in TABLES[table].arms]
        return [section for tier in TIERS for section in sections(table, self.stored.get((table, tier), []), arms)]

    def commands(self, tables: Sequence[str]) -> list[str]:
        """One for each file of results of these tables, which trains the runs that it holds."""
        return [
            table_command(table, tier, self.stored[table, tier])
            for table in tables
            for tier in TIERS
            if (table, tier) in self.stored
        ]

    def notes(self, page: str) -> str:
        return read_notes(self.out, page)


def without_runs(inputs: Inputs, tables: list[str]) -> list[str]:
    """A sentence on the tables and tiers that no run was stored of; none where all have one."""
    missing = {table: [tier for tier in TIERS if (table, tier) not in inputs.stored] for table in tables}
    named = [f"{TABLES[table].title} ({listed(tiers)} tier)" for table, tiers in missing.items() if tiers]
    return [f"Not run yet: {'; '.join(named)}."] if named else []


def arms_without_runs(section: Section) -> list[str]:
    """Labels of the arms of its table that the section has no run of, or not all that other arms have."""
    pairs = {run.pair for run in section.runs}
    missing = []
    for arm in TABLES[section.table].arms:
        own = {run.pair for run in section.runs if run["arm"] == arm.label}
        if len(own) < len(pairs):
            missing.append(f"{arm.label} ({len(own)} of {len(pairs)} runs)" if own else arm.label)
    return missing
