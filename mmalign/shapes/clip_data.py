"""Moving scenes of the shapes world as training data: captioned clips, and clips that an annotator judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from multiprocessing import get_context

import numpy as np

from mmalign.judgements import Judged
from mmalign.shapes.annotators import Annotator
from mmalign.shapes.axes import AXES
from mmalign.shapes.axes import axes as axes_of
from mmalign.shapes.clip import FPS, FRAMES, LONGEST, PIXELS, MovingScene, has_room, sample_moving
from mmalign.shapes.clip_annotators import CLIP_ANNOTATORS
from mmalign.shapes.clip_reader import read_clip
from mmalign.shapes.damage import MOTION, PICTURE, Film, damage, film, mistaken, parts
from mmalign.shapes.motion import COUNT_WEIGHTS, MotionCaption, motions


@dataclass(frozen=True)
class DrawnClip:
    """A clip drawn when it is needed.

    `wrong`: what of the caption it breaks, one of `damage.TEXT`. `damages`: kinds and amounts, of `damage.PICTURE` and
    `damage.MOTION`.
    """

    caption: MotionCaption
    seed: tuple[int, ...]
    num_frames: int = FRAMES
    side: int = PIXELS
    fps: float = FPS
    wrong: str = ""
    damages: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        return f"shapes clip {self.seed}: {self.caption}"

    @cached_property
    def scene(self) -> MovingScene:
        """The moving scene, undamaged; with `wrong` that of another caption."""
        rng = np.random.default_rng(self.seed)
        seconds = (self.num_frames - 1) / self.fps
        shown = self.caption
        while self.wrong and (shown == self.caption or not has_room(shown, seconds)):
            shown = mistaken(self.caption, self.wrong, rng)
        return sample_moving(shown, rng, frames=self.num_frames, fps=self.fps)

    @property
    def film(self) -> Film:
        """With its damages, before it is drawn."""
        rng = np.random.default_rng([*self.seed, 1])
        shown = film(self.scene, self.num_frames, self.fps, self.side)
        for kind, amount in self.damages:
            shown = damage(shown, kind, amount, rng)
        return shown

    def hash(self) -> str:
        """What identifies the clip, for caches."""
        faults = f":{self.wrong}:{self.damages}" if self.wrong or self.damages else ""
        return f"shapes-clip-1:{self.seed}:{self.caption}:{self.num_frames}x{self.side}@{self.fps:g}{faults}"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, without drawing it."""
        return self.side, self.side

    def clip(self) -> np.ndarray:
        """uint8 RGB [num_frames, side, side, 3]."""
        return self.film.draw()


def drawn_clips(
    count: int, seed: int, *, held_out: bool = False, counts: tuple[float, ...] = COUNT_WEIGHTS, frames: int = FRAMES,
    side: int = PIXELS, fps: float = FPS,
) -> list[DrawnClip]:  # fmt: skip
    """`count` captioned clips that match their captions; `counts` as in `motions`.

    Captions for which so long a clip has no room are left out.

    Raises:
        ValueError: `counts` are not probabilities; a clip has no frame, no pixel or no frames per second, or is longer
            than 2 seconds.
    """
    wanted = _captions(count, seed, held_out, counts, frames, side, fps)
    return [DrawnClip(caption, (seed, i), frames, side, fps) for i, caption in enumerate(wanted)]


def _captions(
    count: int, seed: int, held_out: bool, counts: tuple[float, ...], frames: int, side: int, fps: float
) -> list[MotionCaption]:
    if frames < 1 or side < 1 or fps <= 0:
        raise ValueError(f"a clip needs frames, pixels and a rate above 0, not {frames}, {side} and {fps:g}")
    seconds = (frames - 1) / fps
    if seconds > LONGEST:
        raise ValueError(
            f"{frames} frames at {fps:g} per second are {seconds:g} seconds, in which a quick shape leaves the frame; "
            f"draw at most {int(LONGEST * fps) + 1} frames at that rate"
        )
    return motions(count, seed, held_out=held_out, counts=counts, where=lambda caption: has_room(caption, seconds))


