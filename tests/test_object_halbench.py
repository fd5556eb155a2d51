"""Object HalBench: files, rules and figures by hand; a judge that was taught, one that was not; batches."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hallucination_kit import config, json_lines, summary
from public_kit import DATA, needs
from pydantic import ValidationError
from transformers import Qwen2Config, Qwen2ForCausalLM
from vlm_kit import byte_tokenizer, clips, vlm_folder

from mmalign.backbones.text_model import load_text_model, text_model_spec
from mmalign.backbones.vlm import load_vlm
from mmalign.backbones.vlm_generate import Asked, Decoding
from mmalign.discovery import evaluator_class, load_evaluator, parse_params
from mmalign.evaluation import Batch, ItemErrors
from mmalign.hallucination import object_halbench as rules
from mmalign.hallucination import words
from mmalign.jobs import EvaluatorSpec, ScoreConfig
from mmalign.media import read_image, write_image
from mmalign.score import run
from mmalign.testing import check_evaluator

SYNONYMS = DATA / "chair" / "synonyms.txt"
LINES = (
    "person, man, woman\ndog, puppy\ncar, taxi\ndining table, table, desk, coffee table\ncup\nlaptop, computer\n"
    "keyboard\nremote, remote control\nhot dog\nbus\norange\n"
)
CPU = torch.device("cpu")
RESPONSES = {
    1: "A man and a woman walk a dog past a car.",  # the car is not there: person, person, dog, car
    2: "There is a cup on the table, and a dog under the table.",  # cup dining table dog dining table: the dog is not
    3: "Nothing but fog over the hills.",
    4: "a dog",  # there is a bus
}
TEMPLATE = "{% for m in messages %}{{ 'Q: ' + m.content + '\nA:' }}{% endfor %}"


@pytest.fixture(name="coco", scope="module")
def _coco(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Parameters: picture 1 has a dog and by its caption a man, 2 a cup and a table, 3 nothing, 4 a bus."""
    home = tmp_path_factory.mktemp("coco")
    (home / "synonyms.txt").write_text(LINES)
    names = {18: "dog", 47: "cup", 67: "dining table", 6: "bus"}
    told = {
        "categories": [{"id": number, "name": name} for number, name in names.items()],
        "annotations": [
            {"image_id": image, "category_id": number} for image, number in ((1, 18), (2, 47), (2, 67), (4, 6))
        ],
    }
    captions = [{"image_id": 1, "caption": "A man with his dog."}, {"image_id": 3, "caption": "Fog."}]
    (home / "instances.json").write_text(json.dumps(told))
    (home / "captions.json").write_text(json.dumps({"annotations": captions}))
    return {"synonyms": home / "synonyms.txt", "objects": [home / "instances.json", home / "captions.json"]}


def scored(params: dict[str, Any], responses: dict[int, str] | None = None) -> dict[str, list[float]]:
    told = responses or RESPONSES
    batch = Batch(prompts=[""] * len(told), responses=list(told.values()), samples=[str(image) for image in told])
    return {
        name: values.tolist() for name, values in load_evaluator("object_halbench", params, "cpu").score(batch).items()
    }


def figures_of(scores: dict[str, list[float]]) -> dict[str, float | None]:
    rows = [{"scores": dict(zip(scores, each, strict=True))} for each in zip(*scores.values(), strict=True)]
    return rules.figures(rows)


# ------------------------------------------------------------------------------------------------ rules


def test_counts_and_figures_by_hand(coco: dict[str, Any]) -> None:
    scores = scored(coco)
    assert scores["mentions"] == [4, 4, 0, 1]
    assert scores["hallucinated"] == [1, 1, 0, 1]
    assert scores["right"] == [3 / 4, 3 / 4, 1, 0]
    assert figures_of(scores) == {
        "chair_s_refine": 3 / 3, "chair_s": 3 / 4, "chair_i": 3 / 9, "recall": 4 / 5,
        "words": (11 + 13 + 6 + 2) / 4, "without_object": 1 / 4, "unparsed": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("names", "due"),
    [
        (["man", "woman", "men", "Man"], ["person", "person"]),  # two words, each once
        (["dogs", "taxi", "car"], ["dog", "car", "car"]),
        (["coffee table", "remote control", "hot dogs"], ["dining table", "remote", "hot dog"]),
        (["table lamp", "bus stop", "dog bowl", "orange shirt"], []),  # what the last word names
        (["computer keyboard", "kitchen table"], ["keyboard", "dining table"]),
        (["cup of coffee", "man in a car", "a group of men"], ["cup", "person", "car"]),
        (["the man's dog"], ["dog"]),
        (["", "...", "sky"], []),
    ],
)
def test_what_names_stand_for(names: list[str], due: list[str], coco: dict[str, Any]) -> None:
    assert words.named(names, words.read_synonyms(coco["synonyms"])) == due


