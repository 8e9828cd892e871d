"""Checkpoints: complete or not used, two kept, damage told from disk to message."""

import os
import warnings

import pytest
import torch

pytest.importorskip("lightning_fabric", reason="needs the trainer's dependencies: pip install 'ltkernels[trainer]'")

from ltkernels.trainer import TrainerError, checkpoint  # noqa: E402
from ltkernels.trainer.checkpoint import (  # noqa: E402
    CheckpointFolder,
    DamagedCheckpointError,
    export_weights,
    read,
    read_weights,
    write_atomically,
)


def state(step):
    return {"step": step, "weights": torch.arange(5000.0) + step, "history": [{"loss": 0.5, "few": None}]}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (5, 10):
        folder.save(step, state(step))
    return folder


def test_the_newest_comes_back_and_two_are_kept(folder, tmp_path):
    folder.save(15, state(15))
    assert names(tmp_path) == ["checkpoint-00000010.pt", "checkpoint-00000015.pt"]
    loaded = folder.load()
    assert loaded["step"] == 15 and torch.equal(loaded["weights"], state(15)["weights"])
    assert loaded["history"] == state(15)["history"]


def test_a_folder_without_checkpoints(tmp_path):
    assert CheckpointFolder(tmp_path).load() is None
    assert CheckpointFolder(tmp_path / "none").load() is None


def test_checkpoints_hold_tensors_and_plain_values_only(folder, tmp_path):
    torch.load(tmp_path / "checkpoint-00000010.pt", weights_only=True)
    torch.save({"step": os.system}, tmp_path / "checkpoint-00000099.pt")
    with pytest.warns(UserWarning, match="checkpoint-00000099.pt is truncated or no checkpoint"):
        assert folder.load()["step"] == 10


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused_and_the_previous_one_used(folder, tmp_path, share):
    file = tmp_path / "checkpoint-00000010.pt"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    message = "checkpoint-00000010.pt is truncated or no checkpoint .*going on from checkpoint-00000005.pt"
    with pytest.warns(UserWarning, match=message):
        assert folder.load()["step"] == 5


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_good_one(folder, tmp_path):
    (tmp_path / "checkpoint-00000010.pt").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="going on from checkpoint-00000005.pt"):
        folder.load()
    for step in (6, 7):
        folder.save(step, state(step))
    assert names(tmp_path) == ["checkpoint-00000006.pt", "checkpoint-00000007.pt"]
    assert folder.load()["step"] == 7


def test_a_changed_bit_is_noticed(folder, tmp_path):
    file = tmp_path / "checkpoint-00000010.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # in the numbers of the tensor: torch.load reads on
    file.write_bytes(content)
    assert torch.load(file, weights_only=True)["step"] == 10
    with pytest.warns(UserWarning, match="checkpoint-00000010.pt is damaged"):
        assert folder.load()["step"] == 5


def test_without_a_good_checkpoint_there_is_an_error(folder, tmp_path):
    for file in tmp_path.iterdir():
        file.write_bytes(b"nothing")
    with pytest.raises(DamagedCheckpointError, match="no checkpoint in .* can be read: .*10.pt.*05.pt"):
        folder.load()
    with pytest.raises(DamagedCheckpointError, match="it holds a list"):
        torch.save([1], tmp_path / "list.pt")
        read(tmp_path / "list.pt")


def test_an_unfinished_file_is_no_checkpoint(folder, tmp_path):
    (tmp_path / ".checkpoint-00000015.pt.tmp").write_bytes(b"begun")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert folder.load()["step"] == 10
    assert names(tmp_path) == ["checkpoint-00000005.pt", "checkpoint-00000010.pt"]


def test_data_is_on_the_disk_before_the_name_and_the_name_before_older_files_go(folder, tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def recording(*arguments, name=name, original=original):
            kind = "folder" if name == "fsync" and os.path.isdir(f"/proc/self/fd/{arguments[0]}") else "file"
            done.append((name, kind, len(list(tmp_path.glob("checkpoint-*")))))
            return original(*arguments)

        monkeypatch.setattr(checkpoint.os, name, recording)
    folder.save(15, state(15))
    assert done == [("fsync", "file", 2), ("replace", "file", 2), ("fsync", "folder", 3)]
    assert len(folder.files()) == 2


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_failed_write_leaves_everything_as_it_was(folder, tmp_path, monkeypatch, error):
    def failing(state, file):
        file.write(b"a part")
        raise error

    before = names(tmp_path)
    monkeypatch.setattr(checkpoint.torch, "save", failing)
    with pytest.raises(TrainerError, match="cannot write .*checkpoint-00000015.pt: .*(No space|failed)"):
        folder.save(15, {})
    assert names(tmp_path) == before and folder.load()["step"] == 10


def test_a_file_is_replaced_as_a_whole(tmp_path):
    def fail(file):
        file.write(b"half")
        raise OSError("broken disk")

    target = tmp_path / "file"
    target.write_bytes(b"old")
    with pytest.raises(TrainerError):
        write_atomically(target, fail)
    assert target.read_bytes() == b"old" and names(tmp_path) == ["file"]
    write_atomically(target, lambda file: file.write(b"new"))
    assert target.read_bytes() == b"new"


def test_a_read_only_disk_is_told(tmp_path, monkeypatch):
    def read_only(*arguments, **options):
        raise OSError(30, "Read-only file system")

    for name in ("open", "unlink"):
        monkeypatch.setattr("builtins.open" if name == "open" else "pathlib.Path.unlink", read_only)
    with pytest.raises(TrainerError, match="cannot write .*file: .*Read-only file system"):
        write_atomically(tmp_path / "file", lambda file: None)


def test_weights_come_back(tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last
    )
    file = export_weights(tmp_path, network.state_dict())
    weights = read_weights(tmp_path)
    assert file.name in ("weights.safetensors", "weights.pt")
    assert weights.keys() == network.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in network.state_dict().items())
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DamagedCheckpointError, match="is truncated or no"):
        read_weights(tmp_path)
    file.unlink()
    with pytest.raises(TrainerError, match="no weights.safetensors or weights.pt in it"):
        read_weights(tmp_path)
