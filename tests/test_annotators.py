"""Simulated annotators: what they like, how noisy they are, and the pairs that they judge."""

from collections import Counter

import numpy as np
import pytest

from mmalign.jobs_inputs import Data
from mmalign.shapes.annotators import ANNOTATORS, FEATURES, Annotator, Cycle, features
from mmalign.shapes.captions import parse_caption
from mmalign.shapes.data import judged_groups
from mmalign.shapes.scene import Scene, Shape, render
from mmalign.tasks import sources

RED = Shape("circle", "red", 20, 30, 9)


def seen_features(text: str, *shapes: Shape) -> dict[str, float]:
    return features(parse_caption(text), render(Scene(shapes, "white")))


def test_features_follow_what_is_drawn():
    def centred(radius, saturation):
        return seen_features("a red circle", Shape("circle", "red", 32, 32, radius, saturation))

    assert centred(8, 0.55) == pytest.approx(
        {"fidelity": 1, "size": 0, "centring": 1, "saturation": 0, "cleanliness": 1}, abs=0.02
    )
    assert centred(16, 0.95) == pytest.approx(dict.fromkeys(FEATURES, 1.0), abs=0.02)
    assert centred(12, 0.75)["size"] == pytest.approx(0.5, abs=0.01)
    aside = seen_features("a red circle", Shape("circle", "red", 16, 32, 9))
    assert aside["centring"] == pytest.approx(0.5, abs=0.01)


def test_fidelity_is_a_share_less_the_extras():
    blue = Shape("square", "blue", 45, 40, 8)
    assert seen_features("a red circle and a blue square", RED)["fidelity"] == 0.5
    assert seen_features("a red circle", RED, blue)["fidelity"] == 0
    assert seen_features("a red circle and a green square", RED, blue)["fidelity"] == 0.5
    assert seen_features("a green circle", RED)["fidelity"] == 0


def test_nothing_drawn_has_no_merit():
    assert set(seen_features("a red circle").values()) == {0.0}
    for annotator in ANNOTATORS.values():
        assert annotator.utility(parse_caption("a red circle"), render(Scene((), "white"))) == 0


def test_tastes_decide():
    caption = parse_caption("a red circle")
    big = render(Scene((Shape("circle", "red", 20, 20, 14, 0.9),), "white"))
    tidy = render(Scene((Shape("circle", "red", 32, 32, 8, 0.6),), "white"))
    wrong = render(Scene((Shape("circle", "blue", 32, 32, 14, 0.9),), "white"))
    assert ANNOTATORS["bold"].utility(caption, big) > ANNOTATORS["bold"].utility(caption, tidy) + 0.1
    assert ANNOTATORS["tidy"].utility(caption, tidy) > ANNOTATORS["tidy"].utility(caption, big) + 0.1
    assert ANNOTATORS["faithful"].utility(caption, tidy) > ANNOTATORS["faithful"].utility(caption, wrong) + 0.5


def test_a_dislike_is_a_taste_for_less():
    values = {**dict.fromkeys(FEATURES, 0.5), "cleanliness": 0.9, "fidelity": 1.0}
    likes, dislikes = ANNOTATORS["polished"], ANNOTATORS["grainy"]
    assert likes.weigh(values) == pytest.approx(0.4 + 0.6 * 0.9)
    assert dislikes.weigh(values) == pytest.approx(0.4 + 0.6 * 0.1)
    with pytest.raises(ValueError, match="taste for beauty"):
        Annotator("odd", {"size": 1.0}, dislikes=frozenset({"beauty"}))


def test_a_cycle_prefers_each_kind_to_the_next():
    cycle = Cycle(temperature=0.5)
    kinds = cycle.kinds
    for i, kind in enumerate(kinds):
        follower = kinds[(i + 1) % 3]
        assert cycle.prefers(kind, follower) == 1 and cycle.prefers(follower, kind) == 0
        assert cycle.probability(kind, follower) == pytest.approx(1 / (1 + np.exp(-2)))
        assert cycle.probability(kind, follower) + cycle.probability(follower, kind) == pytest.approx(1)
        assert cycle.prefers(kind, kind) == cycle.probability(kind, kind) == 0.5


@pytest.mark.parametrize("difference", [-0.2, -0.03, 0.0, 0.05, 0.15])
@pytest.mark.parametrize(("temperature", "margin"), [(0.1, 0.0), (0.1, 0.05), (0.03, 0.1)])
def test_answers_are_as_frequent_as_the_closed_form(difference, temperature, margin):
    annotator = Annotator("any", {"size": 1.0}, temperature, margin)
    rng = np.random.default_rng(10)
    draws = 20_000
    counted = Counter(annotator.judge(rng, 0.5 + difference, 0.5) for _ in range(draws))
    expected = annotator.probabilities(0.5 + difference, 0.5)
    assert sum(expected.values()) == pytest.approx(1)
    for answer, probability in expected.items():
        spread = np.sqrt(probability * (1 - probability) / draws)
        assert abs(counted[answer] / draws - probability) <= 4.5 * spread + 1e-9


