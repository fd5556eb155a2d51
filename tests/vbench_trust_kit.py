"""Small networks of the trust dimensions in their published layouts: a face detector, BLIP-2, the safety checker, CLIP.

With CLIP's features once more, by PIL and in float64.
"""

import math

import clip_reference as reference
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scorer_kit import TINY, clip_folder, double
from torch.nn import functional as F

from mmalign.evaluation import Batch

WORDS = ("face", "of", "a", "male", "female")


def noisy(model, seed=0, scale=0.3):
    """Weights large enough that a wrong mask, query or text changes the result visibly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator) * scale
            norm = "norm" in name.lower() and name.endswith("weight")
            value.copy_(1 + noise if norm else noise)
    return model


def clips_of(shapes, seed=0, smooth=False):
    """Clips uint8 [T, 3, H, W] of shapes (T, H, W): noise, or a few smooth colours, which differ more in a network."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for frames, height, width in shapes:
        if smooth:
            small = torch.rand(frames, 3, 3, 3, generator=generator) * 255
            found.append(F.interpolate(small, size=(height, width), mode="bilinear").round().to(torch.uint8))
        else:
            size = (frames, 3, height, width)
            found.append(torch.randint(0, 256, size, dtype=torch.uint8, generator=generator))
    return found


def batch_of(clips, prompts=None, aux=None):
    return Batch(
        frames=list(clips), prompts=list(prompts or ["x"] * len(clips)), fps=[8.0] * len(clips),
        aux=list(aux or [{} for _ in clips]),
    )  # fmt: skip


def trust_clip(folder):
    """A CLIP's float64 tensors, and the parameters with which an evaluator takes it."""
    path = clip_folder(folder, "open_clip_pytorch_model.bin", {**TINY, "quick_gelu": True})
    saved = torch.load(path, weights_only=True)
    saved["state_dict"]["logit_scale"].fill_(math.log(95))  # near what it is in published files, and not 100
    torch.save(saved, path)
    return double(path), {"checkpoint": path, "model": str(folder)}


def cropped(image):
    """A uint8 image [3, h, w] resized and cropped by PIL as CLIP's are: float64 [28, 28, 3] from 0 to 1."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    wide, high = picture.size
    long = int(28 * max(wide, high) / min(wide, high))
    new = (28, long) if wide <= high else (long, 28)
    left, top = round((new[0] - 28) / 2), round((new[1] - 28) / 2)
    picture = picture.resize(new, Image.Resampling.BICUBIC).crop((left, top, left + 28, top + 28))
    return np.asarray(picture, dtype=np.float64) / 255


def clip_rows(state, images):
    """Unit features of uint8 images [3, h, w], each by itself, in float64."""
    return torch.stack(
        [reference.encode_image(reference.normalise(cropped(image)), state, 2, quick=True)[0] for image in images]
    )


def detector_folder(folder):
    """A YOLOS with the labels person and face."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    config = YolosConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=[32, 48],
        patch_size=8, num_detection_tokens=6, id2label={0: "person", 1: "Face"}, label2id={"person": 0, "Face": 1},
    )  # fmt: skip
    folder = folder / "detector"
    noisy(YolosForObjectDetection(config), seed=3).save_pretrained(folder)
    YolosImageProcessor(size={"height": 32, "width": 48}, do_pad=False).save_pretrained(folder)
    return folder


def blip2_folder(folder):
    from transformers import BertTokenizer, Blip2Config, Blip2ForImageTextRetrieval, Blip2Processor, BlipImageProcessor

    folder = folder / "blip2"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    config = Blip2Config(
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": 28, "patch_size": 14},
        qformer_config={"vocab_size": len(words), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                        "intermediate_size": 24, "encoder_hidden_size": 16, "use_qformer_text_input": True,
                        "max_position_embeddings": 32},
        text_config={"model_type": "opt", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                     "ffn_dim": 24, "vocab_size": 20, "word_embed_proj_dim": 16},
        num_query_tokens=4, image_text_hidden_size=12,
    )  # fmt: skip
    noisy(Blip2ForImageTextRetrieval(config), seed=2).save_pretrained(folder)
    vocab = {word: number for number, word in enumerate(words)}
    images = BlipImageProcessor(size={"height": 28, "width": 28})
    Blip2Processor(images, BertTokenizer(vocab=vocab)).save_pretrained(folder)
    return folder


def checker_folder(folder, nested=False, special=2.0):
    """Stable Diffusion's safety checker; ``special`` is the special concepts' threshold, 2 being out of reach."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    config = CLIPConfig(
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 28, "patch_size": 14},
        projection_dim=12,
    )  # fmt: skip
    model = noisy(StableDiffusionSafetyChecker(config), seed=4)
    pixels = clips_of([(60, 28, 28)], seed=9, smooth=True)[0].float() / 64 - 2
    with torch.no_grad():
        embeds = F.normalize(model.eval().visual_projection(model.vision_model(pixels)[1]), dim=-1)
        cosines = embeds @ F.normalize(model.concept_embeds, dim=-1).T
        model.concept_embeds_weights.copy_(cosines.quantile(0.95, dim=0))  # one frame in twenty, for each concept
        model.special_care_embeds_weights.fill_(special)
    folder = folder / "checker"
    model.save_pretrained(folder)
    if nested:
        state = load_file(folder / "model.safetensors")
        state = {f"vision_model.{k}" if k.startswith("vision_model.") else k: v for k, v in state.items()}
        state["vision_model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
