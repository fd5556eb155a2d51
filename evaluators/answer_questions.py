"""Questions of one's own: yes or no, one of several options, a short answer; about what a user has told, too."""

from collections.abc import Sequence
from typing import Any

import torch

from mmalign.evaluation import Batch, Evaluator, FigureRow, Scores, score_ready
from mmalign.hallucination.answer_rules import due, figures, said
from mmalign.hallucination.yes_no import length


class AnswerQuestions(Evaluator):
    """Share of questions that are answered rightly, by kind and category; for personalisation and benchmarks of yours.

    Reads `response`, and from the table `answer`, `options` (of multiple choice) and perhaps `category`.
    """

    needs = frozenset({"response", "aux"})
    modality = frozenset({"image", "text"})
    higher_is_better, score_range = True, (0.0, 1.0)
    counts = frozenset({"yes", "unparsed", "words"})
    version = 1
    licence = "Apache-2.0"
    source = "rules of this project; yes and no as open-compass/VLMEvalKit; for sets such as MMPB, 2509.22820"

    def score(self, batch: Batch) -> Scores:
        def prepare(place: int) -> dict[str, float]:
            asked, response = due(batch.aux[place]), batch.responses[place]
            told = said(response, asked)
            yes = asked.kind == "yes_no" and told == "yes"
            return {
                "accuracy": float(told in asked.right),
                "yes": float(yes),
                "unparsed": float(told is None),
                "words": float(length(response)),
            }

        return score_ready(len(batch), prepare, _collected)

    @classmethod
    def figures(cls, params: Any, rows: Sequence[FigureRow]) -> dict[str, float | None]:
        return figures(rows)


def _collected(places: Sequence[int], found: Sequence[dict[str, float]]) -> Scores:
    return {name: torch.tensor([each[name] for each in found], dtype=torch.float64) for name in found[0]}


EVALUATOR = AnswerQuestions
