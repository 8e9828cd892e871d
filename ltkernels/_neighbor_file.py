"""Files of neighbour maps: NumPy's .npz, without pickles."""

from __future__ import annotations

import io
import os
import secrets
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

FORMAT, VERSION = "ltkernels.NeighborMap", 1
Map = TypeVar("Map")


def write(path: str | os.PathLike[str], num_classes: int, num_auxiliary: int, pairs: np.ndarray) -> None:
    """Atomically: into a new file next to ``path``, which then takes its place."""
    path = Path(os.path.realpath(path))  # a link stays one
    new = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    sizes = {"num_classes": np.int64(num_classes), "num_auxiliary": np.int64(num_auxiliary)}
    try:
        with open(new, "xb") as stream:
            np.savez(stream, format=FORMAT, version=np.int64(VERSION), pairs=pairs.astype(np.int32), **sizes)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def read(path: str | os.PathLike[str], build: Callable[[dict[str, int], np.ndarray], Map]) -> Map:
    """``build({"num_classes": C, "num_auxiliary": A}, pairs)`` of the file."""
    content = Path(path).read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if (damaged := archive.testzip()) is not None:  # numpy does not read to where checksums are compared
                raise ValueError(f"{damaged} has a wrong checksum")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            if str(arrays["format"]) != FORMAT or int(arrays["version"]) != VERSION:
                raise ValueError(f"format {arrays['format']}, version {arrays['version']}")
            sizes = {name: int(arrays[name]) for name in ("num_classes", "num_auxiliary")}
            return build(sizes, arrays["pairs"])
    except Exception as error:  # a damaged archive fails in many ways
        raise ValueError(
            f"path: expected a whole file of NeighborMap.save, version {VERSION}, got {os.fspath(path)!r}: {error}"
        ) from error
