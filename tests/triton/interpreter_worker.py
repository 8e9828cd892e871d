"""Runs the cases of *_cases.py under Triton's interpreter: ``interpreter_worker.py OUT.json SHARD SHARDS``.

Its own process, because triton decides at import whether to interpret. Writes {case: "" or what went wrong}.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import linear_cases  # noqa: F401  (adds its cases)
import silencing_cases  # noqa: F401
import torch
from row_cases import CASES

from ltkernels import _ops
from ltkernels.triton import margin_softmax

warnings.filterwarnings("ignore")  # numpy reports the overflows and the NaN that the cases provoke


def serve_cpu_with_triton() -> torch.library.Library:
    """From here on the operators' CPU kernels are the Triton launchers."""
    library = torch.library.Library("ltkernels", "IMPL")
    for name in ("margin_softmax_fwd", "margin_softmax_fwd_", "margin_softmax_bwd", "margin_softmax_scale_"):
        library.impl(name, getattr(margin_softmax, name), "CPU")
    _ops._triton()  # counts their launches
    return library


def main() -> None:
    path, shard, shards = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    library = serve_cpu_with_triton()
    results = {}
    for name in list(CASES)[shard::shards]:
        start = time.perf_counter()
        try:
            CASES[name]()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc(limit=-6)
        if os.environ.get("LTKERNELS_TEST_VERBOSE"):
            print(f"{time.perf_counter() - start:6.2f} s  {name}  {results[name]}", flush=True)
    with open(path, "w") as file:
        json.dump(results, file)
    del library


if __name__ == "__main__":
    main()
