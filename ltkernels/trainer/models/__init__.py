"""Networks. A new one is a module here and an entry of ``MODELS``."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ltkernels.trainer import TrainerError
from ltkernels.trainer.models.network import ImageNetwork
from ltkernels.trainer.models.resnet18 import resnet18
from ltkernels.trainer.models.resnet_cifar import resnet32
from ltkernels.trainer.models.small import Classifier, SmallNetwork
from ltkernels.trainer.models.small_cnn import small_cnn

__all__ = ["MODELS", "Classifier", "ImageNetwork", "SmallNetwork", "build_model"]

# Networks for images (N, in_channels, H, W). Keywords: in_channels, num_classes, classifier and width. Attributes:
# embedding_dim, classifier, features(images) -> (N, embedding_dim).
MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet32": resnet32,
    "resnet18": resnet18,
    "small-cnn": small_cnn,
}


def build_model(
    name: str, *, in_channels: int, num_classes: int, classifier: Classifier, width: float = 1.0
) -> nn.Module:
    """The network of this name, with weights drawn from torch's default generator.

    Raises:
        TrainerError: there is no such network, or it cannot be built with these settings.
    """
    if name not in MODELS:
        raise TrainerError(f"network: expected one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name](in_channels=in_channels, num_classes=num_classes, classifier=classifier, width=width)
