"""The first blocks of a denoiser as a feature extractor: the real modules are run, and stopped after the K-th block.

Nothing of a family is written again here: its adapter calls its denoiser, and what the K-th block says of the picture
is caught on the way, so patch, time and text embeddings, packing and masks are those of the pretrained model.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

LISTS = ("transformer_blocks", "blocks")
"""What diffusers' transformers call their blocks."""


class _Reached(Exception):
    """Ends a call of the denoiser once the wanted states are there."""

    def __init__(self, hidden: Tensor):
        super().__init__("the last wanted block has been run")
        self.hidden = hidden


class _Stop(nn.Module):
    """Stands where a block was cut off; knows what that block's arguments were called."""

    def __init__(self, names: tuple[str, ...]):
        super().__init__()
        self.names = names


def is_unet(denoiser: nn.Module) -> bool:
    return hasattr(denoiser, "down_blocks")


def stages(denoiser: Any) -> list[nn.Module]:
    """The blocks of a denoiser in the order in which they run.

    Of a UNet the down blocks and the middle one; of a transformer its blocks, and with two kinds (FLUX, HunyuanVideo)
    the double ones and then the single ones.

    Raises:
        ValueError: it has none of these.
    """
    if is_unet(denoiser):
        return [*denoiser.down_blocks, denoiser.mid_block]
    for name in LISTS:
        if hasattr(denoiser, name):
            return [*getattr(denoiser, name), *getattr(denoiser, "single_transformer_blocks", ())]
    raise ValueError(
        f"{type(denoiser).__name__} has neither down_blocks nor {' nor '.join(LISTS)} to take the first of"
    )


def most_blocks(denoiser: nn.Module) -> int:
    """How many blocks can be kept: of a transformer all but the last, before which the others are caught."""
    return len(stages(denoiser)) - (0 if is_unet(denoiser) else 1)


def check_blocks(denoiser: nn.Module, blocks: int) -> None:
    """ValueError unless that many of its blocks can be kept."""
    most = most_blocks(denoiser)
    if blocks > most:
        raise ValueError(
            f"reward.latent.blocks is {blocks}, and of this {type(denoiser).__name__} at most {most} can be kept; use "
            f"{most} or fewer"
        )


def states(adapter: Any, denoiser: Any, blocks: int, noisy: Tensor, t: Tensor, condition: Mapping[str, Any]) -> Tensor:
    """What the first blocks say of noisy latents [B, C, ...] at timesteps t [B]: [B, N, D], N tokens or places.

    Args:
        denoiser: the adapter's own, whole or as `cut` leaves it, or another of its architecture.
        condition: as `adapter.predict` takes it.
    """
    with _caught(denoiser, blocks):
        try:
            adapter.predict(noisy, t, condition, denoiser=denoiser)
        except _Reached as reached:
            hidden = reached.hidden
        else:
            raise AssertionError(f"{type(denoiser).__name__} did not run its block {blocks}")
    if hidden.ndim > 3:  # a UNet's [B, C, h, w], of clips [B * F, C, h, w]
        hidden = hidden.flatten(2).transpose(1, 2)
    return hidden.reshape(len(noisy), -1, hidden.shape[-1])


@contextmanager
def _caught(denoiser: Any, blocks: int) -> Iterator[None]:
    """Inside, a call of the denoiser raises `_Reached` after its first blocks."""
    every = stages(denoiser)
    if is_unet(denoiser):  # its blocks give [B, C, h, w], the down blocks with what they hand across
        handle = every[blocks - 1].register_forward_hook(_after)
    else:  # blocks differ in what they return and in which order; what the next one is given has a name
        handle = every[blocks].register_forward_pre_hook(_before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _after(module: nn.Module, given: Any, out: Any) -> None:
    raise _Reached(out[0] if isinstance(out, tuple) else out)


def _before(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    names = module.names if isinstance(module, _Stop) else _names(module)
    raise _Reached({**dict(zip(names, given, strict=False)), **named}["hidden_states"])


def _names(block: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(block.forward).parameters)


def cut(denoiser: Any, blocks: int) -> Any:
    """A copy of a denoiser without what comes after its first blocks; hooks of the original are not in it.

    Raises:
        ValueError: see `check_blocks`.
    """
    check_blocks(denoiser, blocks)
    after = [*stages(denoiser)[blocks:], *getattr(denoiser, "up_blocks", ())]
    # What a deep copy finds in its memo it takes from there, so the blocks after the last one are never copied.
    copied = copy.deepcopy(denoiser, {id(block): _Stop(_names(block)) for block in after})
    copied.__dict__.pop("forward", None)  # guidance away from another model puts its own here
    for module in copied.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return copied
