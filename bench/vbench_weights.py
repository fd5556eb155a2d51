"""Random weights of the seven quality dimensions of VBench in published layouts, for `bench/vbench.py`.

Written once into a folder and found again by the next call: 340 MB for DINO ViT-B/16, 300 and 860 MB for CLIP ViT-B/32
and ViT-L/14 (float16, as OpenAI's are), 21 MB for RAFT, 12 MB for AMT-S and 109 MB for MUSIQ.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from score_weights import TINY_CLIP, Noise, clip_config, clip_state, fill
from torch import Tensor, nn

from mmalign.backbones.amt import AmtConfig, build_amt
from mmalign.backbones.dino import VIT_B_16, VitSizes, build_vit
from mmalign.backbones.musiq import MusiqConfig, build_musiq
from mmalign.backbones.raft import RaftSizes, build_raft

TINY_VIT = VitSizes(128, 2, 192, 16, 14)
TINY_MUSIQ = MusiqConfig(stem=32, patch_width=64, width=12, mlp=20, layers=2)
TINY_AMT = AmtConfig(
    channels=(6, 7, 8, 9), skip=5, flows=2, trunk=(8, 12, 16), features=10, hidden=9, flow=4, correlation=11, fused=7
)
TINY_RAFT = RaftSizes(
    (8, 8, 12, 16, 24), (8, 8, 10, 12, 26), radius=2, corr=(14, 10), flow=(8, 6), motion=14, hidden=12, head=10, mask=9
)


@dataclass(frozen=True)
class Files:
    """The networks' files; `b32` and `l14` are the configs that open_clip builds the two CLIPs from."""

    dino: Path
    clip_b32: Path
    clip_l14: Path
    head: Path
    musiq: Path
    amt: Path
    raft: Path
    b32: str
    l14: str

    def params(self) -> dict[str, dict[str, str]]:
        """The dimensions' parameters for a config of `mmalign score`."""
        return {
            "subject_consistency": {"checkpoint": str(self.dino)},
            "background_consistency": {"checkpoint": str(self.clip_b32), "model": self.b32},
            "temporal_flickering": {},
            "motion_smoothness": {"checkpoint": str(self.amt)},
            "dynamic_degree": {"checkpoint": str(self.raft)},
            "aesthetic_quality": {
                "checkpoint": str(self.head), "clip_checkpoint": str(self.clip_l14), "model": self.l14,
            },
            "imaging_quality": {"checkpoint": str(self.musiq)},
        }  # fmt: skip


def write(folder: Path, size: str) -> Files:
    """The files of this size, ``full`` or ``tiny``, those that are missing written."""
    folder = folder / size
    tiny = size == "tiny"
    configs = {name: TINY_CLIP if tiny else clip_config(name, "real") for name in ("ViT-B-32", "ViT-L-14")}
    places = {name: folder / name.lower() / "model.safetensors" for name in configs}
    files = Files(
        dino=folder / "dino_vitbase16_pretrain.pth",
        clip_b32=places["ViT-B-32"],
        clip_l14=places["ViT-L-14"],
        head=folder / "sa_0_4_vit_l_14_linear.pth",
        musiq=folder / "musiq_spaq_ckpt-358bb6af.pth",
        amt=folder / "amt-s.pth",
        raft=folder / "raft_large_C_T_V1-22a6c225.pth",
        b32=str(places["ViT-B-32"].parent) if tiny else "ViT-B-32",
        l14=str(places["ViT-L-14"].parent) if tiny else "ViT-L-14",
    )
    for name, config in configs.items():
        places[name].parent.mkdir(parents=True, exist_ok=True)
        if tiny:
            (places[name].parent / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        _once(places[name], lambda config=config: clip_state(config))
    vit, width = (TINY_VIT, TINY_CLIP["embed_dim"]) if tiny else (VIT_B_16, 768)
    _once(files.dino, lambda: _vit_state(vit))
    _once(files.head, lambda: {"weight": Noise(1).like("", torch.empty(1, width), torch.float32),
                               "bias": torch.full((1,), 5.0)})  # fmt: skip
    _once(files.musiq, lambda: _state(lambda: build_musiq(TINY_MUSIQ if tiny else None)))
    _once(files.amt, lambda: _amt_state(TINY_AMT if tiny else AmtConfig()))
    _once(files.raft, lambda: _state(lambda: build_raft(TINY_RAFT if tiny else None)))
    return files


def _once(file: Path, make: Callable[[], Mapping[str, Tensor]]) -> None:
    if file.is_file():
        return
    state = {name: value.detach().contiguous() for name, value in make().items()}
    partial = file.with_name(f".{file.name}")  # an interrupted file is none
    if file.suffix == ".safetensors":
        save_file(state, partial)
    else:
        torch.save(state, partial)
    partial.rename(file)


def _vit_state(sizes: VitSizes) -> dict[str, Tensor]:
    with torch.device("meta"):
        shapes = build_vit(sizes).state_dict()
    return fill(shapes, torch.float32, Noise())


def _state(build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """A network as its class initialises it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return dict(build().state_dict())


def _amt_state(config: AmtConfig) -> dict[str, Tensor]:
    """Kernels by which flows are some pixels long, and slopes of a quarter, as PyTorch begins with."""
    noise = Noise()
    state: dict[str, Any] = {}
    for name, value in build_amt(config).state_dict().items():
        slope = value.ndim == 1 and name.endswith("weight")
        state[name] = torch.full_like(value, 0.25) if slope else noise.like(name, value, torch.float32)
    state["comb_block.2.weight"] *= 0.1
    return state
