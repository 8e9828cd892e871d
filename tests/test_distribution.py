"""The source archive and a wheel built from it, as a user gets them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROGRAM = """
import sys, torch
import ltkernels, ltkernels.functional as LF, ltkernels.nn, ltkernels.margins
from ltkernels import _ops

assert ltkernels.__file__.startswith(sys.argv[1]), ltkernels.__file__
logits, target = torch.randn(8, 5, requires_grad=True), torch.arange(8) % 5
loss = LF.margin_cross_entropy(logits, target)
loss.backward()
torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target))
assert logits.grad.isfinite().all() and sum(_ops.kernel_calls().values()) == 1
"""


def run(command: Sequence[object], cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(x) for x in command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git clone")
    return [name for name in run(["git", "ls-files"], ROOT).splitlines() if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def sdist(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made of what is tracked, so that nothing else that lies about gets in or helps."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run([sys.executable, "-c", build, out], source)
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.mark.slow
def test_the_source_archive_holds_every_tracked_file(sdist: Path, tracked: list[str]) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert set(tracked) <= names
    made = {name for name in names - set(tracked) if ".egg-info/" not in name}
    assert made == {"PKG-INFO", "setup.cfg"}
    assert sdist.stat().st_size < 4 << 20


@pytest.mark.distribution
def test_a_wheel_of_the_source_archive_works(sdist: Path, tracked: list[str], tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet"]
    out, target, empty = tmp_path / "wheel", tmp_path / "target", tmp_path / "empty"
    empty.mkdir()
    run([*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", out, sdist], empty)
    (wheel,) = out.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {name for name in tracked if name.startswith("ltkernels/")}
    assert names == package | {"ltkernels/_C.so", "ltkernels/_build.json"}

    run([*pip, "install", "--no-deps", "--target", target, wheel], empty)
    run([sys.executable, "-c", PROGRAM, target], empty, PYTHONPATH=str(target))
    run([target / "bin" / "ltkernels", "doctor"], empty, PYTHONPATH=str(target))

    # The archive's own tests, on the installed wheel: -P keeps the source beside them off the path.
    shutil.unpack_archive(sdist, tmp_path)
    (unpacked,) = tmp_path.glob("ltkernels-*")
    tests = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_errors.py"]
    assert " passed" in run(tests, unpacked, PYTHONPATH=str(target))
