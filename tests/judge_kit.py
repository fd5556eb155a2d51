"""Tiny judges: a language model without images, and lessons for it and for image-text models."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from vlm_kit import byte_tokenizer, randomise

# As published templates of language models: a message's content is one text.
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHORT = "Q: {question}\nA: {answer}"
"""A prompt that a tiny model learns in seconds."""


def text_folder(path, seed=0):
    """A language model with random weights and its tokenizer."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = byte_tokenizer(special, "<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 5, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    randomise(Qwen2ForCausalLM(config), seed, 0.1).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)


def teach_text(folder, lessons, steps=300):
    """Train a folder's language model until it replies so to these texts: (text, reply), and save it again."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = []
    for text, reply in lessons:
        chat = [{"role": "user", "content": text}]
        asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = torch.tensor([tokenizer(asked + reply + tokenizer.eos_token)["input_ids"]])
        labels = ids.clone()
        labels[:, : len(tokenizer(asked)["input_ids"])] = -100
        batch.append((ids, labels))
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = sum(model(input_ids=ids, labels=labels).loss for ids, labels in batch)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if float(loss.detach()) < 0.01:
            break
    assert float(loss.detach()) < 0.05, f"the model did not learn: {float(loss)}"
    model.save_pretrained(folder)
