"""DPG-Bench, dependent yes/no questions about a dense prompt (Hu et al., ELLA, 2403.05135)."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from mmalign.backbones.vlm import VisionLanguageModel, load_vlm
from mmalign.backbones.vlm_loading import vlm_files
from mmalign.backbones.vlm_yes_no import YesNoParams, alive, margins
from mmalign.evaluation import BackboneSpec, Batch, Evaluator, Scores, score_ready

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")


class DPG(Evaluator):
    """Share of a dense prompt's questions that a vision-language model answers with yes, from 0 to 1.

    A question whose parent was answered with no counts as no. With a grid, the mean over its pictures.
    """

    needs = frozenset({"image", "prompt"})
    modality = frozenset({"image"})
    higher_is_better, score_range = True, (0.0, 1.0)
    version = 1
    licence = "Apache-2.0; the model's own licence"
    source = "ELLA / DPG-Bench, 2403.05135; TencentQQGYLab/ELLA"

    class Params(YesNoParams):
        """Questions, the model that answers, and how pictures are cut.

        Attributes:
            questions: the authors' dpg_bench.csv; the row's prompt is looked up in its column ``text``.
            template: what the model is asked; ``{question}`` is replaced.
            answers: ``exact``: 1 where yes is likelier than no; ``soft``: ``p(yes) / (p(yes) + p(no))``. Either way a
                parent counts as answered with no where yes is not likelier.
            pictures: how many of a 2x2 grid are scored, row by row from the top left; 1 is the whole image.
        """

        questions: Path
        template: str = "{question} Answer yes or no."
        answers: Literal["exact", "soft"] = "exact"
        pictures: int = Field(1, ge=1, le=4)

        @field_validator("template")
        @classmethod
        def _place(cls, value: str) -> str:
            if "{question}" not in value:
                raise ValueError("needs {question}")
            return value

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.vlm: VisionLanguageModel = backbones["vlm"]
        self.known = read_dpg(params.questions)

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        return {"vlm": BackboneSpec.of(load_vlm, **params.loading())}

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        read_dpg(params.questions)
        return [*vlm_files(params.model), params.questions.expanduser()]

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        cut, words = self.params.pictures, self.params.answers_asked
        crops = [crop for clip in batch.clips() for crop in grid(clip, cut)]
        key = (id(self.vlm), "media") if cut == 1 else (id(self.vlm), "grid", cut)
        media = batch.shared(key, lambda: self.vlm.see(crops))

        def ask(place: int) -> "Questions":
            asked = self._questions(batch.prompts[place])
            texts = [self.vlm.words.chat(self.params.template.replace("{question}", one.text), 1) for one in asked]
            for one in media[place * cut : (place + 1) * cut]:
                self.vlm.check(one, texts, [words] * len(texts), "needed")
            return asked, texts

        def read(places: Sequence[int], ready: Sequence["Questions"]) -> Tensor:
            asked = [item for item, _ in ready for _ in range(cut)]
            texts = [item for _, item in ready for _ in range(cut)]
            seen = [one for place in places for one in media[place * cut : (place + 1) * cut]]
            scores = [
                dependent_mean(questions, found, soft=self.params.answers == "soft")
                for questions, found in zip(asked, margins(self.vlm, seen, texts, words), strict=True)
            ]
            return torch.tensor(scores).reshape(-1, cut).mean(dim=1)

        return score_ready(len(batch), ask, read)

    def _questions(self, prompt: str) -> tuple["Proposition", ...]:
        if prompt not in self.known:
            raise ValueError(
                f"{self.params.questions} has no questions about this prompt in its column text: '{prompt[:200]}'."
            )
        found = self.known[prompt]
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        return [False] * len(prompts)  # a question that does not fit is an error


@dataclass(frozen=True)
class Proposition:
    """One question: its number within the prompt, the numbers of the questions that it depends on, category, text."""

    number: int
    parents: tuple[int, ...]
    category: str
    text: str


Questions = tuple[tuple[Proposition, ...], list[str]]
"""Of one prompt, and each as the model reads it."""


def dependent_mean(questions: Sequence[Proposition], margins: Tensor, soft: bool) -> float:
    """Mean score of a prompt's questions, those with a failed parent at 0.

    In the file's order, and a question that was set to 0 has failed for those after it too, as in the authors' code.

    Args:
        margins: ``log p(yes) - log p(no)`` [questions].
        soft: ``p(yes) / (p(yes) + p(no))`` in place of 1 and 0.
    """
    passed = {one.number: float(margin) > 0 for one, margin in zip(questions, margins, strict=True)}
    counted = alive(passed, {one.number: one.parents for one in questions})
    total = 0.0
    for one, margin in zip(questions, margins, strict=True):
        if counted[one.number]:
            total += float(margin.double().sigmoid()) if soft else float(passed[one.number])
    return total / len(questions)


def grid(clip: Tensor, pictures: int) -> list[Tensor]:
    """The first pictures of a 2x2 grid, row by row: uint8 [1, 3, H, W] -> [1, 3, H // 2, W // 2] each.

    Raises:
        ValueError: an odd side, which no grid of equal pictures has.
    """
    if pictures == 1:
        return [clip]
    height, width = clip.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(
            f"A {width}x{height} image is no 2x2 grid of equal pictures; set `pictures: 1` for single ones."
        )
    h, w = height // 2, width // 2
    return [clip[..., y : y + h, x : x + w] for y in (0, h) for x in (0, w)][:pictures]


def read_dpg(path: Path) -> dict[str, tuple[Proposition, ...] | str]:
    """Questions by prompt from the authors' CSV.

    Raises:
        ValueError: the file cannot be read, lacks a column, or a number is no number or a question is empty, with its
            line.

    Returns:
        For each prompt its questions; or, where a number occurs twice or a question depends on one that is not there,
        the words of the error that scoring this prompt is: the others of the file can be scored.
    """
    path = path.expanduser()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"questions: {path} cannot be read as text ({error}).") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if absent := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
        raise ValueError(f"questions: {path} has no column {', '.join(absent)}; give the authors' dpg_bench.csv.")
    items: dict[tuple[str, str], dict[int, Proposition]] = {}
    wrong: dict[str, str] = {}
    for row in reader:
        where = f"{path}:{reader.line_num}"
        try:
            number = int(row["proposition_id"])
            parents = tuple(int(part) for part in row["dependency"].split(","))
        except (TypeError, ValueError, AttributeError):
            raise ValueError(f"{where}: proposition_id and dependency have to be numbers.") from None
        question = row["question_natural_language"] or ""
        if not question.strip():
            raise ValueError(f"{where}: question {number} of {row['item_id']} is empty.")
        group = items.setdefault((row["item_id"], row["text"]), {})
        if number in group:
            wrong.setdefault(row["text"], f"{where}: question {number} of {row['item_id']} occurs twice.")
            continue
        category = (row["tuple"] or "").split("(")[0].strip()
        group[number] = Proposition(number, tuple(p for p in parents if p), category, question)
    found: dict[str, tuple[Proposition, ...] | str] = {}
    for (item, prompt), group in items.items():
        for one in group.values():
            if strangers := [parent for parent in one.parents if parent not in group]:
                text = f"{path}: question {one.number} of {item} depends on {strangers[0]}, which has no row."
                wrong.setdefault(prompt, text)
        found.setdefault(prompt, wrong.get(prompt) or tuple(group.values()))
    if not found:
        raise ValueError(f"questions: {path} holds none.")
    return found


EVALUATOR = DPG
