"""Optical recognition of handwritten digits (UCI, Alpaydin and Kaynak 1998): 1797 images of 8 x 8 pixels, 0..16.

The default source is scikit-learn's copy, which comes with the package; a folder may hold the images instead.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ltkernels.trainer import TrainerError
from ltkernels.trainer.data.images import LabelledImages

NUM_CLASSES = 10
MAX_VALUE = 16
SIDE = 8
# The archive's test file is the set that scikit-learn ships.
FILE_NAMES = ("digits.csv", "optdigits.tes")

HOW_TO_GET_IT = (
    "Fetch https://archive.ics.uci.edu/static/public/80/optical+recognition+of+handwritten+digits.zip, unpack it, and "
    "put optdigits.tes into {root}. Or put your own images there as digits.csv: one image a line, 64 integers 0..16 "
    "and its label 0..9, separated by commas. Without a data root the copy that comes with scikit-learn is used."
)


def load(root: Path | None = None) -> LabelledImages:
    """The images of ``root/digits.csv`` or ``root/optdigits.tes``, or scikit-learn's copy; no image twice.

    Raises:
        TrainerError: the folder, the file or scikit-learn is missing, or the file is not of the format.
    """
    if root is None:
        return _from_scikit_learn().without_duplicates()
    file = find(root)
    if file is None:
        missing = f"neither {' nor '.join(FILE_NAMES)} in it" if root.is_dir() else "no such folder"
        raise TrainerError(f"data root {root}: {missing}. {HOW_TO_GET_IT.format(root=root)}")
    return _from_file(file).without_duplicates()


def find(root: Path) -> Path | None:
    """The file with the images in ``root``, if there is one."""
    return next((root / name for name in FILE_NAMES if (root / name).is_file()), None)


def _from_scikit_learn() -> LabelledImages:
    try:
        import sklearn
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise TrainerError(
            "the digits data comes with scikit-learn, which is not installed: pip install 'ltkernels[trainer]', or "
            "give a folder with the images by --data-root"
        ) from error
    digits = load_digits()
    return LabelledImages(
        source=f"scikit-learn {sklearn.__version__}",
        images=digits.images.astype(np.uint8),
        labels=digits.target.astype(np.int64),
        num_classes=NUM_CLASSES,
        max_value=MAX_VALUE,
    )


def _from_file(file: Path) -> LabelledImages:
    columns = SIDE * SIDE + 1
    try:
        rows = np.loadtxt(file, delimiter=",", dtype=np.int64, ndmin=2)
    except (ValueError, OSError) as error:
        raise TrainerError(f"{file}: cannot be read as integers separated by commas ({error})") from error
    if rows.shape[1] != columns or len(rows) == 0:
        raise TrainerError(f"{file}: expected lines of {columns} integers (64 pixels, label), got shape {rows.shape}")
    pixels, labels = rows[:, :-1], rows[:, -1]
    for name, values, largest in (("pixels", pixels, MAX_VALUE), ("labels", labels, NUM_CLASSES - 1)):
        if values.min() < 0 or values.max() > largest:
            raise TrainerError(f"{file}: expected {name} in 0..{largest}, got {values.min()}..{values.max()}")
    return LabelledImages(
        source=str(file),
        images=pixels.reshape(-1, SIDE, SIDE).astype(np.uint8),
        labels=labels,
        num_classes=NUM_CLASSES,
        max_value=MAX_VALUE,
    )
