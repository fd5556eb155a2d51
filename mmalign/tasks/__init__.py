"""What one optimisation step means. A task is a class with these members; `mmalign.train` needs nothing else:

    modules: nn.ModuleDict               what is optimised, by name
    size: int                            how many items there are (pairs, pictures)
    unit: str                            what an item is called in the log
    facts: dict                          what to write into run.json: "data" (kept and dropped rows), "contents" (a hash
                                         that a resumed run must have too), and what else there is (beta in both units)
    load(positions)                      CPU work for [(item, epoch), ...]; runs ahead in a thread
    loss(batch)                          -> (scalar loss, metrics); runs inside the model's forward
    validate(folder, step)               pictures, or nothing
    export(folder)                       the finished checkpoint, in the formats that other tools load
    describe(batch)                      names the items of a batch, for the message of a NaN stop

and, where it has them:

    buckets                              a number for each item (a list): a batch holds items of one number
    begin(step)                          before each optimiser step
    tracks, track(means)                 metrics that it keeps averages of, and their means after each step
    finished(step), over                 whether to end the run here, and whether it had ended before a resume
    network, take_whole(state)           the module that processes may share (FSDP2), and its whole tensors at the end

A new task is one more file here and one more line in `TASKS`.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from mmalign.backbones.vlm_loading import model_folder
from mmalign.jobs import TrainConfig
from mmalign.models import base
from mmalign.paths import find

TASKS = {
    "preference": "mmalign.tasks.preference:PreferenceTask",
    "sft": "mmalign.tasks.sft:SFTTask",
    "autoencoder": "mmalign.tasks.autoencoder:AutoencoderTask",
    "reward": "mmalign.tasks.reward:RewardTask",
    "mllm": "mmalign.tasks.mllm:MLLMTask",
}


def make(config: TrainConfig, device: torch.device) -> Any:
    """The task of a config. The model's folder is checked first, then the data are read, then weights load."""
    if config.task == "mllm":
        model_folder(find(config.model.path), "model.path", weights=not config.model.from_scratch)
    elif config.task != "reward":
        base.check(config.model)
    elif config.model.family == "latent":
        base.check(config.model.model_copy(update={"family": "auto"}))
    module, _, name = TASKS[config.task].partition(":")
    return getattr(importlib.import_module(module), name)(config, device)
