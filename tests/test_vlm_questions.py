"""Yes/no questions about clips: p(yes) against stock float64 passes, what answers make, files and their mistakes."""

import json

import numpy as np
import pytest
import torch
from vlm_kit import ask, batch_of, clips, oracle, prepared, vlm_folder

from mmalign.backbones.clip_questions import Asked, ClipQuestion, combined, part_of, scores_of
from mmalign.backbones.vlm_yes_no import alive
from mmalign.discovery import evaluator_class, load_evaluator, parse_params
from mmalign.evaluation import Batch, ItemErrors
from mmalign.testing import check_evaluator

SIZES = [(40, 50), (64, 64), (33, 70)]
PROMPTS = ["a red circle", "two cats, on a MAT!", "a red circle"]
LINES = [
    {"id": "circle", "question": "Is there a circle?", "dimension": "objects"},
    {"question": "Does it move as in {prompt}?", "depends": ["circle"], "weight": 2, "dimension": "motion"},
    {"question": "Does it flicker?", "expected": "no", "weight": 0.5, "dimension": "motion"},
    {"question": "Is the end red?", "shown": "last"},
    {"question": "Is the beginning red?", "shown": "first_half", "expected": "no"},
]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return vlm_folder(tmp_path_factory.mktemp("vlm"), "qwen2_vl")


@pytest.fixture(name="questions")
def _questions(tmp_path):
    return write(tmp_path / "q.jsonl", LINES)


def p_yes(folder, clip, question):
    """One stock float64 pass for one question."""
    full = ask(folder, f"{question} Answer yes or no.", len(clip))
    inputs, logits, _ = oracle(folder, clip, full)
    start = inputs["input_ids"].shape[1]
    yes, no = (prepared(folder, clip, full + word)["input_ids"][0, start] for word in ("yes", "no"))
    return float(torch.stack([logits[-1, yes], logits[-1, no]]).softmax(0)[0])


