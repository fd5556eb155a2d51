"""Pictures of different shapes: which height and width each group of pictures is cut to.

The buckets of a resolution R are the sizes, in multiples of `data.bucket_step`, whose area comes nearest to R^2 from
below, so that a batch costs about the same in each (2307.01952, appendix I, has those of SDXL). A bucket belongs to
the whole group (pair, list, single), since its pictures share latents' shape, t and noise.

Clips have a number of frames besides: of `data.frames` and the shorter `data.frame_buckets` a group gets the longest
that all of its clips fill at `data.fps`, so that nothing is padded. With `data.bucket_budget: clip` shorter lengths are
larger, so that a batch has about as many latents in each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

from mmalign.jobs_inputs import Data
from mmalign.media import image_size
from mmalign.progress import track
from mmalign.tasks.inputs import Size as AnySize
from mmalign.tasks.lengths import facts

Size = tuple[int, int]
"""Height and width in pixels."""


def shapes(resolution: int, step: int, max_aspect: float) -> list[Size]:
    """All buckets, from the tallest to the widest; the square of side `resolution` is among them.

    For every short side, a multiple of `step` up to the resolution, the long side is the largest multiple for which
    height * width <= resolution^2; both ways round, where long / short <= max_aspect.

    Raises:
        ValueError: the resolution is not a multiple of the step, or there is no bucket but the square.
    """
    if resolution % step:
        below = max(1, resolution // step) * step
        raise ValueError(
            f"data.bucket_step: data.resolution {resolution} is not a multiple of {step}; use resolution {below} or "
            "another step"
        )
    found: set[Size] = set()
    for short in range(step, resolution + 1, step):
        long = resolution**2 // (short * step) * step
        if long <= max_aspect * short:
            found |= {(short, long), (long, short)}
    if len(found) == 1:
        raise ValueError(
            f"data.buckets: there is only the square of {resolution} with bucket_step {step} and bucket_max_aspect "
            f"{max_aspect:g}; use a smaller step, a larger aspect, or buckets: off"
        )
    return sorted(found, key=lambda size: size[1] / size[0])


def kept(picture: Size, bucket: Size) -> Fraction:
    """The share of a picture's area that is left when it is resized to cover the bucket and cropped to it."""
    one, other = picture[0] * bucket[1], picture[1] * bucket[0]
    return Fraction(min(one, other), max(one, other))


def best(pictures: Sequence[Size], buckets: Sequence[Size]) -> int:
    """The number of the bucket that keeps most of a group: the product of the kept shares is largest.

    That is the least sum of distances between logarithms of aspects, which for a list is a median: one odd picture
    does not cost the others. For a pair, all buckets between its two aspects tie. Ties go to the bucket in which the
    picture that loses most loses least, so that winner and loser are cropped alike; then to the one nearest to a
    square, then to the taller. Fractions are exact, so the choice is the same on every machine.
    """

    def rank(number: int) -> tuple[Any, ...]:
        shares = [kept(picture, buckets[number]) for picture in pictures]
        return -prod(shares), -min(shares), Fraction(max(buckets[number]), min(buckets[number])), number

    return min(range(len(buckets)), key=rank)


@dataclass(frozen=True)
class Targets:
    """What each item of a task is cut to: `shapes[numbers[item]]`, or the only shape where there are no buckets.

    `pictures` counts a picture once for each item that it belongs to, as `enlarged` does, which have fewer pixels than
    their target on a side; `cropped` is the mean share of area that crops take away.
    """

    shapes: Sequence[AnySize]
    numbers: list[int] | None = None
    pictures: int = 0
    enlarged: int = 0
    cropped: float = 0.0

    def size(self, item: int) -> AnySize:
        return self.shapes[self.numbers[item] if self.numbers else 0]

    @property
    def largest(self) -> AnySize:
        """The shape that has most pixels, counting those of every frame; of several the one nearest to a square."""
        return max(self.shapes, key=lambda size: (prod(size), -max(size[:2])))

    def together(self, count: int) -> list[list[int]]:
        """The items 0..count - 1 of each bucket that has any: what can share a batch."""
        if self.numbers is None:
            return [list(range(count))]
        members: dict[int, list[int]] = {}
        for item, number in enumerate(self.numbers):
            members.setdefault(number, []).append(item)
        return [members[number] for number in sorted(members)]

    def summary(self) -> str:
        """What became of the pictures, to follow another sentence; empty without buckets."""
        if self.numbers is None:
            return ""
        return (
            f"; {len(set(self.numbers))} of {len(self.shapes)} buckets used, {self.enlarged} of {self.pictures} "
            f"pictures enlarged, {self.cropped:.1%} of their area cropped"
        )

    def facts(self, of: Callable[[AnySize], dict[str, Any]]) -> dict[str, Any]:
        """For run.json: per bucket (width x height) how many items it has and what `of` says of the size."""
        if self.numbers is None:
            return {}
        counts = Counter(self.numbers)
        buckets = {
            "x".join(map(str, (size[1], size[0], *size[2:]))): {"items": counts[number], **of(size)}
            for number, size in enumerate(self.shapes)
            if number in counts
        }
        return {"buckets": buckets, "pictures_enlarged": self.enlarged, "mean_cropped_share": self.cropped}


