"""RAFT written out in float64 under the authors' names, slowly: what the port is compared with."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


class Reference:
    """The authors' network on a state dict in their layout (without ``module.``), one pair at a time."""

    def __init__(self, state, radius):
        self.state = {name.removeprefix("module."): value.double() for name, value in state.items()}
        self.radius = radius

    def conv(self, x, name, stride=1):
        weight = self.state[f"{name}.weight"]
        padding = tuple(side // 2 for side in weight.shape[2:])
        return F.conv2d(x, weight, self.state[f"{name}.bias"], stride=stride, padding=padding)

    def norm(self, x, name):
        if name.startswith("fnet"):  # an instance norm without parameters
            mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), unbiased=False, keepdim=True)
            return (x - mean) / (var + 1e-5).sqrt()
        mean, var, weight, bias = (
            self.state[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def encode(self, x, net):
        x = self.norm(self.conv(x, f"{net}.conv1", 2), f"{net}.norm1").clamp(min=0)
        for layer in (1, 2, 3):
            for block in (0, 1):
                name, stride = f"{net}.layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
                y = self.norm(self.conv(x, f"{name}.conv1", stride), f"{name}.norm1").clamp(min=0)
                y = self.norm(self.conv(y, f"{name}.conv2"), f"{name}.norm2").clamp(min=0)
                if stride == 2:
                    x = self.norm(self.conv(x, f"{name}.downsample.0", 2), f"{name}.norm3")
                x = (x + y).clamp(min=0)
        return self.conv(x, f"{net}.conv2")

    def lookup(self, first, second, coords):
        """Correlations around `coords` [2, h, w] in the four levels: [4 * (2 r + 1)^2, h, w], one cell at a time."""
        channels, height, width = first.shape
        volume = (first.reshape(channels, -1).T @ second.reshape(channels, -1)) / channels**0.5
        level, found = volume.view(height * width, height, width).numpy(), []
        span = range(-self.radius, self.radius + 1)
        for number in range(4):
            if number:
                h, w = level.shape[1] // 2, level.shape[2] // 2
                level = level[:, : 2 * h, : 2 * w].reshape(-1, h, 2, w, 2).mean((2, 4))
            rows = np.zeros((len(span) ** 2, height * width))
            for cell, (x, y) in enumerate(coords.reshape(2, -1).T.numpy()):
                for place, (dx, dy) in enumerate((i, j) for i in span for j in span):  # the authors' order: x outside
                    rows[place, cell] = read(level[cell], x / 2**number + dx, y / 2**number + dy)
            found.append(rows.reshape(-1, height, width))
        return torch.from_numpy(np.concatenate(found))

    def gru(self, hidden, x, number):
        both = torch.cat([hidden, x], 1)
        name = "update_block.gru.conv"
        z, r = (self.conv(both, f"{name}{gate}{number}").sigmoid() for gate in "zr")
        q = self.conv(torch.cat([r * hidden, x], 1), f"{name}q{number}").tanh()
        return (1 - z) * hidden + z * q

    def __call__(self, first, second, updates):
        """Flow [2, H, W] from pictures [3, H, W] in 0 to 255 whose sides are multiples of 8."""
        one, two = (2 * (image.double()[None] / 255) - 1 for image in (first, second))
        features = [self.encode(image, "fnet")[0] for image in (one, two)]
        context = self.encode(one, "cnet")
        size = self.state["update_block.gru.convz1.bias"].numel()
        hidden, context = context[:, :size].tanh(), context[:, size:].clamp(min=0)
        height, width = features[0].shape[1:]
        y, x = np.mgrid[:height, :width]
        origin = torch.from_numpy(np.stack([x, y]).astype(float))
        coords, enc = origin, "update_block.encoder"
        for _ in range(updates):
            flow = (coords - origin)[None]
            corr = self.conv(self.lookup(*features, coords)[None], f"{enc}.convc1").clamp(min=0)
            corr = self.conv(corr, f"{enc}.convc2").clamp(min=0)
            moved = self.conv(self.conv(flow, f"{enc}.convf1").clamp(min=0), f"{enc}.convf2").clamp(min=0)
            motion = self.conv(torch.cat([corr, moved], 1), f"{enc}.conv").clamp(min=0)
            seen = torch.cat([context, motion, flow], 1)
            hidden = self.gru(self.gru(hidden, seen, 1), seen, 2)
            change = self.conv(hidden, "update_block.flow_head.conv1").clamp(min=0)
            coords = coords + self.conv(change, "update_block.flow_head.conv2")[0]
        mask = self.conv(self.conv(hidden, "update_block.mask.0").clamp(min=0), "update_block.mask.2") / 4
        return upsampled((coords - origin).numpy(), mask[0].numpy())


def read(level, x, y):
    """A level's value between its cells, bilinearly; zero outside."""
    height, width = level.shape
    total = 0.0
    for column, across in ((int(np.floor(x)), 1 - (x - np.floor(x))), (int(np.floor(x)) + 1, x - np.floor(x))):
        for row, down in ((int(np.floor(y)), 1 - (y - np.floor(y))), (int(np.floor(y)) + 1, y - np.floor(y))):
            if 0 <= column < width and 0 <= row < height:
                total += across * down * level[row, column]
    return total


def upsampled(flow, mask):
    """Each of 8 x 8 pixels of a cell is a weighted mean of the 3 x 3 cells around it: [2, h, w] -> [2, 8 h, 8 w]."""
    _, height, width = flow.shape
    weights = np.exp(mask.reshape(9, 8, 8, height, width))
    weights /= weights.sum(0)
    around = np.pad(8 * flow, ((0, 0), (1, 1), (1, 1)))
    result = np.zeros((2, 8 * height, 8 * width))
    for row in range(height):
        for column in range(width):
            nine = around[:, row : row + 3, column : column + 3].reshape(2, 9)
            for i in range(8):
                for j in range(8):
                    result[:, 8 * row + i, 8 * column + j] = nine @ weights[:, i, j, row, column]
    return result
