"""Evaluators whose scores can be worked out by hand, and tables of plain pictures, for the tests of `prefer`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from plugin_package import install

from mmalign.jobs_prefer import PreferConfig
from mmalign.media import write_image
from mmalign.tables import PreferenceRow, read_preferences

SOURCE = '''
import os
from pathlib import Path

import torch

from mmalign.evaluation import AllFrames, Evaluator, SetEvaluator, Strict, Uniform


class Colours(Evaluator):
    """Mean of each channel, 0 to 255."""

    licence, source = "Apache-2.0", "a test"

    def score(self, batch):
        means = torch.stack([image.double().mean(dim=(1, 2)) for image in batch.images])
        return {"red": means[:, 0], "green": means[:, 1], "blue": means[:, 2]}


class Blueness(Evaluator):
    """Mean of the blue channel; lower is better, and black cannot be scored."""

    higher_is_better = False
    licence, source = "Apache-2.0", "a test"

    def score(self, batch):
        means = torch.stack([image.double().mean(dim=(1, 2)) for image in batch.images])
        return torch.where(means.sum(1) == 0, torch.nan, means[:, 2])


class Shade(Evaluator):
    """Mean of one channel, or of a file's say: parameters that show in the label, and one that does not."""

    licence, source = "Apache-2.0", "a test"

    class Params(Strict):
        channel: int = 0
        checkpoint: Path | None = None

    @classmethod
    def weight_files(cls, params):
        return [params.checkpoint] if params.checkpoint else []

    def score(self, batch):
        return torch.stack([image[self.params.channel].double().mean() for image in batch.images])


class Mortal(Evaluator):
    """Red, once a file is there; before that the third batch ends the process, as a kill would."""

    licence, source = "Apache-2.0", "a test"

    class Params(Strict):
        alive: Path

    def score(self, batch):
        self.batches = getattr(self, "batches", 0) + 1
        if self.batches > 2 and not self.params.alive.exists():
            os._exit(9)
        return torch.stack([image[0].double().mean() for image in batch.images])


class Nothing(Evaluator):
    """Scores nothing."""

    licence, source = "Apache-2.0", "a test"

    def score(self, batch):
        return torch.full((len(batch),), torch.nan)


class Personal(Evaluator):
    """Asks every row for more than its picture and prompt."""

    needs = frozenset({"image", "aux"})
    licence, source = "Apache-2.0", "a test"

    def score(self, batch):
        return torch.tensor([float(row["user_id"]) for row in batch.aux])


class Motion(Evaluator):
    """Of clips alone: brightness of the first frame, how much it rises, and how long the clip is."""

    needs = frozenset({"frames"})
    modality = frozenset({"video"})
    frames = AllFrames()
    licence, source = "Apache-2.0", "a test"

    def score(self, batch):
        means = [clip.double().mean(dim=(1, 2, 3)) for clip in batch.clips()]
        seconds = [len(clip) / fps for clip, fps in zip(batch.clips(), batch.fps)]
        return {
            "start": torch.stack([mean[0] for mean in means]),
            "rise": torch.stack([mean[-1] - mean[0] for mean in means]),
            "seconds": torch.tensor(seconds, dtype=torch.float64),
        }


class Dimness(Evaluator):
    """Mean of all pixels of a picture or clip; lower is better."""

    needs = frozenset({"frames"})
    modality = frozenset({"image", "video"})
    frames = Uniform(4)
    higher_is_better = False
    licence, source = "Apache-2.0", "a test"

    def score(self, batch):
        return torch.stack([clip.double().mean() for clip in batch.clips()])


class Whole(SetEvaluator):
    """One figure for all."""

    licence, source = "Apache-2.0", "a test"

    def update(self, batch):
        pass

    def compute(self):
        return 1.0
'''
NAMES = ("Colours", "Blueness", "Shade", "Mortal", "Nothing", "Personal", "Motion", "Dimness", "Whole")


def plug_in(folder: Path) -> Path:
    """The folder to put on sys.path."""
    entries = {name.lower(): f"colour_code:{name}" for name in NAMES}
    return install(folder, entries, "colour", SOURCE)


def table(
    folder: Path, lists: dict[str, list[tuple[int, int, int]]], name: str = "table.jsonl", **columns: Any
) -> Path:
    """A media table of plain pictures, a list of colours per prompt; sizes differ."""
    lines = []
    for prompt, colours in lists.items():
        for colour in colours:
            number = len(lines)
            pixels = np.broadcast_to(np.array(colour, np.uint8), (8 + number % 3, 10, 3))
            write_image(folder / f"{name}-{number}.png", np.ascontiguousarray(pixels))
            row = {"sample": f"s{number}", "media": f"{name}-{number}.png", "prompt": prompt, **columns}
            lines.append(json.dumps(row))
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


REWARDS: tuple[dict[str, Any], ...] = (
    {"name": "colours", "subscore": "red", "column": "red"},
    {"name": "colours", "subscore": "green", "column": "green"},
    {"name": "blueness", "column": "blue"},
)


def settings(output: Path, source: Path, **changes: Any) -> dict[str, Any]:
    """A job over one media table."""
    base = {"output": output, "sources": [{"kind": "table", "table": source}], "rewards": list(REWARDS)}
    return {**base, "scoring": {"device": "cpu"}, **changes}


def config(output: Path, source: Path, **changes: Any) -> PreferConfig:
    """`settings` through the schema."""
    return PreferConfig.model_validate(settings(output, source, **changes))


# red and green agree in the first list and fight in the second; blue counts turned round.
LISTS = {
    "agreed": [(200, 210, 10), (100, 110, 20), (50, 60, 30), (10, 20, 40)],
    "fought": [(200, 10, 90), (100, 110, 80), (50, 200, 70)],
    "level": [(80, 80, 80), (80, 80, 80)],
}


def rows_of(path: Path) -> list[PreferenceRow]:
    return read_preferences(path).rows


def summary_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "summary.json").read_text())


def questions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "to_label.jsonl").read_text().splitlines()]


def answer(folder: Path, *lines: dict[str, Any], name: str = "answers.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / name
