"""The published checkpoints that scorers know: file names, where they come from, licence, layout and digest.

Data alone: `mmalign.weights` looks files up here and says what is missing, `mmalign weights` fetches and verifies them.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KNOWN", "NO_TENSORS", "Checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """One published file.

    Attributes:
        files: the authors' file name first, then names of the same tensors saved otherwise.
        repo: where to get it, ``owner/name`` on the Hugging Face hub, or a repository's address.
        licence: SPDX name of the weights' licence as their source states it; where only the code's is known, or nothing
            is stated, words that say so.
        keys: layout of the state dict, as the reader of that kind of network names it: ``open_clip`` or ``hf_clip``
            (either is read for a CLIP), ``long_clip`` (open_clip's with ``positional_embedding_res``), ``mps``
            (``model.*`` and ``cross_model.*``), ``linear``, ``mlp5``, ``mlp5_relu``, ``image_reward``,
            ``mask2former``, ``viclip``, ``umt``, ``musiq``, ``amt``, ``qwen2_vl``, ``qwen2_vl_lora``, ``multi_tap`` and
            so on; ``config``, ``text`` and ``wordpiece`` where the file is no weights; ``transformers`` for a whole
            folder of that library.
        sha256: digest of the authors' file; None where it has not been checked against a copy.
        also: further files of the repository that scoring reads, such as a config or a tokeniser; ``*`` stands for
            any characters.
        pickled: the authors' file holds Python objects, so it has to be converted once (`mmalign weights convert`).
        fits: a function as ``module:name`` and its further arguments, called with names to tensors without values (no
            names for what is `NO_TENSORS`) and the file; raises ValueError where a name or shape does not fit what the
            scorer builds, and gives words where it could not check them.
        by_hand: what to do where no program can fetch it, as the beginning of a sentence; empty otherwise.
    """

    files: tuple[str, ...]
    repo: str
    licence: str
    keys: str
    sha256: str | None = None
    also: tuple[str, ...] = ()
    pickled: bool = False
    fits: tuple[str, ...] = ()
    by_hand: str = ""


NO_TENSORS = frozenset({"config", "text", "wordpiece"})
"""Values of `Checkpoint.keys` whose file holds no tensors."""

UNREAD = "MIT (code; the terms of the weights were not read)"
UNSTATED = "MIT (code; none is stated for the weights)"
CARD_APACHE = "MIT (OpenAI's code; the repository's card says Apache-2.0)"
CARD_UNREAD = "MIT (OpenAI's code; the repository's card was not read)"

CLIP = "mmalign.backbones.clip:check_fits"
HEAD = "mmalign.backbones.heads:check_fits"
DINO = "mmalign.backbones.dino:check_fits"
MASK2FORMER = "mmalign.backbones.mask2former:check_fits"
VLM = "mmalign.backbones.vlm_fits"
RAFT = "mmalign.backbones.raft:check_fits"
OPENAI = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
FOLDER = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")  # a transformers folder without its copies


def _openai(repo: str, licence: str, model: str) -> Checkpoint:
    """An archive of OpenAI as timm gives it; `model` is open_clip's name."""
    return Checkpoint(OPENAI, repo, licence, "open_clip", fits=(CLIP, model))


def _detector(repo: str, licence: str) -> Checkpoint:
    """A folder of transformers with a detector in it, whole."""
    fits = (f"{VLM}:check_folder", "MODEL_FOR_OBJECT_DETECTION_MAPPING")
    return Checkpoint(("config.json",), repo, licence, "transformers", also=FOLDER, fits=fits)


def _chat_model(repo: str, licence: str) -> Checkpoint:
    """A folder of transformers, whole."""
    return Checkpoint(("config.json",), repo, licence, "transformers", also=FOLDER, fits=(f"{VLM}:check_folder",))


KNOWN: dict[str, Checkpoint] = {
    "hps-v2.0": Checkpoint(
        ("HPS_v2_compressed.pt", "HPS_v2_compressed.safetensors"),
        "xswu/HPSv2",
        "Apache-2.0",
        "open_clip",
        fits=(CLIP, "ViT-H-14"),
    ),
    "hps-v2.1": Checkpoint(
        ("HPS_v2.1_compressed.pt", "HPS_v2.1_compressed.safetensors"),
        "xswu/HPSv2",
        "Apache-2.0",
        "open_clip",
        fits=(CLIP, "ViT-H-14"),
    ),
    "openai-clip-b32": _openai("timm/vit_base_patch32_clip_224.openai", CARD_APACHE, "ViT-B-32-quickgelu"),
    "openai-clip-l14": _openai("timm/vit_large_patch14_clip_224.openai", CARD_APACHE, "ViT-L-14-quickgelu"),
    "aesthetic-v1": Checkpoint(
        ("sa_0_4_vit_l_14_linear.pth", "sa_0_4_vit_l_14_linear.safetensors"),
        "https://github.com/LAION-AI/aesthetic-predictor",
        "MIT",
        "linear",
        "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
        fits=(HEAD, "linear", "768"),
    ),
    "aesthetic-v2": Checkpoint(
        ("sac+logos+ava1-l14-linearMSE.pth", "sac+logos+ava1-l14-linearMSE.safetensors"),
        "https://github.com/christophschuhmann/improved-aesthetic-predictor",
        "Apache-2.0",
        "mlp5",
        "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
        fits=(HEAD, "mlp5", "768"),
    ),
    "image-reward": Checkpoint(
        ("ImageReward.pt", "ImageReward.safetensors"),
        "THUDM/ImageReward",
        "Apache-2.0",
        "image_reward",
        fits=("mmalign.backbones.blip:check_fits",),
    ),
    "bert-base-uncased": Checkpoint(
        ("vocab.txt",),
        "google-bert/bert-base-uncased",
        "Apache-2.0",
        "wordpiece",
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        fits=("mmalign.backbones.blip:check_vocabulary",),
    ),
    "geneval-mask2former": Checkpoint(
        (
            "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth",
            "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth",
            "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth",
            "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.safetensors",
            "model.safetensors",
            "pytorch_model.bin",
        ),
        "https://github.com/djghosh13/geneval",
        "Apache-2.0",
        "mask2former",
        by_hand="Take the file of MMDetection's zoo that evaluation/download_models.sh of the repository names, or "
        "config.json and model.safetensors of facebook/mask2former-swin-small-coco-instance, another training of it",
        fits=(MASK2FORMER,),
    ),
    "mask2former-swin-s-coco": Checkpoint(
        ("model.safetensors", "pytorch_model.bin"),
        "facebook/mask2former-swin-small-coco-instance",
        "other",
        "mask2former",
        also=("config.json",),
        fits=(MASK2FORMER,),
    ),
    "hpsv3": Checkpoint(
        ("HPSv3.safetensors",),
        "MizzenAI/HPSv3",
        UNREAD,
        "qwen2_vl",
        fits=(f"{VLM}:check_reward", "qwen2-vl-7b-config", "ranknet", "<|Reward|>"),
    ),
    "hpsv3-instruction": Checkpoint(
        ("hpsv3/dataset/data_collator_qwen.py", "data_collator_qwen.py", "instruction.txt"),
        "https://github.com/MizzenAI/HPSv3",
        "MIT",
        "text",
    ),
    "video-reward-instruction": Checkpoint(
        ("prompt_template.py", "instruction.txt"), "https://github.com/KwaiVGI/VideoAlign", "MIT", "text"
    ),
    "video-reward": Checkpoint(
        ("checkpoint-11352/model.pth",),
        "KwaiVGI/VideoReward",
        UNREAD,
        "qwen2_vl_lora",
        also=("model_config.json",),
        fits=(f"{VLM}:check_reward", "qwen2-vl-2b-config", "linear", "<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"),
    ),
    "qwen2-vl-2b-config": Checkpoint(
        ("config.json",),
        "Qwen/Qwen2-VL-2B-Instruct",
        "Apache-2.0",
        "config",
        also=("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
        fits=(f"{VLM}:check_config",),
    ),
    "qwen2-vl-7b-config": Checkpoint(
        ("config.json",),
        "Qwen/Qwen2-VL-7B-Instruct",
        "Apache-2.0",
        "config",
        also=("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
        fits=(f"{VLM}:check_config",),
    ),
    # What scorers on CLIP share; see docs/scorers/ for each.
    "openai-clip-b16": _openai("timm/vit_base_patch16_clip_224.openai", CARD_UNREAD, "ViT-B-16-quickgelu"),
    "openai-clip-l14-336": _openai("timm/vit_large_patch14_clip_336.openai", CARD_UNREAD, "ViT-L-14-336-quickgelu"),
    "openai-clip-rn50": _openai("timm/resnet50_clip.openai", "MIT", "RN50-quickgelu"),
    "openai-clip-rn101": _openai("timm/resnet101_clip.openai", CARD_UNREAD, "RN101-quickgelu"),
    "openai-clip-rn50x4": _openai("timm/resnet50x4_clip.openai", CARD_UNREAD, "RN50x4-quickgelu"),
    "openai-clip-rn50x16": _openai("timm/resnet50x16_clip.openai", CARD_UNREAD, "RN50x16-quickgelu"),
    "openai-clip-rn50x64": _openai("timm/resnet50x64_clip.openai", CARD_UNREAD, "RN50x64-quickgelu"),
    "longclip-b": Checkpoint(
        ("longclip-B.pt", "longclip-B.safetensors", "model.safetensors"),
        "BeichenZhang/LongCLIP-B",
        "Apache-2.0",
        "long_clip",
        fits=(CLIP, "LongCLIP-B"),
    ),
    "longclip-l": Checkpoint(
        ("longclip-L.pt", "longclip-L.safetensors", "model.safetensors"),
        "BeichenZhang/LongCLIP-L",
        "Apache-2.0",
        "long_clip",
        fits=(CLIP, "LongCLIP-L"),
    ),
    "aesthetic-v1-b32": Checkpoint(
        ("sa_0_4_vit_b_32_linear.pth", "sa_0_4_vit_b_32_linear.safetensors"),
        "https://github.com/LAION-AI/aesthetic-predictor",
        "MIT",
        "linear",
        fits=(HEAD, "linear", "512"),
    ),
    "aesthetic-v1-b16": Checkpoint(
        ("sa_0_4_vit_b_16_linear.pth", "sa_0_4_vit_b_16_linear.safetensors"),
        "https://github.com/LAION-AI/aesthetic-predictor",
        "MIT",
        "linear",
        fits=(HEAD, "linear", "512"),
    ),
    "aesthetic-v2-ava-logos": Checkpoint(
        ("ava+logos-l14-linearMSE.pth", "ava+logos-l14-linearMSE.safetensors"),
        "https://github.com/christophschuhmann/improved-aesthetic-predictor",
        "Apache-2.0",
        "mlp5",
        fits=(HEAD, "mlp5", "768"),
    ),
    "aesthetic-v2-ava-logos-relu": Checkpoint(
        ("ava+logos-l14-reluMSE.pth", "ava+logos-l14-reluMSE.safetensors"),
        "https://github.com/christophschuhmann/improved-aesthetic-predictor",
        "Apache-2.0",
        "mlp5_relu",
        fits=(HEAD, "mlp5_relu", "768"),
    ),
    "pickscore": Checkpoint(
        ("model.safetensors", "pytorch_model.bin"),
        "yuvalkirstain/PickScore_v1",
        UNSTATED,
        "hf_clip",
        fits=(CLIP, "ViT-H-14"),
    ),
    "mps": Checkpoint(
        (
            "MPS_overall_checkpoint.pth",
            "MPS_overall_checkpoint.safetensors",
            "MPS_overall_checkpoint_diffsynth.safetensors",
            "model.safetensors",
        ),
        "https://github.com/Kwai-Kolors/MPS",
        UNSTATED,
        "mps",
        pickled=True,
        by_hand="Download MPS_overall_checkpoint.pth through the link in https://github.com/Kwai-Kolors/MPS, convert "
        "it with `mmalign weights convert`",
        fits=("mmalign.backbones.mps:check_fits", "ViT-H-14"),
    ),
    "social-reward": Checkpoint(
        ("social_reward.safetensors", "social_reward.pth"),
        "https://github.com/Picsart-AI-Research/Social-Reward",
        "none stated",
        "open_clip",
        by_hand="Its authors published code and no weights: train them with "
        "https://github.com/Picsart-AI-Research/Social-Reward, save them as social_reward.safetensors",
        fits=(CLIP, "ViT-L-14-quickgelu"),
    ),
    "musiq-spaq": Checkpoint(
        ("musiq_spaq_ckpt-358bb6af.pth", "musiq_spaq_ckpt-358bb6af.safetensors"),
        "chaofengc/IQA-PyTorch-Weights",
        "Apache-2.0 (Google's weights; the terms of their conversion were not read)",
        "musiq",
        fits=("mmalign.backbones.musiq:check_fits",),
    ),
    "amt-s": Checkpoint(
        ("amt-s.pth", "amt-s.safetensors"),
        "lalala125/AMT",
        "CC-BY-NC-4.0 (AMT's weights: no commercial use)",
        "amt",
        by_hand="Its licence, CC BY-NC 4.0, forbids commercial use, so it is not fetched: where you may use it, "
        "download amt-s.pth from the Hugging Face repository lalala125/AMT",
        fits=("mmalign.backbones.amt:check_fits",),
    ),
    # VBench's dimensions.
    "dino-vitb16": Checkpoint(
        ("model.safetensors", "dino_vitbase16_pretrain.pth", "dino_vitbase16_pretrain.safetensors"),
        "timm/vit_base_patch16_224.dino",
        "Apache-2.0 (code; the terms of the weights were not read)",
        "dino",
        fits=(DINO,),
    ),
    "dreamsim-ensemble": Checkpoint(
        ("ensemble_lora/adapter_model.safetensors", "ensemble_lora/adapter_model.bin"),
        "https://github.com/ssundaram21/dreamsim",
        "MIT (code; the terms of the weights were not read)",
        "dreamsim",
        also=("ensemble_lora/adapter_config.json", "clip_vitb16_pretrain.pth.tar", "open_clip_vitb16_pretrain.pth.tar"),
        by_hand="Download dreamsim_ensemble_checkpoint.zip of the release v0.2.0-checkpoints of "
        "https://github.com/ssundaram21/dreamsim and unzip it",
        fits=("mmalign.backbones.dreamsim:check_fits",),
    ),
    # Models that are asked (vqascore, unified_reward, vision_reward, gecko, dpg, and as judges mmhal, dual_safety) or
    # read (multi_tap): whole folders.
    "qwen2-vl-2b": _chat_model("Qwen/Qwen2-VL-2B-Instruct", "Apache-2.0"),
    "qwen2.5-vl-7b": _chat_model("Qwen/Qwen2.5-VL-7B-Instruct", "Apache-2.0"),
    "llava-1.5-7b": _chat_model("llava-hf/llava-1.5-7b-hf", "Llama-2"),
    "llava-onevision-0.5b": _chat_model("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "Apache-2.0"),
    "smolvlm-256m": _chat_model("HuggingFaceTB/SmolVLM-256M-Instruct", "Apache-2.0"),
    "unified-reward-qwen-7b": _chat_model("CodeGoat24/UnifiedReward-qwen-7b", "MIT"),
    # Substitutes for what VBench asks GRiT and Tag2Text for: objects, colours, relations, scenes.
    "rtdetr-v2-r50": _detector("PekingU/rtdetr_v2_r50vd", "Apache-2.0"),
    "rtdetr-v2-r18": _detector("PekingU/rtdetr_v2_r18vd", "Apache-2.0"),
    "blip-captioning-large": _chat_model("Salesforce/blip-image-captioning-large", "BSD-3-Clause"),
    "multi-tap-qwen2-vl-2b": Checkpoint(
        ("model.safetensors.index.json", "model.safetensors"),
        "brl-xfact/Multi-TAP-Qwen2-VL-2B",
        "none stated",
        "multi_tap",
        also=FOLDER,
        fits=(f"{VLM}:check_multi_tap", "qwen2-vl-2b", "qwen2-vl-2b-config"),
    ),
    # What dimensions of VBench run.
    "viclip-internvid-10m-flt": Checkpoint(
        ("ViClip-InternVid-10M-FLT.pth", "ViClip-InternVid-10M-FLT.safetensors", "model.safetensors"),
        "OpenGVLab/ViCLIP",
        "MIT",
        "viclip",
        pickled=True,
        fits=("mmalign.backbones.viclip:check_fits",),
    ),
    "umt-l16-k400": Checkpoint(
        ("l16_ptk710_ftk710_ftk400_f16_res224.pth", "l16_ptk710_ftk710_ftk400_f16_res224.safetensors"),
        "OpenGVLab/VBench_Used_Models",
        "MIT (the card of OpenGVLab/UMT; this repository's was not read)",
        "umt",
        fits=("mmalign.backbones.umt:check_fits",),
    ),
    "blip2-itm-vit-g": Checkpoint(
        ("config.json",),
        "Salesforce/blip2-itm-vit-g",
        "BSD-3-Clause (LAVIS' code; the terms of the weights were not read)",
        "transformers",
        also=FOLDER,
        fits=("mmalign.backbones.blip2:check_fits",),
    ),
    "sd-safety-checker": Checkpoint(
        ("config.json",),
        "CompVis/stable-diffusion-safety-checker",
        "Apache-2.0 (diffusers' code; the terms of the weights were not read)",
        "transformers",
        also=FOLDER,
        fits=("mmalign.backbones.safety:check_fits",),
    ),
    # Optical flow, for VBench's dynamic_degree and static filter; see docs/scorers/dynamic_degree.md.
    "raft-things": Checkpoint(
        ("raft-things.pth", "raft-things.safetensors"),
        "https://github.com/princeton-vl/RAFT",
        "BSD-3-Clause (code; none is stated for the weights)",
        "raft",
        fits=(RAFT,),
        by_hand="Run download_models.sh of https://github.com/princeton-vl/RAFT, which gives models/raft-things.pth",
    ),
    "raft-large-torchvision": Checkpoint(
        ("raft_large_C_T_V1-22a6c225.pth", "raft_large_C_T_V1.safetensors"),
        "https://github.com/pytorch/vision",
        "BSD-3-Clause (code; none is stated for the weights)",
        "raft",
        fits=(RAFT,),
        by_hand="Download the file that torchvision's Raft_Large_Weights.C_T_V1.url names",
    ),
}
