"""Vision-language models that answer questions about images: likelihoods of answers, last hidden states, greedy text.

Any folder that transformers loads by ``AutoModelForImageTextToText`` and ``AutoProcessor`` is read, from the disk
alone and without code of the folder's own. `FAMILIES` share the images and the beginning of the text between all
questions about an item (`mmalign.backbones.vlm_prefix`) and are tested against separate passes of the stock model; any
other family is asked one question at a time through its own forward.

Images go through the folder's own processor, from uint8 on the model's device (torchvision's resize, antialiased).
Hidden states may be bfloat16; the language model's head is applied in float32, and only where its output is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmalign.backbones.vlm_generate import Asked, Decoding, Writer
from mmalign.backbones.vlm_loading import load_parts, most_tokens
from mmalign.backbones.vlm_lora import merge_adapter
from mmalign.backbones.vlm_prefix import Tokens, hidden_states
from mmalign.backbones.vlm_text import ChatFormat, End

__all__ = ["FAMILIES", "Media", "VisionLanguageModel", "load_vlm"]

FAMILIES = {
    "idefics3": True,
    "llava": False,
    "llava_onevision": True,
    "qwen2_5_vl": True,
    "qwen2_vl": True,
    "smolvlm": True,
}
"""Families (``model_type``) whose passes are shared, and whether they read several images, so also frames of a clip."""

VISION_PIXELS = 2**23
"""Most pixels (before resizing) that are prepared and run through the vision tower at once."""
HEAD_ROWS, HEAD_TOKENS = 1024, 16384
TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}


@dataclass(frozen=True)
class Media:
    """The images of one item as a model sees them.

    Attributes:
        clip: uint8 [T, 3, H, W]; each frame is an image.
        block: token ids from the first image's to the last one's, one for each feature and what stands between.
        gap: token ids from the first placeholder to the last one in a text before images are put in.
        features: [N, D], one row for each placeholder of the block, in the model's precision; None for a family
            outside of `FAMILIES`, which sees the clip again with each question.
        grid: patches in time, height and width of each image [T, 3]; only with M-RoPE.
    """

    clip: Tensor
    block: tuple[int, ...] = ()
    gap: tuple[int, ...] = ()
    features: Tensor | None = None
    grid: Tensor | None = None


class VisionLanguageModel:
    """A frozen model with its processor.

    Attributes:
        family: its ``model_type``.
        words: makes the texts that it reads.
        width: size of a hidden state.
        writer: writes answers in words.
        device, dtype: where and in what precision it runs.
    """

    def __init__(self, model: Any, processor: Any, words: ChatFormat, device: torch.device, dtype: torch.dtype):
        self.family = str(model.config.model_type)
        self.device, self.dtype, self.words = device, dtype, words
        self._processor, self._tokenizer = processor, processor.tokenizer
        self._model = model.eval().requires_grad_(False).to(device)
        self._head = model.get_output_embeddings()
        self.width = int(self._head.weight.shape[1])
        self._shared = self.family in FAMILIES
        self._limit = most_tokens(model.config)
        self.writer = Writer(model, processor, words, self._limit, device, dtype)

    # ---------------------------------------------------------------------------------------------------- images

    def see(self, clips: Sequence[Tensor]) -> list[Media]:
        """Prepare images and run the vision tower, once for all questions that follow.

        Args:
            clips: uint8 [T, 3, H, W] each, of any sizes; T = 1 for an image.

        Raises:
            ValueError: a clip of several frames for a family that reads one image.
        """
        for clip in clips:
            if len(clip) > 1 and not FAMILIES.get(self.family, False):
                several = ", ".join(name for name, many in FAMILIES.items() if many)
                raise ValueError(
                    f"{self.family} models read one image at a time here, and this clip has {len(clip)} frames; "
                    f"use a model of {several} for videos."
                )
        if not self._shared:
            return [Media(clip) for clip in clips]
        seen: list[Media] = []
        start, pixels = 0, 0
        for index, clip in enumerate(clips):
            pixels += clip.shape[0] * clip.shape[2] * clip.shape[3]
            if pixels > VISION_PIXELS or index == len(clips) - 1:
                seen += self._see(clips[start : index + 1])
                start, pixels = index + 1, 0
        return seen

    @torch.no_grad()
    def _see(self, clips: Sequence[Tensor]) -> list[Media]:
        texts = [self.words.chat("x", len(clip)) for clip in clips]
        inputs = self._inputs(texts, clips)
        rows = [
            ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        vision = {key: value for key, value in inputs.items() if key not in TEXT_INPUTS}
        pooled = self._model.base_model.get_image_features(**vision, return_dict=True).pooler_output
        features = torch.cat([part.reshape(-1, part.shape[-1]) for part in pooled])
        counts = [ids.count(self.words.placeholder) for ids in rows]
        if sum(counts) != len(features):
            raise ValueError(
                f"The processor leaves {sum(counts)} places for {len(features)} image features; the folder's processor "
                f"files are not those of this {self.family} model."
            )
        grids: Iterable[Tensor | None] = [None] * len(clips)
        if "image_grid_thw" in vision:
            grids = vision["image_grid_thw"].cpu().split([len(clip) for clip in clips])
        parts = zip(clips, texts, rows, features.split(counts), grids, strict=True)
        return [Media(clip, *self._block(text, ids), part, grid) for clip, text, ids, part, grid in parts]

    def _block(self, text: str, expanded: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the images became in the processor's tokens, and what stood there in the text's own."""
        ids = self.words.ids(text)
        first, last = _span(ids, self.words.placeholder)
        tail = len(ids) - last
        if expanded[:first] != ids[:first] or expanded[len(expanded) - tail :] != ids[last:]:
            raise ValueError(
                f"The processor changes more of a text than the images' places, which {self.family} models' do not; "
                "the folder's processor files are not those of this model."
            )
        return tuple(expanded[first : len(expanded) - tail]), tuple(ids[first:last])

    def _inputs(self, texts: list[str], clips: Sequence[Tensor]) -> dict[str, Tensor]:
        images = [list(clip.to(self.device)) for clip in clips]
        inputs = self._processor(
            text=texts,
            images=images,
            return_tensors="pt",
            padding=True,
            input_data_format="channels_first",
            **self.words.special(texts[0]),
        )
        return {
            key: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for key, value in inputs.items()
        }

    # ---------------------------------------------------------------------------------------------------- answers

    @torch.no_grad()
    def log_likelihoods(
        self,
        media: Sequence[Media],
        texts: Sequence[Sequence[str]],
        answers: Sequence[Sequence[Sequence[str]]],
        end: End = "never",
    ) -> list[list[list[Tensor]]]:
        """Log-probabilities of the tokens of answers.

        Args:
            media: of each item, from `see`.
            texts: for each item, texts from `words.chat` with as many images as it has.
            answers: for each item and text, answers such as ``Yes``.
            end: also the probability of the token that ends the answer: ``needed`` adds it to the answers to a text
                where one of them begins with another.

        Returns:
            For each item, text and answer, ``log p(token | images, text, tokens before)`` float32 [tokens] on the CPU,
            softmax over the whole vocabulary.

        Raises:
            ValueError: a text is longer than the model reads, or an answer has no tokens of its own.
        """
        tokens = [
            [self.words.choice_ids(text, choices, end) for text, choices in zip(*pair, strict=True)]
            for pair in zip(texts, answers, strict=True)
        ]
        # Answers that begin alike are read off one pass: "Yes" and "No" need the question alone.
        asked = [
            [(text, context) for text, choices in zip(*pair, strict=True) for context in _contexts(choices)]
            for pair in zip(texts, tokens, strict=True)
        ]
        found = [states for item in self._states(media, asked) for states in item]
        rows: list[Tensor] = []
        targets: list[int] = []
        start, number = 0, 0
        for choices in (choices for item in tokens for choices in item):
            places = {}
            for context in _contexts(choices):
                places[context] = start
                start, number = start + len(found[number]), number + 1
            for ids in choices:
                rows.append(places[ids[:-1]] + torch.arange(len(ids)))
                targets += ids
        if not rows:
            return [[[] for _ in item] for item in tokens]
        values = self._log_probabilities(torch.cat(found), torch.cat(rows), targets)
        flat = iter(values.split([len(row) for row in rows]))
        return [[[next(flat) for _ in choices] for choices in item] for item in tokens]

    def check(
        self, media: Media, texts: Sequence[str], answers: Sequence[Sequence[str]] | None = None, end: End = "never"
    ) -> None:
        """Whether one item can be asked this, before the network runs; arguments as for `log_likelihoods`.

        Without answers it is as for `last_states`. Families that are not in `FAMILIES` find a text's length when they
        read it.

        Raises:
            ValueError: as `log_likelihoods`.
        """
        behind = [0] * len(texts)
        if answers is not None:
            found = [self.words.choice_ids(text, choices, end) for text, choices in zip(texts, answers, strict=True)]
            behind = [max(len(ids) for ids in choices) - 1 for choices in found]
        for text, more in zip(texts, behind, strict=True):
            if self._shared:
                self._check_length(len(self._expand(text, media)[0]) + more)

    @torch.no_grad()
    def last_states(self, media: Sequence[Media], texts: Sequence[Sequence[str]]) -> list[Tensor]:
        """Final hidden state (after the last norm) of each text's last token: float32 [texts, width] for each item."""
        states = self._states(media, [[(text, ()) for text in item] for item in texts])
        return [torch.cat(item) for item in states]

    @torch.no_grad()
    def generate(self, clips: Sequence[Tensor], texts: Sequence[str], max_new_tokens: int) -> list[str]:
        """The greedy answer to one text per clip (uint8 [T, 3, H, W]), without control tokens.

        One item at a time: in a padded batch a rounding difference could change a word and all that follows it.
        `writer` has batches, sampling and questions without images.
        """
        answers = []
        for clip, text in zip(clips, texts, strict=True):
            (found,) = self.writer.write([Asked(text, tuple(clip))], Decoding(max_new_tokens))
            if isinstance(found, ValueError):
                raise found
            answers.append(found.text)
        return answers

    # ---------------------------------------------------------------------------------------------------- passes

    def _states(
        self, media: Sequence[Media], asked: Sequence[Sequence[tuple[str, tuple[int, ...]]]]
    ) -> list[list[Tensor]]:
        """For each item and (text, context), hidden states from the text's last token to the context's last one."""
        if not self._shared:
            return [
                [self._stock(one.clip, *ask) for ask in item] for one, item in zip(media, asked, strict=True)
            ]  # one pass each, as the family's own forward does it
        items = [self._tokens(one, item) for one, item in zip(media, asked, strict=True)]
        return hidden_states(self._model.base_model, self.words.placeholder, items)

    def _tokens(self, media: Media, asked: Sequence[tuple[str, tuple[int, ...]]]) -> list[Tokens]:
        found = []
        rotary: dict[int, Tensor] = {}
        # The longest first: where images begin at the same place, the others' positions are a part of its own.
        expanded = [(*self._expand(text, media), context) for text, context in asked]
        for ids, start, context in sorted(expanded, key=lambda one: len(one[0]) + len(one[2]), reverse=True):
            if start not in rotary:
                rotary[start] = self._positions([*ids, *context], media)
        for ids, start, context in expanded:
            whole = [*ids, *context]
            self._check_length(len(whole))
            reads = list(range(len(ids) - 1, len(whole)))
            assert media.features is not None
            stop = start + len(media.block)
            found.append(Tokens(whole, reads, media.features, stop, rotary[start][:, : len(whole)]))
        return found

    def _expand(self, text: str, media: Media) -> tuple[list[int], int]:
        """The text's tokens with the images put in, and where they begin."""
        ids = self.words.ids(text)
        first, last = _span(ids, self.words.placeholder)
        if tuple(ids[first:last]) != media.gap:
            raise ValueError(
                f"The text has {ids.count(self.words.placeholder)} places for images and the item {len(media.clip)}, "
                "or the chat template writes something between images that depends on the question."
            )
        return [*ids[:first], *media.block, *ids[last:]], first

    def _positions(self, ids: list[int], media: Media) -> Tensor:
        """Rotary positions [1, L] in sequence, or [3, L] of M-RoPE as the model itself counts them."""
        if media.grid is None:
            return torch.arange(len(ids))[None]
        row = torch.tensor([ids])
        positions, _ = self._model.base_model.get_rope_index(
            row, mm_token_type_ids=(row == self.words.placeholder).int(), image_grid_thw=media.grid
        )
        return torch.as_tensor(positions[:, 0])

    def _stock(self, clip: Tensor, text: str, context: tuple[int, ...]) -> Tensor:
        inputs = self._inputs([text], [clip])
        length, extra = inputs["input_ids"].shape[1], torch.tensor([context], dtype=torch.long, device=self.device)
        self._check_length(length + len(context))
        for key in TEXT_INPUTS & inputs.keys():
            more = extra if key == "input_ids" else torch.full_like(extra, int(key == "attention_mask"))
            inputs[key] = torch.cat([inputs[key], more.to(inputs[key].dtype)], dim=1)
        states = self._model.base_model(**inputs, use_cache=False).last_hidden_state
        return torch.as_tensor(states[0, length - 1 :].float())

    def _check_length(self, length: int) -> None:
        if length > self._limit:
            raise ValueError(
                f"The question with its images has {length} tokens, and this {self.family} model reads {self._limit}; "
                "shorten the prompt, or use fewer or smaller images."
            )

    def _log_probabilities(self, states: Tensor, rows: Tensor, targets: Sequence[int]) -> Tensor:
        """Log softmax of the head on states float32 [N, D] at M (row, token): float32 [M], at most 0, on the CPU."""
        weight, bias = self._head.weight, getattr(self._head, "bias", None)
        whole = []
        for part in states.split(HEAD_ROWS):
            # In pieces of the vocabulary, each cast to float32 by itself: the whole head of a 7B model takes 2 GB.
            pieces = []
            for start in range(0, len(weight), HEAD_TOKENS):
                piece = slice(start, start + HEAD_TOKENS)
                shift = None if bias is None else bias[piece].float()
                pieces.append(F.linear(part, weight[piece].float(), shift).logsumexp(dim=-1))
            whole.append(torch.stack(pieces).logsumexp(dim=0))
        rows, ids = rows.to(weight.device), torch.tensor(targets, device=weight.device)
        logits = (states[rows] * weight[ids].float()).sum(dim=-1)
        logits = logits if bias is None else logits + bias[ids].float()
        # Both sums are rounded in their own order, so a sure answer could come out likelier than 1.
        return (logits - torch.cat(whole)[rows]).clamp_max(0.0).cpu()


