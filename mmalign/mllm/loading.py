"""A vision-language model to be trained: loaded, cut into parts, with adapters or whole; and its frozen reference."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmalign.backbones.vlm_loading import check_processor, load_parts, model_folder, unreadable, vlm_files
from mmalign.backbones.vlm_lora import adapter_files
from mmalign.jobs import Lora
from mmalign.jobs_mllm import Mllm
from mmalign.records import nearest
from mmalign.weights import files_hash, read_state_dict
from mmalign.weights_read import BAD_CONFIG

LANGUAGE = ("language_model", "text_model")
PROJECTOR = frozenset({
    "multi_modal_projector", "connector", "merger", "deepstack_merger_list", "image_newline"
})  # fmt: skip
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear layer of the language models of these families."""


def load(
    folder: str | Path, settings: Mllm, dtype: torch.dtype, device: torch.device, *, from_scratch: bool = False,
    seed: int = 0,
) -> tuple[Any, Any]:  # fmt: skip
    """The model on the device, and its processor.

    Args:
        from_scratch: random weights from `seed` for the folder's config.json; its processor is the folder's.

    Raises:
        ValueError: no such folder, or one whose parts do not fit; what bitsandbytes needs is not here.
    """
    attention: dict[str, Any] = {"attn_implementation": settings.attention}
    if from_scratch:
        model, processor = _new(folder, dtype, attention, seed)
        return model.to(device), processor
    quantised = _quantisation(settings.quantise, dtype, device)
    try:
        model, processor = load_parts(folder, dtype, any_logits=True, **attention, **quantised)
    except ImportError as error:
        raise ValueError(f"mllm.attention: {settings.attention} cannot be used here: {error}") from error
    return model if quantised else model.to(device), processor


def _new(folder: str | Path, dtype: torch.dtype, attention: dict[str, Any], seed: int) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    path = model_folder(folder, weights=False)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(path, **local)
        processor = AutoProcessor.from_pretrained(path, **local)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype, trust_remote_code=False, **attention)
    except BAD_CONFIG as error:
        raise unreadable(str(path), error) from error
    check_processor(processor, path)
    return model, processor


def _quantisation(kind: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    if kind == "none":
        return {}
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"mllm.quantise: {kind} needs bitsandbytes; install it with `pip install bitsandbytes`, or use none"
        ) from error
    from transformers import BitsAndBytesConfig

    told = (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        | {"bnb_4bit_compute_dtype": dtype}
        if kind == "4bit"
        else {"load_in_8bit": True}
    )
    return {"quantization_config": BitsAndBytesConfig(**told), "device_map": {"": str(device)}}


def identity(folder: str | Path) -> str:
    """SHA-256 of the files that decide what the model of a folder says."""
    found = files_hash(vlm_files(folder))
    assert found is not None
    return found


def processor_identity(folder: str | Path) -> str:
    """SHA-256 of the files that decide what the processor of a folder makes of a row."""
    found = files_hash(vlm_files(folder, weights=False))
    assert found is not None
    return found


def ends(model: Any) -> tuple[int, ...]:
    """Ids of the tokens that end an answer, by the generation config, else the text config."""
    for config in (model.generation_config, model.config.get_text_config(), model.config):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, list | tuple) else (int(found),)
    return ()


