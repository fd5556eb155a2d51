"""AMBER's open queries: things that a description names and the picture does not have."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmalign.evaluation import Batch, Evaluator, FigureRow, Scores, Strict, score_ready
from mmalign.hallucination.amber_captions import Nouns, Things, Vectors, figures, judged
from mmalign.hallucination.files import present
from mmalign.hallucination.judged import columns, note_absent


class AmberGenerative(Evaluator):
    """Share of the things that a description names which are in the picture; CHAIR, Cover, Hal and Cog of all.

    Reads `response`, and `truth` and `hallu` (lists of words) from the table, as AMBER's annotations have them.
    """

    needs = frozenset({"response", "aux"})
    modality = frozenset({"image", "text"})
    higher_is_better, score_range = True, (0.0, 1.0)
    counts = frozenset({"nouns", "wrong", "things", "named", "targets", "expected", "words"})
    version = 1
    licence = "Apache-2.0"
    source = "AMBER, 2311.07397; junyangwang0410/AMBER (rules written anew)"

    class Params(Strict):
        """AMBER's files, and what the authors take from NLTK and spaCy.

        Attributes:
            relation: relation.json.
            safe_words: safe_words.txt.
            vectors: word vectors in GloVe's text form: a noun nearer than 0.8 to a right one is right; else none is.
            tagger: name or folder of a spaCy pipeline that tags nouns; without, every word of relation.json is one.
        """

        relation: Path
        safe_words: Path
        vectors: Path | None = None
        tagger: str | None = None

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.things = Things(params.relation, params.safe_words)
        self.vectors = Vectors.read(params.vectors, self.things.words) if params.vectors else None
        self.tagger = _tagger(params.tagger) if params.tagger else None

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        files = [file for file in (params.relation, params.safe_words, params.vectors) if file]
        return present(files, "docs/scorers/amber_generative.md")

    def score(self, batch: Batch) -> Scores:
        return score_ready(len(batch), lambda place: self._judged(batch, place), lambda _, found: columns(found))

    def _judged(self, batch: Batch, place: int) -> dict[str, float]:
        aux = batch.aux[place]
        if not isinstance(aux.get("truth"), list):
            raise ValueError("the row has no truth, a list of the picture's things")
        found, wrong = judged(
            batch.responses[place], aux["truth"], aux.get("hallu") or [], self.things, self.vectors, self.tagger
        )
        note_absent(batch, place, wrong)
        return {"right": 1 - found["wrong"] / found["nouns"] if found["nouns"] else 1.0, **found}

    @classmethod
    def figures(cls, params: Any, rows: Sequence[FigureRow]) -> dict[str, float | None]:
        return figures(rows)


def _tagger(name: str) -> Nouns:
    """Nouns of a spaCy pipeline. ValueError where spaCy or the pipeline is not installed."""
    try:
        import spacy

        pipeline = spacy.load(name)
    except (ImportError, OSError) as error:
        raise ValueError(f"tagger: {name} needs spaCy and that pipeline: {error}") from None
    return lambda text: [word.lemma_.lower() for word in pipeline(text) if word.tag_.startswith("NN")]


EVALUATOR = AmberGenerative
