"""Problems for the oracle, described by named features, and sets of them that cover all pairs of features."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import torch
from oracle import Problem
from torch import Tensor

from ltkernels.neighbors import NeighborMap

LIMIT = 2**22  # logits of the larger problems

# The values of every feature; a problem has one of each. make_problem says what they mean.
FEATURES: dict[str, tuple] = {
    "rows": (0, 1, 128, 4096),
    "classes": (1, 7, 10, 64, 100, 1000, 8142, 50304),
    "dtype": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "layout": ("contiguous", "transposed", "expanded", "row_sliced", "column_sliced", "column_strided"),
    "content": ("normal", "wide", "minus_inf", "nan", "equal"),
    "target": ("int64", "int32", "uint8", "ignored", "probabilities"),
    "affine": ("no_affine", "scale", "bias", "scale_bias", "scalar", "learned_scale"),
    "margin": ("no_margin", "target_margin", "pairwise", "both_margins"),
    "weight": ("no_weight", "class_weight", "sample_weight", "both_weights"),
    "mask": ("no_mask", "class_mask", "row_mask"),
    "smoothing": (0.0, 0.1, 1.0),
    "neighbors": ("no_neighbors", "silence", "silence_back", "damp", "silence_nothing"),
    "reduction": ("mean", "sum", "none"),
    "grads": ("no_grad", "grad_logits", "grad_all", "grad_vectors"),
    "lse": ("no_lse", "lse"),
}

DIFFERENTIABLE = ("logit_scale", "logit_bias", "target_margin", "pairwise_margin", "sample_weight", "scale")


def make_problem(features: dict, seed: int = 0) -> Problem:
    """The problem that ``features`` describe, with values drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    rows, classes, dtype = features["rows"], features["classes"], features["dtype"]
    vectors = torch.float64 if dtype == torch.float64 else torch.float32

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=vectors) * (high - low) + low

    logits = with_layout(make_logits(features["content"], rows, classes, generator).to(dtype), features["layout"])
    options = {"reduction": features["reduction"], "label_smoothing": features["smoothing"]}
    options |= {"return_lse": features["lse"] == "lse", "scale": 1.0 if features["affine"] == "no_affine" else 1.75}
    if features["affine"] in ("scale", "scale_bias"):
        options["logit_scale"] = uniform(classes, low=0.5, high=1.5)
    if features["affine"] in ("bias", "scale_bias"):
        options["logit_bias"] = uniform(classes, low=-3)
    if features["affine"] == "scalar":
        options["logit_scale"] = uniform(low=0.5, high=1.5)
    if features["affine"] == "learned_scale":
        options["scale"] = uniform(low=1, high=4)
    if features["margin"] in ("target_margin", "both_margins"):
        options["target_margin"] = uniform(classes)
    if features["margin"] in ("pairwise", "both_margins"):
        options["pairwise_margin"] = uniform(classes, classes, low=-1)
    if features["weight"] in ("class_weight", "both_weights"):
        options["weight"] = uniform(classes, low=0.1)
    if features["weight"] in ("sample_weight", "both_weights"):
        options["sample_weight"] = uniform(rows)
    if features["mask"] != "no_mask":
        options["mask"] = uniform(*((rows,) if features["mask"] == "row_mask" else ()), classes) < 0.8
    target = make_target(features["target"], rows, classes, dtype, generator)
    if features["neighbors"] != "no_neighbors":
        options |= make_silencing(features["neighbors"], rows, classes, generator)
        if features["target"] == "probabilities":
            options["row_class"] = torch.randint(classes, (rows,), generator=generator)
    requires_grad = () if features["grads"] in ("no_grad", "grad_vectors") else ("logits",)
    if features["grads"] in ("grad_all", "grad_vectors"):
        requires_grad += tuple(name for name in DIFFERENTIABLE if isinstance(options.get(name), Tensor))
    return Problem(logits, target, options, requires_grad)


