"""Public suites of prompts without human judgements: HPSv2's benchmark, DrawBench, GenEval, DPG-Bench, Gecko.

Every picture that a suite expects is an item, there or not, so that nothing shifts where one is missing.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from mmalign.jobs_bench import BenchConfig
from mmalign.media import read_image, write_image
from mmalign.media_table import MediaRow
from mmalign.preference_row import Dropped
from mmalign.progress import track
from mmalign.protocols.sets import SUFFIXES, RewardSet, annotation_file, existing
from mmalign.records import json_lines, missing_columns, read_records

STYLES = ("anime", "concept-art", "paintings", "photo")
_JPG = (".jpg", ".png", ".jpeg", ".webp")  # HPSv2 writes .jpg; others are taken where it is not there


def read_hpsv2_benchmark(config: BenchConfig) -> RewardSet:
    """`benchmark/{anime,concept-art,paintings,photo}.json`, lists of prompts; `media` has `<style>/{index:05d}.jpg`."""
    files = {style: annotation_file(config, f"benchmark/{style}.json", f"{style}.json") for style in STYLES}
    if len(set(files.values())) < len(STYLES):
        raise ValueError(f"folder: {config.folder} is one file; name the folder with {', '.join(STYLES)}.json")
    root = _pictures(config, "a folder for each style, with 00000.jpg and so on in it")
    items, places = [], []
    for style, path in files.items():
        for index, prompt in enumerate(_prompts(path)):
            name = f"{style}/{index:05d}.jpg"
            items.append(MediaRow(name, prompt, existing(root / style / f"{index:05d}", _JPG)))
            places.append({"style": style, "index": index})
    return RewardSet(tuple(items), places=tuple(places))


def read_drawbench(config: BenchConfig) -> RewardSet:
    """`benchmark/drawbench.json` of HPDv2; `media` has `{index:05d}.jpg`."""
    path = annotation_file(config, "benchmark/drawbench.json", "drawbench.json")
    root = _pictures(config, "00000.jpg and so on")
    rows = [
        MediaRow(f"{index:05d}.jpg", prompt, existing(root / f"{index:05d}", _JPG))
        for index, prompt in enumerate(_prompts(path))
    ]
    return RewardSet(tuple(rows), places=tuple({"style": "drawbench", "index": n} for n in range(len(rows))))


def _pictures(config: BenchConfig, holds: str) -> Path:
    """The folder of generated pictures. They are the user's own, so it has to be named, unless scores exist already."""
    if config.media is None and config.scores is None:
        raise ValueError(f"media is missing: name the folder of the generated pictures ({holds})")
    return config.media or config.folder


def _prompts(path: Path) -> list[str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}:{error.colno}: not valid JSON ({error.msg})") from None
    if not isinstance(found, list) or not found or not all(isinstance(prompt, str) for prompt in found):
        raise ValueError(f"{path} is not a list of prompts, as HPSv2 publishes it")
    return found


# ------------------------------------------------------------------------------------------------ GenEval


def read_geneval(config: BenchConfig) -> RewardSet:
    """`<index>/metadata.jsonl` and `<index>/samples/0000.png`, or `evaluation_metadata.jsonl` and such folders.

    The metadata (tag, include, exclude) go to the evaluators as `aux`. Fewer pictures than `images_per_prompt` are
    missing ones; more of them count too, as in GenEval's code. Its page names pictures with four digits and its
    sampling script with five, so that tables of scores may use either.
    """
    metadata = _metadata(config)
    root = config.media or (config.folder if config.folder.is_dir() else config.folder.parent)
    items, places = [], []
    aliases: dict[str, str] = {}
    for index, entry in metadata.items():
        if not isinstance(entry.get("prompt"), str) or not isinstance(entry.get("tag"), str):
            raise ValueError(f"GenEval's metadata {index} has no prompt or no tag; take its evaluation_metadata.jsonl")
        folder = root / index / "samples"
        found = {path.stem: path for path in folder.glob("*") if _is_sample(path)} if folder.is_dir() else {}
        numbers = {int(stem) for stem in found}
        absent = [n for n in range(config.images_per_prompt) if n not in numbers]
        wanted = absent[: max(0, config.images_per_prompt - len(found))]
        stems = sorted([*found, *(f"{n:04d}" for n in wanted)])
        for stem in stems:
            path = found.get(stem, folder / f"{stem}.png")
            sample = f"{index}/samples/{path.name}"
            items.append(MediaRow(sample, entry["prompt"], os.path.abspath(path), group=index, aux=entry))
            places.append({"task": entry["tag"], "prompt": index})
            for digits in (4, 5):
                aliases.setdefault(f"{index}/samples/{int(stem):0{digits}d}.png", sample)
    return RewardSet(tuple(items), places=tuple(places), aliases=aliases)


