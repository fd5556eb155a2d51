"""MUSIQ once more, one picture at a time in float64: patches cut by loops, padding tokens masked, no shortcuts."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from mmalign.backbones.musiq import MusiqConfig, build_musiq

TINY = MusiqConfig(stem=32, patch_width=64, width=12, mlp=20, layers=2)


def published(config=None):
    """Names and shapes of the checkpoint's tensors, by rule."""
    c = config or MusiqConfig()
    shapes = {"conv_root.weight": (c.stem, 3, 7, 7), "gn_root": c.stem, "embedding": (c.width, c.patch_width * 64)}
    for name, out, kernel in (("1", c.stem, 1), ("2", c.stem, 3), ("3", c.patch_width, 1), ("_proj", c.patch_width, 1)):
        shapes |= {f"block1.conv{name}.weight": (out, c.stem, kernel, kernel), f"block1.gn{name}": out}
    encoder = "transformer_encoder."
    shapes |= {
        f"{encoder}posembed_input.position_emb": (1, c.grid**2, c.width),
        f"{encoder}scaleembed_input.scale_emb": (3, c.width),
        f"{encoder}cls": (1, 1, c.width),
        f"{encoder}encoder_norm": c.width,
    }
    for i in range(c.layers):
        at = f"{encoder}transformer.encoderblock_{i}."
        shapes |= {f"{at}norm1": c.width, f"{at}norm2": c.width}
        shapes |= {f"{at}attention.{name}": (c.width, c.width) for name in ("query", "key", "value", "out")}
        shapes |= {f"{at}mlp.fc1": (c.mlp, c.width), f"{at}mlp.fc2": (c.width, c.mlp)}
    shapes["head"] = (1, c.width)
    whole = {}
    for name, shape in shapes.items():
        if name.endswith((".weight", "_emb", ".cls")):
            whole[name] = shape
        else:
            whole[f"{name}.weight"] = shape if isinstance(shape, tuple) else (shape,)
            whole[f"{name}.bias"] = (shape[0],) if isinstance(shape, tuple) else (shape,)
    return whole


