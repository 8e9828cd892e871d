"""Calls the native code with every kind of argument; run under the sanitizers by tests/sanitize.sh."""

from __future__ import annotations

import itertools
import random

import torch

import ltkernels.functional as LF
from ltkernels import _build_info, _ops
from ltkernels.neighbors import MODES, NeighborMap

CLASSES = (1, 3, 7, 8, 9, 16, 31, 33, 100, 257)  # around every vector width
ROWS = (0, 1, 5, 130)  # 130 rows make two blocks of column sums
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def call(rng: random.Random, rows: int, classes: int, dtype: torch.dtype) -> None:
    """One forward and backward with arguments drawn at random, on memory that ends where the tensor ends."""

    def maybe(make, p=0.5):
        return make() if rng.random() < p else None

    logits = torch.randn(rows, classes).to(dtype)
    if rng.random() < 0.2:
        logits = torch.randn(classes, rows).to(dtype).t()
    logits = logits.requires_grad_()
    probabilities = rng.random() < 0.3
    target = torch.rand(rows, classes) if probabilities else torch.randint(classes, (rows,))
    if rows and not probabilities and rng.random() < 0.5:
        target[0] = -100
    learned = [maybe(lambda: torch.rand(classes, requires_grad=rng.random() < 0.5)) for _ in range(3)]
    pairwise = None
    if not probabilities:
        pairwise = maybe(lambda: torch.rand(classes, classes, requires_grad=True), 0.3)
    options = {
        "logit_scale": learned[0],
        "logit_bias": learned[1],
        "target_margin": learned[2],
        "pairwise_margin": pairwise,
        "scale": rng.choice((1.0, 30.0)),
        "mask": maybe(lambda: torch.rand(*rng.choice(((classes,), (rows, classes)))) < 0.7, 0.4),
        "sample_weight": maybe(lambda: torch.rand(rows, requires_grad=True)),
        "reduction": rng.choice(("none", "mean", "sum")),
        "label_smoothing": rng.choice((0.0, 0.1)),
    }
    weight = maybe(lambda: torch.rand(classes))
    if rng.random() < 0.5:
        loss = LF.margin_cross_entropy(logits, target, weight, **options)
    else:
        first = rng.randint(1, classes)
        pairs = [(rng.randrange(first), k) for k in range(first, classes) for _ in range(2)]
        neighbors = NeighborMap.from_pairs(pairs, num_classes=first, num_auxiliary=classes - first)
        mode = rng.choice(MODES)
        options["neighbor_weight"] = 0.0 if mode == "back" else rng.choice((0.0, 0.1))
        options["row_class"] = torch.randint(classes, (rows,)) if probabilities else None
        loss = LF.auxiliary_cross_entropy(logits, target, neighbors, weight, mode=mode, **options)
    loss.sum().backward()


def call_linear(rng: random.Random, rows: int, classes: int, dtype: torch.dtype) -> None:
    """The same for the linear form, in chunks that do not divide the rows."""
    features = torch.randn(rows, 5).to(dtype).requires_grad_()
    classifier = torch.randn(classes, 5).to(dtype).requires_grad_()
    cosine = rng.random() < 0.5
    loss, _ = LF.linear_margin_cross_entropy(
        features,
        classifier,
        torch.randint(classes, (rows,)),
        linear_bias=None if cosine else torch.randn(classes, requires_grad=True),
        cosine=cosine,
        chunk_size=rng.choice(("auto", 1, 3, 64)),
        logit_bias=torch.randn(classes, requires_grad=rng.random() < 0.5),
        reduction=rng.choice(("none", "mean", "sum")),
        return_stats=True,
    )
    loss.sum().backward()


def call_contrastive(rng: random.Random, rows: int, keys: int, dtype: torch.dtype) -> None:
    """The same for embeddings; ``keys`` is also their width."""
    width, itself = keys % 19 + 1, rng.random() < 0.5
    key = None if itself else torch.randn(keys, width).to(dtype).requires_grad_()
    keys = rows if itself else keys
    labels = rng.random() < 0.6 or itself and rows < 2
    options = {
        "sample_weight": torch.rand(rows, requires_grad=True) if rng.random() < 0.5 else None,
        "key_bias": torch.randn(keys, requires_grad=True) if rng.random() < 0.4 else None,
        "allowed": torch.rand(*rng.choice(((keys,), (rows, keys)))) < 0.7 if rng.random() < 0.4 else None,
        "extra_positive": torch.randn(rows, width).to(dtype).requires_grad_() if rng.random() < 0.3 else None,
        "denominator": rng.choice(("all", "own", "negatives")),
        "reduction": rng.choice(("none", "mean", "sum")),
    }
    if labels:
        options["labels"] = torch.randint(-1, 4, (rows,))
        options["key_labels"] = None if itself else torch.randint(-1, 4, (keys,))
        options["pair_margin"] = torch.randn(4, 4, requires_grad=True) if rng.random() < 0.4 else None
    else:
        index = torch.arange(rows)
        options["positive_index"] = (index + 1) % rows if itself else index % keys
    if options["denominator"] == "negatives" and rng.random() < 0.5:
        options["log_normalizer"] = torch.full((rows,), 5.0)
    query = torch.randn(rows, width).to(dtype).requires_grad_()
    temperature = (torch.rand(rows) + 0.2).requires_grad_()
    loss, _ = LF.contrastive_loss(query, key, temperature=temperature, return_stats=True, **options)
    loss.sum().backward()


def main() -> None:
    assert _build_info.description()["sanitize"], "this is not an instrumented build"
    rng = random.Random(0)
    torch.manual_seed(0)
    for rows, classes, dtype in itertools.product(ROWS, CLASSES, DTYPES):
        for _ in range(8):
            call(rng, rows, classes, dtype)
        call_linear(rng, rows, classes, dtype)
        for _ in range(4):
            call_contrastive(rng, rows, classes, dtype)
    torch.ops.ltkernels.log_prior(torch.arange(1, 34), 1.0)
    print("clean:", ", ".join(sorted(_ops.kernel_calls())))


if __name__ == "__main__":
    main()
