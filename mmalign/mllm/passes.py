"""Answers through a model: images once, prompts once where answers share them, states where tokens are predicted.

A `Branching` is a prompt with one answer or several. Where the model's positions and masks allow it, its row is
[prompt | answer | answer], each answer seeing the prompt and itself and beginning at the position behind the prompt;
else every answer has a row with a prompt of its own. Both give the same hidden states (tests/test_mllm_passes.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TEXT_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})
GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")

SHARING = frozenset({
    "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "internvl",
    "gemma3",
})  # fmt: skip
"""Families (`model_type`) whose rows may share a prompt: each is tested against rows of its own."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt as the processor makes it.

    Attributes:
        ids: token ids, with one placeholder for each image feature.
        kinds: for each token 0 text, 1 image, 2 video, for families that are told; else None.
        vision: what the processor made of images and clips, of this prompt alone, under its own names.
    """

    ids: tuple[int, ...]
    kinds: tuple[int, ...] | None = None
    vision: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Branching:
    """A prompt and the token ids of answers to it."""

    prompt: Prompt
    answers: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Seen:
    """What the vision tower says of one prompt: rows for the placeholders, in their order; by "image" and "video"."""

    features: dict[str, Tensor]
    deep: dict[str, list[Tensor]]  # Qwen3-VL: features of earlier layers, added inside the language model


class Passes:
    """The passes of one model.

    Attributes:
        shared: whether answers share their prompt's row.
    """

    def __init__(self, model: Any, shared: bool):
        self.model, self.base, self.shared = model, model.base_model, shared
        self.family = str(model.config.model_type)
        text = model.config.get_text_config()
        self._eager = model.config._attn_implementation == "eager"
        by_layer = "sliding_attention" in (getattr(text, "layer_types", None) or ())
        self._window = int(text.sliding_window) if by_layer else None
        self._both_ways = self.family == "gemma3"  # tokens of an image see each other
        self._tokens = {
            kind: _first(model.config, f"{kind}_token_id", f"{kind}_token_index") for kind in ("image", "video")
        }

    # ---------------------------------------------------------------------------------------------------- vision

    def see(self, prompts: Sequence[Prompt]) -> dict[int, Seen]:
        """Features of every prompt's images and clips, by `id(prompt)`; one run of the tower for all of a kind."""
        seen = {id(prompt): Seen({}, {}) for prompt in prompts}
        each = {id(prompt): prompt for prompt in prompts}
        for kind, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            looking = [prompt for prompt in each.values() if key in prompt.vision]
            if not looking:
                continue
            inputs = joined([self._vision(prompt, kind) for prompt in looking], self.model.device)
            output = getattr(self.base, f"get_{kind}_features")(**inputs, return_dict=True)
            counts = [self._places(prompt, kind) for prompt in looking]
            flat = _flat(output.pooler_output)
            if sum(counts) != len(flat):
                raise ValueError(
                    f"the processor leaves {sum(counts)} places for {len(flat)} {kind} features; the folder's "
                    f"processor files are not those of this {self.family} model"
                )
            deep = [_flat(layer).split(counts) for layer in getattr(output, "deepstack_features", None) or ()]
            for i, (prompt, part) in enumerate(zip(looking, flat.split(counts), strict=True)):
                seen[id(prompt)].features[kind] = part
                seen[id(prompt)].deep[kind] = [layer[i] for layer in deep]
        return seen

    @torch.no_grad()
    def counts(self, prompt: Prompt) -> list[int] | None:
        """Features of each of a prompt's images, where the family's tower gives them image by image; else None.

        Idefics3 and SmolVLM give all of a row's images together, InternVL and Gemma 3 tile by tile.
        """
        output = self.base.get_image_features(
            **joined([self._vision(prompt, "image")], self.model.device), return_dict=True
        )
        features = output.pooler_output
        apart = not isinstance(features, Tensor) and self.family not in ("idefics3", "smolvlm")
        return [len(part) for part in features] if apart else None

    def _vision(self, prompt: Prompt, kind: str) -> dict[str, Tensor]:
        """The processor's outputs that speak of one kind of media."""
        other = "image" if kind == "video" else "video"
        named = {key: value for key, value in prompt.vision.items() if key not in ("second_per_grid_ts",)}
        if kind == "video":
            return {key: value for key, value in named.items() if "video" in key}
        return {key: value for key, value in named.items() if other not in key}

    def _places(self, prompt: Prompt, kind: str) -> int:
        return prompt.ids.count(self._tokens[kind]) if self._tokens[kind] is not None else 0

    # ------------------------------------------------------------------------------------------------------- rows

    def hidden(self, branchings: Sequence[Branching], seen: dict[int, Seen]) -> Tensor:
        """Hidden states that predict each token of each answer: [N, D], answers in their order, branching by branching.

        Raises:
            ValueError: an answer is empty.
        """
        if not self.shared:
            branchings = [Branching(each.prompt, (answer,)) for each in branchings for answer in each.answers]
        rows = [self._row(each) for each in branchings]
        device = self.model.device
        length = max(len(row.ids) for row in rows)
        ids = torch.stack([_padded(torch.tensor(row.ids), length) for row in rows])
        inputs: dict[str, Any] = {"input_ids": ids.to(device), "use_cache": False, "return_dict": True}
        inputs["attention_mask"] = self._mask(rows, length, device)
        inputs["position_ids"] = self._positions(rows, length).to(device)
        if self.family == "gemma3" and not self.shared:
            inputs["token_type_ids"] = torch.stack([_padded(row.kinds, length) for row in rows]).to(device)
        features = self._features([row.prompt for row in rows], seen)
        if features:
            inputs["mm_encoder_outputs"] = features
        states = self.base(**inputs).last_hidden_state
        places = torch.cat([i * length + row.reads for i, row in enumerate(rows)])
        return states.flatten(0, 1)[places.to(device)]

    def _row(self, each: Branching) -> _Row:
        prompt, ids = each.prompt, list(each.prompt.ids)
        start = len(ids)
        kinds = torch.tensor(prompt.kinds if prompt.kinds is not None else [0] * start)
        branch, reads = [torch.zeros(start, dtype=torch.long)], []
        own = self._prompt_positions(prompt)  # [P] or [3, P]
        positions, behind = [own], int(own.max()) + 1
        for number, answer in enumerate(each.answers, 1):
            if not answer:
                raise ValueError("an answer has no tokens")
            first = len(ids)
            reads.append(torch.tensor([start - 1, *range(first, first + len(answer) - 1)]))
            ids += answer
            branch.append(torch.full((len(answer),), number))
            positions.append((behind + torch.arange(len(answer))).expand(*own.shape[:-1], -1))
        kinds = F.pad(kinds, (0, len(ids) - start))
        places = torch.cat(reads) if reads else torch.zeros(0, dtype=torch.long)
        return _Row(prompt, ids, kinds, torch.cat(branch), torch.cat(positions, -1), places)

    def _prompt_positions(self, prompt: Prompt) -> Tensor:
        """[P], or [3, P] (time, row, column) for families with M-RoPE."""
        if not hasattr(self.base, "get_rope_index"):
            return torch.arange(len(prompt.ids))
        ids = torch.tensor([prompt.ids])
        grids = {name: prompt.vision[name] for name in GRIDS if name in prompt.vision}
        kinds = torch.tensor([prompt.kinds if prompt.kinds is not None else [0] * len(prompt.ids)])
        if not grids:
            return torch.arange(len(prompt.ids)).expand(3, -1)
        found, _ = self.base.get_rope_index(
            ids, mm_token_type_ids=kinds, attention_mask=torch.ones_like(ids), **{"image_grid_thw": None, **grids}
        )
        return torch.as_tensor(found[:, 0])

    def _positions(self, rows: Sequence[_Row], length: int) -> Tensor:
        return torch.stack([_padded(row.positions, length) for row in rows], dim=-2)

    # --------------------------------------------------------------------------------------- a prompt, then its answer

    def prefix(self, prompt: Prompt, visible: Tensor) -> tuple[dict[str, Any], int]:
        """Inputs of the base model for a prompt alone, and the position behind it.

        Args:
            visible: bool [P]; other tokens are seen by themselves alone.
        """
        row = self._row(Branching(prompt, ()))
        size, device = len(row.ids), self.model.device
        inputs: dict[str, Any] = {"input_ids": torch.tensor([row.ids], device=device)}
        inputs["position_ids"] = self._positions([row], size).to(device)
        inputs["attention_mask"] = self._masks(
            lambda window: (_block_mask(row, size, self._both_ways, window) & (visible[None] | torch.eye(size).bool()))[
                None
            ]
        )
        features = self._features([prompt], self.see([prompt]))
        if features:
            inputs["mm_encoder_outputs"] = features
        return inputs, int(row.positions.max()) + 1

    def further(self, tokens: Sequence[int], visible: Tensor, behind: int, place: int) -> dict[str, Any]:
        """Inputs for tokens of an answer of which `place` have been read, behind a prompt in the cache."""
        count, device = len(tokens), self.model.device
        at = behind + place + torch.arange(count)
        positions = at.expand(3, 1, -1) if hasattr(self.base, "get_rope_index") else at[None]
        before = torch.cat([visible.expand(count, -1), torch.ones(count, place, dtype=torch.bool)], 1)
        own = torch.ones(count, count, dtype=torch.bool).tril()

        def mask(window: int | None) -> Tensor:
            seen = torch.cat([before, own], 1)
            if window is not None:  # a prompt of text and images has a position per token in these families
                keys = torch.cat([torch.arange(len(visible)), behind + torch.arange(place + count)])
                seen &= at[:, None] - keys[None] < window
            return seen[None]

        ids = torch.tensor([list(tokens)], device=device)
        return {"input_ids": ids, "position_ids": positions.to(device), "attention_mask": self._masks(mask)}

    # ------------------------------------------------------------------------------------------------------ masks

    def _mask(self, rows: Sequence[_Row], length: int, device: torch.device) -> Any:
        if not self.shared:
            return torch.stack([_padded(torch.ones(len(row.ids), dtype=torch.long), length) for row in rows]).to(device)
        return self._masks(
            lambda window: torch.stack([_block_mask(row, length, self._both_ways, window) for row in rows])
        )

    def _masks(self, mask: Callable[[int | None], Tensor]) -> Any:
        """Masks bool [B, S, S] of a function of the window as the family takes them: one, or one per kind of layer."""
        windows = {"full_attention": None} | ({"sliding_attention": self._window} if self._window else {})
        device = self.model.device
        made = {name: self._as_attention_takes_it(mask(each)[:, None].to(device)) for name, each in windows.items()}
        return made if self._window else made["full_attention"]

    def _as_attention_takes_it(self, mask: Tensor) -> Tensor:
        if not self._eager:
            return mask
        dtype = self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    # --------------------------------------------------------------------------------------------------- features

    def _features(self, prompts: Sequence[Prompt], seen: dict[int, Seen]) -> dict[str, Any]:
        """Encoder outputs as the family's forward takes them, rows in the order of the placeholders."""
        found: dict[str, Any] = {}
        for kind in ("image", "video"):
            parts = [seen[id(prompt)] for prompt in prompts if kind in seen[id(prompt)].features]
            if not parts:
                continue
            flat = torch.cat([part.features[kind] for part in parts])
            deep = [torch.cat(layers) for layers in zip(*(part.deep[kind] for part in parts), strict=True)]
            found[kind] = _Output(_like(self.family, kind, flat), [(layer,) for layer in deep] or None)
        return found


