"""RAFT: the published layouts, values against the network written out in float64, and what sharing encoders saves."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from raft_kit import SMALL, authors_layout, raft_file, shifted, small_raft
from raft_reference import Reference

from mmalign.backbones.raft import (
    RaftFlow,
    RaftSizes,
    build_raft,
    check_fits,
    load_raft,
    padding,
    raft_sizes,
    to_torchvision,
)
from mmalign.known_weights import KNOWN

CPU = torch.device("cpu")
LOADED = {"device": CPU, "dtype": torch.float32}


def noise(frames, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(frames, 3, height // 8 + 1, width // 8 + 1, generator=generator)
    return (F.interpolate(coarse, size=(height, width), mode="bilinear") * 255).round().to(torch.uint8)


def plain(network, first, second, updates=20):
    """torchvision's own forward on one pair that is padded by hand."""
    images = [2 * (F.pad(each[None].float(), padding(*each.shape[-2:]), mode="replicate") / 255) - 1
              for each in (first, second)]  # fmt: skip
    with torch.no_grad():
        return network(*images, num_flow_updates=updates)[-1][0]


@pytest.mark.parametrize("authors", [True, False])
def test_flow_equals_the_network_written_out_in_float64(tmp_path, authors):
    raft = load_raft(checkpoint=raft_file(tmp_path, authors=authors), **LOADED)
    frames = noise(2, 130, 137)
    (_, found), = raft.flows(frames, [(0, 1)], updates=3)  # fmt: skip
    left, right, top, bottom = 3, 4, 3, 3  # what is missing to 136 x 144, the larger half behind
    padded = np.pad(frames.numpy(), ((0, 0), (0, 0), (top, bottom), (left, right)), mode="edge")
    reference = Reference(authors_layout(small_raft().state_dict()), SMALL.radius)
    expected = reference(*torch.from_numpy(padded), updates=3)
    assert found.shape == (1, 2, 136, 144)
    assert np.abs(expected).mean() > 0.5, "the flow has to be one"
    assert np.abs(found[0].numpy() - expected).max() < 1e-3 * np.abs(expected).max()


def test_levels_of_one_cell_are_read_as_any_other():
    """64 pixels give a pyramid of 8, 4, 2 and 1 cells, where the authors' code divides by zero; zeros lie outside."""
    network = small_raft(2)
    frames = noise(2, 64, 72, seed=3)
    (_, found), = RaftFlow(network).flows(frames, [(0, 1)], updates=2)  # fmt: skip
    expected = Reference(authors_layout(network.state_dict()), SMALL.radius)(*frames, updates=2)
    assert np.abs(found[0].numpy() - expected).max() < 1e-3 * np.abs(expected).max()
    with pytest.raises(ValueError, match=r"8 x 64 pixels are too small"):
        list(RaftFlow(network).flows(frames[..., :8], [(0, 1)]))
    (_, tiny), = RaftFlow(network).flows(frames[..., :20, :20], [(0, 1)])  # fmt: skip
    assert tiny.shape == (1, 2, 24, 24) and bool(tiny.isfinite().all())


