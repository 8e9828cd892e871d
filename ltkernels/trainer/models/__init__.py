"""Networks. A new one is a module here and one name in the recipe."""

from ltkernels.trainer.models.small import SmallNetwork

__all__ = ["SmallNetwork"]
