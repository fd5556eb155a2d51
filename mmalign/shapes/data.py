"""Scenes of the shapes world as training data: captioned pictures, and pairs that an annotator judged."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from multiprocessing import get_context
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

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


@dataclass(frozen=True)
class JudgedPair:
    """Two drawings for one caption; `label` in [0.5, 1] is the share of votes for `winner`, a tie being half a vote."""

    prompt: str
    winner: Drawing
    loser: Drawing
    label: float
    weight: float = 1.0
    origin: str = "shapes"


def judged_pairs(
    count: int, seed: int, annotator: str, *, votes: int = 1, held_out: bool = False, processes: int = 1
) -> list[JudgedPair]:
    """Pairs in which either picture may be wrong or damaged, judged by a simulated annotator; ties are kept.

    `votes`: how often each pair is judged, with fresh noise. `processes` changes how long it takes (about 20 ms a pair
    in one process, reading the pictures), never the result; from a script with more than one, the call has to be under
    `if __name__ == "__main__"`, as for any spawned process.

    Raises:
        ValueError: no annotator has that name.
    """
    if annotator not in ANNOTATORS:
        raise ValueError(f"no annotator is called {annotator!r}; there are: {', '.join(ANNOTATORS)}")
    judge = partial(_judged, seed=seed, annotator=annotator, votes=votes)
    wanted = list(enumerate(captions(count, seed, held_out=held_out)))
    if processes == 1:
        return [judge(one) for one in wanted]
    # Not forked: the caller may have threads.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(judge, wanted, chunksize=64))


def _judged(numbered: tuple[int, Caption], *, seed: int, annotator: str, votes: int) -> JudgedPair:
    (i, caption), judge = numbered, ANNOTATORS[annotator]
    rng = np.random.default_rng([seed, i, 2])
    a, b = (
        Drawing(caption, (seed, i, side), float(rng.random() * (rng.random() < 0.6)), bool(rng.random() < 0.4))
        for side in (3, 4)
    )
    utilities = [judge.utility(caption, drawing.image()) for drawing in (a, b)]
    verdicts = Counter(judge.judge(rng, *utilities) for _ in range(votes))
    share = (verdicts["A"] + verdicts["same"] / 2) / votes
    winner, loser = (b, a) if share < 0.5 else (a, b)
    return JudgedPair(str(caption), winner, loser, max(share, 1 - share), 1.0, f"shapes {seed}/{i}")
