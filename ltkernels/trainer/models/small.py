"""The network for small images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

from torch import Tensor, nn

from ltkernels.nn import CosineLinear

Classifier: TypeAlias = Literal["linear", "cosine"]


class SmallNetwork(nn.Module):
    """A perceptron with ReLU layers of the given widths, and a linear or cosine classifier.

    Layers are initialised in order, the classifier last: under one seed networks that differ in the classifier have
    the same hidden layers.

    Args:
        in_features: Pixels of an image.
        hidden: Width of each hidden layer, at least one.
        num_classes: C.
        classifier: ``"linear"``, or ``"cosine"`` for losses on cosines.

    Shape: images (N, ...) with ``in_features`` values each, logits (N, C).
    """

    def __init__(self, in_features: int, hidden: Sequence[int], num_classes: int, classifier: Classifier) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise((in_features, *hidden)):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        head = CosineLinear if classifier == "cosine" else nn.Linear
        self.classifier = head(hidden[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))
