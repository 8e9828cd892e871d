"""Locks between processes that end with the process that holds them, however it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ltkernels.trainer import TrainerError

LOCK_FILE = ".lock"
"""In a run folder."""
LOCKED_RUN = "LTKERNELS_LOCKED_RUN"
"""Environment variable: the run folder that the process which started this one has locked for it."""


def try_lock(file: Path) -> int | None:
    """The descriptor of a lock, or None while another process holds it.

    The lock is held until its holder and all processes that inherited the descriptor have closed it or ended.

    Args:
        file: Made where it is not there; its folder must exist.

    Raises:
        TrainerError: the file cannot be made, or this system has no such locks.
    """
    return _lock(file, os.O_RDWR | os.O_CREAT, wait=False)


@contextmanager
def folder_locked(folder: Path) -> Iterator[None]:
    """Wait until no other process is in here with the same folder.

    Raises:
        TrainerError: there is no such folder, or this system has no such locks.
    """
    descriptor = _lock(folder, os.O_RDONLY, wait=True)
    assert descriptor is not None
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def run_locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a run folder; yields False where another process holds it.

    A process that a queue has started works under the queue's lock. Where there are no locks nobody is kept out.
    """
    if os.environ.get(LOCKED_RUN) == str(folder.resolve()):
        yield True
        return
    try:
        descriptor = try_lock(folder / LOCK_FILE)
    except TrainerError:  # a system or a file system without locks, or a folder that cannot be written to
        yield True
        return
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(path: Path, flags: int, wait: bool) -> int | None:
    try:
        import fcntl
    except ImportError as error:
        raise TrainerError("locks between processes need a POSIX system") from error
    try:
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        raise TrainerError(f"cannot open {path}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        raise TrainerError(f"cannot lock {path}: {error.strerror}") from error
    return descriptor
