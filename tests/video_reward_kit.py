"""VideoReward on small clips, and what it should give by the stock forward in float64."""

import numpy as np
import torch
import torchvision.transforms.functional as TF
from qwen2_vl_kit import (
    NORM,
    PROMPTS,
    VIDEO_TEXT,
    stock_hidden,
)
from transformers import Qwen2VLProcessor, Qwen2VLVideoProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mmalign.backbones.qwen2_vl_text import add_reward_tokens
from mmalign.discovery import load_evaluator
from mmalign.evaluation import Batch

TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
SHAPES = [(4, 60, 90), (6, 252, 420), (4, 420, 252), (2, 33, 120), (4, 60, 90)]


def clips_of(shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (t, 3, h, w), dtype=torch.uint8, generator=generator) for t, h, w in shapes]


def score(params, clips, prompts=PROMPTS):
    return load_evaluator("video_reward", params, "cpu").score(Batch(frames=clips, prompts=list(prompts)))


def reference(base, model, clips, prompts, positions="sequential"):
    """Hidden states [B, 3, D] in float64, item by item: torchvision's resize, transformers' processor and forward."""
    tokenizer, ids = add_reward_tokens(base, TOKENS)
    size = {"shortest_edge": 128 * 28 * 28, "longest_edge": 448 * 448}
    videos = Qwen2VLVideoProcessor(size=size)
    processor = Qwen2VLProcessor(Qwen2VLImageProcessorPil(), tokenizer, videos, chat_template=tokenizer.chat_template)
    rows = []
    for clip, prompt in zip(clips, prompts, strict=True):
        content = [{"type": "video"}, {"type": "text", "text": VIDEO_TEXT.replace("{text_prompt}", prompt)}]
        chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        grid = videos([clip], return_tensors="pt", cap_pixels_per_frame=False)["video_grid_thw"][0]
        new = [int(side) * 14 for side in grid[1:]]
        # The authors resize with torchvision's plain function, before the processor, which then leaves the size.
        resized = TF.resize(clip, new, interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
        inputs = processor(text=[chat], videos=[resized], return_tensors="pt", videos_kwargs={"do_resize": False})
        rows.append(stock_hidden(model, inputs, ids, "video", positions))
    return np.stack(rows)


def expected_scores(hidden, head, norm=NORM):
    """The head [out, D], the diagonal and the z-scores in numpy."""
    raw = np.einsum("bkd,od->bko", hidden, head)
    raw = np.stack([raw[:, axis, axis if len(head) == 3 else 0] for axis in range(3)], axis=1)
    if norm:
        raw = np.stack(
            [(raw[:, i] - norm[f"{axis}_mean"]) / norm[f"{axis}_std"] for i, axis in enumerate(("VQ", "MQ", "TA"))], 1
        )
    return {"VQ": raw[:, 0], "MQ": raw[:, 1], "TA": raw[:, 2], "Overall": raw.sum(1)}


def same(found, expected, tolerance=2e-5):
    assert list(found) == ["VQ", "MQ", "TA", "Overall"]
    for name, values in expected.items():
        assert found[name].dtype == torch.float32
        np.testing.assert_allclose(found[name].numpy(), values, rtol=tolerance, atol=tolerance, err_msg=name)
