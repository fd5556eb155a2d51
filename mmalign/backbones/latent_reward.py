"""Rewards on noisy latents: the first blocks of a denoiser and a head that knows the time (2501.13918).

Folder layout, as `mmalign train` (task: reward, model.family: latent) writes it::

    reward.json          what it is: blocks, head, axes, the pipeline it was fitted on with its parts' hashes, and the
                         mean and deviation of each axis
    head.safetensors     the head's tensors
    trunk.safetensors    those of the kept blocks and embeddings, where they were trained; else the pipeline's own

It reads latents and prompts, so it needs a pipeline with the same autoencoder and text encoders: its own, or any other
that shares them, such as one fine-tuned from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from mmalign import paths
from mmalign.backbones.latent_trunk import cut, states
from mmalign.backbones.reward_folder import Grades, write_told
from mmalign.backbones.reward_heads import mlp
from mmalign.config import Strict
from mmalign.jobs_inputs import Model
from mmalign.jobs_reward import Fold, Latent
from mmalign.models import base
from mmalign.models.adapter import Adapter, Condition, exact
from mmalign.noise import Process
from mmalign.weights import REWARD_FILE, check_scorer, files_hash, load_into, read_state_dict

HEAD_FILE, TRUNK_FILE = "head.safetensors", "trunk.safetensors"
FREQUENCIES = 16
TIMES = 9  # at which features' statistics are kept


def clean_time(process: Process, like: Tensor) -> Tensor:
    """The first timestep [B], at which latents are as good as clean: 0 for every kind of process."""
    kind = torch.float32 if process.alphas_cumprod is None else torch.int64
    return torch.zeros(len(like), dtype=kind, device=like.device)


def share(process: Process, t: Tensor) -> Tensor:
    """Where in the schedule timesteps [B] are, in [0, 1], 1 being the noisiest: flow times as they are, others by T."""
    return t.float() if process.alphas_cumprod is None else t.float() / max(1, len(process.alphas_cumprod) - 1)


def time_features(when: Tensor) -> Tensor:
    """Sines and cosines [B, 2 * 16] of shares of the schedule [B], with 1 to 64 half turns over it."""
    turns = torch.logspace(0, 6, FREQUENCIES, base=2.0, device=when.device)
    angle = math.pi * when[:, None] * turns
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Standard(nn.Module):
    """Features less their mean over media, divided by their deviation, both as they are at that time.

    What a denoiser says changes far more with the time than from one picture to another: a head that begins on it as it
    is sees all media alike. Statistics are kept at evenly spaced times, with straight lines between them; they are 0
    and 1 until they are fitted, and stay as they are in training.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(TIMES, width))
        self.register_buffer("deviation", torch.ones(TIMES, width))

    def forward(self, features: Tensor, when: Tensor) -> Tensor:
        """[B, N, D] at shares of the schedule [B]."""
        place = when.clamp(0, 1) * (TIMES - 1)
        low = place.floor().long().clamp(max=TIMES - 2)
        part = (place - low)[:, None]
        mean, deviation = (
            known[low] + part * (known[low + 1] - known[low]) for known in (self.mean, self.deviation)
        )  # fmt: skip
        return (features - mean[:, None]) / deviation[:, None]


class LatentHead(nn.Module):
    """From states [B, N, D] and shares of the schedule [B] to outputs [B, outputs], float32.

    Tokens are normalised over their channels, pooled (their mean, or by attention with a learned query per output),
    brought to one scale (`Standard`; with attention before the pooling), scaled and shifted by what an embedding of the
    time says, and mapped by an MLP. With attention each output has its own pooled vector; the MLP is one for all, and
    output i is read from vector i.
    """

    def __init__(self, settings: Latent, width: int, outputs: int):
        super().__init__()
        self.attention = settings.pooling == "attention"
        self.norm, self.standard = nn.LayerNorm(width, elementwise_affine=False), Standard(width)
        last = nn.Linear(width, 2 * width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), last)
        if self.attention:
            self.query = nn.Parameter(torch.randn(outputs, width) / math.sqrt(width))
        self.map = mlp([width, *settings.hidden, outputs], settings.dropout)

    def before_scaling(self, hidden: Tensor) -> Tensor:
        """What `standard` is given, [B, N, D], or [B, 1, D] of means; to fit its statistics on."""
        tokens: Tensor = self.norm(hidden.float())
        return tokens if self.attention else tokens.mean(1, keepdim=True)

    def forward(self, hidden: Tensor, when: Tensor) -> Tensor:
        scaled = self.standard(self.before_scaling(hidden), when)
        scale, shift = self.time(time_features(when))[:, None].chunk(2, dim=-1)  # [B, 1, D]
        if not self.attention:
            return self.map(scaled * (1 + scale) + shift)[:, 0]
        weights = torch.softmax(self.query @ scaled.transpose(1, 2), dim=-1)  # [B, outputs, N]
        found = self.map((weights @ scaled) * (1 + scale) + shift)
        return found.diagonal(dim1=1, dim2=2)


