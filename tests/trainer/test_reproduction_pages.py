"""The pages of docs/reproduction, from made-up results of tables."""

import dataclasses
import io
import json
import re
import statistics

import numpy as np
import pytest

pytest.importorskip("lightning_fabric", reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")

import stored_results as stored  # noqa: E402
from rich.console import Console  # noqa: E402
from stored_results import parts, report, rows  # noqa: E402

from ltkernels.trainer import TrainerError  # noqa: E402
from ltkernels.trainer.cli import main  # noqa: E402
from ltkernels.trainer.reproduction import plots, published, supervised  # noqa: E402
from ltkernels.trainer.reproduction.command import ReportOptions, run_report  # noqa: E402
from ltkernels.trainer.reproduction.inputs import Inputs  # noqa: E402
from ltkernels.trainer.reproduction.page import evaluations  # noqa: E402
from ltkernels.trainer.tables import TABLES  # noqa: E402

# Typed from the sources: dataset, profile, imbalance factor, method, source, accuracy, standard deviation.
REPORTED = """
cifar100 exp 100 ce a 38.06 1.03        cifar100 exp 10 ce a 56.73 0.12         cifar100 step 100 ce a 38.74 0.13
cifar10 exp 100 ce a 71.25 0.10         cifar10 exp 10 ce a 86.74 0.19          cifar10 step 100 ce a 64.81 1.22
cifar100 exp 100 ldam-drw a 42.73 0.28  cifar100 exp 10 ldam-drw a 57.75 0.54   cifar100 step 100 ldam-drw a 46.01 0.16
cifar10 exp 100 ldam-drw a 77.97 0.17   cifar10 exp 10 ldam-drw a 87.96 0.16    cifar10 step 100 ldam-drw a 78.27 0.44
cifar100 exp 100 vs a 42.67 0.48        cifar100 exp 10 vs a 58.50 0.21         cifar100 step 100 vs a 46.74 0.47
cifar10 exp 100 vs a 80.29 0.23         cifar10 exp 10 vs a 88.74 0.24          cifar10 step 100 vs a 80.19 0.09
cifar10 exp 100 ce b 71.95 -            cifar100 exp 100 ce b 37.73 -
cifar10 exp 100 ldam-drw b 77.73 -      cifar100 exp 100 ldam-drw b 42.47 -
cifar10 exp 100 cdt b 77.10 -           cifar100 exp 100 cdt b 39.59 -
cifar10 exp 100 balanced-softmax b 77.54 -  cifar100 exp 100 balanced-softmax b 42.99 -
cifar10 exp 100 class-balanced b 70.48 -    cifar100 exp 100 class-balanced b 38.97 -
cifar10 exp 100 focal b 71.56 -             cifar100 exp 100 focal b 37.22 -
cifar10 exp 100 ldam b 73.66 -              cifar100 exp 100 ldam b 38.88 -
cifar10 exp 100 ce-mixup b 74.06 -          cifar100 exp 100 ce-mixup b 40.82 -
cifar10 exp 100 ce+tau-norm b 72.70 -       cifar100 exp 100 ce+tau-norm b 40.96 -
cifar10 exp 100 ce+crt b 74.99 -            cifar100 exp 100 ce+crt b 40.26 -
cifar10 exp 100 ce+lws b 72.63 -            cifar100 exp 100 ce+lws b 40.16 -
cifar10 exp 100 ce c 71.36 -            cifar100 exp 100 ce c 39.87 -
cifar10 exp 100 ce+logit-adjustment c 77.32 -   cifar100 exp 100 ce+logit-adjustment c 44.07 -
cifar10 exp 100 logit-adjustment c 77.89 -      cifar100 exp 100 logit-adjustment c 44.06 -
"""


@pytest.fixture
def quick(monkeypatch):
    stored.without_pictures(monkeypatch)


# Reported numbers


def test_reported_numbers_are_those_of_the_sources():
    cells = REPORTED.split()
    expected = {tuple(cells[i : i + 7]) for i in range(0, len(cells), 7)}
    found = {
        (
            *(setting.dataset, setting.profile, f"{setting.imbalance_factor:g}", method, number.source.letter),
            *(f"{number.mean:.2f}", "-" if number.std is None else f"{number.std:.2f}"),
        )
        for setting in published.settings()
        for method in published.methods(setting)
        for number in published.reported(setting, method)
    }
    assert found == expected


def test_tolerance_is_two_deviations_but_at_least_a_point():
    numbers = {n.source.letter: n for n in published.reported(published.CIFAR100_EXP100, "ce")}
    assert numbers["a"].tolerance == pytest.approx(2.06) and numbers["b"].tolerance is None
    assert published.reported(published.CIFAR10_EXP100, "ce")[0].tolerance == 1.0


def test_converted_numbers_and_other_conditions_are_labelled(tmp_path, quick):
    stored.supervised(tmp_path / "results", seeds=(0,), arms=("ce",))
    page, _ = report(tmp_path)
    assert "38.06 ±1.03 (a); 37.73 (b); 39.87 (c)" in page
    assert re.search(r"- \(b\) \[.*Bag of Tricks.*\]\(https://\S+\): .*converted here to accuracy", page)
    assert re.search(r"- \(c\) \[official code of logit adjustment\]\(https://\S+\): 1,419 epochs", page)
    assert re.search(r"> - \(a\) DDC repository does not say whether", page)
    cells = {
        (setting.dataset, method): published.reported(setting, method)[-1].cell
        for setting in (published.CIFAR10_EXP100, published.CIFAR100_EXP100)
        for method in ("class-balanced", "focal", "ce-mixup", "ldam")
    }
    assert cells == {  # what is not the method of that name here
        ("cifar10", "class-balanced"): "70.48 (b)",
        ("cifar10", "focal"): "71.56 (b, sigmoids, gamma 2)",
        ("cifar10", "ce-mixup"): "74.06 (b, 400 epochs)",
        ("cifar10", "ldam"): "73.66 (b)",
        ("cifar100", "class-balanced"): "38.97 (b, beta 0.9)",
        ("cifar100", "focal"): "37.22 (b, sigmoids, gamma 2)",
        ("cifar100", "ce-mixup"): "40.82 (b, 400 epochs)",
        ("cifar100", "ldam"): "38.88 (b)",
    }


# The supervised page


def test_numbers_of_the_page_are_those_of_the_runs(tmp_path, quick):
    arms = ("ce", "vs", "focal")
    results = stored.supervised(tmp_path / "results", arms=arms, subset_seeds=(0, 1))
    page, _ = report(tmp_path)
    table = {row["method"]: row for row in rows(page)}
    assert list(table) == ["CE", "CE + tau-norm", "CE + post-hoc logit adj.", "VS", "focal"]
    for title in ("CE", "VS", "focal"):
        of_arm = [run for run in results.values() if run["arm"] == title]
        assert len(of_arm) == 6
        for heading, epoch, name, digits in (
            ("ours, last epoch", "last", "overall", 2),
            ("many", "last", "many", 1),
            ("medium", "last", "medium", 1),
            ("few", "last", "few", 1),
            ("ECE", "last", "ece", 1),
        ):
            values = np.array([run[epoch][name] for run in of_arm])
            assert table[title][heading] == f"{values.mean():.{digits}f} ±{values.std(ddof=1):.{digits}f}"
        assert (table[title]["seeds"], table[title]["subset seeds"]) == ("0, 1, 2", "0, 1")
    adjusted = [run["post_hoc"]["logit-adjustment"]["overall"] for run in results.values() if run["arm"] == "CE"]
    expected = f"{statistics.mean(adjusted):.2f} ±{statistics.stdev(adjusted):.2f}"
    assert table["CE + post-hoc logit adj."]["ours, last epoch"] == expected
    assert table["CE + post-hoc logit adj."]["reported"] == "44.07 (c)"
    assert all(name in page for name in results), "recipe hashes"
    assert page.count("<details>") == 1 and "| Some Processor | 2 | 2.13.0 | 1 | 18 | 9.5 min |" in page
    assert "`00aaaaaaaaaa`" in page and "`01aaaaaaaaaa`" in page and "`bbbbbbbbbbbb`" in page


def test_the_best_epoch_where_several_follow_the_drop(tmp_path, quick):
    """Of a short run only the last evaluated step does: its best epoch is its last one whatever happened."""
    results = stored.supervised(tmp_path / "results", arms=("ce",), tier="full")
    stored.supervised(tmp_path / "results", arms=("ce",), tier="short")
    full, short = (text for title, text in parts(report(tmp_path)[0]).items() if "tier" in title)
    best = [run["best"]["overall"] for run in results.values()]
    expected = f"{statistics.mean(best):.2f} ±{statistics.stdev(best):.2f}"
    assert [row["best epoch"] for row in rows(full)] == [expected, "-", "-"]  # the others are post-hoc methods
    assert {row["best epoch"] for row in rows(short)} == {"-"}
    assert "Evaluated 40 times, every 425 steps and after the last, 8 of them after the first drop" in full
    assert "Evaluated 4 times, every 850 steps and after the last, 1 of them after the first drop" in short


def test_evaluations_without_drops_and_between_them():
    recipe = {"steps": 100, "evaluate_every": 30, "schedule": "step", "drops": (0.6, 0.9)}
    assert evaluations(recipe) == (4, 2)  # 30, 60, 90 and 100: the rate of step 60 has not dropped
    assert evaluations(recipe | {"schedule": "cosine"}) == evaluations(recipe | {"drops": ()}) == (4, 4)
    assert evaluations(recipe | {"evaluate_every": 1000}) == (1, 1)


def test_post_hoc_methods_with_other_settings_say_so(tmp_path, quick):
    results = stored.supervised(tmp_path / "results", arms=("ce",))
    first, second, third = results.values()
    first["post_hoc_settings"] = {"tau-norm": {"norm_tau": 0.31}, "logit-adjustment": {"prior_tau": 1.0}}
    second["post_hoc_settings"] = {"tau-norm": {"norm_tau": 1.0}, "logit-adjustment": {"prior_tau": 1.0}}
    third.pop("post_hoc_settings", None)  # stored before settings were
    stored.save(tmp_path / "results", "supervised-cifar100", "short", results)
    page, _ = report(tmp_path)
    table = {row["method"]: row for row in rows(page)}
    assert list(table) == ["CE", "CE + tau-norm", "CE + tau-norm (norm_tau 0.31)", "CE + post-hoc logit adj."]
    tau_norm = first["post_hoc"]["tau-norm"]["overall"]
    assert table["CE + tau-norm (norm_tau 0.31)"]["ours, last epoch"] == f"{tau_norm:.2f}"
    assert [table[title]["runs"] for title in table] == ["3", "2", "1", "3"]
    usual = "none of them searched: tau-norm: norm_tau 1; post-hoc logit adj.: prior_tau 1."
    assert f"post-hoc methods where a line names no others, {usual}" in page
    stored.save(tmp_path / "results", "supervised-cifar100", "short", dict([list(results.items())[1]]))
    assert f"post-hoc methods, {usual}" in report(tmp_path)[0]


def test_commands_train_the_runs_of_the_page(tmp_path, quick):
    stored.supervised(tmp_path / "results", arms=("ce", "vs"), seeds=(0,), subset_seeds=(0,))
    stored.supervised(tmp_path / "results", tier="full", subset_seeds=(0, 1))
    page, _ = report(tmp_path)
    lines = page.split("```")[1].strip().splitlines()
    assert lines == [
        "ltkernels table supervised-cifar100 --tier full",
        "ltkernels table supervised-cifar100 --tier short --arms cifar100-lt-ce cifar100-lt-vs --seeds 0 "
        "--subset-seeds 0",
        "ltkernels report",
    ]


def test_commands_compile_the_step_where_all_runs_did(tmp_path, quick):
    results = stored.supervised(tmp_path / "results", arms=("ce",))
    first, *others = results.values()
    for runs, option in (([first], ""), (others, " --compile")):
        for run in runs:
            run["recipe_fields"]["compile"] = True
        stored.save(tmp_path / "results", "supervised-cifar100", "short", results)
        assert f"--arms cifar100-lt-ce --subset-seeds 0{option}\n" in report(tmp_path)[0]


def test_tiers_views_and_precisions_have_tables_of_their_own(tmp_path, quick):
    stored.supervised(tmp_path / "results", arms=("ce", "vs"), tier="full")
    short = stored.supervised(tmp_path / "results", arms=("ce", "vs"), seeds=(0,))
    for planned in stored.planned("supervised-cifar100", "short", ("focal",), (0,)):
        for change in ({"views": 2}, {"precision": "bf16-mixed"}, {"steps": 10}):
            recipe = dataclasses.replace(planned.recipe, **change)
            name, run = stored.run(dataclasses.replace(planned, recipe=recipe), 40.0, 0.0)
            short[name] = run
    stored.save(tmp_path / "results", "supervised-cifar100", "short", short)
    page, _ = report(tmp_path)
    tables = {title: rows(text) for title, text in parts(page).items() if "CIFAR" in title}
    assert {title.split("100, ")[1]: [row["method"] for row in table] for title, table in tables.items()} == {
        "full tier (resnet32, 32-true)": ["CE", "CE + tau-norm", "CE + post-hoc logit adj.", "VS"],
        "short tier (resnet32, 32-true)": ["CE", "CE + tau-norm", "CE + post-hoc logit adj.", "VS"],
        "short tier, 2 views (resnet32, 32-true)": ["focal"],
        "short tier (resnet32, bf16-mixed)": ["focal"],
        "10 steps of 128 (resnet32, 32-true)": ["focal"],
    }
    full = next(table for title, table in tables.items() if "full" in title)
    assert [row["runs"] for row in full] == ["3", "3", "3", "3"]


def test_runs_with_other_settings_are_not_averaged(tmp_path, quick):
    results = stored.supervised(tmp_path / "results", arms=("ce",), seeds=(0,))
    (planned,) = stored.planned("supervised-cifar100", "short", ("ce",), (1,), (0,))
    name, run = stored.run(
        dataclasses.replace(planned, recipe=dataclasses.replace(planned.recipe, weight_decay=5e-4)), 30.0, 0.0
    )
    stored.save(tmp_path / "results", "supervised-cifar100", "short", results | {name: run})
    page, _ = report(tmp_path)
    titles = [row["method"] for row in rows(page)]
    assert titles[0] == "CE (weight_decay 0.0002)" and "CE (weight_decay 0.0005)" in titles
    assert {row["runs"] for row in rows(page)} == {"1"}


def test_fields_of_the_machine_do_not_divide_a_line(tmp_path, quick):
    results = stored.supervised(tmp_path / "results", arms=("ce",), seeds=(0, 1))
    next(iter(results.values()))["recipe_fields"]["cuda_graph"] = False
    stored.save(tmp_path / "results", "supervised-cifar100", "short", results)
    assert rows(report(tmp_path)[0])[0]["runs"] == "2"


def test_compiled_runs_are_told_apart(tmp_path, quick):
    results = stored.supervised(tmp_path / "results", arms=("ce",), seeds=(0, 1))
    assert ", compiled |" not in report(tmp_path)[0]
    next(iter(results.values()))["recipe_fields"]["compile"] = True
    stored.save(tmp_path / "results", "supervised-cifar100", "short", results)
    page = report(tmp_path)[0]
    assert page.count(", compiled |") == 1 and rows(page)[0]["runs"] == "2"


def test_the_precision_of_a_gpu_is_told(tmp_path, quick):
    results = stored.supervised(tmp_path / "results", arms=("ce",), seeds=(0,))
    assert "TF32" not in report(tmp_path)[0]
    for run in results.values():
        run["device"] = "NVIDIA H200"
    stored.save(tmp_path / "results", "supervised-cifar100", "short", results)
    assert "32-true (on a GPU with convolutions in TF32, the default of torch); SGD" in report(tmp_path)[0]


def test_the_subsets_are_averaged_in_a_table_of_their_own(tmp_path, quick):
    table = "supervised-cifar100-subsets"
    entries = [stored.run(found, 30.0 + 2 * index, 0.9) for index, found in enumerate(stored.planned(table, "short"))]
    stored.save(tmp_path / "results", table, "short", dict(entries))
    page, _ = report(tmp_path)
    (line,) = rows(page)
    assert "## CIFAR-100-LT, imbalance factor 100, one method on three subsets, short tier" in page
    overall = [values["last"]["overall"] for _, values in entries]
    expected = f"{np.mean(overall):.2f} ±{np.std(overall, ddof=1):.2f}"
    assert (line["ours, last epoch"], line["runs"], line["subset seeds"]) == (expected, "3", "0, 1, 2")


def test_what_has_no_run_is_named(tmp_path, quick):
    stored.supervised(tmp_path / "results", arms=("ce", "vs"), seeds=(0,))
    page, _ = report(tmp_path)
    missing = [arm.label for arm in TABLES["supervised-cifar100"].arms if arm.label not in ("CE", "VS")]
    sentence = f"Not run yet: {'; '.join([*missing, 'CE + cRT', 'CE + LWS'])}.\n"
    assert sentence in page
    first_box = page.split("\n\n")[1]
    assert first_box.startswith("> **Not reproduced here**")
    assert (
        "Not run yet: CIFAR-100-LT, imbalance factor 100 (full tier); CIFAR-100-LT, imbalance factor 100, one method"
        in first_box
    )
    assert "; CIFAR-10-LT, imbalance factor 100 (full and short tier); " in first_box
    assert all(label in first_box for label in missing)
    assert "No run is of the full tier" in first_box and "other images than the published ones" in first_box
    assert "CIFAR-100-LT, step profile, imbalance factor 100" in first_box


def test_box_has_the_notes(tmp_path, quick):
    stored.supervised(tmp_path / "results", arms=("ce",), seeds=(0,))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes-supervised.md").write_text("- Something else.\n")
    page, other = report(tmp_path)
    assert "> - Something else.\n" in page and "Something else" not in other


def test_selection_in_the_order_of_the_archive_is_not_called_another(tmp_path, quick):
    results = stored.supervised(tmp_path / "results", arms=("ce",), seeds=(0,))
    for run in results.values():
        run["recipe_fields"]["long_tail"]["selection"] = "archive"
    stored.save(tmp_path / "results", "supervised-cifar100", "short", results)
    assert "other images" not in report(tmp_path)[0]


def test_ten_classes_have_thirds(tmp_path, quick):
    results = stored.supervised(tmp_path / "results", "supervised-cifar10", arms=("ce",), seeds=(0,))
    page, _ = report(tmp_path)
    row = rows(page)[0]
    (run,) = results.values()
    per_class = run["last"]["per_class"]
    assert row["few"] == "-"
    means = [np.mean(per_class[:3]), np.mean(per_class[3:6]), np.mean(per_class[6:])]
    assert [row[f"{name} third"] for name in ("largest", "middle", "smallest")] == [f"{value:.1f}" for value in means]
    stored.supervised(tmp_path / "results", arms=("ce",), seeds=(0,))
    assert (
        "largest third"
        not in rows(parts(report(tmp_path)[0])["CIFAR-100-LT, imbalance factor 100, short tier (resnet32, 32-true)"])[0]
    )


def test_reliability_pools_images_not_runs(tmp_path):
    results = stored.supervised(tmp_path / "results", arms=("ce",), seeds=(0, 1))
    (section,) = Inputs.load(tmp_path / "results", tmp_path).sections("supervised-cifar100")
    found = supervised.reliability(section.lines[0])
    bins = [run["calibration"] for run in results.values()]
    for k in range(15):
        images = sum(b["count"][k] for b in bins)
        assert found.count[k] == images
        right = sum(b["count"][k] * b["accuracy"][k] for b in bins)
        assert found.accuracy[k] == pytest.approx(right / images if images else 0.0)
    assert found.ece == pytest.approx(35.0)
    for run in results.values():
        run["calibration"] = {}
    stored.save(tmp_path / "results", "supervised-cifar100", "short", results)
    (section,) = Inputs.load(tmp_path / "results", tmp_path).sections("supervised-cifar100")
    assert supervised.reliability(section.lines[0]) is None


def test_running_means():
    values = np.random.default_rng(0).normal(size=(2, 100))
    found = plots.smoothed(values)
    assert found[1, 50] == pytest.approx(values[1, 45:56].mean())
    assert found[0, 0] == pytest.approx(values[0, :6].mean())
    assert found[0, 99] == pytest.approx(values[0, 94:].mean())
    assert plots.smoothed(values[:, :10]) is not None and (plots.smoothed(values[:, :10]) == values[:, :10]).all()


# Files


def test_no_results_say_so(tmp_path):
    out = io.StringIO()
    options = ReportOptions(results=tmp_path / "nothing", out=tmp_path / "out")
    with pytest.raises(TrainerError, match="results: no such folder: .*nothing"):  # a slip must not empty the pages
        run_report(options, Console(file=out, width=200))
    assert not options.out.exists()
    options.results.mkdir()
    assert run_report(options, Console(file=out, width=200)) == 0
    assert "no results in" in out.getvalue()
    for name in ("supervised", "elm"):
        page = (tmp_path / "out" / f"{name}.md").read_text()
        assert "There are no results yet" in page and "> **Not reproduced here**" in page
        command = "ltkernels report" if name == "supervised" else "ltkernels report --runs runs"  # for projections
        assert f"{command}\n" in page
    assert "ltkernels table supervised-cifar100 --tier short" in (tmp_path / "out" / "supervised.md").read_text()


def test_a_second_report_changes_nothing(tmp_path):
    results = stored.supervised(tmp_path / "results", arms=("ce", "vs"), seeds=(0, 1))
    stored.elm_table(tmp_path / "results", arms=("elm",), seeds=(0,))
    report(tmp_path)
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "out").iterdir()}
    assert sum(name.endswith(".png") for name in before) == 3
    backwards = dict(reversed(results.items()))
    content = {"table": "supervised-cifar100", "tier": "short", "runs": backwards}
    (tmp_path / "results" / "supervised-cifar100-short.json").write_text(json.dumps(content))
    report(tmp_path)
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "out").iterdir()} == before
    for page in ("supervised.md", "elm.md"):
        for picture in re.findall(r"\]\((.+\.png)\)", before[page][0].decode()):
            assert before[picture][0].startswith(b"\x89PNG")


