"""An independent CLIP for tests: preprocessing in numpy, towers as plain float64 arithmetic on the authors' tensors.

Written from the papers and the published key layout, sharing no code with open_clip or with the package.
"""

import math

import numpy as np
import torch

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def cubic(x, a):
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resize_matrix(old, new, antialias):
    """[new, old]: Keys' kernel, a = -0.75 with repeated borders, or antialiased a = -0.5, widened, renormalised."""
    matrix = np.zeros((new, old))
    step = old / new
    for i in range(new):
        centre = (i + 0.5) * step
        if antialias:
            width = max(step, 1.0)
            low, high = max(int(centre - 2 * width + 0.5), 0), min(int(centre + 2 * width + 0.5), old)
            weights = np.array([cubic((j + 0.5 - centre) / width, -0.5) for j in range(low, high)])
            matrix[i, low:high] = weights / weights.sum()
        else:
            start = math.floor(centre - 0.5)
            for j in range(start - 1, start + 3):
                matrix[i, min(max(j, 0), old - 1)] += cubic(centre - 0.5 - j, -0.75)
    return matrix


def resize(image, height, width, antialias):
    rows, columns = resize_matrix(image.shape[0], height, antialias), resize_matrix(image.shape[1], width, antialias)
    return np.einsum("jw,iwc->ijc", columns, np.einsum("ih,hwc->iwc", rows, image, optimize=True), optimize=True)


def pad_square(pixels, size, antialias):
    """HPSv2: uint8 [H, W, 3] -> float64 [size, size, 3], longest side resized, zero padding, not yet normalised."""
    image = pixels.astype(np.float64) / 255
    scale = size / max(image.shape[:2])
    height, width = round(image.shape[0] * scale), round(image.shape[1] * scale)
    if scale != 1:
        image = resize(image, height, width, antialias)
    square = np.zeros((size, size, 3))
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def normalise(image):
    return torch.from_numpy(((image - MEAN) / STD).transpose(2, 0, 1)[None])


def layer_norm(x, state, name):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def block(x, state, name, heads, quick, mask=None):
    length, width = x.shape[1:]
    y = layer_norm(x, state, f"{name}.ln_1")
    y = y @ state[f"{name}.attn.in_proj_weight"].T + state[f"{name}.attn.in_proj_bias"]
    q, k, v = (part.reshape(len(x), length, heads, width // heads).transpose(1, 2) for part in y.chunk(3, -1))
    scores = q @ k.transpose(-1, -2) / math.sqrt(width // heads)
    scores = scores if mask is None else scores + mask
    y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(len(x), length, width)
    x = x + y @ state[f"{name}.attn.out_proj.weight"].T + state[f"{name}.attn.out_proj.bias"]
    y = layer_norm(x, state, f"{name}.ln_2") @ state[f"{name}.mlp.c_fc.weight"].T + state[f"{name}.mlp.c_fc.bias"]
    y = y * torch.sigmoid(1.702 * y) if quick else y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
    return x + y @ state[f"{name}.mlp.c_proj.weight"].T + state[f"{name}.mlp.c_proj.bias"]


def depth(state, prefix):
    return 1 + max(
        int(key.split("resblocks.")[1].split(".")[0]) for key in state if key.startswith(f"{prefix}resblocks.")
    )


def encode_image(pixels, state, heads, quick=False):
    """float64 [B, 3, S, S], normalised -> unit-length features [B, D]."""
    kernel = state["visual.conv1.weight"]
    width, _, patch, _ = kernel.shape
    x = pixels.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = x @ kernel.reshape(width, -1).T
    x = (
        torch.cat([state["visual.class_embedding"].expand(len(x), 1, width), x], 1)
        + state["visual.positional_embedding"]
    )
    x = layer_norm(x, state, "visual.ln_pre")
    for layer in range(depth(state, "visual.transformer.")):
        x = block(x, state, f"visual.transformer.resblocks.{layer}", heads, quick)
    x = layer_norm(x[:, 0], state, "visual.ln_post") @ state["visual.proj"]
    return x / x.norm(dim=-1, keepdim=True)


def encode_text(tokens, state, heads, quick=False):
    """int64 [B, L] -> unit-length features [B, D], pooled at the largest id."""
    length = tokens.shape[1]
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"]
    mask = torch.full((length, length), -math.inf, dtype=x.dtype).triu(1)
    for layer in range(depth(state, "transformer.")):
        x = block(x, state, f"transformer.resblocks.{layer}", heads, quick, mask)
    x = layer_norm(x, state, "ln_final")[torch.arange(len(x)), tokens.argmax(-1)] @ state["text_projection"]
    return x / x.norm(dim=-1, keepdim=True)
