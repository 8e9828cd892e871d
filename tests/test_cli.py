"""The command line without the trainer: usage, doctor, and what it says when something is missing."""

from __future__ import annotations

import builtins
import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import pytest

from ltkernels import cli


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "ltkernels.cli", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_usage_names_every_command(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert "doctor" in out and "train" in out


def test_doctor_names_the_kernel_that_ran():
    done = run("doctor")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("cpu ")]
    assert "margin_softmax" in line and line.endswith(": ok")


def test_a_folder_that_is_not_installed_has_no_version(monkeypatch, capsys):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "ltkernels of this folder, not installed\n"


def test_doctor_shows_a_lowered_capability():
    done = run("doctor", ATEN_CPU_CAPABILITY="default")
    assert "cpu.default.margin_softmax" in done.stdout
    assert "set by ATEN_CPU_CAPABILITY" in done.stdout


def test_doctor_shows_a_forced_reference():
    done = run("doctor", LTKERNELS_BACKEND="reference")
    assert done.returncode == 0
    assert "the definition in plain torch: LTKERNELS_BACKEND=reference" in done.stdout


def test_doctor_fails_on_a_wrong_result(monkeypatch, capsys):
    import ltkernels.functional as LF

    right = LF.margin_cross_entropy
    monkeypatch.setattr(LF, "margin_cross_entropy", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    assert cli.doctor() == 1
    assert "WRONG RESULT" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["tyro", "lightning_fabric"])
def test_train_without_extras_says_what_to_install(monkeypatch, capsys, missing):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    assert cli.main(["train", "digits"]) == 2
    assert missing in capsys.readouterr().err


def test_interrupt_while_the_trainer_is_imported(monkeypatch, capsys):
    """Its imports take seconds: an interrupt there ends like one of a run, without a traceback."""

    def interrupt(name, *arguments):
        if name == "ltkernels.trainer" and "cli" in arguments[2]:
            raise KeyboardInterrupt
        return imported(name, *arguments)

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", interrupt)
    assert cli.main(["train", "digits"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_extension_that_does_not_load_ends_without_a_traceback(monkeypatch, capsys):
    def broken(name, *arguments):
        if name == "ltkernels.trainer" and "cli" in arguments[2]:
            raise ImportError("ltkernels: the compiled extension is missing")
        return imported(name, *arguments)

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", broken)
    assert cli.main(["table", "--help"]) == 2
    assert capsys.readouterr().err == "ltkernels: the compiled extension is missing\n"
