"""Networks that scorers are fitted on, one file per family. A family is a class with these members:

    name: str                    key of its module in checkpoints, such as "clip"
    module: nn.Module            the network; what is to be trained has requires_grad
    width: int                   of an embedding (D of `mmalign.backbones.reward_heads.Features`)
    towers: bool                 whether the prompt has an embedding of its own
    inputs(media, prompts)       CPU work, runs ahead in a thread: a dictionary for the N pairs of medium i
                                 and prompt i. A medium is what `mmalign.tasks.inputs.picture` reads
    features(inputs)             their `Features`, N rows, float32, on the device, with a gradient
    save(folder, grades)         the whole network with its own head, as its own scorer loads it, and in reward.json
                                 which that is, the fold, and the grades of an ordinal run. Two towers take a `dtype`
                                 in their place: `mmalign.tasks.reward` writes the rest beside them
    identity()                   hash of the files that features depend on, for the cache and for exported heads

Two towers (CLIP) fill `Features.image` and `.text`; a network that reads picture and prompt at once (BLIP with cross
attention, a VLM with special tokens) fills `.own` with the scores of its head, [N] or [N, axes], and `.image` with what
that head was given, for other heads. Frozen families need `towers_frozen` besides, see `frozen.py`. What reads noisy
latents (`latent.py`) has no `inputs`: `mmalign.tasks.noised` draws times and noise, and makes a family like others of
it.

A new family is one more file, a line in `_CLASSES`, one in `REWARD_FAMILIES` (and `TWO_TOWERS`) of
`mmalign.jobs_reward` and one in `Model.family`.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from mmalign.jobs import TrainConfig

_CLASSES = {
    "open_clip": "mmalign.reward_models.clip:ClipTowers",
    "image_reward": "mmalign.reward_models.blip:ImageRewardFamily",
    "qwen2_vl": "mmalign.reward_models.qwen2_vl:Qwen2VLFamily",
    "latent": "mmalign.reward_models.latent:LatentFamily",
}


def make(config: TrainConfig, device: torch.device) -> Any:
    """The family of a config, trainable as `reward.train` and `reward.unlocked_*` say.

    Raises:
        ValueError: the folder cannot be read, or holds no weights.
    """
    family = "open_clip" if config.model.family == "auto" else config.model.family
    module, _, name = _CLASSES[family].partition(":")
    return getattr(importlib.import_module(module), name)(config, device)
