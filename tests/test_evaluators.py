"""The shipped scorers: published key layouts, exact preprocessing, values against independent arithmetic."""

import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mmalign.clip_backbone import build_clip, save_clip
from mmalign.discovery import load_evaluator
from mmalign.evaluation import Backbones, Batch, resize_crop, resize_pad
from mmalign.testing import check_evaluator

sys.path.insert(0, str(Path(__file__).parent))
import clip_reference as reference

HEADS = Path(__file__).resolve().parents[2] / "shared" / "data" / "aesthetic"
TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 40, "head_width": 20, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
PROMPTS = ["a red circle", "Two cats, on a MAT!", "a long list " * 60, "a red circle"]
SIZES = [(28, 28), (50, 90), (90, 50), (20, 28)]


def randomise(model, seed=0, scale=0.3):
    """Weights large enough that a wrong layer norm, mask or activation changes the score visibly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator) * scale
            value.copy_(1 + noise if name.endswith(".weight") and "ln_" in name else noise)
    return model


def clip_folder(folder, file_name, config=TINY, dtype=torch.float32, seed=0):
    model, tokenizer, preprocess = build_clip(config)
    return save_clip(folder, randomise(model, seed), config, tokenizer, preprocess, file_name, dtype)


def pictures(sizes=SIZES, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def batch_of(arrays, prompts=PROMPTS):
    images = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
    return Batch(images=images, frames=[image[None] for image in images], prompts=list(prompts))


def double(path):
    state = torch.load(path, weights_only=True)["state_dict"]
    return {key: value.double() for key, value in state.items()}


# ------------------------------------------------------------------------------------------------ architectures


def published_keys(width, layers, text_width, text_layers, embed, tokens, patch=14):
    """open_clip's CLIP as the published checkpoints name it, from the scorer's card."""
    keys = {
        "positional_embedding": (77, text_width),
        "text_projection": (text_width, embed),
        "logit_scale": (),
        "token_embedding.weight": (49408, text_width),
        "ln_final.weight": (text_width,),
        "ln_final.bias": (text_width,),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (tokens, width),
        "visual.proj": (width, embed),
        "visual.conv1.weight": (width, 3, patch, patch),
        "visual.ln_pre.weight": (width,),
        "visual.ln_pre.bias": (width,),
        "visual.ln_post.weight": (width,),
        "visual.ln_post.bias": (width,),
    }
    for prefix, w, depth in (("visual.", width, layers), ("", text_width, text_layers)):
        for layer in range(depth):
            name = f"{prefix}transformer.resblocks.{layer}"
            keys |= {
                f"{name}.attn.in_proj_weight": (3 * w, w),
                f"{name}.attn.in_proj_bias": (3 * w,),
                f"{name}.attn.out_proj.weight": (w, w),
                f"{name}.attn.out_proj.bias": (w,),
                f"{name}.mlp.c_fc.weight": (4 * w, w),
                f"{name}.mlp.c_fc.bias": (4 * w,),
                f"{name}.mlp.c_proj.weight": (w, 4 * w),
                f"{name}.mlp.c_proj.bias": (w,),
            }
            keys |= {f"{name}.{norm}.{part}": (w,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    return keys


@pytest.mark.parametrize(
    ("model", "shape", "heads", "quick"),
    [
        ("ViT-H-14", (1280, 32, 1024, 24, 1024, 257), (16, 16), False),
        ("ViT-L-14-quickgelu", (1024, 24, 768, 12, 768, 257), (16, 12), True),
        ("ViT-B-32-quickgelu", (768, 12, 512, 12, 512, 50, 32), (12, 8), True),
    ],
)
def test_real_architecture_has_the_published_keys_and_shapes(model, shape, heads, quick):
    from mmalign.clip_backbone import _parts

    net, tokenizer, preprocess = _parts(model, "meta")
    assert {key: tuple(value.shape) for key, value in net.state_dict().items()} == published_keys(*shape)
    assert net.visual.transformer.resblocks[0].attn.num_heads == heads[0]
    assert net.transformer.resblocks[0].attn.num_heads == heads[1]
    assert type(net.visual.transformer.resblocks[0].mlp.gelu).__name__ == ("QuickGELU" if quick else "GELU")
    assert type(net.transformer.resblocks[0].mlp.gelu).__name__ == ("QuickGELU" if quick else "GELU")
    assert (preprocess.size, tokenizer.context_length, tokenizer.end) == (224, 77, 49407)


# ------------------------------------------------------------------------------------------------ preprocessing


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size", [(224, 150), (150, 224), (300, 500), (517, 224), (100, 61), (224, 224), (1000, 3)])
def test_pad_to_square_equals_independent_arithmetic(size, antialias):
    array = pictures([size])[0]
    expected = reference.pad_square(array, 224, antialias)
    image = torch.from_numpy(array).permute(2, 0, 1)[None] / torch.tensor(255, dtype=torch.float64)
    found = resize_pad(image, 224, antialias)
    assert found.shape == (1, 3, 224, 224)
    np.testing.assert_allclose(found[0].permute(1, 2, 0).numpy(), expected, atol=1e-9)
    # float32 rounds the sampling positions too: a hundredth of a grey level.
    single = resize_pad(image.float(), 224, antialias)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(single, expected, atol=0.02 / 255)


def test_antialias_changes_what_the_scorer_sees():
    image = torch.from_numpy(pictures([(400, 600)])[0]).permute(2, 0, 1)[None].float() / 255
    difference = (resize_pad(image, 224, False) - resize_pad(image, 224, True)).abs().mean()
    assert difference > 0.03


@pytest.mark.parametrize("size", [(224, 224), (300, 500), (500, 301), (100, 61), (225, 640)])
def test_crop_follows_pil_within_its_rounding(size):
    array = pictures([size])[0]
    height, width = size
    scale = 224 / min(size)
    new = (224, int(224 * width / height)) if height <= width else (int(224 * height / width), 224)
    assert scale and min(new) == 224
    image = Image.fromarray(array).resize((new[1], new[0]), Image.Resampling.BICUBIC)
    top, left = round((new[0] - 224) / 2), round((new[1] - 224) / 2)
    expected = np.asarray(image)[top : top + 224, left : left + 224] / 255
    found = resize_crop(torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255, 224)[0].permute(1, 2, 0).numpy()
    assert found.shape == (224, 224, 3)
    # PIL rounds to 1/255 after the horizontal and after the vertical pass.
    assert np.abs(found - expected).max() <= 2.01 / 255
    assert np.abs(found - expected).mean() <= 0.5 / 255


# ------------------------------------------------------------------------------------------------ hps


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
@pytest.mark.parametrize("antialias", [False, True])
def test_hps_equals_independent_float64(tmp_path, version, antialias):
    name = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}[version]
    path = clip_folder(tmp_path, name, dtype=torch.float16)
    evaluator = load_evaluator("hps", {"checkpoint": tmp_path, "version": version, "antialias": antialias}, "cpu")
    arrays = pictures()
    state = double(path)
    pixels = torch.cat([reference.normalise(reference.pad_square(array, 28, antialias)) for array in arrays])
    texts = reference.encode_text(open_clip.tokenize(PROMPTS), state, heads=2)
    expected = (reference.encode_image(pixels, state, heads=2) * texts).sum(-1)
    found = evaluator.score(batch_of(arrays))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=2e-5)
    assert np.ptp(expected.numpy()) > 0.05, "the case tells nothing"
    assert evaluator.truncated(PROMPTS) == [False, False, True, False]


def test_hps_reads_the_authors_layout_and_safetensors_alike(tmp_path):
    clip_folder(tmp_path / "a", "HPS_v2.1_compressed.pt")
    clip_folder(tmp_path / "b", "HPS_v2.1_compressed.safetensors")
    batch = batch_of(pictures())
    one, two = (load_evaluator("hps", {"checkpoint": tmp_path / x}, "cpu").score(batch_of(pictures())) for x in "ab")
    assert torch.equal(one, two)
    plain = tmp_path / "plain.json"
    plain.write_text(__import__("json").dumps(TINY))
    params = {"checkpoint": tmp_path / "a" / "HPS_v2.1_compressed.pt", "model": str(plain)}
    assert torch.equal(load_evaluator("hps", params, "cpu").score(batch), one)


def test_hps_in_bfloat16_keeps_an_exact_last_step(tmp_path):
    clip_folder(tmp_path, "HPS_v2.1_compressed.pt")
    exact = load_evaluator("hps", {"checkpoint": tmp_path}, "cpu").score(batch_of(pictures()))
    rough = load_evaluator("hps", {"checkpoint": tmp_path}, "cpu", dtype="bfloat16")
    found = rough.score(batch_of(pictures()))
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float()), "the score was rounded to bfloat16"
    assert (found - exact).abs().max() < 0.03
    features = rough.clip.frames(batch_of(pictures()).clips(), rough.resize)
    assert (features.double().norm(dim=-1) - 1).abs().max() < 1e-6


def test_hps_of_a_video_is_the_mean_over_its_frames(tmp_path):
    clip_folder(tmp_path, "HPS_v2.1_compressed.pt")
    evaluator = load_evaluator("hps", {"checkpoint": tmp_path}, "cpu")
    clips = [torch.randint(0, 256, (t, 3, 30, 40), dtype=torch.uint8) for t in (3, 1, 5)]
    found = evaluator.score(Batch(frames=clips, prompts=PROMPTS[:3]))
    for clip, prompt, score in zip(clips, PROMPTS, found, strict=False):
        stills = evaluator.score(Batch(images=list(clip), prompts=[prompt] * len(clip)))
        assert float(score) == pytest.approx(float(stills.mean()), abs=1e-6)


def test_hps_gradient_is_that_of_finite_differences(tmp_path):
    clip_folder(tmp_path, "HPS_v2.1_compressed.pt")
    evaluator = load_evaluator("hps", {"checkpoint": tmp_path}, "cpu")
    evaluator.clip._model.double()
    evaluator.clip.dtype = torch.float64
    image = torch.rand(1, 3, 20, 28, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(evaluator.score_tensor(image.requires_grad_(True), ["a cat"]).sum(), image)
    direction = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    step = 1e-2
    with torch.no_grad():
        ends = [evaluator.score_tensor(image + sign * step * direction, ["a cat"]) for sign in (1, -1)]
    numeric = float(ends[0] - ends[1]) / (2 * step)
    assert numeric == pytest.approx(float((gradient * direction).sum()), rel=2e-2)
    assert evaluator.clip._image_projection.grad is None


def test_hps_refuses_a_checkpoint_that_does_not_fit(tmp_path):
    path = clip_folder(tmp_path, "HPS_v2.1_compressed.pt")
    state = torch.load(path, weights_only=True)["state_dict"]
    state["visual.proj"] = state["visual.proj"][:, :8]
    state["extra.weight"] = state.pop("ln_final.bias")
    torch.save({"state_dict": state}, path)
    with pytest.raises(
        ValueError, match=r"missing: ln_final\.bias.*unexpected: extra\.weight.*visual\.proj is \[40, 8\]"
    ):
        load_evaluator("hps", {"checkpoint": tmp_path}, "cpu")


def test_hps_names_the_missing_file_and_where_to_get_it(tmp_path):
    with pytest.raises(ValueError, match=r"HPS_v2_compressed\.pt.*xswu/HPSv2.*`checkpoint`"):
        load_evaluator("hps", {"checkpoint": tmp_path, "version": "v2.0"}, "cpu")


def test_mistyped_parameters_are_all_named_at_once():
    with pytest.raises(ValueError) as error:
        load_evaluator("hps", {"checkpont": "x", "version": "v3"}, "cpu")
    text = str(error.value)
    assert "Did you mean 'checkpoint'?" in text
    assert "version" in text and "v2.1" in text


# ------------------------------------------------------------------------------------------------ clip_score


def hf_clip(seed=0):
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config={
            "vocab_size": 49408,
            "hidden_size": 16,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "hidden_act": "quick_gelu",
            "eos_token_id": 49407,
            "bos_token_id": 49406,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 40,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "hidden_act": "quick_gelu",
        },
        projection_dim=24,
    )
    model = CLIPModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator) * 0.3
            value.copy_(1 + noise if name.endswith("weight") and "norm" in name else noise)
    return model


def hf_params(folder, **params):
    """A tiny CLIP with transformers' own keys and QuickGELU, as OpenAI's checkpoints are distributed."""
    model = hf_clip()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.clone() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "tiny.json").write_text(__import__("json").dumps({**TINY, "quick_gelu": True}))
    return model, {"checkpoint": folder, "model": str(folder / "tiny.json"), **params}


@pytest.mark.parametrize("variant", ["original", "torchmetrics"])
def test_clip_score_equals_transformers_in_float64(tmp_path, variant):
    model, params = hf_params(tmp_path, variant=variant)
    evaluator = load_evaluator("clip_score", params, "cpu")
    arrays = pictures([(28, 28)] * 4)
    prefix = "A photo depicts " if variant == "original" else ""
    tokens = open_clip.tokenize([prefix + prompt for prompt in PROMPTS])
    pixels = torch.cat([reference.normalise(array / 255) for array in arrays])
    with torch.no_grad():
        model = model.double()
        image = model.get_image_features(pixel_values=pixels).pooler_output
        text = model.get_text_features(input_ids=tokens).pooler_output
    cosine = torch.nn.functional.cosine_similarity(image, text)
    expected = 2.5 * cosine.clamp(min=0) if variant == "original" else 100 * cosine
    found = evaluator.score(batch_of(arrays)).double()
    assert (found - expected).abs().max() < 1e-5 * (1 if variant == "original" else 100)
    assert cosine.min() < 0 < cosine.max(), "the case has to show the clamp"


def test_clip_score_towers_equal_plain_arithmetic(tmp_path):
    path = clip_folder(tmp_path, "open_clip_pytorch_model.bin", {**TINY, "quick_gelu": True})
    evaluator = load_evaluator("clip_score", {"checkpoint": path, "model": str(tmp_path)}, "cpu")
    state = double(path)
    arrays = pictures([(28, 28)] * 2)
    image = reference.encode_image(torch.cat([reference.normalise(a / 255) for a in arrays]), state, 2, quick=True)
    text = reference.encode_text(
        open_clip.tokenize(["A photo depicts " + p for p in PROMPTS[:2]]), state, 2, quick=True
    )
    expected = 2.5 * (image * text).sum(-1).clamp(min=0)
    np.testing.assert_allclose(evaluator.score(batch_of(arrays, PROMPTS[:2])).numpy(), expected.numpy(), atol=1e-5)


def test_clip_score_models_are_the_quickgelu_ones():
    from mmalign.discovery import evaluator_class

    module = sys.modules[evaluator_class("clip_score").__module__]
    for config, _ in module.MODELS.values():
        assert open_clip.get_model_config(config)["quick_gelu"] is True


# ------------------------------------------------------------------------------------------------ aesthetic


def head_file(folder, head, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    widths = [width, 1024, 128, 64, 16, 1]
    if head == "v1":
        state = {"weight": torch.randn(1, width, generator=generator), "bias": torch.randn(1, generator=generator)}
        name = "sa_0_4_vit_l_14_linear.pth"
    else:
        state = {}
        for place, old, new in zip((0, 2, 4, 6, 7), widths[:-1], widths[1:], strict=True):
            state[f"layers.{place}.weight"] = torch.randn(new, old, generator=generator) / old**0.5
            state[f"layers.{place}.bias"] = torch.randn(new, generator=generator)
        name = "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(state, folder / name)
    return state


def unfolded(features, state):
    """v2 as its authors run it, layer by layer."""
    for place in (0, 2, 4, 6, 7):
        weight, bias = state[f"layers.{place}.weight"].double(), state[f"layers.{place}.bias"].double()
        features = features @ weight.T + bias
    return features.squeeze(-1)


@pytest.mark.parametrize("head", ["v1", "v2"])
def test_aesthetic_equals_independent_float64(tmp_path, head):
    path = clip_folder(tmp_path, "open_clip_pytorch_model.bin", {**TINY, "quick_gelu": True})
    weights = head_file(tmp_path, head)
    params = {"checkpoint": tmp_path, "clip_checkpoint": path, "model": str(tmp_path), "head": head}
    arrays = pictures([(28, 28)] * 4)
    state = double(path)
    features = reference.encode_image(torch.cat([reference.normalise(a / 255) for a in arrays]), state, 2, quick=True)
    if head == "v1":
        expected = (features @ weights["weight"].double().T + weights["bias"].double()).squeeze(-1)
    else:
        expected = unfolded(features, weights)
    found = load_evaluator("aesthetic", params, "cpu").score(batch_of(arrays)).double()
    assert (found - expected).abs().max() < 2e-5
    tenth = load_evaluator("aesthetic", params | {"divide_by": 10}, "cpu").score(batch_of(arrays)).double()
    torch.testing.assert_close(tenth, found / 10, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(not HEADS.is_dir(), reason="LAION's head files are not here")
def test_the_published_heads_load_and_v2_folds_exactly():
    from mmalign.discovery import evaluator_class
    from mmalign.weights import KNOWN, file_hash, read_state_dict

    module = sys.modules[evaluator_class("aesthetic").__module__]
    features = torch.nn.functional.normalize(torch.randn(64, 768, dtype=torch.float64), dim=-1)
    for head in ("v1", "v2"):
        file = HEADS / KNOWN[f"aesthetic-{head}"].files[0]
        assert file_hash(file) == KNOWN[f"aesthetic-{head}"].sha256
        linear = module.load_head(checkpoint=file, head=head, device=torch.device("cpu"), dtype=torch.float32)
        state = read_state_dict(file)
        exact = unfolded(features, state) if head == "v2" else features @ state["weight"].double()[0] + state["bias"]
        assert (linear(features.float()).squeeze(-1).double() - exact).abs().max() < 2e-5
        assert 1 < float(exact.mean()) < 10
    layers = module._Layers(768)
    layers.load_state_dict(read_state_dict(HEADS / KNOWN["aesthetic-v2"].files[0]))
    folded = module.fold(layers.layers)(features).squeeze(-1)
    assert (folded - unfolded(features, layers.state_dict())).abs().max() < 1e-12
    assert (folded - layers.double().eval().layers(features).squeeze(-1)).abs().max() < 1e-12


def test_aesthetic_refuses_a_head_for_another_clip(tmp_path):
    path = clip_folder(tmp_path, "open_clip_pytorch_model.bin")
    head_file(tmp_path, "v2", width=768)
    params = {"checkpoint": tmp_path, "clip_checkpoint": path, "model": str(tmp_path)}
    with pytest.raises(ValueError, match=r"rates 768 features, but .* gives 24"):
        load_evaluator("aesthetic", params, "cpu")


def test_clip_score_and_both_heads_share_one_pass_through_the_tower(tmp_path, monkeypatch):
    path = clip_folder(tmp_path, "open_clip_pytorch_model.bin")
    for head in ("v1", "v2"):
        head_file(tmp_path, head)
    shared = Backbones()
    clip = {"clip_checkpoint": path, "model": str(tmp_path)}
    evaluators = [
        load_evaluator("clip_score", {"checkpoint": path, "model": str(tmp_path)}, "cpu", backbones=shared),
        *(
            load_evaluator("aesthetic", {"checkpoint": tmp_path, "head": h, **clip}, "cpu", backbones=shared)
            for h in ("v1", "v2")
        ),
    ]
    assert evaluators[0].clip is evaluators[1].clip is evaluators[2].clip
    calls = []
    encode = evaluators[0].clip._encode
    monkeypatch.setattr(evaluators[0].clip, "_encode", lambda pixels: calls.append(len(pixels)) or encode(pixels))
    batch = batch_of(pictures())
    for evaluator in evaluators:
        evaluator.score(batch)
    assert calls == [4]


# ------------------------------------------------------------------------------------------------ conformance


def test_hps_keeps_the_contract(tmp_path):
    clip_folder(tmp_path, "HPS_v2.1_compressed.safetensors")
    check_evaluator("hps", {"checkpoint": tmp_path})


def test_clip_score_keeps_the_contract(tmp_path):
    check_evaluator("clip_score", hf_params(tmp_path, variant="torchmetrics")[1], tolerance=2e-5)


def test_aesthetic_keeps_the_contract(tmp_path):
    path = clip_folder(tmp_path, "open_clip_pytorch_model.bin")
    head_file(tmp_path, "v2")
    check_evaluator("aesthetic", {"checkpoint": tmp_path, "clip_checkpoint": path, "model": str(tmp_path)})
