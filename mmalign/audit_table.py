"""What an audit looks at: judgements of pairs, scores of their media, and what the pictures look like."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmalign import score
from mmalign.jobs import EvaluatorSpec, ScoreConfig
from mmalign.media import VIDEO_SUFFIXES, MediaError, clip_facts, clip_frames, is_video, read_image
from mmalign.progress import track
from mmalign.records import MediaRef
from mmalign.results import WHOLE_SET, Results, is_ok, read_results
from mmalign.routing import of_rewards
from mmalign.tables import MediaRow, PreferenceRow, write_media_table

PROPERTIES = {
    "brightness": "mean luma, 0 to 1",
    "contrast": "standard deviation of the luma",
    "saturation": "mean HSV saturation, 0 to 1",
    "sharpness": "standard deviation of the luma's Laplacian, at no more than 256 pixels a side",
    "megapixels": "size of the picture",
    "kilobytes": "size of the file",
    "motion": "of clips, mean change of the luma in an eighth of a second",
    "seconds": "of clips, their length",
    "frames per second": "of clips, on average",
}
"""What is looked at; of a clip the mean over its first eight seconds, eight frames in each."""
_SIDE = 256
_FPS, _FRAMES = 8, 64
Key = tuple[str, MediaRef]  # a picture as the answer to a prompt


@dataclass(frozen=True)
class Judgement:
    """What one person (or rule) said of two media: `answer` is 1 for a, 0 for b, 1/2 for a tie.

    `sided`: whether a and b are the sides as the row has them, which a list of more media does not have.
    `by_rewards`: whether it was rewards that said so, by their scores.
    """

    prompt: str
    a: MediaRef
    b: MediaRef
    answer: float
    user: str | None
    weight: float
    sided: bool
    by_rewards: bool = False

    @cached_property
    def pair(self) -> tuple[str, MediaRef, MediaRef]:
        """The pair whichever way round it was shown."""
        first, second = sorted((self.a, self.b), key=_place)
        return self.prompt, first, second

    @property
    def oriented(self) -> float:
        """The answer for the first of `pair`."""
        return self.answer if self.pair[1] == self.a else 1 - self.answer


def _place(ref: MediaRef) -> tuple[str, int, str, int]:
    return ref.file, -1 if ref.row is None else ref.row, ref.column or "", -1 if ref.item is None else ref.item


def judgements(rows: Iterable[PreferenceRow], dimension: str) -> list[Judgement]:
    """Every pair that the rows state on this dimension; rows that were not judged on it are passed over."""
    found = []
    for row in rows:
        if dimension not in row.dimensions():
            continue
        order = row.order(dimension)
        for i, j in combinations(range(len(row.media)), 2):
            answer = 0.5 if order[i] == order[j] else float(order[i] < order[j])
            pair = row.media[i], row.media[j]
            sided = len(row.media) == 2
            found.append(Judgement(row.prompt, *pair, answer, row.user_id, row.weight, sided, of_rewards(row)))
    return found


# ------------------------------------------------------------------------------------------------ scores


def own_scores(rows: Iterable[PreferenceRow], dimension: str) -> dict[str, dict[Key, float]]:
    """The scores that the table itself holds besides the audited dimension: name -> picture -> score."""
    found: dict[str, dict[Key, float]] = {}
    for row in rows:
        for name, values in (row.scores or {}).items():
            if name != dimension:
                place = found.setdefault(name, {})
                place.update(((row.prompt, ref), value) for ref, value in zip(row.media, values, strict=True))
    return found


def folder_scores(results: Results, keys: Sequence[Key]) -> dict[str, dict[Key, float]]:
    """The scores of a results folder for these pictures, found by prompt and content; higher is better in all.

    Raises ValueError where the folder knows none of the pictures.
    """
    content: dict[tuple[str, str], list[Key]] = {}
    for prompt, ref in track(keys, "reading pictures", len(keys)):
        try:
            content.setdefault((prompt, ref.hash()), []).append((prompt, ref))
        except MediaError:
            continue
    found: dict[str, dict[Key, float]] = {}
    for label in results.labels():
        sign = -1.0 if results.higher_is_better(label) is False else 1.0
        values: dict[Key, float] = {}
        for row in results.rows_of(label):
            if is_ok(row) and row["sample"] != WHOLE_SET:
                for key in content.get((str(row["prompt"] or ""), str(row.get("media_hash"))), ()):
                    values[key] = sign * float(row["score"]) + 0.0
        if values:
            found[label] = values
    if not found:
        raise ValueError(f"{results.folder} has no score of a picture of this table (by prompt and content)")
    return found


def evaluate(specs: Sequence[EvaluatorSpec], keys: Sequence[Key], folder: Path) -> Results:
    """Score the pictures into `folder`; what it has already is not computed again."""
    rows = []
    for number, (prompt, ref) in enumerate(keys):
        clip = ref.row is None and Path(ref.file).suffix.lower() in VIDEO_SUFFIXES
        media = ref.file if ref.row is None else ref
        rows.append(MediaRow(f"{number:06d}", prompt, media, modality="video" if clip else "image"))
    write_media_table(folder / "media.jsonl", rows)
    return read_results(score.run(ScoreConfig(table=folder / "media.jsonl", output=folder, evaluators=tuple(specs))))


# ------------------------------------------------------------------------------------------------ pictures


def properties(refs: Sequence[MediaRef]) -> tuple[dict[MediaRef, dict[str, float]], int, str]:
    """What the pictures look like.

    Returns:
        ref -> `PROPERTIES` of what can be read; how many are unreadable; the first reason why.
    """
    found: dict[MediaRef, dict[str, float]] = {}
    unreadable, first = 0, ""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        chunks = (refs[start : start + 256] for start in range(0, len(refs), 256))  # few futures at a time
        looked = (each for chunk in chunks for each in zip(chunk, pool.map(_look, chunk), strict=True))
        for ref, seen in track(looked, "looking at pictures", len(refs)):
            if isinstance(seen, dict):
                found[ref] = seen
            else:
                unreadable += 1
                first = first or seen
    return found, unreadable, first


def _look(ref: MediaRef) -> dict[str, float] | str:
    """The properties, or a text that says why there are none."""
    try:
        seen = _look_at_clip(ref) if is_video(ref) else look(read_image(ref))
        return seen | {"kilobytes": len(ref.read()) / 1024}
    except MediaError as error:
        return str(error)


def _look_at_clip(ref: MediaRef) -> dict[str, float]:
    facts = clip_facts(ref)
    frames = clip_frames(ref, fps=_FPS, frames=min(_FRAMES, facts.frames_at(_FPS)))
    each = [look(frame) for frame in frames]
    lumas = [_luma(_small(frame)) for frame in frames]
    changes = [float(np.abs(after - before).mean()) for before, after in pairwise(lumas)]
    return {name: float(np.mean([seen[name] for seen in each])) for name in each[0]} | {
        "motion": float(np.mean(changes)) if changes else 0.0,
        "seconds": facts.num_frames / facts.fps,
        "frames per second": facts.fps,
    }


def _small(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """[h, w, 3] in 0..1, at most `_SIDE` on a side."""
    height, width = image.shape[:2]
    scale = min(1.0, _SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX), dtype=np.float64) / 255


def _luma(image: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[h, w], by ITU-R BT.601."""
    luma: npt.NDArray[np.float64] = image @ np.array([0.299, 0.587, 0.114])
    return luma


def look(image: npt.NDArray[np.uint8]) -> dict[str, float]:
    """All `PROPERTIES` of a picture but the file's size, of uint8 [H, W, 3]."""
    height, width = image.shape[:2]
    small = _small(image)
    luma = _luma(small)
    high, low = small.max(2), small.min(2)
    saturation = np.divide(high - low, high, out=np.zeros_like(high), where=high > 0)
    edges = np.pad(luma, 1, mode="edge")
    laplacian = edges[:-2, 1:-1] + edges[2:, 1:-1] + edges[1:-1, :-2] + edges[1:-1, 2:] - 4 * luma
    return {
        "brightness": float(luma.mean()),
        "contrast": float(luma.std()),
        "saturation": float(saturation.mean()),
        "sharpness": float(laplacian.std()),
        "megapixels": height * width / 1e6,
    }
