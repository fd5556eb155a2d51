"""AMBER's yes/no questions: existence, attributes and relations."""

from collections.abc import Sequence
from typing import Any, Literal

from mmalign.evaluation import Batch, Evaluator, FigureRow, Scores, Strict
from mmalign.hallucination.amber import figures
from mmalign.hallucination.judged import judged
from mmalign.hallucination.yes_no import PARSERS


class AmberDiscriminative(Evaluator):
    """Share of AMBER's yes/no questions that are answered rightly; F1 with no as the positive class, by dimension.

    All questions of existence are to be answered no: read them beside the yes-ratio.
    """

    needs = frozenset({"response", "aux"})
    modality = frozenset({"image", "text"})
    higher_is_better, score_range = True, (0.0, 1.0)
    counts = frozenset({"yes", "unknown", "due", "words"})
    version = 1
    licence = "Apache-2.0"
    source = "AMBER, 2311.07397; junyangwang0410/AMBER"

    class Params(Strict):
        """How answers are read.

        Attributes:
            parser: exact, as the authors do, takes `Yes` and `No` to the letter; vlmevalkit looks for one of the words.
        """

        parser: Literal["exact", "vlmevalkit"] = "exact"

    def score(self, batch: Batch) -> Scores:
        return dict(judged(batch.responses, batch.aux, PARSERS[self.params.parser]))

    @classmethod
    def figures(cls, params: Any, rows: Sequence[FigureRow]) -> dict[str, float | None]:
        return figures(rows)


EVALUATOR = AmberDiscriminative
