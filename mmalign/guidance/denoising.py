"""A model that is asked along a trajectory: the sampler that every strategy steers.

It takes the steps that the family's pipeline takes under a DDIM (eps, v) or Euler (flow) scheduler, with the timesteps
of the checkpoint's own scheduler and the pipeline's classifier-free guidance. A row never depends on its neighbours.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmalign import noise
from mmalign.guidance.rewards import Costs, Rewards
from mmalign.models.adapter import Adapter, Condition

Bar = Callable[[float, float | None], None]
"""(share of the batch's work that is done, in [0, 1]; mean reward so far, or None), shown to the user."""


@dataclass
class Outcome:
    """What a strategy gives back.

    Attributes:
        latents: [B, ...], clean, one for each request.
        records: for each request what was chosen and what it had to choose from, as JSON takes it.
    """

    latents: Tensor
    records: list[dict[str, Any]]


@dataclass(eq=False)
class Denoising:
    """One batch of B requests, and the model that draws them.

    Methods that take latents [n, ...] also take `rows` [n], the request that each belongs to. Without them n is a
    multiple of B, and the latents of a request stand together: row = index // (n / B). Candidates of several requests
    go through the network `batch_size` at a time.

    Attributes:
        prompts, seeds: of the B requests.
        shape: of one sample's latents.
        scale: of classifier-free guidance; 1 leaves the unconditional branch out.
        embedded: the guidance that a distilled denoiser is told; None for others.
        condition, negative: of the B prompts and of what is guided away from, first dimension B.
        timesteps: [N + 1], int64 for eps and v, float32 for flow. The last is `process.clean`, or 0 where the
            checkpoint's scheduler ends at the first abar (set_alpha_to_one: false).
        spent: costs of each request.
        strategy, lower: the strategy's kind, and the setting to lower where latents overflow, for that message.
    """

    adapter: Adapter
    prompts: list[str]
    seeds: list[int]
    shape: tuple[int, ...]
    scale: float
    embedded: float | None
    condition: Condition
    negative: Condition | None
    timesteps: Tensor
    batch_size: int = 8
    strategy: str = "plain"
    lower: str | None = None
    spent: list[Costs] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.spent = self.spent or [Costs() for _ in self.prompts]

    @property
    def steps(self) -> int:
        """N: predictions from noise to clean latents."""
        return len(self.timesteps) - 1

    @property
    def costs(self) -> Costs:
        """Of all requests together."""
        return Costs(*(sum(getattr(each, one.name) for each in self.spent) for one in fields(Costs)))

    def rows(self, count: int, rows: Sequence[int] | None = None) -> list[int]:
        """The request of each of `count` latents."""
        if rows is not None:
            assert len(rows) == count
            return list(rows)
        assert count % len(self.prompts) == 0, f"{count} latents for {len(self.prompts)} requests: give rows"
        return [index // (count // len(self.prompts)) for index in range(count)]

    # -------------------------------------------------------------------------------------------------- noise

    def initial(self) -> Tensor:
        """Latents at pure noise [B, ...], each from its own seed, as the pipeline would draw them."""
        return self.draw(self.seeds)

    def draw(self, seeds: Sequence[int]) -> Tensor:
        """Latents at pure noise [n, ...] of these seeds."""
        return self.adapter.draw_noise(self.shape, [torch.Generator().manual_seed(seed) for seed in seeds])

    def generator(self, row: int, *purpose: object) -> torch.Generator:
        """A CPU generator for a request and a purpose: of its seed and prompt, never of the batch."""
        return noise.generator(self.strategy, self.seeds[row], self.prompts[row], *purpose)

    # ------------------------------------------------------------------------------------------------ network

    def predict(self, latents: Tensor, i: int, rows: Sequence[int] | None = None) -> Tensor:
        """The prediction at timesteps[i] after classifier-free guidance, float32, shaped as latents [n, ...].

        Differentiable with respect to the latents where grad is enabled.
        """
        places = self.rows(len(latents), rows)
        for place in places:
            self.spent[place].network_calls += 1 if self.negative is None else 2
        starts = range(0, len(latents), self.batch_size)
        ends = [slice(start, start + self.batch_size) for start in starts]
        return torch.cat([self._predict(latents[part], i, places[part]) for part in ends])

    def _predict(self, latents: Tensor, i: int, rows: list[int]) -> Tensor:
        adapter, t = self.adapter, self.times(i, len(latents))
        towards = _take(self.condition, rows)
        with adapter.told(self.embedded):
            if self.negative is None:
                return adapter.predict(latents, t, towards).float()
            away = _take(self.negative, rows)
            if adapter.guides_in_one_call:
                both = {name: torch.cat([away[name], towards[name]]) for name in towards}
                found = adapter.predict(torch.cat([latents, latents]), torch.cat([t, t]), both).float().chunk(2)
            else:
                found = adapter.predict(latents, t, away).float(), adapter.predict(latents, t, towards).float()
        return adapter.guided(found[1], found[0], self.scale)

    def times(self, i: int, count: int) -> Tensor:
        """timesteps[i] for `count` latents, [count], on their device."""
        return self.timesteps[i].expand(count).to(self.adapter.device)

    # -------------------------------------------------------------------------------------------------- steps

    def estimate(self, latents: Tensor, prediction: Tensor, i: int) -> Tensor:
        """The x_0 that a prediction at timesteps[i] implies, [n, ...]."""
        return self.adapter.process.to_x0_eps(latents, prediction, self.times(i, len(latents)))[0]

    def step(self, latents: Tensor, prediction: Tensor, i: int) -> Tensor:
        """The deterministic step to timesteps[i + 1]: DDIM with eta 0 (2010.02502), Euler for a flow."""
        now, after = (self.times(k, len(latents)) for k in (i, i + 1))
        return self.checked(self.adapter.process.step(latents, prediction, now, after)[0], i)

    def stochastic_step(
        self, latents: Tensor, prediction: Tensor, i: int, generators: Sequence[torch.Generator], eta: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A step to timesteps[i + 1] with fresh noise: the new latents, and mean and deviation of their Gaussian.

        x' = a x_0 + sqrt(s^2 - std^2) eps + std z with signal a and noise s at timesteps[i + 1] and std eta times the
        ancestral one: DDIM's equations 12 and 16 (2010.02502), which hold for a flow's signal 1 - t and noise t as
        well. What x_0 and eps are right for keeps its marginal at any number of steps, where an Euler-Maruyama step of
        the flow's SDE (Flow-GRPO 2505.05470) does so in the limit alone, and is singular at t = 1.

        Args:
            generators: a CPU generator for each of the n latents.
            eta: 0 is `step`, 1 the ancestral sampler.
        """
        process = self.adapter.process
        now, after = (self.times(k, len(latents)) for k in (i, i + 1))
        x0, eps = process.to_x0_eps(latents, prediction, now)
        signal, spread = process.scales(after, latents)
        std = eta * process.ancestral_std(after, now, latents)
        mean = signal * x0 + (spread.square() - std.square()).clamp(min=0).sqrt() * eps
        return self.checked(mean + std * self._unit(latents, generators), i), mean, std

    def renoise(self, latents: Tensor, i: int, j: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Latents at timesteps[i] taken back to the noisier timesteps[j] by the forward process, j <= i."""
        now, to = (self.times(k, len(latents)) for k in (i, j))
        return self.adapter.process.diffused(latents, now, to, self._unit(latents, generators))

    def _unit(self, latents: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        drawn = [torch.randn(latents.shape[1:], generator=each) for each in generators]
        return torch.stack(drawn).to(latents.device)

    @torch.no_grad()
    def plain(
        self,
        latents: Tensor,
        rows: Sequence[int] | None = None,
        start: int = 0,
        end: int | None = None,
        told: Callable[[float], None] | None = None,
    ) -> Tensor:
        """Latents at timesteps[start] taken to timesteps[end] (clean) by deterministic steps, without gradients.

        Args:
            told: called after each step with the share of them that is done.
        """
        end = self.steps if end is None else end
        for i in range(start, end):
            latents = self.step(latents, self.predict(latents, i, rows), i)
            if told:
                told((i + 1 - start) / (end - start))
        return latents

    def checked(self, latents: Tensor, i: int) -> Tensor:
        """The latents themselves. ValueError, with the setting to lower, where they are no longer finite."""
        self._refuse_broken(latents, f"latents are not finite after step {i + 1} of {self.steps}")
        return latents

    def _refuse_broken(self, values: Tensor, what: str) -> None:
        broken = ~torch.isfinite(values).flatten(1).all(1)
        if not broken.any():
            return
        lower = f"lower guidance.{self.lower}, or " if self.lower else ""
        fixes = f"{lower}use a lower guidance_scale, dtype: float32 or more steps, or check the weights"
        raise ValueError(
            f"guidance {self.strategy}: {int(broken.sum())} of {len(values)} {what}, in a batch that begins with "
            f"{self.prompts[0]!r}; {fixes}"
        )

    # ------------------------------------------------------------------------------------------------- pixels

    def pixels(self, latents: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Clean latents decoded to [0, 1]: [n, 3, H, W], or clips [n, 3, F, H, W]; float32, differentiable."""
        for place in self.rows(len(latents), rows):
            self.spent[place].decodes += 1
        parts = [self.adapter.decode(part) for part in latents.split(self.batch_size)]
        pixels = torch.cat(parts).float() / 2 + 0.5
        self._refuse_broken(pixels, "decoded latents are not finite")
        return pixels.clamp(0, 1)

    @torch.no_grad()
    def reward(self, rewards: Rewards, latents: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Decodes and scores clean latents [n, ...]: [n], float64, on the CPU."""
        places, found = self.rows(len(latents), rows), []
        for start in range(0, len(latents), self.batch_size):
            part = places[start : start + self.batch_size]
            pixels = self.pixels(latents[start : start + self.batch_size], part)
            found.append(rewards.scores(pixels, [self.prompts[row] for row in part], part))
        return torch.cat(found)


def _take(condition: Condition, rows: list[int]) -> Condition:
    index = torch.tensor(rows)
    return {name: value[index.to(value.device)] for name, value in condition.items()}


def candidate_seed(seed: int, number: int) -> int:
    """The seed of a request's candidate: its own for number 0, then others that depend on seed and number alone.

    They are seeds like any others: plain sampling with one draws the same picture.
    """
    if number == 0:
        return seed
    digest = hashlib.sha256(f"candidate\x1f{seed}\x1f{number}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


@torch.no_grad()
def begin(
    adapter: Adapter,
    prompts: list[str],
    seeds: list[int],
    sampling: Any,
    strategy: str = "plain",
    lower: str | None = None,
) -> Denoising:
    """Encodes the prompts of a batch for sampling with these settings.

    Args:
        sampling: steps, guidance_scale, negative_prompt, height, width, frames and batch_size, as
            `mmalign.jobs.Sampling` has them.
    """
    adapter.denoiser.requires_grad_(False).eval()
    negative_prompt = sampling.negative_prompt or ""
    embedded, scale = adapter.guiding(sampling.guidance_scale, bool(negative_prompt))
    own = adapter.default_size()
    height, width = sampling.height or own[0], sampling.width or own[1]
    shape = adapter.latent_shape(height, width, sampling.frames or adapter.frames)
    sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).expand(len(prompts), -1)
    away = [negative_prompt] * len(prompts)
    return Denoising(
        adapter, prompts, seeds, shape, scale, embedded,
        condition=adapter.add_size(adapter.encode_prompt(prompts), sizes),
        negative=adapter.add_size(adapter.encode_negative(away), sizes) if scale > 1 else None,
        timesteps=timesteps(adapter, sampling.steps, shape), batch_size=sampling.batch_size, strategy=strategy,
        lower=lower,
    )  # fmt: skip


def timesteps(adapter: Adapter, steps: int, shape: tuple[int, ...]) -> Tensor:
    """The checkpoint's own timesteps for N steps, and the end: [N + 1], noisy to clean.

    For eps and v those of DDIM with the spacing of the checkpoint's scheduler; diffusers' DDIM takes its steps to
    t - T // N, which is the next of them wherever N divides T and the spacing is not linspace. For a flow the sigmas of
    the Euler scheduler with the checkpoint's shift.

    Raises:
        ValueError: more steps than the schedule has timesteps.
    """
    import diffusers

    own = adapter.pipe.scheduler.config
    if adapter.process.alphas_cumprod is not None:
        total = len(adapter.process.alphas_cumprod)
        discrete = _scheduler(diffusers.DDIMScheduler, own)
        if steps < total:
            discrete.set_timesteps(steps)
        if steps >= total or int(discrete.timesteps.max()) >= total:
            raise ValueError(f"steps: {steps} do not fit a schedule of {total} timesteps; use fewer")
        last = adapter.process.clean if discrete.config.set_alpha_to_one else 0
        return torch.tensor([*discrete.timesteps.tolist(), last])
    shift = own.get("flow_shift") or own.get("shift") or 1.0
    euler = _scheduler(diffusers.FlowMatchEulerDiscreteScheduler, own, shift=shift)
    options: dict[str, Any] = {"sigmas": np.linspace(1.0, 1 / steps, steps)} if adapter.even_sigmas else {}
    if euler.config.use_dynamic_shifting:
        wanted = adapter.shift(shape)
        options["mu"] = wanted if euler.config.time_shift_type == "linear" else math.log(wanted)
    euler.set_timesteps(steps, **options)
    found: Tensor = euler.sigmas.float()
    return found


def _scheduler(kind: Any, own: Mapping[str, Any], **changes: Any) -> Any:
    """A scheduler with what it knows of another's settings; `from_config` would warn of each that it does not know."""
    known = inspect.signature(kind.__init__).parameters
    return kind(**{**{name: value for name, value in own.items() if name in known}, **changes})
