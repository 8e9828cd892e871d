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


def main() -> None:
    assert _build_info.description()["sanitize"], "this is not an instrumented build"
    rng = random.Random(0)
    torch.manual_seed(0)
    for rows, classes, dtype in itertools.product(ROWS, CLASSES, DTYPES):
        for _ in range(8):
            call(rng, rows, classes, dtype)
    print("clean:", ", ".join(sorted(_ops.kernel_calls())))


if __name__ == "__main__":
    main()
