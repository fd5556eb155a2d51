"""An independent vision transformer for tests, in numpy's float64, and small checkpoints in DINO's layout."""

import math
from itertools import pairwise

import numpy as np
import torch
from clip_reference import cubic
from scipy.special import erf

IMAGENET = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
SMALL = {"width": 128, "depth": 2, "hidden": 192, "patch": 16, "grid": 14}


def vit_keys(width=768, depth=12, hidden=3072, patch=16, grid=14):
    """DINO's ViT as its authors' class names it (vision_transformer.py, without a head): name -> shape."""
    keys = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid * grid, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for block in range(depth):
        name = f"blocks.{block}"
        keys |= {f"{name}.{norm}.{part}": (width,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
        keys |= {f"{name}.attn.qkv.weight": (3 * width, width), f"{name}.attn.qkv.bias": (3 * width,)}
        keys |= {f"{name}.attn.proj.weight": (width, width), f"{name}.attn.proj.bias": (width,)}
        keys |= {f"{name}.mlp.fc1.weight": (hidden, width), f"{name}.mlp.fc1.bias": (hidden,)}
        keys |= {f"{name}.mlp.fc2.weight": (width, hidden), f"{name}.mlp.fc2.bias": (width,)}
    return keys


def random_state(keys, seed=0, scale=0.15):
    """Tensors large enough that a wrong norm, position or activation shows; norms are about 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in keys.items():
        noise = torch.randn(shape, generator=generator) * (0.03 if "patch_embed" in name else scale)
        norm = name.endswith("weight") and any(part in name for part in ("norm", "pos_drop"))
        state[name] = 1 + noise if norm else noise * (4 if name == "pos_embed" else 1)
    return state


def dino_file(folder, seed=0, **sizes):
    state = random_state(vit_keys(**{**SMALL, **sizes}), seed)
    torch.save(state, folder / "dino_vitbase16_pretrain.pth")
    return state


def bilinear(image, height, width):
    """[H, W, 3] float64 without a filter, halves of pixels aligned, borders repeated."""

    def matrix(old, new):
        result = np.zeros((new, old))
        for i in range(new):
            place = max((i + 0.5) * old / new - 0.5, 0.0)
            low = min(int(place), old - 1)
            result[i, low] += 1 - (place - low)
            result[i, min(low + 1, old - 1)] += place - low
        return result

    rows, columns = matrix(image.shape[0], height), matrix(image.shape[1], width)
    return np.einsum("jw,iwc->ijc", columns, np.einsum("ih,hwc->iwc", rows, image, optimize=True), optimize=True)


def _axis(grid, new):
    """[new, grid]: Keys' kernel, a = -0.75, at the points that the factor (new + 0.1) / grid gives."""
    matrix = np.zeros((new, grid))
    for i in range(new):
        place = (i + 0.5) * grid / (new + 0.1) - 0.5
        start = math.floor(place)
        for j in range(start - 1, start + 3):
            matrix[i, min(max(j, 0), grid - 1)] += cubic(place - j, -0.75)
    return matrix


def positions(learned, rows, columns, square):
    """[1 + rows * columns, D] of [1 + grid * grid, D], as DINO interpolates."""
    grid = math.isqrt(len(learned) - 1)
    if rows * columns == grid * grid and square:
        return learned
    table = learned[1:].reshape(grid, grid, -1)
    table = np.einsum("ri,cj,ijd->rcd", _axis(grid, rows), _axis(grid, columns), table, optimize=True)
    return np.concatenate([learned[:1], table.reshape(rows * columns, -1)])


def gelu(x):
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


def quick_gelu(x):
    return x / (1 + np.exp(-1.702 * x))


def layer_norm(x, state, name, epsilon):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def tokens(pixels, state, *, epsilon=1e-6, activation=gelu, pre_norm=None):
    """What leaves the last block: normalised pixels float64 [H, W, 3] -> [1 + patches, D].

    Args:
        state: names to tensors.
        pre_norm: name of the layer norm before the first block.
    """
    state = {name: np.asarray(value, dtype=np.float64) for name, value in state.items()}
    kernel = state["patch_embed.proj.weight"]
    width, patch = kernel.shape[0], kernel.shape[-1]
    rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
    cut = pixels[: rows * patch, : columns * patch].reshape(rows, patch, columns, patch, 3)
    x = np.einsum("ryxcd,odyc->rxo", cut.transpose(0, 1, 2, 3, 4), kernel, optimize=True)
    x = x.reshape(rows * columns, width) + state["patch_embed.proj.bias"]
    x = np.concatenate([state["cls_token"][0], x])
    x = x + positions(state["pos_embed"][0], rows, columns, pixels.shape[0] == pixels.shape[1])
    if pre_norm is not None:
        x = layer_norm(x, state, pre_norm, epsilon)
    depth, heads = len({name.split(".")[1] for name in state if name.startswith("blocks.")}), width // 64
    for block in range(depth):
        name = f"blocks.{block}"
        y = layer_norm(x, state, f"{name}.norm1", epsilon)
        y = y @ state[f"{name}.attn.qkv.weight"].T + state[f"{name}.attn.qkv.bias"]
        query, key, value = y.reshape(len(x), 3, heads, 64).transpose(1, 2, 0, 3)
        weights = query @ key.transpose(0, 2, 1) / 8
        weights = np.exp(weights - weights.max(-1, keepdims=True))
        y = (weights / weights.sum(-1, keepdims=True) @ value).transpose(1, 0, 2).reshape(len(x), width)
        x = x + y @ state[f"{name}.attn.proj.weight"].T + state[f"{name}.attn.proj.bias"]
        y = layer_norm(x, state, f"{name}.norm2", epsilon)
        y = activation(y @ state[f"{name}.mlp.fc1.weight"].T + state[f"{name}.mlp.fc1.bias"])
        x = x + y @ state[f"{name}.mlp.fc2.weight"].T + state[f"{name}.mlp.fc2.bias"]
    return x


def unit(vector):
    return vector / np.linalg.norm(vector)


def dino_feature(pixels, state):
    """Unit-length class token after the last norm, of pixels float64 [H, W, 3] in 0 to 1."""
    values = tokens((pixels - IMAGENET[0]) / IMAGENET[1], state)
    plain = {name: np.asarray(value, dtype=np.float64) for name, value in state.items()}
    return unit(layer_norm(values[0], plain, "norm", 1e-6))


def likeness(one, other):
    return max(0.0, float(one @ other))


def consistent(features):
    """VBench's consistency, frame by frame."""
    total = 0.0
    for before, feature in pairwise(features):
        total += (likeness(before, feature) + likeness(features[0], feature)) / 2
    return total / (len(features) - 1)


def resembling(features, image):
    """VBench++'s measure of a clip and its input image."""
    conformity = [likeness(image, feature) for feature in features]
    steps = [likeness(before, feature) for before, feature in pairwise(features)]
    return 0.4 * max(conformity) + 0.3 * sum(steps) / len(steps) + 0.3 * min(steps)


def clip_of(frames, height, width, seed=0):
    """A smooth random clip, uint8 [T, 3, H, W]: a picture that drifts and changes a little from frame to frame."""
    generator = np.random.default_rng(seed)
    coarse = generator.uniform(0, 255, (frames + 1, 3, 4, 5))
    mixed = [coarse[0] * (1 - 0.1 * t) + coarse[t + 1] * 0.1 * t for t in range(frames)]
    clip = torch.nn.functional.interpolate(torch.tensor(np.stack(mixed)), size=(height, width), mode="bilinear")
    noise = torch.from_numpy(generator.uniform(-20, 20, (frames, 3, height, width)))
    return (clip + noise).clamp(0, 255).to(torch.uint8)
