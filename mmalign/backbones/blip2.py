"""BLIP-2's image-text contrast (Li et al., 2301.12597): the largest cosine of an image's queries with a text.

A folder is one of transformers' ``Blip2ForImageTextRetrieval`` with its processor, such as Salesforce/blip2-itm-vit-g.
The class's own forward runs the image tower again for every text; here images and texts are encoded once each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmalign.backbones.vlm_fits import check_class
from mmalign.backbones.vlm_loading import check_report, model_folder, unreadable
from mmalign.progress import quiet_transformers
from mmalign.weights_read import BAD_CONFIG

__all__ = ["Blip2Contrast", "check_fits", "load_blip2"]

IMAGES_AT_ONCE = 32


class Blip2Contrast:
    """Unit-length features of images and texts from one BLIP-2 with frozen weights.

    The image tower runs in the loader's dtype, the rest in the precision that the model keeps its Q-Former in, the
    cosines in float32.
    """

    def __init__(self, model: Any, processor: Any, device: torch.device):
        self._model = model.eval().requires_grad_(False).to(device)
        self._images, self._tokenizer = processor.image_processor, processor.tokenizer
        self.device = device

    @torch.no_grad()
    def images(self, images: Sequence[Tensor]) -> Tensor:
        """Features of images uint8 [3, H, W] of any sizes: float32 [N, queries, D]."""
        found = []
        tower, former = self._model.vision_model, self._model.qformer
        kept = next(former.parameters()).dtype
        for start in range(0, len(images), IMAGES_AT_ONCE):
            part = [image.to(self.device) for image in images[start : start + IMAGES_AT_ONCE]]
            pixels = self._images(images=part, input_data_format="channels_first", return_tensors="pt")["pixel_values"]
            states = tower(pixel_values=pixels.to(self.device, tower.dtype)).last_hidden_state.to(kept)
            queries = self._model.query_tokens.to(kept).expand(len(part), -1, -1)
            mask = torch.ones(states.shape[:2], dtype=torch.long, device=self.device)
            output = former(query_embeds=queries, encoder_hidden_states=states, encoder_attention_mask=mask)
            found.append(self._project(self._model.vision_projection, output.last_hidden_state))
        return torch.cat(found)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features of texts: float32 [M, D]."""
        inputs = self._tokenizer(list(texts), padding=True, return_tensors="pt").to(self.device)
        words = self._model.embeddings(input_ids=inputs["input_ids"])
        output = self._model.qformer(query_embeds=words, query_length=0, attention_mask=inputs["attention_mask"])
        return self._project(self._model.text_projection, output.last_hidden_state[:, 0])

    def cosines(self, images: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        """Of each image uint8 [3, H, W] with each text, that of the nearest query: float32 [N, M]."""
        return (self.images(images) @ self.texts(texts).T).amax(dim=1)

    def _project(self, layer: Any, states: Tensor) -> Tensor:
        return F.normalize(layer(states.to(layer.weight.dtype)).float(), dim=-1)


def load_blip2(*, folder: str, device: torch.device, dtype: torch.dtype) -> Blip2Contrast:
    """Loader for a `BackboneSpec`.

    Raises:
        ValueError: no such folder, none of a BLIP-2 for retrieval, or tensors that do not fit (all named).
    """
    from transformers import AutoConfig, AutoProcessor, Blip2Config, Blip2ForImageTextRetrieval

    path = model_folder(folder)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(path, **local)
        if not isinstance(config, Blip2Config):
            raise ValueError(f"it is a {config.model_type} and no blip-2 for retrieval")
        with quiet_transformers():
            kind: Any = Blip2ForImageTextRetrieval
            model, report = kind.from_pretrained(
                path, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **local
            )
            processor = AutoProcessor.from_pretrained(path, **local)
    except BAD_CONFIG as error:
        raise unreadable(str(path), error) from error
    check_report(report, str(path))
    return Blip2Contrast(model, processor, device)


def check_fits(state: Mapping[str, Tensor], file: Path) -> None:
    """Whether tensors (names to shapes) are those of a BLIP-2 for retrieval; ``file`` is its config.json.

    Raises:
        ValueError: missing, unexpected or mis-shaped tensors, all named.
    """
    from transformers import Blip2ForImageTextRetrieval

    check_class(lambda config: Blip2ForImageTextRetrieval, state, file.parent, str(file.parent))
