"""A small convolutional network; at a quarter of its width it trains in minutes on a CPU."""

from __future__ import annotations

from torch import nn

from ltkernels.trainer.models.network import ImageNetwork, pooled, scaled
from ltkernels.trainer.models.small import Classifier

CHANNELS = (64, 128, 192)


def small_cnn(
    in_channels: int, num_classes: int, classifier: Classifier = "linear", width: float = 1.0
) -> ImageNetwork:
    """Three stages of convolution, batch normalisation, ReLU and pooling, for images of at least 8 x 8 pixels.

    298,186 parameters with 1 channel and 10 classes.

    Args:
        in_channels: Of the images.
        num_classes: C.
        classifier: ``"linear"`` or ``"cosine"``.
        width: Factor on the channels, 64 to 192.

    Raises:
        TrainerError: the classifier is of no known kind, or the width leaves no channels.
    """
    layers: list[nn.Module] = []
    inputs = in_channels
    for outputs in scaled(CHANNELS, width):
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        ]
        inputs = outputs
    return ImageNetwork(pooled(*layers), inputs, num_classes, classifier)
