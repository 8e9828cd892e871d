"""Made-up results of tables, in the form that they are stored in."""

import dataclasses
import json
import re

import numpy as np
import torch
from rich.console import Console

from ltkernels.trainer import results
from ltkernels.trainer.data.longtail import class_counts
from ltkernels.trainer.metrics import CALIBRATION_BINS, harmonic_mean, shot_group
from ltkernels.trainer.papers.elm_measures import ElmMeasures
from ltkernels.trainer.reproduction import elm as elm_page
from ltkernels.trainer.reproduction import plots
from ltkernels.trainer.reproduction.command import ReportOptions, run_report
from ltkernels.trainer.tables import TABLES

CLASSES = {"cifar100": 100, "cifar10": 10, "fashion-mnist": 10}


def scores(per_class, counts, step, ece):
    groups = {
        group: [a for a, n in zip(per_class, counts, strict=True) if shot_group(n) == group]
        for group in ("many", "medium", "few")
    }
    return {
        "step": step,
        "epoch": 40.0,
        "lr": 1e-5,
        "train_loss": 0.5,
        "overall": float(np.mean(per_class)),
        **{group: float(np.mean(values)) if values else None for group, values in groups.items()},
        "worst_class": min(per_class),
        "harmonic_mean": harmonic_mean(per_class),
        "ece": ece,
        "per_class": list(per_class),
    }


def curve(counts, level, tail, noise):
    """Accuracies that fall with the images of a class; ``tail`` lifts the rare ones."""
    rank = np.linspace(0, 1, len(counts))
    values = level + 30 * (0.5 - rank) * (1 - tail) + noise.normal(0, 6, len(counts))
    return [float(np.clip(value, 0, 100)) for value in values]


def calibration(noise):
    count = [int(n) for n in noise.integers(5, 900, CALIBRATION_BINS)]
    count[0] = 0
    confidence = [(k + 0.5) / CALIBRATION_BINS for k in range(CALIBRATION_BINS)]
    accuracy = [0.6 * value for value in confidence]
    confidence[0] = accuracy[0] = 0.0
    return {"bins": CALIBRATION_BINS, "count": count, "confidence": confidence, "accuracy": accuracy}


def elm(counts, spread, noise):
    classes = len(counts)
    draw = {
        name: torch.tensor(noise.uniform(0.9, 1.1, classes) * np.linspace(1, 2, classes))
        for name in ElmMeasures.names()
    }
    draw["relative_spread"] *= spread
    return ElmMeasures(class_counts=torch.tensor(counts), **draw)


def run(planned, level, tail, *, seconds=570.0, post_hoc=(), measured=None):
    """A stored run of a table: its accuracy is near ``level``, and the better for rare classes the larger ``tail``."""
    recipe = planned.recipe
    long_tail = recipe.long_tail
    counts = class_counts(CLASSES[recipe.dataset], long_tail.max_count, long_tail.imbalance_factor, long_tail.profile)
    # The same noise for runs that are paired, so that pairs differ by less than seeds do.
    noise = np.random.default_rng(1000 * long_tail.subset_seed + recipe.seed)
    last = scores(curve(counts, level, tail, noise), counts, recipe.steps, 35.0 - 10 * tail)
    best = scores([min(100.0, value + 1) for value in last["per_class"]], counts, recipe.steps - 850, 34.0)
    values = {
        "arm": planned.arm.label,
        "recipe": planned.arm.recipe,
        "recipe_fields": recipe.as_dict(),
        "seed": recipe.seed,
        "subset_seed": long_tail.subset_seed,
        "tier": recipe.tier,
        "counts": list(counts),
        "last": last,
        "best": best,
        "seconds": seconds,
        "train_fingerprint": f"{long_tail.subset_seed:02d}" + "a" * 62,
        "test_fingerprint": "b" * 64,
        "device": "cpu",
        "cpu": "Some Processor",
        "threads": 2,
        "torch": "2.13.0",
        "date": "2026-11-21",
        "calibration": calibration(noise),
        "post_hoc": {
            name: scores(curve(counts, level + 3, 0.8, noise), counts, recipe.steps, 20.0) for name in post_hoc
        },
        "elm": None if measured is None else json.loads(elm(counts, measured, noise).to_json()),
    }
    return recipe.hash, values