@pytest.mark.parametrize(
    ("text", "due"),
    [
        ('["dog", "cup"]', ["dog", "cup"]),
        ("[]", []),
        ('Here they are:\n```json\n["dog"]\n```\nThat is all [1].', ["dog"]),
        ("['dog', \"man's hat\",]", ["dog", "man's hat"]),
        ('{"objects": ["dog", " "]}', ["dog"]),
        ('<think>perhaps ["cat"]</think>\n["dog"]', ["dog"]),
        ('["dog"]\nAgain: ["dog"]', ["dog"]),
        ('<think>perhaps ["cat"], or', None),
        ('["dog"] or ["cat"]', None),
        ('["dog", "cu', None),
        ('["dog"]\n["dog", "cu', None),
        ('[{"name": "dog"}]', None),
        ('[["dog"], ["cup"]]', None),
        ('["dog", 3]', None),
        ("- dog\n- cup", None),
        ("", None),
        ("[" * 5000, None),
        ("[ " * 5000 + '"', None),
        (r"['\x']", None),
    ],
)
def test_the_judges_list(text: str, due: list[str] | None) -> None:
    assert rules.listed(text) == due


def test_what_could_not_be_read_is_counted_and_in_no_figure(coco: dict[str, Any]) -> None:
    read = rules.counted("A dog and a car, I think.", ["dog", "car"], {"dog", "cup"})
    lost = rules.counted("A dog and a bus, I think.", None, {"dog"})
    assert (read["right"], lost["right"], lost["unparsed"]) == (0.5, 0, 1)
    both, alone = (rules.figures([{"scores": each} for each in rows]) for rows in ([read, lost], [lost]))
    assert both == {
        "chair_s_refine": 1, "chair_s": 1, "chair_i": 0.5, "recall": 0.5, "words": 7, "without_object": 0,
        "unparsed": 0.5,
    }  # fmt: skip
    assert {name for name, value in alone.items() if value is not None} == {"unparsed"}