class LatentReward(nn.Module):
    """Scores of noisy latents.

    Args:
        trunk: a denoiser, whole or cut; None takes the adapter's own at each call.
        noised: whether it was fitted on noisy latents; if not, it is told that whatever it sees is clean.
    """

    def __init__(self, trunk: Any, settings: Latent, width: int, outputs: int):
        super().__init__()
        self.trunk, self.settings = trunk, settings
        self.head = LatentHead(settings, width, outputs)

    def forward(self, adapter: Adapter, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Outputs [B, outputs] for latents [B, C, ...] at timesteps t [B]; differentiable in the latents."""
        t = t if self.settings.noised else clean_time(adapter.process, noisy)
        hidden = self.hidden(adapter, noisy, t, condition)
        with exact(noisy.device):
            found: Tensor = self.head(hidden, share(adapter.process, t.to(noisy.device)))
        return found

    def hidden(self, adapter: Adapter, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """What the head is given, [B, N, D]."""
        trunk = adapter.denoiser if self.trunk is None else self.trunk
        return states(adapter, trunk, self.settings.blocks, noisy, t, condition)

    @torch.no_grad()
    def fit_scale(self, number: int, batches: Iterable[Tensor]) -> None:
        """Fits `Standard` at its time of this number, from batches of states [B, N, D] of media there."""
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for hidden in batches:
            features = self.head.before_scaling(hidden).flatten(0, 1).double().cpu()
            count, total, squares = count + len(features), total + features.sum(0), squares + features.square().sum(0)
        mean = total / count
        deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
        self.head.standard.mean[number] = mean
        self.head.standard.deviation[number] = torch.where(deviation > 1e-4, deviation, torch.ones_like(deviation))


# ---------------------------------------------------------------------------------------------------------- file


class LatentFile(Strict):
    """`reward.json`.

    Attributes:
        format: of this file; a number that this version does not know is refused.
        scorer: the evaluator that reads the folder.
        model: the pipeline that it was fitted on.
        parts: sha256 of the weights of each of its parts (`weight_hashes`).
        process: eps, v or flow; what its times mean.
        trunk: own for trained blocks, which are in the folder; base for the pipeline's.
        latent: which blocks, and the head on them.
        width: of a token.
        outputs: of the head: one per axis, or two with `gaussian`, the second a logarithm of a deviation.
        axes: their names; none is one score.
        mean, std: of each axis' score over the clean media that it was fitted to.
        resolution: side of the media that it was fitted to, in pixels.
        frames, fps: of clips: how many, and at which rate (null: whatever they had).
        fold: the part of the prompts that it has not seen.
        grades: of an ordinal run, what turns a score into a rating.
    """

    format: Literal[1] = 1
    scorer: Literal["latent_reward"] = "latent_reward"
    model: Model
    parts: dict[str, str]
    process: Literal["eps", "v", "flow"]
    trunk: Literal["base", "own"]
    latent: Latent
    width: int
    outputs: int
    gaussian: bool = False
    axes: tuple[str, ...] = ()
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resolution: int
    frames: int | None = None
    fps: float | None = None
    fold: Fold | None = None
    grades: Grades | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of its scores: several axes, or `score`."""
        return self.axes if len(self.axes) > 1 else ("score",)


def read_latent(folder: str | Path) -> LatentFile:
    """What a folder says of itself.

    Raises:
        ValueError: no such file, of another scorer, or of another form.
    """
    path = paths.find(Path(folder).expanduser()) / REWARD_FILE
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; a latent reward is the export/ folder of a run of task: reward with model.family: "
            "latent"
        )
    check_scorer(folder, "latent_reward")
    try:
        return LatentFile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path}: is no description of a latent reward that this version reads ({error}).") from None


def latent_files(folder: str | Path) -> list[Path]:
    """The files of the folder that decide its scores; ValueError where one is missing."""
    facts, folder = read_latent(folder), paths.find(Path(folder).expanduser())
    files = [folder / REWARD_FILE, folder / HEAD_FILE, *([folder / TRUNK_FILE] if facts.trunk == "own" else [])]
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        raise ValueError(f"{folder}: holds no {' and no '.join(absent)}; copy the whole export/ folder.")
    return files


