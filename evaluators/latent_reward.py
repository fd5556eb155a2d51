"""A reward on latents that was fitted here (`mmalign train`, task: reward, model.family: latent), of finished media."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmalign.backbones.latent_scoring import LatentScorer, load_scorer, scoring_files
from mmalign.evaluation import AllFrames, BackboneSpec, Batch, Evaluator, Scores, Strict


class LatentRewardScore(Evaluator):
    """A fitted latent reward: the first blocks of a generator and a head, on a medium's clean latents and its prompt.

    What guides sampling (`guidance.kind: nrg`) is the same network on noisy latents. Scores are in standard deviations
    of the media that it was fitted to, around their mean; several axes are sub-scores behind `overall`, their mean.
    Pictures and clips are brought to the size that it was fitted to, and encoded by its pipeline's autoencoder.
    """

    needs = frozenset({"frames", "prompt"})
    modality = frozenset({"image", "video"})
    frames = AllFrames()
    version = 1
    licence = "that of the generator it was fitted on"
    source = "your own run of mmalign train (docs/reward_models.md); 2501.13918"

    class Params(Strict):
        """Which reward.

        Attributes:
            model: the export/ folder of a run of task: reward with model.family: latent.
            normalise: less the mean and divided by the deviation over the media that it was fitted to; without it
                differences of scores are log odds of a preference.
        """

        model: Path
        normalise: bool = True

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.scorer: LatentScorer = backbones["latent"]

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        return {"latent": BackboneSpec.of(load_scorer, folder=params.model)}

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        return scoring_files(params.model)

    def score(self, batch: Batch) -> Scores:
        found = self.scorer.named(batch.clips(), batch.prompts, self.params.normalise)
        return found if len(found) > 1 else found["score"]

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        return [False] * len(prompts)


EVALUATOR = LatentRewardScore