def make_logits(content: str, rows: int, classes: int, generator: torch.Generator) -> Tensor:
    logits = torch.randn(rows, classes, generator=generator)
    if content == "wide":
        logits *= 30
    elif content == "equal":
        logits[:] = 0.5
    elif content == "minus_inf":
        logits[::2, : (classes + 1) // 2] = -torch.inf
    elif content == "nan":
        logits[::3, torch.randint(classes, (), generator=generator)] = torch.nan
    return logits


def make_target(kind: str, rows: int, classes: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if kind == "probabilities":
        probabilities = torch.randn(rows, classes, generator=generator).softmax(1)
        probabilities[:, ::3] = 0
        return probabilities.to(dtype)
    target = torch.randint(min(classes, 256), (rows,), generator=generator)
    if kind == "ignored":
        target[::3] = -100
        return target
    return target.to(getattr(torch, kind))


def make_silencing(kind: str, rows: int, classes: int, generator: torch.Generator) -> dict:
    """A map in which most auxiliary classes have an anchor and some have two; some target classes have none."""
    first = min((classes + 1) // 2, 128)  # target classes; indices below 256 reach both halves
    auxiliary = classes - first
    pairs = torch.stack(
        [
            torch.randint(first, (auxiliary + auxiliary // 3,), generator=generator),
            torch.arange(auxiliary + auxiliary // 3) % max(auxiliary, 1) + first,
        ],
        dim=1,
    )
    neighbors = NeighborMap.from_pairs(pairs, num_classes=first, num_auxiliary=auxiliary)
    weight = {"damp": 0.1, "silence_nothing": 1.0}.get(kind, 0.0)
    return {"neighbors": neighbors, "neighbor_weight": weight, "mode": "back" if kind == "silence_back" else "plain"}


def with_layout(x: Tensor, layout: str) -> Tensor:
    """A matrix like ``x`` whose memory is laid out differently; the gaps are NaN."""
    rows, classes = x.shape
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "expanded":
        return x[:1].expand(rows, classes)
    memory = x.new_full((2 * rows, classes), torch.nan)[::2]
    if layout == "contiguous":
        return x
    if layout == "column_sliced":  # rows begin at every multiple of the element size
        memory = x.new_full((rows, classes + 3), torch.nan)[:, 1:-2]
    if layout == "column_strided":
        memory = x.new_full((rows, 2 * classes), torch.nan)[:, ::2]
    return memory.copy_(x)


def possible(features: dict) -> bool:
    """Whether (some of the) features go together and are small enough for every run of the suite."""
    classes = features.get("classes", 1)
    pairwise = features.get("margin") in ("pairwise", "both_margins")
    if pairwise and (features.get("target") == "probabilities" or classes > 1000):
        return False
    if features.get("neighbors", "no_neighbors") != "no_neighbors" and classes > 1000:
        return False  # the definition has a matrix of classes by classes
    return features.get("rows", 1) * classes <= LIMIT


def covering_set(
    features: dict[str, tuple] = FEATURES, allowed: Callable[[dict], bool] = possible, seed: int = 0
) -> list[dict]:
    """Combinations in which every allowed pair of values of two features occurs; greedy, the same at every run."""
    rng = random.Random(seed)
    open_pairs = {pair for pair in _pairs_of(features) if allowed(dict(pair))}
    order = sorted(open_pairs, key=str)
    rng.shuffle(order)
    chosen = []
    for pair in order:
        if pair not in open_pairs:
            continue
        combination = dict(pair)
        for name in rng.sample(list(features), len(features)):
            if name not in combination:
                values = [value for value in features[name] if allowed(combination | {name: value})]
                rng.shuffle(values)
                combination[name] = max(values, key=lambda v: _count(open_pairs, combination, name, v))  # noqa: B023
        open_pairs -= {_pair(a, b) for a, b in itertools.combinations(combination.items(), 2)}
        chosen.append({name: combination[name] for name in features})
    return chosen


def one_at_a_time(features: dict[str, tuple] = FEATURES, **plain: object) -> list[dict]:
    """The plainest problem, of the first value of each feature or that in ``plain``, and all that differ in one."""
    first = {name: values[0] for name, values in features.items()} | plain
    others = [first | {name: value} for name, values in features.items() for value in values if value != first[name]]
    return [features for features in (first, *others) if possible(features)]


def _pairs_of(features: dict[str, tuple]) -> Iterator[tuple]:
    for (name, values), (other, other_values) in itertools.combinations(features.items(), 2):
        for value, other_value in itertools.product(values, other_values):
            yield _pair((name, value), (other, other_value))


def _pair(a: tuple, b: tuple) -> tuple:
    return (a, b) if a[0] < b[0] else (b, a)


def _count(open_pairs: set, combination: dict, name: str, value: object) -> int:
    return sum(_pair(item, (name, value)) in open_pairs for item in combination.items())


def describe(features: dict) -> str:
    """A readable test id: what is not the first, plain value of its feature."""
    words = [f"{features['rows']}x{features['classes']}", str(features["dtype"]).removeprefix("torch.")]
    for name, value in features.items():
        if name not in ("rows", "classes", "dtype") and value != FEATURES[name][0]:
            words.append(f"{name}{value:g}" if isinstance(value, float) else str(value))
    return "-".join(words)
