"""What a run leaves: a PEFT adapter or a whole transformers folder, its processor beside it, and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from mmalign import __version__
from mmalign.progress import quiet_transformers


@torch.no_grad()
def export(model: Any, processor: Any, folder: Path, *, config: Mapping[str, Any], data: str, base_model: str) -> None:
    """Writes an adapter for `peft.PeftModel.from_pretrained`, or the model for `from_pretrained`; and the processor.

    Args:
        config: the resolved configuration of the run, of plain values.
        data: what it was trained on, in a sentence.
        base_model: the folder of the base model.
    """
    lora = bool(getattr(model, "peft_config", None))
    if lora:
        for settings in model.peft_config.values():
            settings.base_model_name_or_path = None  # a name would be looked up on the hub
            settings.inference_mode = True
    with quiet_transformers():
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    if lora:
        file = folder / "adapter_config.json"
        told = json.loads(file.read_text(encoding="utf-8")) | {"base_model_name_or_path": Path(base_model).name}
        file.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(config, data, Path(base_model).name, lora), encoding="utf-8")


def _card(config: Mapping[str, Any], data: str, base: str, lora: bool) -> str:
    front = {
        "library_name": "peft" if lora else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["mmalign", "dpo", *(["lora"] if lora else [])],
    }
    load = (
        "from peft import PeftModel\nfrom transformers import AutoModelForImageTextToText\n\n"
        f'model = AutoModelForImageTextToText.from_pretrained("{base}")\nmodel = PeftModel.from_pretrained(model, ".")'
        if lora
        else "from transformers import AutoModelForImageTextToText\n\n"
        'model = AutoModelForImageTextToText.from_pretrained(".")'
    )
    terms = ", ".join(f"{term['kind']} x {term['weight']:g}" for term in config["loss"]["terms"])
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {base}, tuned on answers\n\n"
        f"Objective: {terms}; beta {config['loss']['beta']:g}. Data: {data}. Made by mmalign {__version__}.\n\n"
        f"```python\n{load}\n```\n\n## Configuration\n\n"
        f"```yaml\n{yaml.safe_dump(dict(config), sort_keys=False)}```\n"
    )
