"""Tiny models of every family that answers are tuned for, beside those of `vlm_kit`; pictures to go with them."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    Qwen2Config,
)
from vlm_kit import FAMILIES as SCORED
from vlm_kit import LLAVA_CHAT, MAKERS, _text, byte_tokenizer, llama_tokenizer, randomise

from mmalign import train
from mmalign.config import build
from mmalign.jobs import TrainConfig
from mmalign.media import write_image

FAMILIES = (*SCORED, "qwen3_vl", "llava_next", "internvl", "gemma3")
SEVERAL = tuple(name for name in FAMILIES if name not in ("llava",))

GEMMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) }}"
    "{{ '\n' }}{% for part in m.content %}{% if part.type == 'image' %}{{ '<start_of_image>' }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
INTERNVL_CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}"
    "{% if part.type == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif part.type == 'video' %}{{ '<video>\n' }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _llava_next():
    tokenizer = llama_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7
    )
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    config = LlavaNextConfig(
        vision_config=vision, text_config=LlamaConfig(**_text(tokenizer)), image_grid_pinpoints=pinpoints,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
    )
    processor = LlavaNextProcessor(
        images, tokenizer, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA_CHAT,
    )  # fmt: skip
    return LlavaNextForConditionalGeneration(config), processor


def _internvl():
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    tokens = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    tokenizer = byte_tokenizer(special, "<|im_end|>", pad_token="<|endoftext|>", model_specific_special_tokens=tokens)
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": [28, 28], "patch_size": [7, 7],
    }  # fmt: skip
    config = InternVLConfig(
        vision_config=vision, text_config=Qwen2Config(**_text(tokenizer)), image_seq_length=4,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )  # fmt: skip
    size = {"height": 28, "width": 28}
    images = GotOcr2ImageProcessor(size=size, min_patches=1, max_patches=3, crop_to_patches=True)
    processor = InternVLProcessor(
        images, tokenizer, InternVLVideoProcessor(size=size), image_seq_length=4, chat_template=INTERNVL_CHAT
    )
    return InternVLForConditionalGeneration(config), processor


def _gemma3(window=8, softcap=None):
    special = ("<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>",
               "<image_soft_token>")  # fmt: skip
    tokens = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = byte_tokenizer(
        special, "<end_of_turn>", pad_token="<pad>", bos_token="<bos>", model_specific_special_tokens=tokens
    )
    ids = tokenizer.convert_tokens_to_ids
    text = _text(tokenizer, head_dim=8, sliding_window=window, layer_types=["sliding_attention", "full_attention"],
                 final_logit_softcapping=softcap, query_pre_attn_scalar=8)  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 7, "vision_use_head": False,
    }  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=ids("<image_soft_token>"),
        boi_token_index=ids("<start_of_image>"), eoi_token_index=ids("<end_of_image>"),
    )  # fmt: skip
    images = Gemma3ImageProcessor(size={"height": 28, "width": 28})
    return Gemma3ForConditionalGeneration(config), Gemma3Processor(
        images, tokenizer, chat_template=GEMMA_CHAT, image_seq_length=4
    )


ALL_MAKERS = {
    **MAKERS,
    "llava_next": _llava_next,
    "internvl": _internvl,
    "gemma3": _gemma3,
    "gemma3_capped": lambda: _gemma3(softcap=2.0),
}


def mllm_folder(path, family, seed=0):
    """Save a tiny model of this family with its processor, and return the folder."""
    model, processor = ALL_MAKERS[family]()
    randomise(model, seed)
    model.generation_config = GenerationConfig(
        eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id
    )
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return Path(path)


def picture(size=(40, 50), seed=0):
    """uint8 [3, H, W] of noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)


def write_rows(folder, count=5, images=(1,), scale=1, **columns):
    """A table of pairs in TRL's columns with pictures of several sizes; `columns`: lists of further ones."""
    lines = []
    for i in range(count):
        names = [f"{i}-{j}.png" for j in range(images[i % len(images)])]
        for j, name in enumerate(names):
            size = (scale * (40 + 6 * i), scale * (50 + 9 * j))
            write_image(folder / name, picture(size, seed=10 * i + j).permute(1, 2, 0).numpy())
        row = {
            "images": names,
            "prompt": [{"role": "user", "content": ("What is it?", "Is it red? Say so.", "Why?")[i % 3]}],
            "chosen": [{"role": "assistant", "content": f"A red circle, {'and ' * (i % 3)}so on."}],
            "rejected": [{"role": "assistant", "content": f"A blue cross, {'or ' * (i % 2)}no more."}],
        }
        lines.append(json.dumps(row | {name: values[i] for name, values in columns.items()}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


def answer_settings(output, model, table, terms=("dpo",), **changes):
    """A config of task mllm; `changes` of nested keys are written as optim__lr."""
    wanted = {
        "task": "mllm", "output": str(output), "model": {"path": str(model)},
        "data": {"table": str(table), "cache_dir": str(Path(output).parent / "cache")},
        "loss": {"kind": "mllm", "terms": [{"kind": term} if isinstance(term, str) else term for term in terms]},
        "lora": {"rank": 2}, "optim": {"steps": 4, "batch_size": 2, "lr": 1e-3}, "device": "cpu",
        "log": {"trackers": [], "memory": False}, "checkpoint": {"every": 1},
    }  # fmt: skip
    for name, value in changes.items():
        block, _, key = name.partition("__")
        if key:
            wanted[block] = {**(wanted.get(block) or {}), key: value}
        else:
            wanted[block] = value
    return build(TrainConfig, wanted, "test", [])


def stopped_and_resumed(config, after=2):
    """A run that is stopped after a step, as by Ctrl-C, and gone on with."""
    kept = train.Loop._housekeeping

    def stop(loop, interrupted):
        kept(loop, interrupted)
        if loop.step == after:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Loop, "_housekeeping", stop)
        train.run(config)
    return train.run(config, resume=True)
