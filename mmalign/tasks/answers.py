"""Rows with answers to batches: what is read, what fits, negative images, encodings."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from mmalign import noise
from mmalign.cache import Cache
from mmalign.jobs import TrainConfig
from mmalign.media import Uniform, read_video
from mmalign.mllm.encode import Encoded, Encoder, Media, TooLong
from mmalign.mllm.negatives import fitted, negative
from mmalign.mllm.rows import AnswerRow
from mmalign.preference_row import Dropped
from mmalign.progress import track
from mmalign.reward_models.clip import picture
from mmalign.tasks.answer_sources import DrawnRows


class Answers:
    """The usable rows of a run, and what becomes of each.

    Attributes:
        rows: those that fit.
        dropped: those that do not, with the reason.
        smaller: how many have their images made smaller to fit.
    """

    def __init__(
        self, rows: Sequence[AnswerRow], config: TrainConfig, encoder: Encoder, processor: str, *, blind: bool,
        segments: bool,
    ):  # fmt: skip
        """`processor`: the hash of its files, for the cache's keys."""
        self.config, self.encoder, self.processor = config, encoder, processor
        self.blind, self.segments = blind, segments
        self.cache = Cache(config.data.cache_dir) if config.data.cache == "disk" else None
        self.rows, self.smaller = rows, 0
        self.dropped: list[Dropped] = []
        if not isinstance(rows, DrawnRows):  # which are all of one size, and known to fit
            self._fit()

    def of_rows(self, rows: Sequence[AnswerRow]) -> Answers:
        """Other rows, read as these are."""
        return Answers(rows, self.config, self.encoder, self.processor, blind=self.blind, segments=self.segments)

    def _fit(self) -> None:
        """Looks at every row once, so that a run does not find after hours what does not fit, or cannot be read."""
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            found = list(track(pool.map(self._size, self.rows), "measuring rows", len(self.rows)))
        kept = []
        for row, size in zip(self.rows, found, strict=True):
            if isinstance(size, str):
                self.dropped.append(Dropped(row.origin, "too long", size))
            else:
                kept.append(row)
                self.smaller += size < 1
        if self.dropped and self.encoder.policy == "error":
            first = self.dropped[0]
            raise ValueError(
                f"{len(self.dropped)} of {len(found)} rows are too long, first {first.origin}: {first.detail}. Raise "
                "mllm.max_length, or set mllm.over_long to resize or drop"
            )
        self.rows = kept

    def _size(self, row: AnswerRow) -> float | str:
        """By how much the row's images are made smaller, or why it does not fit; remembered on the disk."""
        key = self._key(row) if self.cache else ""
        entry = self.cache.get("answer_sizes", key) if self.cache else None
        if entry is not None:
            return float(entry["scale"]) if entry["scale"] > 0 else bytes(entry["why"].tolist()).decode()
        try:
            scale, why = self.encode(row).scale, ""
        except TooLong as error:
            scale, why = 0.0, str(error)
        if self.cache:
            letters = torch.tensor(list(why.encode()), dtype=torch.uint8)
            self.cache.put("answer_sizes", key, {"scale": torch.tensor(scale, dtype=torch.float64), "why": letters})
        return why or scale

    def _key(self, row: AnswerRow) -> str:
        assert self.cache is not None
        return self.cache.key(
            row=content(row), processor=self.processor, max_length=self.encoder.max_length, blind=self.blind,
            settings=self.config.mllm.model_dump_json(), seed=self.config.seed,
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------------------- encoding

    def encode(self, row: AnswerRow) -> Encoded:
        """One row's tensors; the same whenever it is asked for."""
        media = self.media(row)
        negatives = self._negatives(row, media) if self.blind else None
        differing = self.segments and row.rejected is not None  # one answer alone differs from nothing yet
        return self.encoder.encode(row, media, negatives, differing)

    def media(self, row: AnswerRow) -> Media:
        """What the row shows, decoded."""
        images = tuple(picture(image) for image in row.images)
        videos, rates = [], []
        for clip in row.videos:
            frames = read_video(clip, Uniform(self.config.mllm.frames))
            videos.append(frames.frames)
            rates.append(len(frames.frames) * frames.fps / frames.num_frames)
        return Media(images, tuple(videos), tuple(rates))

    def _negatives(self, row: AnswerRow, media: Media) -> tuple[Tensor, ...]:
        """The row's own negative images, or made ones: one for each image, of its size."""
        if row.rejected_images is not None:
            own = (picture(image) for image in row.rejected_images)
            return tuple(fitted(each, image.shape[-2:]) for each, image in zip(own, media.images, strict=True))
        if not media.images:
            raise ValueError(f"{row.origin}: this objective compares with other images, and the row has none; drop it")
        settings, made = self.config.mllm.negative, []
        for place, image in enumerate(media.images):
            generator = noise.generator("negative", self.config.seed, content(row), place)
            if settings.kind == "other":
                other = self._another(content(row), generator)
                made.append(fitted(picture(other), image.shape[-2:]))
            else:
                made.append(negative(image, settings, generator))
        return tuple(made)

    def _another(self, own: str, generator: torch.Generator) -> Any:
        """An image of a drawn other row; of the row itself where no other has one."""
        for _ in range(100):
            row = self.rows[int(torch.randint(0, len(self.rows), (), generator=generator))]
            if row.images and (len(self.rows) == 1 or content(row) != own):
                return row.images[0]
        raise ValueError("mllm.negative.kind: other takes pictures of other rows, and hardly any row has one; use crop")

    def load(self, index: Sequence[int]) -> dict[str, Any]:
        """A batch: encodings, and what the rows say of themselves as tensors [B]; None where a row says nothing."""
        rows = [self.rows[i] for i in index]
        batch: dict[str, Any] = {"items": list(index), "encoded": [self.encode(row) for row in rows]}
        batch["weight"] = torch.tensor([row.weight for row in rows])
        sides = {"chosen": 1.0, "same": 0.0, "rejected": -1.0, None: None}
        batch["margin"] = _column([row.margin for row in rows])
        batch["safer"] = _column([sides[row.safer] for row in rows])
        batch["label"] = _column([None if row.label is None else float(row.label) for row in rows])
        return batch

    def digest(self) -> str:
        """SHA-256 of what a resumed run must have too: the rows."""
        if isinstance(self.rows, DrawnRows):
            return self.rows.digest()
        return hashlib.sha256("\n".join(content(row) for row in self.rows).encode()).hexdigest()


def content(row: AnswerRow) -> str:
    """SHA-256 of a row's texts, labels and media."""
    told = (row.prompt, row.chosen, row.rejected, row.label, row.margin, row.weight, row.chosen_spans)
    media = [[each.hash() for each in group or ()] for group in (row.images, row.videos, row.rejected_images)]
    return hashlib.sha256(repr((told, row.rejected_spans, row.safer, media)).encode()).hexdigest()


def _column(values: Sequence[float | None]) -> Tensor | None:
    """A tensor, or None where a row lacks the value."""
    known = [value for value in values if value is not None]
    return torch.tensor(known) if len(known) == len(values) else None