def write_latent(folder: Path, facts: LatentFile, head: Mapping[str, Tensor], trunk: Mapping[str, Tensor]) -> None:
    """Writes the folder; `trunk` is empty for the pipeline's own blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_plain(head), folder / HEAD_FILE)
    if trunk:
        save_file(_plain(trunk), folder / TRUNK_FILE)
    write_told(folder, facts)


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}


def weight_hashes(model: Model) -> dict[str, str]:
    """sha256 of the safetensors of each part of a pipeline, and of its LoRA.

    Weights alone: a folder that was saved again has other bytes in its configs.
    """
    path = paths.find(model.path)
    parts = {part.name: part for part in path.iterdir() if part.is_dir()}
    parts |= {name: paths.find(place) for name, place in model.components.items()}
    parts |= {"lora": base.lora_file(model.lora)} if model.lora else {}
    hashes = {
        name: files_hash([part] if part.is_file() else sorted(part.glob("*.safetensors")))
        for name, part in sorted(parts.items())
    }
    return {name: found for name, found in hashes.items() if found}


# ------------------------------------------------------------------------------------------------------- loading


class Loaded:
    """A latent reward ready to score what a pipeline draws; frozen.

    Attributes:
        facts: its reward.json.
        network: with a trunk, or without one where the adapter's own denoiser is what it was fitted on.
    """

    def __init__(self, facts: LatentFile, network: LatentReward, device: torch.device):
        self.facts, self.network = facts, network.requires_grad_(False).eval()
        self.mean, self.std = (torch.tensor(value, device=device) for value in (facts.mean, facts.std))

    def scores(
        self, adapter: Adapter, noisy: Tensor, t: Tensor, condition: Condition, *, normalise: bool = True
    ) -> Tensor:
        """Scores [B, axes], by the axes' order in `facts.names`, float32; differentiable in the latents.

        Args:
            noisy: [B, C, ...] at timesteps t [B].
            condition: of the prompts, as `adapter.predict` takes it.
            normalise: less the mean and divided by the deviation of the media that it was fitted to, so that axes are
                in one unit; raw scores are log odds.
        """
        found = self.network(adapter, noisy, t, condition)
        found = found[:, :1] if self.facts.gaussian else found
        return (found - self.mean) / self.std if normalise else found

    def weights(self, wanted: Mapping[str, float]) -> Tensor:
        """A weight for each axis, [axes]; what is not named has none.

        Raises:
            ValueError: an axis that this reward does not have.
        """
        names = self.facts.names
        unknown = sorted(set(wanted) - set(names))
        if unknown:
            raise ValueError(f"weights: this reward has no axis {unknown[0]!r}; it has {', '.join(names)}")
        return torch.tensor([float(wanted.get(name, 0.0)) for name in names], device=self.mean.device)


def load_latent(folder: str | Path, adapter: Adapter) -> Loaded:
    """A latent reward on the latents and prompts of a pipeline.

    Its blocks are the adapter's own where these are what it was fitted on, so that they take no memory twice.

    Raises:
        ValueError: the pipeline has another autoencoder, text encoder or process than the reward was fitted on; the
            pipeline that frozen blocks belong to is gone or has changed; a tensor is missing, unexpected or has another
            shape, by name.
    """
    latent_files(folder)
    facts, folder = read_latent(folder), paths.find(Path(folder).expanduser())
    _check_pipeline(facts, adapter, folder)
    network = LatentReward(_trunk(facts, adapter, folder), facts.latent, facts.width, facts.outputs)
    load_into(network.head, read_state_dict(folder / HEAD_FILE), str(folder / HEAD_FILE))
    return Loaded(facts, network.to(adapter.device), adapter.device)


def _check_pipeline(facts: LatentFile, adapter: Adapter, folder: Path) -> None:
    if adapter.process.kind != facts.process:
        raise ValueError(
            f"{folder}: was fitted on the noise of a model that predicts {facts.process}, and this one predicts "
            f"{adapter.process.kind}; fit a reward on this pipeline"
        )
    mine = weight_hashes(adapter.config)
    read = ("vae", *adapter.text_encoders)
    used = [name for name in read if mine.get(name) != facts.parts.get(name)]
    if used:
        raise ValueError(
            f"{folder}: was fitted on the latents and prompts of {facts.model.path}, and {adapter.config.path} has "
            f"another {' and another '.join(used)}; fit a reward on this pipeline"
        )


def _trunk(facts: LatentFile, adapter: Adapter, folder: Path) -> Any:
    """None for the adapter's own denoiser."""
    if facts.trunk == "own":
        trunk = cut(adapter.denoiser, facts.latent.blocks)
        load_into(trunk, read_state_dict(folder / TRUNK_FILE), str(folder / TRUNK_FILE))
        return trunk
    name, mine = adapter.denoiser_name, weight_hashes(adapter.config)
    changed = adapter.config.lora is not None or "forward" in vars(adapter.denoiser)
    if mine.get(name) == facts.parts.get(name) and facts.model.lora is None and not changed:
        return None
    if weight_hashes(facts.model) != facts.parts:
        raise ValueError(
            f"{folder}: its blocks are those of {facts.model.path}, whose files are others by now; put the old ones "
            f"back, or write where they are under `model` in {folder / REWARD_FILE}"
        )
    dtype = adapter.denoiser.dtype
    return cut(base.load(facts.model, device=adapter.device, dtype=dtype).denoiser, facts.latent.blocks)
