"""Tables, sentences and files, from made-up runs."""

import csv
import io

import pytest

pytest.importorskip("lightning_fabric", reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")

from rich.console import Console  # noqa: E402

from ltkernels.trainer import report  # noqa: E402
from ltkernels.trainer.engine import Evaluation, Run  # noqa: E402
from ltkernels.trainer.metrics import Scores  # noqa: E402
from ltkernels.trainer.report import Results  # noqa: E402

COUNTS = (120, 40, 8)
TITLES = {"ce": "CE", "logit_adjustment": "logit adj.", "vs": "VS"}


def run(method, seed, few, overall=80.0):
    scores = Scores(overall, 99.0, 90.0, few, few, 70.0, 5.0, (99.0, 90.0, few))
    early = Scores(overall + 7, 99.0, 90.0, few, few, 70.0, 5.0, (99.0, 90.0, few))
    return Run(method, seed, (Evaluation(10, 0.5, early), Evaluation(20, 0.25, scores)), 1.5)


@pytest.fixture
def results():
    runs = []
    for seed in range(6):
        runs += [run("ce", seed, 50.0 + seed), run("logit_adjustment", seed, 60.0 + seed + 0.1 * (seed % 2))]
        runs += [run("vs", seed, 50.0 + seed + (2.0 if seed % 2 else -2.0))]
    return Results(tuple(runs), TITLES, COUNTS)


def test_rows(results):
    headings, rows = report.table_rows(results)
    assert headings == [
        *("method", "overall", "many", "medium", "few", "worst class", "harm. mean", "ECE", "few - CE, paired", ">2 SE")
    ]
    assert [row[0] for row in rows] == ["CE", "logit adj.", "VS"]
    assert rows[0] == [
        "CE",
        "80.0 ±0.0",
        "99.0 ±0.0",
        "90.0 ±0.0",
        "52.5 ±1.9",
        "52.5 ±1.9",
        "70.0 ±0.0",
        "5.0 ±0.0",
    ] + [
        "-",
        "-",
    ]
    assert rows[1][-2:] == ["+10.0 (SE 0.0)", "yes"]
    assert rows[2][-2:] == ["+0.0 (SE 0.9)", "no"]


def test_sentences_say_which_method_is_not_above(results):
    adjusted, scaled = report.verdicts(results)
    assert adjusted.startswith("logit adj.: +10.0 points, standard error 0.0, 95 % interval [+10.0, +10.1], 6 pairs")
    assert ": above CE by more than two standard errors" in adjusted and "supported" in adjusted
    assert scaled.startswith("VS:") and "**not** above CE by more than two standard errors" in scaled
    assert "inconclusive" in scaled


def test_only_seeds_of_both_methods_are_paired(results):
    more = results.with_run(run("vs", 6, 100.0))
    assert more.paired_tail("vs") == results.paired_tail("vs")
    assert report.seeds_phrase(results) == "6 seeds"
    assert report.seeds_phrase(more) == "6 to 7 seeds"


def test_no_tail_and_no_pairs_say_so(results):
    no_tail = Results(results.runs, TITLES, (120, 40, 30))
    assert "no class has fewer than 20" in report.verdict(no_tail, "vs")
    single = Results(results.runs[:3], TITLES, COUNTS)
    assert "no verdict" in report.verdict(single, "vs")
    assert report.table_rows(single)[1][2][-2:] == ["-", "-"]
    without_baseline = Results(tuple(r for r in results.runs if r.method != "ce"), TITLES, COUNTS)
    assert "no verdict" in report.verdict(without_baseline, "vs")


def test_cells():
    assert report.mean_and_std([None, None]) == "-"
    assert report.mean_and_std([50.0]) == "50.0"
    assert report.mean_and_std([50.0, 52.0]) == "51.0 ±1.4"


def test_groups_sentence():
    assert report.groups_sentence((120, 40, 30)) == (
        "many (> 100 images): class 0; medium (20..100 images): classes 1, 2; few (< 20 images): none"
    )


def test_metrics_csv_has_a_row_for_each_evaluation(results):
    rows = list(csv.DictReader(io.StringIO(report.metrics_csv(results))))
    assert len(rows) == 2 * len(results.runs)
    last = [row for row in rows if row["is_last"] == "1"]
    assert len(last) == len(results.runs) and {row["epoch"] for row in last} == {"20"}
    assert rows[1] == {
        **{"method": "ce", "seed": "0", "epoch": "20", "is_last": "1", "train_loss": "0.250000", "overall": "80.0000"},
        **{"many": "99.0000", "medium": "90.0000", "few": "50.0000", "worst_class": "50.0000"},
        **{"harmonic_mean": "70.0000", "ece": "5.0000", "run_seconds": "1.500"},
    }


def test_per_class_csv(results):
    rows = list(csv.DictReader(io.StringIO(report.per_class_csv(results))))
    assert len(rows) == 3 * len(results.runs)
    assert rows[2] == {"method": "ce", "seed": "0", "class": "2", "train_images": "8", "accuracy": "50.0000"}


@pytest.mark.parametrize("width", [80, 140])
def test_no_column_of_the_terminal_table_is_cut_off(results, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report.terminal_table(results, width))
    words = console.export_text().split()
    for word in ("method", "overall", "medium", "ECE", "SE", "logit", "VS", "80.0", "±1.9", "yes", "no"):
        assert word in words
    assert "…" not in "".join(words)


def test_picture(results):
    png = report.per_class_picture(results)
    assert png.startswith(b"\x89PNG") and len(png) > 10_000
    assert report.per_class_picture(Results(results.runs[:1], TITLES, COUNTS)).startswith(b"\x89PNG")  # no spread
