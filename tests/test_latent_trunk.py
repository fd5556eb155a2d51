"""What is caught of a denoiser's first blocks, in every family, and the head on it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from latent_kit import MAKERS, given, loaded, maker
from torch import Tensor, nn

from mmalign.backbones.latent_reward import LatentHead, share
from mmalign.backbones.latent_trunk import cut, most_blocks, stages, states
from mmalign.jobs_reward import Latent
from mmalign.noise import Process


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return maker(tmp_path_factory)


def whole_run(adapter: Any, blocks: int, noisy: Tensor, t: Tensor, condition: Any) -> Tensor:
    """The same states from a whole call, by a hook that ends nothing: what the next block was given."""
    denoiser, seen = adapter.denoiser, []
    unet = hasattr(denoiser, "down_blocks")
    names = ["hidden_states"]
    if unet:
        every = [*denoiser.down_blocks, denoiser.mid_block]
        handle = every[blocks - 1].register_forward_hook(
            lambda _, args, out: seen.append(out if isinstance(out, Tensor) else out[0])
        )
    else:
        name = "blocks" if hasattr(denoiser, "blocks") else "transformer_blocks"
        every = list(getattr(denoiser, name)) + list(getattr(denoiser, "single_transformer_blocks", []))

        def look(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen.append(named[names[0]] if names[0] in named else args[0])

        handle = every[blocks].register_forward_pre_hook(look, with_kwargs=True)
    adapter.predict(noisy, t, condition)
    handle.remove()
    (found,) = seen
    if unet and len(found) > len(noisy):  # frames as a batch: a clip's tokens stand together
        found = found.unflatten(0, (len(noisy), -1)).transpose(1, 2)
    return found.flatten(2).transpose(1, 2) if unet else found


# ------------------------------------------------------------------------------------------------------- the trunk


@pytest.mark.parametrize("family", MAKERS)
def test_states_are_those_of_the_whole_denoiser(family: str, folders: Any) -> None:
    """The cut copy gives what the pipeline's own call has after the K-th block, for every K, and is no larger."""
    adapter = loaded(folders(family))
    asked = given(adapter)
    for blocks in range(1, most_blocks(adapter.denoiser) + 1):
        trunk = cut(adapter.denoiser, blocks)
        with torch.no_grad():
            found = states(adapter, trunk, blocks, *asked)
            shared = states(adapter, adapter.denoiser, blocks, *asked)
            wanted = whole_run(adapter, blocks, *asked)
        assert found.shape == wanted.shape and found.shape[0] == 2
        torch.testing.assert_close(found, wanted)
        assert torch.equal(found, shared)
        left = sum(p.numel() for p in trunk.parameters())
        gone = sum(p.numel() for stage in stages(adapter.denoiser)[blocks:] for p in stage.parameters())
        gone += sum(p.numel() for p in getattr(adapter.denoiser, "up_blocks", nn.Identity()).parameters())
        assert left == sum(p.numel() for p in adapter.denoiser.parameters()) - gone


def test_the_denoiser_itself_is_as_it_was(folders: Any) -> None:
    """Neither a look at its states nor a cut copy leaves a hook or takes a block away."""
    adapter = loaded(folders("sd3"))
    noisy, t, condition = given(adapter)
    with torch.no_grad():
        before = adapter.predict(noisy, t, condition)
        states(adapter, adapter.denoiser, 1, noisy, t, condition)
        cut(adapter.denoiser, 1)
        assert torch.equal(adapter.predict(noisy, t, condition), before)


def test_too_many_blocks_are_refused(folders: Any) -> None:
    adapter = loaded(folders("sd3"))
    with pytest.raises(ValueError, match="blocks is 2, and of this SD3Transformer2DModel at most 1"):
        cut(adapter.denoiser, 2)


