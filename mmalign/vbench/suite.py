"""The prompt suites of VBench and VBench++: their JSON file, read and checked row by row.

The files are the authors' (Vchitect/VBench, Apache-2.0: ``vbench/VBench_full_info.json`` for text-to-video,
``vbench2_beta_i2v/vbench2_i2v_full_info.json`` for image-to-video). They are given by path and not shipped. A row is::

    {"prompt_en": "an alley", "dimension": ["scene", "background_consistency"],
     "auxiliary_info": {"scene": {"scene": {"scene": "alley"}}}}

and of the image-to-video suite it has ``image_name`` and ``image_type`` besides.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmalign.config import nearest
from mmalign.vbench.dimensions import DIMENSIONS

__all__ = ["AUX", "WHERE", "Suite", "SuitePrompt", "read_prompts", "read_suite"]

WHERE = (
    "The authors have it in their repository Vchitect/VBench (Apache-2.0): vbench/VBench_full_info.json for "
    "text-to-video, vbench2_beta_i2v/vbench2_i2v_full_info.json for image-to-video; download it and give its path."
)
AUX: dict[str, tuple[str, ...]] = {
    "object_class": ("object",),
    "multiple_objects": ("object",),
    "color": ("color",),
    "spatial_relationship": ("object_a", "object_b", "relationship"),
    "scene": ("scene",),
    "appearance_style": ("appearance_style",),
}
"""What a row's ``auxiliary_info`` says for these dimensions, each a text."""
_SECOND = {
    *("human_anatomy", "human_identity", "human_clothes", "diversity", "composition", "motion_rationality"),
    *("dynamic_spatial_relationship", "dynamic_attribute", "motion_order_understanding", "human_interaction"),
    *("complex_landscape", "complex_plot", "instance_preservation", "mechanics", "thermotics", "material"),
    "multi_view_consistency",
}
_MOST = 10  # mistakes that are told


@dataclass(frozen=True)
class SuitePrompt:
    """One prompt of a suite; rows with the same prompt are one.

    Attributes:
        prompt: as the suite writes it.
        dimensions: that are measured on its clips.
        aux: what evaluators are told besides, see `AUX`.
        image: file name of the input image, in the image-to-video suite.
    """

    prompt: str
    dimensions: tuple[str, ...]
    aux: dict[str, str]
    image: str | None = None


