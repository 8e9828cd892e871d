"""Networks."""

from ltkernels.trainer.models.small import SmallNetwork

__all__ = ["SmallNetwork"]
