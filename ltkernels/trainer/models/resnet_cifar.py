"""ResNet-32 of He et al., arXiv:1512.03385, section 4.2, as long-tailed CIFAR is trained with it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ltkernels.trainer.models.network import ImageNetwork, residual_backbone, scaled
from ltkernels.trainer.models.small import Classifier

CHANNELS = (16, 32, 64)
BLOCKS_PER_STAGE = 5


class Block(nn.Module):
    """Two convolutions, and a shortcut without parameters: every second pixel, new channels of zeros on both sides.

    Shape: (N, inputs, H, W) to (N, outputs, ceil(H / stride), ceil(W / stride)); ``outputs >= inputs``.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        before = (outputs - inputs) // 2
        self.new_channels = (before, outputs - inputs - before)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if any(self.new_channels):
            x = F.pad(x, (0, 0, 0, 0, *self.new_channels))
        return F.relu(out.add_(x), inplace=True)


def resnet32(in_channels: int, num_classes: int, classifier: Classifier = "linear", width: float = 1.0) -> ImageNetwork:
    """ResNet-32 for images of about 32 x 32 pixels: 464,154 parameters with 3 channels and 10 classes.

    Weights of convolutions and of a linear classifier are drawn by He's rule (``kaiming_normal_``, fan-in), as in the
    code of LDAM.

    Args:
        in_channels: Of the images.
        num_classes: C.
        classifier: ``"linear"`` or ``"cosine"``.
        width: Factor on the channels, 16 to 64.

    Raises:
        TrainerError: the classifier is of no known kind, or the width leaves no channels.
    """
    channels = scaled(CHANNELS, width)
    backbone = residual_backbone(Block, channels, BLOCKS_PER_STAGE, in_channels)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    network = ImageNetwork(backbone, channels[-1], num_classes, classifier)
    if isinstance(network.classifier, nn.Linear):
        nn.init.kaiming_normal_(network.classifier.weight)
    return network
