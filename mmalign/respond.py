"""`mmalign respond`: a table of questions in, the same table with a model's answers out.

`output/answers.jsonl` grows by a batch at a time and is what a killed run goes on from: a batch that it holds in part
is answered again as a whole, so that every answer was given among the same neighbours. `output/table.jsonl` is written
at the end, for `mmalign score`. A question that cannot be asked has a reason in place of an answer.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.backbones.vlm import FAMILIES, VisionLanguageModel, load_vlm
from mmalign.backbones.vlm_generate import Asked, Decoding, Written
from mmalign.backbones.vlm_loading import model_folder, vlm_files
from mmalign.backbones.vlm_lora import adapter_files
from mmalign.devices import resolve_dtype
from mmalign.jobs_respond import RespondConfig, Responding
from mmalign.locks import alone_in, refuse_if_busy
from mmalign.media import read_image
from mmalign.media_table import MediaRow, read_media_table, write_media_table
from mmalign.mllm.encode import Media
from mmalign.mllm.implicit import Implicit
from mmalign.mllm.rows import Part, Turn
from mmalign.paths import find
from mmalign.progress import Progress
from mmalign.records import MediaRef
from mmalign.runs import begin_folder, pick_device, refuse_other
from mmalign.score_media import media_hashes
from mmalign.source import MediaError
from mmalign.turns import earlier_turns
from mmalign.weights import files_hash

__all__ = ["ANSWERS", "respond", "run"]

ANSWERS = "answers.jsonl"
_LORA = "lora"  # what the judge calls it
_UNASKED = {"batch_size", "device", "path", "lora", "per_prompt", "seed"}
"""Settings that change no answer but by rounding, or are told otherwise: by content, and by each answer's seed."""


@dataclass(frozen=True)
class Question:
    """One answer to be given.

    Attributes:
        row: as it stands in the table, with the name of the answer for a sample.
        seed: of sampling; None for a greedy answer.
        key: hash of what is asked.
        problem: why it cannot be asked.
    """

    row: MediaRow
    seed: int | None
    key: str
    problem: str | None


def run(config: RespondConfig) -> Path:
    """Answer what is not answered yet, and return the media table `output/table.jsonl`.

    Raises:
        ValueError: a table, model folder or setting that cannot be used, or `output` holds answers that another model
            or other settings gave, or another run works there.
    """
    rows = read_media_table(find(config.questions), config.images, questions=True)[: config.limit]
    return respond(rows, config.model, config.output, config)


