"""The pages of docs/reproduction in the repository."""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric", reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")

import stored_results as stored  # noqa: E402
from rich.console import Console  # noqa: E402

from ltkernels.trainer.reproduction.command import ReportOptions, run_report  # noqa: E402


@pytest.mark.parametrize("name", ["supervised", "elm"])
def test_committed_pages_are_what_the_stored_results_give(name, tmp_path, monkeypatch):
    """Whoever changes the text of a page, or a reported number, runs ``ltkernels report``."""
    stored.without_pictures(monkeypatch)
    pages = Path(__file__).parents[2] / "docs" / "reproduction"
    shutil.copytree(pages, tmp_path / "pages")
    options = ReportOptions(names=(name,), results=pages / "results", out=tmp_path / "pages")
    assert run_report(options, Console(quiet=True)) == 0
    assert (tmp_path / "pages" / f"{name}.md").read_text() == (pages / f"{name}.md").read_text()
