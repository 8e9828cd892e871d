"""What the extension was built against, checked before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_C.so")
_DESCRIPTION = Path(__file__).with_name("_build.json")


def description() -> dict:
    """Torch version and instruction sets of the built extension. Raises ImportError where there is none."""
    if not LIBRARY.exists() or not _DESCRIPTION.exists():
        raise ImportError(
            f"ltkernels: the compiled extension is missing ({LIBRARY}). Build it with "
            "`pip install --no-build-isolation .` or, in a source tree, `python setup.py build_ext --inplace`."
        )
    return json.loads(_DESCRIPTION.read_text())


def check_torch_version() -> None:
    """Raises ImportError if torch is not the one built against: C++ extensions are not compatible across versions."""
    built = description()["torch"]
    if _release(built) != _release(torch.__version__):
        raise ImportError(
            f"ltkernels was built against torch {built}, but torch {torch.__version__} is installed. Rebuild it with "
            "`pip install --no-build-isolation --force-reinstall --no-deps ltkernels` (or `make build` in a source "
            "tree), or install the torch it was built against."
        )


def _release(version: str) -> str:
    return version.split("+")[0]
