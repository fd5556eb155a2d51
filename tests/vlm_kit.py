"""Tiny vision-language models: the real classes with small random weights, processors and chat templates, in folders.

Every folder goes through `save_pretrained`, so that its files are named as a published checkpoint's are.
"""

from functools import cache
from pathlib import Path

import torch
from tokenizers import processors
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from mmalign.evaluation import Batch

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "llava", "llava_onevision", "idefics3", "smolvlm")
SEVERAL = tuple(name for name in FAMILIES if name != "llava")
"""Families that read several images at once."""

WORDS = ("Yes", "No", "yes", "no", "Does", "Is", "red", "circle", "Please", "answer", "Final", "Score", "Describe")

# What each family's published template writes, in templates of our own.
QWEN_CHAT = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% for part in m.content %}{% if part.type == 'image' %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAVA_CHAT = (
    "{% for m in messages %}{{ m.role.upper() + ': ' }}{% for part in m.content if part.type == 'image' %}"
    "{{ '<image>\n' }}{% endfor %}{% for part in m.content if part.type == 'text' %}{{ part.text + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ONEVISION_CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' }}{% for part in m.content if part.type == 'image' %}"
    "{{ '<image>' }}{% endfor %}{% for part in m.content if part.type == 'text' %}{{ '\n' + part.text }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IDEFICS_CHAT = (
    "{{ '<|im_start|>' }}{% for m in messages %}{{ m.role | capitalize }}"
    "{{ ':' if m.content[0].type == 'image' else ': ' }}{% for part in m.content %}{% if part.type == 'image' %}"
    "{{ '<image>' }}{% else %}{{ part.text }}{% endif %}{% endfor %}{{ '<end_of_utterance>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def _merges(words):
    pairs = {}
    for word in words:
        for end in range(1, len(word)):
            pairs[word[:end], word[end]] = None
    return list(pairs)


def byte_tokenizer(special, end, words=WORDS, **kwargs):
    """Byte-level pairs, as Qwen's and SmolLM's; `words` are few tokens with and without a space before them."""
    merges = _merges([*("Ġ" + word for word in words), *words])
    entries = [*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges), *special]
    vocab = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    return Qwen2Tokenizer(
        vocab=vocab, merges=merges, extra_special_tokens=list(special), eos_token=end, model_max_length=8192, **kwargs
    )


def llama_tokenizer():
    """Pieces with a leading space and a fallback to bytes, as LLaMA's, every text begun with <s>."""
    merges = _merges(["▁" + word for word in WORDS])
    entries = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    vocab = {e: i for i, e in enumerate(dict.fromkeys([*entries, *("".join(pair) for pair in merges)]))}
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, extra_special_tokens=["<image>", "<pad>"], pad_token="<pad>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return tokenizer


def _text(tokenizer, **kwargs):
    # Published vocabularies have more rows than their tokenizers have tokens.
    return {
        "vocab_size": len(tokenizer) + 5, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192,
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, **kwargs,
    }  # fmt: skip


def _qwen(kind):
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
               "<|video_pad|>")  # fmt: skip
    tokenizer = byte_tokenizer(special, "<|im_end|>", pad_token="<|endoftext|>", padding_side="left")
    ids = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    vision = {"depth": 2, "num_heads": 2}
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens = {key: ids(f"<|{name}|>") for key, name in zip(keys, names, strict=True)}
    text = _text(tokenizer, rope_parameters=rope)
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 12}
    if kind == 3:
        text |= {"head_dim": 8}
        vision |= {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "deepstack_visual_indexes": [0],
                   "patch_size": 14, "num_position_embeddings": 16}  # fmt: skip
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **tokens))
        video = Qwen3VLVideoProcessor(size=size, patch_size=14)
        return model, Qwen3VLProcessor(Qwen2VLImageProcessor(size=size), tokenizer, video, chat_template=QWEN_CHAT)
    if kind == 2.5:
        vision |= {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "fullatt_block_indexes": [1],
                   "window_size": 56}  # fmt: skip
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))
    else:
        vision |= {"embed_dim": 16, "hidden_size": 32}
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **tokens))
    parts = Qwen2VLImageProcessor(size=size), tokenizer, Qwen2VLVideoProcessor(size=size)
    return model, (Qwen2_5_VLProcessor if kind == 2.5 else Qwen2VLProcessor)(*parts, chat_template=QWEN_CHAT)


def _llava():
    tokenizer = llama_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**_text(tokenizer)), image_seq_length=16,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    images = LlavaImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA_CHAT,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), processor


