"""Devices and precisions as configs name them."""

from __future__ import annotations

import torch

__all__ = ["resolve_device", "resolve_dtype"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_device(device: str) -> torch.device:
    """``auto`` is CUDA where there is a GPU, else the CPU; anything else is taken as torch names it.

    Raises:
        ValueError: an unknown device, or one that is not here; with those that are.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = _devices()
    choices = ", ".join(("auto", *here))
    try:
        resolved = torch.device(device)
    except RuntimeError:
        known = "auto, cpu, cuda or cuda:N"
        raise ValueError(f"device: {device!r} is no device; use {known}. Here are {choices}.") from None
    if str(resolved) not in here and str(resolved) != "cpu:0":
        raise ValueError(f"device: {device} is not here, as far as PyTorch can tell; use one of {choices}.")
    return resolved


def _devices() -> list[str]:
    """The CPU and what else this machine computes on: ``cuda``, ``cuda:0``, ..., or another of torch's accelerators."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return ["cpu"]
    count = torch.accelerator.device_count()
    return ["cpu", kind.type, *(f"{kind.type}:{number}" for number in range(count))]


def resolve_dtype(dtype: str) -> torch.dtype:
    """``float32`` or ``bfloat16`` as torch's type.

    Raises:
        ValueError: any other name.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype '{dtype}' is not known; use float32 or bfloat16.")
    return DTYPES[dtype]