def targets(groups: Sequence[Sequence[Any]], data: Data, adapter: Any) -> Targets:
    """The targets of groups of media, by their pictures' sizes where `data.buckets` says so, and by clips' lengths.

    Raises:
        ValueError: sides would not be multiples of what the adapter takes, or a picture cannot be read.
    """
    lengths = sorted({*data.frame_buckets, data.frames}) if data.frames else []
    if data.buckets == "off" and len(lengths) < 2:
        side = data.resolution
        return Targets([(side, side, lengths[0]) if lengths else (side, side)])
    sides = {length: _resolution(data, adapter, length) for length in lengths or [1]}
    if data.buckets == "aspect" and data.bucket_step % adapter.multiple:
        near = -(-data.bucket_step // adapter.multiple) * adapter.multiple
        raise ValueError(
            f"data.bucket_step: {data.bucket_step} is not a multiple of {adapter.multiple}, as sides of pictures are "
            f"for this model; use {near}"
        )
    every = {
        length: shapes(side, data.bucket_step, data.bucket_max_aspect) if data.buckets == "aspect" else [(side, side)]
        for length, side in sides.items()
    }
    return _assigned(groups, _known(groups, lengths, data), every, bool(lengths))


def _assigned(
    groups: Sequence[Sequence[Any]], known: dict[Any, tuple[Size, int]], every: dict[int, list[Size]], clips: bool
) -> Targets:
    """Each group's bucket among the shapes of its length; `every` has those of each length."""
    places = [(length, size) for length, sizes in every.items() for size in sizes]
    number_of = {place: number for number, place in enumerate(places)}
    chosen: dict[tuple[Any, ...], int] = {}
    numbers, enlarged, lost = [], 0, 0.0
    for group in groups:
        sizes = tuple(sorted(known[medium][0] for medium in group))
        length = min(known[medium][1] for medium in group)
        if (sizes, length) not in chosen:
            chosen[sizes, length] = number_of[length, every[length][best(sizes, every[length])]]
        number = chosen[sizes, length]
        height, width = bucket = places[number][1]
        numbers.append(number)
        enlarged += sum(size[0] < height or size[1] < width for size in sizes)
        lost += float(sum(1 - kept(size, bucket) for size in sizes))
    pictures = sum(map(len, groups))
    found: list[AnySize] = [(*size, length) if clips else size for length, size in places]
    return Targets(found, numbers, pictures, enlarged, lost / pictures)


def _resolution(data: Data, adapter: Any, length: int) -> int:
    """The side of the square bucket of so many frames: `data.resolution`, larger where the clip shares its pixels."""
    if data.bucket_budget == "frame" or not data.frames:
        return data.resolution
    step = data.bucket_step if data.buckets == "aspect" else adapter.multiple
    share = adapter.latent_frames(data.frames) / adapter.latent_frames(length)
    return max(data.resolution, int(data.resolution * share**0.5) // step * step)


def _known(groups: Sequence[Sequence[Any]], lengths: Sequence[int], data: Data) -> dict[Any, tuple[Size, int]]:
    """Of every medium its height and width, and the longest of the lengths that it fills (1 for pictures)."""
    media = list(dict.fromkeys(medium for group in groups for medium in group))
    known: dict[Any, tuple[Size, int]] = {}
    for medium in track(media, "reading sizes", len(media)):
        size, frames = facts(medium, data.fps) if lengths else (_size(medium), 1)
        known[medium] = size, max((length for length in lengths if length <= frames), default=1)
    return known


def _size(medium: Any) -> Size:
    return medium.size if hasattr(medium, "image") else image_size(medium)