def test_without_a_margin_it_is_bradley_terry_and_with_one_rao_kupper():
    plain = Annotator("any", {"size": 1.0}, 0.1, 0.0).probabilities(0.6, 0.4)
    assert plain["A"] == pytest.approx(1 / (1 + np.exp(-2.0))) and plain["same"] == pytest.approx(0, abs=1e-12)
    margin, temperature = 0.05, 0.1
    tied = Annotator("any", {"size": 1.0}, temperature, margin).probabilities(0.6, 0.4)
    worth_a, worth_b, theta = np.exp(0.6 / temperature), np.exp(0.4 / temperature), np.exp(margin / temperature)
    assert tied["A"] == pytest.approx(worth_a / (worth_a + theta * worth_b))
    assert tied["B"] == pytest.approx(worth_b / (theta * worth_a + worth_b))
    both = (worth_a + theta * worth_b) * (theta * worth_a + worth_b)
    assert tied["same"] == pytest.approx((theta**2 - 1) * worth_a * worth_b / both)


def test_far_apart_utilities_do_not_overflow():
    certain = Annotator("any", {"size": 1.0}, 1e-4, 0.0).probabilities(1.0, 0.0)
    assert certain == {"A": 1.0, "B": 0.0, "same": 0.0}


def test_answers_are_the_seed_s():
    annotator = ANNOTATORS["careless"]

    def answers(seed):
        rng = np.random.default_rng(seed)
        return [annotator.judge(rng, 0.5, 0.45) for _ in range(200)]

    assert answers(1) == answers(1) != answers(2)
    assert set(answers(1)) == {"A", "B", "same"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tastes": {"beauty": 1.0}}, "taste for beauty; known: fidelity, size"),
        ({"tastes": {"size": 0.7}}, "add up to 1"),
        ({"tastes": {"size": 1.5, "fidelity": -0.5}}, "must not be negative"),
        ({"tastes": {"size": 1.0}, "temperature": 0.0}, "temperature above 0"),
        ({"tastes": {"size": 1.0}, "tie_margin": -0.1}, "tie_margin of 0 or more"),
    ],
)
def test_an_impossible_annotator_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Annotator("odd", **arguments)


def test_annotators_have_their_own_user_ids():
    assert len({annotator.user_id for annotator in ANNOTATORS.values()}) == len(ANNOTATORS) >= 5
    assert all(name == annotator.name for name, annotator in ANNOTATORS.items())


def test_more_votes_bring_the_label_near_to_the_probability():
    once = judged_groups(60, 5, "faithful")
    often = judged_groups(60, 5, "faithful", votes=400)
    judge = ANNOTATORS["faithful"]
    assert {float(group.wins[0, 1]) for group in once} == {0.0, 0.5, 1.0}
    for group in often:
        caption = group.media[0].caption
        utilities = [judge.utility(caption, drawing.image()) for drawing in group.media]
        p = judge.probabilities(*utilities)
        assert group.wins[0, 1] == pytest.approx(p["A"] + p["same"] / 2, abs=4.5 * 0.5 / 400**0.5)
        assert group.scores == tuple(utilities)
    assert {drawing.seed[:2] for group in often for drawing in group.media} == {(5, i) for i in range(60)}


def test_groups_do_not_depend_on_the_number_of_processes():
    one, two = (judged_groups(70, 5, "bold", votes=3, per_prompt=3, processes=count) for count in (1, 2))
    for first, second in zip(one, two, strict=True):
        assert (first.media, first.scores) == (second.media, second.scores)
        assert (first.wins == second.wins).all()


def test_a_group_of_more_is_judged_pair_by_pair():
    for group in judged_groups(20, 5, "bold", per_prompt=4):
        assert group.wins.shape == (4, 4)
        assert (group.wins + group.wins.T == 1).all()
        assert len({drawing.hash() for drawing in group.media}) == 4


def test_groups_of_an_unknown_annotator():
    with pytest.raises(ValueError, match="no annotator is called 'blod'; there are: faithful, bold"):
        judged_groups(1, 5, "blod")


def test_counts_decide_how_many_shapes_the_judged_captions_have():
    data = Data(shapes={"scenes": 10, "seed": 5, "counts": (0.0, 0.0, 1.0)})
    found, _ = sources.groups(data, "pairs")
    assert {len(parse_caption(group.prompts[0]).items) for group in found} == {3}
