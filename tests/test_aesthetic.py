"""aesthetic: the published heads, values against independent arithmetic."""

import re
import sys

import clip_reference as reference
import numpy as np
import pytest
import torch
from clip_kit import pil_square
from public_kit import AESTHETIC_HEADS, needs
from scorer_kit import TINY, batch_of, clip_folder, double, pictures

from mmalign.backbones.heads import FiveLinear, fold
from mmalign.discovery import evaluator_class, load_evaluator
from mmalign.known_weights import KNOWN
from mmalign.testing import check_evaluator
from mmalign.weights import file_hash, read_state_dict

WIDTHS = (1024, 128, 64, 16, 1)
PLACES = {"v2": (0, 2, 4, 6, 7), "v2-ava-logos": (0, 2, 4, 6, 7), "v2-ava-logos-relu": (0, 3, 6, 9, 11)}
FILES = {
    "v1": "sa_0_4_vit_l_14_linear.pth",
    "v2": "sac+logos+ava1-l14-linearMSE.pth",
    "v2-ava-logos": "ava+logos-l14-linearMSE.pth",
    "v2-ava-logos-relu": "ava+logos-l14-reluMSE.pth",
}


def head_file(folder, head, width=24, seed=0, name=None):
    generator = torch.Generator().manual_seed(seed)
    if head == "v1":
        state = {"weight": torch.randn(1, width, generator=generator), "bias": torch.randn(1, generator=generator)}
    else:
        state = {}
        for place, old, new in zip(PLACES[head], (width, *WIDTHS[:-1]), WIDTHS, strict=True):
            state[f"layers.{place}.weight"] = 2 * torch.randn(new, old, generator=generator) / old**0.5
            state[f"layers.{place}.bias"] = torch.randn(new, generator=generator)
    torch.save(state, folder / (name or FILES[head]))
    return state


def unfolded(features, state, head="v2"):
    """A head as its authors run it, layer by layer; dropout does nothing at inference."""
    if head == "v1":
        return (features @ state["weight"].double().T + state["bias"].double()).squeeze(-1)
    for place in PLACES[head]:
        weight, bias = state[f"layers.{place}.weight"].double(), state[f"layers.{place}.bias"].double()
        features = features @ weight.T + bias
        if head.endswith("relu") and place != PLACES[head][-1]:
            features = features.clamp(min=0)
    return features.squeeze(-1)


def tiny(folder):
    """(the CLIP's tensors, the parameters that name it)."""
    path = clip_folder(folder, "open_clip_pytorch_model.bin", {**TINY, "quick_gelu": True})
    return double(path), {"checkpoint": folder, "clip_checkpoint": path, "model": str(folder)}


@pytest.mark.parametrize("head", FILES)
def test_aesthetic_equals_independent_float64(tmp_path, head):
    state, params = tiny(tmp_path)
    weights = head_file(tmp_path, head)
    arrays = pictures([(28, 28)] * 4)
    features = reference.encode_image(torch.cat([reference.normalise(a / 255) for a in arrays]), state, 2, quick=True)
    expected = unfolded(features, weights, head)
    found = load_evaluator("aesthetic", {**params, "head": head}, "cpu").score(batch_of(arrays)).double()
    assert (found - expected).abs().max() < 3e-5
    if head.endswith("relu"):
        linear = features
        for place in PLACES[head]:
            linear = linear @ weights[f"layers.{place}.weight"].double().T + weights[f"layers.{place}.bias"].double()
        assert (linear.squeeze(-1) - expected).abs().max() > 0.1, "the ReLUs have to matter"
    tenth = (
        load_evaluator("aesthetic", {**params, "head": head, "divide_by": 10}, "cpu").score(batch_of(arrays)).double()
    )
    torch.testing.assert_close(tenth, found / 10, rtol=1e-6, atol=1e-7)


def test_the_resize_is_pils_and_vbenchs_has_no_filter(tmp_path):
    state, params = tiny(tmp_path)
    weights = head_file(tmp_path, "v1")
    array = pictures([(60, 97)])[0]
    evaluators = [load_evaluator("aesthetic", {**params, "head": "v1", "antialias": a}, "cpu") for a in (True, False)]
    found = [float(evaluator.score(batch_of([array], [""]))) for evaluator in evaluators]

    def rated(pixels):
        return float(unfolded(reference.encode_image(pixels, state, 2, quick=True), weights, "v1"))

    assert found[0] == pytest.approx(rated(pil_square(array, 28, "round")), abs=0.02)
    # VBench: one bicubic pass without a filter on 0 to 255, the central square, then / 255.
    wide = reference.resize(array.astype(np.float64), 28, int(28 * 97 / 60), antialias=False)
    left = round((wide.shape[1] - 28) / 2)
    assert found[1] == pytest.approx(rated(reference.normalise(wide[:, left : left + 28] / 255)), abs=1e-3)
    assert abs(found[0] - found[1]) > 0.05