@dataclass(frozen=True)
class Suite:
    """A suite file.

    Attributes:
        sha256: of the file, hex.
        rows: the file's own rows, for the reference's ``full_info`` file.
        prompts: distinct, in the file's order.
    """

    path: Path
    sha256: str
    rows: tuple[dict[str, Any], ...]
    prompts: tuple[SuitePrompt, ...]

    @property
    def kind(self) -> Literal["text", "image"]:
        """What clips are made from."""
        return "image" if any(each.image for each in self.prompts) else "text"

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Every dimension that some prompt is for, in the order of the leaderboard."""
        found = {name for each in self.prompts for name in each.dimensions}
        return tuple(name for name in DIMENSIONS if name in found)


def read_suite(path: str | Path) -> Suite:
    """Read a suite.

    Raises:
        ValueError: no such file, no JSON, another benchmark's suite, or rows that are wrong: each is named by its
            number from 0, its key, what is wrong, and the nearest name that would be right.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise ValueError(f"the suite {path} {what}. {WHERE}")
    content = path.read_bytes()
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the suite {path} is no JSON ({error}). {WHERE}") from None
    if isinstance(data, dict) and any(isinstance(value, list) for value in data.values()):
        raise ValueError(f"the suite {path} holds an object, not a list of rows; is it a file of results? {WHERE}")
    if not isinstance(data, list) or not data:
        raise ValueError(f"the suite {path} holds no list of rows. {WHERE}")
    _refuse_second(path, data)
    problems: list[str] = []
    read = [_row(row, number, problems) for number, row in enumerate(data)]
    merged = _merged([(number, row) for number, row in enumerate(read) if row is not None], problems)
    if problems:
        more = f"\n... and {len(problems) - _MOST} more" if len(problems) > _MOST else ""
        raise ValueError("\n".join(f"{path}: {each}" for each in problems[:_MOST]) + more)
    return Suite(path, hashlib.sha256(content).hexdigest(), tuple(data), merged)


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """The prompts of a category: a text file with one per line, empty lines left out.

    Raises:
        ValueError: no such file, no UTF-8, no prompt, or one that is there twice.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        where = "The authors' are prompts/prompts_per_category/*.txt of Vchitect/VBench"
        raise ValueError(f"the prompts {path} are not there. {where}; give the path of one.")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from None
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if line and seen.setdefault(line, number) != number:
            raise ValueError(f"{path}:{number}: this prompt is line {seen[line]} too; take one out")
    if not seen:
        raise ValueError(f"{path} holds no prompt; write one per line")
    return tuple(seen)


def _refuse_second(path: Path, data: list[Any]) -> None:
    names = {
        name.lower().replace(" ", "_").replace("-", "_")
        for row in data
        if isinstance(row, dict)
        for name in _listed(row.get("dimension"))
    }
    if names & _SECOND and not names & (set(DIMENSIONS) - {"camera_motion"}):  # a name that both have
        example = ", ".join(sorted(names & _SECOND)[:3])
        raise ValueError(
            f"the suite {path} is that of VBench-2.0 (dimensions such as {example}), whose dimensions are others. "
            f"{WHERE}"
        )


def _listed(value: Any) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def _row(row: Any, number: int, problems: list[str]) -> SuitePrompt | None:
    """The row; what is wrong with it joins `problems`, and then there is none."""
    before = len(problems)
    if not isinstance(row, dict):
        problems.append(f"row {number}: is {type(row).__name__}, not an object with prompt_en and dimension")
        return None
    prompt, names, image = row.get("prompt_en"), row.get("dimension"), row.get("image_name")
    for key, value, kind in (("prompt_en", prompt, str), ("dimension", names, list)):
        if key not in row:
            problems.append(f"row {number}: {key} is missing.{nearest(key, list(map(str, row)))}")
        elif not isinstance(value, kind) or not value or (isinstance(value, str) and not value.strip()):
            wanted = "a text" if kind is str else "a list of names"
            problems.append(f"row {number}: {key} is {value!r:.60}, not {wanted}")
    for name in names if isinstance(names, list) else ():
        if name not in DIMENSIONS:
            problems.append(f"row {number}: dimension: there is no {name!r}.{nearest(str(name), list(DIMENSIONS))}")
    if image is not None and (not isinstance(image, str) or not image.strip() or Path(image).name != image):
        problems.append(f"row {number}: image_name is {image!r:.60}, not the name of a file")
    dimensions = tuple(dict.fromkeys(_listed(names)))
    aux = _aux(row.get("auxiliary_info"), dimensions, number, problems)
    if image is None and any(name in ("i2v_subject", "i2v_background") for name in dimensions):
        problems.append(f"row {number}: image_name is missing, and its dimensions compare with the input image")
    return None if len(problems) > before else SuitePrompt(str(prompt), dimensions, aux, image)


def _aux(value: Any, dimensions: tuple[str, ...], number: int, problems: list[str]) -> dict[str, str]:
    """``{dimension: {key: text}}``, of which some have the dimension's name once more in between, as {key: text}."""
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        problems.append(f"row {number}: auxiliary_info is {value!r:.60}, not an object")
        return {}
    for name in value:
        if name not in DIMENSIONS:
            near = nearest(str(name), list(DIMENSIONS))
            problems.append(f"row {number}: auxiliary_info: there is no dimension {name!r}.{near}")
    found: dict[str, str] = {}
    for dimension in dimensions:
        given = value.get(dimension)
        while isinstance(given, Mapping) and isinstance(given.get(dimension), Mapping):
            given = given[dimension]
        for key in AUX.get(dimension, ()):
            text = given.get(key) if isinstance(given, Mapping) else None
            where = f"row {number}: auxiliary_info.{dimension}.{key}"
            if not isinstance(text, str) or not text.strip():
                near = nearest(key, list(map(str, given))) if isinstance(given, Mapping) else ""
                problems.append(f"{where} {'is missing' if text is None else f'is {text!r:.40}, not a text'}.{near}")
            elif found.setdefault(key, text) != text:
                problems.append(f"{where} is {text!r}, and {found[key]!r} for another dimension of the row")
    return found


def _merged(rows: list[tuple[int, SuitePrompt]], problems: list[str]) -> tuple[SuitePrompt, ...]:
    """One for each prompt: two rows of the published suite repeat one for other dimensions."""
    found: dict[str, SuitePrompt] = {}
    where: dict[str, int] = {}
    for number, row in rows:
        first = found.get(row.prompt)
        if first is None:
            found[row.prompt], where[row.prompt] = row, number
            continue
        origin = f"row {number}: the prompt {row.prompt!r:.60} is that of row {where[row.prompt]} too"
        if twice := set(first.dimensions) & set(row.dimensions):
            problems.append(f"{origin}, and both are for {', '.join(sorted(twice))}; take one out")
        if first.image != row.image:
            problems.append(f"{origin}, with another image_name; clips are told apart by their prompt")
        if clash := [key for key in first.aux if row.aux.get(key, first.aux[key]) != first.aux[key]]:
            problems.append(f"{origin}, with another {clash[0]}; write both dimensions with the same")
        dimensions = tuple(dict.fromkeys((*first.dimensions, *row.dimensions)))
        found[row.prompt] = SuitePrompt(row.prompt, dimensions, {**first.aux, **row.aux}, first.image)
    return tuple(found.values())
