"""Scenes of the shapes world as training data: captioned pictures, and pairs that an annotator judged."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import combinations
from multiprocessing import get_context
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from mmalign.judgements import Judged
from mmalign.shapes.annotators import ANNOTATORS
from mmalign.shapes.captions import COLOURS, COUNT_WEIGHTS, KINDS, Caption, captions
from mmalign.shapes.scene import SIDE, Scene, render, sample_scene


@dataclass(frozen=True)
class Drawing:
    """A picture drawn when it is needed. `damage` in [0, 1] blurs and speckles it; `wrong` changes what is drawn."""

    caption: Caption
    seed: tuple[int, ...]
    damage: float = 0.0
    wrong: bool = False

    @property
    def name(self) -> str:
        return f"shapes {self.seed}: {self.caption}"

    @cached_property
    def scene(self) -> Scene:
        rng = np.random.default_rng(self.seed)
        scene = sample_scene(self.caption, rng)
        return _spoil(scene, rng) if self.wrong else scene

    def hash(self) -> str:
        """What identifies the picture, for caches."""
        return f"shapes-1:{self.seed}:{self.caption}:{self.damage}:{self.wrong}"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, without drawing it."""
        return SIDE, SIDE

    def image(self) -> np.ndarray:
        """uint8 RGB [64, 64, 3]."""
        picture = render(self.scene)
        if not self.damage:
            return picture
        rng = np.random.default_rng([*self.seed, 1])
        blurred = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(2.5 * self.damage * rng.random()))
        noise = rng.normal(0, 40 * self.damage, (SIDE, SIDE, 3)) * rng.random()
        return np.clip(np.asarray(blurred) + noise, 0, 255).astype(np.uint8)


def _spoil(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one shape dropped, or of another kind or colour."""
    shapes = list(scene.shapes)
    index = int(rng.integers(len(shapes)))
    how = rng.choice(["kind", "colour", "drop"], p=[0.45, 0.45, 0.1])
    if how == "drop":
        del shapes[index]
    else:
        choices = [word for word in (KINDS if how == "kind" else COLOURS) if word != getattr(shapes[index], str(how))]
        changed: dict[str, Any] = {str(how): str(rng.choice(choices))}
        shapes[index] = replace(shapes[index], **changed)
    return Scene(tuple(shapes), scene.background)


def drawings(
    count: int, seed: int, *, held_out: bool = False, counts: tuple[float, ...] = COUNT_WEIGHTS
) -> list[Drawing]:
    """`count` captioned scenes that match their captions; `counts` as in `captions`."""
    wanted = captions(count, seed, held_out=held_out, counts=counts)
    return [Drawing(caption, (seed, i)) for i, caption in enumerate(wanted)]


def judged_groups(
    count: int, seed: int, annotator: str, *, votes: int = 1, per_prompt: int = 2, held_out: bool = False,
    counts: tuple[float, ...] = COUNT_WEIGHTS, processes: int = 1,
) -> list[Judged]:  # fmt: skip
    """Drawings of `count` captions, `per_prompt` of each, any of them wrong or damaged, judged in pairs.

    `wins` of the result are the shares of votes of a simulated annotator, a tie being half a vote; `scores` are the
    annotator's utilities without noise. `counts` as in `captions`. `votes`: how often each pair is judged, with fresh
    noise. `processes` changes how long it takes (about 20 ms a pair in one process, reading the pictures), never the
    result; from a script with more than one, the call has to be under `if __name__ == "__main__"`, as for any spawned
    process.

    Raises:
        ValueError: no annotator has that name.
    """
    if annotator not in ANNOTATORS:
        raise ValueError(f"no annotator is called {annotator!r}; there are: {', '.join(ANNOTATORS)}")
    judge = partial(_judged, seed=seed, annotator=annotator, votes=votes, per_prompt=per_prompt)
    wanted = list(enumerate(captions(count, seed, held_out=held_out, counts=counts)))
    if processes == 1:
        return [judge(one) for one in wanted]
    # Not forked: the caller may have threads.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(judge, wanted, chunksize=64))


def _judged(numbered: tuple[int, Caption], *, seed: int, annotator: str, votes: int, per_prompt: int) -> Judged:
    (i, caption), judge = numbered, ANNOTATORS[annotator]
    rng = np.random.default_rng([seed, i, 2])
    drawn = [
        Drawing(caption, (seed, i, 3 + side), float(rng.random() * (rng.random() < 0.6)), bool(rng.random() < 0.4))
        for side in range(per_prompt)
    ]
    utilities = [judge.utility(caption, drawing.image()) for drawing in drawn]
    wins = np.full((per_prompt, per_prompt), 0.5)
    for a, b in combinations(range(per_prompt), 2):
        verdicts = Counter(judge.judge(rng, utilities[a], utilities[b]) for _ in range(votes))
        wins[a, b] = (verdicts["A"] + verdicts["same"] / 2) / votes
        wins[b, a] = 1 - wins[a, b]
    prompts = (str(caption),) * per_prompt
    return Judged(prompts, tuple(drawn), wins, tuple(utilities), 1.0, f"shapes {seed}/{i}")
