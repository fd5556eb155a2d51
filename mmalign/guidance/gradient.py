"""Guidance by the gradient of any differentiable evaluator at the estimate of x_0, decoded.

Universal guidance (2302.07121) and DPS (2209.14687): the reward of what the trajectory would end at now stands for the
reward of noisy latents, R_t(x_t) = r(decode(x_0(x_t))), so nothing has to be trained on noise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmalign.backbones.latent_reward import share
from mmalign.guidance.denoising import Bar, Denoising, Outcome
from mmalign.guidance.rewards import Rewards
from mmalign.guidance.shift import Followed, relative, shifted
from mmalign.jobs_guidance import Gradient
from mmalign.noise import Process


def gradient(denoising: Denoising, rewards: Rewards, settings: Gradient, bar: Bar) -> Outcome:
    """One trajectory; within [stop, start] of the schedule each prediction is moved by the reward's gradient.

    With a recurrence of n a guided step is taken n times: after each but the last its end is noised again, back to
    where the step began, from a generator of the request, the step and the repetition (2302.07121, algorithm 1).

    Costs a decoding and a gradient of the rewards at each guided step, and through the denoiser a pass back.

    Raises:
        ValueError: latents are no longer finite (`Denoising.checked`), or a reward has no gradient.
    """
    latents, followed = denoising.initial(), Followed(len(denoising.prompts))
    for i in range(denoising.steps):
        active = settings.stop <= float(share(denoising.adapter.process, denoising.times(i, 1))[0]) <= settings.start
        for again in range(settings.recurrence if active else 1):
            if again:
                generators = [denoising.generator(row, i, again) for row in range(len(denoising.prompts))]
                latents = denoising.renoise(latents, i + 1, i, generators)
            prediction = _led(denoising, rewards, settings, latents, i, followed) if active else None
            if prediction is None:
                with torch.no_grad():
                    prediction = denoising.predict(latents, i)
            latents = denoising.step(latents, prediction, i)
        bar((i + 1) / denoising.steps, followed.reward)
    return Outcome(latents, followed.records())


def _led(
    denoising: Denoising, rewards: Rewards, settings: Gradient, latents: Tensor, i: int, followed: Followed
) -> Tensor:
    """The prediction at timesteps[i], moved."""
    process, t = denoising.adapter.process, denoising.times(i, len(latents))
    with torch.set_grad_enabled(settings.through_denoiser):
        noisy = latents.detach().requires_grad_(settings.through_denoiser)
        prediction = denoising.predict(noisy, i)
        x0 = denoising.estimate(noisy, prediction, i)
    with torch.enable_grad():
        x0 = x0 if settings.through_denoiser else x0.detach().requires_grad_(True)
        value = _reward(denoising, rewards, x0, settings.checkpoint)
        (found,) = torch.autograd.grad(value.sum(), noisy if settings.through_denoiser else x0)
    found = found if settings.through_denoiser else plain_jacobian(process, t, found) * found
    prediction, found = prediction.detach(), found.float()
    if settings.normalise:
        guided = relative(prediction, found, settings.scale)
    else:
        guided = shifted(process, prediction, t, settings.scale * found, settings.max_ratio)
    followed.add(prediction, guided, value)
    return guided


def _reward(denoising: Denoising, rewards: Rewards, x0: Tensor, again: bool) -> Tensor:
    """Rewards [B] of clean latents, with a gradient; with `again` decoded a second time for it, to save memory."""

    def judged(clean: Tensor) -> Tensor:
        return rewards.tensor(denoising.pixels(clean), denoising.prompts)

    found = checkpoint(judged, x0, use_reentrant=False) if again else judged(x0)
    assert isinstance(found, Tensor)
    return found


def plain_jacobian(process: Process, t: Tensor, like: Tensor) -> Tensor:
    """What stands for d x_0 / d x_t where the denoiser is not differentiated: a / (a^2 + s^2), to multiply `like`.

    It is that of data from a unit Gaussian, whose posterior mean is a x_t / (a^2 + s^2); latents are scaled to about
    that. It falls to 0 towards pure noise, where 1 / a, which leaves the noise as it was, grows without bound.
    """
    signal, noise = process.scales(t, like)
    return signal / (signal.square() + noise.square())
