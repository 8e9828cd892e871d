"""What the networks for images have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from torch import Tensor, nn

from ltkernels.nn import CosineLinear
from ltkernels.trainer import TrainerError
from ltkernels.trainer.models.small import Classifier


class ImageNetwork(nn.Module):
    """A backbone that turns images into embeddings, and a linear or cosine classifier of them.

    The classifier is made last, of a backbone that is initialised: under one seed networks that differ in the
    classifier have the same backbone.

    Args:
        backbone: Images (N, in_channels, H, W) to embeddings (N, D).
        embedding_dim: D.
        num_classes: C.
        classifier: ``"linear"``, or ``"cosine"`` for losses on cosines; it has no bias.

    Shape: images (N, in_channels, H, W), logits (N, C).

    Raises:
        TrainerError: the classifier is of no known kind.
    """

    def __init__(self, backbone: nn.Module, embedding_dim: int, num_classes: int, classifier: Classifier) -> None:
        super().__init__()
        if classifier not in get_args(Classifier):
            raise TrainerError(f"classifier: expected one of {', '.join(get_args(Classifier))}, got {classifier!r}")
        self.embedding_dim = embedding_dim
        self.backbone = backbone
        head = CosineLinear if classifier == "cosine" else nn.Linear
        self.classifier: nn.Module = head(embedding_dim, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Embeddings (N, D): what the classifier sees."""
        return self.backbone(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


def scaled(channels: tuple[int, ...], width: float) -> tuple[int, ...]:
    """Channels of each stage, times ``width``.

    Raises:
        TrainerError: the width is not positive, or leaves a stage without channels.
    """
    if not 0 < width < float("inf") or round(channels[0] * width) < 1:
        raise TrainerError(f"width: expected a factor that leaves at least one of {channels[0]} channels, got {width}")
    return tuple(round(count * width) for count in channels)


class MeanOverPositions(nn.Module):
    """(N, D, H, W) to (N, D).

    The same bits as ``nn.AdaptiveAvgPool2d(1)``, of which torch 2.11 compiles a wrong gradient, 0, if the images are
    channels-last and the embeddings are normalised.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def pooled(*stages: nn.Module) -> nn.Sequential:
    """The stages, then the mean over all positions: (N, D)."""
    return nn.Sequential(*stages, MeanOverPositions())


def residual_backbone(
    block: Callable[[int, int, int], nn.Module], channels: tuple[int, ...], blocks_per_stage: int, in_channels: int
) -> nn.Sequential:
    """A convolution of 3 x 3 pixels, then stages of blocks; all stages but the first halve the side.

    ``block(inputs, outputs, stride)`` makes a block.

    Shape: images (N, in_channels, H, W), embeddings (N, channels[-1]).
    """
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False),
        nn.BatchNorm2d(channels[0]),
        nn.ReLU(inplace=True),
    ]
    inputs = channels[0]
    for stage, outputs in enumerate(channels):
        for k in range(blocks_per_stage):
            layers.append(block(inputs, outputs, 2 if stage > 0 and k == 0 else 1))
            inputs = outputs
    return pooled(*layers)
