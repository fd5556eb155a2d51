"""HallusionBench: whether a model looks at a figure or answers from what it knows."""

from collections.abc import Sequence
from typing import Any, Literal

from mmalign.evaluation import Batch, Evaluator, FigureRow, Scores, Strict
from mmalign.hallucination.hallusionbench import figures
from mmalign.hallucination.judged import judged
from mmalign.hallucination.yes_no import words


class HallusionBench(Evaluator):
    """Share of questions (aAcc), figures (fAcc) and questions over all their figures (qAcc) that are wholly right.

    Yes and no are parsed where the authors ask GPT-4; an answer that is neither is unclear, and wrong.
    """

    needs = frozenset({"response", "aux"})
    modality = frozenset({"image", "text"})
    higher_is_better, score_range = True, (0.0, 1.0)
    counts = frozenset({"yes", "unclear", "due", "words"})
    version = 1
    licence = "Apache-2.0; the questions BSD-3-Clause"
    source = "HallusionBench, 2310.14566; tianyi-lab/HallusionBench; yes/no parse of open-compass/VLMEvalKit"

    class Params(Strict):
        """How figures are made.

        Attributes:
            keys: official, or vlmevalkit: rows with a figure alone, VD's and VS's ocr merged, figure 0 not skipped.
        """

        keys: Literal["official", "vlmevalkit"] = "official"

    def score(self, batch: Batch) -> Scores:
        return dict(judged(batch.responses, batch.aux, words, neither="unclear"))

    @classmethod
    def figures(cls, params: Any, rows: Sequence[FigureRow]) -> dict[str, float | None]:
        return figures(rows, params.keys)


EVALUATOR = HallusionBench
