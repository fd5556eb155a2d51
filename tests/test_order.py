"""The order of items: one endless stream for every layout, and with buckets one bucket per block, all items alike."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from training_kit import config

from mmalign import noise, train
from mmalign.order import Bucketed, Shuffled, order

SIZES = {0: 12, 3: 7, 5: 1, 8: 20}  # how many items each bucket has
BUCKETS = [bucket for bucket, count in SIZES.items() for _ in range(count)]
np.random.default_rng(0).shuffle(BUCKETS)


def _blocks(stream: Any, count: int) -> list[list[tuple[int, int]]]:
    return [stream.block(number) for number in range(count)]


def test_without_buckets_the_stream_is_a_permutation_per_epoch() -> None:
    """Written out as it was before there were buckets, since runs must be resumed to the byte."""
    found = [position for block in _blocks(order(9, 5, 3), 10) for position in block]
    expected = []
    for epoch in range(6):
        shuffled = torch.randperm(5, generator=noise.generator("order", 9, epoch)).tolist()
        expected += [(item, epoch) for item in shuffled]
    assert found == expected


def test_a_block_holds_one_bucket() -> None:
    for block in _blocks(order(0, len(BUCKETS), 4, BUCKETS), 300):
        assert len(block) == 4
        assert len({BUCKETS[item] for item, _ in block}) == 1


@pytest.mark.parametrize("length", [1, 4, 16])
def test_every_item_is_visited_equally_often_and_each_visit_is_another_epoch(length: int) -> None:
    seen: Counter[int] = Counter()
    epochs: dict[int, list[int]] = {item: [] for item in range(len(BUCKETS))}
    for number, block in enumerate(_blocks(order(0, len(BUCKETS), length, BUCKETS), 600)):
        for item, epoch in block:
            seen[item] += 1
            epochs[item].append(epoch)
        rounds = (number + 1) * length / len(BUCKETS)
        for item, bucket in enumerate(BUCKETS):
            # Blocks of a round come in any order, so within one an item may be a visit ahead or behind; a bucket is
            # never more than a block off.
            slack = 2 + length / SIZES[bucket] + len(SIZES) * length / len(BUCKETS)
            assert abs(seen[item] - rounds) <= slack, (number, item)
    for found in epochs.values():
        # Blocks of one round are shuffled, so the last epochs may have begun before an earlier one is through.
        assert len(found) == len(set(found))
        assert set(range(max(found) - 2 - 2 * length)) <= set(found)


def test_whole_blocks_are_visited_exactly_once_per_round() -> None:
    buckets = [0] * 8 + [1] * 4 + [2] * 12
    stream = order(3, 24, 4, buckets)
    for start in range(0, 60, 6):
        seen = Counter(item for number in range(start, start + 6) for item, _ in stream.block(number))
        assert seen == Counter(range(24))


def test_the_expected_number_of_visits_is_the_same_from_the_first_round_on() -> None:
    """A single picture in a bucket of its own with batches of 16: over many seeds as often as any other."""
    visits: Counter[int] = Counter()
    for seed in range(400):
        stream = order(seed, len(BUCKETS), 16, BUCKETS)
        assert isinstance(stream, Bucketed)
        for number in range(sum(stream._given(2))):  # two rounds
            visits.update(BUCKETS[item] for item, _ in stream.block(number))
    for bucket, count in SIZES.items():
        deviation = 16 / count * 0.5 / 400**0.5  # of a mean of values that are one block apart
        assert visits[bucket] / count / 400 == pytest.approx(2, abs=5 * deviation), bucket


def test_a_bucket_smaller_than_a_block_repeats_its_items_with_other_draws() -> None:
    stream = order(0, 10, 6, [0] * 8 + [1] * 2)
    small = [block for block in _blocks(stream, 40) if block[0][0] >= 8]
    assert 7 <= len(small) <= 9, "two of ten items in a fifth of the blocks"
    for block in small:
        assert Counter(item for item, _ in block) == {8: 3, 9: 3}
        assert len(set(block)) == 6


def test_buckets_alternate_in_another_order_each_round() -> None:
    stream = order(0, 24, 2, [0] * 12 + [1] * 12)
    rounds = [
        tuple(stream.block(number)[0][0] < 12 for number in range(start, start + 12)) for start in range(0, 96, 12)
    ]
    assert len(set(rounds)) > 5
    assert all(sum(one) == 6 for one in rounds)


def test_a_block_is_found_from_its_number_alone() -> None:
    whole = _blocks(order(0, len(BUCKETS), 4, BUCKETS), 120)
    for number in (119, 0, 57, 58, 3):
        assert order(0, len(BUCKETS), 4, BUCKETS).block(number) == whole[number]
    assert order(0, len(BUCKETS), 4, BUCKETS).block(10**9)  # not by counting up to it
    assert _blocks(order(1, len(BUCKETS), 4, BUCKETS), 120) != whole


@pytest.mark.parametrize("buckets", [None, BUCKETS])
def test_the_stream_is_the_same_for_any_number_of_processes(tmp_path: Path, buckets: list[int] | None) -> None:
    """What two processes with batches of two hold together is what one holds in batches of four."""

    def step(batch: int, processes: int, accumulate: int, number: int) -> list[tuple[int, int]]:
        settings = config(
            tmp_path, tmp_path, tmp_path, optim__batch_size=batch, optim__accumulate=accumulate, seed=2
        )  # fmt: skip
        found = []
        for micro in range(accumulate):
            for rank in range(processes):
                loop: Any = SimpleNamespace(
                    config=settings, accelerator=SimpleNamespace(process_index=rank, num_processes=processes),
                    order=order(2, len(BUCKETS), batch * processes, buckets),
                )  # fmt: skip
                mine = train.Loop.positions(loop, number, micro)
                assert len(mine) == batch
                found += mine
        return found

    for number in range(8):
        assert step(4, 1, 3, number) == step(2, 2, 3, number) == step(1, 4, 3, number)
    together = [position for number in range(6) for position in step(4, 1, 1, number)]
    assert together == [position for number in range(2) for position in step(2, 2, 3, number)]


def test_which_stream() -> None:
    assert isinstance(order(0, 3, 1), Shuffled)
    assert isinstance(order(0, 3, 1, [0, 0, 0]), Bucketed)