@pytest.mark.parametrize("family", ["sd3", "sd", "pixart"])
def test_checkpointing_changes_no_gradient(family: str, folders: Any) -> None:
    """Activations computed twice, with a call that ends early: the same gradients, and no hooks left in autograd."""
    adapter = loaded(folders(family))
    noisy, t, condition = given(adapter)
    found = []
    for again in (False, True):
        trunk = cut(adapter.denoiser, 1).requires_grad_(True).train()
        if again:
            trunk.enable_gradient_checkpointing()
        latents = noisy.clone().requires_grad_(True)
        hidden = states(adapter, trunk, 1, latents, t, condition)
        after = (latents * 2).sum()  # would be saved in a broken frame, were one left open
        (hidden.square().mean() + after).backward()
        found.append([latents.grad, *(p.grad for p in stages(trunk)[0].parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 5
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_gradient_by_latents_against_finite_differences(folders: Any) -> None:
    """Central differences in float64, along a few directions, for an eps UNet and a flow transformer."""
    for family in ("sd", "sd3"):
        adapter = loaded(folders(family))
        adapter.denoiser.double()
        noisy, t, condition = given(adapter, 1)
        noisy, condition = noisy.double(), {k: v.double() for k, v in condition.items()}
        torch.manual_seed(0)

        def value(x: Tensor, adapter: Any = adapter, t: Tensor = t, condition: Any = condition) -> Tensor:
            hidden = states(adapter, adapter.denoiser, 1, x, t, condition)
            return torch.tanh(hidden).mean()

        x = noisy.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(value(x), x)
        for seed in range(3):
            way = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            step = 1e-5
            with torch.no_grad():
                slope = (value(noisy + step * way) - value(noisy - step * way)) / (2 * step)
            assert slope.item() == pytest.approx((gradient * way).sum().item(), rel=1e-5)


# -------------------------------------------------------------------------------------------------------- the head


def test_head_knows_the_time_and_pools_as_said() -> None:
    """Against the same formula written out in float64; mean pooling does not see the order of tokens."""
    torch.manual_seed(0)
    when = torch.tensor([0.1, 0.7])
    hidden = torch.randn(2, 5, 8)
    for pooling in ("mean", "attention"):
        head = LatentHead(Latent(pooling=pooling, hidden=(6,)), 8, 3)
        nn.init.normal_(head.time[2].weight, std=0.3)
        head.standard.mean.normal_()
        head.standard.deviation.uniform_(0.5, 2)
        found = head(hidden, when)
        w = {name: value.detach().double().numpy() for name, value in head.state_dict().items()}
        for b in range(2):
            x = hidden[b].double().numpy()
            x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
            x = x.mean(0, keepdims=True) if pooling == "mean" else x
            time = when[b].double().item()
            mean, deviation = (
                np.array([np.interp(time, np.linspace(0, 1, 9), w[f"standard.{of}"][:, d]) for d in range(8)])
                for of in ("mean", "deviation")
            )
            x = (x - mean) / deviation
            angle = math.pi * time * np.logspace(0, 6, 16, base=2)
            told = np.concatenate([np.sin(angle), np.cos(angle)])
            h = told @ w["time.0.weight"].T + w["time.0.bias"]
            scale, shift = np.split((h / (1 + np.exp(-h))) @ w["time.2.weight"].T + w["time.2.bias"], 2)
            for i in range(3):
                pooled = x[0]
                if pooling == "attention":
                    e = np.exp(x @ w["query"][i])
                    pooled = (e / e.sum()) @ x
                h = (pooled * (1 + scale) + shift) @ w["map.0.weight"].T + w["map.0.bias"]
                h = h * 0.5 * (1 + np.array([math.erf(z / math.sqrt(2)) for z in h]))
                out = h @ w["map.2.weight"].T + w["map.2.bias"]
                assert found[b, i].item() == pytest.approx(out[i], abs=1e-4)
        torch.testing.assert_close(head(hidden.flip(1), when), found, atol=1e-5, rtol=1e-5)


def test_share_of_the_schedule() -> None:
    discrete = Process("eps", torch.linspace(0.99, 0.01, 1000))
    assert share(discrete, torch.tensor([0, 999])).tolist() == [0.0, 1.0]
    assert share(Process("flow"), torch.tensor([0.0, 0.25])).tolist() == [0.0, 0.25]
