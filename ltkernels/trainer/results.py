"""The stored results of a table, ``TABLE-TIER.json``: what its runs on any machine have measured.

The file is part of the repository and the only thing that reports are made from. It has one line for each run, under
the hash of its recipe; floats have six significant digits, those of the recipe excepted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np
import torch

from ltkernels.trainer import TrainerError
from ltkernels.trainer.checkpoint import write_atomically
from ltkernels.trainer.image_recipes import Tier, load_recipe
from ltkernels.trainer.image_session import METRICS_FILE, RECIPE_FILE
from ltkernels.trainer.locks import folder_locked
from ltkernels.trainer.metrics import CALIBRATION_BINS, Outputs
from ltkernels.trainer.papers.elm_measures import measure
from ltkernels.trainer.posthoc import SETTINGS
from ltkernels.trainer.results_check import check_entry
from ltkernels.trainer.runfolder import read_json
from ltkernels.trainer.runlog import FEATURES_FILE, PREDICTIONS_FILE
from ltkernels.trainer.tables import PlannedRun, table_named

Results: TypeAlias = dict[str, Any]

RESULTS = Path("docs/reproduction/results")
DIGITS = 6
_ELM_TABLES = "elm-"


def results_file(table: str, tier: Tier) -> Path:
    """Where the results of a table are stored by default."""
    return RESULTS / f"{table}-{tier}.json"


# Of run folders


def collect(table: str, tier: Tier, runs: Path, unreadable: Callable[[TrainerError], None] | None = None) -> Results:
    """The results of the finished runs of a table.

    Args:
        table: Its name.
        tier: Of its runs.
        runs: Folder with the run folders.
        unreadable: Called with the error for each finished run whose files cannot be read; it is left out.

    Raises:
        TrainerError: an unknown table; without ``unreadable``, also a finished run whose files cannot be read.
    """
    entries = {}
    for planned in table_named(table).runs(tier):
        folder = runs / planned.name
        if not (folder / METRICS_FILE).is_file():
            continue
        try:
            entries[planned.recipe.hash] = entry(table, planned, folder)
        except TrainerError as error:
            if unreadable is None:
                raise
            unreadable(error)
    return {"table": table, "tier": tier, "runs": entries}


def entry(table: str, planned: PlannedRun, folder: Path) -> dict[str, Any]:
    """What is stored of a finished run.

    Raises:
        TrainerError: a file of the run cannot be read, or it is of another recipe.
    """
    metrics = read_json(folder / METRICS_FILE)
    check_hash(folder, metrics, planned)
    config = read_json(folder / "config.json")
    _, recipe = load_recipe(folder / RECIPE_FILE)
    both = config | metrics  # older runs have some values in one of them only
    try:
        finished = _finished(config, metrics)
        found = {
            "arm": planned.arm.label,
            "recipe": planned.arm.recipe,
            "recipe_fields": recipe.as_dict(),
            "seed": recipe.seed,
            "subset_seed": recipe.long_tail.subset_seed,
            "tier": recipe.tier,
            **{name: both[name] for name in ("counts", "last", "best", "seconds")},
            **{name: both[name] for name in ("train_fingerprint", "test_fingerprint", "device", "cpu", "threads")},
            "torch": config["versions"]["torch"],
            **{name: config.get(name) for name in ("revision", "processes", "parts")},  # older runs have none of them
            "date": finished.date().isoformat(),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise TrainerError(f"{folder}: not the files of a finished run ({type(error).__name__}: {error})") from error
    found["calibration"] = _calibration(_arrays(folder / PREDICTIONS_FILE, "confidence", "predicted", "target"))
    applied = {file.stem.removeprefix("posthoc-"): file for file in sorted(folder.glob("posthoc-*.json"))}
    found["post_hoc"] = {name: _fields(file, "scores") for name, file in applied.items()}
    found["post_hoc_settings"] = {
        name: {key: value for key, value in _fields(file, "settings").items() if key in SETTINGS.get(name, ())}
        for name, file in applied.items()
    }
    found["elm"] = _elm(folder) if table.startswith(_ELM_TABLES) else None
    exact = ("recipe_fields", "post_hoc_settings", "parts")
    found = {name: value if name in exact else _rounded(value) for name, value in found.items()}
    check_entry(str(folder), found)
    return found


def _finished(config: dict[str, Any], metrics: dict[str, Any]) -> datetime:
    started = datetime.fromisoformat(config["started"])
    if "finished" in metrics:
        return datetime.fromisoformat(metrics["finished"])
    return started + timedelta(seconds=metrics["seconds"])  # older runs: both are of the last part


def check_hash(folder: Path, metrics: dict[str, Any], planned: PlannedRun) -> None:
    """Compare the recipe that a run says it is of.

    Raises:
        TrainerError: it is another one.
    """
    if metrics.get("recipe_hash") != planned.recipe.hash:
        found = metrics.get("recipe_hash")
        raise TrainerError(f"{folder}: its run is of recipe {found}, expected {planned.recipe.hash}")


def _fields(file: Path, name: str) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content.get(name), dict):
        raise TrainerError(f"{file}: no {name} of a post-hoc method in it")
    return content[name]


def _arrays(file: Path, *names: str) -> list[np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as content:
            return [content[name] for name in names]
    except Exception as error:  # a damaged archive may fail in any way
        raise TrainerError(f"{file}: cannot be read ({type(error).__name__}: {error})") from error


def _calibration(arrays: list[np.ndarray]) -> dict[str, Any]:
    """Images, mean confidence and accuracy of equal bins of confidence; 0 for those of an empty bin."""
    confidence, predicted, target = arrays
    borders = torch.linspace(0, 1, CALIBRATION_BINS + 1).numpy()  # those of torchmetrics, so that the ECE is the same
    bins = np.clip(np.digitize(confidence, borders) - 1, 0, CALIBRATION_BINS - 1)
    count = np.bincount(bins, minlength=CALIBRATION_BINS)

    def means(values: np.ndarray) -> list[float]:
        return (np.bincount(bins, values, CALIBRATION_BINS) / np.maximum(count, 1)).tolist()

    return {
        "bins": CALIBRATION_BINS,
        "count": count.tolist(),
        "confidence": means(confidence.astype(np.float64)),
        "accuracy": means((predicted == target).astype(np.float64)),
    }


def _elm(folder: Path) -> dict[str, Any] | None:
    """ELM's measures; None for a run without embeddings, or one that they are not defined for."""
    if not (folder / FEATURES_FILE).is_file():
        return None
    names = ("train_embedding", "train_logits", "train_target", "test_embedding")
    *train, embedding = map(torch.from_numpy, _arrays(folder / FEATURES_FILE, *names))
    logits, target = map(torch.from_numpy, _arrays(folder / PREDICTIONS_FILE, "logits", "target"))
    try:
        # The arms of these tables have linear classifiers, the scale of whose logits is 1.
        return json.loads(measure(Outputs(*train), Outputs(embedding, logits, target)).to_json())
    except TrainerError:
        return None  # a network that collapsed is a result, too


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return value


