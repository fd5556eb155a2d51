"""HunyuanVideo-I2V: the first frame in latents, and before the eyes of the language model that reads the prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import HunyuanVideoImageToVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor, nn

from mmalign.jobs_inputs import Model
from mmalign.models.adapter import Condition
from mmalign.models.hunyuan_video import SKIPPED, HunyuanVideo
from mmalign.models.image_to_video import FromImage, known_velocity, pictures, with_first

_BEFORE = int(DEFAULT_PROMPT_TEMPLATE["crop_start"])  # tokens of the template before the prompt, the picture as one
_PLACE = int(DEFAULT_PROMPT_TEMPLATE["image_emb_start"])
_TOKENS = int(DEFAULT_PROMPT_TEMPLATE["image_emb_len"])  # that the picture is
_AFTER = 4  # tokens of the template behind the prompt that the pipeline leaves out


class HunyuanVideoImage(FromImage, HunyuanVideo):
    """Adapter for folders that `HunyuanVideoImageToVideoPipeline.from_pretrained` loads.

    Of its two kinds, `token_replace` has the picture's latents as first latent frame, at time 0, and `predict` returns
    its known velocity. `latent_concat` has them beside the noisy ones as channels, with a mask; the pipeline drops what
    the first latent frames decode to, so that its clips begin behind the picture, and `draw` asks for as many frames
    more.
    """

    family = "hunyuan_video_i2v"
    pipeline_class: Any = HunyuanVideoImageToVideoPipeline
    sees_image = True

    def __init__(self, pipe: Any, config: Model):
        super().__init__(pipe, config)
        kind = self.denoiser.config.image_condition_type
        self.keeps_first = kind == "token_replace"
        self.interleave = 4 if self.keeps_first else 2  # of the picture's tokens one in so many is used
        if not self.keeps_first:
            self.frames = HunyuanVideo.frames - self.temporal
        told = pipe.text_encoder.config
        if getattr(told, "pad_token_id", None) is None:
            raise ValueError(
                f'{config.path}: the pipeline reads pad_token_id from text_encoder/config.json; add "pad_token_id": '
                f"{pipe.tokenizer.pad_token_id} to that file"
            )
        if pipe.tokenizer(DEFAULT_PROMPT_TEMPLATE["template"]).input_ids[_PLACE] != told.image_token_index:
            raise ValueError(
                f"{config.path}: the tokenizer does not put <image> where the pipeline counts on it (token {_PLACE} of "
                f"the template, number {told.image_token_index}); copy the folder's tokenizer again from its source"
            )

    def draw(self, *args: Any, **options: Any) -> np.ndarray:
        dropped = 0 if self.keeps_first else self.temporal
        return super().draw(*args, **{**options, "num_frames": (options.get("num_frames") or self.frames) + dropped})

    # ------------------------------------------------------------------------------------------------ prompts

    def encode_prompt(self, prompts: list[str], *, grad: bool = False) -> Condition:
        """What does not depend on the picture; `join` has the rest.

        input_ids and attention_mask [B, L] of the prompts in the pipeline's template, with one token for the picture,
        and CLIP's pooled_projections [B, P].

        Raises:
            ValueError: gradients are wanted.
        """
        if grad:
            raise ValueError("optim.train_text_encoder: that of hunyuan_video_i2v sees pictures, and is not trained")
        texts = [DEFAULT_PROMPT_TEMPLATE["template"].format(prompt) for prompt in prompts]
        tokens = self.tokens(self.pipe.tokenizer, texts, _BEFORE + int(self.text_length or 0))
        return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask, **self.pooled(prompts)}

    def look(self, images: Tensor) -> Condition:
        """pixel_values [B, 3, S, S] for the vision tower."""
        return {"pixel_values": self.pipe.image_processor(pictures(images), return_tensors="pt").pixel_values}

    def blank(self, rows: int) -> Condition:
        side = self.pipe.text_encoder.config.vision_config.image_size
        return {"pixel_values": torch.empty(rows, 3, side, side)}

    @torch.no_grad()
    def join(self, condition: Condition) -> Condition:
        """encoder_hidden_states [B, L, D] and encoder_attention_mask [B, L] in place of tokens and pixels.

        States of some of the picture's tokens, then those of the prompt, as the pipeline takes them.
        """
        known = dict(condition)
        ids, mask = known.pop("input_ids"), known.pop("attention_mask")
        with self.encoding(grad=False):
            states = self._states(ids, known.pop("pixel_values"))
        places = torch.arange(_BEFORE, ids.shape[1], device=ids.device)
        end = ids == self.pipe.tokenizer.convert_tokens_to_ids("<|end_header_id|>")
        numbers = torch.arange(ids.shape[1], device=ids.device)
        # The last of three, behind the prompt; where the prompt was cut there are two.
        last = torch.where(end.sum(1) > 2, (end * numbers).amax(1), ids.shape[1] - 1)[:, None]
        left_out = (places > last - _AFTER) & (places <= last)
        kept = places[left_out.int().argsort(dim=1, stable=True)[:, :-_AFTER]]
        of_prompt = states.gather(1, (kept + _TOKENS - 1)[..., None].expand(-1, -1, states.shape[2]))
        of_image = states[:, _PLACE : _PLACE + _TOKENS : self.interleave]
        return {
            **known,
            "encoder_hidden_states": torch.cat([of_image, of_prompt], dim=1),
            "encoder_attention_mask": torch.cat([mask.new_ones(of_image.shape[:2]), mask.gather(1, kept)], dim=1),
        }

    def _states(self, ids: Tensor, pixels: Tensor) -> Tensor:
        """The language model's states [B, L + N - 1, D] of texts [B, L] in which the picture takes N tokens."""
        model, told = self.pipe.text_encoder.model, self.pipe.text_encoder.config
        seen = torch.stack([*model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output])
        ids = torch.cat([ids[:, :_PLACE], ids[:, _PLACE : _PLACE + 1].expand(-1, _TOKENS), ids[:, _PLACE + 1 :]], dim=1)
        embedded = model.get_input_embeddings()(ids)
        embedded = torch.cat([embedded[:, :_PLACE], seen.to(embedded), embedded[:, _PLACE + _TOKENS :]], dim=1)
        read = ids != told.pad_token_id
        found: Tensor = model.language_model(
            inputs_embeds=embedded, attention_mask=read.long(), output_hidden_states=True,
            position_ids=(read.cumsum(1) - 1).masked_fill(~read, 1),
        ).hidden_states[-(SKIPPED + 1)]  # fmt: skip
        return found

    # ------------------------------------------------------------------------------------------------ denoiser

    def image_latents(self, images: Tensor, frames: int) -> Tensor:
        """[B, C, 1, h, w], or [B, C + 1, T, h, w] with zeros for the other frames, and the mask behind."""
        first = self.first_latents(images)
        if self.keeps_first:
            return first
        given = torch.cat([first, torch.ones_like(first[:, :1])], dim=1)
        return torch.cat(
            [given, given.new_zeros(*given.shape[:2], self.latent_frames(frames) - 1, *given.shape[3:])], 2
        )

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, denoiser: nn.Module | None = None) -> Tensor:
        known, given = self.given(condition)
        given, t = given.to(noisy), t.to(noisy.device)
        if not self.keeps_first:
            return super().predict(torch.cat([noisy, given], dim=1), t, known, denoiser)
        found = super().predict(with_first(noisy, given), t, known, denoiser)
        return with_first(found, known_velocity(noisy, t, given))
