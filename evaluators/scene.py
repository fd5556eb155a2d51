"""VBench's scene on captions that the reference's own Tag2Text made (Huang et al., 2311.17982)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmalign.evaluation import Batch, Evaluator, Scores, Strict, Uniform, score_ready
from mmalign.vbench import rules
from mmalign.vbench.detections import read_seen, seen_files
from mmalign.vbench.rules import Rules


class Scene(Evaluator):
    """Share of a clip's frames whose caption names the scene, from captions in a file.

    Exact where the file holds what the reference's Tag2Text found in its 16 "middle" frames.
    ``frames`` is how many captions the file has of the clip.
    """

    needs = frozenset({"frames", "aux", "sample"})
    modality = frozenset({"image", "video"})
    frames = Uniform(1)  # the clip itself is not looked at
    higher_is_better, score_range = True, (0.0, 1.0)
    counts = frozenset({"frames"})
    version = 1
    licence = "Apache-2.0; of the captions, their maker's"
    source = "VBench, 2311.17982 (scene.py); captions by Tag2Text, 2303.05657"

    class Params(Strict):
        """The file, and how its contents are judged.

        Attributes:
            detections: a JSONL file with a line for each clip; see `mmalign.vbench.detections`.
            rules: compat is content with parts of words; strict asks for whole ones.
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
            (wanted,) = rules.asked(batch.aux[place], "scene")
            return rules.scene(self.seen.captions(batch.samples[place]), wanted, self.params.rules)

        return score_ready(len(batch), judge, lambda places, found: rules.scores(found))


EVALUATOR = Scene
