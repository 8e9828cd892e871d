"""ResNet-18 for small images: a first convolution of 3 x 3 pixels, no pooling after it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ltkernels.trainer.models.network import ImageNetwork, residual_backbone, scaled
from ltkernels.trainer.models.small import Classifier

CHANNELS = (64, 128, 256, 512)
BLOCKS_PER_STAGE = 2


class Block(nn.Module):
    """Two convolutions, and a shortcut that is a convolution of 1 x 1 pixels where the shape changes.

    Shape: (N, inputs, H, W) to (N, outputs, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out.add_(self.shortcut(x)), inplace=True)


def resnet18(in_channels: int, num_classes: int, classifier: Classifier = "linear", width: float = 1.0) -> ImageNetwork:
    """ResNet-18 for images of about 32 x 32 pixels: 11,173,962 parameters with 3 channels and 10 classes.

    Convolutions are drawn by He's rule with fan-out, as torchvision does.

    Args:
        in_channels: Of the images.
        num_classes: C.
        classifier: ``"linear"`` or ``"cosine"``.
        width: Factor on the channels, 64 to 512; the embeddings have ``512 * width`` values.

    Raises:
        TrainerError: the classifier is of no known kind, or the width leaves no channels.
    """
    channels = scaled(CHANNELS, width)
    backbone = residual_backbone(Block, channels, BLOCKS_PER_STAGE, in_channels)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return ImageNetwork(backbone, channels[-1], num_classes, classifier)
