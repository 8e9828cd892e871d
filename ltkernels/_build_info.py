"""What the extension was built against, checked before it is loaded."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_C.so")
_DESCRIPTION = Path(__file__).with_name("_build.json")


def description() -> dict:
    """Torch version and instruction sets of the built extension. Raises ImportError where there is none."""
    missing = [str(file) for file in (LIBRARY, _DESCRIPTION) if not file.exists()]
    if missing:
        raise ImportError(
            f"ltkernels: the compiled extension is missing ({', '.join(missing)}). Build it with "
            "`pip install --no-build-isolation .` or, in a source tree, `python setup.py build_ext --inplace`."
        )
    return json.loads(_DESCRIPTION.read_text())


def check_versions() -> None:
    """Raises ImportError if torch or Python is not the one built against: C++ extensions fit one version of each."""
    built = description()
    for name, wanted, found in (
        ("torch", built["torch"], torch.__version__),
        ("Python", built["python"], python_version()),
    ):
        if _release(wanted) != _release(found):
            raise ImportError(
                f"ltkernels was built against {name} {wanted}, but this is {name} {found}. Rebuild it with "
                "`pip install --no-build-isolation --force-reinstall --no-deps .` in its source tree (or, to use it "
                f"there: `make build PYTHON={sys.executable}`), or use the {name} it was built against."
            )


def python_version() -> str:
    """What extensions have to agree on: the minor version."""
    return ".".join(platform.python_version_tuple()[:2])


def _release(version: str) -> str:
    return version.split("+")[0]
