"""Flow-NRG: sampling led by the gradient of a reward that knows noisy latents (2501.13918).

p*(x_0 | y) is proportional to p(x_0 | y) exp(w r(x_0, y)), so the score of noisy latents is that of the model plus
grad R_t, R_t(x_t) = log E[exp(w r(x_0)) | x_t]. A reward r(x_t, y, t) that was fitted to noisy latents stands for
R_t / w. What a shift of the score means to each kind of prediction is one formula (`shifted`); the rest is the sampler.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mmalign.backbones.latent_reward import Loaded, load_latent, share
from mmalign.guidance.denoising import Bar, Denoising, Outcome
from mmalign.guidance.rewards import Rewards
from mmalign.guidance.shift import Followed, shifted
from mmalign.jobs_align import RewardSpec
from mmalign.jobs_guidance import NRG
from mmalign.models.adapter import Adapter, Condition


class Guide:
    """The weighted sum of scores of latent rewards: r(x_t, y, t) = sum over axes of weight * score."""

    def __init__(self, specs: Sequence[RewardSpec], adapter: Adapter):
        wanted: dict[Path, dict[str, float]] = {}
        for spec in specs:
            if spec.weight:
                folder = Path(spec.params["model"])
                reward = _loaded(folder, adapter)
                for name, weight in _weights(spec, reward).items():
                    named = wanted.setdefault(folder, {})
                    named[name] = named.get(name, 0.0) + weight
        self.parts = [(_loaded(folder, adapter), weights) for folder, weights in wanted.items()]

    def __call__(self, adapter: Adapter, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """[B], float32, differentiable in the noisy latents [B, ...]."""
        return torch.stack(
            [r.scores(adapter, noisy, t, condition) @ r.weights(weights) for r, weights in self.parts]
        ).sum(0)

    def gradient(self, adapter: Adapter, noisy: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Its gradient by the noisy latents, shaped as these, and its value [B]."""
        with torch.enable_grad():
            latents = noisy.detach().requires_grad_(True)
            value = self(adapter, latents, t, condition)
            (found,) = torch.autograd.grad(value.sum(), latents)
        return found, value.detach()


def _weights(spec: RewardSpec, reward: Loaded) -> dict[str, float]:
    """Weights by axis of one entry of `rewards`; without a sub-score, or with `overall`, all axes share its weight."""
    names = reward.facts.names
    if spec.subscore in (None, "overall"):
        return {name: spec.weight / len(names) for name in names}
    if spec.subscore not in names:
        raise ValueError(
            f"guidance.rewards: {spec.params['model']} has the axes {', '.join(names)}, not {spec.subscore!r}; name "
            "one of these as subscore"
        )
    return {str(spec.subscore): spec.weight}


_HELD: WeakKeyDictionary[Adapter, dict[Path, Loaded]] = WeakKeyDictionary()  # of the batches of one run


def _loaded(folder: Path, adapter: Adapter) -> Loaded:
    held = _HELD.setdefault(adapter, {})
    if folder not in held:
        held[folder] = load_latent(folder, adapter)
    return held[folder]


def nrg(denoising: Denoising, rewards: Rewards, settings: NRG, bar: Bar) -> Outcome:
    """One trajectory, each prediction moved by the gradient of the rewards at the noisy latents, after guidance.

    Costs a pass forward and back through the first blocks at each guided step, and no decoding.

    Raises:
        ValueError: latents are no longer finite (`Denoising.checked`); a reward does not fit the pipeline, or lacks an
            axis.
    """
    adapter, guide = denoising.adapter, Guide(settings.rewards, denoising.adapter)
    latents = denoising.initial()
    followed = Followed(len(denoising.prompts))
    for i in range(denoising.steps):
        with torch.no_grad():
            prediction = denoising.predict(latents, i)
        t = denoising.times(i, len(latents))
        if float(share(adapter.process, t)[0]) <= settings.skip_above:
            gradient, value = guide.gradient(adapter, latents, t, denoising.condition)
            for spent in denoising.spent:
                spent.reward_gradients += 1
            guided = shifted(adapter.process, prediction, t, settings.scale * gradient, settings.max_ratio)
            followed.add(prediction, guided, value)
            prediction = guided
        latents = denoising.step(latents, prediction, i)
        bar((i + 1) / denoising.steps, followed.reward)
    return Outcome(latents, followed.records())