@dataclass
class _Row:
    """One row: ids, kinds [S], the branch of each token [S] (0 the prompt), positions [..., S], what is read."""

    prompt: Prompt
    ids: list[int]
    kinds: Tensor
    branch: Tensor
    positions: Tensor
    reads: Tensor


@dataclass
class _Output:
    """What transformers' forwards read of an encoder's output."""

    pooler_output: Any
    deepstack_features: list[Any] | None = None


def shares(model: Any) -> str | None:
    """Why answers of this model cannot share a row with their prompt; None if they can."""
    family, text = str(model.config.model_type), model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ("full_attention",))
    if family not in SHARING:
        return f"{family} is not among the families that are tested for it"
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return f"{model.config._attn_implementation} has no block masks; use attention: sdpa"
    if not kinds <= {"full_attention", "sliding_attention"}:
        return f"{family} has layers of {', '.join(sorted(kinds))}"
    if "sliding_attention" in kinds and family != "gemma3":
        return f"{family} has layers with a sliding window"
    return None


def joined(inputs: Sequence[dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Processor outputs of several prompts as one: along the first dimension, the others padded with zeros."""
    names = list(dict.fromkeys(name for each in inputs for name in each))
    found = {}
    for name in names:
        parts = [each[name] for each in inputs if name in each]
        rest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
        padded = []
        for part in parts:
            spare = [(0, size - own) for size, own in zip(rest, part.shape[1:], strict=True)]
            padded.append(
                F.pad(part, [n for pair in reversed(spare) for n in pair]) if any(b for _, b in spare) else part
            )
        found[name] = torch.cat(padded).to(device)
    return found


def _block_mask(row: _Row, length: int, images: bool, window: int | None) -> Tensor:
    """Who sees whom, bool [length, length]: the prompt and one's own answer, as far as they are before.

    Args:
        images: whether tokens of one image see each other in both directions, as Gemma 3's do.
        window: how many positions back a token sees, itself among them; None is all.

    Padding sees itself, since a row without anything to see has no softmax.
    """
    size = len(row.ids)
    order, branch = torch.arange(size), row.branch
    allowed = ((branch[None] == 0) | (branch[None] == branch[:, None])) & (order[None] <= order[:, None])
    if images:
        allowed |= _in_one_image(row.kinds)
    if window is not None:
        allowed &= row.positions[:, None] - row.positions[None] < window
    whole = torch.eye(length, dtype=torch.bool)
    whole[:size, :size] = allowed
    return whole


def _in_one_image(kinds: Tensor) -> Tensor:
    """Bool [S, S]: both tokens belong to the same run of image tokens."""
    image = kinds == 1
    run = torch.cumsum(image & ~F.pad(image, (1, 0))[:-1], 0)
    return image[:, None] & image[None] & (run[:, None] == run[None])


def _padded(value: Tensor, length: int) -> Tensor:
    return F.pad(value, (0, length - value.shape[-1]))


def _flat(features: Any) -> Tensor:
    """Rows [N, D] of features that families give as a tensor or as a tuple of tensors."""
    if isinstance(features, Tensor):
        return features.reshape(-1, features.shape[-1])
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in features])


def _like(family: str, kind: str, flat: Tensor) -> Any:
    """Rows as the family's forward expects its encoder's output."""
    if family in ("internvl", "gemma3"):
        return flat
    if family == "llava_onevision" and kind == "video":
        return flat[None]
    return (flat,)


def _first(config: Any, *names: str) -> int | None:
    return next((int(getattr(config, name)) for name in names if getattr(config, name, None) is not None), None)
