"""The contrastive benchmarks compare with the definition, and leave out what does not fit or is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks are part of the repository, not of the package

from benchmarks import variants  # noqa: E402
from benchmarks.contrastive import FAMILY, LARGEST, TEMPERATURE, VARIANTS, ContrastiveProblem  # noqa: E402
from benchmarks.interleave import Effort  # noqa: E402
from benchmarks.problems import Case  # noqa: E402
from benchmarks.suite import Suite  # noqa: E402
from benchmarks.variants import Step, Variant  # noqa: E402
from ltkernels import reference  # noqa: E402


def problem(shape: str, dtype: str = "float32") -> ContrastiveProblem:
    return ContrastiveProblem(Case(shape, dtype, "upstream1", "contrastive"))


@pytest.mark.parametrize("method", ["temperatures", "scalar", "supcon", "cross"])
def test_the_exact_answer_is_that_of_the_definition(method, one_thread):
    of = problem("600x16")  # several blocks, the last one smaller
    x = of.embeddings.detach().double().requires_grad_()
    z = x / x.norm(dim=1, keepdim=True) if method in ("scalar", "supcon") else x
    query, key = z.chunk(2) if method == "cross" else (z, None)
    tau = of.temperatures.double() if method == "temperatures" else torch.full((len(query),), TEMPERATURE).double()
    labels = of.target if method == "supcon" else None
    positive = {"supcon": None, "cross": of.aligned}.get(method, of.positive)
    loss, _ = reference.contrastive(
        query, key, tau, labels, None, positive, None, None, None, None, None, None, reference.ALL, True, False, "mean"
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, x)
    exact = of.exact(method)
    assert len(exact.rows) == 600  # all of them, below twice the number that is compared
    torch.testing.assert_close(exact.loss, loss.detach())
    torch.testing.assert_close(exact.gradient, gradient[exact.rows])


def test_inputs_are_two_views_of_length_one():
    of = problem("64x32", "bfloat16")
    z = of.embeddings.detach().float()
    torch.testing.assert_close(z.norm(dim=1), torch.ones(64), atol=1e-2, rtol=0)
    assert (z * z[of.positive]).sum(1).min() > 0.2  # the views of a sample resemble each other
    assert torch.equal(of.target, of.target[of.positive])
    assert torch.equal(of.temperatures, of.temperatures.bfloat16().float())
    assert of.temperatures.min() < 0.3 and of.temperatures.max() > 0.6
    assert of.negative.sum(1).tolist() == [62] * 64
    assert torch.equal(of.positive, Step(VARIANTS["eager"], of.case, of, VARIANTS["eager"].loss)._arguments[2])


def test_a_gradient_that_is_wrong_in_one_row_is_found(one_thread):
    of, variant = problem("64x16"), VARIANTS["eager"]
    step = Step(variant, of.case, of, variant.loss)
    loss = step.run().detach()
    step.gradients[0][5] *= 1.01
    assert of.errors(of.case, of.exact(variant.method), loss, step.gradients)[1] > 1e-4


def test_work_is_counted_by_the_similarities(one_thread):
    case = Case("64x16", "float32", "upstream1", "contrastive")
    assert case.bytes == 2 * 64 * 64 * 4
    suite = Suite([(case, "ours"), (case, "eager")], Effort(0, 2), measure_memory=False)
    ours = suite.measured(case, "ours")
    assert ours.failure is None and ours.roofline.keys() == {
        f"mm_{layout}_gflop_per_s" for layout in ("nn", "nt", "tn")
    }
    of = problem("64x16")
    assert of.work() == pytest.approx(6e-9 * 64 * 64 * 16) and of.roofline_work() == pytest.approx(of.work() / 3)
    assert not problem("64x16", "bfloat16").roofline()  # float32 is what the CPU's rate is measured in


def test_what_does_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(Variant, "runs_on", lambda variant, device: device == "cuda" or not variant.gpu_only)
    monkeypatch.setattr(variants, "slow_in_bfloat16", lambda variant, *_: variant.rounds)

    def names(device: str, shape: str, dtype: str) -> list[str]:
        return [name for case, name in FAMILY.rows(device, False) if (case.shape, case.dtype) == (shape, dtype)]

    cpu = [name for name, variant in VARIANTS.items() if not variant.gpu_only]
    assert names("cpu", "512x128", "float32") == cpu and names("cpu", "512x128", "bfloat16") == ["ours"]
    assert names("cpu", "4096x128", "float32") == [name for name in cpu if name != "pml-ntxent"]
    assert names("cpu", "4096x512", "float32") == ["ours", "eager", "eager-compiled"]
    assert names("cpu", "16384x128", "float32") == ["ours", "eager"]
    assert names("cpu", LARGEST, "bfloat16") == [] == names("cuda", LARGEST, "float32")
    assert {"ours", "eager", "ours-cross", "inf-cl"} <= set(names("cuda", LARGEST, "bfloat16"))
    assert "inf-cl" not in names("cuda", "4096x128", "float32")


def test_variants_of_packages_that_are_missing_are_left_out():
    assert not Variant("some", len, package="a_package_that_nobody_has").runs_on("cuda")
    assert Variant("some", len, package="json.decoder").runs_on("cpu")
    assert not Variant("some", len, package="json", gpu_only=True).runs_on("cpu")
