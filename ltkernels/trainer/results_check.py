"""Whether an entry of stored results is what a finished run leaves: fields, types, lengths, finite numbers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ltkernels.trainer import TrainerError
from ltkernels.trainer.metrics import Scores

# Values of an entry: their types, and the words for those.
FIELDS: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("arm", "recipe", "tier", "train_fingerprint", "test_fingerprint"), ((str,), "text")),
    **dict.fromkeys(("device", "cpu", "torch", "date"), ((str,), "text")),
    **dict.fromkeys(("seed", "subset_seed", "threads"), ((int,), "an integer")),
    **dict.fromkeys(("recipe_fields", "last", "best", "calibration", "post_hoc"), ((dict,), "fields")),
    "counts": ((list,), "a list"),
    "seconds": ((int, float), "a number"),
    "elm": ((dict, type(None)), "fields or null"),
}
# Those that results stored by older versions do not have.
LATER_FIELDS: dict[str, tuple[tuple[type, ...], str]] = {
    "revision": ((str, type(None)), "text or null"),
    "processes": ((int, type(None)), "an integer or null"),
    "post_hoc_settings": ((dict, type(None)), "fields or null"),
    "parts": ((list, type(None)), "a list or null"),
}
_GROUPS = ("many", "medium", "few")  # null where a group has no class
_CALIBRATION = ("count", "confidence", "accuracy")


def check_entry(where: str, values: Any) -> None:
    """``where`` names the entry in errors.

    Raises:
        TrainerError: a field is missing, or its value makes no sense; the message says which, and what was expected.
    """
    _check_type(where, values, (dict,), "fields")
    for name, (kinds, words) in FIELDS.items():
        _check_type(f"{where}.{name}", _field(where, values, name), kinds, words)
    for name, (kinds, words) in LATER_FIELDS.items():
        _check_type(f"{where}.{name}", values.get(name), kinds, words)
    for number, part in enumerate(values.get("parts") or ()):
        _check_type(f"{where}.parts[{number}]", part, (dict,), "fields")
        for name in ("device", "cpu", "threads", "torch"):
            _field(f"{where}.parts[{number}]", part, name)
    _check_number(f"{where}.seconds", values["seconds"])
    classes = len(values["counts"])
    _check_numbers(f"{where}.counts", values["counts"], classes)
    for name in ("last", "best"):
        _check_scores(f"{where}.{name}", values[name], classes)
    for name, scores in values["post_hoc"].items():
        _check_scores(f"{where}.post_hoc.{name}", scores, classes)
    if calibration := values["calibration"]:
        bins = _field(f"{where}.calibration", calibration, "bins")
        for name in _CALIBRATION:
            _check_numbers(f"{where}.calibration.{name}", _field(f"{where}.calibration", calibration, name), bins)


def _check_scores(where: str, scores: Any, classes: int) -> None:
    _check_type(where, scores, (dict,), "fields")
    for name in (field.name for field in dataclasses.fields(Scores)):
        value = _field(where, scores, name)
        if name == "per_class":
            _check_numbers(f"{where}.{name}", value, classes)
        elif value is not None or name not in _GROUPS:
            _check_number(f"{where}.{name}", value)


def _field(where: str, values: dict[str, Any], name: str) -> Any:
    if name not in values:
        raise TrainerError(f"{where}: no field {name!r}")
    return values[name]


def _check_type(where: str, value: Any, kinds: tuple[type, ...], words: str) -> None:
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise TrainerError(f"{where}: expected {words}, got {type(value).__name__}")


def _check_number(where: str, value: Any) -> None:
    _check_type(where, value, (int, float), "a number")
    if not math.isfinite(value):
        raise TrainerError(f"{where}: expected a finite number, got {value}")


def _check_numbers(where: str, values: Any, length: Any) -> None:
    _check_type(where, values, (list,), "a list")
    if len(values) != length:
        raise TrainerError(f"{where}: expected {length} numbers, got {len(values)}")
    for value in values:
        _check_number(where, value)