def slow(folder, clip, prompt, lines=LINES, soft=False):
    """The score and its dimensions by loops over separate passes."""
    cut = {"all": clip, "last": clip[-1:], "first_half": clip[: -(-len(clip) // 2)]}
    right, value, sums = {}, 0.0, {}
    for number, line in enumerate(lines):
        seen = cut[line.get("shown", "all")]
        chance = p_yes(folder, seen, line["question"].replace("{prompt}", prompt))
        assert abs(chance - 0.5) > 1e-4, "too close to call"
        chance = 1 - chance if line.get("expected") == "no" else chance
        name = line.get("id", f"#{number + 1}")
        counts = all(right[parent] for parent in line.get("depends", []))
        right[name] = counts and chance > 0.5
        value = (chance if soft else float(chance > 0.5)) if counts else 0.0
        for group in ("score", line.get("dimension")):
            if group:
                total, weight = sums.get(group, (0.0, 0.0))
                sums[group] = total + line.get("weight", 1) * value, weight + line.get("weight", 1)
    return {name: total / weight for name, (total, weight) in sums.items()}


@pytest.mark.parametrize(("answers", "frames"), [("exact", 3), ("soft", 3), ("soft", 1)])
def test_scores_equal_separate_float64_passes(folder, questions, answers, frames):
    items = clips(SIZES, frames=frames)
    params = {"model": folder, "questions": questions, "answers": answers}
    found = load_evaluator("vlm_questions", params, "cpu").score(batch_of(items, PROMPTS))
    assert list(found) == ["score", "objects", "motion"]
    different = set()
    for place, (clip, prompt) in enumerate(zip(items, PROMPTS, strict=True)):
        due = slow(folder, clip, prompt, soft=answers == "soft")
        different.add(round(due["score"], 6))
        for name, value in due.items():
            assert float(found[name][place]) == pytest.approx(value, abs=2e-5), name
    assert len(different) > 1 or answers == "exact", "the case tells nothing"


def test_a_family_without_shared_passes_gives_its_own_forwards_answers(tmp_path, questions):
    folder = vlm_folder(tmp_path / "qwen3", "qwen3_vl")
    items = clips(SIZES[:2])
    params = {"model": folder, "questions": questions, "answers": "soft"}
    found = load_evaluator("vlm_questions", params, "cpu").score(batch_of(items, PROMPTS[:2]))
    for place, (clip, prompt) in enumerate(zip(items, PROMPTS, strict=False)):
        assert float(found["score"][place]) == pytest.approx(slow(folder, clip, prompt, soft=True)["score"], abs=2e-5)


def test_a_clip_is_encoded_once_for_all_questions_of_all_evaluators(folder, questions, monkeypatch):
    both = [
        load_evaluator("vlm_questions", params, "cpu")
        for params in (
            {"model": folder, "questions": questions},
            {"model": folder, "ask": 'Does it show "{prompt}"?'},
        )
    ]
    both[1].vlm = both[0].vlm
    asked = []
    see = both[0].vlm.see
    monkeypatch.setattr(both[0].vlm, "see", lambda some: asked.append([len(one) for one in some]) or see(some))
    batch = batch_of(clips(SIZES, frames=3), PROMPTS)
    for evaluator in both:
        evaluator.score(batch)
    assert asked == [[3, 3, 3], [1, 1, 1], [2, 2, 2]], "once whole, once its end, once its first half"


def test_one_question_with_the_prompt(folder):
    items = clips(SIZES, frames=2)
    template = "{question} Say yes or no."
    params = {"model": folder, "ask": "Is it {prompt}?", "answers": "soft", "template": template}
    found = load_evaluator("vlm_questions", params, "cpu").score(batch_of(items, PROMPTS))["score"]
    alone = {"model": folder, "template": 'Is it {prompt}? Say yes or no.', "answer": "yes"}  # fmt: skip
    yes = load_evaluator("vqascore", alone, "cpu").score(batch_of(items, PROMPTS)).double()
    no = load_evaluator("vqascore", {**alone, "answer": "no"}, "cpu").score(batch_of(items, PROMPTS)).double()
    torch.testing.assert_close(found, yes / (yes + no), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------- arithmetic


def questions_of(*expected, **more):
    return tuple(ClipQuestion(f"#{n + 1}", f"{n}?", expected=one, **more) for n, one in enumerate(expected))


def test_combinations_by_hand():
    values, weights = torch.tensor([1.0, 0.0, 1.0, 1.0]).double(), torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    assert combined(values, weights, "mean") == pytest.approx(0.8)
    assert combined(values, weights, "all") == 0
    assert combined(values, weights, "chain") == 0.25
    soft = torch.tensor([0.5, 0.8]).double()
    assert combined(soft, weights[:2], "all") == pytest.approx(0.4)
    assert combined(soft, weights[:2], "chain") == pytest.approx((0.5 + 0.4) / 2)
    assert combined(torch.ones(3), torch.ones(3), "chain") == combined(torch.ones(3), torch.ones(3), "all") == 1


def test_as_likely_as_no_is_no_whatever_is_expected():
    found = scores_of(Asked(questions_of(True, False)), torch.tensor([0.0, 0.0]), False)
    assert found == {"score": 0.5}
    assert scores_of(Asked(questions_of(True, False)), torch.tensor([0.0, 0.0]), True) == {"score": 0.5}


def test_a_question_fails_with_what_it_depends_on():
    one, two, three = questions_of(True, True, True)
    two, three = ClipQuestion("#2", "?", ("#1",)), ClipQuestion("#3", "?", ("#2",))
    asked = Asked((one, two, three))
    assert scores_of(asked, torch.tensor([1.0, 2.0, 3.0]), False)["score"] == 1
    assert scores_of(asked, torch.tensor([-1.0, 2.0, 3.0]), False)["score"] == 0
    assert scores_of(asked, torch.tensor([1.0, -2.0, 3.0]), False)["score"] == pytest.approx(1 / 3)
    soft = scores_of(asked, torch.tensor([1.0, -2.0, 3.0]), True)["score"]
    assert soft == pytest.approx((1 / (1 + np.exp(-1)) + 1 / (1 + np.exp(2))) / 3, abs=1e-7)
    assert alive({"a": False, "b": True, "c": True}, {"a": (), "b": ("a",), "c": ("b", "c")}) == {
        "a": True, "b": False, "c": False,
    }  # fmt: skip


def test_a_condition_that_fails_leaves_no_score():
    asked = Asked.of(questions_of(True, True, True), "condition")
    assert scores_of(asked, torch.tensor([1.0, 1.0, 1.0]), False) == {"score": 1.0}
    assert scores_of(asked, torch.tensor([1.0, 1.0, -1.0]), False) == {"score": 0.0}
    with pytest.raises(ValueError, match=r"fails the condition '0\?' \(answered with no\)"):
        scores_of(asked, torch.tensor([-1.0, 1.0, 1.0]), False)
    alone = Asked.of(questions_of(True), "condition")
    assert scores_of(alone, torch.tensor([-1.0]), False) == {"score": 0.0}, "one question is no condition"


@pytest.mark.parametrize(
    ("shown", "due"),
    [("all", [0, 1, 2]), ("first_half", [0, 1]), ("second_half", [1, 2]), ("first", [0]), ("last", [2])],
)
def test_parts_of_a_clip(shown, due):
    assert part_of(torch.arange(3).reshape(3, 1, 1, 1), shown).flatten().tolist() == due
    assert len(part_of(torch.zeros(1, 3, 2, 2), shown)) == 1


# ----------------------------------------------------------------------------------------------------------- suites

SUITE = [
    {"prompt_en": "p0", "dimension": ["Motion_Rationality"], "auxiliary_info": ["A? (yes or no)", "B? (yes or no)"]},
    {"prompt_en": "p1", "dimension": ["Motion_Rationality"], "auxiliary_info": ["C? (yes or no)"]},
    {"prompt_en": "p0", "dimension": ["Mechanics"], "auxiliary_info": ["D?", "E?"]},
    {"prompt_en": "p0", "dimension": "Composition",
     "auxiliary_info": {"question": ["wings", "a lion"], "judge": [True, False]}},
    {"prompt_en": "p1", "dimension": ["Composition"],
     "auxiliary_info": {"question": ["x", "y"], "judge": [False, True]}},
    {"prompt_en": "Garden, zoom in.", "dimension": ["Camera_Motion"], "auxiliary_info": "zoom_in"},
    {"prompt_en": "Two people shake hands.", "dimension": ["Human_Interaction"]},
]  # fmt: skip


def suite(tmp_path, rows=None):
    path = tmp_path / "VBench2_full_info.json"
    path.write_text(json.dumps(SUITE if rows is None else rows))
    return path


def test_a_suites_questions_are_found_by_dimension_and_prompt(folder, tmp_path):
    items = clips(SIZES[:2], frames=2)
    params = {"model": folder, "questions": suite(tmp_path), "dimension": "Motion_Rationality", "combine": "all"}
    found = load_evaluator("vlm_questions", params, "cpu").score(batch_of(items, ["p0", "p1"]))["score"]
    asked = (["A? (yes or no)", "B? (yes or no)"], ["C? (yes or no)"])
    due = [min(float(p_yes(folder, c, q) > 0.5) for q in group) for c, group in zip(items, asked, strict=True)]
    assert found.tolist() == due
    rows = load_evaluator("vlm_row_questions", {"model": folder, "combine": "all"}, "cpu")
    batch = Batch(
        frames=items,
        prompts=["p0", "p1"],
        aux=[{"auxiliary_info": asked[0]}, {"auxiliary_info": json.dumps(asked[1])}],
    )
    assert rows.score(batch)["score"].tolist() == due


def test_items_that_cannot_be_asked_do_not_harm_the_others(folder, tmp_path):
    items = clips(SIZES, frames=2)
    params = {"model": folder, "questions": suite(tmp_path), "dimension": "Motion_Rationality", "answers": "soft"}
    evaluator = load_evaluator("vlm_questions", params, "cpu")
    with pytest.raises(ItemErrors, match="no row of Motion_Rationality with this prompt: 'other'") as caught:
        evaluator.score(batch_of(items, ["p0", "other", "p1"]))
    alone = evaluator.score(batch_of([items[2]], ["p1"]))["score"]
    assert float(caught.value.scores["score"][2]) == pytest.approx(float(alone[0]), abs=1e-5)
    assert list(caught.value.errors) == [1]
    with pytest.raises(ItemErrors, match="holds '<\\|im_end\\|>'"):
        load_evaluator("vlm_questions", {"model": folder, "ask": "{prompt}?"}, "cpu").score(
            batch_of(items, ["x", "<|im_end|>", "y"])
        )
    rows = load_evaluator("vlm_row_questions", {"model": folder}, "cpu")
    aux = [{"auxiliary_info": ["A?"]}, {"other": 1}, {"auxiliary_info": "zoom_in"}]
    with pytest.raises(ItemErrors) as caught:
        rows.score(Batch(frames=items, prompts=["x"] * 3, aux=aux))
    words = {place: str(error) for place, error in caught.value.errors.items()}
    assert "has no column auxiliary_info with its questions; it has other" in words[1]
    assert "auxiliary_info: 'zoom_in' is no list of questions" in words[2]


def test_the_rules_of_composition(folder, tmp_path):
    """A single creature first; without it 1 / n; then the share of the descriptions, or all of them."""
    items = clips(SIZES[:2], frames=2)
    template = 'Does the video show this: "{question}"?'
    params = {"model": folder, "questions": suite(tmp_path), "dimension": "Composition", "template": template}
    evaluator = load_evaluator("vlm_questions", params, "cpu")
    one, every = evaluator.known["p0"], evaluator.known["p1"]
    assert [each.text for each in one.questions] == ["Is there only one creature in the video?", "wings", "a lion"]
    assert scores_of(one, torch.tensor([-1.0, 1.0, 1.0]), False) == {"score": 0.5}
    assert scores_of(one, torch.tensor([1.0, 1.0, 1.0]), False) == {"score": 1.0}
    assert scores_of(one, torch.tensor([1.0, 1.0, -1.0]), False) == {"score": 0.5}
    assert scores_of(every, torch.tensor([1.0, 1.0]), False) == {"score": 1.0}
    assert scores_of(every, torch.tensor([1.0, -1.0]), False) == {"score": 0.0}
    assert ((found := evaluator.score(batch_of(items, ["p0", "p1"]))["score"]) >= 0).all() and (found <= 1).all()


def test_suites_that_do_not_fit(folder, tmp_path):
    def known(rows=None, dimension="Motion_Rationality"):
        params = {"model": folder, "questions": suite(tmp_path, rows), "dimension": dimension}
        cls = evaluator_class("vlm_questions")
        return cls.weight_files(parse_params(cls, "vlm_questions", params))

    known()
    with pytest.raises(ValueError, match="no row is of the dimension Motion; there are Motion_Rationality, Mechanics"):
        known(dimension="Motion")
    with pytest.raises(ValueError, match="row 5: 'zoom_in' is no list of questions"):
        known(dimension="Camera_Motion")
    with pytest.raises(ValueError, match="row 6: there is no list of questions"):
        known(dimension="Human_Interaction")
    with pytest.raises(ValueError, match="has to be a JSON array of rows"):
        known(rows={"a": 1})
    same = {"prompt_en": "p", "dimension": ["C"], "auxiliary_info": ["x?"]}
    known(rows=[same, same], dimension="C")
    with pytest.raises(ValueError, match="row 1: its prompt has other questions in another row"):
        known(rows=[same, {**same, "auxiliary_info": ["y?"]}], dimension="C")
    with pytest.raises(ValueError, match="row 0: it has no prompt_en"):
        known(rows=[{"dimension": ["C"], "auxiliary_info": ["x?"]}], dimension="C")
    bad = {"prompt_en": "p", "dimension": ["C"], "auxiliary_info": {"question": ["x"], "judge": [1, 0]}}
    with pytest.raises(ValueError, match="row 0: judge has to be two of true and false"):
        known(rows=[bad], dimension="C")


# ------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"question": " "}, r"q.jsonl:2: the question is empty"),
        ({"question": "a?", "expected": "maybe"}, "q.jsonl:2: expected has to be yes or no, not 'maybe'"),
        ({"question": "a?", "weight": 0}, "q.jsonl:2: weight has to be above 0, not 0"),
        ({"question": "a?", "weight": "much"}, "q.jsonl:2: weight has to be a number, not 'much'"),
        ({"question": "a?", "shown": "end"}, "q.jsonl:2: shown has to be one of all, first_half"),
        ({"question": "a?", "depends": [1]}, "q.jsonl:2: depends: these have to be lists of texts"),
        ({"question": "a?", "wieght": 1}, "q.jsonl:2: wieght is not known; a question has depends, dimension"),
        ({"question": "a?", "dimension": "score"}, "q.jsonl:2: dimension: score is the name of the whole"),
        ({"question": ["a?"]}, "q.jsonl:2: question has to be text"),
        ({"question": "a?", "depends": ["z"]}, "question #2 depends on z, which is not there"),
        ({"question": "a?", "id": "first"}, "the question first occurs twice"),
        ({"question": "a?", "prompt": "p", "dimension": "d"}, "no question of the dimension d, which others have"),
    ],
)  # fmt: skip
def test_bad_questions_are_told_by_line(folder, tmp_path, line, words):
    path = write(tmp_path / "q.jsonl", [{"question": "first?", "id": "first"}, line])
    cls = evaluator_class("vlm_questions")
    params = parse_params(cls, "vlm_questions", {"model": folder, "questions": path})
    with pytest.raises(ValueError, match=words):
        cls.weight_files(params)


def test_files_and_parameters_that_do_not_fit(folder, tmp_path):
    cls = evaluator_class("vlm_questions")

    def check(**params):
        cls.weight_files(parse_params(cls, "vlm_questions", {"model": folder} | params))

    path = write(tmp_path / "q.jsonl", LINES)
    check(questions=path)
    for params, words in (
        ({}, "give either `questions`"),
        ({"questions": path, "ask": "{prompt}?"}, "give either `questions`"),
        ({"ask": "red?"}, "ask needs {prompt}"),
        ({"questions": path, "dimension": "x"}, "`dimension` belongs to a suite"),
        ({"questions": tmp_path / "s.json"}, "`dimension` belongs to a suite"),
        ({"questions": path, "template": "Answer."}, "needs {question}"),
        ({"questions": path, "yes": "no"}, "yes and no are both 'no'"),
        ({"questions": path, "combine": "all"}, "weights belong to combine: mean; with all"),
        ({"questions": tmp_path / "absent.jsonl"}, "absent.jsonl cannot be read as text"),
        ({"questions": write(tmp_path / "e.jsonl", [])}, "e.jsonl: holds no questions"),
        ({"questions": write(tmp_path / "d.jsonl", [{"question": "a?", "dimension": "d"}]), "combine": "condition"},
         "combine: condition makes one score"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            check(**params)
    (tmp_path / "bad.jsonl").write_text('{"question": "a?"}\nnonsense\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:2: is not JSON"):
        check(questions=tmp_path / "bad.jsonl")
    (tmp_path / "bad.csv").write_text("text\nx\n")
    with pytest.raises(ValueError, match=r"bad.csv: has no column question"):
        check(questions=tmp_path / "bad.csv")


def test_the_runner_plans_every_source(folder, tmp_path):
    """It asks for the files with every path left out, to tell which paths count besides their contents."""
    from mmalign.score_plan import make_jobs

    files = [write(tmp_path / f"{name}.jsonl", [{"question": f"{name}?"}]) for name in "ab"]
    own = [("vlm_questions", {"model": folder, "questions": path}) for path in files]
    suites = [
        ("vlm_questions", {"model": folder, "questions": suite(tmp_path), "dimension": name})
        for name in ("Mechanics", "Composition")
    ]
    asked = ("vlm_questions", {"model": folder, "ask": "{prompt}?"})
    jobs = [make_jobs([one])[0] for one in (*own, *suites, asked, ("vlm_row_questions", {"model": folder}))]
    identities = {(job.params_text, job.weight_hash, job.name) for job in jobs}
    assert len(identities) == len(jobs)


def test_csv_says_what_jsonl_says(folder, tmp_path):
    lines = [
        {"id": "a", "question": "A, b?", "weight": 2},
        {"question": "C?", "depends": ["a"], "expected": "no", "shown": "last"},
        {"question": "of p?", "prompt": "p", "id": "p"},
    ]
    table = 'id,prompt,question,depends,expected,weight,shown\na,,"A, b?",,,2,\n,,C?,a,no,,last\np,p,of p?,,,,\n'
    (tmp_path / "q.csv").write_text(table)
    paths = [tmp_path / "q.csv", write(tmp_path / "q.jsonl", lines)]
    found = [load_evaluator("vlm_questions", {"model": folder, "questions": path}, "cpu").known for path in paths]
    assert found[0].common == found[1].common and found[0].by_prompt == found[1].by_prompt
    assert [one.name for one in found[0].of("p")] == ["a", "#2", "p"] and len(found[0].of("other")) == 2


def test_shown_by_place_is_for_questions_that_do_not_say(folder, tmp_path):
    rows = [{"prompt_en": "p", "dimension": ["Dynamic_Spatial_Relationship"], "auxiliary_info": ["A?", "B?"]}]
    params = {
        "model": folder, "questions": suite(tmp_path, rows), "dimension": "Dynamic_Spatial_Relationship",
        "combine": "all", "answers": "soft", "shown": ["first_half", "last"],
    }  # fmt: skip
    clip = clips(SIZES[:1], frames=4)
    found = load_evaluator("vlm_questions", params, "cpu").score(batch_of(clip, ["p"]))["score"]
    due = p_yes(folder, clip[0][:2], "A?") * p_yes(folder, clip[0][3:], "B?")
    assert float(found[0]) == pytest.approx(due, abs=1e-5)


def test_the_contract_is_kept(folder, questions):
    prompts, sizes = ("a red circle", "ein Würfel, 立方体", "x"), ((64, 64), (33, 70), (2, 2))
    params = {"model": folder, "answers": "soft", "questions": questions}
    check_evaluator("vlm_questions", params, prompts=prompts, sizes=sizes, processes=1)
    check_evaluator(
        "vlm_row_questions", {"model": folder, "answers": "soft"}, prompts=prompts, sizes=sizes, processes=1,
        aux={"auxiliary_info": ["Is it red?", "Does it move?"]},
    )  # fmt: skip
