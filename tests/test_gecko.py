"""Gecko: answers normalised over the choices, coverage, question files, local models that write and judge questions."""

import csv
import json

import numpy as np
import pytest
import torch
from public_kit import GECKO, needs
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaModel,
)
from vlm_kit import ask, batch_of, byte_tokenizer, clips, oracle, prepared, randomise, vlm_folder

from mmalign.backbones.prompt_questions import (
    Question,
    content_words,
    read_prompts,
    read_questions,
    uncovered,
    write_questions,
)
from mmalign.backbones.question_writer import (
    INSTRUCTION,
    Writer,
    _limit,
    load_entailment,
    load_writer,
    main,
    parse_questions,
)
from mmalign.discovery import load_evaluator
from mmalign.testing import check_evaluator

CPU = torch.device("cpu")
SIZES = [(40, 50), (64, 64), (150, 224)]
RED = "a red circle"
QUESTIONS = {
    RED: (
        Question("What colour is the circle?", ("red", "blue", "light blue"), "red", ("red",)),
        Question("Is there a circle?", ("yes", "no"), "yes", ("circle",)),
    ),
    "two cats": (Question("How many cats are there?", ("one", "two", "two or more"), "two"),),
}
PROMPTS = [RED, "two cats", RED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return vlm_folder(tmp_path_factory.mktemp("vlm"), "qwen2_vl")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "q.jsonl"
    write_questions(path, QUESTIONS)
    return path


def exact(folder, clip, prompt, per_token):
    """Mean over questions, each likelihood from a stock float64 pass over question and answer."""
    end = _end(folder)
    scores = []
    for one in QUESTIONS[prompt]:
        text = ask(folder, f"{one.question} Answer with one of: {', '.join(one.choices)}.", len(clip))
        start = prepared(folder, clip, text)["input_ids"].shape[1]
        tokens = [prepared(folder, clip, text + choice)["input_ids"][0, start:].tolist() for choice in one.choices]
        alike = any(a != b and b[: len(a)] == a for a in tokens for b in tokens)
        likelihoods = []
        for choice, ids in zip(one.choices, tokens, strict=True):
            logits = oracle(folder, clip, text + choice)[1].log_softmax(-1)
            ids = [*ids, end] if alike else ids
            values = logits[range(start - 1, start - 1 + len(ids)), ids]
            likelihoods.append(float(values.mean() if per_token else values.sum()))
        weights = np.exp(likelihoods) / np.exp(likelihoods).sum()
        scores.append(weights[one.choices.index(one.answer)])
    return float(np.mean(scores))


def _end(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("frames", [1, 2])
def test_the_score_equals_separate_float64_passes(folder, questions, frames, per_token):
    items = clips(SIZES, frames=frames)
    params = {"model": folder, "questions": questions, "per_token": per_token}
    found = load_evaluator("gecko", params, "cpu").score(batch_of(items, PROMPTS))
    due = [exact(folder, clip, prompt, per_token) for clip, prompt in zip(items, PROMPTS, strict=True)]
    np.testing.assert_allclose(found["score"].numpy(), due, rtol=2e-4, atol=1e-6)
    assert np.ptp(due) > 0.001
    assert found["coverage"].tolist() == [1.0, 1.0, 1.0]


def test_a_prompt_without_questions_is_an_error_row_of_its_own(folder, questions):
    evaluator = load_evaluator("gecko", {"model": folder, "questions": questions}, "cpu")
    with pytest.raises(ValueError, match=r"There are no questions about 'a green square' in .*q\.jsonl"):
        evaluator.score(batch_of(clips(SIZES), [RED, "a green square", RED]))


def test_coverage_is_reported_required_or_ignored(folder, tmp_path):
    prompt = "a red circle on the left of two CATS"
    write_questions(tmp_path / "q.jsonl", {prompt: QUESTIONS[RED]})
    batch = batch_of(clips(SIZES[:1]), [prompt])
    params = {"model": folder, "questions": tmp_path / "q.jsonl"}
    assert content_words(prompt) == ["red", "circle", "on", "left", "two", "cats"]
    assert float(load_evaluator("gecko", params, "cpu").score(batch)["coverage"]) == pytest.approx(2 / 6)
    assert list(load_evaluator("gecko", params | {"coverage": "ignore"}, "cpu").score(batch)) == ["score"]
    with pytest.raises(ValueError, match="No question covers on, left, two, cats of the prompt"):
        load_evaluator("gecko", params | {"coverage": "require"}, "cpu").score(batch)


def test_gecko_keeps_the_contract(folder, tmp_path):
    prompts, sizes = ("a red circle", "ein Würfel, 立方体", "x"), ((64, 64), (33, 70), (2, 2))
    write_questions(
        tmp_path / "q.jsonl", {prompt: (Question(f"Is it {prompt}?", ("yes", "no"), "yes"),) for prompt in prompts}
    )
    params = {"model": folder, "questions": tmp_path / "q.jsonl"}
    check_evaluator("gecko", params, prompts=prompts, sizes=sizes, processes=1)


# ------------------------------------------------------------------------------------------------ question files


def test_question_files_of_both_kinds_say_the_same(tmp_path):
    write_questions(tmp_path / "q.jsonl", QUESTIONS)
    with open(tmp_path / "q.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "question", "choices", "answer", "covers"])
        for prompt, group in QUESTIONS.items():
            for one in group:
                writer.writerow([prompt, one.question, "|".join(one.choices), one.answer, "|".join(one.covers)])
    assert read_questions(tmp_path / "q.jsonl") == read_questions(tmp_path / "q.csv") == QUESTIONS
    (tmp_path / "short.jsonl").write_text('{"prompt": "p", "question": "Is it?", "answer": "no"}\n')
    assert read_questions(tmp_path / "short.jsonl") == {"p": (Question("Is it?", ("yes", "no"), "no"),)}


@pytest.mark.parametrize("sign", ["\u2028", "\x85", "\x0b"])
def test_a_text_may_hold_any_separator(tmp_path, sign):
    prompt, question = f"a{sign}b", f"is{sign}it?"
    due = {prompt: (Question(question, ("yes", "no"), "no"),)}
    line = {"prompt": prompt, "question": question, "answer": "no"}
    text = json.dumps(line, ensure_ascii=sign < " ")
    (tmp_path / "q.jsonl").write_bytes((text + "\r\n").encode())
    with open(tmp_path / "q.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([line.keys(), line.values()])
    assert read_questions(tmp_path / "q.jsonl") == read_questions(tmp_path / "q.csv") == due
    (tmp_path / "p.txt").write_text(f"{prompt}\nc\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == [prompt, "c"]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"prompt": "p", "question": "Is it?", "answer": "maybe"}', r"q\.jsonl:1: the answer 'maybe' is not one of"),
        ('{"prompt": " ", "question": "Is it?", "answer": "no"}', "there is no prompt"),
        ('{"prompt": "p", "question": "", "answer": "no"}', "the question is empty"),
        ('{"prompt": "p", "question": "Q", "answer": "a", "choices": ["a"]}', "two or more, each once"),
        ('{"prompt": "p", "question": "Q", "answer": "a", "choices": ["a", "a"]}', "two or more, each once"),
        ('{"prompt": "p", "question": "Q", "answer": "a", "choices": ["a", ""]}', "a choice is empty"),
        ('{"prompt": "p", "question": "Q", "answer": "a", "choices": [1, 2]}', "have to be lists of texts"),
        ('{"prompt": "p", "answer": "a"}', "question and answer have to be text"),
        ("[]", "holds list, not a question"),
        ("{", "is not JSON"),
        ("", "holds no questions"),
    ],
)
def test_broken_question_files_are_explained(tmp_path, line, match):
    (tmp_path / "q.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=match):
        read_questions(tmp_path / "q.jsonl")


def test_missing_files_and_columns_are_explained(tmp_path, folder):
    from mmalign.score_plan import make_jobs

    with pytest.raises(ValueError, match=r"questions: .*absent.* cannot be read"):
        make_jobs([("gecko", {"model": folder, "questions": tmp_path / "absent.jsonl"})])
    (tmp_path / "q.csv").write_text("prompt,question\na,b\n")
    with pytest.raises(ValueError, match="has no column answer"):
        read_questions(tmp_path / "q.csv")
    for params in ({"questions": "generate"}, {"questions": tmp_path / "q.csv", "writer": folder}):
        with pytest.raises(ValueError, match="belongs to `questions: generate`"):
            load_evaluator("gecko", {"model": folder} | params, "cpu")


def test_words_are_found_in_any_script_and_case():
    assert content_words("The Girl's 5-storey HOUSE, is it under a Straße?") == [
        "girl", "5", "storey", "house", "under", "strasse",
    ]  # fmt: skip
    assert content_words("ein Würfel und 立方体") == ["ein", "würfel", "und", "立方体"]
    assert content_words("of the") == []
    assert uncovered("two red birds", [Question("Are there birds?", ("yes", "no"), "yes")]) == ["two", "red"]


@needs(GECKO)
def test_the_public_prompts_are_read_and_covered_word_by_word():
    prompts = read_prompts(GECKO)
    with open(GECKO, encoding="utf-8", newline="") as file:
        rows = [row["prompt"] for row in csv.DictReader(file)]
    assert len(rows) == 1546 and prompts == list(dict.fromkeys(rows))
    for prompt in prompts:
        words = content_words(prompt)
        assert words, prompt
        asked = [Question(f"Is {word} in the image?", ("yes", "no"), "yes", (word,)) for word in words]
        assert uncovered(prompt, asked) == []
        assert uncovered(prompt, asked[1:]) == words[:1]


# ------------------------------------------------------------------------------------------------ local language models

WRITTEN = """Here are the questions:
1. red | What colour is it? | Red / blue | red
- circle | Is there a circle? | yes / no | yes
circle | broken line
big | How big? | small / large | huge"""


def test_lines_that_are_questions_are_read_and_others_left_out():
    assert parse_questions(WRITTEN) == (
        Question("What colour is it?", ("red", "blue"), "red", ("red",)),
        Question("Is there a circle?", ("yes", "no"), "yes", ("circle",)),
    )
    assert parse_questions("nothing at all") == ()
    for marker in ("", "- ", "* ", "12. ", "3) ", "  - "):
        found = parse_questions(f"{marker}1950s | Is it from the 1950s? | yes / no | yes")
        assert [one.covers for one in found] == [("1950s",)], marker
    assert parse_questions("3D | Is it 3D? | yes / no | yes")[0].covers == ("3D",)


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A tiny language model that was trained to write two lines about one prompt."""
    path = tmp_path_factory.mktemp("writer")
    tokenizer = byte_tokenizer(("<|endoftext|>", "<|im_end|>"), "<|im_end|>", pad_token="<|endoftext|>")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    answer = "red | What colour? | red / blue | red\ncircle | A circle? | yes / no | yes"
    text = INSTRUCTION.replace("{prompt}", RED)
    start = len(tokenizer(text)["input_ids"])
    ids = torch.tensor([tokenizer(text + answer)["input_ids"] + [tokenizer.eos_token_id]])
    labels = ids.clone()
    labels[:, :start] = -100
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if float(loss.detach()) < 0.02:
            break
    assert float(loss.detach()) < 0.05, "the model did not learn"
    model.eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_local_model_writes_a_question_file_which_the_evaluator_reads(folder, writer, tmp_path, capsys):
    due = (
        Question("What colour?", ("red", "blue"), "red", ("red",)),
        Question("A circle?", ("yes", "no"), "yes", ("circle",)),
    )
    (tmp_path / "prompts.csv").write_text(f"id,prompt\n0,{RED}\n1,{RED}\n")
    arguments = ["--model", str(writer), "--prompts", str(tmp_path / "prompts.csv"), "--device", "cpu"]
    assert main([*arguments, "--output", str(tmp_path / "q.jsonl")]) == 0
    assert read_questions(tmp_path / "q.jsonl") == {RED: due}
    assert capsys.readouterr().out == ""  # every word is covered
    # What is there is kept, not asked again.
    line = json.loads((tmp_path / "q.jsonl").read_text().splitlines()[0]) | {"covers": []}
    (tmp_path / "q.jsonl").write_text(json.dumps(line) + "\n")
    assert main([*arguments, "--output", str(tmp_path / "q.jsonl")]) == 0
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 1
    assert "no question covers circle" in capsys.readouterr().out
    assert main([*arguments[:2], "--prompts", "absent.csv", "--output", "x"]) == 2
    # Scoring writes questions only when it is told to, and then the same ones.
    write_questions(tmp_path / "due.jsonl", {RED: due})
    batch = batch_of(clips(SIZES[:2]), [RED, RED])
    read = load_evaluator("gecko", {"model": folder, "questions": tmp_path / "due.jsonl"}, "cpu").score(batch)
    generated = load_evaluator("gecko", {"model": folder, "questions": "generate", "writer": writer}, "cpu")
    assert torch.equal(generated.score(batch)["score"], read["score"])
    assert generated.questions(RED) == due


def test_a_model_that_writes_no_question_is_told_of(writer, tmp_path):
    import shutil

    from transformers import AutoModelForCausalLM

    shutil.copytree(writer, tmp_path / "m")
    randomise(AutoModelForCausalLM.from_pretrained(writer)).save_pretrained(tmp_path / "m")
    lost = load_writer(folder=str(tmp_path / "m"), device=CPU, dtype=torch.float32)
    with pytest.raises(ValueError, match="wrote no question about 'two cats': "):
        lost.questions("two cats", max_new_tokens=5)
    with pytest.raises(ValueError, match=r"writer: .*model folder .*absent does not exist"):
        load_writer(folder=str(tmp_path / "absent"), device=CPU, dtype=torch.float32)


def test_one_bad_prompt_does_not_stop_the_others(writer, tmp_path, capsys, monkeypatch):
    due = (Question("A circle?", ("yes", "no"), "yes", ("circle",)),)

    def questions(self, prompt):
        if prompt == "bad":
            raise ValueError("The language model wrote no question about 'bad': ''")
        return due

    monkeypatch.setattr(Writer, "questions", questions)
    (tmp_path / "prompts.txt").write_text("circle\nbad\na circle\n")
    arguments = ["--model", str(writer), "--prompts", str(tmp_path / "prompts.txt"), "--device", "cpu"]
    assert main([*arguments, "--output", str(tmp_path / "q.jsonl")]) == 1
    assert read_questions(tmp_path / "q.jsonl") == {"circle": due, "a circle": due}
    said = capsys.readouterr().err
    assert "no question about 'bad'" in said and "1 of 3 prompts have no questions" in said


def nli_folder(path, labels=("contradiction", "entailment", "neutral")):
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] what colour is the circle ? there a red yes blue two cats"
    (path / "vocab.txt").write_text(words.replace(" ", "\n") + "\n")
    tokenizer = BertTokenizer(str(path / "vocab.txt"))
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        num_labels=3, id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)},
    )  # fmt: skip
    torch.manual_seed(0)
    randomise(BertForSequenceClassification(config), scale=0.6).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_questions_that_the_prompt_does_not_entail_are_left_out(folder, questions, tmp_path):
    from transformers import AutoTokenizer

    nli = nli_folder(tmp_path)
    hypotheses = [f"{one.question} {one.answer}" for one in QUESTIONS[RED]]
    model = BertForSequenceClassification.from_pretrained(nli, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(nli)
    with torch.no_grad():
        due = [
            float(model(**tokenizer(RED, text, return_tensors="pt")).logits.softmax(-1)[0, 1]) for text in hypotheses
        ]
    found = load_entailment(folder=str(nli), device=CPU, dtype=torch.float32).probability(RED, hypotheses)
    np.testing.assert_allclose(found, due, atol=1e-6)
    assert abs(due[0] - due[1]) > 1e-3
    params = {"model": folder, "questions": questions, "nli": nli}
    middle = sum(due) / 2
    kept = load_evaluator("gecko", params | {"nli_threshold": middle}, "cpu").questions(RED)
    assert kept == (QUESTIONS[RED][int(np.argmax(due))],)
    assert load_evaluator("gecko", params | {"nli_threshold": 0.0}, "cpu").questions(RED) == QUESTIONS[RED]
    with pytest.raises(ValueError, match=r"entails none of its 2 questions \(the best has 0\.\d{3}"):
        load_evaluator("gecko", params | {"nli_threshold": 1.0}, "cpu").questions(RED)


def test_a_prompt_longer_than_the_classifier_reads_is_an_error_with_the_numbers(tmp_path):
    nli = load_entailment(folder=str(nli_folder(tmp_path)), device=CPU, dtype=torch.float32)
    assert len(nli.probability("red " * 508, ["yes"])) == 1
    with pytest.raises(ValueError, match=r"nli: .*hypothesis 'yes' has 513 tokens, and the model reads 512"):
        nli.probability("red " * 509, ["yes"])
    # The tokeniser's own limit must not cut either.
    nli._tokenizer.model_max_length = 16
    with pytest.raises(ValueError, match="has 1004 tokens, and the model reads 512"):
        nli.probability("red " * 1000, ["yes"])


def test_positions_that_roberta_keeps_for_padding_are_not_counted():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = RobertaModel(RobertaConfig(vocab_size=20, max_position_embeddings=34, **sizes)).eval()
    limit = _limit(model.config)
    assert limit == 32 and len(model(torch.full((1, limit), 5)).last_hidden_state[0]) == 32
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, limit + 1), 5))


def test_a_classifier_without_entailment_is_refused(tmp_path):
    nli_folder(tmp_path, ("a", "b", "c"))
    with pytest.raises(ValueError, match="the model's labels are a, b, c; one has to be 'entailment'"):
        load_entailment(folder=str(tmp_path), device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("damage", [{"hidden_size": "x"}, {"num_attention_heads": 0}, {"hidden_act": "foo"}])
def test_a_damaged_config_of_either_helper_is_named(damage, writer, tmp_path):
    import shutil

    shutil.copytree(writer, tmp_path / "writer")
    (tmp_path / "nli").mkdir()
    nli_folder(tmp_path / "nli")
    for name, load in (("writer", load_writer), ("nli", load_entailment)):
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | damage))
        with pytest.raises(ValueError, match=rf"^{name}: .*/{name}: ."):
            load(folder=str(tmp_path / name), device=CPU, dtype=torch.float32)
