"""Yes/no questions about a clip that its own row of the table brings, answered by any vision-language model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmalign.backbones.clip_checklist import asked_of_row
from mmalign.backbones.clip_questions import Asked, QuestionParams, answer_clips
from mmalign.backbones.vlm import VisionLanguageModel, load_vlm
from mmalign.backbones.vlm_loading import vlm_files
from mmalign.evaluation import BackboneSpec, Batch, Evaluator, Scores, Uniform


class VlmRowQuestions(Evaluator):
    """How many of the yes/no questions in a clip's row a vision-language model answers with yes, from 0 to 1.

    As `vlm_questions`, for tables whose rows hold the questions, such as VBench-2.0's suite with its auxiliary_info.
    """

    needs = frozenset({"frames", "prompt", "aux"})
    modality = frozenset({"image", "video"})
    frames = Uniform(8)
    higher_is_better, score_range = True, (0.0, 1.0)
    version = 1
    licence = "Apache-2.0; the model's own licence"
    source = "the questions' own; layouts of VBench-2.0, 2503.21755; Vchitect/VBench"

    class Params(QuestionParams):
        """The model, and the column.

        Attributes:
            column: of the table: a list of questions, or the text of one as JSON.
        """

        column: str = "auxiliary_info"

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.vlm: VisionLanguageModel = backbones["vlm"]

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        return {"vlm": BackboneSpec.of(load_vlm, **params.loading())}

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        return vlm_files(params.model)

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        return answer_clips(self.vlm, batch, self.params, lambda place: self._asked(batch.aux[place]))

    def _asked(self, row: Mapping[str, Any]) -> Asked:
        column = self.params.column
        if column not in row:
            raise ValueError(f"The row has no column {column} with its questions; it has {', '.join(row) or 'none'}.")
        try:
            return asked_of_row(row[column], self.params)
        except ValueError as error:
            raise ValueError(f"{column}: {error}.") from None

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        return [False] * len(prompts)  # a question that does not fit is an error


EVALUATOR = VlmRowQuestions
