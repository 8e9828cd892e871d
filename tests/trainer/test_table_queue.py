"""The queue of a table: what it skips, starts, stops and tries again, and that no run is trained twice at once."""

import dataclasses
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric", reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")

from tiny_images import tiny_recipe  # noqa: E402

from ltkernels.trainer import TrainerError, results, table_queue, tables  # noqa: E402
from ltkernels.trainer.cli import main  # noqa: E402
from ltkernels.trainer.image_recipes import save_recipe  # noqa: E402
from ltkernels.trainer.locks import try_lock  # noqa: E402
from ltkernels.trainer.posthoc import POST_HOC  # noqa: E402
from ltkernels.trainer.table_queue import TableOptions, chosen_runs  # noqa: E402
from ltkernels.trainer.tables import Arm, Table  # noqa: E402

HERE = Path(__file__).parent
STAND_IN = (sys.executable, "-S", "-E", str(HERE / "queue_program.py"))
# The real one, which knows the tiny data set.
REAL = (
    sys.executable,
    "-c",
    f"import sys; sys.path.insert(0, {str(HERE)!r}); import tiny_images; from ltkernels.cli import main; "
    "sys.exit(main(sys.argv[1:]))",
)
TABLE = Table(
    "Tiny",
    (Arm("CE", "tiny-ce", post_hoc=True), Arm("LDAM", "tiny-ldam-drw")),
    seeds=(0, 1),
)
NAMES = [run.name for run in TABLE.runs("short")]  # CE 0, LDAM 0, CE 1, LDAM 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a real run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", "tiny-ce", "--no-tensorboard", "--accelerator", "cpu", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(autouse=True)
def stand_in(monkeypatch, tmp_path, finished):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LTKERNELS_FINISHED", str(finished))
    monkeypatch.setitem(tables.TABLES, "tiny", TABLE)
    monkeypatch.setattr(table_queue, "PROGRAM", STAND_IN)


def table(*options):
    return main(["table", "tiny", "--tier", "short", "--accelerator", "cpu", *options])


def stored(tier="short"):
    return results.load(Path("docs/reproduction/results") / f"tiny-{tier}.json")["runs"]


def calls():
    file = Path("runs/calls")
    return [tuple(line.split()[:2]) for line in file.read_text().splitlines()] if file.is_file() else []


def behave(name, behaviour):
    folder = Path("runs") / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "behaviour").write_text(behaviour)


def test_all_runs_in_their_order_and_none_twice(capsys):
    assert table() == 0
    ce, ldam = ("train", NAMES[0]), ("train", NAMES[1])
    assert calls() == [ce, ("posthoc", NAMES[0]), ldam, ("train", NAMES[2]), ("posthoc", NAMES[2]), ("train", NAMES[3])]
    assert all((Path("runs") / name / "metrics.json").is_file() for name in NAMES)
    out = capsys.readouterr().out
    assert f"[0/4] {NAMES[0]}, seed 0: started" in out
    assert re.search(rf"\[1/4\] {NAMES[0]} finished: overall [\d.]+ .*; 3 left, about \d+ min", out)
    assert re.search(r"CE +2/2 +[\d.]+ ± 0.00", out) and "4 runs stored in docs/reproduction/results" in out
    assert len(stored()) == 4 and {run["arm"] for run in stored().values()} == {"CE", "LDAM"}
    assert [set(run["post_hoc"]) for run in stored().values() if run["arm"] == "CE"] == [set(POST_HOC)] * 2

    before = calls()
    assert table() == 0
    assert calls() == before
    assert "[4/4] done, 0 to do" in capsys.readouterr().out


def test_what_a_run_is_given():
    data = ("--data-root", "somewhere")
    assert table("--threads", "3", *data, "--arms", "tiny-ce", "--seeds", "1", "--runs", "there") == 0
    first, second = Path("there/calls").read_text().splitlines()
    common = "--accelerator cpu"
    assert first == (
        f"train {NAMES[2]} 3 --resume there/{NAMES[2]} {common} --threads 3 --no-tensorboard --data-root somewhere"
    )
    methods = " ".join(POST_HOC)
    assert second == f"posthoc {NAMES[2]} 3 there/{NAMES[2]} --methods {methods} {common} --data-root somewhere"
    assert len(stored()) == 1
    assert table("--no-cuda-graph", "--arms", "tiny-ldam-drw", "--seeds", "1", "--runs", "eager") == 0
    assert "--no-tensorboard --no-cuda-graph" in Path("eager/calls").read_text()


