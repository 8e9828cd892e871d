"""A variant that is wrong or raises fails alone: the others of its group are timed all the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks are part of the repository, not of the package

from benchmarks import margin  # noqa: E402
from benchmarks import suite as suite_module  # noqa: E402
from benchmarks.interleave import Effort  # noqa: E402
from benchmarks.problems import Case  # noqa: E402
from benchmarks.results import Results  # noqa: E402
from benchmarks.suite import Suite  # noqa: E402
from benchmarks.targets import share_of_clone  # noqa: E402
from benchmarks.variants import Variant  # noqa: E402


def test_a_wrong_variant_fails_alone(monkeypatch, one_thread):
    def wrong(logits, target, bias, reduction):
        return margin.eager(logits, target, bias, reduction) * 1.0001

    monkeypatch.setitem(margin.VARIANTS, "wrong", Variant("wrong", wrong))
    case = Case("64x100", "float32", "upstream1")
    suite = Suite([(case, "ours"), (case, "wrong")], Effort(0, 1), measure_memory=False)
    assert isinstance(suite.measured(case, "wrong").failure, AssertionError)
    ours = suite.measured(case, "ours")
    assert ours.failure is None and len(ours.samples) == 1
    assert {"clone_fresh_gb_per_s", "copy_warm_gb_per_s"} <= ours.roofline.keys()


@pytest.mark.parametrize("good_calls", [1, 2, 4, 7])
def test_a_variant_that_raises_while_it_is_timed_fails_alone(monkeypatch, one_thread, good_calls):
    calls = []

    def tired(logits, target, bias, reduction):
        calls.append(1)
        if len(calls) > good_calls:
            raise MemoryError("no more")
        return margin.eager(logits, target, bias, reduction)

    monkeypatch.setitem(margin.VARIANTS, "tired", Variant("tired", tired))
    case = Case("64x100", "float32", "upstream1")
    suite = Suite([(case, "ours"), (case, "tired"), (case, "eager")], Effort(0, 5, 5), measure_memory=False)
    found = {name: suite.measured(case, name) for name in ("ours", "tired", "eager")}
    assert isinstance(found["tired"].failure, MemoryError) and not found["tired"].samples
    assert all(found[name].failure is None and len(found[name].samples) == 5 for name in ("ours", "eager"))
    assert len(calls) == good_calls + 1  # the group is measured once


def test_shares_of_a_rate_are_medians_over_rounds(monkeypatch, one_thread):
    """Where the machine's speed changes between rounds, medians of the two times may be of different speeds."""

    def rounds(steps, *_):
        # Half as fast in the second round; in the third the pass is, and the copy is not. Ratio of the medians: 0.3.
        return {key: [1.0, 2.0, 2.0] if key[1] == "ours" else [0.6, 1.2, 0.6] for key in steps}

    monkeypatch.setattr(suite_module, "interleave", rounds)
    case = Case("64x100", "float32", "upstream1")
    ours = Suite([(case, "ours")], Effort(0, 3), measure_memory=False).measured(case, "ours")
    assert ours.rate_over["clone_fresh"] == pytest.approx(0.6)
    info = ours.extra_info(case, margin.VARIANTS["ours"], "cpu")
    results = Results(
        {}, {("64x100", "float32", "upstream1"): {"variants": {"ours": info}, "clone_fresh_gb_per_s": 1e9}}
    )
    assert share_of_clone(results, "64x100", "float32") == pytest.approx(0.6)