def media_ids(config: Any) -> frozenset[int]:
    """Ids of the tokens that stand for a feature of an image or clip."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    return frozenset(int(getattr(config, name)) for name in names if getattr(config, name, None) is not None)


# ----------------------------------------------------------------------------------------------------- what is trained


def part_of(name: str) -> str:
    """Which part a parameter or module belongs to, by its name: "language", "projector" or "vision"."""
    words = name.split(".")
    if any(word in LANGUAGE for word in words[:2]) or words[0] == "lm_head":
        return "language"
    return "projector" if PROJECTOR & set(words) else "vision"


TRAINED = {
    "frozen": frozenset({"language"}),
    "projector": frozenset({"language", "projector"}),
    "trained": frozenset({"language", "projector", "vision"}),
}


def make_trainable(model: Any, vision: str, lora: Lora | None, seed: int, checkpointing: bool) -> None:
    """Adds adapters to the parts that `mllm.vision` names, or makes these parts trainable; trained weights are float32.

    Raises:
        ValueError: a LoRA target is no linear layer of these parts.
    """
    model.requires_grad_(False)
    parts = TRAINED[vision]
    if lora:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.add_adapter(_lora_config(model, parts, lora))
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of(name) in parts)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    for name, module in model.named_modules():
        if name and part_of(name) not in parts and not any(p.requires_grad for p in module.parameters()):
            module.eval()


def begin_from(model: Any, folder: Path) -> None:
    """Gives the adapters that `make_trainable` added the weights of a LoRA's folder.

    Raises:
        ValueError: no adapter there, or one of other places or another rank.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    _, file = adapter_files(folder, "lora.init")
    given = {name.removeprefix("base_model.model."): value for name, value in read_state_dict(file).items()}
    own = get_peft_model_state_dict(model, adapter_name="default")
    unlike = sorted(
        name for name in own.keys() | given.keys()
        if name not in own or name not in given or own[name].shape != given[name].shape
    )  # fmt: skip
    if unlike:
        raise ValueError(
            f"lora.init: {len(unlike)} tensors of {file} are not those of this model and lora, such as {unlike[0]}; "
            "give the same lora.rank, lora.targets and mllm.vision as the run that made it"
        )
    set_peft_model_state_dict(model, {name: value.float() for name, value in given.items()}, adapter_name="default")


def _lora_config(model: Any, parts: frozenset[str], lora: Lora) -> Any:
    from peft import LoraConfig

    linear = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and part_of(name) in parts
    ]
    wanted = lora.targets or TARGETS
    chosen = [name for name in linear if any(f".{name}".endswith(f".{target}") for target in wanted)]
    if lora.targets is None and len(parts) > 1:  # towers and projectors name their layers as they like
        chosen += [name for name in linear if part_of(name) != "language" and name not in chosen]
    for target in lora.targets or ():
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            near = nearest(target, sorted({name.rpartition(".")[2] for name in linear}))
            raise ValueError(f"lora.targets: no linear layer of the trained parts is called {target!r}{near}")
    names = "|".join(re.escape(name) for name in chosen)
    return LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha or lora.rank, lora_dropout=lora.dropout, target_modules=f"({names})",
        init_lora_weights="gaussian", task_type="CAUSAL_LM",
    )  # fmt: skip


def sees_alike(model: Any) -> bool:
    """Whether policy and reference have the same features: nothing outside of the language model is trained."""
    return not any(p.requires_grad for name, p in model.named_parameters() if part_of(name) != "language")


# ---------------------------------------------------------------------------------------------------------- reference


def frozen_copy(model: Any, checkpointing: bool) -> Any:
    """A second model for full fine-tuning, in evaluation mode; frozen modules of vision are the first one's own."""
    memo: dict[int, Any] = {}
    if sees_alike(model):
        base = model.base_model
        memo = {id(child): child for name, child in base.named_children() if name not in LANGUAGE}
    copied = copy.deepcopy(model, memo)
    kept = {id(p) for name, p in model.named_parameters() if memo and part_of(name) != "language"}
    for parameter in copied.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
    if checkpointing:
        copied.gradient_checkpointing_disable()
    return copied.eval()


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """The base model inside, without dropout: as a reference is asked."""
    states = [(module, module.training) for module in model.modules()]
    model.disable_adapters()
    _still(model)
    try:
        yield
    finally:
        model.enable_adapters()
        for module, training in states:
            module.training = training


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; every part's mode is as it was afterwards."""
    modes = {part: part.training for part in module.modules()}
    _still(module)
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _still(model: nn.Module) -> None:
    """Evaluation mode, but for layers that bitsandbytes keeps in 8 bits: on a CPU their inputs are floats in training
    and 8 bits in evaluation, and a policy without its adapter has to be its reference."""
    model.eval()
    for part in model.modules():
        if type(part).__name__ == "Linear8bitLt" and type(part).__module__.startswith("bitsandbytes"):
            part.training = True
