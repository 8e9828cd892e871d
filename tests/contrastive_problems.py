"""Calls of the contrastive loss, described by named features; problems.covering_set combines them."""

from __future__ import annotations

import torch
from contrastive_oracle import DIFFERENTIABLE, Case, definition
from problems import with_layout
from torch import Tensor

# The values of every feature; a case has one of each. make_case says what they mean.
FEATURES: dict[str, tuple] = {
    "rows": (33, 1, 2, 3, 64, 65, 129, 257, 300),
    "keys": ("self", "one", "fewer", "more", "queue"),
    "width": (16, 1, 3, 17, 128),
    "dtype": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "positives": ("labels", "unlabelled", "index", "extra", "labels_extra", "index_extra", "one_class", "singletons"),
    "denominator": ("all", "own", "negatives", "normalizer"),
    "temperature": ("number", "scalar", "vector", "small"),
    "scaled": (False, True),
    "allowed": ("no_mask", "keys", "pairs"),
    "key_bias": ("no_bias", "bias", "minus_inf"),
    "pair_margin": (False, True),
    "sample_weight": ("no_weight", "weight", "zeros"),
    "normalize": (False, True),
    "layout": ("contiguous", "transposed", "expanded", "row_sliced", "column_sliced", "column_strided"),
    "reduction": ("mean", "sum", "none"),
    "grads": ("all", "none", "query", "without_query", "vectors"),
}
LOGSUMEXP_FEATURES = {
    name: FEATURES[name] for name in ("rows", "keys", "width", "dtype", "temperature", "key_bias", "layout", "grads")
} | {"exclude": ("self", None, "same_label", "different_label"), "positives": ("labels", "unlabelled", "singletons")}
COMPLETE = {name: values[0] for name, values in FEATURES.items()}


def possible(features: dict) -> bool:
    """Whether (some of the) features go together."""
    if features.get("denominator") == "normalizer" and features.get("scaled"):
        return False
    if features.get("pair_margin") and features.get("positives") in ("index", "extra", "index_extra"):
        return False
    if features.get("keys") == "self" and features.get("rows") == 1 and "index" in str(features.get("positives")):
        return False
    # A direction of one dimension is a sign: its gradient is nothing but the rounding of terms that cancel.
    return not (features.get("normalize") and features.get("width") == 1)


def make_case(features: dict, seed: int = 0) -> Case:
    """The case that ``features`` describe, with values drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    rows, width, dtype = features["rows"], features["width"], features["dtype"]
    vectors = torch.float64 if dtype == torch.float64 else torch.float32

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=vectors) * (high - low) + low

    def embeddings(count: int, layout: str = "contiguous") -> Tensor:
        x = torch.randn(count, width, generator=generator, dtype=torch.float64) / width**0.25
        return with_layout(x.to(dtype), layout if count else "contiguous")

    count = {"self": rows, "one": 1, "fewer": (rows + 1) // 2, "more": rows + 7, "queue": 3 * rows + 5}[
        features["keys"]
    ]
    arguments = {"query": embeddings(rows, features["layout"])}
    if features["keys"] != "self":
        arguments["key"] = embeddings(count, features["layout"])
    low, high = (0.02, 0.1) if features["temperature"] == "small" else (0.3, 1.0)
    arguments["temperature"] = {"number": 0.5, "scalar": uniform(low=low, high=high)}.get(features["temperature"])
    if arguments["temperature"] is None:
        arguments["temperature"] = uniform(rows, low=low, high=high)
    arguments |= positives(features, rows, count, generator)
    if "extra" in features["positives"]:
        arguments["extra_positive"] = embeddings(rows, features["layout"])
    if features["key_bias"] != "no_bias":
        arguments["key_bias"] = uniform(count, low=-2)
        if features["key_bias"] == "minus_inf":
            arguments["key_bias"][::3] = -torch.inf
    requires_grad = {"none": (), "query": ("query",), "vectors": DIFFERENTIABLE[2:6]}.get(features["grads"])
    if requires_grad is None:
        requires_grad = DIFFERENTIABLE[features["grads"] == "without_query" :]
    shape = (rows,)
    if "exclude" in features:
        arguments["exclude"] = features["exclude"]
    else:
        arguments |= {name: features[name] for name in ("normalize", "reduction")}
        arguments["scale_by_temperature"] = features["scaled"]
        nu = features["denominator"] == "normalizer"
        arguments["denominator"] = "negatives" if nu else features["denominator"]
        if nu:
            requires_grad = tuple(name for name in requires_grad if name in ("query", "key", "extra_positive"))
        if features["allowed"] != "no_mask":
            arguments["allowed"] = uniform(*((rows,) if features["allowed"] == "pairs" else ()), count) < 0.7
        if features["pair_margin"]:
            arguments["pair_margin"] = uniform(300, 300, low=-1)[:rows, :rows] if rows > 5 else uniform(5, 5, low=-1)
        if features["sample_weight"] != "no_weight":
            arguments["sample_weight"] = uniform(rows, low=0.1, high=2)
            if features["sample_weight"] == "zeros":
                arguments["sample_weight"][::2] = 0
        if features["reduction"] != "none":
            shape = ()
    requires_grad = tuple(name for name in requires_grad if isinstance(arguments.get(name), Tensor))
    if features.get("denominator") == "normalizer":
        arguments["log_normalizer"] = moving_average(arguments) + uniform(rows, low=-1)
    upstream = torch.randn(shape, generator=generator, dtype=vectors)
    return Case(arguments, requires_grad, upstream)


def moving_average(arguments: dict) -> Tensor:
    """What the moving average of iSogCLR settles at: the log-sum-exp relative to the mean of the positives."""
    given = {name: x for name, x in arguments.items() if name != "log_normalizer"}
    stats = definition(Case(given).double().arguments)
    average = stats["logsumexp"] - stats["positive"]
    dtype = torch.promote_types(arguments["query"].dtype, torch.float32)
    return torch.where(average.isfinite(), average, 0.0).to(dtype)


def positives(features: dict, rows: int, count: int, generator: torch.Generator) -> dict:
    kind, own = features["positives"], features["keys"] == "self"
    if "index" in kind:
        index = torch.randint(max(count - own, 1), (rows,), generator=generator)
        return {"positive_index": index + (index >= torch.arange(rows)) if own else index}
    if kind == "extra":
        return {}
    classes = {"one_class": 1, "singletons": max(rows, count)}.get(kind, 5)
    labels = [torch.randint(classes, (n,), generator=generator) for n in (rows, count)]
    if kind == "singletons":
        labels = [torch.randperm(classes, generator=generator)[:n] for n in (rows, count)]
    if kind == "unlabelled":
        for y in labels:
            y[1::3] = -1
    if features.get("pair_margin") and kind == "singletons":  # the margins are (max(rows, 5), max(rows, 5))
        labels = [y % max(rows, 5) for y in labels]
    return {"labels": labels[0]} if own else {"labels": labels[0], "key_labels": labels[1]}


def describe(features: dict) -> str:
    """A readable test id: what is not the first, plain value of its feature."""
    words = [f"{features['rows']}x{features['width']}", str(features["dtype"]).removeprefix("torch.")]
    for name, value in features.items():
        if name not in ("rows", "width", "dtype") and value != FEATURES.get(name, ("self",))[0]:
            words.append(name if value is True else str(value))
    return "-".join(words)
