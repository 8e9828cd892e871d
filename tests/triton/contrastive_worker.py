"""Runs contrastive_cases.py under Triton's interpreter, with others of its kind: ``contrastive_worker.py OUT.json``."""

from __future__ import annotations

import os
import warnings

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from contrastive_cases import CASES
from interpreter_pool import run_cases

if __name__ == "__main__":
    warnings.filterwarnings("ignore")  # numpy reports the overflows and the NaN that the cases provoke
    run_cases(CASES)