@pytest.mark.parametrize("pixels", [1, 5 * 128 * 136, 1 << 30])
def test_shared_encoders_equal_torchvisions_forward_on_every_pair(pixels):
    network = small_raft(1)
    frames = noise(5, 125, 136, seed=1)
    pairs = [(0, 1), (1, 2), (2, 3), (3, 4), (0, 4), (4, 0), (1, 0)]
    parts = list(RaftFlow(network, pixels=pixels).flows(frames, pairs))
    assert [place for places, _ in parts for place in places] == list(range(len(pairs)))
    assert max(len(places) for places, _ in parts) == {1: 1, 5 * 128 * 136: 5}.get(pixels, len(pairs))
    for pair, flow in zip(pairs, torch.cat([flow for _, flow in parts]), strict=True):
        expected = plain(network, *frames[list(pair)])
        assert (flow - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("limit", [1, 100_000])
def test_correlations_of_large_frames_are_looked_up_in_parts(limit, monkeypatch):
    """A row of cells at a time, or a few: the flows are those of the whole volume, which is never held."""
    frames, pairs = noise(3, 136, 152, seed=4), [(0, 1), (1, 2)]
    whole = torch.cat([flow for _, flow in RaftFlow(small_raft()).flows(frames, pairs, updates=4)])
    raft = RaftFlow(small_raft())
    block = raft.network.corr_block
    monkeypatch.setattr(type(block), "limit", limit)
    sizes, levels = [], block.levels

    def watched(*maps):
        pyramid = levels(*maps)
        sizes.append(sum(each.numel() for each in pyramid))
        return pyramid

    block.levels = watched
    parts = torch.cat([flow for _, flow in raft.flows(frames, pairs, updates=4)])
    assert whole.abs().max() > 1 and (parts - whole).abs().max() < 2e-4
    least = 2 * 19 * (17 * 19) * 4 / 3  # of one row of the two pairs
    assert max(sizes) <= max(limit, least) and len(sizes) >= 4 * 3
    assert not block.corr_pyramid


def counted(network):
    """How many frames each part of a network was given, and how often a flow was brought to full size."""
    calls = Counter()
    for name in ("feature_encoder", "context_encoder", "mask_predictor"):
        getattr(network, name).register_forward_hook(
            lambda _, given, __, name=name: calls.update({name: len(given[0])})
        )
    return calls


def test_a_frame_is_encoded_once_and_a_flow_upsampled_once():
    frames = noise(6, 128, 128)
    network = small_raft()
    calls = counted(network)
    pairs = [(t, t + 1) for t in range(5)]
    for pixels in (1, 1 << 30):
        calls.clear()
        list(RaftFlow(network, pixels=pixels).flows(frames, pairs))
        assert calls == {"feature_encoder": 6, "context_encoder": 5, "mask_predictor": 5}
    calls.clear()
    for pair in pairs:
        plain(network, *frames[list(pair)])
    assert calls == {"feature_encoder": 10, "context_encoder": 5, "mask_predictor": 100}
    calls.clear()
    list(RaftFlow(network, pixels=1).flows(frames, [(0, 5), (5, 0), *pairs]))  # the static filter's
    assert calls == {"feature_encoder": 6, "context_encoder": 6, "mask_predictor": 7}
    calls.clear()
    next(RaftFlow(network, pixels=1).flows(frames, pairs))
    assert calls == {"feature_encoder": 2, "context_encoder": 1, "mask_predictor": 1}, "nothing is computed ahead"


def test_a_flow_depends_on_no_other_pair_and_batch_norm_keeps_its_statistics():
    network = small_raft().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    raft = RaftFlow(network)
    frames = torch.cat([noise(2, 128, 128), noise(2, 128, 128, seed=5) // 3])
    (_, both), = raft.flows(frames, [(0, 1), (2, 3)])  # fmt: skip
    (_, alone), = raft.flows(frames[2:], [(0, 1)])  # fmt: skip
    assert (both[1] - alone[0]).abs().max() < 1e-4 * float(alone.abs().max())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_padding_is_centred():
    assert padding(128, 256) == (0, 0, 0, 0)
    assert padding(125, 133) == (1, 2, 1, 2)
    assert padding(121, 250) == (3, 3, 3, 4)


# The names of raft-things.pth, behind "module.", with shapes: from the authors' model code.
ENCODER = {"conv1": (64, 3, 7, 7), "conv2": (256, 128, 1, 1)}
for _layer, _from, _to in ((1, 64, 64), (2, 64, 96), (3, 96, 128)):
    for _block in (0, 1):
        _name, _taken = f"layer{_layer}.{_block}", _from if _block == 0 else _to
        ENCODER |= {f"{_name}.conv1": (_to, _taken, 3, 3), f"{_name}.conv2": (_to, _to, 3, 3)}
    if _layer > 1:
        ENCODER[f"layer{_layer}.0.downsample.0"] = (_to, _from, 1, 1)
NORMS = {"norm1": 64}
for _layer, _size in ((1, 64), (2, 96), (3, 128)):
    NORMS |= {f"layer{_layer}.{block}.norm{number}": _size for block in (0, 1) for number in (1, 2)}
    if _layer > 1:
        NORMS |= {f"layer{_layer}.0.norm3": _size, f"layer{_layer}.0.downsample.1": _size}
UPDATE = {
    "encoder.convc1": (256, 324, 1, 1),
    "encoder.convc2": (192, 256, 3, 3),
    "encoder.convf1": (128, 2, 7, 7),
    "encoder.convf2": (64, 128, 3, 3),
    "encoder.conv": (126, 256, 3, 3),
    **{f"gru.conv{gate}1": (128, 384, 1, 5) for gate in "zrq"},
    **{f"gru.conv{gate}2": (128, 384, 5, 1) for gate in "zrq"},
    "flow_head.conv1": (256, 128, 3, 3),
    "flow_head.conv2": (2, 256, 3, 3),
    "mask.0": (256, 128, 3, 3),
    "mask.2": (576, 256, 1, 1),
}


def published():
    """raft-things.pth on the meta device."""
    shapes = {}
    convs = {f"{net}.{name}": shape for net in ("fnet", "cnet") for name, shape in ENCODER.items()}
    convs |= {f"update_block.{name}": shape for name, shape in UPDATE.items()}
    for name, shape in convs.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, size in NORMS.items():
        shapes |= {f"cnet.{name}.{part}": (size,) for part in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"cnet.{name}.num_batches_tracked"] = ()
    return {f"module.{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_raft_things_fits_at_full_size(tmp_path):
    state = published()
    check_fits(state, tmp_path / "raft-things.pth")
    assert raft_sizes(to_torchvision(state, "")) == RaftSizes()
    with torch.device("meta"):
        network = build_raft()
    assert sum(value.numel() for value in network.parameters()) == 5_257_536  # as torchvision states it
    assert {name: value.shape for name, value in authors_layout(network.state_dict()).items()} == {
        name: value.shape for name, value in state.items()
    }
    from torchvision.models.optical_flow import raft_large

    with torch.device("meta"):
        check_fits(raft_large().state_dict(), tmp_path / "raft_large_C_T_V1-22a6c225.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("module.fnet.conv1.weight"), "1 missing: feature_encoder.convnormrelu.0.weight"),
        (lambda s: s.update({"module.fnet.conv9.bias": torch.zeros(3)}), "1 unexpected: feature_encoder.conv9.bias"),
        (
            lambda s: s.update({"module.update_block.mask.2.bias": torch.zeros(3)}),
            "mask_predictor.conv.bias is [3] and has to be [576]",
        ),
        (lambda s: s["module.cnet.layer2.0.norm3.bias"].add_(1), "differs from its other name's tensor"),
        (
            lambda s: s.update({"module.update_block.gru.convz1.weight": torch.zeros(99, 40, 1, 5)}),
            "these tensors are no RAFT",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(tmp_path, change, message):
    state = authors_layout(small_raft().state_dict())
    change(state)
    torch.save(state, tmp_path / "raft-things.pth")
    with pytest.raises(ValueError, match=re.escape(message)):
        load_raft(checkpoint=tmp_path / "raft-things.pth", **LOADED)


def test_small_files_show_their_own_sizes(tmp_path):
    for authors in (True, False):
        state = torch.load(raft_file(tmp_path, authors=authors), weights_only=True)
        assert raft_sizes(to_torchvision(state, "")) == SMALL
    for name, file in (
        ("raft-things", "raft-things.pth"),
        ("raft-large-torchvision", "raft_large_C_T_V1-22a6c225.pth"),
    ):
        assert KNOWN[name].files[0] == file


def test_frames_of_a_moving_picture_stay_apart():
    """The kit's own picture moves as it says, which other tests build on."""
    clip = shifted(4, (3, -2))
    assert torch.equal(clip[1][:, :-2, 3:], clip[0][:, 2:, :-3])