# Files


def load(file: Path) -> Results:
    """Stored results.

    Raises:
        TrainerError: the file cannot be read, or is not one of results; the message says where.
    """
    content = read_json(file)
    if not isinstance(content.get("table"), str) or content.get("tier") not in get_args(Tier):
        raise TrainerError(f"{file}: no results of a table: table {content.get('table')}, tier {content.get('tier')}")
    runs = content.get("runs")
    if not isinstance(runs, dict):
        raise TrainerError(f"{file}: no results of a table, no runs in it")
    for name, values in runs.items():
        check_entry(f"{file}: runs.{name}", values)
    return content


def save(file: Path, results: Results) -> None:
    """Write results in the place of what the file holds; a reader sees the old ones or the new.

    Raises:
        TrainerError: a value that is not finite, or the file cannot be written; it is as it was.
    """
    try:
        lines = [
            f"{json.dumps(name)}: {json.dumps(values, allow_nan=False)}"
            for name, values in sorted(results["runs"].items())
        ]
    except ValueError as error:
        raise TrainerError(f"{file}: {error}") from error
    head = f'"table": {json.dumps(results["table"])}, "tier": {json.dumps(results["tier"])}, "runs"'
    text = f"{{{head}: {{\n" + ",\n".join(lines) + "\n}}\n"
    write_atomically(file, lambda stream: stream.write(text.encode()))


def merge(old: Results, new: Results) -> Results:
    """The runs of both. Where both have a run, the new one counts; what it lacks, the same run may have brought before.

    Raises:
        TrainerError: they are of two tables or tiers.
    """
    for name in ("table", "tier"):
        if old[name] != new[name]:
            raise TrainerError(f"{name}: the stored results are of {old[name]}, the new ones of {new[name]}")
    runs = dict(old["runs"])
    for name, values in new["runs"].items():
        before = runs.get(name)
        if before is not None and before["last"] == values["last"]:
            values = values | {
                "post_hoc": before["post_hoc"] | values["post_hoc"],
                "post_hoc_settings": {
                    name: settings
                    for run in (before, values)
                    for name, settings in (run.get("post_hoc_settings") or {}).items()
                    if run is values or name not in values["post_hoc"]
                },
                "elm": values["elm"] or before["elm"],
            }
        runs[name] = values
    return {**new, "runs": runs}


def store(file: Path, new: Results) -> Results:
    """Merge results into a file, which two processes may do at once. Returns what the file holds then.

    Raises:
        TrainerError: the file is damaged or of another table, or it cannot be written; it is as it was.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainerError(f"cannot make the folder {file.parent}: {error.strerror}") from error
    with folder_locked(file.parent):
        old = load(file) if file.exists() else None
        merged = new if old is None else merge(old, new)
        if merged != old and merged["runs"]:  # a file without runs is of no use
            save(file, merged)
    return merged
