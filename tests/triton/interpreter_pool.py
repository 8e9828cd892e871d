"""Cases under Triton's interpreter, in processes of their own: triton decides at import whether to interpret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch

PROCESSES = 2


def results_of(worker: str, cases: Collection[str], folder: Path) -> dict[str, str]:
    """Of every case of a program here that calls :func:`run_cases` with these cases, what went wrong: "" if nothing."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))}
    files = [folder / f"{i}.json" for i in range(PROCESSES)]
    running = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(worker)), str(file)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for file in files
    ]
    results: dict[str, str] = {}
    for process, file in zip(running, files, strict=True):
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, f"{worker} failed:\n{output}"
        results |= json.loads(file.read_text())
    assert results.keys() == set(cases), "the program has other cases than its test"
    return results


def run_cases(cases: Mapping[str, Callable[[], None]]) -> None:
    """Run those that no other process has taken; {case: what went wrong} goes into the file of the command line."""
    file = Path(sys.argv[1])
    torch.set_num_threads(1)
    results = {}
    for index, (name, case) in enumerate(cases.items()):
        try:
            (file.parent / f"{index}.taken").touch(exist_ok=False)
        except FileExistsError:
            continue
        start = time.perf_counter()
        try:
            case()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc(limit=-6)
        if os.environ.get("LTKERNELS_TEST_VERBOSE"):
            print(f"{time.perf_counter() - start:6.2f} s  {name}  {results[name]}", flush=True)
    file.write_text(json.dumps(results))