def test_runs_that_start_are_compiled_where_asked_and_others_go_on_as_they_began():
    planned = next(TABLE.runs("short"))
    began = Path("runs") / planned.name / "recipe.json"
    began.parent.mkdir(parents=True)
    began.write_text(json.dumps(save_recipe(planned.recipe, planned.arm.recipe)))
    assert table("--compile", "--arms", "tiny-ce") == 0
    files = [Path("runs") / name / "recipe.json" for name in (planned.name, NAMES[2])]
    assert [json.loads(file.read_text())["recipe"]["compile"] for file in files] == [False, True]
    assert sorted(run["recipe_fields"]["compile"] for run in stored().values()) == [False, True]


def test_missing_post_hoc_methods_alone_are_made_up_for(capsys):
    assert table("--arms", "tiny-ce", "--seeds", "0") == 0
    (Path("runs") / NAMES[0] / "posthoc-lws.json").unlink()
    assert table("--arms", "tiny-ce", "--seeds", "0") == 0
    assert Path("runs/calls").read_text().splitlines()[-1].startswith(f"posthoc {NAMES[0]} ")
    assert "--methods lws --accelerator" in Path("runs/calls").read_text()
    assert f"{NAMES[0]}, seed 0: finished before, posthoc" in capsys.readouterr().out


def test_only_runs_that_are_not_stored(capsys):
    assert table("--seeds", "0") == 0
    file = Path("docs/reproduction/results/tiny-short.json")
    held = results.load(file)
    assert len(held["runs"]) == 2
    # Another machine: the results are there, the folders of the runs are not.
    assert table("--missing", "--runs", "elsewhere") == 0
    assert "runs that are not stored yet: 2, in elsewhere" in capsys.readouterr().out
    names = {line.split()[1] for line in Path("elsewhere/calls").read_text().splitlines()}
    assert names == set(NAMES[2:]) and len(stored()) == 4
    assert table("--missing", "--runs", "a_third") == 0 and not Path("a_third").exists()
    # A run without one of its post-hoc methods lacks something, one that needs none does not.
    for run in held["runs"].values():
        run["post_hoc"].pop("lws", None)
    results.save(file, held)
    assert table("--missing", "--seeds", "0", "--runs", "a_third") == 0
    assert {line.split()[1] for line in Path("a_third/calls").read_text().splitlines()} == {NAMES[0]}


def test_the_time_limit_stops_runs_and_the_next_call_goes_on(capsys):
    behave(NAMES[0], "slow")
    behave(NAMES[1], "slow")
    assert table("--minutes", "0.03", "--parallel", "2") == 0
    assert sorted(calls()) == [("train", name) for name in sorted(NAMES[:2])]
    out = capsys.readouterr().out
    assert "0.03 minutes are over: 2 runs are told to save a checkpoint" in out
    assert f"[0/4] {NAMES[0]}: stopped, goes on the next time" in out
    assert re.search("CE +0/2 +-", out) and not list(Path("docs").rglob("*.json"))
    assert table("--parallel", "2") == 0
    assert f"{NAMES[0]}, seed 0: goes on" in capsys.readouterr().out
    assert len(stored()) == 4


def test_a_run_that_fails_does_not_stop_the_others_and_is_tried_again(capsys):
    behave(NAMES[0], "crash")
    behave(NAMES[1], "kill")
    behave(NAMES[2], "empty")
    assert table() == 1
    out = capsys.readouterr().out
    assert f"{NAMES[0]} failed: train ended with status 2\n  line 13\n" in out and "  error: the loss is nan\n" in out
    assert f"{NAMES[1]} failed: train ended with status -9" in out
    assert f"{NAMES[2]} failed: its process ended without an error and without metrics.json" in out
    assert f"failed, tried again the next time: {', '.join(NAMES[:3])}" in out
    assert len(stored()) == 1
    for name in NAMES[:3]:
        (Path("runs") / name / "behaviour").unlink()
    assert table() == 0
    assert len(stored()) == 4


def test_a_folder_of_another_recipe_is_not_touched(capsys):
    for name, file, content in (
        (NAMES[0], "metrics.json", {"recipe_hash": "0" * 12}),
        (NAMES[1], "recipe.json", {"name": "x", "recipe": tiny_recipe(seed=9).as_dict()}),
    ):
        (Path("runs") / name).mkdir(parents=True)
        (Path("runs") / name / file).write_text(json.dumps(content))
    with pytest.raises(TrainerError, match="its run is of recipe 000000000000, expected"):
        results.collect("tiny", "short", Path("runs"))
    assert table() == 1
    out = capsys.readouterr().out
    assert f"{NAMES[0]} failed: runs/{NAMES[0]}: its run is of recipe 000000000000, expected" in out
    assert f"not stored: runs/{NAMES[0]}: its run is of recipe 000000000000, expected" in out
    assert f"{NAMES[1]} failed: runs/{NAMES[1]}/recipe.json: recipe {tiny_recipe(seed=9).hash}, expected" in out
    assert {name for _, name in calls()} == set(NAMES[2:]) and len(stored()) == 2


