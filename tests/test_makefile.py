"""What `make` would run: which torch is installed, and when."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEFAULT, OTHER = "torch==2.13.0", "torch==2.11.0"

pytestmark = pytest.mark.skipif(
    shutil.which("make") is None or not (ROOT / "Makefile").exists(), reason="needs make and the Makefile"
)


def commands(venv: Path, *arguments: str) -> str:
    outer = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL", "TORCH", "VENV")  # of a `make` that runs the tests
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    command = ["make", "--dry-run", f"VENV={venv}", *arguments, "setup"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def installed(venv: Path, stamp: str, python: str = f'exec "{sys.executable}" "$@"') -> Path:
    """A virtual environment as `make setup` leaves it, with what it notes down about torch."""
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text(f"#!/bin/sh\n{python}\n")
    (venv / "bin" / "python").chmod(0o755)
    (venv / ".torch").write_text(stamp)
    (venv / ".ready").touch()
    return venv


@pytest.mark.parametrize("arguments, torch", [((), DEFAULT), ((f"TORCH={OTHER}",), OTHER)], ids=["default", "other"])
def test_a_bare_clone_installs_torch_first(tmp_path: Path, arguments: tuple[str, ...], torch: str) -> None:
    run = commands(tmp_path / "venv", *arguments)
    assert f'pip install --quiet "{torch}"' in run and f'echo "{torch}" >' in run
    assert run.index(torch) < run.index('"numpy<2.4"') < run.index("--editable")


@pytest.mark.parametrize("stamp", ["", f"{DEFAULT}\n", f"{OTHER}\n"], ids=["touched", "default", "other"])
def test_a_second_call_reuses_what_is_there(tmp_path: Path, stamp: str) -> None:
    assert "pip install" not in commands(installed(tmp_path / "venv", stamp))


@pytest.mark.parametrize("answer", ["echo False", "exit 1"], ids=["of_another_torch", "missing"])
def test_an_extension_that_is_not_of_this_torch_is_built_again(tmp_path: Path, answer: str) -> None:
    run = commands(installed(tmp_path / "venv", f"{DEFAULT}\n", answer))
    assert "--editable" in run and DEFAULT not in run


@pytest.mark.parametrize("stamp", ["", f"{OTHER}\n"], ids=["touched", "the_same"])
def test_the_torch_that_is_there_is_kept(tmp_path: Path, stamp: str) -> None:
    run = commands(installed(tmp_path / "venv", stamp), f"TORCH={OTHER}")
    assert "pip install" not in run
    assert (f"TORCH={OTHER} is not installed" in run) == (stamp == "")


@pytest.mark.parametrize("torch", [OTHER, "torch>=2.12"])
def test_another_torch_replaces_it_and_the_extension_is_built_again(tmp_path: Path, torch: str) -> None:
    run = commands(installed(tmp_path / "venv", f"{DEFAULT}\n"), f"TORCH={torch}")
    assert f'pip install --quiet "{torch}"' in run
    assert run.index(torch) < run.index("rm -rf build ltkernels/_C.so") < run.index("--editable")
