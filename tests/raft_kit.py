"""Small RAFTs in both published layouts, networks whose flow is known, and moving pictures, for tests of scorers."""

from __future__ import annotations

import math
import re

import torch
from torch import nn

from mmalign.backbones.raft import RaftSizes, build_raft

SMALL = RaftSizes(
    features=(8, 8, 12, 16, 24),
    context=(8, 8, 10, 12, 26),
    radius=2,
    corr=(14, 10),
    flow=(8, 6),
    motion=14,
    hidden=12,
    head=10,
    mask=9,
)


def small_raft(seed=0, sizes=SMALL):
    """A network with random weights and running statistics, whose flows are some pixels long."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build_raft(sizes)
    with torch.no_grad():
        for name, value in network.named_buffers():
            if name.endswith("running_mean"):
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
            elif name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        for name, value in network.named_parameters():
            if ".1.weight" in name and "context" in name:
                value.copy_(1 + 0.3 * torch.randn(value.shape, generator=generator))
            elif name.endswith(".bias"):
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return network.eval()


# torchvision's names to the authors', written the other way round than in the port.
BACK = (
    ("feature_encoder.", "fnet."),
    ("context_encoder.", "cnet."),
    ("update_block.motion_encoder.convcorr1.0.", "update_block.encoder.convc1."),
    ("update_block.motion_encoder.convcorr2.0.", "update_block.encoder.convc2."),
    ("update_block.motion_encoder.convflow1.0.", "update_block.encoder.convf1."),
    ("update_block.motion_encoder.convflow2.0.", "update_block.encoder.convf2."),
    ("update_block.motion_encoder.conv.0.", "update_block.encoder.conv."),
    ("mask_predictor.convrelu.0.", "update_block.mask.0."),
    ("mask_predictor.conv.", "update_block.mask.2."),
)


def authors_layout(state):
    """The authors' names, with the wrapper's prefix and the norm that they hold twice."""
    result = {}
    for name, value in state.items():
        for ours, theirs in BACK:
            if name.startswith(ours):
                name = theirs + name[len(ours) :]
                break
        for gate in "zrq":
            for number in "12":
                name = name.replace(f"recurrent_block.convgru{number}.conv{gate}.", f"gru.conv{gate}{number}.")
        for net in ("fnet", "cnet"):
            name = name.replace(f"{net}.convnormrelu.0.", f"{net}.conv1.").replace(
                f"{net}.convnormrelu.1.", f"{net}.norm1."
            )
            if re.match(rf"{net}\.conv\.", name):
                name = name.replace(f"{net}.conv.", f"{net}.conv2.")
        for number in "12":
            name = name.replace(f".convnormrelu{number}.0.", f".conv{number}.").replace(
                f".convnormrelu{number}.1.", f".norm{number}."
            )
        result[f"module.{name}"] = value
        if ".downsample.1." in name:
            result[f"module.{name.replace('.downsample.1.', '.norm3.')}"] = value.clone()
    return result


def raft_file(folder, seed=0, authors=True):
    """A file of a small RAFT as it is published, in a folder that exists; its path."""
    state = small_raft(seed).state_dict()
    path = folder / ("raft-things.pth" if authors else "raft_large_C_T_V1-22a6c225.pth")
    torch.save(authors_layout(state) if authors else dict(state), path)
    return path


class Told:
    """In the place of a `RaftFlow`: the flow of each pair is what a function says, for frames that hold their number.

    Attributes:
        asked: the pairs that were computed.
    """

    def __init__(self, flow, part=1):
        self.flow, self.part, self.asked = flow, part, []

    def flows(self, frames, pairs, updates=20):
        height, width = (-(-side // 8) * 8 for side in frames.shape[-2:])
        for start in range(0, len(pairs), self.part):
            some = pairs[start : start + self.part]
            self.asked += some
            found = [torch.as_tensor(self.flow(first, second, height, width)).float() for first, second in some]
            yield range(start, start + len(some)), torch.stack([each.expand(2, height, width) for each in found])


def shifted(frames, step, side=128, seed=0):
    """A smooth random picture that wanders by `step` = (x, y) whole pixels a frame: uint8 [T, 3, side, side]."""
    generator = torch.Generator().manual_seed(seed)
    room = side + frames * max(map(abs, step))
    wide = torch.rand(1, 3, room // 8 + 2, room // 8 + 2, generator=generator)
    picture = nn.functional.interpolate(wide, size=(room, room), mode="bicubic", align_corners=True).clamp(0, 1)
    picture = (picture[0] * 255).round().to(torch.uint8)
    x0, y0 = ((frames - 1) * each if each > 0 else 0 for each in step)
    places = [(x0 - t * step[0], y0 - t * step[1]) for t in range(frames)]
    return torch.stack([picture[:, y : y + side, x : x + side] for x, y in places])


# As few channels as there can be.
LEAN = RaftSizes(
    (1, 1, 1, 1, 1), (1, 1, 1, 1, 3), radius=1, corr=(1, 1), flow=(1, 1), motion=3, hidden=2, head=1, mask=1
)


def bright_raft(speed, sizes=LEAN):
    """A network whose flow goes to the right wherever the first frame is light: `speed` pixels where it is white.

    Where a colour's mean v is above 127.5 it is ``speed * tanh(2 v / 255 - 1) / tanh(1)``, else 0, but for the edges.
    All else is switched off: the context encoder hands brightness through to the state, which the recurrence keeps.
    """
    network = build_raft(sizes)
    state = network.state_dict()
    for name, value in state.items():
        value.fill_(1.0 if name.endswith("running_var") or re.search(r"\.1\.weight$", name) else 0)
    state["context_encoder.convnormrelu.0.weight"][0, :, 3, 3] = 1 / 3
    for name in ("layer2.0.downsample.0", "layer3.0.downsample.0", "conv"):
        state[f"context_encoder.{name}.weight"][0, 0, 0, 0] = 1
    for number in (1, 2):
        state[f"update_block.recurrent_block.convgru{number}.convz.bias"].fill_(-30)
    state["update_block.flow_head.conv1.weight"][0, 0, 1, 1] = 1
    state["update_block.flow_head.conv2.weight"][0, 0, 1, 1] = speed / (8 * 20 * math.tanh(1))
    return network.eval()


def bright_file(folder, speed=6.0):
    """`bright_raft` as the authors' file; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(authors_layout(bright_raft(speed).state_dict()), folder / "raft-things.pth")
    return folder / "raft-things.pth"


def flat(levels, side=128, width=None):
    """A clip of frames of one grey each: uint8 [T, 3, side, width]."""
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, side, width or side)
