"""What a run says of the code it is of."""

import subprocess

import pytest

pytest.importorskip("lightning_fabric")
from ltkernels.trainer.runfolder import revision  # noqa: E402


def git(folder, *arguments):
    identity = ["-c", "user.name=Someone", "-c", "user.email=someone@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def source(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("one = 1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-q", "-m", "one")
    return tmp_path


def test_the_revision_is_the_commit_and_says_that_files_differ(source):
    commit = git(source, "rev-parse", "HEAD")
    git(source, "tag", "v1")  # a name that may move says less
    assert revision(source) == commit[:12]
    (source / "notes.txt").write_text("no part of the code\n")
    assert revision(source) == commit[:12]
    (source / "code.py").write_text("one = 2\n")
    assert revision(source) == f"{commit[:12]}-dirty"


def test_no_revision_outside_of_git(tmp_path, source, monkeypatch):
    assert revision(source / "package") is None
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert revision(source) is None
