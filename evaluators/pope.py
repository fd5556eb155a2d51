"""POPE: yes/no questions about objects, half of them about objects that are not there."""

from collections.abc import Sequence
from typing import Any, Literal

from mmalign.evaluation import Batch, Evaluator, FigureRow, Scores, Strict
from mmalign.hallucination.judged import judged
from mmalign.hallucination.pope import figures
from mmalign.hallucination.yes_no import PARSERS


class Pope(Evaluator):
    """Share of yes/no questions about objects that are answered rightly; precision, recall, F1 and yes-ratio by split.

    Reads saved answers: `response`, and from the table `label` (yes, no) and perhaps `split`. Yes is positive.
    """

    needs = frozenset({"response", "aux"})
    modality = frozenset({"image", "text"})
    higher_is_better, score_range = True, (0.0, 1.0)
    counts = frozenset({"yes", "unknown", "due", "words"})
    version = 1
    licence = "Apache-2.0; the questions MIT"
    source = "POPE, 2305.10355; AoiDragon/POPE; the other parser from open-compass/VLMEvalKit"

    class Params(Strict):
        """How answers are read.

        Attributes:
            parser: official takes all for yes that has no No, not or no before its first full stop; vlmevalkit looks
                for one of the words yes and no, and counts the rest as unknown, which is wrong.
        """

        parser: Literal["official", "vlmevalkit"] = "official"

    def score(self, batch: Batch) -> Scores:
        return dict(judged(batch.responses, batch.aux, PARSERS[self.params.parser]))

    @classmethod
    def figures(cls, params: Any, rows: Sequence[FigureRow]) -> dict[str, float | None]:
        return figures(rows)


EVALUATOR = Pope