def _is_sample(path: Path) -> bool:
    return bool(re.fullmatch(r"\d+", path.stem)) and path.suffix.lower() in SUFFIXES


def _metadata(config: BenchConfig) -> dict[str, dict[str, Any]]:
    """Index with five digits -> metadata, from the numbered folders or from the one file."""
    folder = config.folder
    if folder.is_dir() and not (folder / "evaluation_metadata.jsonl").is_file():
        numbered = sorted(path for path in folder.iterdir() if path.name.isdigit() and path.is_dir())
        if numbered:
            found = {}
            for path in numbered:
                lines = list(json_lines(annotation_file(config.model_copy(update={"folder": path}), "metadata.jsonl")))
                if len(lines) != 1:
                    raise ValueError(f"{path / 'metadata.jsonl'} holds {len(lines)} lines, not the one of its prompt")
                found[path.name] = lines[0][1]
            return found
    path = annotation_file(config, "evaluation_metadata.jsonl", "prompts/evaluation_metadata.jsonl")
    return {f"{number:05d}": entry for number, (_, entry) in enumerate(json_lines(path))}


# ------------------------------------------------------------------------------------------------ DPG-Bench


def read_dpg_bench(config: BenchConfig) -> RewardSet:
    """`dpg_bench.csv`: a row per question (item_id, proposition_id, dependency, tuple, question_natural_language).

    Each question to each picture is an item whose prompt is the question. Pictures are `media/<item_id>.png`; with
    `grid` they hold up to 2 x 2 pictures, which the verb cuts apart into `output/crops`.
    """
    table = annotation_file(config, "dpg_bench.csv", "dpg_bench/dpg_bench.csv", "*.csv")
    records = read_records(table)
    needed = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
    if missing := set(needed) - set(records.columns):
        raise ValueError(missing_columns(table, sorted(missing), records.columns, "DPG-Bench"))
    rows = list(records)[1 if config.skip_first_row else 0 :]
    questions: dict[str, dict[int, dict[str, Any]]] = {}
    places, dropped = [], []
    for record in rows:
        item, one = str(record.values["item_id"]), _question(record.values, record.origin)
        if one["id"] in questions.setdefault(item, {}):
            detail = f"item {item} has a question {one['id']} already, which this row replaces, as in the authors' code"
            dropped.append(Dropped(record.origin, "question twice", detail))
        questions[item][one["id"]] = one
    root = _pictures(config, "<item_id>.png")
    crops = 1 if config.grid is None else config.grid.pictures
    items = []
    for item, of_item in questions.items():
        asked = list(of_item.values())
        position = {one["id"]: number for number, one in enumerate(asked)}
        unknown = sorted({parent for one in asked for parent in one["parents"] if parent not in position})
        if unknown:
            dropped.append(Dropped(f"item {item}", "unknown parent", f"no question {unknown[0]} stands in the table"))
            continue
        source = existing(root / item)
        for crop in range(crops):
            media = source if config.grid is None else _crop(config, item, crop)
            for one in asked:
                sample = f"{item}/{crop}/{one['id']}"
                items.append(MediaRow(sample, one["question"], media, group=f"{item}/{crop}"))
                parents = tuple(position[parent] for parent in one["parents"])
                places.append({"item": item, "crop": crop, "parents": parents, "category": one["category"],
                               "source": source})  # fmt: skip
    return RewardSet(tuple(items), places=tuple(places), dropped=tuple(dropped))


def _crop(config: BenchConfig, item: str, number: int) -> str:
    """Where a picture of a grid is cut to: a folder for each size, so that another size cuts anew."""
    side = config.grid.side if config.grid else None
    return os.path.abspath(config.output / "crops" / str(side or "half") / f"{item}-{number}.png")


