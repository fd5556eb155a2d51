"""A small UMT classifier in the published layout, and an independent float64 one, for the tests of what runs it."""

import math

import numpy as np
import torch

FILE = "l16_ptk710_ftk710_ftk400_f16_res224.pth"
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def published(width=1024, layers=24, patch=16, hidden=4096, classes=400):
    """The file's names and shapes, from the authors' code (single_modality/models/modeling_finetune.py)."""
    keys = {
        "patch_embed.proj.weight": (width, 3, 1, patch, patch),
        "patch_embed.proj.bias": (width,),
        "fc_norm.weight": (width,),
        "fc_norm.bias": (width,),
        "head.weight": (classes, width),
        "head.bias": (classes,),
    }
    for layer in range(layers):
        name = f"blocks.{layer}"
        keys |= {f"{name}.{norm}.{part}": (width,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
        keys |= {
            f"{name}.attn.q_bias": (width,),
            f"{name}.attn.v_bias": (width,),
            f"{name}.attn.qkv.weight": (3 * width, width),
            f"{name}.attn.proj.weight": (width, width),
            f"{name}.attn.proj.bias": (width,),
            f"{name}.mlp.fc1.weight": (hidden, width),
            f"{name}.mlp.fc1.bias": (hidden,),
            f"{name}.mlp.fc2.weight": (width, hidden),
            f"{name}.mlp.fc2.bias": (width,),
        }
    return keys


def random_state(seed=0, scale=0.08, **sizes):
    """Weights large enough that a wrong norm, bias or activation shows."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in published(**({"width": 128, "layers": 2, "patch": 56, "hidden": 320} | sizes)).items():
        noise = torch.randn(shape, generator=generator) * (scale if len(shape) > 1 else 0.3)
        state[name] = 1 + noise if "norm" in name and name.endswith("weight") else noise
    return state


def umt_file(folder, seed=0, name=FILE, dtype=torch.float32, changes=(), **sizes):
    """Random weights, saved as published; (path, the tensors in float64 as the file has them)."""
    state = {key: value.to(dtype) for key, value in (random_state(seed, **sizes) | dict(changes)).items()}
    torch.save(state, folder / name)
    return folder / name, {key: value.double() for key, value in state.items()}


def table(frames, side, width):
    """Positions [frames, side, side, width] in float64 from the definition; sides other than 14 are not made here."""
    assert side == 14
    grid = np.empty((8, 14, 14, width))
    for place in range(8 * 196):
        for column in range(width):
            angle = place / 10000 ** (2 * (column // 2) / width)
            value = math.sin(angle) if column % 2 == 0 else math.cos(angle)
            grid[place // 196, place % 196 // 14, place % 14, column] = value
    if frames == 8:
        return grid
    result = np.empty((frames, 14, 14, width))
    for time in range(frames):
        where = max((time + 0.5) * 8 / frames - 0.5, 0.0)
        low = min(int(where), 7)
        share, high = where - low, min(low + 1, 7)
        result[time] = (1 - share) * grid[low] + share * grid[high]
    return result


def norm(x, state, name):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def logits(squares, state, places, heads=2):
    """Logits of one clip: squares uint8 [T, S, S, 3], places float64 [T, n, n, width]; patch by patch."""
    patch = state["patch_embed.proj.weight"].shape[-1]
    rows = []
    for time, square in enumerate(squares):
        pixels = (square / 255.0 - MEAN) / STD
        for row in range(pixels.shape[0] // patch):
            for column in range(pixels.shape[1] // patch):
                part = pixels[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].transpose(2, 0, 1)
                weight = state["patch_embed.proj.weight"][:, :, 0].flatten(1)
                token = weight @ torch.from_numpy(part.copy()).flatten() + state["patch_embed.proj.bias"]
                rows.append(token + torch.as_tensor(places[time][row][column]).double())
    x = torch.stack(rows)
    count, width = x.shape
    layers = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    for layer in range(layers):
        name = f"blocks.{layer}"
        y = norm(x, state, f"{name}.norm1") @ state[f"{name}.attn.qkv.weight"].T
        q, k, v = y.split(width, dim=-1)
        q, v = q + state[f"{name}.attn.q_bias"], v + state[f"{name}.attn.v_bias"]
        q, k, v = (part.reshape(count, heads, -1).transpose(0, 1) for part in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(width // heads)).softmax(dim=-1)
        y = (weights @ v).transpose(0, 1).reshape(count, width)
        x = x + y @ state[f"{name}.attn.proj.weight"].T + state[f"{name}.attn.proj.bias"]
        y = norm(x, state, f"{name}.norm2") @ state[f"{name}.mlp.fc1.weight"].T + state[f"{name}.mlp.fc1.bias"]
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        x = x + y @ state[f"{name}.mlp.fc2.weight"].T + state[f"{name}.mlp.fc2.bias"]
    return norm(x.mean(dim=0), state, "fc_norm") @ state["head.weight"].T + state["head.bias"]


def slow_resize(image, height, width):
    """OpenCV's 8-bit bilinear resize, pixel by pixel: uint8 [H, W, 3] -> uint8 [height, width, 3]."""
    old_height, old_width = image.shape[:2]
    if (old_height, old_width) == (height, width):
        return image
    result = np.empty((height, width, 3), np.uint8)
    if old_height == 2 * height and old_width == 2 * width:
        for y in range(height):
            for x in range(width):
                result[y, x] = (image[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].astype(int).sum((0, 1)) + 2) // 4
        return result

    def at(place, old, new):
        where = np.float32((place + 0.5) * (1.0 / (new / old)) - 0.5)
        low = math.floor(where)
        return low, np.float32(where - np.float32(low))

    def weights(share):
        return int(np.rint((np.float32(1) - share) * np.float32(2048))), int(np.rint(share * np.float32(2048)))

    for y in range(height):
        low, share = at(y, old_height, height)
        above, below = weights(share)
        upper, lower = (image[min(max(row, 0), old_height - 1)].astype(int) for row in (low, low + 1))
        for x in range(width):
            first, share = at(x, old_width, width)
            if first < 0:
                first, share = 0, np.float32(0)
            if first >= old_width - 1:
                first, share = old_width - 1, np.float32(0)
            one, two = weights(share)
            second = min(first + 1, old_width - 1)
            a = (upper[first] * one + upper[second] * two) >> 4
            b = (lower[first] * one + lower[second] * two) >> 4
            result[y, x] = ((a * above >> 16) + (b * below >> 16) + 2) >> 2
    return result
