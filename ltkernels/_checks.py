"""Checks of host-side arguments: each returns the value in one known form, or says what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import TypeAlias, TypeGuard

import numpy as np
import torch
from torch import Tensor

ClassCounts: TypeAlias = "Tensor | np.ndarray | Sequence[float]"

_INTERVALS: dict[str, Callable[[float], bool]] = {
    ">= 0": lambda x: x >= 0,
    "> 0": lambda x: x > 0,
    "in [0, 1]": lambda x: 0 <= x <= 1,
    "in [0, 1)": lambda x: 0 <= x < 1,
}


def number(name: str, value: float, interval: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {kind_of(value)}")
    found = finite(value)
    if found is None or not _INTERVALS[interval](found):
        raise ValueError(f"{name}: expected a finite number {interval}, got {value}")
    return found


def finite(value: float) -> float | None:
    """The number as a float; None for one that is not finite, or too large an integer."""
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if -math.inf < found < math.inf else None  # torch.compile knows no isfinite


def integer(name: str, value: int, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer, got {kind_of(value)}")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")
    return int(value)


def boolean(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return value


def are_integers(x: object) -> TypeGuard[Tensor]:
    """Whether x holds numbers that can be labels or indices: torch counts neither bool nor complex as floating."""
    return isinstance(x, Tensor) and not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def check_layouts(**tensors: object) -> None:
    """What the operators say about layouts, for tensors that are reshaped first or that they are not reached with."""
    for name, x in tensors.items():
        if isinstance(x, Tensor) and (x.layout is not torch.strided or x.is_nested):
            found = "a nested tensor" if x.is_nested else f"layout {x.layout}"
            raise TypeError(f"{name}: expected a dense tensor (torch.strided), got {found}")


def class_counts_of(class_counts: ClassCounts) -> Tensor:
    """Checked counts (C,), float64 on the CPU."""
    if isinstance(class_counts, Tensor):
        check_layouts(class_counts=class_counts)
        if class_counts.is_meta:
            raise ValueError("class_counts: expected counts, got a meta tensor, which has no values")
        numeric = not (class_counts.is_complex() or class_counts.dtype == torch.bool)
        counts = class_counts.detach().cpu()
    else:
        try:
            array = np.asarray(class_counts)
        except ValueError as error:
            raise ValueError("class_counts: expected shape (C,), got sequences of different lengths") from error
        numeric = array.dtype.kind in "iuf"
        counts = torch.from_numpy(array.astype(np.float64)) if numeric else torch.empty(0)
    if not numeric:
        raise TypeError(f"class_counts: expected C real numbers, got {kind_of(class_counts)}")
    counts = counts.double()
    if counts.dim() != 1 or counts.numel() == 0:
        raise ValueError(f"class_counts: expected shape (C,) with C >= 1, got {tuple(counts.shape)}")
    bad = ~(counts.isfinite() & (counts > 0))
    if bad.any():
        index = int(bad.nonzero()[0])
        raise ValueError(
            f"class_counts: expected positive finite counts, got {counts[index].item():g} for class {index}; "
            "leave classes without samples out"
        )
    return counts


def check_margin_tensor(name: str, tensor: Tensor, classes: int | None) -> None:
    """Dtype, shape and values of a field of ``Margins``; ``classes`` is C, or None if no tensor tells."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating Tensor, got {kind_of(tensor)}")
    classes = classes or None  # no class at all agrees with no shape
    vector = [(classes,), ()]
    shapes_of = {"scale": [()], "logit_scale": vector, "target_margin": vector}
    shapes_of["pairwise_margin"] = [(classes, classes)]
    shapes = shapes_of.get(name, vector[:1])
    if tensor.shape not in shapes:
        expected = " or ".join(map(str, shapes)).replace("None", "C")
        raise ValueError(f"{name}: expected shape {expected} with at least one class, got {tuple(tensor.shape)}")
    check_layouts(**{name: tensor})
    if not tensor.is_meta and not tensor.isfinite().all():
        raise ValueError(f"{name}: expected finite values, got {tensor[~tensor.isfinite()][0].item()}")


def kind_of(value: object) -> str:
    return f"{value.dtype}" if isinstance(value, (Tensor, np.ndarray)) else type(value).__name__


def has_no_values(*tensors: Tensor | None) -> bool:
    """Whether one of them is traced or batched: there is nothing to read."""
    return any(
        x is not None and (type(x) not in _PLAIN or torch._C._functorch.is_functorch_wrapped_tensor(x)) for x in tensors
    )


def values_of(x: Tensor | None) -> Tensor | None:
    """What ``x`` holds under the transforms of torch.func, with the dimensions of all batches; None if it is traced."""
    while x is not None and torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.detach() if type(x) in _PLAIN else None


_PLAIN = (Tensor, torch.nn.Parameter)