def random_state(config=TINY, seed=0):
    """Weights large enough that a wrong norm, mask or place changes the rating visibly."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in build_musiq(config).state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        norm = any(part in name for part in ("gn", "norm")) and name.endswith("weight")
        scale = 1 / math.sqrt(value.shape[1]) if value.ndim == 2 and "emb" not in name else 0.5
        state[name] = 1 + 0.3 * noise if norm else scale * noise
    return state


def kernel(x, a=-0.75):
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resizing(old, new, cubic):
    """[new, old] float64: what each old sample gives each new one; half-pixel centres, the edge repeated."""
    matrix = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        if not cubic:
            centre = max(centre, 0.0)
        below = math.floor(centre)
        for j in range(below - 1, below + 3):
            weight = kernel(centre - j) if cubic else max(0.0, 1 - abs(centre - j))
            matrix[i, min(max(j, 0), old - 1)] += weight
    return matrix


def resize(image, size, cubic):
    """[3, h, w] -> [3, *size]."""
    down, across = (resizing(old, new, cubic) for old, new in zip(image.shape[-2:], size, strict=True))
    return down @ image @ across.T


def same(array, kernel_size, stride):
    """Zero padding of [..., h, w] as TensorFlow's SAME."""
    around = []
    for side in array.shape[-2:]:
        total = max((math.ceil(side / stride) - 1) * stride + kernel_size - side, 0)
        around.append((total // 2, total - total // 2))
    return np.pad(array, [(0, 0)] * (array.ndim - 2) + around)


def cut(image, grid):
    """Patches [n, 3, 32, 32] and cells [n] of [3, h, w]."""
    padded = same(image, 32, 32)
    rows, columns = padded.shape[1] // 32, padded.shape[2] // 32
    patches, cells = [], []
    for r in range(rows):
        for c in range(columns):
            patches.append(padded[:, 32 * r : 32 * r + 32, 32 * c : 32 * c + 32])
            cells.append((r * grid // rows) * grid + c * grid // columns)
    return np.stack(patches), np.array(cells)


def convolve(x, weight, stride=1):
    flat = weight.reshape(len(weight), -1)
    spread = flat.std(axis=1, ddof=1)
    flat = (flat - flat.mean(1, keepdims=True)) / (spread[:, None] + 1e-5)
    x = torch.from_numpy(same(x, weight.shape[-1], stride))
    return F.conv2d(x, torch.from_numpy(flat.reshape(weight.shape)), stride=stride).numpy()


def group_norm(x, weight, bias, eps):
    n, c, h, w = x.shape
    groups = x.reshape(n, 32, -1)
    groups = (groups - groups.mean(2, keepdims=True)) / np.sqrt(groups.var(2, keepdims=True) + eps)
    return groups.reshape(n, c, h, w) * weight[:, None, None] + bias[:, None, None]


def layer_norm(x, s, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * s[f"{name}.weight"] + s[f"{name}.bias"]


def linear(x, s, name):
    return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def stem(patches, s):
    def block(x, name, eps=1e-4, at="block1."):
        return group_norm(x, s[f"{at}gn{name}.weight"], s[f"{at}gn{name}.bias"], eps)

    x = convolve(patches, s["conv_root.weight"], 2)
    x = np.maximum(block(x, "_root", 1e-6, ""), 0)
    padded = same(x, 3, 2)
    x = np.stack([padded[..., i : i + 15 : 2, j : j + 15 : 2] for i in range(3) for j in range(3)]).max(0)
    y = np.maximum(block(convolve(x, s["block1.conv1.weight"]), "1"), 0)
    y = np.maximum(block(convolve(y, s["block1.conv2.weight"]), "2"), 0)
    y = block(convolve(y, s["block1.conv3.weight"]), "3")
    y = np.maximum(y + block(convolve(x, s["block1.conv_proj.weight"]), "_proj"), 0)
    return linear(y.transpose(0, 2, 3, 1).reshape(len(y), -1), s, "embedding")


def attend(x, mask, s, at, heads=6):
    n, width = x.shape
    q, k, v = (linear(x, s, f"{at}{name}").reshape(n, heads, -1) for name in ("query", "key", "value"))
    q, k, v = (each.transpose(1, 0, 2) for each in (q, k, v))  # [heads, n, d]
    logits = q @ k.transpose(0, 2, 1) / math.sqrt(width // heads)
    logits = np.where((mask[:, None] * mask[None]) == 0, -1e3, logits)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return linear((weights @ v).transpose(1, 0, 2).reshape(n, width), s, f"{at}out")


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def rate(image, state, grid=10, layers=2):
    """[3, h, w] in [0, 1] -> the rating, with the padding tokens that batches of mixed sizes have."""
    s = {name: value.double().numpy() for name, value in state.items()}
    image = (np.asarray(image, np.float64) - 0.5) * 2
    height, width = image.shape[1:]
    tokens, mask = [], []
    for scale, longer in enumerate((224, 384, None)):
        ratio = longer / max(height, width) if longer else None
        copy = resize(image, (round(height * ratio), round(width * ratio)), cubic=True) if longer else image
        patches, cells = cut(copy, grid)
        x = stem(patches, s)
        more = (longer // 32) ** 2 - len(x) if longer else 0
        blank = stem(np.zeros((1, 3, 32, 32)), s).repeat(more, 0)
        cells = np.concatenate([cells, np.zeros(more, int)])
        x = np.concatenate([x, blank]) + s["transformer_encoder.posembed_input.position_emb"][0, cells]
        # Padding tokens carry the first scale's embedding; they are masked.
        scales = np.array([scale] * (len(x) - more) + [0] * more)
        tokens.append(x + s["transformer_encoder.scaleembed_input.scale_emb"][scales])
        mask += [1] * (len(x) - more) + [0] * more
    x = np.concatenate([s["transformer_encoder.cls"][0], *tokens])
    mask = np.array([1, *mask])
    for i in range(layers):
        at = f"transformer_encoder.transformer.encoderblock_{i}."
        x = x + attend(layer_norm(x, s, f"{at}norm1"), mask, s, f"{at}attention.")
        y = gelu(linear(layer_norm(x, s, f"{at}norm2"), s, f"{at}mlp.fc1"))
        x = x + linear(y, s, f"{at}mlp.fc2")
    return float(linear(layer_norm(x[0], s, "transformer_encoder.encoder_norm"), s, "head")[0])