@needs(SYNONYMS)
def test_the_published_synonyms(coco: dict[str, Any]) -> None:
    found = scored({**coco, "synonyms": SYNONYMS}, {1: "A chef with a puppy beside two street lights.", 2: "Mugs."})
    assert (found["mentions"], found["hallucinated"]) == ([3, 0], [1, 0])
    synonyms = words.read_synonyms(SYNONYMS)
    assert words.named(["wine glasses", "stove top oven", "stop signs", "fire hydrant"], synonyms) == [
        "wine glass", "oven", "stop sign", "fire hydrant"
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ a judge


LESSONS = {
    RESPONSES[1]: '["man", "woman", "dog", "car"]',
    RESPONSES[2]: '["cup", "table", "dog"]',
    RESPONSES[3]: "[]",
}


@pytest.fixture(name="judge", scope="module")
def _judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model that lists the objects of three responses."""
    path = tmp_path_factory.mktemp("judge")
    known = sorted(set(re.findall("[a-zA-Z]+", " ".join([rules.PROMPT, *LESSONS]))))
    tokenizer = byte_tokenizer(("<|endoftext|>", "<|im_end|>"), "<|im_end|>", known, pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
            eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    batch = []
    for response, answer in LESSONS.items():
        text = f"Q: {rules.PROMPT.replace('{answer}', response)}\nA:"
        ids = torch.tensor([[*tokenizer(text + answer)["input_ids"], tokenizer.eos_token_id]])
        labels = ids.clone()
        labels[:, : len(tokenizer(text)["input_ids"])] = -100
        batch.append((ids, labels))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(300):
        loss = sum(model(input_ids=ids, labels=labels).loss for ids, labels in batch)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if float(loss.detach()) < 0.01:
            break
    assert float(loss.detach()) < 0.05, "the model did not learn"
    model.eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_taught_judge_lists_and_coco_is_counted(coco: dict[str, Any], judge: Path) -> None:
    scores = scored({**coco, "extract": "llm", "model": judge, "max_new_tokens": 64})
    assert scores["unparsed"] == [0, 0, 0, 0]
    assert scores["mentions"] == [4, 3, 0, 0], "each word once, and of three words or fewer none"
    assert scores["hallucinated"] == [1, 1, 0, 0]
    assert figures_of(scores)["chair_s_refine"] == 1
    assert figures_of(scores)["chair_i"] == pytest.approx(2 / 7)


def test_notes_name_what_is_not_there_and_what_the_judge_wrote(coco: dict[str, Any], judge: Path) -> None:
    evaluator = load_evaluator(
        "object_halbench", {**coco, "extract": "llm", "model": judge, "max_new_tokens": 64}, "cpu"
    )
    batch = Batch(prompts=[""] * 4, responses=list(RESPONSES.values()), samples=[str(image) for image in RESPONSES])
    evaluator.score(batch)
    lists = list(LESSONS.values())
    assert batch.notes == {
        0: f"not in the picture: car\n\n{lists[0]}", 1: f"not in the picture: dog\n\n{lists[1]}", 2: lists[2]
    }  # fmt: skip


def test_neither_batch_nor_order_matters(coco: dict[str, Any], judge: Path) -> None:
    params = {**coco, "extract": "llm", "model": judge, "max_new_tokens": 64}
    whole = scored(params)
    alone = [scored(params, {image: response}) for image, response in RESPONSES.items()]
    assert whole == {name: [each[name][0] for each in alone] for name in whole}
    backwards = scored(params, dict(reversed(RESPONSES.items())))
    assert whole == {name: values[::-1] for name, values in backwards.items()}


def test_the_contract_is_kept(coco: dict[str, Any], judge: Path) -> None:
    aux = [{"image_id": image} for image in RESPONSES]
    told: Any = {"aux": aux, "responses": list(RESPONSES.values()), "prompts": [""] * 4, "sizes": [(8, 8)] * 4}
    check_evaluator("object_halbench", coco, **told)
    llm = {**coco, "extract": "llm", "model": judge, "max_new_tokens": 64}
    check_evaluator("object_halbench", llm, processes=1, **told)


def test_a_list_that_is_cut_is_not_read(coco: dict[str, Any], judge: Path) -> None:
    scores = scored({**coco, "extract": "llm", "model": judge, "max_new_tokens": 9})
    assert scores["unparsed"] == [1, 1, 0, 0]


def test_an_image_text_model_judges_too(coco: dict[str, Any], tmp_path: Path) -> None:
    folder = vlm_folder(tmp_path / "qwen", "qwen2_vl")
    spec = text_model_spec(folder)
    assert spec.loader is load_vlm
    scores = scored({**coco, "extract": "llm", "model": folder, "max_new_tokens": 4})
    assert scores["unparsed"] == [1, 1, 1, 0], "it was taught nothing"
    assert figures_of(scores)["unparsed"] == 3 / 4
    vlm = load_vlm(folder=str(folder), device=CPU, dtype=torch.float32)
    text = vlm.words.chat(rules.PROMPT.replace("{answer}", RESPONSES[1]), 0)
    assert "<|image_pad|>" not in text
    assert vlm.writer.write([Asked(text)], Decoding(4))[0].text  # type: ignore[union-attr]


def test_what_the_judge_cannot_be_asked_costs_the_others_nothing(coco: dict[str, Any], judge: Path) -> None:
    params = {**coco, "extract": "llm", "model": judge, "max_new_tokens": 64}
    evaluator: Any = load_evaluator("object_halbench", params, "cpu")
    responses = [RESPONSES[1], "It ends with <|im_end|> and so on.", "x " * 2000, RESPONSES[3], RESPONSES[1]]
    with pytest.raises(ItemErrors) as raised:
        evaluator.score(Batch(prompts=[""] * 5, responses=responses, samples=["1", "1", "1", "3", "99"]))
    errors = {place: str(error) for place, error in raised.value.errors.items()}
    assert "holds '<|im_end|>'" in errors[1]
    assert "and this qwen2 model reads 2048" in errors[2]
    assert "nothing of image 99" in errors[4]
    assert raised.value.scores["mentions"][[0, 3]].tolist() == [4, 0]  # type: ignore[call-overload,index]


def test_a_text_model_without_a_template_needs_a_conversation(judge: Path, tmp_path: Path) -> None:
    for file in judge.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    arguments = {"folder": str(tmp_path), "device": CPU, "dtype": torch.float32}
    with pytest.raises(ValueError, match=r"has no chat template; set `conversation`, with \{question\} in it"):
        load_text_model(**arguments)
    model = load_text_model(**arguments, conversation="Q: {question}\nA:")
    text = model.words.chat(rules.PROMPT.replace("{answer}", RESPONSES[3]), 0)
    assert model.writer.write([Asked(text)], Decoding(8))[0].text == "[]"  # type: ignore[union-attr]


def test_parameters_that_do_not_fit(coco: dict[str, Any], judge: Path) -> None:
    cls = evaluator_class("object_halbench")
    for wrong, said in (
        ({"extract": "llm"}, "belongs to `extract: llm`"),
        ({"model": judge}, "belongs to `extract: llm`"),
        ({"conversation": "{question}"}, "`conversation` is the judge's"),
        ({"extract": "llm", "model": judge, "conversation": "Q:"}, r"needs \{question\}"),
    ):
        with pytest.raises(ValueError, match=said):
            parse_params(cls, "object_halbench", {**coco, **wrong})
    params = parse_params(cls, "object_halbench", {**coco, "extract": "llm", "model": judge})
    assert {"config.json", "model.safetensors", "synonyms.txt"} <= {file.name for file in cls.weight_files(params)}
    gone = parse_params(cls, "object_halbench", {**coco, "synonyms": judge / "absent.txt"})
    with pytest.raises(ValueError, match=r"is not there; docs/scorers/object_halbench.md says"):
        cls.weight_files(gone)


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture(name="asked")
def _asked(tmp_path: Path) -> Path:
    """Three questions with their pictures in base64, as they are published."""
    lines = []
    for image, clip in zip((1, 2, 3), clips([(28, 28), (40, 70), (56, 28)]), strict=True):
        write_image(tmp_path / "one.png", np.ascontiguousarray(clip[0].permute(1, 2, 0).numpy()))
        data = base64.b64encode((tmp_path / "one.png").read_bytes()).decode()
        lines.append({"org_idx": image + 7, "image_id": image, "question": "Describe it.", "image": data})
    return json_lines(tmp_path / "obj_halbench.jsonl", lines)


def test_pictures_in_the_file_are_put_into_the_folder(asked: Path, tmp_path: Path) -> None:
    rows = rules.questions(asked, tmp_path / "images")
    assert [(row.sample, row.prompt, row.aux) for row in rows[:1]] == [("1", "Describe it.", {"image_id": 1})]
    due = clips([(28, 28), (40, 70), (56, 28)])[1][0].permute(1, 2, 0).numpy()
    assert Path(str(rows[1].media)).name == "object_halbench_000000000002.png"
    assert (read_image(rows[1].media) == due).all()
    before = Path(str(rows[1].media)).stat().st_mtime_ns
    assert rules.questions(asked, tmp_path / "images") == rows
    assert Path(str(rows[1].media)).stat().st_mtime_ns == before
    assert rules.questions(asked, None)[0].media == "COCO_val2014_000000000001.jpg"


def test_pictures_may_be_files(tmp_path: Path) -> None:
    lines = [{"image_id": "5", "question": "?", "image": "a.jpg"}, {"image_id": 6, "question": "?"}]
    rows = rules.questions(json_lines(tmp_path / "q.jsonl", lines), tmp_path)
    assert [Path(str(row.media)).name for row in rows] == ["a.jpg", "COCO_val2014_000000000006.jpg"]
    for wrong, said in (
        ({"question": "?"}, "q.jsonl:1: has no image_id; it has question"),
        ({"image_id": 1}, "q.jsonl:1: has no question; it has image_id"),
        ({"image_id": "x", "question": "?"}, "q.jsonl:1: image_id is 'x'"),
        ({"image_id": 1, "question": "?", "image": "bm9uZQ=="}, "neither the name of a file nor a JPEG or PNG"),
        ({"image_id": 1, "question": "?", "image": "!"}, "neither the name of a file nor a JPEG or PNG"),
    ):
        with pytest.raises(ValueError, match=said):
            rules.questions(json_lines(tmp_path / "q.jsonl", [wrong]), tmp_path)


def test_answers_of_every_known_layout(asked: Path, tmp_path: Path) -> None:
    rows = rules.questions(asked, None)
    due = {"1": "A dog.", "2": "A cup.", "3": ""}
    told = list(due.values())
    for lines in (
        [{"image_id": image, "question": "Describe it.", "answer": text} for image, text in due.items()],
        [{"question_id": f"{image}.jpg", "prompt": "?", "text": f" Assistant: {text}"} for image, text in due.items()],
        [{"question": "<image>\nDescribe it.", "answer": text} for text in told],
        [{"question_id": number, "response": text} for number, text in enumerate(told, 100)],
    ):
        assert rules.answers(json_lines(tmp_path / "a.jsonl", lines), rows) == due
    for lines, said in (
        ([{"answer": "x"}], "1 answers without image_id, and there are 3 questions"),
        ([{"question": "Why?", "answer": "x"}] * 3, "a.jsonl:1: answers 'Why\\?' where 'Describe it.' is asked"),
        ([{"image_id": 1, "answer": "x"}] * 2, "a.jsonl:2: image 1 is answered twice"),
        ([{"image_id": 1, "said": "x"}], "a.jsonl:1: has no answer; it has image_id, said"),
        ([{"image_id": 1, "answer": "x"}, {"answer": "x"}], "a.jsonl:2: has no image_id"),
    ):
        with pytest.raises(ValueError, match=said):
            rules.answers(json_lines(tmp_path / "a.jsonl", lines), rows)


def test_from_files_to_figures(asked: Path, coco: dict[str, Any], tmp_path: Path) -> None:
    saved = [{"image_id": image, "answer": text} for image, text in RESPONSES.items() if image < 4]
    spec = EvaluatorSpec(name="object_halbench", params=coco)
    block = {"kind": "object_halbench", "questions": asked, "responses": json_lines(tmp_path / "a.jsonl", saved)}
    run(ScoreConfig(benchmark=block, output=tmp_path / "out", evaluators=(spec,), device="cpu"))
    (entry,) = summary(tmp_path / "out").values()
    assert entry["n_ok"] == 3
    assert entry["figures"]["chair_s_refine"] == {"value": 1.0, "ci95": [1.0, 1.0]}
    assert entry["figures"]["recall"]["value"] == 1
    with pytest.raises(ValidationError, match="AMBER's annotations"):
        config(tmp_path / "x", "object_halbench", **block, annotations=asked)


def test_a_model_answers_and_another_judges(asked: Path, coco: dict[str, Any], judge: Path, tmp_path: Path) -> None:
    folder = vlm_folder(tmp_path / "qwen", "qwen2_vl")
    spec = EvaluatorSpec(name="object_halbench", params={**coco, "extract": "llm", "model": judge})
    block = {
        "kind": "object_halbench", "questions": asked, "images": tmp_path / "images",
        "model": {"path": folder, "max_new_tokens": 6, "device": "cpu"},
    }  # fmt: skip
    run(ScoreConfig(benchmark=block, output=tmp_path / "out", evaluators=(spec,), device="cpu"))
    ((name, entry),) = summary(tmp_path / "out").items()
    assert name == "object_halbench[objects=2 files, extract=llm]"
    assert entry["n_ok"] == 3
    assert entry["params"]["model"] == str(judge)
    assert len(entry["weight_hash"]) == 64
