"""The folder of a run: made once, never overwritten, every file complete whenever someone looks."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from ltkernels.trainer import TrainerError
from ltkernels.trainer.checkpoint import write_atomically

RUNS = Path("runs")
SOURCE = Path(__file__).resolve().parents[2]
_PACKAGES = ("ltkernels", "torch", "lightning-fabric", "torchmetrics", "scikit-learn", "numpy")


class RunFolder:
    """A new folder; its files are written beside their place and renamed into it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, out: Path | None, name: str) -> RunFolder:
        """``out`` itself, or ``runs/NAME-YYYYmmdd-HHMMSS`` with a number behind it where that exists.

        Raises:
            TrainerError: ``out`` exists, or a folder cannot be made there.
        """
        stamp = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
        path, number = out or RUNS / stamp, 1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                try:
                    path.mkdir()
                    return cls(path)
                except FileExistsError as error:
                    if out is not None:
                        message = f"{out} exists: a run folder is never overwritten, give another --out"
                        raise TrainerError(message) from error
                    number += 1
                    path = RUNS / f"{stamp}-{number}"
        except OSError as error:
            raise TrainerError(f"cannot make the run folder {path}: {error.strerror}") from error

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file of the folder; a reader sees the old content or the new, never a part.

        Raises:
            TrainerError: it cannot be written; the file is as it was.
        """
        data = content.encode() if isinstance(content, str) else content
        write_atomically(self.path / name, lambda file: file.write(data))

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        self.write(name, json.dumps(content, indent=2) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """The fields that a file of a run holds.

    Raises:
        TrainerError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise TrainerError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise TrainerError(f"{file}: damaged, {error}") from error
    if not isinstance(content, dict):
        raise TrainerError(f"{file}: expected fields, got {type(content).__name__}")
    return content


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, as far as a reader needs them to judge times and repeat a run."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "revision": revision(SOURCE),
    }


def revision(source: Path) -> str | None:
    """The commit that a source tree is of, with ``-dirty`` where files of it were changed; None outside of git."""
    if not (source / ".git").exists():
        return None
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def describe(environment: dict[str, Any]) -> str:
    """The hardware in one line."""
    device = "" if environment["device"] == "cpu" else f"{environment['device']}, "
    return f"{device}{environment['cpu']}, {environment['cores']} cores, {environment['threads']} threads"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
