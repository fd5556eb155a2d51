"""VBench's color on detections that the reference's own GRiT made (Huang et al., 2311.17982)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmalign.evaluation import Batch, Evaluator, Scores, Strict, Uniform, score_ready
from mmalign.vbench import rules
from mmalign.vbench.detections import read_seen, seen_files
from mmalign.vbench.rules import Rules


class Color(Evaluator):
    """Share of the frames with a coloured object in which its colour is right, from captions in a file.

    Exact where the file holds what the reference's GRiT found in its 16 "middle" frames, captioned by its dense
    captions. ``frames`` is how many frames show the object in some colour: where it is 0,
    ``score`` is 0 and means nothing, and the clip is in no mean. With ``rules: strict`` it is all frames. A score is at
    most 1 for the colours of the suite.
    """

    needs = frozenset({"frames", "prompt", "aux", "sample"})
    modality = frozenset({"image", "video"})
    frames = Uniform(1)  # the clip itself is not looked at
    higher_is_better, score_range = True, (0.0, None)
    counts = frozenset({"frames"})
    version = 1
    licence = "Apache-2.0; of the detections, their maker's"
    source = "VBench, 2311.17982 (color.py); detections by GRiT, 2212.00280"

    class Params(Strict):
        """The file, and how its contents are judged.

        Attributes:
            detections: a JSONL file with a line for each clip; see `mmalign.vbench.detections`.
            rules: compat asks for the class of a frame's first detection alone, finds colours inside of other words,
                and leaves frames without a colour out; strict repairs all three.
        """

        detections: Path
        rules: Rules = "compat"

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.seen = read_seen(params.detections)

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        return seen_files(params.detections)

    def score(self, batch: Batch) -> Scores:
        """Sub-scores float32 [B]: ``score`` and ``frames``. Rows that lack what is asked, or a line in the file, are
        `ItemErrors`."""

        def judge(place: int) -> rules.Outcome:
            (colour,) = rules.asked(batch.aux[place], "color")
            wanted = rules.object_of(batch.prompts[place], colour, self.params.rules)
            return rules.color(self.seen.frames(batch.samples[place]), wanted, colour, self.params.rules)

        return score_ready(len(batch), judge, lambda places, found: rules.scores(found))


EVALUATOR = Color