def test_one_page_alone(tmp_path, quick):
    stored.supervised(tmp_path / "results", arms=("ce",), seeds=(0,))
    options = ReportOptions(names=("elm",), results=tmp_path / "results", out=tmp_path / "out")
    assert run_report(options, Console(quiet=True)) == 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["elm.md"]


def test_command_line(tmp_path, quick, capsys):
    stored.supervised(tmp_path / "results", arms=("ce",), seeds=(0,))
    folders = ["--results", str(tmp_path / "results"), "--out", str(tmp_path / "out")]
    assert main(["report", "supervised", *folders]) == 0
    assert "supervised.md" in capsys.readouterr().out
    assert main(["report", *folders]) == 0
    assert (tmp_path / "out" / "elm.md").is_file()
    assert main(["report", "nothing", *folders]) == 2


def test_pictures_of_sections_that_differ_in_something_else_have_names_of_their_own(tmp_path, quick):
    results = stored.supervised(tmp_path / "results", arms=("ce", "vs"), seeds=(0,))
    wide = {}
    for name, run in results.items():
        fields = run["recipe_fields"] | {"width": 2.0}
        wide[name[::-1]] = run | {"recipe_fields": fields}
    stored.save(tmp_path / "results", "supervised-cifar100", "short", results | wide)
    page, _ = report(tmp_path)
    pictures = re.findall(r"\]\((.+\.png)\)", page)
    assert len(pictures) == 4 == len(set(pictures)) == len(list((tmp_path / "out").glob("*.png")))


def _other_table(content):
    content["table"] = "supervised-cifar10"


def _no_recipe(content):
    next(iter(content["runs"].values()))["recipe_fields"] = {"dataset": "cifar100"}


def _no_scores(content):
    del next(iter(content["runs"].values()))["last"]


@pytest.mark.parametrize("damage", [_other_table, _no_recipe, _no_scores, lambda content: content.clear()])
def test_damaged_results(tmp_path, damage):
    stored.supervised(tmp_path / "results", arms=("ce",), seeds=(0,))
    file = tmp_path / "results" / "supervised-cifar100-short.json"
    content = json.loads(file.read_text())
    damage(content)
    file.write_text(json.dumps(content))
    with pytest.raises(TrainerError, match="supervised-cifar100-short.json"):
        report(tmp_path)


def test_damaged_folders(tmp_path):
    with pytest.raises(TrainerError, match="runs: no such folder"):
        report(tmp_path, runs=tmp_path / "runs")
    (tmp_path / "results").mkdir()
    (tmp_path / "out").write_text("a file")
    with pytest.raises(TrainerError, match="cannot write"):
        report(tmp_path)
