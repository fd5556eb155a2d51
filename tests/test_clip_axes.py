"""The three axes: their formulas by hand, and which fault lowers which of them."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mmalign.shapes.axes import AXES, axes, everything, kept, motion_quality, text_alignment, visual_quality
from mmalign.shapes.clip import sample_moving
from mmalign.shapes.clip_data import drawn_clips
from mmalign.shapes.clip_reader import ClipReading, Track, read_clip
from mmalign.shapes.damage import MOTION, PICTURE, TEXT, damage, film, mistaken, parts, spoil
from mmalign.shapes.motion import motions, parse_motion
from mmalign.shapes.reader import Reading, SeenShape
from mmalign.shapes.scene import SIDE

FPS = 8.0
CLIPS = drawn_clips(24, 50)


def seen(x, y, radius=10.0, kind="circle", colour="red", rgb=(0.9, 0.1, 0.1)) -> SeenShape:
    return SeenShape(kind, colour, x, y, radius, 0.8, 1.0, rgb)


def track(vx=0.0, vy=0.0, kind="circle", colour="red", radius=10.0, frames=9) -> Track:
    sightings = tuple(seen(32 + k * vx / FPS, 32 + k * vy / FPS, radius, kind, colour) for k in range(frames))
    return Track(sightings, kind, colour, radius, 32.0, 32.0, vx, vy, FPS)


def reading(*tracks: Track, background="grey", mess=0.0, strays=0) -> ClipReading:
    frames = []
    for k in range(9):
        shapes = tuple(t.sightings[k] for t in tracks if t.sightings[k])
        frames.append(Reading(shapes, background, 1.0, (0.6, 0.6, 0.6), mess))
    return ClipReading(tuple(frames), tracks, strays, FPS)


def test_visual_quality_by_hand():
    assert visual_quality(reading(track())) == 1
    assert visual_quality(reading(track(), mess=60.0)) == pytest.approx(np.exp(-60 / 150))
    assert visual_quality(reading()) == 0
    dimmed = replace(reading(track()), frames=tuple(
        replace(frame, ground=(g,) * 3, mess=m)
        for frame, g, m in zip(reading(track()).frames, [0.6, 0.5] * 4 + [0.6], [0, 30] * 4 + [0], strict=True)
    ))  # fmt: skip
    clean = (5 + 4 * np.exp(-30 / 150)) / 9
    assert visual_quality(dimmed) == pytest.approx(clean * np.exp(-((0.1 / 0.1) ** 2)))


def test_motion_quality_by_hand():
    assert motion_quality(reading(track(vx=16))) == motion_quality(reading(track())) == 1
    assert motion_quality(reading()) == 0
    assert motion_quality(reading(track(), strays=3)) == pytest.approx(9 / 12)
    steady = track(vx=16)
    shaken = replace(
        steady, sightings=tuple(replace(s, y=s.y + (-1) ** k * 1.2) for k, s in enumerate(steady.sightings))
    )
    assert motion_quality(reading(shaken)) == pytest.approx(np.exp(-((1.2 / 1.5) ** 2)))
    both = np.sqrt(1.2**2 / 2)  # of two tracks the mean square counts
    assert motion_quality(reading(shaken, track(vy=8))) == pytest.approx(np.exp(-((both / 1.5) ** 2)))
    other = tuple(replace(s, colour="blue") if k > 6 else s for k, s in enumerate(steady.sightings))
    assert motion_quality(reading(replace(steady, sightings=other))) == pytest.approx(7 / 9)
    held = list(steady.sightings)
    held[4] = held[3]  # one step stands, the next is twice as long; one place of nine is 2 units behind
    expected = (1 - 2 / 8) * np.exp(-((2**2 / 9) / 1.5**2))
    assert motion_quality(reading(replace(steady, sightings=tuple(held)))) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "shown", "part", "exact", "grade"),
    [
        ("a red circle moves left", track(vx=-10), "direction 0", True, 1.0),
        ("a red circle moves left", track(vx=10), "direction 0", False, 0.0),
        ("a red circle moves left", track(vy=10), "direction 0", False, 0.0),
        ("a red circle moves left", track(vx=-10, vy=10), "direction 0", False, np.sqrt(0.5)),
        ("a red circle moves up", track(vx=-5, vy=-10), "direction 0", True, 10 / np.sqrt(125)),
        ("a red circle moves up", track(vy=-1.5), "direction 0", False, 0.5),
        ("a red circle moves up", track(), "direction 0", False, 0.0),
        ("a red circle stands still", track(vx=2.9), "direction 0", True, 1.0),
        ("a red circle stands still", track(vx=4.5), "direction 0", False, 0.5),
        ("a red circle stands still", track(vx=9), "direction 0", False, 0.0),
        ("a red circle moves up slowly", track(vy=-13), "speed 0", True, 1.0),
        ("a red circle moves up slowly", track(vy=-16), "speed 0", False, 0.5),
        ("a red circle moves up slowly", track(vy=-1.5), "speed 0", False, 0.5),
        ("a red circle moves up quickly", track(vy=-15), "speed 0", True, 1.0),
        ("a red circle moves up quickly", track(vy=-12), "speed 0", False, 0.5),
        ("a red circle moves up quickly", track(vy=8), "speed 0", False, 0.0),
        ("a small red circle stands still", track(radius=10.5), "size 0", True, 1.0),
        ("a small red circle stands still", track(radius=11.5), "size 0", False, 0.5),
        ("a large red circle stands still", track(radius=11.5), "size 0", True, 1.0),
        ("a large red circle stands still", track(radius=9.0), "size 0", False, 0.0),
        ("a red square stands still", track(), "kind 0", False, 0.0),
        ("a blue circle stands still", track(), "colour 0", False, 0.0),
        ("a red circle stands still on a grey background", track(), "background", True, 1.0),
        ("a red circle stands still on a black background", track(), "background", False, 0.0),
    ],
)
def test_grades_by_hand(text, shown, part, exact, grade):
    found = kept(parse_motion(text), reading(shown))
    assert found[part].exact == exact and found[part].grade == pytest.approx(grade)
    assert everything(parse_motion(text), reading(shown)) == all(one.exact for one in found.values())
    assert text_alignment(parse_motion(text), reading(shown)) == pytest.approx(
        np.mean([one.grade for one in found.values()])
    )


def test_only_what_is_asked_is_graded():
    assert set(kept(parse_motion("a red circle moves left"), reading(track()))) == {
        "count", "kind 0", "colour 0", "direction 0"}  # fmt: skip
    text = "a small red circle moves left slowly and a blue square stands still on a grey background"
    assert set(kept(parse_motion(text), reading())) == {
        "count", "background", "kind 0", "colour 0", "size 0", "direction 0", "speed 0", "kind 1", "colour 1",
        "direction 1"}  # fmt: skip


def test_one_shape_too_many_or_too_few():
    one = parse_motion("a red circle moves left")
    two = parse_motion("a red circle moves left and a blue square stands still")
    red, blue = track(vx=-10), track(kind="square", colour="blue")
    assert text_alignment(one, reading(red, blue)) == pytest.approx(3 / 7)
    assert text_alignment(two, reading(red)) == pytest.approx((0.5 + 3) / 7)
    assert text_alignment(two, reading(red, blue)) == text_alignment(two, reading(blue, red)) == 1
    assert text_alignment(one, reading()) == 0
    assert not everything(one, reading(red, blue)) and not everything(two, reading(red))


def test_shapes_are_matched_to_the_captions_best():
    two = parse_motion("a red circle moves left and a red square moves right")
    swapped = reading(track(vx=10), track(vx=-10, kind="square"))
    assert text_alignment(two, swapped) == pytest.approx(5 / 7)  # both directions wrong, or both kinds
    for order in itertools.permutations(swapped.tracks):
        assert text_alignment(two, reading(*order)) == pytest.approx(5 / 7)


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, float]]:
    """Mean of each axis over clips with one fault, by fault."""
    found = {}
    for kind in PICTURE + MOTION:
        clips = [damage(film(c.scene), kind, 0.5, np.random.default_rng(i)).draw() for i, c in enumerate(CLIPS)]
        values = [axes(c.caption, read_clip(clip, FPS)) for c, clip in zip(CLIPS, clips, strict=True)]
        found[kind] = {axis: float(np.mean([value[axis] for value in values])) for axis in AXES}
    for part in TEXT:
        values = []
        for i, caption in enumerate(c for c in motions(60, 51, held_out=False) if part in parts(c)):
            rng = np.random.default_rng(i)
            clip = film(sample_moving(mistaken(caption, part, rng), rng)).draw()
            values.append(axes(caption, read_clip(clip, FPS)))
            if i == 15:
                break
        found[part] = {axis: float(np.mean([value[axis] for value in values])) for axis in AXES}
    return found


@pytest.mark.parametrize("kind", PICTURE + MOTION + TEXT)
def test_each_fault_lowers_its_own_axis_and_leaves_the_others(table, kind):
    own = "VQ" if kind in PICTURE else "MQ" if kind in MOTION else "TA"
    assert table[kind][own] < 0.92
    assert all(table[kind][axis] > 0.97 for axis in AXES if axis != own), table[kind]


@pytest.mark.parametrize("kind", PICTURE + MOTION)
def test_more_damage_is_worse(kind):
    own = "VQ" if kind in PICTURE else "MQ"
    means = [
        np.mean([
            axes(c.caption, read_clip(damage(film(c.scene), kind, amount, np.random.default_rng(i)).draw(), FPS))[own]
            for i, c in enumerate(CLIPS[:8])
        ])
        for amount in (0.0, 0.4, 0.9)
    ]  # fmt: skip
    assert means[0] > 0.98 and means[0] > means[1] + 0.01 and means[1] > means[2] + 0.01


# --- damages and mistakes ---


@pytest.mark.parametrize("kind", PICTURE + MOTION)
def test_damage_of_nothing_is_none_and_the_seed_decides(kind):
    shown = film(CLIPS[0].scene)
    assert np.array_equal(damage(shown, kind, 0.0, np.random.default_rng(0)).draw(), shown.draw())
    some = [damage(shown, kind, 0.8, np.random.default_rng(seed)).draw() for seed in (0, 0, 1)]
    assert np.array_equal(some[0], some[1]) and some[0].shape == (9, 32, 32, 3) and some[0].dtype == np.uint8
    assert np.array_equal(shown.draw(), CLIPS[0].clip())


def test_damages_do_what_they_say():
    moving = next(c for c in CLIPS if len(c.caption.movers) == 1 and c.caption.movers[0].direction)
    shown, rng = film(moving.scene), np.random.default_rng(2)
    repeated = damage(shown, "repeat", 1.0, rng).scenes
    assert sum(a == b for a, b in itertools.pairwise(repeated)) == round(0.6 * 8)
    assert sum(not scene.shapes for scene in damage(shown, "vanish", 1.0, rng).scenes) == 4
    swapped = damage(shown, "swap", 0.5, rng).scenes
    names = [(scene.shapes[0].kind, scene.shapes[0].colour) for scene in swapped]
    assert len(set(names[:7])) == 1 and len(set(names[7:])) == 1 and names[0] != names[-1]
    radii = [scene.shapes[0].radius for scene in damage(shown, "pulse", 1.0, rng).scenes]
    assert max(radii) <= shown.scenes[0].shapes[0].radius and min(radii) >= 7.5
    lurched = damage(shown, "lurch", 1.0, rng).scenes
    start, end = shown.scenes[0].shapes[0], shown.scenes[-1].shapes[0]
    for k, scene in enumerate(lurched):
        share = (k / 8) ** 2.5
        assert scene.shapes[0].x == pytest.approx(start.x + share * (end.x - start.x))
        assert scene.shapes[0].y == pytest.approx(start.y + share * (end.y - start.y))
    for scene in damage(shown, "jitter", 1.0, rng).scenes:
        (shape,) = scene.shapes
        assert shape.radius + 1 <= min(shape.x, shape.y) and max(shape.x, shape.y) <= SIDE - shape.radius - 1


def test_spoiling_any_clip():
    rng = np.random.default_rng(0)
    clip = np.full((40, 24, 36, 3), 128, np.uint8)
    assert np.std(spoil(clip, "noise", 0.8, rng).astype(float)) == pytest.approx(20, rel=0.05)
    factors = spoil(clip, "flicker", 1.0, rng).mean((1, 2, 3)) / 128
    assert factors.min() == pytest.approx(0.6, abs=0.05) and factors.max() == pytest.approx(1.0, abs=0.05)
    assert 0 < (spoil(clip, "specks", 1.0, rng) != clip).any(-1).sum() <= 40 * 8
    assert np.array_equal(spoil(clip, "blur", 1.0, rng), clip)
    edge = clip.copy()
    edge[:, :, 18:] = 0
    assert np.abs(np.diff(spoil(edge, "blur", 1.0, rng).astype(int), axis=2)).max() < 64


@pytest.mark.parametrize(
    ("kind", "amount", "message"),
    [("fog", 0.5, "no damage called 'fog'; there are: noise"), ("jitter", 1.1, r"lie in \[0, 1\]"),
     ("noise", float("nan"), r"lie in \[0, 1\]")],
)  # fmt: skip
def test_other_damages_are_refused(kind, amount, message):
    with pytest.raises(ValueError, match=message):
        damage(film(CLIPS[0].scene), kind, amount, np.random.default_rng(0))


def test_a_mistake_changes_one_thing():
    rng = np.random.default_rng(0)
    tried = Counter()
    for caption in motions(150, 52, held_out=False):
        for part in parts(caption):
            other = mistaken(caption, part, rng)
            assert other != caption and parse_motion(str(other)) == other
            tried[part] += 1
            if part == "count":
                assert abs(len(other.movers) - len(caption.movers)) == 1
                continue
            changed = [(a, b) for a, b in zip(caption.movers, other.movers, strict=True) if a != b]
            assert len(changed) == (part != "background")
            assert (other.background != caption.background) == (part == "background")
            for a, b in changed:
                differ = {name for name in ("direction", "speed") if getattr(a, name) != getattr(b, name)}
                differ |= {
                    name for name in ("kind", "colour", "size") if getattr(a.item, name) != getattr(b.item, name)
                }
                still = {"speed"} if part == "direction" and b.direction is None else set()
                assert differ - still == {part}
    assert set(tried) == set(TEXT)


def test_a_caption_that_says_nothing_of_it_cannot_be_broken_in_it():
    caption = parse_motion("a red circle stands still")
    assert parts(caption) == ("kind", "colour", "direction", "count")
    with pytest.raises(ValueError, match="says nothing about 'speed'; it does about kind, colour"):
        mistaken(caption, "speed", np.random.default_rng(0))
