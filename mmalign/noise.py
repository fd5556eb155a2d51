"""Parameterisations of a diffusion process, and seeded randomness that does not depend on the batch.

Shapes: latents [B, C, H, W] (any trailing dims), timesteps `t` [B]: int64 in [0, T) for eps and v, float in [0, 1] for
flow, where 0 is clean.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Parameterisation = Literal["eps", "v", "flow"]
Density = Literal["uniform", "logit_normal"]


def generator(*identity: object) -> torch.Generator:
    """A CPU generator seeded by what it is for (say run seed, pair, draw).

    Draws made this way are the same whatever batch, process or device they are used in, and after a resume.
    """
    digest = hashlib.sha256("\x1f".join(map(str, identity)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True, eq=False)
class Process:
    """x_t = signal(t) x_0 + noise(t) eps, and what the model predicts of it.

    `kind`: eps, the noise (DDPM 2006.11239); v = signal eps - noise x_0 (2202.00512, appendix D); flow, the velocity
    eps - x_0 of the straight line (2209.03003; 2403.03206, section 3).
    `alphas_cumprod`: abar [T] of eps and v, where signal = sqrt(abar) and noise = sqrt(1 - abar); None for flow, where
    signal = 1 - t and noise = t.
    """

    kind: Parameterisation
    alphas_cumprod: Tensor | None = None

    @property
    def clean(self) -> int | float:
        """The timestep of clean latents, for `step`."""
        return 0.0 if self.alphas_cumprod is None else -1

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """signal(t) and noise(t), shaped to multiply `like`; float32 or better. Timestep -1 is clean for eps and v."""
        shape = (-1, *[1] * (like.ndim - 1))
        if self.alphas_cumprod is None:
            t = t.to(like.device, torch.promote_types(like.dtype, torch.float32)).reshape(shape)
            return 1 - t, t
        table = self.alphas_cumprod.to(like.device, torch.promote_types(self.alphas_cumprod.dtype, torch.float32))
        t = t.to(like.device)
        abar = torch.where(t >= 0, table[t.clamp(min=0)], 1.0).reshape(shape)
        return abar.sqrt(), (1 - abar).sqrt()

    def noisy(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Latents at timestep t."""
        signal, spread = self.scales(t, latents)
        return signal * latents + spread * noise

    def target(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the model is to predict at t."""
        if self.kind == "eps":
            return noise
        if self.kind == "flow":
            return noise - latents
        signal, spread = self.scales(t, latents)
        return signal * noise - spread * latents

    def to_x0_eps(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise that a prediction implies at t."""
        signal, spread = self.scales(t, noisy)
        if self.kind == "eps":
            return (noisy - spread * prediction) / signal, prediction
        if self.kind == "flow":
            return noisy - spread * prediction, noisy + signal * prediction
        return signal * noisy - spread * prediction, signal * prediction + spread * noisy

    def implied_noise(self, noisy: Tensor, latents: Tensor, t: Tensor) -> Tensor:
        """The noise that would have led from clean latents to `noisy` at t: (x_t - signal x_0) / noise(t)."""
        signal, spread = self.scales(t, noisy)
        return (noisy - signal * latents) / spread

    def step(self, noisy: Tensor, prediction: Tensor, t: Tensor, to: Tensor) -> tuple[Tensor, Tensor]:
        """One deterministic step to the timesteps `to` [B], either way; the new latents and the x_0 estimate.

        DDIM (2010.02502, equation 12 with eta 0) for eps and v, an Euler step of the flow; `clean` ends at x_0, and a
        step to a larger t is the inversion.
        """
        x0, eps = self.to_x0_eps(noisy, prediction, t)
        signal, spread = self.scales(to, noisy)
        return (signal * x0 + spread * eps).to(noisy.dtype), x0

    def inverse_step(self, clean: Tensor, prediction: Tensor, at: Tensor, to: Tensor) -> Tensor:
        """What `step` from `to` [B] would have led to `clean` at the timesteps `at` < `to`, had the model predicted
        `prediction` there: the exact inverse of `step(x, prediction, to, at)`, linear in its arguments.

        For eps and flow this is a step in the other direction; for v it is not, since v means x_0 and eps by t.
        """
        (a, s), (b, r) = self.scales(at, clean), self.scales(to, clean)  # signal and noise at the ends
        if self.kind == "flow":
            return clean + (r - s) * prediction
        if self.kind == "eps":
            return b * (clean - s * prediction) / a + r * prediction
        return (clean + (a * r - s * b) * prediction) / (a * b + s * r)

    def diffused(self, noisy: Tensor, at: Tensor, to: Tensor, noise: Tensor) -> Tensor:
        """A draw of q(x_to | x_at) for to > at: more of the process' own noise (2107.00630, appendix A).

        x_to = (b / a) x_at + sqrt(r^2 - (b / a)^2 s^2) noise, with signals a, b and noises s, r at the two ends. What
        was distributed as the process says at `at` is so at `to`.
        """
        (a, s), (b, r) = self.scales(at, noisy), self.scales(to, noisy)
        spread = (r.square() - (b / a * s).square()).clamp(min=0).sqrt()
        return b / a * noisy + spread * noise

    def ancestral_std(self, at: Tensor, to: Tensor, like: Tensor) -> Tensor:
        """Standard deviation of q(x_at | x_to, x_0), shaped to multiply `like` (2107.00630, appendix A; at < to)."""
        (a, s), (b, r) = self.scales(at, like), self.scales(to, like)
        variance = s.square() / r.square() * (r.square() - (b / a).square() * s.square())
        return variance.clamp(min=0).sqrt()

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio (signal / noise)^2 at t: [B]."""
        signal, spread = self.scales(t, torch.empty(len(t), device=t.device))
        return (signal / spread).square()

    def sample_timesteps(
        self,
        count: int,
        generator: torch.Generator,
        *,
        density: Density | None = None,
        mean: float = 0.0,
        std: float = 1.0,
        shift: float = 1.0,
        low: float = 0.0,
        high: float = 1.0,
        within: tuple[float, float] = (0.0, 1.0),
    ) -> Tensor:
        """Timesteps [count] on the CPU, drawn by a density of u in (0, 1), the share of the schedule.

        Args:
            density: uniform (eps and v by default), or logit_normal: sigmoid of a Gaussian with `mean` and `std`
                (2403.03206, section 3.1; flow by default).
            shift: of flow times, see `shifted`.
            low, high: the draw is scaled to this part of the schedule.
            within: flow times [a, b) that it is conditioned on, shift included; with b = 1 this is part of it too.

        Raises:
            ValueError: no time that could be drawn is within.
        """
        if density is None:
            density = "logit_normal" if self.kind == "flow" else "uniform"
        if within != (0.0, 1.0):
            assert self.kind == "flow"
            u = _conditioned(count, generator, density, mean, std, shift, (low, high), within)
            first, last = (torch.tensor(bound, dtype=torch.float32) for bound in within)
            end = torch.nextafter(last, first) if within[1] < 1 else last
            return shifted(u, shift).float().clamp(max(first.item(), 1e-4), end.item())
        whole = (low, high) == (0.0, 1.0)
        if self.alphas_cumprod is not None and density == "uniform" and whole:
            return torch.randint(0, len(self.alphas_cumprod), (count,), generator=generator)
        if density == "uniform":
            u = torch.rand(count, generator=generator, dtype=torch.float64)
        else:
            u = torch.randn(count, generator=generator, dtype=torch.float64).mul(std).add(mean).sigmoid()
        u = low + (high - low) * u
        if self.alphas_cumprod is not None:
            return (u * len(self.alphas_cumprod)).long().clamp(max=len(self.alphas_cumprod) - 1)
        return shifted(u, shift).float().clamp(1e-4, 1.0)


def shifted(t: Tensor, shift: float) -> Tensor:
    """Flow times moved towards the noise: s t / (1 + (s - 1) t) (2403.03206, equation 23). s = 1 changes nothing."""
    return shift * t / (1 + (shift - 1) * t)


def _conditioned(
    count: int, generator: torch.Generator, density: Density, mean: float, std: float, shift: float,
    scaled: tuple[float, float], within: tuple[float, float],
) -> Tensor:  # fmt: skip
    """Shares of the schedule [count], float64, whose shifted times lie within; by the inverse of the distribution."""
    low, high = scaled
    times = torch.tensor(within, dtype=torch.float64)
    ends = ((times / (shift - (shift - 1) * times) - low) / (high - low)).clamp(0, 1)
    if density == "logit_normal":
        ends = torch.special.ndtr((ends.logit() - mean) / std)
    if not ends[0] < ends[1]:
        raise ValueError(
            f"timesteps.low {low:g} and high {high:g} leave no time between {within[0]:g} and {within[1]:g}, which is "
            "the part of the schedule that this model is for; drop them"
        )
    q = ends[0] + (ends[1] - ends[0]) * torch.rand(count, generator=generator, dtype=torch.float64)
    u = torch.special.ndtri(q).mul(std).add(mean).sigmoid() if density == "logit_normal" else q
    return low + (high - low) * u


def dynamic_shift(tokens: int, scheduler: dict[str, float | str]) -> float:
    """The shift of a scheduler with use_dynamic_shifting for a picture of `tokens` transformer tokens.

    A line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift) gives mu, as diffusers'
    pipelines compute it; time_shift_type exponential means s = e^mu, linear s = mu.
    """

    def number(name: str, default: float) -> float:
        return float(scheduler.get(name, default))

    first, last = number("base_image_seq_len", 256), number("max_image_seq_len", 4096)
    low, high = number("base_shift", 0.5), number("max_shift", 1.15)
    mu = low + (high - low) * (tokens - first) / (last - first)
    return mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu)