def test_a_run_that_another_process_works_on_is_left_to_it(capsys):
    folder = Path("runs") / NAMES[0]
    folder.mkdir(parents=True)
    lock = try_lock(folder / table_queue.LOCK_FILE)
    assert table("--seeds", "0") == 0
    assert f"{NAMES[0]}: another process is at it" in capsys.readouterr().out
    assert calls() == [("train", NAMES[1])]
    os.close(lock)
    assert table("--seeds", "0") == 0
    assert calls()[1:] == [("train", NAMES[0]), ("posthoc", NAMES[0])]


def test_two_queues_at_once_share_the_runs():
    for name in NAMES:
        behave(name, "slow")
    options = [TableOptions(name="tiny", tier="short", parallel=2, accelerator="cpu")] * 2
    said, threads = [[], []], []
    stop: list[int] = []
    for option, lines in zip(options, said, strict=True):
        queue = table_queue.Queue(chosen_runs(option), option, lines.append, lambda run: None)
        threads.append(threading.Thread(target=queue.work, args=(stop,), daemon=True))
        threads[-1].start()
    wait_for(lambda: len(list(Path("runs").glob("*/ready"))) == 4)
    stop.append(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert sorted(calls()) == [("train", name) for name in sorted(NAMES)]  # each once
    assert sum("another process is at it" in line for lines in said for line in lines) >= 2


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_lock_outlives_a_killed_queue_as_long_as_its_run():
    behave(NAMES[0], "slow")
    option = TableOptions(name="tiny", tier="short", arms=("tiny-ce",), seeds=(0,), accelerator="cpu")
    queue = table_queue.Queue(chosen_runs(option), option, lambda line: None, lambda run: None)
    stop: list[int] = []
    thread = threading.Thread(target=queue.work, args=(stop,), daemon=True)
    thread.start()
    folder = Path("runs") / NAMES[0]
    wait_for((folder / "ready").exists)
    (job,) = queue._running
    os.close(job.lock)  # as the end of its process does
    job.lock = os.open(os.devnull, os.O_RDONLY)
    assert try_lock(folder / table_queue.LOCK_FILE) is None
    stop.append(signal.SIGTERM)
    thread.join()
    again = try_lock(folder / table_queue.LOCK_FILE)
    assert again is not None
    os.close(again)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_queue(number, status, capsys):
    behave(NAMES[0], "slow")
    ready = Path("runs").absolute() / NAMES[0] / "ready"

    def send():
        wait_for(ready.exists)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    assert table() == status
    out = capsys.readouterr().out
    assert "signal: 1 run is told to save a checkpoint" in out and calls() == [("train", NAMES[0])]
    assert (Path("runs") / NAMES[0] / "checkpoint-00000007.pt").is_file()


def test_real_runs_are_stopped_resumed_and_stored(monkeypatch, capsys):
    arm = Arm("CE", "tiny-ce", lambda recipe: dataclasses.replace(recipe, evaluate_every=100))
    one = Table("Tiny", (arm,), seeds=(0,))
    monkeypatch.setitem(tables.TABLES, "tiny", one)
    monkeypatch.setattr(table_queue, "PROGRAM", REAL)
    (name,) = (run.name for run in one.runs("short"))
    log = Path("runs").absolute() / name / "log.csv"

    def send():
        wait_for(lambda: log.is_file() and len(log.read_text().splitlines()) > 2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    assert table("--threads", "1") == 143
    assert list((Path("runs") / name).glob("checkpoint-*.pt"))
    assert "go on with: ltkernels train --resume" in (Path("runs") / name / "train.log").read_text()
    assert table("--threads", "1") == 0
    (run,) = stored().values()
    metrics = json.loads((Path("runs") / name / "metrics.json").read_text())
    assert metrics["resumed_from"] > 0 and metrics["last"]["step"] == 3400
    assert run["last"]["overall"] == pytest.approx(metrics["last"]["overall"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table"], "table: which table? known: supervised-cifar100"),
        (["table", "none"], "unknown table 'none': known are"),
        (["table", "tiny", "--minutes", "-1"], "minutes: expected a number >= 0, got -1"),
        (["table", "tiny", "--parallel", "0"], "parallel: expected at least 1, got 0"),
        (["table", "tiny", "--threads", "-1"], "threads: expected at least 0, got -1"),
        (["table", "tiny", "--arms", "tiny-vs"], "arms: tiny has no tiny-vs, but tiny-ce, tiny-ldam-drw"),
        (["table", "tiny", "--seeds", "2"], "seeds: tiny has no 2, but 0, 1"),
        (["table", "tiny", "--results", "damaged.json"], "damaged.json: damaged"),
    ],
)
def test_mistakes_are_told_before_anything_runs(arguments, message, capsys):
    Path("damaged.json").write_text("{")
    assert main(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("runs").exists()
