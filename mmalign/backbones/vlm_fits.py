"""Whether checkpoints of vision-language models and of rewards on them fit, from the headers of their files alone.

A model of 15 GB is checked on the meta device: the network takes no memory, and its weights are not read. Names are
translated by the loaders' own code. Where names and shapes depend on another folder, such as a base model's config,
the checks look where `mmalign weights fetch` puts it, and say so where it is not there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.backbones.multi_tap import BACKBONE, HEAD
from mmalign.backbones.qwen2_vl import linear_head, ranknet_head
from mmalign.backbones.qwen2_vl_checkpoint import EMBEDDINGS, current_names, merge_lora
from mmalign.backbones.qwen2_vl_config import build_reward, read_config
from mmalign.backbones.qwen2_vl_text import add_reward_tokens, tokenizer_files
from mmalign.backbones.vlm_loading import check_report, model_folder
from mmalign.progress import quiet_transformers
from mmalign.weights import fetched, load_into
from mmalign.weights_read import BAD_CONFIG, first_line

__all__ = ["check_class", "check_config", "check_folder", "check_multi_tap", "check_reward"]


VLMS = "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"


def check_folder(state: Mapping[str, Tensor], file: Path, kinds: str = VLMS) -> None:
    """Whether the tensors of a folder are those of the model that its config.json describes.

    Args:
        state: names to tensors on the meta device.
        file: config.json.
        kinds: what transformers calls its table of configs and models of this kind.

    Raises:
        ValueError: transformers has no such model, or missing, unexpected or mis-shaped tensors, all named.
    """
    _check_model(state, file.parent, str(file.parent), kinds)


def _check_model(state: Mapping[str, Tensor], folder: Path, origin: str, kinds: str = VLMS) -> None:
    import transformers

    check_class(lambda config: getattr(transformers, kinds)[type(config)], state, folder, origin)


def check_class(kind_of: Callable[[Any], Any], state: Mapping[str, Tensor], folder: Path, origin: str) -> None:
    """Whether tensors are those of a class of transformers as a folder's config.json describes it.

    Args:
        kind_of: the config -> the class.
        state: names to tensors on the meta device.
        origin: where they are from, for the message.

    Raises:
        ValueError: as `check_folder`.
    """
    from transformers import AutoConfig

    model_folder(folder, "config", weights=False)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        kind = kind_of(config)
        with quiet_transformers():
            _, report = kind.from_pretrained(
                None,
                config=config,
                state_dict=dict(state),
                dtype=torch.float32,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                local_files_only=True,
            )
    except BAD_CONFIG as error:
        raise ValueError(f"{folder}: transformers builds no model of its config.json ({first_line(error)}).") from None
    check_report(report, origin)


def check_multi_tap(state: Mapping[str, Tensor], file: Path, *bases: str) -> str:
    """Whether MULTI-TAP's tensors are a head, and a backbone as the config of one of these known weights describes it.

    Args:
        state: names to tensors on the meta device.
        file: for the message.
        bases: keys of `mmalign.known_weights.KNOWN`, the first that was fetched is taken.

    Returns:
        What was left unchecked and why; empty where nothing was.

    Raises:
        ValueError: tensors of neither part; missing, unexpected or mis-shaped ones, all named.
    """
    strangers = [name for name in state if not name.startswith((BACKBONE, HEAD))]
    if strangers:
        raise ValueError(f"{file}: {strangers[0]} is neither {BACKBONE}* nor {HEAD}*, as MULTI-TAP's tensors are.")
    head = {name.removeprefix(HEAD): value for name, value in state.items() if name.startswith(HEAD)}
    weight = head.get("weight")
    with torch.device("meta"):
        expected = nn.Linear(weight.shape[-1] if weight is not None and weight.ndim == 2 else 1, 1)
    load_into(expected, head, f"{file} ({HEAD}*)", assign=True)
    base = next((fetched(known) for known in bases if (fetched(known) / "config.json").is_file()), None)
    if base is None:
        return f"those of the backbone are not checked: `mmalign weights fetch {bases[0]}` gets the config they follow"
    backbone = {name.removeprefix(BACKBONE): value for name, value in state.items() if name.startswith(BACKBONE)}
    _check_model(backbone, base, f"{file} ({BACKBONE}*)")
    return ""


def check_reward(state: Mapping[str, Tensor], file: Path, base: str, head: str, *tokens: str) -> str:
    """Whether a reward on Qwen2-VL has the names and shapes of its base's config, adapters merged as the loader does.

    Args:
        state: names to tensors on the meta device.
        file: for the message.
        base: a key of `mmalign.known_weights.KNOWN` whose folder has config.json and a tokeniser.
        head: ``ranknet`` (HPSv3's) or ``linear`` (VideoReward's, of one or three outputs).
        tokens: reward tokens behind the base's vocabulary.

    Returns:
        What was left unchecked and why; empty where nothing was.

    Raises:
        ValueError: as `current_names`, `merge_lora`, `read_config`, `build_reward` and `load_into`; or no embeddings
            for the reward tokens.
    """
    folder, origin = fetched(base), str(file)
    if not (folder / "config.json").is_file():
        return f"not checked: `mmalign weights fetch {base}` gets the config that they follow"
    plain = current_names(state, origin)
    ranks = [value.shape[0] for name, value in plain.items() if ".lora_A." in name]
    if ranks:
        try:
            plain = merge_lora(plain, 1.0, ranks[0], rslora=False, origin=origin, dtype=torch.float32)
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"{origin}: an adapter does not fit its weight ({first_line(error)}).") from None
    config = read_config(folder)
    _, ids = add_reward_tokens(folder, tokens)
    rows = plain[EMBEDDINGS].shape[0] if EMBEDDINGS in plain else 0
    if 0 < rows <= max(ids):
        raise ValueError(f"{origin}: has embeddings for {rows} tokens, but the reward tokens have the ids {ids}.")
    config.text_config.vocab_size = rows or config.text_config.vocab_size
    outputs = plain["rm_head.weight"].shape[0] if "rm_head.weight" in plain else 1
    top = ranknet_head if head == "ranknet" else functools.partial(linear_head, outputs=outputs if outputs == 3 else 1)
    load_into(build_reward(folder, config, top, ids), plain, origin, assign=True)
    return ""


def check_config(state: Mapping[str, Tensor], file: Path) -> None:
    """Whether a folder's config.json is Qwen2-VL's and a tokeniser lies beside it.

    Raises:
        ValueError: as `read_config` and `tokenizer_files`.
    """
    read_config(file.parent)
    tokenizer_files(file.parent)
