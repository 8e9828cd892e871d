"""One optimiser step: what mixed precision may round, a capture that fails, and where Fabric is told to run."""

from __future__ import annotations

import contextlib

import pytest
import torch
from lightning_fabric.plugins.environments import MPIEnvironment
from tiny_images import load_tiny, tiny_recipe

from ltkernels.trainer import TrainerError
from ltkernels.trainer.cli import main
from ltkernels.trainer.data.datasets import long_tailed_split
from ltkernels.trainer.engine import fabric_for
from ltkernels.trainer.fit import Fit
from ltkernels.trainer.image_session import open_fabric
from ltkernels.trainer.recipes import RECIPES
from ltkernels.trainer.step import Batch, EagerStep, GraphedStep


class TwoLosses(torch.nn.Module):
    """Their weighted mean tells the shares, to float32's precision."""

    def __init__(self):
        super().__init__()
        self.losses = torch.nn.Parameter(torch.tensor([1.0, 3.0]))

    def forward(self, images, target, other=None):
        return self.losses[0] if other is None else self.losses * 1.0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_shares_of_mixed_images_are_never_rounded_to_16_bits(precision):
    labels, share = torch.zeros(4, dtype=torch.long), 0.7001
    with open_fabric(precision, "cpu") as fabric:
        network = TwoLosses()
        module, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=1.0))
        step = EagerStep(fabric, module, optimizer)
        shares = torch.tensor([share, 1 - share])
        assert step(Batch(torch.zeros(4, 1), labels, labels, shares)).item() == pytest.approx(3 - 2 * share, rel=1e-6)
        assert network.losses.tolist() == pytest.approx([1 - share, 2 + share], rel=1e-6)
        assert step(Batch(torch.zeros(4, 1), labels, None, shares)).item() == pytest.approx(
            share * (1 - share), rel=1e-6
        )


def test_a_capture_that_fails_names_the_way_out(monkeypatch):
    @contextlib.contextmanager
    def refused(graph, **options):
        assert options == {"capture_error_mode": "thread_local"}
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", refused)
    with open_fabric("32-true", "cpu") as fabric:
        network = TwoLosses()
        module, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=1.0))
        step = GraphedStep(EagerStep(fabric, module, optimizer), 4)
        with pytest.raises(TrainerError, match="could not be captured .*--no-cuda-graph .*: operation not permitted"):
            step._capture(Batch(torch.zeros(4, 1), torch.zeros(4, dtype=torch.long)))
        assert step._graph is None


def test_nobody_asks_mpi(monkeypatch):
    """mpi4py without a library of MPI raises RuntimeError where it is asked whether it runs the processes."""

    def detect():
        raise RuntimeError("cannot load MPI library")

    monkeypatch.setattr(MPIEnvironment, "detect", staticmethod(detect))
    with open_fabric(tiny_recipe().precision, "cpu") as fabric:
        assert isinstance(fabric.strategy.root_device, torch.device) and fabric.world_size == 1
    with fabric_for(RECIPES["digits"], "cpu") as fabric:
        assert fabric.world_size == 1


def test_a_checkpoint_of_another_kind_of_device_is_told():
    """The state of a GPU's generator has another length."""
    state = make_fit().state()
    state["generators"]["augment"] = torch.zeros(16, dtype=torch.uint8)
    with pytest.raises(TrainerError, match="the checkpoint is of a run on another kind of device, expected cpu"):
        make_fit().restore(state)


@pytest.mark.parametrize("options", [[], ["--no-cuda-graph"]])
def test_a_run_goes_on_without_a_graph(tmp_path, monkeypatch, options):
    cpu = ["--accelerator", "cpu", "--no-tensorboard"]
    assert main(["train", "tiny-ce", "--steps", "3", "--out", str(tmp_path / "run"), *cpu]) == 0
    (tmp_path / "run" / "metrics.json").unlink()
    graphs = []
    run = Fit.run
    monkeypatch.setattr(Fit, "run", lambda fit, *a, **k: (graphs.append(fit.recipe.cuda_graph), run(fit, *a, **k))[1])
    assert main(["train", "--resume", str(tmp_path / "run"), *options, *cpu]) == 0
    assert graphs == [not options] and (tmp_path / "run" / "metrics.json").is_file()


def test_a_finished_run_is_not_trained_again(tmp_path, capsys):
    out, cpu = tmp_path / "run", ["--accelerator", "cpu", "--no-tensorboard"]
    assert main(["train", "tiny-ce", "--steps", "3", "--out", str(out), *cpu]) == 0
    said = capsys.readouterr().out
    assert "3 steps of 16, made for tests" in said and "tier 3" not in said
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    assert main(["train", "--resume", str(out), *cpu]) == 0
    assert f"{out}: this run is finished; ltkernels train --from {out / 'recipe.json'}" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before


def make_fit():
    data, recipe = load_tiny(), tiny_recipe()
    with open_fabric(recipe.precision, "cpu") as fabric:
        return Fit(fabric, recipe, data, long_tailed_split(data, recipe.long_tail))
