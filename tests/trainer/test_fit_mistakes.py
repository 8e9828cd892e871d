"""Settings and data that do not fit: told before anything is left behind; and what a stopped run of processes keeps."""

import types

import pytest
import torch

pytest.importorskip("lightning_fabric", reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")

from tiny_images import load_tiny, tiny_recipe  # noqa: E402

from ltkernels.trainer.cli import main  # noqa: E402
from ltkernels.trainer.data.datasets import DATASETS, long_tailed_split  # noqa: E402
from ltkernels.trainer.data.images import MissingDataError  # noqa: E402
from ltkernels.trainer.fit import Fit  # noqa: E402
from ltkernels.trainer.image_session import open_fabric  # noqa: E402

CPU = ("--no-tensorboard", "--accelerator", "cpu")


def make_fit(fabric, recipe):
    data = load_tiny()
    return Fit(fabric, recipe, data, long_tailed_split(data, recipe.long_tail))


@pytest.mark.parametrize("options", [["--long-tail.max-count", "-5"], ["--long-tail.imbalance-factor", "nan"]])
def test_a_run_that_cannot_start_leaves_no_folder(tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tiny-ce", "--out", "run", *options, *CPU]) == 2
    assert "expected" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_missing_data_leaves_no_folder(tmp_path, monkeypatch, capsys):
    def missing(root):
        raise MissingDataError("fetch it from somewhere")

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(DATASETS, "tiny", missing)
        assert main(["train", "tiny-ce", "--out", "run", *CPU]) == 2
    assert "fetch it from somewhere" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert main(["train", "tiny-ce", "--out", "run", *CPU]) == 0


def test_settings_that_do_not_fit_the_class_counts_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tiny-ldam-drw", "--settings.max-margin", "1e308", "--out", "run", *CPU]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "settings of LDAM-DRW: " in error and "Traceback" not in error


def test_evaluation_may_be_rarer_than_the_run_is_long():
    with open_fabric("32-true", "cpu") as fabric:
        fit = make_fit(fabric, tiny_recipe(evaluate_every=10**12))
        assert len(fit._losses) == fit.recipe.steps


def test_a_checkpoint_has_the_losses_of_all_processes():
    """Each of them restores those that the first one wrote, and the next mean is of what they restored."""
    with open_fabric("32-true", "cpu") as fabric:
        fit = make_fit(fabric, tiny_recipe())
        fit.step = 3
        fit._losses[:3] = torch.tensor([1.0, 2.0, 3.0])
        other = torch.tensor([3.0, 6.0, 9.0])  # of a second process
        fit.fabric = types.SimpleNamespace(
            device=fabric.device, all_reduce=lambda losses, reduce_op: (losses + other[: len(losses)]) / 2
        )
        fit._finite_losses()
        assert fit.state()["losses"].tolist() == [2.0, 4.0, 6.0]
