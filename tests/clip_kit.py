"""For tests of scorers on CLIP: published key lists, tiny models in transformers' layout, PIL's preprocessing."""

import json

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from scorer_kit import TINY

from mmalign.backbones.clip import OPENAI_MEAN, OPENAI_STD


def open_clip_keys(width, layers, text_width, text_layers, embed, tokens, patch=14, context=77):
    """open_clip's CLIP as published checkpoints name it, from the scorers' cards: name -> shape."""
    keys = {
        "positional_embedding": (context, text_width),
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


def hf_keys(width, layers, text_width, text_layers, embed, tokens, patch=14, context=77):
    """The same in the layout of transformers' ``CLIPModel``, which PickScore and MPS are published in."""
    keys = {
        "logit_scale": (),
        "visual_projection.weight": (embed, width),
        "text_projection.weight": (embed, text_width),
        "text_model.embeddings.token_embedding.weight": (49408, text_width),
        "text_model.embeddings.position_embedding.weight": (context, text_width),
        "text_model.final_layer_norm.weight": (text_width,),
        "text_model.final_layer_norm.bias": (text_width,),
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "vision_model.embeddings.position_embedding.weight": (tokens, width),
        "vision_model.pre_layrnorm.weight": (width,),
        "vision_model.pre_layrnorm.bias": (width,),
        "vision_model.post_layernorm.weight": (width,),
        "vision_model.post_layernorm.bias": (width,),
    }
    for tower, w, depth in (("vision_model", width, layers), ("text_model", text_width, text_layers)):
        for layer in range(depth):
            name = f"{tower}.encoder.layers.{layer}"
            for part in "qkv":
                keys |= {f"{name}.self_attn.{part}_proj.weight": (w, w), f"{name}.self_attn.{part}_proj.bias": (w,)}
            keys |= {f"{name}.self_attn.out_proj.weight": (w, w), f"{name}.self_attn.out_proj.bias": (w,)}
            keys |= {f"{name}.mlp.fc1.weight": (4 * w, w), f"{name}.mlp.fc1.bias": (4 * w,)}
            keys |= {f"{name}.mlp.fc2.weight": (w, 4 * w), f"{name}.mlp.fc2.bias": (w,)}
            keys |= {f"{name}.layer_norm{n}.{part}": (w,) for n in (1, 2) for part in ("weight", "bias")}
    return keys


VIT_H_14 = (1280, 32, 1024, 24, 1024, 257)
VIT_L_14 = (1024, 24, 768, 12, 768, 257)
VIT_B_16 = (768, 12, 512, 12, 512, 197, 16)
VIT_B_32 = (768, 12, 512, 12, 512, 50, 32)


def meta(keys):
    """Tensors of these shapes that take no memory."""
    return {name: torch.empty(shape, device="meta") for name, shape in keys.items()}


def hf_clip(seed=0, act="quick_gelu", logit_scale=None, image_size=28, context=77):
    """transformers' ``CLIPModel`` of `TINY`'s size, with weights large enough that every mistake shows."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config={
            "vocab_size": 49408,
            "hidden_size": 16,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": context,
            "hidden_act": act,
            "eos_token_id": 2,  # as in OpenAI's and LAION's configs: pool at the largest id
            "bos_token_id": 0,
            "pad_token_id": 1,
        },
        vision_config={
            "hidden_size": 40,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": image_size,
            "patch_size": 14,
            "hidden_act": act,
        },
        projection_dim=24,
    )
    model = CLIPModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator) * 0.3
            value.copy_(1 + noise if name.endswith("weight") and "norm" in name else noise)
        if logit_scale is not None:
            model.logit_scale.fill_(logit_scale)
    return model


def tiny_config(folder, **changes):
    """`TINY` as a JSON file that a scorer's ``model`` can name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.json"
    path.write_text(json.dumps({**TINY, **changes}))
    return str(path)


def hf_params(folder, *, act="quick_gelu", seed=0, logit_scale=None, **params):
    """(model, parameters of a scorer) on a tiny CLIP in transformers' layout, as OpenAI's weights are distributed."""
    model = hf_clip(seed, act, logit_scale)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.clone() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    config = tiny_config(folder, quick_gelu=act == "quick_gelu")
    return model, {"checkpoint": folder, "model": config, **params}


# ------------------------------------------------------------------------------------------------ preprocessing


def pil_resize(array, new):
    """Width first, then height, to (height, width), as every Pillow before 13 does in one call.

    Pillow 13 begins with the height for some tall pictures (its #9549), which moves single pixels of noise by 23.
    """
    image = Image.fromarray(array).resize((new[1], array.shape[0]), Image.Resampling.BICUBIC)
    return np.array(image.resize(new[::-1], Image.Resampling.BICUBIC))


def shortest_to(array, size):
    """uint8 [H, W, 3] with the shortest side at ``size``."""
    height, width = array.shape[:2]
    return pil_resize(
        array, (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
    )


def pil_square(array, size, centre):
    """float64 [1, 3, size, size], normalised: PIL's resize and the central square, its corner rounded or cut off."""
    image = shortest_to(array, size)
    margins = [side - size for side in image.shape[:2]]
    top, left = (round(margin / 2) if centre == "round" else margin // 2 for margin in margins)
    square = image[top : top + size, left : left + size].astype(np.float64) / 255
    return torch.from_numpy(((square - OPENAI_MEAN) / OPENAI_STD).transpose(2, 0, 1)[None])
