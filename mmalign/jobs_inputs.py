"""What jobs begin with: the folder of a model, and the data that it is trained on.

Beside `mmalign.jobs`, and as light; a new model family is one more line in `FAMILIES`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from mmalign.config import Strict
from mmalign.jobs_align import Probability

FAMILIES = {
    "sd": "Stable Diffusion 1.x and 2.x: one text encoder, UNet, eps or v prediction",
    "sdxl": "Stable Diffusion XL: two text encoders, size and crop conditioning (time_ids)",
    "sd3": "Stable Diffusion 3 and 3.5: MMDiT, flow matching, two CLIP encoders and an optional T5",
    "flux": "FLUX.1 dev and schnell: flow matching, packed latents, CLIP and T5, guidance as an input (dev)",
    "pixart": "PixArt-Sigma: transformer, eps prediction, T5 with its padding masked",
    "sana": "Sana: linear-attention transformer, flow matching, deterministic autoencoder of factor 32, Gemma 2",
    "qwen_image": "Qwen-Image: MMDiT, flow matching, packed latents, Qwen2.5-VL as text encoder",
    "wan": "Wan 2.1 and 2.2 text-to-video: transformer over space and time, flow matching, causal 3D autoencoder, UMT5",
    "cogvideox": "CogVideoX 2B, 5B and 1.5 text-to-video: transformer over space and time, v prediction, T5",
    "hunyuan_video": "HunyuanVideo text-to-video: flow matching, LLaMA and CLIP, guidance as an input",
    "ltx": "LTX-Video text-to-video: flow matching, packed tokens, strongly compressing autoencoder, T5",
    "wan_i2v": "Wan 2.1 and 2.2 image-to-video: told the first frame, in latents and by a vision tower (2.1)",
    "cogvideox_i2v": "CogVideoX image-to-video (5B, 1.5): told the first frame's latents",
    "hunyuan_video_i2v": "HunyuanVideo image-to-video: told the first frame, in latents and by LLaVA with the prompt",
    "ltx_i2v": "LTX-Video image-to-video: the first frame stays as it is",
    "animatediff": "AnimateDiff: Stable Diffusion 1.x with motion modules, eps prediction, an autoencoder of pictures",
}

ANSWERING = {
    "llava": "LLaVA-1.5: CLIP and LLaMA or Vicuna; one image to a row, as many tokens for any size",
    "llava_next": "LLaVA-NeXT (1.6): an image as tiles; several images",
    "llava_onevision": "LLaVA-OneVision: SigLIP and Qwen2; tiles of one image, one tile each of several, clips",
    "qwen2_vl": "Qwen2-VL: images and clips at their own sizes, positions in time, height and width",
    "qwen2_5_vl": "Qwen2.5-VL: the same with windows in the vision tower",
    "qwen3_vl": "Qwen3-VL: features of several layers of the vision tower",
    "idefics3": "Idefics3: SigLIP and LLaMA; an image as tiles, several images",
    "smolvlm": "SmolVLM and SmolVLM2: small Idefics3",
    "internvl": "InternVL in transformers' layout (-HF): tiles, several images, clips",
    "gemma3": "Gemma 3: SigLIP; images seen in both directions, layers with a sliding window",
}
"""Vision-language models that task: mllm is tested with; others of transformers are tried as they are."""

Family = Literal[
    "auto", "sd", "sdxl", "sd3", "flux", "pixart", "sana", "qwen_image", "wan", "cogvideox", "hunyuan_video",
    "ltx", "wan_i2v", "cogvideox_i2v", "hunyuan_video_i2v", "ltx_i2v", "animatediff",
    "open_clip", "image_reward", "qwen2_vl", "latent",
]  # fmt: skip


class Vae(Strict):
    """How the autoencoder works through a batch; both save memory."""

    slicing: bool = Field(False, description="one picture or clip at a time; the results are the same")
    tiling: bool = Field(
        False, description="large pictures in overlapping tiles that are blended: close to the whole, not equal to it"
    )


class Model(Strict):
    """A checkpoint folder, as `save_pretrained` writes it."""

    path: Path = Field(description="folder with model_index.json (for task: reward that of a scorer's network)")
    family: Family = Field("auto", description="auto reads model_index.json; for task: reward it is open_clip")
    variant: str | None = Field(None, description="fp16 reads model.fp16.safetensors, where a folder has such files")
    lora: Path | None = Field(None, description="folder or file with LoRA weights to load on top")
    max_sequence_length: PositiveInt | None = Field(
        None, description="text tokens, for families whose pipeline takes it; default: the pipeline's (docs/train.md)"
    )
    guidance: float | None = Field(
        None, ge=0, description="told to guidance-distilled models (FLUX.1-dev) in training; default 1: the data's own"
    )
    expert: Literal["high", "low"] | None = Field(
        None,
        description="of two transformers (Wan 2.2 A14B) the one for high or low noise: it is trained, or has the LoRA",
    )
    vae: Vae = Vae()
    components: dict[str, Path] = Field({}, description="replace single parts, e.g. {vae: path/to/vae}")
    from_scratch: tuple[str, ...] = Field(
        (), description="parts to initialise at random from their config.json, e.g. [unet, vae]"
    )


class Shapes(Strict):
    """Scenes of the shapes world, rendered on the fly."""

    scenes: PositiveInt = Field(20000, description="how many different scenes")
    seed: int = 1
    held_out: bool = Field(False, description="captions from the held-out tenth of the grammar")
    counts: tuple[float, ...] | None = Field(
        None, min_length=1, max_length=3,
        description="share of one, two and three shapes; default: 0.6, 0.3, 0.1 of pictures, 0.75, 0.25 of clips",
    )  # fmt: skip
    annotator: str | None = Field(
        None, description="who judges, for tasks on preferences; default: faithful of pictures, balanced of clips"
    )
    votes: PositiveInt = Field(1, description="how often each pair is judged; the label is the winner's share of votes")
    per_prompt: int = Field(2, ge=2, description="pictures of each caption, for objectives on lists and rewards")


class Data(Strict):
    """What to train on, and how a picture becomes a tensor."""

    table: Path | None = Field(
        None, description="preference table (task: preference, reward) or media table (task: sft)"
    )
    format: str = Field("auto", description="see `mmalign list formats`")
    root: Path | None = Field(None, description="folder that relative media paths start from; default: the table's own")
    shapes: Shapes | None = Field(None, description="scenes of the shapes world instead of a table")
    dimension: str | None = Field(None, description="which label or score to use when a table holds several")
    dimensions: dict[str, float] | None = Field(
        None,
        description="or several with weights, e.g. {VQ: 1, MQ: 1, TA: 2}: labels and normalised scores are averaged",
    )
    axes: tuple[str, ...] = Field(
        (), description="or several kept apart, e.g. [VQ, MQ, TA], for task: reward; a row may lack some of them"
    )
    votes: Literal["separate", "share"] = Field(
        "separate", description="rows on the same pictures: each its own pair, or one pair with the share of votes"
    )
    pairing: Literal["within", "across"] = Field(
        "within", description="across: pairs of pictures of different prompts, by their scores (joint preferences)"
    )
    soft_labels: bool = Field(False, description="keep shares of votes and dimensions as labels between 0 and 1")
    normalise: Literal["minmax", "none"] = Field(
        "minmax", description="of scores over the table, for objectives that weigh by reward"
    )
    desirable_from: float | None = Field(
        None, description="score from which a single picture counts as liked; null: better than the rest of its row"
    )
    ties: Literal["drop", "soft", "half"] = Field(
        "drop", description="drop them; soft: label 0.5; half: both orders at half weight"
    )
    limit: PositiveInt | None = Field(None, description="use only the first rows, before ties are dropped")
    verify: bool = Field(True, description="decode every picture once before training and drop the broken ones")
    resolution: PositiveInt = Field(512, description="side of the square pictures; its area is that of every bucket")
    buckets: Literal["off", "aspect"] = Field(
        "off", description="aspect: each group is cut to the shape that keeps most of its pictures (docs/train.md)"
    )
    bucket_step: PositiveInt = Field(64, description="sides of buckets are multiples of this, in pixels")
    bucket_max_aspect: float = Field(2.0, ge=1, description="longest side of a bucket, relative to its other side")
    frames: PositiveInt | None = Field(
        None, description="of a clip, for video families: the autoencoder's stride times k, plus 1 (docs/train.md)"
    )
    fps: float | None = Field(
        None, gt=0, description="clips are resampled to this rate; null: each keeps its own, whatever that is"
    )
    frame_buckets: tuple[PositiveInt, ...] = Field(
        (), description="shorter lengths too, e.g. [17, 33]: a group of clips gets the longest that all of it fills"
    )
    bucket_budget: Literal["frame", "clip"] = Field(
        "frame", description="what data.resolution holds for: every frame, or the longest clip (shorter are larger)"
    )
    crop: Literal["center", "random"] = Field(
        "center", description="one crop for the whole pair; of a longer clip center takes the beginning"
    )
    flip: Probability = Field(0.0, description="probability of a horizontal flip, one for the whole pair")
    caption_dropout: Probability = Field(0.0, description="probability of an empty caption, one for the whole pair")
    cache: Literal["off", "memory", "disk"] = Field("disk", description="where latents and prompt embeddings are kept")
    cache_dir: Path | None = Field(
        None, description="folder of the disk cache; default: $MMALIGN_CACHE or the user's cache"
    )

    @model_validator(mode="after")
    def _clips(self) -> Data:
        if self.frames is None and (self.fps is not None or self.frame_buckets or self.bucket_budget != "frame"):
            raise ValueError(
                "data.fps, data.frame_buckets and data.bucket_budget are about clips: give data.frames too"
            )
        if self.frame_buckets and max(self.frame_buckets) >= (self.frames or 0):
            raise ValueError("data.frame_buckets are shorter than data.frames, which is the longest")
        if self.bucket_budget == "clip" and not self.frame_buckets:
            raise ValueError("data.bucket_budget: clip shares pixels among lengths; give data.frame_buckets")
        return self

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if self.table is not None and self.shapes is not None:
            raise ValueError("give exactly one of data.table and data.shapes")
        if self.dimension is not None and self.dimensions is not None:
            raise ValueError("give data.dimension or data.dimensions, not both")
        if self.axes and (self.dimension is not None or self.dimensions is not None):
            raise ValueError("give data.axes, or data.dimension or data.dimensions, not both")
        pictures = self.shapes is not None and self.frames is None
        if self.axes and (self.ties == "half" or self.pairing == "across" or pictures):
            raise ValueError(
                "data.axes keeps the judgements of a table's row together; use ties: soft or drop, pairing: within, "
                "and of the shapes world clips (data.frames)"
            )
        if self.dimensions is not None and (
            min(self.dimensions.values(), default=0) < 0 or not sum(self.dimensions.values())
        ):
            raise ValueError("data.dimensions: weights must not be negative, and one must be above 0")
        return self