def judged_clips(
    count: int, seed: int, annotator: str, *, votes: int = 1, per_prompt: int = 2, held_out: bool = False,
    counts: tuple[float, ...] = COUNT_WEIGHTS, frames: int = FRAMES, side: int = PIXELS, fps: float = FPS,
    axes: tuple[str, ...] = (), dimensions: Mapping[str, float] | None = None, processes: int = 1,
) -> list[Judged]:  # fmt: skip
    """Clips of `count` captions, `per_prompt` of each, any of them wrong or damaged, judged in pairs.

    Half of the clips break their caption in one thing, half have damaged pictures, half damaged motion, independently.
    `wins` of the result are the shares of votes on the whole, a tie being half a vote, or with `dimensions` the mean of
    those on the axes, weighted by them; `scores` are the annotator's utilities without noise. `axes` (as `data.axes`)
    names those whose votes are kept apart, in the result's `axes`, and beside them in `axis_scores` the values of
    `mmalign.shapes.axes`. `votes`, `processes` as in `mmalign.shapes.data.judged_groups`; a pair takes about 20 ms.

    Raises:
        ValueError: no annotator has that name, no axis, or the weights are not above 0; or as `drawn_clips`.
    """
    if annotator not in CLIP_ANNOTATORS:
        raise ValueError(f"no annotator of clips is called {annotator!r}; there are: {', '.join(CLIP_ANNOTATORS)}")
    unknown = sorted({*axes, *(dimensions or {})} - set(AXES))
    if unknown:
        raise ValueError(f"clips are not judged on {', '.join(unknown)}; axes are {', '.join(AXES)}")
    if dimensions is not None and (min(dimensions.values(), default=0) < 0 or sum(dimensions.values()) <= 0):
        raise ValueError(f"weights of axes are not negative, and one is above 0: {dict(dimensions)}")
    judge = partial(
        _judged, seed=seed, annotator=annotator, votes=votes, per_prompt=per_prompt, frames=frames, side=side, fps=fps,
        axes=axes, dimensions=None if dimensions is None else dict(dimensions),
    )  # fmt: skip
    wanted = list(enumerate(_captions(count, seed, held_out, counts, frames, side, fps)))
    if processes == 1:
        return [judge(one) for one in wanted]
    # Not forked: the caller may have threads.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(judge, wanted, chunksize=64))


def _judged(
    numbered: tuple[int, MotionCaption], *, seed: int, annotator: str, votes: int, per_prompt: int, frames: int,
    side: int, fps: float, axes: tuple[str, ...], dimensions: dict[str, float] | None,
) -> Judged:  # fmt: skip
    (i, caption), judge = numbered, CLIP_ANNOTATORS[annotator]
    rng = np.random.default_rng([seed, i, 2])
    clips = []
    for place in range(per_prompt):
        wrong, damages = _faults(caption, rng)
        clips.append(DrawnClip(caption, (seed, i, 3 + place), frames, side, fps, wrong, damages))
    rated = [axes_of(caption, read_clip(clip.clip(), fps)) for clip in clips]
    utilities = tuple(judge.weigh(values) for values in rated)
    whole = _wins(judge, utilities, votes, rng)
    each = {axis: _wins(judge, [values[axis] for values in rated], votes, rng) for axis in AXES}
    if dimensions is not None:
        whole = np.average([each[axis] for axis in dimensions], axis=0, weights=list(dimensions.values()))
    return Judged(
        (str(caption),) * per_prompt, tuple(clips), whole, utilities, 1.0, f"shapes clips {seed}/{i}", judge.user_id,
        tuple(each[axis] for axis in axes), tuple(tuple(values[axis] for values in rated) for axis in axes),
    )  # fmt: skip


def _faults(caption: MotionCaption, rng: np.random.Generator) -> tuple[str, tuple[tuple[str, float], ...]]:
    """What of the caption is broken, and which damages there are."""
    wrong = str(rng.choice(parts(caption))) if rng.random() < 0.5 else ""
    damages = tuple((str(rng.choice(kinds)), float(rng.random())) for kinds in (PICTURE, MOTION) if rng.random() < 0.5)
    return wrong, damages


def _wins(judge: Annotator, values: Sequence[float], votes: int, rng: np.random.Generator) -> np.ndarray:
    """Shares of votes [k, k], a tie being half a vote."""
    wins = np.full((len(values), len(values)), 0.5)
    for a, b in combinations(range(len(values)), 2):
        verdicts = Counter(judge.judge(rng, values[a], values[b]) for _ in range(votes))
        wins[a, b] = (verdicts["A"] + verdicts["same"] / 2) / votes
        wins[b, a] = 1 - wins[a, b]
    return wins
