"""Checkpoints that survive a kill at any moment: a file is complete or it is not used.

A checkpoint is written beside its place, forced to the disk, renamed into it, and the folder is forced to the disk as
well; only then an older one goes. The last two are kept, so that one that got damaged is not the end of the run.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ltkernels.trainer import TrainerError

KEPT = 2
_NAME = re.compile(r"checkpoint-(\d{8})\.pt")


class DamagedCheckpointError(TrainerError):
    """A checkpoint is truncated, changed, or no checkpoint at all."""


class CheckpointFolder:
    """The checkpoints of one run, ``checkpoint-STEP.pt`` in its folder.

    Not made for two writers: a run has one process that saves.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def files(self) -> list[Path]:
        """Complete checkpoints, the newest first."""
        if not self.path.is_dir():
            return []
        return sorted((file for file in self.path.iterdir() if _NAME.fullmatch(file.name)), reverse=True)

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the state after ``step`` steps and remove all but the last two checkpoints up to there.

        Later ones go too: :meth:`load` has refused them, or the run would have gone on from there.

        Raises:
            TrainerError: the folder cannot be written to; what was there before is still there.
        """
        target = self.path / f"checkpoint-{step:08d}.pt"
        write_atomically(target, lambda file: torch.save(state, file))
        files = self.files()
        newest = files.index(target)
        for other in files[:newest] + files[newest + KEPT :]:
            other.unlink(missing_ok=True)
        return target

    def load(self) -> dict[str, Any] | None:
        """The newest state that can be read, on the CPU; None where there is no checkpoint.

        A damaged file is refused with a warning that names it, and the one before is used.

        Raises:
            DamagedCheckpointError: there are checkpoints, and none of them can be read.
        """
        self._remove_unfinished()
        files = self.files()
        reasons = []
        for file in files:
            try:
                state = read(file)
            except DamagedCheckpointError as error:
                reasons.append(str(error))
                continue
            for reason in reasons:
                warnings.warn(f"{reason}; going on from {file.name}", stacklevel=2)
            return state
        if files:
            raise DamagedCheckpointError(f"no checkpoint in {self.path} can be read: {'; '.join(reasons)}")
        return None

    def _remove_unfinished(self) -> None:
        for file in self.path.glob(".checkpoint-*.tmp"):
            file.unlink(missing_ok=True)


def read(file: Path) -> dict[str, Any]:
    """The state in a file, on the CPU; nothing but tensors and plain values is unpickled.

    Raises:
        DamagedCheckpointError: the file is truncated, its content is not what was written, or it is something else.
    """
    try:
        # torch.load does not compare checksums.
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise DamagedCheckpointError(f"{file} is damaged (checksum of {damaged})")
        state = torch.load(file, map_location="cpu", weights_only=True)
    except DamagedCheckpointError:
        raise
    except Exception as error:  # damage shows as almost any exception
        raise DamagedCheckpointError(f"{file} is truncated or no checkpoint ({_first_line(error)})") from error
    if not isinstance(state, dict):
        raise DamagedCheckpointError(f"{file} is no checkpoint: it holds a {type(state).__name__}")
    return state


def write_atomically(target: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Let ``write`` fill a file that takes the place of ``target`` once it is on the disk.

    Raises:
        TrainerError: it cannot be written; ``target`` is as it was.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):  # a folder that cannot be written to
            temporary.unlink(missing_ok=True)
        raise TrainerError(f"cannot write {target}: {_first_line(error)}") from error


def export_weights(folder: Path, state: dict[str, Tensor]) -> Path:
    """Write ``weights.safetensors``, or ``weights.pt`` for ``torch.load(weights_only=True)`` without safetensors."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    try:
        from safetensors.torch import save
    except ImportError:
        target = folder / "weights.pt"
        write_atomically(target, lambda file: torch.save(tensors, file))
    else:
        target = folder / "weights.safetensors"
        write_atomically(target, lambda file: file.write(save(tensors)))
    return target


def read_weights(folder: Path) -> dict[str, Tensor]:
    """What :func:`export_weights` wrote.

    Raises:
        TrainerError: the folder has no weights, or they need safetensors, which is not installed.
        DamagedCheckpointError: they cannot be read.
    """
    if (folder / "weights.pt").is_file():
        return read(folder / "weights.pt")
    file = folder / "weights.safetensors"
    if not file.is_file():
        raise TrainerError(f"{folder}: no weights.safetensors or weights.pt in it: did the run finish?")
    try:
        from safetensors.torch import load
    except ImportError as error:
        raise TrainerError(f"{file}: needs safetensors, pip install safetensors") from error
    try:
        return load(file.read_bytes())
    except Exception as error:  # safetensors has errors of its own kind
        raise DamagedCheckpointError(f"{file} is truncated or no weights ({_first_line(error)})") from error


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # elsewhere folders cannot be opened
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
