"""Run by the tests as `torchrun ... processes.py WHAT...`: trains one config after the other in one group of processes.

Starting processes takes longer than training tiny models in them, so a group serves many runs. WHAT is a YAML file, or
FILE=CHECKPOINT for a run that goes on from a checkpoint of another one.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from mmalign import train
from mmalign.config import load
from mmalign.jobs import TrainConfig


def _finish_trackers(self: Accelerator) -> None:
    """`end_training` without the end of the process group, which the next run needs."""
    for tracker in self.trackers:
        tracker.finish()


def _note_share(loop: train.Loop) -> None:
    """How many of the model's numbers this process holds, and what it tracks."""
    held = [p.to_local() if isinstance(p, DTensor) else p for p in loop.module.parameters()]
    total = sum(p.numel() for p in loop.module.parameters())
    averages = {name: value.item() for name, value in loop.module.named_buffers() if ".averages." in name}
    note = {"held": sum(p.numel() for p in held), "total": total, "averages": averages}
    (loop.config.output / f"share-{loop.accelerator.process_index}.json").write_text(json.dumps(note))


def _run(what: str) -> None:
    file, _, start = what.partition("=")
    config = load(TrainConfig, Path(file))
    if start:
        if torch.distributed.get_rank() == 0:
            shutil.copytree(start, config.output / "checkpoints" / Path(start).name)
        torch.distributed.barrier()
    train.run(config, resume=True)


if __name__ == "__main__":
    Accelerator.end_training = _finish_trackers
    fit = train.Loop.fit

    def _fit(self: train.Loop) -> None:
        fit(self)
        _note_share(self)

    train.Loop.fit = _fit
    for each in sys.argv[1:]:
        _run(each)
