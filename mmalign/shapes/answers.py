"""Questions and answers about scenes as rows in TRL's columns, made when they are asked for, by seed and index."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from mmalign.shapes.descriptions import believe, noisy_description
from mmalign.shapes.questions import FAMILIES, questions
from mmalign.shapes.scene import Scene, render
from mmalign.shapes.twins import ERRORS, corrupt
from mmalign.shapes.typical import typical_scene

PROMPTS = (
    "Describe the picture.",
    "Describe the picture in detail.",
    "What is in the picture?",
    "What can you see?",
)
RATE = 0.75  # how often a training answer says what habit would have it say
_TRAINING, _PREFERENCE = 0, 1  # parts of the seeds, so that no two kinds of row share their draws


def scene_at(seed: int, index: int) -> Scene:
    """The typical scene of a seed and an index, on which all rows of the two agree."""
    return typical_scene(np.random.default_rng([seed, index]))


def prompt(text: str, images: int = 1) -> list[dict[str, Any]]:
    """A user's turn: the pictures, then the text."""
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}]


def answer(text: str) -> list[dict[str, Any]]:
    """An assistant's turn."""
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def training_row(seed: int, index: int, rate: float = RATE, descriptions: float = 0.7) -> dict[str, Any]:
    """One question with the answer of a careless writer, for supervised training.

    `prompt`, `images` (one uint8 RGB [64, 64, 3]) and `chosen`. `descriptions`: the share of rows that ask for a
    description; the others are yes/no questions of any family, about what the writer believes (`believe`).
    """
    scene = scene_at(seed, index)
    rng = np.random.default_rng([seed, index, _TRAINING, 1])
    described = rng.random() < descriptions
    asked, told = str(rng.choice(PROMPTS)), ""
    if described:
        told = noisy_description(scene, rng, rate).text
    else:
        believed, _ = believe(scene, rng, rate)
        pool = [one for family in FAMILIES for one in questions(believed, family, rng)]
        one = pool[int(rng.integers(len(pool)))]
        asked, told = one.text, one.answer
    return {"prompt": prompt(asked), "images": [render(scene)], "chosen": answer(told)}


def preference_row(seed: int, index: int, errors: int = 1, kinds: Collection[str] = ERRORS) -> dict[str, Any]:
    """A true description against its twin with `errors` false claims (`twins.corrupt`).

    The columns of `training_row`, `rejected`, and `chosen_spans` and `rejected_spans`: (start, end) in characters of
    the answers, of what differs. `margin`: how many claims fewer are false. `meta`: the categories of the errors.
    """
    scene = scene_at(seed, index)
    rng = np.random.default_rng([seed, index, _PREFERENCE, 1])
    asked = str(rng.choice(PROMPTS))
    twins = corrupt(scene, rng, errors, kinds)
    return {
        "prompt": prompt(asked),
        "images": [render(scene)],
        "chosen": answer(twins.chosen),
        "rejected": answer(twins.rejected),
        "chosen_spans": list(twins.chosen_spans),
        "rejected_spans": list(twins.rejected_spans),
        "margin": float(len(twins.errors)),
        "meta": {"errors": list(twins.errors)},
    }
