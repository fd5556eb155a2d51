"""Ground truth of the shapes world's clips as an evaluator: what a caption asks against what the frames show."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from mmalign.evaluation import AllFrames, Batch, Evaluator, Strict
from mmalign.shapes.axes import FLICKER_SCALE, axes, everything, kept
from mmalign.shapes.clip_annotators import CLIP_ANNOTATORS
from mmalign.shapes.clip_reader import read_clip
from mmalign.shapes.motion import MotionCaption, parse_motion

SUBSCORES = ("VQ", "MQ", "TA", "everything", "identity", "direction", "flicker_free", "drop_free", "utility")


class ShapesMotion(Evaluator):
    """What a clip of the shapes world really shows: visual quality, motion quality, text alignment, and their parts.

    Sub-scores, each in [0, 1], more is better: ``VQ``, ``MQ`` and ``TA`` as `mmalign.shapes.axes` defines them,
    ``everything`` (1 when all that the caption asks is kept exactly), ``identity`` (share of sightings in which shapes
    are what they were), ``direction`` (share of the asked shapes that go, or stand, as asked), ``flicker_free`` (the
    factor of VQ), ``drop_free`` (share of the steps between frames that neither stand nor leap) and ``utility``
    (noise-free, of the annotator that the parameters name). A prompt that is not in the grammar of
    `mmalign.shapes.motion` is an error.
    """

    needs = frozenset({"frames", "prompt", "fps"})
    modality = frozenset({"video"})
    frames = AllFrames()
    score_range = (0.0, 1.0)
    licence = "Apache-2.0"
    source = "mmalign.shapes: the clip reader and the simulated annotators"

    class Params(Strict):
        """Parameters of shapes_motion."""

        annotator: str = Field("balanced", description=f"whose utility to compute: one of {', '.join(CLIP_ANNOTATORS)}")

        @field_validator("annotator")
        @classmethod
        def _known(cls, value: str) -> str:
            if value not in CLIP_ANNOTATORS:
                raise ValueError(f"there is no annotator of clips '{value}'; known are {', '.join(CLIP_ANNOTATORS)}")
            return value

    def score(self, batch: Batch) -> dict[str, Tensor]:
        """Sub-scores float64 [B]. Raises ValueError, before a frame is read, for a prompt outside the grammar."""
        asked = [parse_motion(prompt) for prompt in batch.prompts]
        rows = [
            self._item(caption, clip.permute(0, 2, 3, 1).cpu().numpy(), fps)
            for caption, clip, fps in zip(asked, batch.frames, batch.fps, strict=True)
        ]
        return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in SUBSCORES}

    def _item(self, caption: MotionCaption, clip: np.ndarray, fps: float | None) -> dict[str, float]:
        if fps is None:
            raise ValueError("shapes_motion measures speeds and needs the clip's frames per second: the column fps.")
        reading = read_clip(np.ascontiguousarray(clip), fps)
        found = axes(caption, reading)
        directions = [part.exact for name, part in kept(caption, reading).items() if name.startswith("direction")]
        return {
            **found,
            "utility": CLIP_ANNOTATORS[self.params.annotator].weigh(found),
            "everything": float(everything(caption, reading)),
            "identity": reading.identity,
            "direction": float(np.mean(directions)),
            "flicker_free": float(np.exp(-((reading.flicker / FLICKER_SCALE) ** 2))),
            "drop_free": 1 - reading.dropped,
        }


EVALUATOR = ShapesMotion
