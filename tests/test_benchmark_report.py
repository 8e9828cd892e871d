"""The benchmarks measure in turn, keep wrong variants out, and report honestly. Speed itself is not tested here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are part of the repository, not of the installed package

from benchmarks import peers, report, run_gpu  # noqa: E402
from benchmarks.interleave import Effort, interleave  # noqa: E402
from benchmarks.problems import SHAPES, Case, Problem, errors, exact_answer  # noqa: E402
from benchmarks.results import ResultsError, load  # noqa: E402
from benchmarks.suite import Suite  # noqa: E402
from benchmarks.targets import targets  # noqa: E402

MACHINE = {
    "device": "cpu",
    "name": "Processor",
    "cores": 2,
    "threads": 2,
    "cpu_capability": "AVX2",
    "system": "Linux x86_64",
    "huge_pages": "madvise",
    "python": "3.11",
    "torch": "2.13.0",
    "date": "2026-01-01",
    "quick": False,
}
SECONDS = {"ours": 1e-3, "eager": 4e-3, "eager-compiled": 2.45e-3, "ldam-ours": 1e-3, "ldam-authors": 15e-3}


def benchmark(shape: str, dtype: str, variant: str, seconds: float) -> dict:
    case = Case(shape, dtype, "upstream1")
    rate = case.bytes * 1e-9 / seconds
    return {
        "fullname": f"benchmarks/bench.py::test[{case}-{variant}]",
        "extra_info": {
            "shape": shape,
            "dtype": dtype,
            "upstream": "upstream1",
            "variant": variant,
            "bytes": case.bytes,
            "gb_per_s": rate,
            "clone_fresh_gb_per_s": case.bytes * 1e-9 / 0.9e-3,
            "copy_warm_gb_per_s": case.bytes * 1e-9 / 0.5e-3,
            "peak_memory_bytes": None if case.rows < 4096 else 12_300_000,
        },
        "stats": {"median": seconds, "min": seconds, "iqr": 0.3 * seconds, "rounds": 7, "data": [seconds] * 1000},
    }


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """As pytest-benchmark writes it: bfloat16 a little slower than float32 at 512x1000, equal elsewhere."""
    content = {
        "machine_info": MACHINE,
        "commit_info": {"project": "secret"},
        "benchmarks": [
            benchmark(shape, dtype, variant, seconds * (1.02 if (shape, dtype) == ("512x1000", "bfloat16") else 1))
            for shape in SHAPES
            for dtype in ("float32", "bfloat16")
            for variant, seconds in SECONDS.items()
        ],
    }
    path = tmp_path / "cpu-raw.json"
    path.write_text(json.dumps(content))
    return path


def test_targets_are_met_or_missed(raw):
    verdicts = {target.text: target.verdict for target in targets(load([raw]))}
    assert verdicts["512x1000: faster than eager"] == "met"
    assert verdicts["2048x8142: faster than eager"] == "**missed**"  # 4 of 4.5
    assert verdicts["128x100: faster than torch.compile"] == "**missed**"  # 2.45 of 2.5
    assert verdicts["2048x8142: faster than torch.compile"] == "met"
    assert verdicts["8192x1000: LDAM faster than its authors' formula"] == "met"  # 15 of 15
    assert verdicts["512x1000: bfloat16 against float32"] == "**missed**"
    assert verdicts["128x10: bfloat16 against float32"] == "met"
    assert verdicts["4096x8142: share of the rate of x.clone() into fresh memory"] == "met"  # 0.9
    assert sum("share" in text for text in verdicts) == 5  # the shapes with 4e6 logits


def test_report_has_every_table_and_is_small(raw, tmp_path, capsys):
    report.main([str(raw), "--out", str(tmp_path)])
    text = (tmp_path / "cpu.md").read_text()
    assert "| 512 x 1000 | 1 ms ~ | 4 ms ~ | 2.45 ms ~ | 4.00x (>= 3.5) | 2.45x (>= 2.5) |" in text
    assert "## Targets: " in text and "**missed**" in text and "12.3" in text
    for title in ("Memory traffic", "LDAM", "Peak memory", "Times: float32", "Times: bfloat16"):
        assert f"## {title}" in text
    trimmed = (tmp_path / "cpu.json").read_text()
    assert "secret" not in trimmed and '"data"' not in trimmed and len(trimmed) < 20_000
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "missed" in capsys.readouterr().out


def test_report_of_a_report_is_the_same(raw, tmp_path):
    report.main([str(raw), "--out", str(tmp_path / "one")])
    report.main([str(tmp_path / "one" / "cpu.json"), "--out", str(tmp_path / "two")])
    for name in ("cpu.json", "cpu.md"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()


def test_runs_of_two_machines_are_not_merged(raw, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(raw.read_text().replace('"Processor"', '"Another"'))
    with pytest.raises(ResultsError, match="other.json: measured elsewhere"):
        load([raw, other])


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file. Measure first: pytest benchmarks --benchmark-only"),
        ("", "not JSON"),
        ("[]", "neither pytest-benchmark's results nor ours"),
        ('{"benchmarks": [], "machine_info": {}}', "no benchmark of this suite"),
    ],
)
def test_unusable_files_are_named(content, message, tmp_path, capsys):
    path = tmp_path / "some.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        report.main([str(path), "--out", str(tmp_path)])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert f"{path}: " in error and message in error


class Recorder:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def reset(self) -> None:
        pass

    def run(self) -> None:
        self.log.append(self.name)


def test_every_round_runs_every_step_in_an_order_of_its_own(monkeypatch):
    monkeypatch.setattr("benchmarks.interleave._sample_cpu", lambda step, repeats: step.run() or 1.0)
    log: list[str] = []
    steps = {name: Recorder(name, log) for name in "abcd"}
    samples = interleave(steps, Effort(seconds=0, min_rounds=7))
    assert {name: len(values) for name, values in samples.items()} == dict.fromkeys("abcd", 7)
    rounds = ["".join(log[-28:][i : i + 4]) for i in range(0, 28, 4)]
    assert all(sorted(one) == list("abcd") for one in rounds) and len(set(rounds)) > 3


@pytest.mark.parametrize("name", [name for name, variant in peers.VARIANTS.items() if variant.package is None])
def test_variants_give_the_exact_answer(name, one_thread):
    variant = peers.VARIANTS[name]
    for upstream in ("half", "none"):
        case = Case("64x100", "float32", upstream)
        problem = Problem(case)
        step = peers.Step(variant, case, problem, variant.loss)
        loss = step.run().detach()
        assert max(errors(case, problem, exact_answer(problem, variant.method), loss, step.leaf.grad)) < 1e-5


def test_a_wrong_variant_fails_alone(monkeypatch, one_thread):
    def wrong(logits, target, bias, reduction):
        return peers.eager(logits, target, bias, reduction) * 1.0001

    monkeypatch.setitem(peers.VARIANTS, "wrong", peers.Variant("wrong", wrong))
    case = Case("64x100", "float32", "upstream1")
    suite = Suite([(case, "ours"), (case, "wrong")], Effort(0, 1), measure_memory=False)
    assert isinstance(suite.measured(case, "wrong").failure, AssertionError)
    ours = suite.measured(case, "ours")
    assert ours.failure is None and len(ours.samples) == 1
    assert {"clone_fresh", "copy_warm"} <= ours.roofline.keys()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM")
def test_peak_memory_of_plain_torch_is_that_of_its_temporaries():
    from benchmarks.memory import peak_on_cpu

    case = Case("1024x1000", "float32", "upstream1")
    matrix = case.bytes // 2
    plain = peak_on_cpu(case, peers.VARIANTS["eager"])
    assert 1.9 * matrix < plain < 2.5 * matrix  # logits + bias, and its log-softmax
    assert peak_on_cpu(case, peers.VARIANTS["ours"]) < 0.3 * matrix


@pytest.mark.slow
def test_the_suite_runs_under_pytest(run_python, tmp_path):
    path = tmp_path / "raw.json"
    run_python(
        *("-m", "pytest", "benchmarks", "--benchmark-only", "--quick", "-p", "no:cacheprovider"),
        *("-k", "128x10 and (upstream1 or none) and not compiled", f"--benchmark-json={path}"),
    )
    results = load([path])
    assert len(results.cases) == 4
    case = results.cases["128x10", "float32", "upstream1"]
    assert case["variants"].keys() == {"ours", "eager", "ldam-ours", "ldam-authors"}
    assert case["bytes"] == 2 * 128 * 10 * 4 and case["clone_fresh_gb_per_s"] > 0
    assert case["variants"]["ours"]["rounds"] >= 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_run_gpu_says_that_there_is_no_gpu(capsys):
    assert run_gpu.main([]) == 2
    assert "sees no NVIDIA GPU" in capsys.readouterr().err
