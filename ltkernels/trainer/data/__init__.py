"""Data sets, and how a recipe splits them.

``datasets`` is the registry of the data sets that have a test set of their own: a new one is one module here and one
entry there. The digits have none; ``load`` and ``split`` are theirs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ltkernels.trainer import TrainerError
from ltkernels.trainer.data import digits
from ltkernels.trainer.data.datasets import DATA_ROOT_VARIABLE
from ltkernels.trainer.data.images import LabelledImages
from ltkernels.trainer.data.longtail import Split, class_counts, hold_out, long_tailed

if TYPE_CHECKING:
    from ltkernels.trainer.recipes import Recipe

__all__ = ["LabelledImages", "Split", "load", "split"]

# Which images are test images is part of the task, not of a run.
_TEST_SEED = 0


def load(dataset: str, data_root: Path | None = None) -> LabelledImages:
    """The images of a data set, from ``data_root``, else from the folder that ``LTKERNELS_DATA`` names.

    The variable is shared by all data sets, so digits that are not in its folder come from scikit-learn; a folder that
    does not exist is an error.

    Raises:
        TrainerError: the data is missing (the message says what to fetch and where to put it) or unreadable.
    """
    if dataset != "digits":
        raise TrainerError(f"dataset: expected 'digits', got {dataset!r}")
    if data_root is None and os.environ.get(DATA_ROOT_VARIABLE):
        shared = Path(os.environ[DATA_ROOT_VARIABLE])
        if not shared.is_dir():
            raise TrainerError(
                f"{DATA_ROOT_VARIABLE} names {shared}, which is no folder: create it or unset the variable. "
                + digits.HOW_TO_GET_IT.format(root=shared)
            )
        data_root = shared if digits.find(shared) else None
    return digits.load(data_root)


def split(recipe: Recipe, data: LabelledImages, seed: int, *, tuning: bool = False) -> Split:
    """The long-tailed subset ``seed`` of the images that are not test images, and what it is evaluated on.

    The balanced test set is the same for every seed. A long-tailed set has no images to spare, so for tuning it is
    rebuilt smaller: a balanced validation set is held out of the training images, and test images are not touched.

    Raises:
        TrainerError: the data set has too few images for the sizes of the recipe.
    """
    test, pool = hold_out(data, recipe.test_per_class, _TEST_SEED)
    evaluate, largest = test, recipe.max_count
    if tuning:
        evaluate, pool = hold_out(pool, recipe.validation_per_class, seed)
        largest = recipe.tuning_max_count
    counts = class_counts(data.num_classes, largest, recipe.imbalance_factor, recipe.profile)
    return Split(long_tailed(pool, counts, seed), evaluate, counts)
