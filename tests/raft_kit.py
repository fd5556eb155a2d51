"""Small RAFTs in both published layouts, networks whose flow is known, and moving pictures, for tests of scorers."""

from __future__ import annotations

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
