"""The first blocks of a generator as a reward model of noisy latents, frozen, under a LoRA, or trained."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor, nn

from mmalign.backbones.latent_reward import LatentFile, LatentReward, weight_hashes, write_latent
from mmalign.backbones.latent_trunk import cut, stages, states
from mmalign.backbones.qwen2_vl_checkpoint import merge_lora
from mmalign.backbones.reward_folder import Grades
from mmalign.jobs import Lora, TrainConfig
from mmalign.methods_reward import Fitting
from mmalign.models import base
from mmalign.models.adapter import Adapter, Condition

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LatentFamily:
    """The family `latent`; `mmalign.reward_models` says what the members are.

    Attributes:
        adapter: of the pipeline, whose denoiser is cut after the last wanted block.
        module: a `LatentReward`.
    """

    name, towers = "latent", False

    def __init__(self, config: TrainConfig, device: torch.device):
        self.config, self.model = config, config.model.model_copy(update={"family": "auto"})
        frozen = config.lora is not None or config.reward.train == "head"
        dtype = PRECISIONS[config.precision] if frozen else torch.float32
        self.adapter: Adapter = base.load(self.model, device=device, dtype=dtype, vae_dtype=torch.float32)
        settings, adapter = config.reward.latent, self.adapter
        adapter.denoiser = cut(adapter.denoiser, settings.blocks)
        setattr(adapter.pipe, adapter.denoiser_name, adapter.denoiser)  # what is cut off is freed
        self.gaussian = isinstance(config.loss, Fitting) and config.loss.spread
        self.outputs = 2 if self.gaussian else max(1, len(config.data.axes))
        self.width = self._look()
        torch.manual_seed(config.seed)
        self.module = LatentReward(adapter.denoiser, settings, self.width, self.outputs).to(device)
        self._unlock()

    @torch.no_grad()
    def _look(self) -> int:
        """The width of a token, from one small picture."""
        return self._probe().shape[-1]

    def _probe(self) -> Tensor:
        adapter, side = self.adapter, self.adapter.multiple
        length = {"frames": self.config.data.frames or 1} if adapter.modality == "video" else {}
        latents = torch.zeros(1, *adapter.latent_shape(4 * side, 4 * side, **length), device=adapter.device)
        condition = adapter.encode_prompt(["a"])
        sizes = torch.tensor([[4.0 * side, 4.0 * side, 0, 0, 4.0 * side, 4.0 * side]])
        t = torch.zeros(1, device=adapter.device)
        t = t if adapter.process.alphas_cumprod is None else t.long()
        blocks = self.config.reward.latent.blocks
        return states(adapter, adapter.denoiser, blocks, latents, t, adapter.add_size(condition, sizes))

    def _unlock(self) -> None:
        """What is trained: the head, and of the kept blocks all, adapters, or nothing.

        Embeddings of patches, time and text stay as they were: they are what the blocks were trained to read. So do
        tensors of the last block on which nothing depends that is kept, such as its half for the text.
        """
        trunk, config = self.adapter.denoiser, self.config
        trunk.requires_grad_(False)
        if config.reward.train == "head":
            return
        if config.lora:
            add_lora(trunk, config.lora, config.lora.targets or self.adapter.lora_targets, config.seed)
        else:
            for block in stages(trunk)[: config.reward.latent.blocks]:
                block.requires_grad_(True)
        if config.optim.gradient_checkpointing:
            trunk.enable_gradient_checkpointing()
        trunk.train()
        trained = [parameter for parameter in trunk.parameters() if parameter.requires_grad]
        with torch.enable_grad():
            found = torch.autograd.grad(self._probe().float().sum(), trained, allow_unused=True)
        for parameter, gradient in zip(trained, found, strict=True):
            parameter.requires_grad_(gradient is not None)

    def scores(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Outputs of the head, [B, outputs], float32, with a gradient."""
        found: Tensor = self.module(self.adapter, noisy, t, condition)
        return found

    def save(self, folder: Path, mean: Tensor, std: Tensor, grades: Grades | None = None) -> None:
        """The head, the blocks where they were trained (adapters merged, float32), and reward.json."""
        config, adapter = self.config, self.adapter
        trained = config.reward.train != "head"
        facts = LatentFile(
            model=self.model, parts=weight_hashes(self.model), process=adapter.process.kind,
            trunk="own" if trained else "base", latent=config.reward.latent, width=self.width, outputs=self.outputs,
            gaussian=self.gaussian, axes=config.data.axes, mean=tuple(mean.tolist()), std=tuple(std.tolist()),
            resolution=config.data.resolution, frames=config.data.frames, fps=config.data.fps, fold=config.reward.fold,
            grades=grades,
        )  # fmt: skip
        write_latent(folder, facts, self.module.head.state_dict(), self._merged() if trained else {})

    def _merged(self) -> dict[str, Tensor]:
        state = dict(self.adapter.denoiser.state_dict())
        lora = self.config.lora
        if lora is None:
            return state
        state = {name.replace(".base_layer.", "."): value for name, value in state.items()}
        alpha = lora.alpha or lora.rank
        return merge_lora(state, alpha, lora.rank, rslora=False, origin="the adapters of this run", dtype=torch.float32)


def add_lora(trunk: nn.Module, lora: Lora, targets: tuple[str, ...], seed: int) -> None:
    """PEFT's adapters in the kept blocks, float32; B starts at zero, so that the first step is the pretrained model.

    Raises:
        ValueError: a target is nowhere in them.
    """
    names = [name for name, module in trunk.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    absent = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if absent and lora.targets:
        raise ValueError(
            f"lora.targets: the kept blocks have no linear or convolution layer called {absent[0]!r}; to_q, to_k, to_v "
            "and to_out.0 are usual"
        )
    kept = [target for target in targets if target not in absent]
    if not kept:
        raise ValueError(f"lora: none of {', '.join(targets)} is in the kept blocks; keep more, or use train: all")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.alpha or lora.rank, lora_dropout=lora.dropout,
                                     target_modules=kept))  # type: ignore[operator]  # fmt: skip
    for name, parameter in trunk.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