def _question(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """Number, parents (0 is none), text, and category: what stands before the bracket of its tuple."""
    try:
        number = int(values["proposition_id"])
        parents = tuple(int(part) for part in str(values["dependency"]).split(","))
    except (TypeError, ValueError):
        raise ValueError(
            f"{origin}: proposition_id and dependency must be numbers, not {values['proposition_id']!r} and "
            f"{values['dependency']!r}; if this row is a remark, set skip_first_row: true"
        ) from None
    category = str(values["tuple"]).split("(")[0].strip()
    text = str(values["question_natural_language"])
    return {"id": number, "parents": tuple(p for p in parents if p), "question": text, "category": category}


def cut_grids(found: RewardSet, config: BenchConfig) -> None:
    """Cut the 2 x 2 pictures of DPG-Bench apart, as PNG; what is cut already or has no picture is passed over.

    Raises:
        ValueError: a picture that cannot be decoded, or one that is smaller than the places that `grid` names.
    """
    if config.grid is None:
        return
    wanted = dict.fromkeys(
        (place["source"], place["crop"], str(item.media)) for item, place in zip(found.items, found.places, strict=True)
    )
    todo = [(source, crop, Path(to)) for source, crop, to in wanted if os.path.isfile(source) and _older(to, source)]
    for source, crop, to in track(todo, "cutting grids", len(todo)):
        picture = read_image(source)
        height, width = (config.grid.side or size // 2 for size in picture.shape[:2])
        top, left = (crop // 2) * height, (crop % 2) * width
        part = picture[top : top + height, left : left + width]
        if part.shape[:2] != (height, width):
            raise ValueError(
                f"{source} is {picture.shape[1]} x {picture.shape[0]} pixels, too small for picture {crop} of a grid "
                f"of {width} x {height}; set grid.side, or grid: null where a file is one picture"
            )
        to.parent.mkdir(parents=True, exist_ok=True)
        write_image(to, part.copy())


def _older(made: str, source: str) -> bool:
    return not os.path.isfile(made) or os.path.getmtime(made) < os.path.getmtime(source)


# ------------------------------------------------------------------------------------------------ Gecko


def read_gecko(config: BenchConfig) -> RewardSet:
    """`prompts.csv`: prompt_id, prompt, prompt_type, dataset_id (its skill), max_disagreement_less_*.

    `media` has `<prompt_id>.png`, or a folder `<prompt_id>/` of several. DeepMind has not published pictures or
    ratings, so that only means by skill can be had, no agreement with people.
    """
    table = annotation_file(config, "prompts.csv")
    records = read_records(table)
    needed = ("prompt_id", "prompt", "prompt_type", "dataset_id")
    if missing := set(needed) - set(records.columns):
        raise ValueError(missing_columns(table, sorted(missing), records.columns, "Gecko's prompts.csv"))
    root = _pictures(config, "<prompt_id>.png, or a folder <prompt_id>/ of several")
    items, places = [], []
    for record in records:
        number, prompt = str(record.values["prompt_id"]), str(record.values["prompt"])
        folder = root / number
        inside = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES) if folder.is_dir() else []
        named = {f"{number}/{path.name}": os.path.abspath(path) for path in inside} or {number: existing(root / number)}
        labels = _gecko_labels(record.values)
        for sample, media in named.items():
            items.append(MediaRow(sample, prompt, media, group=number))
            places.append({"prompt": number, **labels})
    return RewardSet(tuple(items), places=tuple(places))


def _gecko_labels(values: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Which part of Gecko2K a prompt is of, its skill (Gecko(S): such as att/count; Gecko(R): the data set it is
    from), and under which thresholds on people's disagreement it counts as reliable.
    """
    kind, tag = str(values["prompt_type"]), str(values["dataset_id"])
    skill = tag.split(":")[0] if kind == "Gecko(S)" else re.sub(r"_\d+$", "", tag)
    reliable = tuple(
        name.removeprefix("max_disagreement_less_")
        for name, value in values.items()
        if name.startswith("max_disagreement_less_") and str(value) == "True"
    )
    broad = (skill.split("/")[0],) if kind == "Gecko(S)" else ()
    return {"part": (kind,), "category": broad, "skill": (f"{kind} {skill}",), "reliable_below": reliable}
