"""Yes/no questions about scenes, and the small LLaVA that is asked them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from mmalign.paths import find
from mmalign.shapes import vlm
from mmalign.shapes.answers import PROMPTS, preference_row, training_row
from mmalign.shapes.captions import COLOURS, KINDS
from mmalign.shapes.claims import read_description, relation_holds
from mmalign.shapes.descriptions import describe
from mmalign.shapes.questions import FAMILIES, SPLITS, questions, questions_of
from mmalign.shapes.scene import Scene, Shape
from mmalign.shapes.typical import FAVOURITES, habits, typical_scene

RED = Shape("circle", "red", 16, 16, 13)
BLUE = Shape("cross", "blue", 48, 18, 9)
TWO = Scene((RED, BLUE), "grey")


def scenes(count: int, seed: int) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [typical_scene(rng) for _ in range(count)]


def holds(text: str, scene: Scene) -> bool:
    """The truth of a question, from its words alone."""
    words = text.rstrip("?").replace("Is there ", "").replace("Is ", "").split()
    objects = {(shape.colour, shape.kind): shape for shape in scene.shapes}
    if "picture" in words:
        return (words[1], words[2]) in objects
    if len(words) == 3:
        return (words[2], words[1]) in objects
    relation = " ".join(words[3:-3])
    return relation_holds(relation, objects[words[1], words[2]], objects[words[-2], words[-1]])


# --- questions ---


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_true_and_as_often_yes_as_no(family):
    asked: Counter[bool] = Counter()
    for i, scene in enumerate(scenes(700, seed=1)):
        found = questions(scene, family, i)
        for question in found:
            assert holds(question.text, scene) == question.yes, question
            assert question.family == family and question.answer == ("Yes." if question.yes else "No.")
        assert len({question.text for question in found}) == len(found)
        asked.update(question.yes for question in found)
    assert asked[True] == asked[False] > 300


def absent(split: str) -> Counter[tuple[str, str]]:
    """What is asked of that is not there, as (kind, colour)."""
    found: Counter[tuple[str, str]] = Counter()
    for i, scene in enumerate(scenes(700, seed=2)):
        words = [question.text.split() for question in questions(scene, split, i) if not question.yes]
        found.update((each[4], each[3]) for each in words)
    return found


def test_popular_objects_are_frequent_and_random_ones_any():
    single, _ = habits()
    popular, anything = absent("popular"), absent("random")
    assert len(anything) == len(KINDS) * len(COLOURS)
    assert set(popular) <= {name for name, _ in single.most_common(6)}
    mean = [np.average([single[name] for name in found], weights=list(found.values())) for found in (popular, anything)]
    assert mean[0] > 2 * mean[1]


def test_adversarial_objects_stand_beside_what_is_there():
    (yes, no) = questions(Scene((Shape("triangle", "green", 30, 30, 9),), "white"), "adversarial", 0)
    assert yes.text == "Is there a green triangle in the picture?"
    assert no.text == "Is there a purple cross in the picture?"  # companion and favourite, though crosses are rare
    assert absent("adversarial") != absent("popular")


def test_existence_is_asked_as_often_of_what_is_not_there():
    for split in SPLITS:
        assert [question.yes for question in questions(TWO, split, 0)] == [True, False, True, False]


def test_colours_are_asked_of_single_kinds_and_tempt_with_the_favourite():
    assert [question.text for question in questions(TWO, "colour", 0)][2:] == [
        "Is the cross blue?",
        f"Is the cross {FAVOURITES['cross']}?",
    ]
    twins = Scene((RED, Shape("circle", "blue", 48, 48, 9)), "white")
    assert questions(twins, "colour", 0) == []


def test_one_shape_has_no_relation_and_unknown_families_are_named():
    assert questions(Scene((RED,), "white"), "relation", 0) == []
    with pytest.raises(ValueError, match="no family of questions is called 'size'; there are: random, popular"):
        questions(TWO, "size", 0)


# --- the model's files ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vlm")
    vlm.write_vlm(path)
    vlm.untrained(seed=3).half().save_pretrained(path)
    return path


def test_the_folder_loads_as_the_library_loads_any(folder):
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(processor, LlavaProcessor) and isinstance(model, LlavaForConditionalGeneration)
    assert (folder / "model.safetensors").stat().st_size <= 8e6
    row = training_row(0, 5)
    text = processor.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    inputs = processor(images=[row["images"][0]], text=[text], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 64, 64) and inputs["pixel_values"].abs().max() <= 1
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == model.config.image_seq_length
    answer = model.generate(**inputs, max_new_tokens=3)
    assert answer.shape[1] > inputs["input_ids"].shape[1]


def test_the_image_changes_what_the_model_says(folder):
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    rows = [training_row(0, i) for i in range(2)]
    text = processor.apply_chat_template(rows[0]["prompt"], add_generation_prompt=True, tokenize=False)
    inputs = [processor(images=row["images"], text=[text], return_tensors="pt") for row in rows]
    with torch.no_grad():
        first, second = (model(**each).logits[0, -1] for each in inputs)
    assert not torch.allclose(first, second)


def test_every_word_of_the_grammar_is_a_token_and_texts_come_back(folder):
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    texts = list(PROMPTS)
    for i, scene in enumerate(scenes(400, seed=4)):
        texts.append(describe(scene, i).text)
        texts += [question.text for family in FAMILIES for question in questions(scene, family, i)]
        texts.append(preference_row(5, i)["rejected"][0]["content"][0]["text"])
    texts += ["Yes.", "No."]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) <= 150
    assert tokenizer("a zebra").input_ids[1] == tokenizer.unk_token_id


def test_the_template_marks_the_answer_and_its_end(folder):
    processor = AutoProcessor.from_pretrained(folder)
    row = training_row(0, 1)
    found = processor.tokenizer.apply_chat_template(
        row["prompt"] + row["chosen"], return_dict=True, return_assistant_tokens_mask=True
    )
    ids = [token for token, marked in zip(found["input_ids"], found["assistant_masks"], strict=True) if marked]
    text = row["chosen"][0]["content"][0]["text"]
    assert ids == [*processor.tokenizer(text).input_ids, processor.tokenizer.eos_token_id]
    asked = processor.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    assert processor.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False) == asked + text + "</s>"


def test_the_shipped_configs_are_what_the_module_writes(tmp_path):
    vlm.write_vlm(tmp_path)
    shipped = find("configs/shapes/vlm")
    for file in sorted(tmp_path.iterdir()):
        assert (Path(shipped) / file.name).read_text() == file.read_text(), file.name


def test_questions_of_a_description() -> None:
    told = "There is a small red circle. A blue square is to its left. The circle is left of the blue square. A cross."
    assert questions_of(read_description(told)) == [
        "Is there a red circle in the picture?",
        "Is there a blue square in the picture?",
        "Is the blue square left of the red circle?",
        "Is the red circle left of the blue square?",
    ]
    assert questions_of(read_description("Nothing is there.")) == []
