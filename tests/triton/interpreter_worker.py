"""Runs row_cases.py and what adds to it under Triton's interpreter: ``interpreter_worker.py OUT.json``."""

from __future__ import annotations

import os
import warnings

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import linear_cases  # noqa: F401  (adds its cases)
import silencing_cases  # noqa: F401
import torch
from interpreter_pool import run_cases
from row_cases import CASES

from ltkernels import _ops
from ltkernels.triton import margin_softmax


def in_place(logits: torch.Tensor, *options) -> tuple[torch.Tensor, torch.Tensor]:
    """The linear form pads the rows of a chunk on a CPU only; the kernel wants them as they are on a GPU."""
    rows = logits.contiguous()
    results = margin_softmax.margin_softmax_fwd_(rows, *options)
    logits.copy_(rows)
    return results


def serve_cpu_with_triton() -> torch.library.Library:
    """From here on the operators' CPU kernels are the Triton launchers."""
    library = torch.library.Library("ltkernels", "IMPL")
    for name in ("margin_softmax_fwd", "margin_softmax_bwd", "margin_softmax_scale_"):
        library.impl(name, getattr(margin_softmax, name), "CPU")
    library.impl("margin_softmax_fwd_", in_place, "CPU")
    _ops._triton()  # counts their launches
    return library


if __name__ == "__main__":
    warnings.filterwarnings("ignore")  # numpy reports the overflows and the NaN that the cases provoke
    library = serve_cpu_with_triton()
    run_cases(CASES)
    del library
