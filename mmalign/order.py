"""Which items a micro-batch holds: endless shuffled streams, found from the micro-batch's number alone.

There is no state to save and nothing to wind forward: what block n holds follows from the seed, the items and the
length of a block. A block is what all processes together see in one micro-batch, each its own slice of it, so one
process with batches of four trains on what two with batches of two train on.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

import torch

from mmalign import noise

Position = tuple[int, int]
"""(item, epoch): an item, and how often its stream has shown it before, which numbers its draws."""


class Stream:
    """Items in an order that is shuffled anew for each epoch, by (identity, epoch)."""

    def __init__(self, items: Sequence[int], *identity: object):
        self.items = items

        def shuffle(epoch: int) -> torch.Tensor:
            return torch.randperm(len(items), generator=noise.generator("order", *identity, epoch))

        self._shuffle = lru_cache(4)(shuffle)  # blocks of one round reach from the epoch before into the one after

    def span(self, start: int, length: int) -> list[Position]:
        """`length` positions of the stream from `start` on."""
        found = []
        for position in range(start, start + length):
            epoch, place = divmod(position, len(self.items))
            found.append((self.items[int(self._shuffle(epoch)[place])], epoch))
        return found


class Shuffled:
    """One stream over all items, cut into blocks."""

    def __init__(self, seed: int, size: int, length: int):
        self.stream, self.length = Stream(range(size), seed), length

    def block(self, number: int) -> list[Position]:
        return self.stream.span(number * self.length, self.length)


class Bucketed:
    """A stream for each bucket, each cut into blocks, so that a block holds items of one bucket only.

    Which bucket is next: time goes in rounds, about an epoch each. By the end of round r a bucket of n items has given
    floor((n (r + 1) + phase) / length) blocks, and the blocks of a round are shuffled by (seed, round). What does not
    fill a block is thus carried into the bucket's next round, and every item has been visited once per round, up to
    the part of a block that its bucket is behind or ahead. The phase in [0, length) is drawn by (seed): without it
    every bucket would begin by falling behind, and a small one would not be seen before its first block is full. With
    it, the expected number of visits is the same for every item after every round.

    A bucket with fewer items than a block holds gives its block as rarely as that demands; the block then has its
    items several times, each time as another epoch, and so with other draws.

    Args:
        buckets: the bucket of each item, any numbers.
        length: items in a block.
    """

    def __init__(self, seed: int, buckets: Sequence[int], length: int):
        members: dict[int, list[int]] = {}
        for item, bucket in enumerate(buckets):
            members.setdefault(bucket, []).append(item)
        self.length, self.size = length, len(buckets)
        self.streams = [Stream(items, seed, "bucket", bucket) for bucket, items in sorted(members.items())]
        drawn = noise.generator("order", seed, "phases")
        self.phases = torch.randint(length, (len(self.streams),), generator=drawn).tolist()

        def shuffle(turn: int, count: int) -> torch.Tensor:
            return torch.randperm(count, generator=noise.generator("order", seed, "round", turn))

        self._shuffle = lru_cache(1)(shuffle)

    def _given(self, turn: int) -> list[int]:
        """How many blocks each bucket has given before this round."""
        pairs = zip(self.streams, self.phases, strict=True)
        return [(turn * len(stream.items) + phase) // self.length for stream, phase in pairs]

    def block(self, number: int) -> list[Position]:
        # After r rounds there are more than r size / length - (number of buckets) blocks: far enough to look.
        enough = (number + len(self.streams)) * self.length // self.size + 2
        turn = bisect_right(range(enough), number, key=lambda r: sum(self._given(r))) - 1
        before, after = self._given(turn), self._given(turn + 1)
        place = int(self._shuffle(turn, sum(after) - sum(before))[number - sum(before)])
        for stream, first, end in zip(self.streams, before, after, strict=True):
            if place < end - first:
                return stream.span((first + place) * self.length, self.length)
            place -= end - first
        raise AssertionError("a round has as many places as blocks")


def order(seed: int, size: int, length: int, buckets: Sequence[int] | None = None) -> Shuffled | Bucketed:
    """The blocks of a run over `size` items: of one bucket each, where there are buckets."""
    return Shuffled(seed, size, length) if buckets is None else Bucketed(seed, buckets, length)
