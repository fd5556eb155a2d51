"""What the vision tower of shapes-vlm is taught: labels by patch, by hand, and that it learns them."""

from __future__ import annotations

import numpy as np
import torch

from mmalign.shapes import sight
from mmalign.shapes.captions import BACKGROUNDS, COLOURS, KINDS
from mmalign.shapes.scene import Scene, Shape
from mmalign.shapes.vlm import untrained


def test_labels_by_hand() -> None:
    scene = Scene((Shape("cross", "blue", 40, 8, 8), Shape("circle", "red", 63.9, 64, 12)), "black")
    told, where = sight.labels(scene)
    assert told.shape == (16, 3)
    assert where.shape == (16, 3)
    shapes = {int(cell) for cell in np.flatnonzero(told[:, 0] < len(KINDS))}
    assert shapes == {2, 15}  # the first row's third patch, and the last: a centre on the border is inside
    assert tuple(told[2]) == (KINDS.index("cross"), COLOURS.index("blue"), BACKGROUNDS.index("black"))
    assert np.allclose(where[2], [40 / 64, 8 / 64, 0.5])
    assert tuple(told[15][:2]) == (KINDS.index("circle"), COLOURS.index("red"))
    assert (told[:, 2] == BACKGROUNDS.index("black")).all()


def test_a_perfect_reading_costs_nothing() -> None:
    told, where = (
        torch.from_numpy(part)[None] for part in sight.labels(Scene((Shape("circle", "red", 20, 20, 9),), "grey"))
    )
    sure = [50 * torch.nn.functional.one_hot(told[..., i], n).float() for i, n in enumerate(sight.PARTS[:3])]
    assert sight.loss((*sure, where), told, where).item() < 1e-6
    moved = where + torch.tensor([0.1, 0.0, 0.0])
    assert abs(sight.loss((*sure, moved), told, where).item() - 0.1 / 3) < 1e-5


def test_it_learns_and_the_language_model_stays() -> None:
    model, before = untrained(), untrained().state_dict()
    known = sight.teach(model, steps=60, batch_size=16, lr=2e-3, seed=3)
    assert known["colour"] > 0.5  # by chance one in six
    assert known["empty"] > 0.9
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("vision_tower" in name for name in changed)
