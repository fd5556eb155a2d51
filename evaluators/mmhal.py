"""MMHal-Bench: a local judge rates answers about pictures from 0 to 6."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from mmalign.backbones.vlm_generate import Asked
from mmalign.evaluation import BackboneSpec, Batch, Evaluator, FigureRow, Scores
from mmalign.hallucination.judge import Judge, JudgeParams, fill, read_prompt
from mmalign.hallucination.mmhal import FIELDS, PROMPTS, fields_of, figures, read_rating
from mmalign.hallucination.yes_no import length

_log = logging.getLogger(__name__)


class MMHal(Evaluator):
    """Rating from 0 to 6 by which a local judge says what an answer makes up; hallucination rate and informativeness.

    Reads saved answers: `prompt` (the question), `response`, and from the table `gt_answer`, `image_content` (a list)
    and perhaps `question_type` or `index`. With `see: image` the judge is shown the picture too.
    """

    needs = frozenset({"response", "prompt", "aux"})
    modality = frozenset({"image", "text"})
    higher_is_better, score_range = True, (0.0, 6.0)
    counts = frozenset({"unrated", "words"})
    version = 1
    licence = "Apache-2.0; the questions' and the judge's own licences"
    source = "MMHal-Bench, 2309.14525; Shengcao1006/MMHal-Bench (own prompt, local judge)"

    class Params(JudgeParams):
        """The judge, what it is told, and how its rating is read.

        Attributes:
            prompt: a text file with {question}, {gt_answer}, {image_content}, {answer} in it; the default is our own.
            parser: strict, or official as the authors' script to the letter.
        """

        prompt: Path | None = None
        parser: Literal["strict", "official"] = "strict"

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.judge = Judge(backbones["judge"], params)
        self.told = _told(params)

    @classmethod
    def variant(cls, params: Params) -> type["MMHal"]:
        return Seeing if params.see == "image" else MMHal

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        return {"judge": Judge.spec(params)}

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        _told(params)
        return Judge.files(params, params.prompt)

    def score(self, batch: Batch) -> Scores:
        return self.judge.scores(
            batch, lambda place: self._asked(batch, place), lambda place, said: self._read(batch, place, said)
        )

    def _asked(self, batch: Batch, place: int) -> list[Asked]:
        values = fields_of(batch.prompts[place], batch.responses[place], batch.aux[place])
        images = batch.images[place : place + 1] if self.params.see == "image" else ()
        return [self.judge.question(fill(self.told, values), images)]

    def _read(self, batch: Batch, place: int, replies: Sequence[str]) -> dict[str, float]:
        given = read_rating(replies[0], self.params.parser)
        if given is None:
            _log.warning("no rating of the answer to %r, so 0; the judge wrote %r", batch.prompts[place], replies[0])
        return {
            "rating": float(given or 0),
            "unrated": float(given is None),
            "words": float(length(batch.responses[place])),
        }

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        return [False] * len(prompts)  # a question that does not fit is an error

    @classmethod
    def figures(cls, params: Any, rows: Sequence[FigureRow]) -> dict[str, float | None]:
        return figures(rows)


class Seeing(MMHal):
    """`MMHal` with a judge that is shown the picture."""

    needs = MMHal.needs | {"image"}
    modality = frozenset({"image"})


def _told(params: MMHal.Params) -> str:
    return read_prompt(params.prompt, PROMPTS[params.see], FIELDS)


EVALUATOR = MMHal
