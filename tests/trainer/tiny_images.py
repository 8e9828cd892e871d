"""A data set and a network small enough for tests; importing this registers both, in child processes too."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from ltkernels.nn import CosineLinear
from ltkernels.trainer.data.augment import Augmentation
from ltkernels.trainer.data.datasets import DATASETS, ImageDataset, LongTail
from ltkernels.trainer.data.images import LabelledImages
from ltkernels.trainer.image_recipes import IMAGE_RECIPES, ImageRecipe
from ltkernels.trainer.models import MODELS

SIDE, CLASSES = 8, 4
COUNTS = (40, 18, 8, 4)  # 40 * 10^(-k/3), rounded down


def load_tiny(root: object = None) -> ImageDataset:
    """Grey squares whose brightest quadrant is their class, with noise."""
    return ImageDataset("tiny", _images(60, seed=0), _images(15, seed=1), (0.5,), (0.25,))


def _images(per_class: int, seed: int) -> LabelledImages:
    random = np.random.RandomState(seed)
    labels = np.repeat(np.arange(CLASSES), per_class)
    images = random.randint(0, 160, (len(labels), SIDE, SIDE))
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 60
    order = random.permutation(len(labels))
    return LabelledImages("made for tests", images.astype(np.uint8)[order], labels[order], CLASSES, 255)


class Perceptron(torch.nn.Module):
    """No batch normalisation: a sample's gradient does not depend on the others of its part of the batch."""

    embedding_dim = 16

    def __init__(self, in_channels: int, num_classes: int, classifier: str = "linear", width: float = 1.0) -> None:
        super().__init__()
        self.hidden = torch.nn.Linear(in_channels * SIDE * SIDE, 16)
        self.classifier = (CosineLinear if classifier == "cosine" else torch.nn.Linear)(16, num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.hidden(images.flatten(1)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images))


DATASETS.setdefault("tiny", load_tiny)
MODELS.setdefault("perceptron", Perceptron)


def tiny_recipe(method: str = "ce", **changes: object) -> ImageRecipe:
    """A run of the perceptron in well under a second: 70 images, 5 steps an epoch, the last of 6 images."""
    defaults = dict(
        dataset="tiny",
        model="perceptron",
        long_tail=LongTail(imbalance_factor=10.0, max_count=40),
        augmentation=Augmentation(policy="none"),
        steps=12,
        batch_size=16,
        evaluate_every=6,
        checkpoint_every=0,
        weight_decay=1e-3,
    )
    return dataclasses.replace(IMAGE_RECIPES[f"cifar100-lt-{method}"], **(defaults | changes))


_RECIPES = {f"tiny-{method}": tiny_recipe(method) for method in ("ce", "ldam-drw", "ce-mixup")}
IMAGE_RECIPES.update(_RECIPES)
REGISTERED = {"tiny", "perceptron", *_RECIPES}
"""Names that only these tests know."""
