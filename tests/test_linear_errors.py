"""Bad calls of the linear form: which exception, and that its message names the argument.

The last test runs this file once more on the plain-torch backend.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ltkernels.functional as LF
from ltkernels.neighbors import NeighborMap

N, D, C = 20, 4, 7
NEIGHBORS = NeighborMap.from_pairs([(0, 4), (1, 5), (2, 6)], num_classes=4, num_auxiliary=3)
LONG = {"dtype": torch.long}


def arguments(**change: object) -> dict:
    generator = torch.Generator().manual_seed(0)
    good = {"input": torch.randn(N, D, generator=generator), "linear_weight": torch.randn(C, D, generator=generator)}
    return good | {"target": torch.arange(N) % C, "chunk_size": 6} | change


def changed(x: Tensor, index: int, value: float) -> Tensor:
    x = x.clone()
    x[index] = value
    return x


TARGET, PROBABILITIES = torch.arange(N) % C, torch.full((N, C), 1 / C)
# What is changed in a good call, the exception, and words of its message.
BAD: list[tuple[dict, type[Exception], tuple[str, ...]]] = [
    *(({"chunk_size": x}, ValueError, ("chunk_size", repr(x))) for x in (0, -1, True, 1.5, "big", None, [3], -(2**70))),
    *(({"cosine": x}, TypeError, ("cosine", type(x).__name__)) for x in (1, "yes", None, torch.tensor(True))),
    *(({name: 1}, TypeError, (name, "expected a bool", "int")) for name in ("return_lse", "return_stats")),
    *(
        ({name: torch.ones(shape).to_sparse()}, TypeError, (name, "expected a dense tensor", "sparse"))
        for name, shape in {"input": (N, D), "linear_weight": (C, D), "linear_bias": (C,), "weight": (C,)}.items()
    ),
    ({"target": torch.ones(N, C).to_sparse()}, TypeError, ("target", "expected a dense tensor", "sparse")),
    ({"scale": 10**400}, ValueError, ("scale", "expected a finite number", "too large")),
    ({"scale": 1e-50}, ValueError, ("scale", "above 0 in float32", "1e-50")),
    ({"ignore_index": 2**70}, ValueError, ("ignore_index", "expected an int of 64 bits")),
    ({"cosine": True, "linear_bias": torch.ones(C)}, ValueError, ("linear_bias", "cosine")),
    ({"linear_bias": torch.ones(C + 1)}, ValueError, ("linear_bias", f"({C},)", f"{C + 1}")),
    ({"linear_bias": torch.ones(1, C)}, ValueError, ("linear_bias", f"({C},)")),
    ({"linear_bias": torch.ones(C, **LONG)}, TypeError, ("linear_bias", "floating")),
    ({"linear_bias": torch.ones(C, device="meta")}, ValueError, ("linear_bias", "meta")),
    ({"linear_bias": 1.0}, TypeError, ("linear_bias", "float")),
    ({"input": torch.ones(N, D + 1)}, ValueError, ("input, linear_weight", f"({N}, {D + 1})", f"({C}, {D})")),
    ({"input": torch.ones(())}, ValueError, ("input, linear_weight",)),
    ({"input": torch.ones(N, D).double()}, TypeError, ("linear_weight",)),
    ({"input": torch.ones(N, D).bfloat16()}, TypeError, ("linear_weight",)),
    ({"input": [1.0]}, TypeError, ("input", "list")),
    ({"input": torch.ones(N, D, **LONG), "linear_weight": torch.ones(C, D, **LONG)}, TypeError, ("input", "float16")),
    ({"linear_weight": torch.ones(D)}, ValueError, ("input, linear_weight",)),
    ({"linear_weight": torch.ones(C, D, 1)}, ValueError, ("input, linear_weight",)),
    ({"linear_weight": torch.ones(0, D), "target": torch.zeros(N, **LONG)}, ValueError, ("at least one class",)),
    ({"linear_weight": torch.ones(0, D), "target": torch.zeros(N, 0)}, ValueError, ("at least one class",)),
    ({"linear_weight": torch.ones(C, D, device="meta")}, ValueError, ("linear_weight", "meta")),
    ({"linear_weight": None}, TypeError, ("linear_weight", "NoneType")),
    ({"target": changed(TARGET, 13, C)}, IndexError, ("target", f"[0, {C})", f"got {C} at row 13")),
    ({"target": changed(TARGET, 19, -1)}, IndexError, ("target", "got -1 at row 19")),
    ({"target": changed(TARGET, 7, -100), "ignore_index": 0}, IndexError, ("target", "got -100 at row 7")),
    ({"target": TARGET[:-1]}, ValueError, ("target", f"({N},)", f"({N - 1},)")),
    ({"target": TARGET[:, None]}, ValueError, ("target", f"({N},)")),
    ({"target": PROBABILITIES[:, 1:]}, ValueError, ("target", f"({N}, {C})")),
    ({"target": PROBABILITIES[0]}, ValueError, ("target", f"({N}, {C})")),
    ({"target": TARGET > 2}, TypeError, ("target", "integer dtype")),
    ({"target": 3}, TypeError, ("target", "int")),
    ({"target": PROBABILITIES.clone().requires_grad_()}, ValueError, ("target", "require grad")),
    ({"target": PROBABILITIES, "pairwise_margin": torch.ones(C, C)}, ValueError, ("pairwise_margin", "indices")),
    ({"mask": torch.ones(C + 1, dtype=torch.bool)}, ValueError, ("mask",)),
    ({"mask": torch.ones(N - 1, C, dtype=torch.bool)}, ValueError, ("mask", f"({N}, {C})")),
    ({"mask": torch.ones((), dtype=torch.bool)}, ValueError, ("mask",)),
    ({"mask": torch.ones(C)}, TypeError, ("mask", "bool")),
    *(
        ({name: torch.ones(C + 1)}, ValueError, (name, f"({C},)"))
        for name in ("weight", "logit_scale", "logit_bias", "target_margin")
    ),
    *(({name: [1.0]}, TypeError, (name, "list")) for name in ("weight", "logit_scale", "mask", "sample_weight")),
    ({"pairwise_margin": torch.ones(C)}, ValueError, ("pairwise_margin", f"({C}, {C})")),
    ({"sample_weight": torch.ones(C)}, ValueError, ("sample_weight", f"({N},)")),
    ({"weight": torch.ones(C, requires_grad=True)}, ValueError, ("weight", "not supported")),
    ({"logit_bias": changed(torch.ones(C), 3, torch.nan)}, ValueError, ("logit_bias", "nan at index 3")),
    ({"target_margin": changed(torch.ones(C), 2, torch.inf)}, ValueError, ("target_margin", "inf at index 2")),
    ({"reduction": "average"}, ValueError, ("reduction", "'average'")),
    ({"reduction": None}, ValueError, ("reduction", "None")),
    *(({"scale": s}, ValueError, ("scale", "above 0")) for s in (0.0, -1.0, torch.inf)),
    ({"scale": torch.ones(2)}, ValueError, ("scale", "0-d")),
    ({"scale": "2"}, TypeError, ("scale", "str")),
    ({"label_smoothing": 1.5}, ValueError, ("label_smoothing", "[0, 1]")),
    ({"ignore_index": 1.5}, TypeError, ("ignore_index", "float")),
]
BAD_AUXILIARY: list[tuple[dict, type[Exception], tuple[str, ...]]] = [
    *(({"neighbor_weight": x}, ValueError, ("neighbor_weight", "[0, 1]")) for x in (-0.1, 1.1, torch.nan)),
    ({"neighbor_weight": "0"}, TypeError, ("neighbor_weight", "str")),
    ({"mode": "back", "neighbor_weight": 0.1}, ValueError, ("mode 'back'", "neighbor_weight=0")),
    ({"mode": "sideways"}, ValueError, ("mode", "sideways")),
    ({"neighbors": None}, TypeError, ("neighbors", "NoneType")),
    ({"neighbors": NeighborMap.from_pairs([(0, 4)], num_classes=4, num_auxiliary=2)}, ValueError, ("neighbors", "7")),
    ({"prior_counts": torch.ones(C - 1)}, ValueError, ("prior_counts", f"({C},)")),
    ({"prior_counts": changed(torch.ones(C), 2, 0)}, ValueError, ("prior_counts", "above 0", "class 2")),
    ({"row_class": TARGET}, ValueError, ("row_class", "probabilities")),
    ({"target": PROBABILITIES}, ValueError, ("row_class", "probabilities")),
    ({"target": PROBABILITIES, "row_class": TARGET[1:]}, ValueError, ("row_class", f"({N},)")),
    ({"target": PROBABILITIES, "row_class": TARGET.float()}, TypeError, ("row_class", "integer")),
    ({"target": PROBABILITIES, "row_class": changed(TARGET, 17, C)}, IndexError, ("row_class", f"got {C} at row 17")),
]


def describe(value: object) -> str | None:
    if not isinstance(value, dict):
        return ""
    return "-".join(f"{k}={tuple(v.shape) if isinstance(v, Tensor) else str(v)[:20]}" for k, v in value.items())


def raises(function: Callable, given: dict, exception: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(exception) as error:
        function(**given)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"


@pytest.mark.parametrize("gradient", [False, True], ids=["no_gradient", "gradient"])
@pytest.mark.parametrize(("change", "exception", "words"), BAD, ids=describe)
def test_bad_call(change: dict, exception: type[Exception], words: tuple[str, ...], gradient: bool) -> None:
    given = arguments(**change)
    if gradient and isinstance(given["input"], Tensor) and given["input"].is_floating_point():
        given["input"] = given["input"].clone().requires_grad_()
    raises(LF.linear_margin_cross_entropy, given, exception, words)
    raises(LF.linear_auxiliary_cross_entropy, {"neighbors": NEIGHBORS} | given, exception, words)


@pytest.mark.parametrize(("change", "exception", "words"), BAD_AUXILIARY, ids=describe)
def test_bad_auxiliary_call(change: dict, exception: type[Exception], words: tuple[str, ...]) -> None:
    raises(LF.linear_auxiliary_cross_entropy, {"neighbors": NEIGHBORS} | arguments(**change), exception, words)


def test_good_calls() -> None:
    """The calls above are bad for one reason only."""
    assert LF.linear_margin_cross_entropy(**arguments()).isfinite()
    assert LF.linear_auxiliary_cross_entropy(neighbors=NEIGHBORS, **arguments()).isfinite()
    with torch.no_grad():
        LF.linear_margin_cross_entropy(**arguments(weight=torch.ones(C, requires_grad=True)))


def test_shapes_of_more_dimensions() -> None:
    """Errors name the shapes as they were given."""
    x, w, y = torch.ones(2, 3, D), torch.ones(C, D), torch.zeros(2, 3, dtype=torch.long)
    raises(LF.linear_margin_cross_entropy, {"input": x, "linear_weight": w, "target": y[0]}, ValueError, ("(2, 3)",))
    mask = torch.ones(3, C, dtype=torch.bool)
    given = {"input": x, "linear_weight": w, "target": y, "mask": mask}
    raises(LF.linear_margin_cross_entropy, given, ValueError, ("mask", f"(2, 3, {C})", f"(3, {C})"))


@pytest.mark.skipif(os.environ.get("LTKERNELS_BACKEND") == "reference", reason="runs this file")
def test_reference_gives_the_same_errors(run_python: Callable[..., str]) -> None:
    assert " passed" in run_python("-m", "pytest", "-q", str(Path(__file__)), LTKERNELS_BACKEND="reference")