@needs(AESTHETIC_HEADS)
def test_the_published_heads_load_and_v2_folds_exactly():
    module = sys.modules[evaluator_class("aesthetic").__module__]
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(64, 768, dtype=torch.float64, generator=generator)
    features = torch.nn.functional.normalize(features, dim=-1)
    for head in ("v1", "v2"):
        file = AESTHETIC_HEADS / KNOWN[f"aesthetic-{head}"].files[0]
        assert file_hash(file) == KNOWN[f"aesthetic-{head}"].sha256
        loaded = module.load_head(checkpoint=file, head=head, device=torch.device("cpu"), dtype=torch.float32)
        exact = unfolded(features, read_state_dict(file), head)
        assert (loaded(features.float()).squeeze(-1).double() - exact).abs().max() < 2e-5
        assert 1 < float(exact.mean()) < 10
    five = FiveLinear(768)
    five.load_state_dict(read_state_dict(AESTHETIC_HEADS / KNOWN["aesthetic-v2"].files[0]))
    folded = fold(five.layers)(features).squeeze(-1)
    assert (folded - unfolded(features, five.state_dict())).abs().max() < 1e-12
    assert (folded - five.double().eval()(features).squeeze(-1)).abs().max() < 1e-12


@needs(AESTHETIC_HEADS)
@pytest.mark.parametrize("head", ["v1", "v2"])
def test_the_published_heads_rate_through_the_evaluator(tmp_path, head):
    """On a tiny tower with 768 features: the whole path, with the authors' own files."""
    config = {**TINY, "quick_gelu": True, "embed_dim": 768}
    path = clip_folder(tmp_path, "open_clip_pytorch_model.bin", config)
    params = {"checkpoint": AESTHETIC_HEADS, "clip_checkpoint": path, "model": str(tmp_path), "head": head}
    arrays = pictures([(28, 28)] * 4)
    pixels = torch.cat([reference.normalise(a / 255) for a in arrays])
    features = reference.encode_image(pixels, double(path), 2, quick=True)
    expected = unfolded(features, read_state_dict(AESTHETIC_HEADS / FILES[head]), head)
    found = load_evaluator("aesthetic", params, "cpu").score(batch_of(arrays)).double()
    assert (found - expected).abs().max() < 2e-4


@pytest.mark.parametrize(
    ("model", "name"),
    [("ViT-B-32", "sa_0_4_vit_b_32_linear.pth"), ("ViT-B-16", "sa_0_4_vit_b_16_linear.pth"), ("ViT-L-14", FILES["v1"])],
)
def test_v1_has_a_head_for_each_of_three_clips(tmp_path, model, name):
    cls = evaluator_class("aesthetic")
    head_file(tmp_path, "v1", name=name)
    (tmp_path / "open_clip_model.safetensors").touch()
    params = cls.Params(checkpoint=tmp_path, clip_checkpoint=tmp_path, head="v1", model=model)
    assert cls.weight_files(params) == [tmp_path / name, tmp_path / "open_clip_model.safetensors"]
    assert dict(cls.backbone_specs(params)["clip"].arguments)["config"] == f"{model}-quickgelu"


def test_a_file_of_another_head_is_refused_by_name(tmp_path):
    _, params = tiny(tmp_path)
    head_file(tmp_path, "v2-ava-logos", name=FILES["v2-ava-logos-relu"])
    with pytest.raises(ValueError, match=r"missing: layers\.3\.weight.*unexpected: layers\.2\.weight"):
        load_evaluator("aesthetic", {**params, "head": "v2-ava-logos-relu"}, "cpu")
    head_file(tmp_path, "v1", name=FILES["v2"])
    with pytest.raises(ValueError, match=r"missing: layers\.0\.weight.*unexpected: weight, bias"):
        load_evaluator("aesthetic", params, "cpu")


def test_aesthetic_refuses_a_head_for_another_clip(tmp_path):
    _, params = tiny(tmp_path)
    head_file(tmp_path, "v2", width=768)
    file = re.escape(str(tmp_path / FILES["v2"]))
    with pytest.raises(ValueError, match=rf"^{file}: this head rates 768 features, but .* gives 24"):
        load_evaluator("aesthetic", params, "cpu")


def test_a_fetched_head_for_another_clip_is_named_too(tmp_path, monkeypatch):
    """`checkpoint` is not given, so the parameters do not say which file it is."""
    _, params = tiny(tmp_path)
    head_file(tmp_path, "v2", width=768)
    module = sys.modules[evaluator_class("aesthetic").__module__]
    found = module.find_checkpoint
    where = {None: tmp_path}
    monkeypatch.setattr(module, "find_checkpoint", lambda path, *names: found(where.get(path, path), *names))
    del params["checkpoint"]
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path / FILES['v2']))}: this head rates 768"):
        load_evaluator("aesthetic", params, "cpu")


@pytest.mark.parametrize("divisor", [0, -10, float("inf")])
def test_a_divisor_has_to_be_above_zero(divisor):
    with pytest.raises(ValueError, match="divide_by"):
        load_evaluator("aesthetic", {"divide_by": divisor}, "cpu")


def test_aesthetic_keeps_the_contract(tmp_path):
    _, params = tiny(tmp_path)
    head_file(tmp_path, "v2-ava-logos-relu")
    check_evaluator("aesthetic", {**params, "head": "v2-ava-logos-relu"}, tolerance=2e-5, processes=1)
