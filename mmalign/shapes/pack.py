"""Stores a shapes pipeline in half precision: `python -m mmalign.shapes.pack runs/shapes-sd/export assets/shapes-sd`"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import diffusers
import torch

if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    index = json.loads((source / "model_index.json").read_text())
    absent = {name: None for name, entry in index.items() if isinstance(entry, list) and not entry[0]}
    pipe = getattr(diffusers, index["_class_name"]).from_pretrained(
        source, dtype=torch.float16, local_files_only=True, use_safetensors=True, **absent
    )
    pipe.save_pretrained(target)
    for file in target.rglob("*.json"):  # where the weights lay before is nobody's business, and changes each time
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None):
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    size = sum(file.stat().st_size for file in target.rglob("*.safetensors"))
    print(f"{target}: {size / 1e6:.1f} MB of safetensors")