def respond(rows: Sequence[MediaRow], settings: Responding, folder: Path, config: Any) -> Path:
    """As `run`, for rows in memory.

    Args:
        config: written into the folder, for people.
    """
    questions = _questions(rows, settings, folder)
    refuse_if_busy(folder)
    device = pick_device(settings.device, settings.dtype)
    identity = _identity(settings)
    refuse_other(folder, identity, "answers")
    known = _known(folder / ANSWERS)
    known |= {one.row.sample: _reason(one, one.problem) for one in questions if one.problem is not None}
    missing = _missing(questions, known, settings.batch_size)
    model = _load(settings, device) if missing else None
    judge = _judge(settings, device) if missing and settings.best_of > 1 else None
    with alone_in(folder, "mmalign respond"):
        begin_folder(folder, config, identity, "")
        _write(folder / ANSWERS, known.values())  # whole lines alone: a kill may have cut the last one
        done = len(questions) - sum(map(len, missing))
        with Progress("answering", len(questions), done) as bar, open(folder / ANSWERS, "a", encoding="utf-8") as file:
            for answers in _answers(model, judge, missing, settings) if model else ():
                for answer in answers:
                    known[answer["sample"]] = answer
                    file.write(json.dumps(answer, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
                done += len(answers)
                bar.update(done)
        name = str(settings.lora or settings.path)
        write_media_table(folder / "table.jsonl", [_answered(question, known, name) for question in questions])
    print(_account(questions, known, settings), file=sys.stderr)
    return folder / "table.jsonl"


# ------------------------------------------------------------------------------------------------ what is asked


def _questions(rows: Sequence[MediaRow], settings: Responding, folder: Path) -> list[Question]:
    """All answers to be given."""
    hashes = media_hashes((source for row in rows for source in _sources(row)), folder / "table.jsonl")
    return [question for row in rows for question in _of_row(row, hashes, settings)]


def _of_row(
    row: MediaRow, hashes: Mapping[str | MediaRef, str | MediaError], settings: Responding
) -> Iterator[Question]:
    """The answers to be given to a row, each with its own seed and name."""
    problem = None
    if row.modality == "video":
        problem = "the row is about a video, and respond shows images; give frames as media and images"
    elif not row.prompt.strip():
        problem = "the prompt is empty, so there is nothing to answer"
    turns = row.aux.get("turns")
    try:
        earlier_turns(turns, len(_sources(row)))
    except ValueError as error:
        problem = problem or str(error)
    shown = [hashes[source] for source in _sources(row)]
    problem = problem or next((str(each) for each in shown if isinstance(each, MediaError)), None)
    for number in range(settings.per_prompt):
        seed = settings.seed + number if settings.temperature else None
        # Without turns as ever, so that folders of earlier versions go on.
        text = json.dumps([row.prompt, list(map(str, shown)), seed, *([] if turns is None else [turns])])
        key = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
        sample = row.sample if settings.per_prompt == 1 else f"{row.sample}-{seed}"
        yield Question(replace(row, sample=sample), seed, key, problem)


def _sources(row: MediaRow) -> list[str | MediaRef]:
    return [*([row.media] if row.media else []), *row.images]


def _identity(settings: Responding) -> dict[str, Any]:
    """What decides an answer besides its question, files by their content."""
    told = settings.model_dump(mode="json", exclude=_UNASKED)
    return {
        **told,
        "model": files_hash(vlm_files(settings.path, "model.path")),
        "lora": files_hash(adapter_files(settings.lora, "model.lora")) if settings.lora else None,
    }


def _load(settings: Responding, device: torch.device) -> VisionLanguageModel:
    return load_vlm(
        folder=str(model_folder(settings.path, "model.path")),
        device=device,
        dtype=resolve_dtype(settings.dtype),
        conversation=settings.conversation,
        lora=str(settings.lora) if settings.lora else None,
    )


def _judge(settings: Responding, device: torch.device) -> Implicit:
    assert settings.lora is not None
    return Implicit(
        settings.path, {_LORA: settings.lora}, dtype=resolve_dtype(settings.dtype), device=device,
        system=settings.system,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ what is answered


def _known(file: Path) -> dict[str, dict[str, Any]]:
    """Answers of earlier runs by sample; a line that a kill cut short is none."""
    if not file.is_file():
        return {}
    found: dict[str, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").split("\n"):
        try:
            answer = json.loads(line)
        except ValueError:
            continue
        found[answer["sample"]] = answer
    return found


def _write(file: Path, answers: Any) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    text = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def _missing(questions: Sequence[Question], known: Mapping[str, Any], size: int) -> list[list[Question]]:
    """The batches, cut from the table by place, that lack an answer: with other neighbours a last bit could turn."""
    batches = [list(questions[start : start + size]) for start in range(0, len(questions), size)]
    return [batch for batch in batches if not all(_is_answered(question, known) for question in batch)]


def _is_answered(question: Question, known: Mapping[str, Any]) -> bool:
    if question.problem is not None:
        return True
    answer = known.get(question.row.sample)
    return answer is not None and answer["key"] == question.key and answer["response"] is not None


def _answers(
    model: VisionLanguageModel, judge: Implicit | None, batches: Sequence[Sequence[Question]], settings: Responding
) -> Iterator[list[dict[str, Any]]]:
    """What becomes of each batch; the next one's pictures are decoded meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="decode") as pool:
        ahead = [pool.submit(_pictures, batch) for batch in batches[:1]]
        for number, batch in enumerate(batches):
            pictures = ahead.pop().result()
            ahead += [pool.submit(_pictures, later) for later in batches[number + 1 : number + 2]]
            yield _of_batch(model, judge, batch, pictures, settings)


def _pictures(batch: Sequence[Question]) -> list[tuple[Tensor, ...] | str]:
    """The images of each question, uint8 [3, H, W], or why it has none."""
    found: list[tuple[Tensor, ...] | str] = []
    for question in batch:
        try:
            sources = [] if question.problem else _sources(question.row)
            found.append(tuple(torch.from_numpy(read_image(source)).permute(2, 0, 1) for source in sources))
        except MediaError as error:
            found.append(str(error))
    return found


def _of_batch(
    model: VisionLanguageModel,
    judge: Implicit | None,
    batch: Sequence[Question],
    pictures: Sequence[tuple[Tensor, ...] | str],
    settings: Responding,
) -> list[dict[str, Any]]:
    asked: dict[int, list[Asked]] = {}
    problems: dict[int, str] = {}
    for place, (question, images) in enumerate(zip(batch, pictures, strict=True)):
        if question.problem is not None or isinstance(images, str):
            problems[place] = question.problem or str(images)
            continue
        try:
            asked[place] = _ask(model, question, images, settings)
        except ValueError as error:
            problems[place] = str(error)
    decoding = Decoding(settings.max_new_tokens, settings.temperature, settings.top_p)
    try:
        found = iter(model.writer.write([one for several in asked.values() for one in several], decoding))
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"out of memory on {len(asked)} questions at once ({error}); lower batch_size (now {settings.batch_size}). "
            "The answers so far are kept, and the same command goes on from there"
        ) from None
    written = {place: [next(found) for _ in several] for place, several in asked.items()}
    answers = []
    for place, question in enumerate(batch):
        one, rewards = _best(judge, asked.get(place, []), written.get(place, []), question, settings)
        if isinstance(one, Written):
            told = {"response": one.text, "tokens": one.tokens, "cut": one.cut, **rewards}
            answers.append({"sample": question.row.sample, "key": question.key, **told})
        else:
            answers.append(_reason(question, problems.get(place) or str(one)))
    return answers


def _reason(question: Question, problem: str) -> dict[str, Any]:
    """What stands for an answer that could not be given."""
    return {"sample": question.row.sample, "key": question.key, "response": None, "reason": problem}


def _best(
    judge: Implicit | None,
    asked: Sequence[Asked],
    written: Sequence[Written | ValueError],
    question: Question,
    settings: Responding,
) -> tuple[Written | ValueError | None, dict[str, Any]]:
    """The answer that is kept, and the rewards of all and the seed of the kept one where there were several."""
    good = [(one, each) for one, each in zip(asked, written, strict=True) if isinstance(each, Written)]
    if judge is None or not good:
        return (written[0] if written else None), {}
    images, texts = good[0][0].images, [each.text for _, each in good]
    rewards = judge.means(_conversation(question, len(images), settings), Media(images), texts)[_LORA]
    best = max(range(len(good)), key=rewards.__getitem__)
    return good[best][1], {"rewards": rewards, "kept": good[best][0].seed}


def _conversation(question: Question, images: int, settings: Responding) -> tuple[Turn, ...]:
    """What is asked, behind earlier turns; pictures that these do not show stand before the question."""
    found, left = [], images
    for turn in earlier_turns(question.row.aux.get("turns")):
        found.append(Turn(turn.role, (*(Part("image") for _ in range(turn.images)), Part("text", turn.content))))
        left -= turn.images
    asked = Part("text", question.row.prompt + settings.suffix)
    return (*found, Turn("user", (*(Part("image") for _ in range(left)), asked)))


def _ask(
    model: VisionLanguageModel, question: Question, images: tuple[Tensor, ...], settings: Responding
) -> list[Asked]:
    """As often as there are answers to choose from, with consecutive seeds."""
    if len(images) > 1 and not FAMILIES.get(model.family, True):
        raise ValueError(f"{model.family} models read one image, and the row has {len(images)}")
    asked = question.row.prompt + settings.suffix
    turns = earlier_turns(question.row.aux.get("turns"))
    text = model.words.chat(asked, len(images), system=settings.system, turns=turns)
    return [Asked(text, images, (question.seed or 0) + i) for i in range(settings.best_of)]


# ------------------------------------------------------------------------------------------------ the table


def _answered(question: Question, known: Mapping[str, dict[str, Any]], model: str) -> MediaRow:
    """The question's row with its answer, and in `aux` how long it is, whether it was cut, its seed; or the reason."""
    answer, row = known[question.row.sample], question.row
    aux = dict(row.aux)
    if row.model is not None:
        aux["media_model"] = row.model
    if answer["response"] is None:
        aux["response_error"] = answer["reason"]
    else:
        aux |= {"response_tokens": answer["tokens"], "response_cut": answer["cut"]}
    if question.seed is not None:
        aux["response_seed"] = answer.get("kept", question.seed)
    if "rewards" in answer:
        aux["response_rewards"] = answer["rewards"]
    return replace(row, response=answer["response"], model=model, aux=aux)


def _account(questions: Sequence[Question], known: Mapping[str, dict[str, Any]], settings: Responding) -> str:
    """How many were answered, cut and not answered, with a reason."""
    answers = [known[question.row.sample] for question in questions]
    failed = [answer for answer in answers if answer["response"] is None]
    cut = sum(bool(answer.get("cut")) for answer in answers)
    lines = [f"{len(answers) - len(failed)} of {len(answers)} questions answered"]
    if cut:
        lines.append(f"  {cut} cut at max_new_tokens ({settings.max_new_tokens})")
    if failed:
        lines.append(f"  {len(failed)} not answered, such as {failed[0]['sample']}: {failed[0]['reason']}")
    return "\n".join(lines)
