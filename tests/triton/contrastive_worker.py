"""Runs contrastive_cases.py under Triton's interpreter: ``contrastive_worker.py OUT.json SHARD SHARDS``.

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

import torch
from contrastive_cases import CASES

warnings.filterwarnings("ignore")  # numpy reports the overflows and the NaN that the cases provoke


def main() -> None:
    path, shard, shards = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
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


if __name__ == "__main__":
    main()
