"""CMU and Meta's GenAI-Bench, whose media are rated one by one; as `mmalign.protocols.sets` reads the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmalign.jobs_bench import BenchConfig
from mmalign.media_table import MediaRow
from mmalign.preference_row import OVERALL, Dropped
from mmalign.protocols.sets import NAN, Group, Items, RewardSet, annotation_file, existing, media_root


def read_genai_bench_cmu(config: BenchConfig) -> RewardSet:
    """CMU and Meta's GenAI-Bench: `genai_image.json` {index: {prompt, models: {model: ratings 1 to 5}}}.

    `genai_skills.json` {skill: [index]} is read where it is there; pictures are `<model>/<index>.jpeg`, and the clips
    of `genai_video.json` `<model>/<index>.mp4`. A medium's human value is the mean of its ratings.
    """
    video = config.benchmark == "genai_bench_cmu_video"
    table = annotation_file(config, "genai_video.json" if video else "genai_image.json")
    root = media_root(config, table.parent)
    skills = _skills(table.with_name("genai_skills.json"))
    items, groups, dropped = Items(), [], []
    for index, entry in _mapping(table).items():
        origin = f"{table.name} {index}"
        ratings = entry.get("models") if isinstance(entry, dict) else None
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        if not isinstance(prompt, str) or not isinstance(ratings, dict):
            dropped.append(Dropped(origin, "no prompt or ratings", "an entry has `prompt` and `models`"))
            continue
        keys, human = [], []
        for model, given in ratings.items():
            stars = [float(one) for one in given or () if isinstance(one, int | float)]
            suffixes = (".mp4",) if video else (".jpeg", ".jpg", ".png")
            media = existing(root / model / str(index), suffixes)
            row = MediaRow("", prompt, media, modality="video" if video else "image", model=model)
            keys.append(items.add(f"{model}/{index}{suffixes[0]}", row))
            human.append(sum(stars) / len(stars) if stars else NAN)
        labels = tuple(name for name, members in skills.items() if str(index) in members)
        groups.append((keys, Group(prompt, (), {OVERALL: tuple(human)}, unit=str(index), labels=labels)))
    found: RewardSet = items.finish(groups, dropped)
    return found


def _skills(path: Path) -> dict[str, set[str]]:
    if not path.is_file():
        return {}
    return {name: {f"{int(index):05d}" for index in members} for name, members in _mapping(path).items()}


def _mapping(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}:{error.colno}: not valid JSON ({error.msg})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds one {type(found).__name__}, not an object by index")
    return found
