"""The normalised classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ltkernels._checks import integer, kind_of, number
from ltkernels.reference import directions


class CosineLinear(nn.Module):
    r"""Cosine classifier: :math:`f_{ij} = \langle x_i / |x_i|,\; W_j / |W_j| \rangle`, in [-1, 1].

    It has no scale of its own: the scale belongs to the loss (``LDAMLoss(scale=30)``), where it multiplies the margin
    too, and prediction does not need it. Norms are taken in float32 or wider.

    Args:
        in_features: D.
        out_features: C.
        eps: A vector no longer than this has no direction: its cosines and its gradient are 0.
        device, dtype: Of ``weight``.

    Shape: input (..., D), output (..., C) in the dtype of the input.

    Attributes:
        weight: (C, D), initialised to random directions of length 1.

    Raises:
        ValueError: a size or ``eps`` out of range, an input whose last dimension is not D.
        TypeError: a wrong type, an input that is no floating tensor.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = integer("in_features", in_features, minimum=1)
        self.out_features = integer("out_features", out_features, minimum=1)
        self.eps = number("eps", eps, "> 0")
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Directions uniform on the sphere."""
        nn.init.normal_(self.weight)
        with torch.no_grad():
            self.weight.copy_(directions(self.weight, self.eps))

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor) or not input.is_floating_point():
            raise TypeError(f"input: expected a floating Tensor, got {kind_of(input)}")
        if input.shape[-1:] != (self.in_features,):
            raise ValueError(f"input: expected shape (..., {self.in_features}), got {tuple(input.shape)}")
        return nn.functional.linear(directions(input, self.eps), directions(self.weight, self.eps))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
