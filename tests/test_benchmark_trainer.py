"""The trainer's benchmark compares two loops that do the same, finds those that do not, and reports honestly."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageOps
from scipy import stats
from torch._dynamo.utils import counters

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are part of the repository, not of the installed package

from benchmarks import report, report_trainer, trainer, trainer_accuracy  # noqa: E402
from benchmarks.interleave import Effort  # noqa: E402
from benchmarks.results import load  # noqa: E402
from benchmarks.trainer import ROWS, OurLoop, Size, Task  # noqa: E402
from benchmarks.trainer_plain import Average, LDAMByMask, PlainLoop, accuracies, class_weight  # noqa: E402
from ltkernels.margins import class_balanced_weight  # noqa: E402
from ltkernels.nn import LDAMLoss  # noqa: E402
from ltkernels.trainer.step import Batch, set_learning_rate  # noqa: E402

SIZE = Size(8, 0.125, 3, 3.0, timed_steps=1, archive=False)
SAMPLE = np.arange(0, 64, 8)
DOUBLE = trainer.DOUBLE_TOLERANCES


@pytest.fixture(scope="module")
def task() -> Task:
    return trainer.make_task(SIZE)


@pytest.fixture
def loops(task, one_thread) -> Iterator[dict[str, PlainLoop | OurLoop]]:
    with ExitStack() as stack:
        yield {name: trainer.make_loop(ROWS[name], task, "cpu", stack) for name in ("plain", "ours")}


# --------------------------------------------------------------------------------------------------------- same results


def test_without_the_archive_the_images_are_noise_of_the_same_counts(task, tmp_path):
    full = trainer.make_task(Size(), tmp_path)
    assert full.images == "synthetic" and full.shape == "synthetic-128-85" and len(full.split.train) == 10847
    assert full.split.counts[0] == 500 and full.split.counts[-1] == 5
    assert np.bincount(full.split.train.labels).tolist() == list(full.split.counts)
    assert task.split.train.images.shape[1:] == (32, 32, 3)


def test_both_loops_give_loss_and_gradients_of_the_definition(loops, task):
    exact = trainer.exact_answer(task, SAMPLE)
    found = {name: trainer.loss_and_gradients(loop, SAMPLE) for name, loop in loops.items()}
    for name, loop in loops.items():
        loss_error, gradient_error = trainer.errors(found[name], exact)
        assert loss_error < 1e-6 and gradient_error <= ROWS[name].tolerances[1]
        before = copy.deepcopy(loop.network.state_dict())
        in_double = trainer.loss_and_gradients(loop, SAMPLE, trainer.normalised(task, SAMPLE))
        assert all(error <= limit for error, limit in zip(trainer.errors(in_double, exact), DOUBLE, strict=True))
        after = loop.network.state_dict()
        assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    torch.testing.assert_close(found["ours"][0], found["plain"][0], rtol=1e-6, atol=0)


def test_the_loop_in_bfloat16_is_checked_too(task, one_thread):
    exact, result, row = trainer.exact_answer(task, SAMPLE), trainer.Measured(), ROWS["ours-bf16"]
    with ExitStack() as stack:
        loop = trainer.make_loop(row, task, "cpu", stack)
        trainer.check(loop, row, task, SAMPLE, exact, result)
        assert 1e-5 < result.loss_error <= row.tolerances[0] and 1e-3 < result.gradient_error <= row.tolerances[1]
        assert loop.block(1, 1) > 0


def test_both_loops_take_the_same_step(loops):
    plain, ours = loops["plain"], loops["ours"]
    images, target = plain.batch(SAMPLE)
    for setting in ("momentum", "weight_decay", "nesterov", "dampening"):  # decay moves little in few steps
        assert plain.optimizer.param_groups[0][setting] == ours.fit.optimizer.param_groups[0][setting]
    for step in range(3):  # momentum counts from the second on
        plain._take_step(plain.criterion(0), images, target, [Average() for _ in range(3)])
        set_learning_rate(ours.fit.optimizer, ours.fit.recipe.learning_rate(step))
        ours.fit._eager(Batch(images.contiguous(memory_format=torch.channels_last), target))
    weights = [dict(loop.network.named_parameters()) for loop in (plain, ours)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5)


def test_the_loss_by_mask_is_that_of_the_library():
    generator = torch.Generator().manual_seed(0)
    cosines, target = torch.rand(16, 5, generator=generator) * 2 - 1, torch.randint(5, (16,), generator=generator)
    counts = (100, 50, 20, 8, 3)
    weight = class_weight(counts, 0.9999)
    torch.testing.assert_close(weight, class_balanced_weight(counts, 0.9999))
    for of in (None, weight):
        expected = LDAMLoss(counts, 0.5, 30.0, weight=of)(cosines, target)
        torch.testing.assert_close(LDAMByMask(counts, 0.5, 30.0, of)(cosines, target), expected)


def test_weights_of_classes_are_deferred(loops):
    plain = loops["plain"]
    start = round(0.8 * plain.recipe.steps / plain.steps_per_epoch)
    assert plain.criterion(start - 1).weight is None and plain.criterion(start).weight is not None


def test_accuracies_count_the_first_and_the_first_five():
    logits = torch.arange(7.0).repeat(4, 1)  # the last class is the first
    first, five = accuracies(logits, torch.tensor([6, 5, 2, 1]))
    assert (first.item(), five.item()) == (25, 75)


# ------------------------------------------------------------------------------------------------------------ mistakes


def test_a_loop_with_another_loss_is_found(loops, task, monkeypatch):
    exact = trainer.exact_answer(task, SAMPLE)
    monkeypatch.setattr(loops["plain"], "criterion", lambda epoch: LDAMByMask(task.split.counts, 0.5001, 30.0, None))
    with pytest.raises(AssertionError, match="loss: relative error"):
        trainer.check(loops["plain"], ROWS["plain"], task, SAMPLE, exact, trainer.Measured())


def test_crops_and_flips_of_both_loops_are_those_of_the_definition(loops, task):
    torch.manual_seed(0)
    for loop in loops.values():
        trainer.check_augmentation(loop, task)


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("_flip", lambda picture: picture, "flips"),
        ("_crop", lambda picture, padding: picture, "rows"),
        ("_crop", lambda picture, padding: ImageOps.expand(picture, 4, 255).crop((0, 0, 32, 32)), "not a crop"),
    ],
)
def test_another_augmentation_is_found(loops, task, monkeypatch, name, wrong, message):
    monkeypatch.setattr(loops["plain"].transform, name, wrong)
    with pytest.raises(AssertionError, match=message):
        trainer.check_augmentation(loops["plain"], task, 500)


def test_what_is_checked_of_a_compiled_loop_is_compiled(task, monkeypatch, one_thread):
    """Both sizes of batches before the clock runs; the graph as it is, as a compiler of kernels would take minutes."""
    monkeypatch.setattr(trainer, "WARM_STEPS", 1)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    row = ROWS["ours-compiled"]
    results = trainer.measure([row], task, "cpu", Effort(0, 2, 2), SIZE)[row.name]
    assert results.failure is None and len(results.samples) == 2 and results.gradient_error <= row.tolerances[1]
    assert counters["stats"]["unique_graphs"] == 3  # float32 and float64 of the last batch, float32 of a whole one
    assert not counters["graph_break"]


def test_a_wrong_loop_fails_alone(task, monkeypatch, one_thread):
    monkeypatch.setattr(trainer, "WARM_STEPS", 1)
    monkeypatch.setattr(PlainLoop, "criterion", lambda loop, epoch: LDAMByMask(loop.split.counts, 0.6, 30.0, None))
    results = trainer.measure([ROWS["plain"], ROWS["ours"]], task, "cpu", Effort(0, 2, 2), SIZE)
    assert isinstance(results["plain"].failure, AssertionError) and not results["plain"].samples
    assert results["ours"].failure is None and len(results["ours"].samples) == 2


def test_a_loop_that_breaks_off_fails_alone(task, monkeypatch, one_thread):
    monkeypatch.setattr(trainer, "WARM_STEPS", 1)
    block, calls = PlainLoop.block, []

    def breaking(loop, warm, timed):
        calls.append(timed)
        if len(calls) == 2:  # the first is before the rounds
            raise RuntimeError("out of memory")
        return block(loop, warm, timed)

    monkeypatch.setattr(PlainLoop, "block", breaking)
    results = trainer.measure([ROWS["plain"], ROWS["ours"]], task, "cpu", Effort(0, 2, 2), SIZE)
    assert str(results["plain"].failure) == "out of memory" and not results["plain"].samples and len(calls) == 2
    assert results["ours"].failure is None and len(results["ours"].samples) == 2


def test_the_check_is_in_float32(loops, task, monkeypatch):
    found = []

    def answer(*arguments):
        found.append(torch.backends.cudnn.allow_tf32)
        raise AssertionError("seen")

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(trainer, "loss_and_gradients", answer)
    with pytest.raises(AssertionError, match="seen"):
        trainer.check(loops["ours"], ROWS["ours"], task, SAMPLE, None, trainer.Measured())
    assert found == [False] and torch.backends.cudnn.allow_tf32


# ----------------------------------------------------------------------------------------------------------- measuring


def test_blocks_are_steps_of_one_training(loops, task):
    ours, plain = loops["ours"], loops["plain"]
    assert ours.block(1, 2) > 0 and ours.fit.step == 3
    assert ours.block(1, 1) > 0 and ours.fit.step == 5
    blocks = copy.deepcopy(ours.network.state_dict())
    with ExitStack() as stack:
        whole = trainer.make_loop(ROWS["ours"], task, "cpu", stack)
        whole.advance(5)
        assert all(torch.equal(value, blocks[name]) for name, value in whole.network.state_dict().items())
    assert plain.block(1, 1) > 0 and plain.step == 2


def test_rows_that_the_machine_cannot_run_are_left_out(monkeypatch):
    monkeypatch.setattr(trainer, "emulates_bfloat16", lambda device: device == "cpu")
    left_out = {name: row.reason_to_leave_out("cpu") for name, row in ROWS.items()}
    assert left_out["plain"] is left_out["ours"] is None
    assert "emulates" in left_out["ours-bf16"] and "GPU" in left_out["ours-captured"]
    on_gpu = {name: row.reason_to_leave_out("cuda") for name, row in ROWS.items()}
    assert [name for name, reason in on_gpu.items() if reason] == ["ours-compiled", "ours-bf16-compiled"]
    assert left_out["ours-compiled"] is None and ROWS["ours-compiled"].reason_to_leave_out("cpu", quick=True)


# ------------------------------------------------------------------------------------------------------------ accuracy


def test_the_accuracy_goes_on_where_it_was_stopped(task, tmp_path, monkeypatch):
    trained, values = [], {("plain", 0): 8.0, ("ours", 0): 9.0, ("plain", 1): 9.5, ("ours", 1): 8.1}

    def train(row, seed, of, device):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append((row, seed))
        assert of.recipe.steps == 2 * -(-len(task.split.train) // 8)
        return {"row": row, "seed": seed, "accuracy": values[row, seed], "seconds": 1.0}

    monkeypatch.setattr(trainer_accuracy, "train", train)
    monkeypatch.setattr(trainer, "emulates_bfloat16", lambda device: True)
    out = tmp_path / "accuracy.json"
    with pytest.raises(KeyboardInterrupt):
        trainer_accuracy.compare(task, 2, 2, "cpu", out)
    assert len(json.loads(out.read_text())["runs"]) == 3
    trained.clear()
    content = trainer_accuracy.compare(task, 2, 2, "cpu", out)
    assert trained == [("ours", 1)] and content["rows"]["plain"]["mean"] == 8.75
    assert content["differences"].keys() == {"ours"}
    monkeypatch.setattr(trainer, "emulates_bfloat16", lambda device: False)
    values.update({("ours-bf16", 0): 7.0, ("ours-bf16", 1): 8.0})
    trained.clear()
    content = trainer_accuracy.compare(task, 2, 2, "cpu", out)
    assert trained == [("ours-bf16", 0), ("ours-bf16", 1)]
    assert content["differences"]["ours-bf16"]["mean"] == pytest.approx(7.5 - 8.75)
    assert all(f"torch {torch.__version__}" in run["machine"] for run in json.loads(out.read_text())["runs"])
    with pytest.raises(trainer_accuracy.AccuracyError, match="another comparison, its epochs, steps"):
        trainer_accuracy.compare(task, 3, 2, "cpu", out)


def test_the_interval_is_that_of_welch():
    first, second = [8.0, 9.0, 10.5], [7.0, 7.5, 9.9]
    found = trainer_accuracy.difference(first, second)
    expected = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert found["interval"] == pytest.approx([expected.low, expected.high])
    assert trainer_accuracy.difference([1.0], [2.0, 3.0]) is None


def test_a_run_of_each_loop_gives_its_accuracy(task, one_thread):
    few = dataclasses.replace(task, recipe=dataclasses.replace(task.recipe, steps=2, evaluate_every=2))
    for row in trainer_accuracy.COMPARED:
        assert 0 <= trainer_accuracy.train(row, 1, few, "cpu")["accuracy"] <= 100


# -------------------------------------------------------------------------------------------------------------- report

MACHINE = {
    "device": "cpu",
    "name": "Processor",
    "cores": 2,
    "threads": 2,
    "cpu_capability": "AVX2",
    "system": "Linux x86_64",
    "python": "3.11",
    "torch": "2.13.0",
    "date": "2026-01-01",
    "quick": False,
}


def raw(path: Path, seconds: dict[str, float], images: str = "cifar100-lt", **machine: object) -> Path:
    """As pytest-benchmark writes it."""
    benchmarks = [
        {
            "extra_info": {
                "family": "trainer",
                "shape": f"{images}-128-85",
                "dtype": report_trainer.BY_ROW,
                "upstream": "ldam-drw",
                "variant": name,
                "loss_error": 1e-8,
                "gradient_error": 2e-3,
            },
            "stats": {"median": value, "min": value, "iqr": 0.1 * value, "rounds": 7, "data": [value] * 7},
        }
        for name, value in seconds.items()
    ]
    path.write_text(json.dumps({"machine_info": MACHINE | machine, "benchmarks": benchmarks}))
    return path


@pytest.fixture(autouse=True)
def no_accuracy(tmp_path, monkeypatch):
    monkeypatch.setattr(report_trainer, "ACCURACY", tmp_path)


def test_report_of_a_processor_without_bfloat16(tmp_path, capsys, monkeypatch):
    titles: list[str] = []
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", lambda figure, title: titles.append(title))
    path = raw(tmp_path / "trainer-cpu-raw.json", {"plain": 0.64, "ours": 0.512, "ours-compiled": 0.5})
    report.main([str(path), "--out", str(tmp_path)])
    text = (tmp_path / "trainer-cpu.md").read_text()
    assert "| plain PyTorch loop | float32 | 640 ms | 200 | 54.4 | 1.00x | 1.0e-08 | 2.0e-03 |" in text
    assert "| ltkernels | float32 | 512 ms | 250 | 43.5 | 1.25x |" in text
    assert "| ltkernels | bf16-mixed | left out: a processor without AVX512-BF16 or AMX emulates it" in text
    assert "| ltkernels, compiled | float32 | 500 ms | 256 | 42.5 | 1.28x |" in text
    assert "| ltkernels, compiled, float32: times faster than the plain loop | >= 1.3 | 1.28 | **missed** |" in text
    assert "not measured" in text and "synthetic" not in text and "Accuracy" not in text
    assert (tmp_path / "trainer-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert len(titles) == 1 and " cores (" in titles[0]
    assert "missed" in capsys.readouterr().out
    again = tmp_path / "again"
    report.main([str(tmp_path / "trainer-cpu.json"), "--out", str(again)])
    assert (again / "trainer-cpu.md").read_text() == text


def test_report_with_bfloat16_and_synthetic_images(tmp_path):
    seconds = {"plain": 0.64, "ours": 0.5, "ours-compiled": 0.4, "ours-bf16": 0.25, "ours-bf16-compiled": 0.26}
    results = load([raw(tmp_path / "raw.json", seconds, "synthetic", cores=8)])["trainer"]
    assert [target.verdict for target in report_trainer.targets(results)] == ["**missed**", "met", "met", "**missed**"]
    text = report.markdown(results)
    assert "The images are synthetic" in text and "left out" not in text and "4 worker processes" in text
    assert "| ltkernels, float32: times faster than the plain loop | >= 1.3 | 1.28 | **missed** |" in text
    assert "## Targets: 2 of 4 met" in text


@pytest.mark.parametrize("step, verdict", [(1.7e-3, "met"), (1.8e-3, "**missed**")])
def test_report_of_a_gpu_extrapolates(tmp_path, step, verdict):
    path = raw(tmp_path / "raw.json", {"plain": 0.03, "ours-captured": step}, device="cuda")
    results = load([path])["trainer"]
    (target,) = report_trainer.targets(results)
    assert "17,000 steps, extrapolated" in target.text and target.verdict == verdict
    assert target.measured == pytest.approx(17_000 * step)
    written = report.write(results, "gpu-some", tmp_path)
    assert [path.name for path in written] == ["trainer-gpu-some.json", "trainer-gpu-some.md", "trainer-gpu-some.png"]
    assert "| ltkernels, captured step | bf16-mixed | 1." in written[1].read_text()


@pytest.mark.parametrize(
    "values, verdict", [((8.0, 9.0, 8.5), "equal within noise"), ((2.0, 2.1, 2.2), "**they differ**")]
)
def test_report_shows_the_accuracy_where_it_was_measured(tmp_path, values, verdict):
    runs = [{"row": "plain", "seed": seed, "accuracy": 8.0 + 0.5 * seed, "machine": "this"} for seed in range(3)]
    runs += [{"row": "ours", "seed": seed, "accuracy": value, "machine": "that"} for seed, value in enumerate(values)]
    content = {"epochs": 5, "runs": runs} | trainer_accuracy.summary(runs)
    (tmp_path / "trainer-accuracy-cpu.json").write_text(json.dumps(content))
    path = raw(tmp_path / "raw.json", {"plain": 0.64, "ours": 0.5})
    text = report.markdown(load([path])["trainer"])
    assert "## Accuracy after 5 epochs" in text and verdict in text and "Trained on that and this." in text
    assert "| plain PyTorch loop | float32 | 8.00, 8.50, 9.00 | 8.50 +- 0.50 |  |" in text
