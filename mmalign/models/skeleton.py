"""A checkpoint's models without their weights: the real classes made from config.json, however large they are."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmalign.jobs_inputs import Model
from mmalign.models import base
from mmalign.models.adapter import Adapter, load_part
from mmalign.models.checkpoint import index_parts, part_class


def skeleton(config: Model, *, dtype: torch.dtype = torch.float32, vae_dtype: torch.dtype | None = None) -> Adapter:
    """`base.load` without weights: the adapter, its parameters on the meta device in the dtypes that loading gives.

    A LoRA of the config is left out, and what training does not load. `tracing.without_values` makes parts computable.

    Raises:
        ValueError: see `base.check`.
    """
    path = base.check(config)
    base.no_bars()
    kind = base.adapter_class(path)
    found = config.model_copy(update={"path": path})
    left_out = {**kind.left_out(found), **dict.fromkeys(kind.idle_in_training(found))}
    parts: dict[str, Any] = {}
    for name in index_parts(path):
        library, class_name = part_class(path, name) if name not in left_out else ("", "")
        if library not in ("diffusers", "transformers"):
            continue
        cls = getattr(importlib.import_module(library), class_name)
        if issubclass(cls, nn.Module):
            empty = found.model_copy(update={"from_scratch": (name,)})
            with init_empty_weights():
                parts[name] = load_part(empty, name, torch.float32)
            if hasattr(parts[name], "tie_weights"):  # what is made on the meta device has copies instead
                parts[name].tie_weights()
            wanted = (vae_dtype or dtype) if name == "vae" else dtype
            _cast(parts[name], wanted, () if name in config.from_scratch else _in_float32(parts[name], wanted))
        elif name in config.components:
            parts[name] = load_part(found, name, dtype)
    pipe = kind.pipeline_class.from_pretrained(path, local_files_only=True, **left_out, **parts)
    adapter: Adapter = kind(pipe, found)
    base.work_in_parts(adapter)
    return adapter


def fake_mode() -> FakeTensorMode:
    """The mode that a skeleton's tensors without values are made and used in; real tensors may meet them."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def _in_float32(module: Any, dtype: torch.dtype) -> Collection[str]:
    """Names within parameters' names that loading leaves in float32: the class says so for half precision.

    In transformers two lists do, one of them for float16 alone.
    """
    if dtype == torch.float32:
        return ()
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    strict = getattr(module, "_keep_in_fp32_modules_strict", None)
    if strict is None:
        return kept
    return {*strict} | (kept if dtype == torch.float16 else set())


def _cast(module: nn.Module, dtype: torch.dtype, in_float32: Collection[str]) -> None:
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not {*name.split(".")} & {*in_float32}:
            parameter.data = parameter.data.to(dtype)