def planned(table, tier, arms=None, seeds=None, subset_seeds=None):
    """Runs of a table, of some arms (by the method of their recipe), seeds and subsets."""
    chosen = dataclasses.replace(
        TABLES[table],
        seeds=TABLES[table].seeds if seeds is None else tuple(seeds),
        subset_seeds=TABLES[table].subset_seeds if subset_seeds is None else tuple(subset_seeds),
    )
    return [found for found in chosen.runs(tier) if arms is None or found.recipe.method in arms]


def save(folder, table, tier, runs):
    folder.mkdir(parents=True, exist_ok=True)
    results.save(folder / f"{table}-{tier}.json", {"table": table, "tier": tier, "runs": dict(runs)})


LEVELS = {"ce": (38.0, 0.0), "ldam-drw": (42.0, 0.6), "vs": (43.0, 0.8), "logit-adjustment": (43.5, 0.9)}


def supervised(folder, table="supervised-cifar100", tier="short", arms=None, seeds=None, subset_seeds=(0,), shift=0.0):
    """Store a supervised table of made-up runs, of one subset unless told, and return them by their hashes."""
    runs = {}
    for found in planned(table, tier, arms, seeds, subset_seeds):
        level, tail = LEVELS.get(found.recipe.method, (40.0, 0.3))
        post_hoc = ("logit-adjustment", "tau-norm") if found.recipe.method == "ce" else ()
        name, values = run(found, level + shift, tail, post_hoc=post_hoc)
        runs[name] = values
    save(folder, table, tier, runs)
    return runs


ELM_LEVELS = {
    "two-view-ce": (38.0, 0.0, 1.3),
    "two-view-logit-adjustment": (43.0, 0.9, 1.0),
    "elm": (43.4, 0.9, 0.8),
}


def elm_table(folder, table="elm-cifar100", tier="short", arms=None, seeds=None, subset_seeds=None):
    """Store a table of ELM with measures."""
    runs = {}
    for found in planned(table, tier, arms, seeds, subset_seeds):
        level, tail, spread = ELM_LEVELS[found.recipe.method]
        name, values = run(found, level, tail, measured=spread)
        runs[name] = values
    save(folder, table, tier, runs)
    return runs


def elm_tuning(folder, best=0.3, table="elm-tuning-cifar100", tier="short", without=(), best_tau=1.5):
    """Store a tuning table whose best weight is ``best`` and best tau of the baseline ``best_tau``."""
    runs = {}
    for found in planned(table, tier):
        settings = found.recipe.settings
        value = getattr(settings, "weight", settings.tau)
        wanted = best if hasattr(settings, "weight") else best_tau
        if value not in without:
            name, values = run(found, 40.0 + (2.0 if value == wanted else 0.0), 0.9)
            runs[name] = values
    save(folder, table, tier, runs)
    return runs


# Reports of them


# Half widths of the 95 % intervals by hand: 2.5706 (t, five degrees of freedom) * std / sqrt(6).
DIFFERENCES = {
    "supported": ((1.0, 2.0, 3.0, 4.0, 5.0, 6.0), "[+1.54, +5.46]"),
    "worse": ((-1.0, -2.0, -3.0, -4.0, -5.0, -6.0), "[-5.46, -1.54]"),
    "not worse": ((-0.1, 0.1, -0.1, 0.1, -0.1, 0.1), "[-0.11, +0.11]"),
    "inconclusive": ((-3.0, 3.0, -3.0, 3.0, -3.0, 3.0), "[-3.45, +3.45]"),
}


def without_pictures(monkeypatch):
    """Without the time that pictures take."""
    for module, name in (
        (plots, "per_class_picture"),
        (plots, "reliability_picture"),
        (elm_page, "spread_picture"),
        (elm_page, "projection_picture"),
    ):
        monkeypatch.setattr(module, name, lambda *arguments: b"a picture")


def report(tmp_path, **options):
    options = ReportOptions(results=tmp_path / "results", out=tmp_path / "out", **options)
    assert run_report(options, Console(quiet=True)) == 0
    return (tmp_path / "out" / "supervised.md").read_text(), (tmp_path / "out" / "elm.md").read_text()


def rows(text, first_heading="method"):
    """Rows of the first table with this first heading, as dictionaries."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_heading} |"))
    headings = [cell.strip() for cell in lines[start].strip("|").split("|")]
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append(dict(zip(headings, (cell.strip() for cell in line.strip("|").split("|")), strict=True)))
    return found


def parts(text):
    """The sections of a page by their headings."""
    found = re.split(r"^## (.+)$", text, flags=re.M)
    return dict(zip(found[1::2], found[2::2], strict=True))
