"""AMT-S once more, one pair at a time in float64: the whole volume of correlations, bilinear reading written out."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from mmalign.backbones.amt import AmtConfig, build_amt

TINY = AmtConfig(
    channels=(6, 7, 8, 9), skip=5, flows=2, trunk=(8, 12, 16), features=10, hidden=9, flow=4, correlation=11, fused=7
)


def published(config=None):
    """Names and shapes of the checkpoint's tensors, by rule."""
    c = config or AmtConfig()
    convs, slopes = {}, {}

    def conv(name, out, channels, side):
        convs[name] = (out, channels, side, side)

    def activated(name, out, channels):
        conv(f"{name}.0", out, channels, 3)
        slopes[f"{name}.1"] = out

    conv("feat_encoder.conv1", c.trunk[0], 3, 7)
    last = c.trunk[0]
    for stage, width in enumerate(c.trunk, start=1):
        for block in range(2):
            at = f"feat_encoder.layer{stage}.{block}"
            conv(f"{at}.conv1", width // 4, last, 1)
            conv(f"{at}.conv2", width // 4, width // 4, 3)
            conv(f"{at}.conv3", width, width // 4, 1)
            if stage > 1 and block == 0:
                conv(f"{at}.downsample.0", width, last, 1)
            last = width
    conv("feat_encoder.conv2", c.features, last, 1)
    last = 3
    for level, width in enumerate(c.channels, start=1):
        activated(f"encoder.pyramid{level}.0", width, last)
        activated(f"encoder.pyramid{level}.1", width, width)
        last = width
    a, b, e, d = c.channels
    transposed = {}
    for number, taken, width, out in (
        (4, 2 * d + 1, 2 * d, e + 4),
        (3, 3 * e + 4, 3 * e, b + 4),
        (2, 3 * b + 4, 3 * b, a + 4),
        (1, 3 * a + 4, 3 * a, 8 * c.flows),
    ):
        at = f"decoder{number}.convblock"
        activated(f"{at}.0", width, taken)
        for part, channels in (("conv1", width), ("conv2", c.skip), ("conv3", width), ("conv4", c.skip)):
            activated(f"{at}.1.{part}", channels, channels)
        conv(f"{at}.1.conv5", width, width, 3)
        slopes[f"{at}.1.prelu"] = width
        transposed[f"{at}.2"] = (width, out, 4, 4)
    for number, channels in ((4, e), (3, b), (2, a)):
        at = f"update{number}"
        conv(f"{at}.convc1", c.correlation, 8 * (2 * c.radius + 1) ** 2, 1)
        conv(f"{at}.convf1", 2 * c.flow, 4, 7)
        conv(f"{at}.convf2", c.flow, 2 * c.flow, 3)
        conv(f"{at}.conv", c.fused, c.correlation + c.flow, 3)
        conv(f"{at}.gru.0", c.hidden, c.fused + 4 + channels, 3)
        conv(f"{at}.gru.2", c.hidden, c.hidden, 3)
        for head, out in (("feat_head", channels), ("flow_head", 4)):
            conv(f"{at}.{head}.0", c.hidden, c.hidden, 3)
            conv(f"{at}.{head}.2", out, c.hidden, 3)
    conv("comb_block.0", 6 * c.flows, 3 * c.flows, 3)
    slopes["comb_block.1"] = 6 * c.flows
    conv("comb_block.2", 3, 6 * c.flows, 3)
    whole = {f"{name}.weight": shape for name, shape in (convs | transposed).items()}
    whole |= {f"{name}.bias": (shape[0],) for name, shape in convs.items()}
    whole |= {f"{name}.bias": (shape[1],) for name, shape in transposed.items()}
    return whole | {f"{name}.weight": (width,) for name, width in slopes.items()}


def random_state(config=TINY, seed=0):
    """Weights by which flows are some pixels long and pictures are not all clipped."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in build_amt(config).state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim == 4:
            state[name] = noise * 1.2 / math.sqrt(value[0].numel())
        else:
            state[name] = 0.25 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
    for name, factor in (("decoder4", 2), ("decoder3", 2), ("decoder2", 2), ("decoder1", 0.4)):
        state[f"{name}.convblock.2.weight"] *= factor
    state["comb_block.2.weight"] *= 0.1
    return state


def blending(state):
    """The same with flows, residuals and corrections of 0 and even masks: its drawn frame is the mean of its two."""
    still = [f"decoder{number}.convblock.2" for number in (1, 2, 3, 4)]
    still += [f"update{number}.flow_head.2" for number in (2, 3, 4)] + ["comb_block.2"]
    silent = {f"{name}.{kind}" for name in still for kind in ("weight", "bias")}
    return {name: torch.zeros_like(value) if name in silent else value for name, value in state.items()}


def conv(x, s, name, stride=1, padding=None):
    weight = s[f"{name}.weight"]
    return F.conv2d(x, weight, s[f"{name}.bias"], stride, weight.shape[-1] // 2 if padding is None else padding)


def prelu(x, slope):
    return torch.where(x > 0, x, slope.view(-1, 1, 1) * x)


def activated(x, s, name, stride=1):
    return prelu(conv(x, s, f"{name}.0", stride), s[f"{name}.1.weight"])


def leaky(x):
    return torch.where(x > 0, x, 0.1 * x)


def norm(x):
    flat = x.flatten(1)
    mean, variance = flat.mean(1), flat.var(1, unbiased=False)
    return (x - mean.view(-1, 1, 1)) / (variance.view(-1, 1, 1) + 1e-5).sqrt()


def features(x, s):
    x = norm(conv(x, s, "feat_encoder.conv1", 2)).relu()
    for stage in (1, 2, 3):
        for block in (0, 1):
            at = f"feat_encoder.layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = norm(conv(x, s, f"{at}.conv1")).relu()
            y = norm(conv(y, s, f"{at}.conv2", stride)).relu()
            y = norm(conv(y, s, f"{at}.conv3")).relu()
            if stride == 2:
                x = norm(conv(x, s, f"{at}.downsample.0", 2))
            x = (x + y).relu()
    return conv(x, s, "feat_encoder.conv2")


def read(image, x, y, edge):
    """`image` [C, h, w] at arrays of places x and y: [C, *x.shape]; beyond, the edge or zeros."""
    height, width = image.shape[-2:]
    if edge:
        x, y = np.clip(x, 0, width - 1), np.clip(y, 0, height - 1)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    total = np.zeros((len(image), *x.shape))
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        row, column = top + i, left + j
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        weight = (1 - np.abs(y - row)) * (1 - np.abs(x - column)) * inside
        total += weight * image[:, np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)]
    return total


def warp(image, flow):
    height, width = flow.shape[-2:]
    y, x = np.mgrid[:height, :width].astype(float)
    moved = flow.numpy()
    return torch.from_numpy(read(image.numpy(), x + moved[0], y + moved[1], edge=True))


def resize(x, factor):
    height, width = (round(side * factor) for side in x.shape[-2:])
    y, z = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    places = ((z + 0.5) / factor - 0.5, (y + 0.5) / factor - 0.5)
    return torch.from_numpy(read(x.numpy(), *places, edge=True))


def volume(first, second, levels=4):
    """[h, w, h', w'] for each scale: the mean of 2 x 2 of the one before, a last odd row or column left out."""
    scales = [torch.einsum("dij,dkl->ijkl", first, second).numpy() / math.sqrt(len(first))]
    for _ in range(levels - 1):
        last = scales[-1]
        rows, columns = last.shape[2] // 2 * 2, last.shape[3] // 2 * 2
        even = last[:, :, :rows, :columns]
        scales.append(sum(even[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4)
    return scales


def look(scales, places, radius=3):
    """Windows [levels (2 r + 1)^2, h, w] at places [2, h, w] of the other map."""
    _, height, width = places.shape
    steps = np.arange(-radius, radius + 1)
    along_x, along_y = np.meshgrid(steps, steps, indexing="ij")  # the first axis moves x
    found = np.zeros((len(scales), len(steps) ** 2, height, width))
    for level, scale in enumerate(scales):
        for i in range(height):
            for j in range(width):
                x, y = places[0, i, j] / 2**level + along_x, places[1, i, j] / 2**level + along_y
                found[level, :, i, j] = read(scale[i, j][None], x, y, edge=False)[0].ravel()
    return torch.from_numpy(found).flatten(0, 1)


def update(s, name, features, flow, windows, scale):
    small = resize(features, 1 / scale) if scale > 1 else features
    seen = leaky(conv(windows, s, f"{name}.convc1"))
    moved = leaky(conv(leaky(conv(flow, s, f"{name}.convf1")), s, f"{name}.convf2"))
    fused = leaky(conv(torch.cat([seen, moved]), s, f"{name}.conv"))
    state = conv(leaky(conv(torch.cat([fused, flow, small]), s, f"{name}.gru.0")), s, f"{name}.gru.2")
    heads = [
        conv(leaky(conv(state, s, f"{name}.{head}.0")), s, f"{name}.{head}.2") for head in ("feat_head", "flow_head")
    ]
    return [resize(heads[0], scale), scale * resize(heads[1], scale)] if scale > 1 else heads


def decoder(s, number, x, skip):
    at = f"decoder{number}.convblock"
    x = activated(x, s, f"{at}.0")
    y = activated(x, s, f"{at}.1.conv1")
    y = torch.cat([y[:-skip], activated(y[-skip:], s, f"{at}.1.conv2")])
    y = activated(y, s, f"{at}.1.conv3")
    y = torch.cat([y[:-skip], activated(y[-skip:], s, f"{at}.1.conv4")])
    y = prelu(x + conv(y, s, f"{at}.1.conv5"), s[f"{at}.1.prelu.weight"])
    return F.conv_transpose2d(y, s[f"{at}.2.weight"], s[f"{at}.2.bias"], 2, 1)


def interpolate(first, second, state, config=TINY, time=0.5, told=None):
    """[3, H, W] each in [0, 1] -> the frame between them; `told` gets the flows by name."""
    s = {name: value.double() for name, value in state.items()}
    mean = (first.double().mean() + second.double().mean()) / 2
    frames = [first.double() - mean, second.double() - mean]
    maps = [features(frame, s) for frame in frames]
    forward, backward = volume(*maps), volume(*maps[::-1])
    levels = []
    for frame in frames:
        levels.append([])
        for level in (1, 2, 3, 4):
            frame = activated(activated(frame, s, f"encoder.pyramid{level}.0", 2), s, f"encoder.pyramid{level}.1")
            levels[-1].append(frame)
    height, width = maps[0].shape[-2:]
    y, x = np.mgrid[:height, :width]
    here = torch.from_numpy(np.stack([x, y]).astype(float))
    moment = torch.full((1, *levels[0][3].shape[-2:]), time, dtype=torch.float64)
    flow, made = None, torch.cat([levels[0][3], levels[1][3], moment])
    for number, scale in ((4, 1), (3, 2), (2, 4)):
        out = decoder(s, number, made, config.skip)
        flow = out[:4] if flow is None else out[:4] + 2 * resize(flow, 2)
        kept = out[4:]
        coarse = resize(flow, 1 / scale) / scale if scale > 1 else flow
        there, back = here + coarse[2:] / time, here + coarse[:2] / (1 - time)
        windows = torch.cat([look(forward, there.numpy()), look(backward, back.numpy())])
        more, further = update(s, f"update{number}", kept, coarse, windows, scale)
        kept, flow = kept + more, flow + further
        pair = [frame[number - 2] for frame in levels]
        made = torch.cat([kept, warp(pair[0], flow[:2]), warp(pair[1], flow[2:]), flow])
        if told is not None:
            told[number] = flow
    out, up = decoder(s, 1, made, config.skip), 2 * resize(flow, 2)
    n = config.flows
    pictures = []
    for k in range(n):
        near = warp(frames[0], out[2 * k : 2 * k + 2] + up[:2])
        far = warp(frames[1], out[2 * n + 2 * k : 2 * n + 2 * k + 2] + up[2:])
        share = 1 / (1 + (-out[4 * n + k]).exp())
        pictures.append(share * near + (1 - share) * far + mean + out[5 * n + 3 * k : 5 * n + 3 * k + 3])
    y = prelu(conv(torch.cat(pictures), s, "comb_block.0"), s["comb_block.1.weight"])
    return (sum(pictures) / n + conv(y, s, "comb_block.2")).clamp(0, 1)