def _onevision():
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
    tokenizer = byte_tokenizer(special, "<|im_end|>", pad_token="<|endoftext|>")
    ids = tokenizer.convert_tokens_to_ids
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7,
        vision_use_head=False,
    )  # fmt: skip
    pinpoints = [[28 * i, 28 * j] for i in (1, 2) for j in (1, 2, 3)]
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=Qwen2Config(**_text(tokenizer)), image_grid_pinpoints=pinpoints,
        image_token_index=ids("<image>"), video_token_index=ids("<video>"), vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    size = {"height": 28, "width": 28}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints), tokenizer,
        LlavaOnevisionVideoProcessor(size=size), num_image_tokens=16, vision_feature_select_strategy="full",
        chat_template=ONEVISION_CHAT,
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config), processor


def _idefics(model_class, config_class):
    rows = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<image>",
               "<end_of_utterance>", "<global-img>", *rows)  # fmt: skip
    tokenizer = byte_tokenizer(special, "<end_of_utterance>", pad_token="<|im_end|>", bos_token="<|im_start|>")
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 7}  # fmt: skip
    config = config_class(
        vision_config=vision, text_config=LlamaConfig(**_text(tokenizer)), scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    images = Idefics3ImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    return model_class(config), Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=IDEFICS_CHAT)


MAKERS = {
    "qwen2_vl": lambda: _qwen(2),
    "qwen2_5_vl": lambda: _qwen(2.5),
    "qwen3_vl": lambda: _qwen(3),  # a family whose passes are not shared
    "llava": _llava,
    "llava_onevision": _onevision,
    "idefics3": lambda: _idefics(Idefics3ForConditionalGeneration, Idefics3Config),
    # Its own processor needs num2words for videos; Idefics3's writes the same text for images.
    "smolvlm": lambda: _idefics(SmolVLMForConditionalGeneration, SmolVLMConfig),
}


def randomise(model, seed=0, scale=0.25):
    """Weights large enough that a wrong mask, position or image changes the score visibly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator) * scale
            value.copy_(1 + noise if "norm" in name.lower() and name.endswith("weight") else noise)
    return model


def vlm_folder(path, family, seed=0):
    """Save a tiny model of this family with its processor, and return the folder."""
    model, processor = MAKERS[family]()
    randomise(model, seed)
    # As Qwen's: what is left of these would change greedy answers.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, repetition_penalty=1.3, eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )  # fmt: skip
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return Path(path)


@cache
def _double(folder):
    return _load(folder, torch.float64)


def prepared(folder, clip, text):
    """What the folder's processor makes of one text and its images."""
    processor = _double(str(folder))[1]
    bos = processor.tokenizer.bos_token
    kwargs = {"add_special_tokens": not (bos and text.startswith(bos))}
    return processor(
        text=[text], images=[list(clip)], return_tensors="pt", input_data_format="channels_first", **kwargs
    )


def oracle(folder, clip, text):
    """One question in one stock forward pass of the whole model in float64: its inputs, logits [L, V], states [L, D].

    Args:
        clip: uint8 [T, 3, H, W], each frame an image.
        text: with the chat template applied, one placeholder for each frame.
    """
    inputs = prepared(folder, clip, text)
    with torch.no_grad():
        out = _double(str(folder))[0](**inputs, output_hidden_states=True)
    return inputs, out.logits[0], out.hidden_states[-1][0]


def teach(folder, examples, steps=150):
    """Train a folder's model until it answers these questions so: (clip, question, answer), and save it again."""
    model, processor = _load(folder, torch.float32)
    tokenizer = processor.tokenizer
    batch = []
    for clip, question, answer in examples:
        text = _ask(processor, question, len(clip))
        images = [list(clip)]
        kwargs = {"return_tensors": "pt", "input_data_format": "channels_first", "images": images}
        start = processor(text=[text], **kwargs)["input_ids"].shape[1]
        inputs = processor(text=[text + answer + tokenizer.eos_token], **kwargs)
        labels = inputs["input_ids"].clone()
        labels[:, :start] = -100
        batch.append((inputs, labels))
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(steps):
        loss = sum(model(**inputs, labels=labels).loss for inputs, labels in batch)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if float(loss.detach()) < 0.01:
            break
    assert float(loss.detach()) < 0.05, f"the model did not learn: {float(loss)}"
    model.save_pretrained(folder)
    _double.cache_clear()


def _load(folder, dtype):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    return model, AutoProcessor.from_pretrained(folder, local_files_only=True)


def ask(folder, question, images=1):
    """The folder's own chat template around images and a question."""
    return _ask(_double(str(folder))[1], question, images)


def _ask(processor, question, images):
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def clips(sizes, frames=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (frames, 3, *size), dtype=torch.uint8, generator=generator) for size in sizes]


def batch_of(items, prompts):
    still = all(len(clip) == 1 for clip in items)
    return Batch(images=[clip[0] for clip in items] if still else [], frames=list(items), prompts=list(prompts))
