"""What programs that measure their own peak memory begin with; each runs in a process of its own, on Linux."""

PRELUDE = """
import ctypes, json, sys
from pathlib import Path
import torch, ltkernels.functional as LF

ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what malloc keeps must not hide what is used

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

def resident():
    # The memory in use; from here on VmHWM is the peak.
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")
"""
