"""A small ViCLIP in the published layout, and an independent float64 one, for the tests of what runs it."""

import clip_reference as reference
import numpy as np
import torch
from clip_kit import open_clip_keys
from scorer_kit import randomise

from mmalign.backbones.viclip import ViClipModel, ViClipSizes

FILE = "ViClip-InternVid-10M-FLT.pth"
TINY = ViClipSizes(
    image_size=28, patch_size=14, vision_width=128, vision_layers=2, text_width=64, text_layers=2, embed_dim=24
)


def published(width, layers, text_width, text_layers, embed, tokens, patch=14, frames=8):
    """The file's names and shapes, from InternVid's code (viclip.py, viclip_vision.py, viclip_text.py)."""
    keys = {}
    for name, shape in open_clip_keys(width, layers, text_width, text_layers, embed, tokens, patch, 32).items():
        if name.startswith("visual."):
            keys[f"vision_encoder.{name.removeprefix('visual.')}"] = shape
        elif name != "logit_scale":
            keys[f"text_encoder.{name}"] = shape
    keys["vision_encoder.conv1.weight"] = (width, 3, 1, patch, patch)
    keys["vision_encoder.temporal_positional_embedding"] = (1, frames, width)
    return keys | {"temp": ()}


def viclip_file(folder, sizes=TINY, seed=0, name=FILE, scale=0.15, wrapped=True):
    """Random weights, saved as published; (path, the tensors in float64)."""
    state = randomise(ViClipModel(sizes), seed, scale).state_dict()
    torch.save({"model": state} if wrapped else state, folder / name)
    return folder / name, {key: value.double() for key, value in state.items()}


def clips_of(shapes, seed=0):
    """Random clips uint8 [T, 3, H, W]; shapes are (T, H, W)."""
    generator = np.random.default_rng(seed)
    return [torch.from_numpy(generator.integers(0, 256, (t, 3, h, w), dtype=np.uint8)) for t, h, w in shapes]


def square(frame, size):
    """uint8 [H, W, 3] -> what VBench gives the tower, float64 levels [size, size, 3]."""
    height, width = frame.shape[:2]
    long = int(size * max(height, width) / min(height, width))
    new = (size, long) if height <= width else (long, size)
    levels = frame.astype(np.float64)
    if min(height, width) != size:
        levels = np.rint(reference.resize(levels, *new, antialias=False).clip(0, 255))
    top, left = (round((side - size) / 2) for side in new)
    return levels[top : top + size, left : left + size]


def video_features(clip, state, size=28, patch=14, heads=2):
    """Unit features of a clip uint8 [T, 3, H, W] of the tower's number of frames, patch by patch in float64."""
    side, rows = size // patch, []
    for time, frame in enumerate(clip.permute(0, 2, 3, 1).numpy()):
        pixels = (square(frame, size) / 255 - reference.MEAN) / reference.STD
        for place in range(side * side):
            top, left = patch * (place // side), patch * (place % side)
            part = torch.from_numpy(pixels[top : top + patch, left : left + patch].transpose(2, 0, 1).copy())
            token = (state["vision_encoder.conv1.weight"][:, :, 0] * part).sum(dim=(1, 2, 3))
            token = token + state["vision_encoder.positional_embedding"][1 + place]
            rows.append(token + state["vision_encoder.temporal_positional_embedding"][0, time])
    first = state["vision_encoder.class_embedding"] + state["vision_encoder.positional_embedding"][0]
    tower = {key.removeprefix("vision_encoder."): value for key, value in state.items()}
    x = reference.layer_norm(torch.stack([first, *rows])[None], tower, "ln_pre")
    for layer in range(2):
        x = reference.block(x, tower, f"transformer.resblocks.{layer}", heads, quick=True)
    found = reference.layer_norm(x[:, 0], tower, "ln_post") @ tower["proj"]
    return (found / found.norm())[0]


def text_features(prompt, state, heads=1):
    """Unit features of a prompt, its tokens cut to 30 between the two that begin and end it."""
    from open_clip.tokenizer import SimpleTokenizer

    ids = [49406, *SimpleTokenizer().encode(prompt)[:30], 49407]
    tower = {key.removeprefix("text_encoder."): value for key, value in state.items() if key.startswith("text")}
    x = torch.stack([tower["token_embedding.weight"][token] for token in ids])[None]
    x = x + tower["positional_embedding"][: len(ids)]
    mask = torch.full((len(ids), len(ids)), -np.inf, dtype=torch.float64).triu(1)
    for layer in range(2):
        x = reference.block(x, tower, f"transformer.resblocks.{layer}", heads, quick=True, mask=mask)
    found = reference.layer_norm(x[:, -1], tower, "ln_final") @ tower["text_projection"]
    return (found / found.norm())[0]
