"""Yes/no questions about a clip, of your own checklist or of a suite, answered by any vision-language model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import model_validator

from mmalign.backbones.clip_checklist import Checklist, read_checklist, read_suite
from mmalign.backbones.clip_questions import Asked, ClipQuestion, QuestionParams, answer_clips
from mmalign.backbones.vlm import VisionLanguageModel, load_vlm
from mmalign.backbones.vlm_loading import vlm_files
from mmalign.evaluation import BackboneSpec, Batch, Evaluator, Scores, Uniform

SOURCES = "give either `questions` (a file) or `ask` (one question)"


class VlmQuestions(Evaluator):
    """How many yes/no questions about a clip a vision-language model answers as expected, from 0 to 1.

    The answers' probabilities are read from the logits, all questions behind one pass over the frames. ``score`` is the
    weighted mean (or what ``combine`` says), each dimension that the questions name is a sub-score.
    """

    needs = frozenset({"frames", "prompt"})
    modality = frozenset({"image", "video"})
    frames = Uniform(8)
    higher_is_better, score_range = True, (0.0, 1.0)
    version = 1
    licence = "Apache-2.0; the model's own licence"
    source = "the questions' own; layouts of VBench-2.0, 2503.21755; Vchitect/VBench"

    class Params(QuestionParams):
        """The model, and where the questions are from: ``questions`` or ``ask``.

        Attributes:
            questions: a checklist (JSONL or CSV), or a suite in VBench-2.0's layout (JSON), in which the row's prompt
                is looked up.
            dimension: of the suite, as it writes it: Motion_Rationality, for example.
            ask: one question about every clip, with ``{prompt}`` in it.
        """

        questions: Path | None = None
        dimension: str | None = None
        ask: str | None = None

        @model_validator(mode="after")
        def _source(self) -> "VlmQuestions.Params":
            if (self.questions is None) == (self.ask is None):
                raise ValueError(SOURCES)
            if self.ask is not None and "{prompt}" not in self.ask:
                raise ValueError("ask needs {prompt}; questions without it belong into a file")
            suite = self.questions is not None and self.questions.suffix.lower() == ".json"
            if suite != (self.dimension is not None):
                raise ValueError("`dimension` belongs to a suite, a .json file, and is needed there")
            return self

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.vlm: VisionLanguageModel = backbones["vlm"]
        self.known = read(params)

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        return {"vlm": BackboneSpec.of(load_vlm, **params.loading())}

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        read(params)
        return [*vlm_files(params.model), *([params.questions.expanduser()] if params.questions else [])]

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        return answer_clips(self.vlm, batch, self.params, lambda place: self._asked(batch.prompts[place]))

    def _asked(self, prompt: str) -> Asked:
        if isinstance(self.known, Checklist):
            return Asked.of(self.known.of(prompt), self.params.combine)
        if prompt not in self.known:
            raise ValueError(
                f"{self.params.questions} has no row of {self.params.dimension} with this prompt: '{prompt[:200]}'."
            )
        return self.known[prompt]

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        return [False] * len(prompts)  # a question that does not fit is an error


def read(params: VlmQuestions.Params) -> Checklist | dict[str, Asked]:
    """The questions; ValueError as `read_checklist` and `read_suite`."""
    if params.ask is not None:
        shown = params.shown[0] if params.shown else "all"
        return Checklist(Path("ask"), (ClipQuestion("#1", params.ask, shown=shown),), {})
    if params.questions is None:
        raise ValueError(SOURCES)
    if params.dimension is not None:
        return read_suite(params.questions, params.dimension, params)
    return read_checklist(params.questions, params)


EVALUATOR = VlmQuestions
