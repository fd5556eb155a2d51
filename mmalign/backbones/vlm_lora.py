"""LoRA adapters of PEFT on image-text models: read safely, checked to the last name, merged into the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmalign import paths
from mmalign.weights import read_state_dict

__all__ = ["adapter_files", "merge_adapter"]

NAMES = ("adapter_config.json", "adapter_model.safetensors")


def adapter_files(folder: str | Path, parameter: str = "lora") -> list[Path]:
    """The two files of an adapter's folder. ValueError where one is missing; nothing is ever downloaded."""
    path = paths.find(Path(folder).expanduser())
    files = [path / name for name in NAMES]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ValueError(f"{parameter}: {path} has no {' and no '.join(absent)}, so it is no LoRA folder of PEFT.")
    return files


def merge_adapter(model: Any, folder: str | Path) -> Any:
    """The model with an adapter's update added to its weights, in their precision.

    Raises:
        ValueError: no adapter there, one of another kind than LoRA, or tensors that do not fit the model (named).
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    config_file, weights = adapter_files(folder)
    try:
        config = LoraConfig.from_pretrained(str(config_file.parent))
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{config_file}: PEFT cannot read it as LoRA ({error})") from None
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise ValueError(f"{config_file}: is of the kind {config.peft_type}; only LoRA is merged here")
    config.inference_mode = True
    state = read_state_dict(weights)
    try:
        wrapped = get_peft_model(model, config)
        found = set_peft_model_state_dict(wrapped, state)
    except (RuntimeError, ValueError) as error:  # target modules or shapes that the model does not have
        raise ValueError(f"{weights.parent}: the adapter does not fit the model ({error})") from None
    extra = sorted(found.unexpected_keys)
    absent = sorted(key for key in found.missing_keys if ".lora_" in key)
    for names, what in ((extra, "unexpected"), (absent, "missing")):
        if names:
            raise ValueError(f"{weights}: {len(names)} tensors are {what}, such as {names[0]}; is it for this model?")
    return wrapped.merge_and_unload()
