"""Where the CLIP lies whose features strategies compare pictures and prompts by."""

from __future__ import annotations

from pathlib import Path

from mmalign.backbones.clip_config import CONFIG_FILE
from mmalign.paths import find

WEIGHTS = frozenset({".safetensors", ".pt", ".bin"})


def clip_files(checkpoint: Path, model: str, key: str) -> tuple[str, Path]:
    """Config and weights of a CLIP, for `load_clip_backbone`.

    Args:
        checkpoint: a file, or a folder with one file of weights.
        model: an open_clip name, folder or config; auto: the folder's own open_clip_config.json, or ViT-B-32.
        key: the setting, for the message.

    Raises:
        ValueError: no weights there, or several files in the folder.
    """
    place = find(checkpoint)
    files = sorted(p for p in place.iterdir() if p.suffix in WEIGHTS) if place.is_dir() else [place]
    if len(files) != 1 or not files[0].is_file():
        raise ValueError(f"{key}: {place} holds {len(files)} files of weights; name the one that is meant")
    own = files[0].parent
    if model != "auto":
        return model, files[0]
    return (str(own) if (own / CONFIG_FILE).is_file() else "ViT-B-32"), files[0]
