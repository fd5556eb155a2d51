"""What the benchmarks share: a clock, a measured ceiling, and the line that says where figures come from."""

from __future__ import annotations

import ctypes
import gc
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmalign.memory_estimate import available


def clock(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that the work takes, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_of(run: Callable[[], None], device: torch.device) -> tuple[float, int | None]:
    """Seconds, and the peak in bytes of device memory or of resident memory (None where the kernel hides it)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return clock(run, device), torch.cuda.max_memory_allocated(device)
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or memory that an earlier block has freed would count
        reset.write_text("5")  # the kernel's word for: forget the resident peak
    except OSError:
        return clock(run, device), None
    seconds = clock(run, device)
    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return seconds, int(peak.split()[1]) * 1024


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product, best of several."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = min(clock(lambda: [a @ b for _ in range(4)], device) / 4 for _ in range(6))
    return 2 * n**3 / best / 1e12


def free_memory(device: torch.device) -> float:
    """Bytes that can be had: the GPU's free ones; the machine's, or what the process's group may still take."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(available(device))


def machine(device: torch.device) -> str:
    """One line that says where the figures come from."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [platform.processor()]
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{names[0]} x{len(names)}{gpu}, {torch.get_num_threads()} threads, torch {torch.__version__}"
