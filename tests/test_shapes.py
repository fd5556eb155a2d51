"""The shapes world: the grammar, the reader against the renderer, the evaluator."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from mmalign import discovery
from mmalign.evaluation import Batch
from mmalign.shapes.annotators import ANNOTATORS
from mmalign.shapes.captions import Caption, Item, captions, parse_caption, sample_caption
from mmalign.shapes.reader import Reading, fidelity, read
from mmalign.shapes.scene import SIDE, Scene, Shape, place_of, relation_of, render, sample_scene
from mmalign.testing.evaluators import check_evaluator

RED = Shape("circle", "red", 20, 30, 9)


def scenes(count: int, seed: int) -> list[tuple[Caption, Scene]]:
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(count):
        caption = sample_caption(rng)
        drawn.append((caption, sample_scene(caption, rng)))
    return drawn


def exact(scene: Scene, reading: Reading) -> bool:
    """Same kinds, colours and number from left to right, same background, places and relations."""
    drawn = sorted(scene.shapes, key=lambda shape: shape.x)
    if [(s.kind, s.colour) for s in drawn] != [(s.kind, s.colour) for s in reading.shapes]:
        return False
    same_places = all(near_place(a, b) for a, b in zip(drawn, reading.shapes, strict=True))
    pairs = [(i, j) for i in range(len(drawn)) for j in range(i)]
    same_relations = all(near_relation(drawn[i], drawn[j], reading.shapes[i], reading.shapes[j]) for i, j in pairs)
    return scene.background == reading.background and same_places and same_relations


def near_place(drawn, seen) -> bool:
    """Equal words, except where the drawn centre lies within half a pixel of where the word changes."""
    nudged = {place_of(drawn.x + dx, drawn.y + dy) for dx in (-0.5, 0, 0.5) for dy in (-0.5, 0, 0.5)}
    return place_of(seen.x, seen.y) in nudged


def near_relation(a, b, seen_a, seen_b) -> bool:
    close_call = abs(abs(a.x - b.x) - abs(a.y - b.y)) <= 1.0
    return close_call or relation_of(seen_a, seen_b) == relation_of(a, b)


def noisy(image, rng):
    return np.clip(image + rng.normal(0, 10, image.shape), 0, 255).round().astype(np.uint8)


def blurred(image, rng):
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1.0)))


def jpeg(image, rng):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=60)
    return np.asarray(Image.open(file))


def drifted(image, rng):
    gain, lift = rng.uniform(0.88, 1.12) * rng.uniform(0.97, 1.03, size=3), rng.uniform(-8, 8)
    return np.clip(image * gain + lift, 0, 255).round().astype(np.uint8)


def small_model(image, rng):
    return noisy(blurred(drifted(image, rng), rng), rng)


# --- captions and scenes ---


def test_captions_are_read_back():
    for caption, _ in scenes(500, seed=1):
        assert parse_caption(str(caption)) == caption


@pytest.mark.parametrize(
    "text",
    ["", "a dog", "red circle", "a red circle on the left of", "a red circle above a blue square above a red cross"],
)
def test_other_texts_are_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"a small red circle on the left|at most three shapes"):
        parse_caption(text)


def test_held_out_captions_are_a_tenth_and_never_mixed():
    kept, held = captions(300, 0, held_out=False), captions(300, 0, held_out=True)
    assert not {str(c) for c in kept} & {str(c) for c in held}
    share = np.mean([caption.held_out for caption, _ in scenes(3000, seed=2)])
    assert 0.07 < share < 0.13


def test_scenes_keep_what_their_caption_asks():
    for caption, scene in scenes(300, seed=3):
        if caption.position:
            assert place_of(scene.shapes[0].x, scene.shapes[0].y) == caption.position
        if caption.relation:
            assert relation_of(*scene.shapes) == caption.relation
        for shape in scene.shapes:
            assert shape.radius <= min(shape.x, shape.y, SIDE - shape.x, SIDE - shape.y)


# --- reader ---


def test_reads_two_thousand_scenes_back():
    drawn = scenes(2000, seed=4)
    hits, kept, centre, radius, cleanliness = 0, 0, [], [], []
    for caption, scene in drawn:
        reading = read(render(scene))
        hits += exact(scene, reading)
        kept += fidelity(caption, reading).everything
        cleanliness.append(reading.cleanliness)
        if len(reading.shapes) == len(scene.shapes):
            for a, b in zip(sorted(scene.shapes, key=lambda shape: shape.x), reading.shapes, strict=True):
                centre.append(max(abs(a.x - b.x), abs(a.y - b.y)))
                radius.append(abs(a.radius - b.radius))
    assert hits / len(drawn) >= 0.995
    assert kept / len(drawn) >= 0.995
    assert np.max(centre) <= 0.5 and np.max(radius) <= 0.5
    assert np.min(cleanliness) > 0.95


@pytest.mark.parametrize(
    ("spoil", "least", "clean"),
    [
        pytest.param(noisy, 0.99, (0.3, 0.6), id="noise of 10/255"),
        pytest.param(blurred, 0.985, (0.6, 0.9), id="blur of one pixel"),
        # Halved chroma leaves little of a small cross that differs from a grey background in its hue alone.
        pytest.param(jpeg, 0.95, (0.5, 0.8), id="JPEG at quality 60"),
        pytest.param(drifted, 0.99, (0.95, 1.0), id="drift of 12 % in brightness, 3 % per channel"),
        pytest.param(small_model, 0.985, (0.2, 0.5), id="drift, blur and noise"),
    ],
)
def test_reads_spoilt_scenes(spoil, least, clean):
    rng = np.random.default_rng(5)
    drawn = scenes(400, seed=6)
    readings = [read(spoil(render(scene), rng)) for _, scene in drawn]
    hits = [exact(scene, reading) for (_, scene), reading in zip(drawn, readings, strict=True)]
    assert np.mean(hits) >= least
    assert clean[0] < np.mean([reading.cleanliness for reading in readings]) <= clean[1]


@pytest.mark.parametrize("grey", [0, 90, 128, 247, 255])
def test_an_empty_image_shows_nothing(grey):
    reading = read(np.full((64, 64, 3), grey, np.uint8))
    assert reading.shapes == () and reading.cleanliness == 0
    assert not fidelity(parse_caption("a red circle"), reading).count


@pytest.mark.parametrize("seed", range(5))
def test_noise_shows_no_asked_shape_and_is_not_clean(seed):
    rng = np.random.default_rng(seed)
    for image in (rng.integers(0, 256, (64, 64, 3)), rng.normal(128, 40, (64, 64, 3)).clip(0, 255)):
        reading = read(image.astype(np.uint8))
        assert reading.cleanliness < 0.01
        assert not fidelity(parse_caption("a red circle"), reading).everything


def disc(x, y, radius):
    rows, columns = np.mgrid[:64, :64] + 0.5
    return np.hypot(rows - y, columns - x) < radius


def test_a_speck_is_no_object_but_lowers_the_cleanliness():
    image = render(Scene((RED,), "white"))
    for radius in (1, 2):
        spoilt = image.copy()
        spoilt[disc(48, 44, radius)] = (190, 190, 60)
        reading = read(spoilt)
        assert len(reading.shapes) == 1
        assert reading.cleanliness < read(image).cleanliness - 0.004 * radius


def test_an_extra_blob_is_an_object_and_is_not_clean():
    image = render(Scene((RED,), "white"))
    rows, columns = np.mgrid[:64, :64]
    image[(rows > 36) & (rows < 58) & (columns > 44) & (columns < 51)] = (60, 90, 220)  # a bar is no shape of ours
    reading = read(image)
    kept = fidelity(parse_caption("a red circle"), reading)
    assert [shape.kind for shape in reading.shapes] == ["circle", None]
    assert not kept.shape_colour and not kept.count
    assert reading.cleanliness < 0.6


def test_half_a_shape_is_no_shape():
    image = render(Scene((Shape("circle", "blue", 32, 32, 11),), "grey"))
    image[32:] = image[0, 0]
    reading = read(image)
    assert [shape.kind for shape in reading.shapes] == [None]
    assert not fidelity(parse_caption("a blue circle"), reading).shape_colour
    assert reading.cleanliness == 0


def test_a_ghost_without_colour_is_not_one_of_the_asked():
    image = render(Scene((RED,), "white"))
    image[disc(46, 40, 9)] = (150, 150, 150)
    reading = read(image)
    assert [shape.colour for shape in reading.shapes] == ["red", None]
    assert reading.cleanliness < 0.6


@pytest.mark.parametrize(
    "other",
    [Shape("square", "blue", 34, 32, 8), Shape("cross", "purple", 38, 31, 9), Shape("square", "red", 36.5, 32, 8)],
    ids=["hidden by another colour", "touching, near in hue", "touching, same colour"],
)
def test_shapes_that_touch_are_told_apart(other):
    reading = read(render(Scene((RED, other), "grey")))
    assert [(s.kind, s.colour) for s in reading.shapes] == [("circle", "red"), (other.kind, other.colour)]
    for seen, drawn in zip(reading.shapes, (RED, other), strict=True):
        assert abs(seen.x - drawn.x) < 0.6 and abs(seen.y - drawn.y) < 0.6 and abs(seen.radius - drawn.radius) < 0.6


def test_a_hue_between_two_is_one_shape():
    image = render(Scene((), "white")).astype(float)
    image[disc(30, 30, 10)] = (230, 140, 40)
    image += np.random.default_rng(7).normal(0, 8, image.shape)
    reading = read(image.clip(0, 255).astype(np.uint8))
    assert [shape.kind for shape in reading.shapes] == ["circle"]


@pytest.mark.parametrize("size", [(32, 32), (96, 96), (200, 200), (64, 96)])
def test_other_sizes_are_averaged_to_64(size):
    image = np.asarray(Image.fromarray(render(Scene((RED,), "black"), 512)).resize(size[::-1], Image.Resampling.BOX))
    seen = read(image).shapes
    assert [(shape.kind, shape.colour) for shape in seen] == [("circle", "red")]
    assert abs(seen[0].radius - 9) < 0.1 and abs(seen[0].x - 20) < 0.1 and abs(seen[0].y - 30) < 0.1


@pytest.mark.parametrize(
    "image", [np.zeros((64, 64), np.uint8), np.zeros((3, 64, 64), np.uint8), np.zeros((64, 64, 3))]
)
def test_a_wrong_array_is_refused(image):
    with pytest.raises(ValueError, match=r"needs a uint8 RGB image \[height, width, 3\], not"):
        read(image)


def test_reading_is_deterministic():
    images = [noisy(render(scene), np.random.default_rng(8)) for _, scene in scenes(100, seed=9)]
    first = [read(image) for image in images]
    assert [read(image) for image in images] == first


# --- fidelity ---


def judged(text: str, *shapes: Shape, background: str = "white"):
    return fidelity(parse_caption(text), read(render(Scene(shapes, background))))


def test_fidelity_wants_exactly_the_asked_shapes():
    blue = Shape("square", "blue", 45, 40, 8)
    assert judged("a red circle", RED).everything
    assert judged("a red circle and a blue square", RED, blue).everything
    extra = judged("a red circle", RED, blue)
    assert not extra.shape_colour and not extra.count and not extra.everything
    missing = judged("a red circle and a blue square", RED)
    assert not missing.shape_colour and not missing.count
    swapped = judged("a blue circle and a red square", RED, blue)
    assert not swapped.shape_colour and swapped.count


def test_fidelity_says_none_where_nothing_is_asked():
    plain = judged("a red circle", RED)
    assert plain.size is plain.position is plain.relation is plain.background is None


def test_fidelity_of_size_has_half_a_pixel_of_room():
    for radius, small, large in ((9.9, True, False), (10.4, True, False), (10.8, False, False), (11.6, False, True)):
        shape = Shape("square", "green", 32, 32, radius)
        assert judged("a small green square", shape).size is small
        assert judged("a large green square", shape).size is large


def test_fidelity_of_position_relation_and_background():
    blue = Shape("square", "blue", 45, 33, 8)
    assert judged("a red circle on the left", RED).position is True
    assert judged("a red circle on the right", RED).position is False
    assert judged("a red circle left of a blue square", RED, blue).relation is True
    assert judged("a blue square left of a red circle", RED, blue).relation is False
    assert judged("a red circle on the left", blue).position is False  # nothing there that could be on the left
    assert judged("a red circle on a grey background", RED, background="grey").background is True
    assert judged("a red circle on a grey background", RED, background="black").background is False


def test_equal_items_are_matched_in_any_order():
    twins = Caption((Item("circle", "red", "large"), Item("circle", "red", "small")))
    reading = read(render(Scene((Shape("circle", "red", 15, 32, 7), Shape("circle", "red", 45, 32, 12)), "white")))
    assert fidelity(twins, reading).everything


# --- evaluator ---


def tensors(*images: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(image).permute(2, 0, 1) for image in images]


def test_the_evaluator_scores_what_is_there():
    right, wrong = render(Scene((RED,), "white")), render(Scene((Shape("cross", "red", 20, 30, 9),), "white"))
    batch = Batch(images=tensors(right, wrong), prompts=["a red circle on a white background"] * 2)
    scores = discovery.load_evaluator("shapes_truth", {"annotator": "bold"}, "cpu").score(batch)
    assert {
        name: values.tolist() for name, values in scores.items() if name in ("fidelity", "count", "everything")
    } == {
        "fidelity": [1, 0],
        "count": [1, 1],
        "everything": [1, 0],
    }
    caption = parse_caption(batch.prompts[0])
    assert scores["utility"].tolist() == [ANNOTATORS["bold"].utility(caption, image) for image in (right, wrong)]
    assert scores["cleanliness"].min() > 0.95


def test_a_prompt_outside_the_grammar_is_an_error_that_says_so():
    image = render(Scene((RED,), "white"))
    batch = Batch(images=tensors(image, image), prompts=["a red circle", "a photograph of a dog"])
    with pytest.raises(ValueError, match="not a caption of the shapes world: 'a photograph of a dog'"):
        discovery.load_evaluator("shapes_truth", device="cpu").score(batch)


def test_the_evaluator_keeps_the_contract():
    asked = [str(caption) for caption, _ in scenes(4, seed=11)]
    check_evaluator("shapes_truth", prompts=asked, sizes=[(64, 64), (33, 70), (2, 2), (128, 128)])


def test_an_unknown_annotator_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no annotator 'blod'; known are faithful, bold"):
        discovery.load_evaluator("shapes_truth", {"annotator": "blod"}, "cpu")
