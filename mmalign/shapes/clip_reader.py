"""Reads a clip of the shapes world back: which shapes, where they go and how fast, how steadily, how cleanly.

From the pixels alone: each frame is read by `mmalign.shapes.reader`, what lies near in neighbouring frames becomes one
track, and a straight line is fitted to each track. `mmalign.shapes.axes` says what that is worth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmalign.shapes.clip import HEADINGS
from mmalign.shapes.reader import MESS_AREA, Reading, SeenShape, read
from mmalign.shapes.scene import SIDE

STILL = 3.0  # units per second; what is slower stands still (the slowest that is drawn moves at 6)
ASKEW = 30.0  # degrees from an axis; what goes further aside has no direction
REACH = 14.0  # units that an object may be from where its track leads it
OTHER_NAME = 4.0  # units that another kind, or another colour, counts as
STANDS = 0.35  # of the expected step: a moving shape that does less has not moved
LEAPS = 1.65  # one that does more has leapt
LEAST_STEP = 0.5  # units per frame; slower shapes do not tell whether a frame is repeated
LEAST_SIDE = 24  # pixels; smaller frames are enlarged


@dataclass(frozen=True)
class Track:
    """One object through the clip, in the frame of 64 by 64 units.

    `sightings`: the object in each frame, None where it is not. `kind`, `colour`: what it has most often been, None
    where it was never any. `x`, `y`: where the fitted line begins, at the first frame. `vx`, `vy`: units per second.
    """

    sightings: tuple[SeenShape | None, ...]
    kind: str | None
    colour: str | None
    radius: float
    x: float
    y: float
    vx: float
    vy: float
    fps: float

    @property
    def seen(self) -> int:
        """In how many frames."""
        return sum(shape is not None for shape in self.sightings)

    @property
    def kept(self) -> int:
        """In how many frames it is there, with its own kind and colour."""
        name = (self.kind, self.colour)
        return 0 if None in name else sum((s.kind, s.colour) == name for s in self.sightings if s is not None)

    @property
    def speed(self) -> float:
        """Units per second."""
        return float(np.hypot(self.vx, self.vy))

    @property
    def direction(self) -> str | None:
        """left, right, up or down, within ASKEW of that axis; "still" below STILL; None for what goes askew."""
        if self.speed < STILL:
            return "still"
        best = max(("left", "right", "up", "down"), key=lambda name: self.along(name))
        return best if self.along(best) >= np.cos(np.radians(ASKEW)) else None

    def along(self, direction: str) -> float:
        """Cosine of the angle between its velocity and a direction; 0 without velocity."""
        across, down = HEADINGS[direction]
        return float((self.vx * across + self.vy * down) / self.speed) if self.speed else 0.0

    @cached_property
    def places(self) -> np.ndarray:
        """x, y and radius in each frame, [T, 3], NaN where it is not."""
        return np.array([(s.x, s.y, s.radius) if s else (np.nan,) * 3 for s in self.sightings])

    @property
    def steps(self) -> np.ndarray:
        """How far it comes from frame to frame, as shares of what its speed would be, [T - 1, 2], NaN where not seen.

        Of each step the part along its velocity, and the length in whatever direction. For a track that moves.
        """
        steps = np.diff(self.places[:, :2], axis=0) * self.fps / self.speed
        return np.stack([steps @ np.array([self.vx, self.vy]) / self.speed, np.hypot(*steps.T)], 1)

    @property
    def jitter(self) -> float:
        """Root mean square distance in units from a shape of one size on a straight line at one speed."""
        times = np.arange(len(self.sightings)) / self.fps
        ideal = np.stack([self.x + self.vx * times, self.y + self.vy * times, np.full(len(times), self.radius)], 1)
        return float(np.sqrt(np.nanmean(((self.places - ideal) ** 2).sum(-1))))


@dataclass(frozen=True)
class ClipReading:
    """What a clip shows.

    `tracks`: objects that are there in at least half of the frames, from left to right at the beginning. `strays`: how
    many sightings, over all frames, belong to none of these. `frames`: the reading of each frame.
    """

    frames: tuple[Reading, ...]
    tracks: tuple[Track, ...]
    strays: int
    fps: float

    @cached_property
    def background(self) -> str | None:
        """The background in most frames, None where that is none of the three."""
        return Counter(frame.background for frame in self.frames).most_common(1)[0][0]

    @property
    def background_constancy(self) -> float:
        """Share of the frames that have this background, in [0, 1]; 0 where it is none of the three."""
        return float(np.mean([frame.background == self.background is not None for frame in self.frames]))

    @cached_property
    def cleanliness(self) -> float:
        """Mean over the frames of exp(-mess / 150), in [0, 1]; 0 where no frame shows a proper shape.

        An empty frame among others is clean: what is amiss with it is its motion.
        """
        if not any(shape.proper for frame in self.frames for shape in frame.shapes):
            return 0.0
        return float(np.mean([np.exp(-frame.mess / MESS_AREA) for frame in self.frames]))

    @cached_property
    def flicker(self) -> float:
        """How much colours change from frame to frame, root mean square over the steps; RGB in [0, 1].

        Of each step the largest change counts, among the background and the tracks, each the root mean square over
        three channels. A track whose kind or colour changes its name in a step is left out there: that is no flicker,
        but another shape.
        """
        steps = zip(self.frames, self.frames[1:], range(len(self.frames)), strict=False)
        changes = [
            max([_change(a.ground, b.ground), *(_recoloured(track, k) for track in self.tracks)]) for a, b, k in steps
        ]
        return float(np.sqrt(np.mean(np.square(changes)))) if changes else 0.0

    @cached_property
    def identity(self) -> float:
        """Share of what should be there that is, in [0, 1]: tracks keep their kind and colour and nothing else appears.

        Frames in which a track is kept, summed over the tracks, over (frames x tracks + strays); 0 without a track.
        """
        if not self.tracks:
            return 0.0
        return sum(track.kept for track in self.tracks) / (len(self.frames) * len(self.tracks) + self.strays)

    @cached_property
    def jitter(self) -> float:
        """Root mean square over the tracks of theirs, in units; what has no kind or colour has no place to speak of."""
        known = [track.jitter for track in self.tracks if track.kind and track.colour]
        return float(np.sqrt(np.mean(np.square(known)))) if known else 0.0

    @cached_property
    def held(self) -> tuple[int, ...]:
        """Frames that repeat the one before: no moving shape is more than STANDS of its step from where it was."""
        return self._steps(lambda ahead, away: away < STANDS)

    @cached_property
    def leapt(self) -> tuple[int, ...]:
        """Frames before which some were left out: all moving shapes have got on by more than LEAPS of their step.

        Straight ahead, that is: at most STANDS of a step aside.
        """
        return self._steps(lambda ahead, away: (ahead > LEAPS) & (away**2 - ahead**2 < STANDS**2))

    @property
    def dropped(self) -> float:
        """Share of the steps from frame to frame that stand or leap, in [0, 1]; 0 where nothing moves."""
        return (len(self.held) + len(self.leapt)) / max(len(self.frames) - 1, 1)

    def _steps(self, odd: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> tuple[int, ...]:
        """Frames to which every moving track that is there comes by an odd step; see `Track.steps`."""
        moving = [track.steps for track in self.tracks if track.speed >= max(STILL, LEAST_STEP * self.fps)]
        if not moving:
            return ()
        ahead, away = np.moveaxis(np.array(moving), -1, 0)
        known = ~np.isnan(ahead)
        found = known.any(0) & (odd(ahead, away) | ~known).all(0)
        return tuple((1 + np.flatnonzero(found)).tolist())


def read_clip(clip: np.ndarray, fps: float) -> ClipReading:
    """Reads one clip: uint8 RGB [T, height, width, 3], T at least 1; `fps` frames per second.

    Square frames of 24 to 64 pixels are read at their own side, others after area averaging to 64x64. Deterministic.
    A track's velocity is the median of the slopes between any two of its sightings (Theil and Sen), x and y apart, so
    that a quarter of them may be anywhere.

    Raises:
        ValueError: for anything but such an array, or a rate that is not above 0.
    """
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3 or 0 in clip.shape:
        raise ValueError(
            f"the reader needs a uint8 RGB clip [frames, height, width, 3], not {clip.dtype} {list(clip.shape)}; "
            "convert it."
        )
    if not 0 < fps < np.inf:
        raise ValueError(f"a clip is read at a rate above 0 frames per second, not {fps}.")
    height, width = clip.shape[1:3]
    side = height if height == width and LEAST_SIDE <= height <= SIDE else SIDE
    frames = tuple(read(frame, side) for frame in clip)
    rows = _joined(_linked([frame.shapes for frame in frames]))
    tracks = [_track(row, len(frames), fps) for row in rows]
    main = sorted((t for t in tracks if 2 * t.seen >= len(frames)), key=lambda t: t.x)
    strays = sum(len(frame.shapes) for frame in frames) - sum(track.seen for track in main)
    return ClipReading(frames, tuple(main), strays, fps)


Row = dict[int, SeenShape]  # by frame
Name = tuple[str | None, str | None]


def _linked(frames: Sequence[tuple[SeenShape, ...]]) -> list[Row]:
    """Sightings that follow each other: the object and the track that are nearest come together first, within REACH.

    A track ends where nothing has followed for two frames.
    """
    rows: list[Row] = []
    for k, shapes in enumerate(frames):
        recent = [row for row in rows if k - max(row) <= 2]
        costs = np.array([_distances(row, k, shapes) for row in recent]).reshape(len(recent), len(shapes))
        taken: set[int] = set()
        for place in np.argsort(costs, axis=None, kind="stable"):
            i, j = divmod(int(place), len(shapes))
            if costs[i, j] > REACH:
                break
            if j not in taken and k not in recent[i]:
                recent[i][k] = shapes[j]
                taken.add(j)
        rows += [{k: shape} for j, shape in enumerate(shapes) if j not in taken]
    return rows


def _distances(row: Row, k: int, shapes: Sequence[SeenShape]) -> np.ndarray:
    """From where a track was last seen, or from where that step leads to in frame k if this is nearer."""
    last = max(row)
    old, before = row[last], row.get(last - 1, row[last])
    places = np.array([(shape.x, shape.y) for shape in shapes]).reshape(-1, 2)
    was = np.array([old.x, old.y])
    leads = was + (k - last) * (was - (before.x, before.y))
    away = np.minimum(np.hypot(*(places - was).T), np.hypot(*(places - leads).T))
    other = [(shape.kind != old.kind) + (shape.colour != old.colour) for shape in shapes]
    return away + OTHER_NAME * np.array(other)


def _joined(rows: list[Row]) -> list[Row]:
    """Tracks of one kind and colour that are never there together are one: it was away, or leapt."""
    joined: list[tuple[Name, Row]] = []
    for row in sorted(rows, key=lambda row: min(row)):
        name = _name(row)
        same = [other for named, other in joined if named == name and not row.keys() & other.keys()]
        if same and None not in name:
            same[0].update(row)
        else:
            joined.append((name, row))
    return [dict(sorted(row.items())) for _, row in joined]


def _name(row: Row) -> Name:
    """Most frequent kind and colour; of equals the first seen."""
    kinds = Counter(shape.kind for shape in row.values() if shape.kind)
    colours = Counter(shape.colour for shape in row.values() if shape.colour)
    return max(kinds, key=kinds.__getitem__, default=None), max(colours, key=colours.__getitem__, default=None)


def _track(row: Row, frames: int, fps: float) -> Track:
    times = np.array(list(row)) / fps
    places = np.array([(shape.x, shape.y, shape.radius) for shape in row.values()])
    one, other = np.triu_indices(len(row), 1)
    velocity = np.zeros(2)
    if len(row) > 1:
        velocity = np.median((places[other] - places[one])[:, :2] / (times[other] - times[one])[:, None], axis=0)
    start = np.median(places[:, :2] - times[:, None] * velocity, axis=0)
    sightings = tuple(row.get(k) for k in range(frames))
    kind, colour = _name(row)
    radius = float(np.median(places[:, 2]))
    (x, y), (vx, vy) = start.tolist(), velocity.tolist()
    return Track(sightings, kind, colour, radius, x, y, vx, vy, fps)


def _recoloured(track: Track, k: int) -> float:
    """How much a track's colour changes from frame k to the next, while its name stays."""
    one, other = track.sightings[k : k + 2]
    if one is None or other is None or (one.kind, one.colour) != (other.kind, other.colour):
        return 0.0
    return _change(one.rgb, other.rgb)


def _change(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    return float(np.sqrt(np.mean(np.square(np.subtract(one, other)))))
