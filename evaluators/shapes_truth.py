"""Ground truth of the shapes world as an evaluator: what a caption asks against what the pixels show."""

from __future__ import annotations

import torch
from pydantic import Field, field_validator
from torch import Tensor

from mmalign.evaluation import Batch, Evaluator, Strict
from mmalign.shapes.annotators import ANNOTATORS, weighables
from mmalign.shapes.captions import Caption, parse_caption
from mmalign.shapes.reader import fidelity, read

SUBSCORES = ("fidelity", "count", "everything", "cleanliness", "utility")


class ShapesTruth(Evaluator):
    """What an image of the shapes world really shows: fidelity to its caption, cleanliness, an annotator's utility.

    Sub-scores, each in [0, 1]: ``fidelity`` (1 when exactly the asked kinds and colours are there), ``count`` (1 when
    the number of objects is right), ``everything`` (1 when sizes, position, relation and background are right too),
    ``cleanliness`` and ``utility`` (noise-free, of the annotator that the parameters name). A prompt that is not in the
    grammar of `mmalign.shapes.captions` is an error.
    """

    needs = frozenset({"image", "prompt"})
    score_range = (0.0, 1.0)
    licence = "Apache-2.0"
    source = "mmalign.shapes: the reader and the simulated annotators"

    class Params(Strict):
        """Parameters of shapes_truth."""

        annotator: str = Field("mixed", description=f"whose utility to compute: one of {', '.join(ANNOTATORS)}")

        @field_validator("annotator")
        @classmethod
        def _known(cls, value: str) -> str:
            if value not in ANNOTATORS:
                raise ValueError(f"there is no annotator '{value}'; known are {', '.join(ANNOTATORS)}")
            return value

    def score(self, batch: Batch) -> dict[str, Tensor]:
        """Sub-scores float64 [B]. Raises ValueError for a prompt outside the grammar, before an image is read."""
        asked = [parse_caption(prompt) for prompt in batch.prompts]
        rows = [self._item(caption, image) for caption, image in zip(asked, batch.images, strict=True)]
        return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in SUBSCORES}

    def _item(self, caption: Caption, image: Tensor) -> dict[str, float]:
        reading = read(image.permute(1, 2, 0).cpu().numpy())
        kept = fidelity(caption, reading)
        return {
            "fidelity": float(kept.shape_colour),
            "count": float(kept.count),
            "everything": float(kept.everything),
            "cleanliness": reading.cleanliness,
            "utility": ANNOTATORS[self.params.annotator].weigh(weighables(caption, reading)),
        }


EVALUATOR = ShapesTruth
