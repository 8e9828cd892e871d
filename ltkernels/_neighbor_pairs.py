"""Pairs (target class, auxiliary class) from lists, names, superclasses and prototypes; their CSR form."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from ltkernels._checks import ClassCounts, class_counts_of, kind_of

INT32_MAX = 2**31 - 1
CHUNK = 2**20  # similarities held at a time: 8 MB


def check_sizes(classes: int, pairs: int) -> None:
    """Class numbers and CSR offsets are int32."""
    if classes >= INT32_MAX or 2 * pairs > INT32_MAX:
        raise ValueError(f"expected fewer than 2^31 classes and at most 2^30 pairs, got {classes} and {pairs}")


# Pairs as given


def pairs_of(pairs: Iterable[Sequence[int]] | Tensor | np.ndarray, classes: int, auxiliary: int) -> Tensor:
    """Checked pairs (P, 2) int64 on the CPU, in the order and with the duplicates they came in."""
    table = _as_table(pairs)
    if table.size == 0 and table.ndim <= 2:
        return torch.empty((0, 2), dtype=torch.int64, device="cpu")
    if table.ndim != 2 or table.shape[1] != 2:
        raise ValueError(f"pairs: expected shape (P, 2), got {table.shape}")
    target, neighbor = table[:, 0], table[:, 1]
    if (own := _first(target == neighbor)) is not None:
        raise ValueError(f"pairs: class {target[own]} is its own neighbour, in pair {own}")
    for name, column, low, high in (
        ("target", target, 0, classes),
        ("auxiliary", neighbor, classes, classes + auxiliary),
    ):
        if (bad := _first((column < low) | (column >= high))) is not None:
            raise IndexError(
                f"pairs: expected {name} classes in [{low}, {high}), got {column[bad]} in pair {bad}, "
                f"({target[bad]}, {neighbor[bad]})"
            )
    return torch.from_numpy(table.astype(np.int64))


def _as_table(pairs: Iterable[Sequence[int]] | Tensor | np.ndarray) -> np.ndarray:
    if isinstance(pairs, Tensor):
        integers = not (pairs.is_floating_point() or pairs.is_complex())
        table = pairs.detach().cpu().numpy() if integers else np.empty(1)
    elif isinstance(pairs, np.ndarray):
        table = pairs
    elif isinstance(pairs, Iterable) and not isinstance(pairs, (str, bytes, Mapping)):
        try:
            table = np.asarray(list(pairs))
        except ValueError as error:
            raise ValueError("pairs: expected shape (P, 2), got sequences of different lengths") from error
        table = table.astype(np.int64) if table.shape == (0,) else table
    else:
        raise TypeError(f"pairs: expected pairs of class numbers, got {kind_of(pairs)}")
    if table.dtype.kind not in "iu":
        raise TypeError(f"pairs: expected pairs of integers, got {kind_of(pairs)} of {table.dtype}")
    return table


def _first(bad: np.ndarray) -> int | None:
    return int(bad.argmax()) if bad.any() else None


# CSR


def csr_of(table: Tensor, classes: int, auxiliary: int) -> tuple[Tensor, Tensor]:
    """Offsets (C + A + 1,) and classes (2P,), int32: of each class its neighbours or anchors, ascending, once each."""
    total = classes + auxiliary
    target, neighbor = table.unbind(1)
    both = torch.cat([target * total + neighbor, neighbor * total + target]).unique()  # by class, then by neighbour
    check_sizes(total, both.numel() // 2)
    counts = torch.bincount(both // total, minlength=total)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return offsets.int(), (both % total).int()


def pairs_of_csr(offsets: Tensor, neighbors: Tensor, classes: int) -> Tensor:
    """The inverse: pairs (P, 2) int64, sorted."""
    pairs = neighbors.numel() // 2  # rows of target classes come first and hold every pair once
    numbers = torch.arange(classes, device=offsets.device)
    target = numbers.repeat_interleave(offsets[: classes + 1].diff().long(), output_size=pairs)
    return torch.stack([target, neighbors[:pairs].long()], dim=1)


def check_csr(offsets: Tensor, neighbors: Tensor, classes: int, auxiliary: int) -> None:
    """Raises unless the tensors are what ``csr_of`` gives. Values that cannot be read (fake, meta) are not checked."""
    for name, x in (("offsets", offsets), ("classes", neighbors)):
        if not isinstance(x, Tensor) or x.dtype != torch.int32:
            raise TypeError(f"{name}: expected an int32 Tensor, got {kind_of(x)}")
    if offsets.shape != (classes + auxiliary + 1,) or neighbors.dim() != 1:
        raise ValueError(
            f"offsets, classes: expected shapes ({classes + auxiliary + 1},) and (2 * pairs,), "
            f"got {tuple(offsets.shape)} and {tuple(neighbors.shape)}"
        )
    if any(x.is_meta or type(x) is not Tensor for x in (offsets, neighbors)):
        return
    offsets, neighbors = offsets.cpu(), neighbors.cpu()
    starts = offsets[: classes + 1]
    valid = starts[0] == 0 and 2 * int(starts[-1]) == neighbors.numel() and bool((starts.diff() >= 0).all())
    if valid:
        table = pairs_of(pairs_of_csr(offsets, neighbors, classes), classes, auxiliary)
        valid = all(map(torch.equal, csr_of(table, classes, auxiliary), (offsets, neighbors)))
    if not valid:
        raise ValueError(f"offsets, classes: not a map of {classes} target and {auxiliary} auxiliary classes")


# Names and superclasses


def pairs_of_names(
    neighbors: Mapping[str, Iterable[str]], class_names: Sequence[str], auxiliary_names: Sequence[str] | None
) -> tuple[list[tuple[int, int]], int, int]:
    """Pairs, C and A."""
    target_number = _numbers("class_names", class_names, 0)
    if not isinstance(neighbors, Mapping):
        raise TypeError(f"neighbors: expected a mapping from names to names, got {kind_of(neighbors)}")
    named = {target: _names_of(target, names) for target, names in neighbors.items()}
    for target, names in named.items():
        if target not in target_number:
            raise ValueError(f"neighbors: expected names of class_names as keys, got {target!r}")
        if target in names:
            raise ValueError(f"neighbors: class {target!r} is its own neighbour")
        if (also_target := next((name for name in names if name in target_number), None)) is not None:
            raise ValueError(f"neighbors: expected auxiliary classes of {target!r}, got target class {also_target!r}")
    if auxiliary_names is None:
        auxiliary_names = list(dict.fromkeys(name for names in named.values() for name in names))
    auxiliary_number = _numbers("auxiliary_names", auxiliary_names, len(target_number))
    if both := target_number.keys() & auxiliary_number.keys():
        raise ValueError(f"auxiliary_names: expected no name of class_names, got {min(both)!r}")
    pairs = []
    for target, names in named.items():
        if (unknown := next((name for name in names if name not in auxiliary_number), None)) is not None:
            raise ValueError(f"neighbors: expected names of auxiliary_names for {target!r}, got {unknown!r}")
        pairs += [(target_number[target], auxiliary_number[name]) for name in names]
    return pairs, len(target_number), len(auxiliary_number)


def _names_of(target: str, names: Iterable[str]) -> list[str]:
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        raise TypeError(f"neighbors: expected a list of names for {target!r}, got {kind_of(names)}")
    in_order = list(names)
    for name in in_order:
        if not isinstance(name, str):
            raise TypeError(f"neighbors: expected names for {target!r}, got {kind_of(name)}")
    # The order of a set of strings changes from process to process, and with it the class numbers would.
    return sorted(in_order) if isinstance(names, (set, frozenset)) else in_order


def checked_names(argument: str, names: Sequence[str]) -> list[str]:
    """A list of strings."""
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        raise TypeError(f"{argument}: expected a sequence of names, got {kind_of(names)}")
    names = list(names)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{argument}: expected names, got {kind_of(name)}")
    return names


def _numbers(argument: str, names: Sequence[str], first: int) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for name in checked_names(argument, names):
        if name in numbers:
            raise ValueError(f"{argument}: expected each name once, got {name!r} twice")
        numbers[name] = first + len(numbers)
    if first == 0 and not numbers:
        raise ValueError(f"{argument}: expected at least one name, got none")
    return numbers


def pairs_of_hierarchy(
    superclasses: Sequence[Hashable] | Tensor | np.ndarray, classes: int
) -> tuple[list[tuple[int, int]], int]:
    """Pairs and A."""
    if isinstance(superclasses, (Tensor, np.ndarray)):
        superclasses = superclasses.tolist()  # elements of a tensor are hashed by identity
    if isinstance(superclasses, (str, bytes, Mapping)) or not isinstance(superclasses, Iterable):
        raise TypeError(f"superclasses: expected a superclass for each class, got {kind_of(superclasses)}")
    superclasses = list(superclasses)
    if len(superclasses) < classes:
        raise ValueError(f"superclasses: expected at least num_classes={classes} entries, got {len(superclasses)}")
    targets: dict[Hashable, list[int]] = {}
    for number, superclass in enumerate(superclasses):
        if not isinstance(superclass, Hashable):
            raise TypeError(f"superclasses: expected hashable values, got {kind_of(superclass)} for class {number}")
        if number < classes:
            targets.setdefault(superclass, []).append(number)
    pairs = [
        (target, number)
        for number, superclass in enumerate(superclasses[classes:], start=classes)
        for target in targets.get(superclass, ())
    ]
    return pairs, len(superclasses) - classes


# Prototypes


def pairs_of_prototypes(
    prototypes: Tensor | np.ndarray,
    classes: int,
    bounds: tuple[float, float],
    max_neighbors: int,
    class_counts: ClassCounts | None,
) -> tuple[Tensor, int]:
    """Pairs (P, 2) int64 on the CPU, and A."""
    lower, upper = _checked_bounds(*bounds)
    directions = _directions(prototypes, classes)
    most = _most_neighbors(max_neighbors, class_counts, classes)
    auxiliary = directions.shape[0] - classes
    rows = max(1, CHUNK // max(auxiliary, 1))
    found = [torch.empty((0, 2), dtype=torch.int64, device="cpu")]
    for start in range(0, classes, rows):
        stop = min(start + rows, classes)
        # A product of rounded directions of one line may pass 1 by an ulp: still a similarity of 1.
        similarity = (directions[start:stop] @ directions[classes:].T).clamp_(-1, 1)
        pairs = _most_similar(similarity, lower, upper, most[start:stop])
        found.append(pairs + torch.tensor([start, classes], device="cpu"))
    return torch.cat(found), auxiliary


def _most_similar(similarity: Tensor, lower: float, upper: float, most: Tensor) -> Tensor:
    """(row, column) of the ``most[row]`` largest entries in bounds of each row; the first of equals."""
    row, column = ((similarity >= lower) & (similarity <= upper)).nonzero(as_tuple=True)
    order = similarity[row, column].argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]  # by row, then by falling similarity, then by column
    row, column = row[order], column[order]
    entries = torch.bincount(row, minlength=similarity.shape[0])
    rank = torch.arange(row.numel(), device="cpu") - (entries.cumsum(0) - entries)[row]
    kept = rank < most[row]
    return torch.stack([row[kept], column[kept]], dim=1)


def _checked_bounds(lower: float, upper: float) -> tuple[float, float]:
    for name, value in (("lower", lower), ("upper", upper)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}: expected a number, got {kind_of(value)}")
        if not -1 <= value <= 1:
            raise ValueError(f"{name}: expected a cosine similarity in [-1, 1], got {value}")
    if lower > upper:
        raise ValueError(f"lower, upper: expected lower <= upper, got {lower} and {upper}")
    return float(lower), float(upper)


def _directions(prototypes: Tensor | np.ndarray, classes: int) -> Tensor:
    """Rows of length 1, float64 on the CPU."""
    if isinstance(prototypes, np.ndarray) and prototypes.dtype.kind == "f":
        prototypes = torch.from_numpy(prototypes.astype(np.float64))
    if not isinstance(prototypes, Tensor) or not prototypes.is_floating_point():
        raise TypeError(f"prototypes: expected a floating Tensor or array, got {kind_of(prototypes)}")
    if prototypes.dim() != 2 or prototypes.shape[0] < classes or prototypes.shape[1] == 0:
        raise ValueError(
            f"prototypes: expected shape (K, D) with K >= num_classes={classes} and D >= 1, "
            f"got {tuple(prototypes.shape)}"
        )
    x = prototypes.detach().cpu().double()
    largest = x.abs().amax(dim=1, keepdim=True)  # NaN where there is one
    for bad, what in ((~largest.isfinite(), "finite values"), (largest == 0, "vectors longer than 0")):
        if bad.any():
            number = int(bad[:, 0].nonzero()[0])
            raise ValueError(f"prototypes: expected {what}, got {x[number].tolist()[:4]} ... for class {number}")
    x = x / largest  # squares of very large or small values are out of range
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True)


def _most_neighbors(max_neighbors: int, class_counts: ClassCounts | None, classes: int) -> Tensor:
    """(C,) the most neighbours of each target class."""
    if class_counts is None:
        return torch.full((classes,), max_neighbors, device="cpu")
    counts = class_counts_of(class_counts)
    if counts.numel() != classes:
        raise ValueError(f"class_counts: expected shape ({classes},), got ({counts.numel()},)")
    rarity = (counts.max() / counts).log()  # 0 for the most frequent class
    if rarity.max() == 0:
        return torch.full((classes,), max_neighbors, device="cpu")
    return 1 + ((max_neighbors - 1) * (rarity / rarity.max())).round().long()
