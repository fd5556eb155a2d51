"""How alike two answers are, by a sentence encoder: the cosine of the means of its last hidden states."""

from __future__ import annotations

from pathlib import Path

import torch

from mmalign.backbones.vlm_loading import load_model
from mmalign.paths import find
from mmalign.weights_read import BAD_CONFIG


class SentenceEncoder:
    """A folder that transformers' AutoModel and AutoTokenizer read, such as all-mpnet-base-v2."""

    def __init__(self, folder: Path, device: torch.device):
        """ValueError for a folder that holds no such model."""
        from transformers import AutoModel, AutoTokenizer

        path = find(folder)
        self.device = device
        self.model = load_model(AutoModel, path, torch.float32, "build.encoder").to(device).eval()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except BAD_CONFIG as error:
            raise ValueError(f"build.encoder: {path} has no tokenizer that can be read: {error}") from error

    @torch.no_grad()
    def similarity(self, one: str, other: str) -> float:
        """Cosine, in [-1, 1]; text beyond what the encoder reads is not looked at."""
        given = self.tokenizer([one, other], padding=True, truncation=True, return_tensors="pt").to(self.device)
        states = self.model(**given).last_hidden_state
        mask = given["attention_mask"][..., None].to(states)
        means = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        return float(torch.nn.functional.cosine_similarity(means[0], means[1], dim=0))