def _span(ids: list[int], placeholder: int) -> tuple[int, int]:
    """First index of the placeholder and one past its last; (0, 0) without one."""
    places = [index for index, token in enumerate(ids) if token == placeholder]
    return (places[0], places[-1] + 1) if places else (0, 0)


def _contexts(choices: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The distinct token sequences that have to be read to predict each answer's last token."""
    return list(dict.fromkeys(ids[:-1] for ids in choices))


def load_vlm(
    *,
    folder: str,
    device: torch.device,
    dtype: torch.dtype,
    conversation: str | None = None,
    answer_prefix: str | None = None,
    state: dict[str, Tensor] | None = None,
    origin: str = "",
    lora: str | None = None,
) -> VisionLanguageModel:
    """Loader for a `BackboneSpec`.

    Args:
        folder: a model folder, see `mmalign.backbones.vlm_loading`.
        conversation, answer_prefix: see `mmalign.backbones.vlm_text.VlmParams`.
        state: tensors in place of the folder's, which then needs none.
        origin: where they are from, for messages.
        lora: folder of a PEFT adapter that is merged into the weights.

    Raises:
        ValueError: as `mmalign.backbones.vlm_loading.load_parts` and `merge_adapter` say; or there is neither a
            chat template nor a conversation.
    """
    model, processor = load_parts(folder, dtype, state, origin)
    if lora is not None:
        model = merge_adapter(model, lora)
    if conversation is None and not getattr(processor, "chat_template", None):
        raise ValueError(f"{folder}: has no chat template; set `conversation`, with {{images}} and {{question}} in it.")
    words = ChatFormat(processor, str(model.config.model_type), conversation, answer_prefix)
    return VisionLanguageModel(model, processor, words, device, dtype)
