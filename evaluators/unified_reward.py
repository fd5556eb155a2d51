"""UnifiedReward, a rating that a vision-language judge gives an image or a video (Wang et al., 2503.05236)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from mmalign.backbones.vlm import VisionLanguageModel, load_vlm
from mmalign.backbones.vlm_loading import vlm_files
from mmalign.backbones.vlm_text import VlmParams, fill
from mmalign.evaluation import BackboneSpec, Batch, Evaluator, ItemErrors, Scores, Uniform, score_ready

TEMPLATE = """Below is the caption from which this image or video was generated. Judge how faithfully it shows what \
the caption says, and how good it looks: sharpness, detail, colours, anatomy. Then give one overall rating from \
{lowest} (bad) to {highest} (excellent) after 'Final Score:'.
Caption: [{prompt}]"""


class UnifiedReward(Evaluator):
    """Rating by a vision-language judge (UnifiedReward, or any chat model), from 1 to 5.

    ``logits``: the cue ``Final Score:`` is put into the judge's mouth, and the score is the expected rating,
    ``sum_k k p(k) / sum_k p(k)`` over the ratings' likelihoods behind it: one pass, no ties, no text to parse.
    ``generate``: the judge writes its answer greedily and the number behind the cue is read, as the authors do.
    """

    needs = frozenset({"frames", "prompt"})
    modality = frozenset({"image", "video"})
    frames = Uniform(8)
    higher_is_better, score_range = True, (1.0, 5.0)
    version = 1
    licence = "MIT; the model's own licence"
    source = "UnifiedReward, 2503.05236; CodeGoat24/UnifiedReward"

    class Params(VlmParams):
        """The judge, what it is told, and how its rating is read.

        Attributes:
            template: a text file with ``{prompt}`` in it, such as the prompt that the judge was trained on; the default
                is a short one of our own.
            mode: ``logits`` or ``generate``.
            cues: names of sub-scores, and the words after which the judge puts each rating.
            lowest, highest: ratings are the whole numbers from one to the other; when generated, any number between.
            max_new_tokens: of a generated answer; more is cut off, and then often has no rating.
        """

        template: Path | None = None
        mode: Literal["logits", "generate"] = "logits"
        cues: dict[str, str] = Field({"score": "Final Score:"}, min_length=1)
        lowest: int = Field(1, ge=0)
        highest: int = Field(5, le=100)
        max_new_tokens: int = Field(512, ge=1)

        @model_validator(mode="after")
        def _order(self) -> "UnifiedReward.Params":
            if self.lowest >= self.highest:
                raise ValueError(f"highest ({self.highest}) has to be above lowest ({self.lowest})")
            return self

        @field_validator("cues")
        @classmethod
        def _words(cls, value: dict[str, str]) -> dict[str, str]:
            if any(not name.strip() or not cue.strip() for name, cue in value.items()):
                raise ValueError("names and cues must not be empty, as in {score: 'Final Score:'}")
            return value

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.vlm: VisionLanguageModel = backbones["vlm"]
        self.template = read_template(params)

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        return {"vlm": BackboneSpec.of(load_vlm, **params.loading())}

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        read_template(params)
        return [*vlm_files(params.model), *([params.template.expanduser()] if params.template else [])]

    @classmethod
    def bounds(cls, params: Params) -> tuple[float, float]:
        return float(params.lowest), float(params.highest)

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        if self.params.mode == "generate":
            return self._written(batch)
        clips, cues = batch.clips(), self.params.cues
        media = batch.shared((id(self.vlm), "media"), lambda: self.vlm.see(clips))
        ratings = [str(rating) for rating in range(self.params.lowest, self.params.highest + 1)]
        # "1" is how "10" begins; such ratings are told apart by where the answer ends.
        choices = [ratings] * len(cues)

        def ask(place: int) -> list[str]:
            texts = [self._text(batch.prompts[place], len(clips[place]), cue) for cue in cues.values()]
            self.vlm.check(media[place], texts, choices, "needed")
            return texts

        def read(places: Sequence[int], texts: Sequence[list[str]]) -> Scores:
            seen = [media[place] for place in places]
            tokens = self.vlm.log_likelihoods(seen, texts, [choices] * len(texts), end="needed")
            expected = torch.stack([torch.stack([self._expected(found) for found in item]) for item in tokens])
            return dict(zip(cues, expected.T, strict=True))

        return score_ready(len(batch), ask, read)

    def _text(self, prompt: str, images: int, cue: str = "") -> str:
        return self.vlm.words.chat(fill(self.template, prompt), images, prefill=cue)

    def _written(self, batch: Batch) -> dict[str, Tensor]:
        """Ratings that the judge writes; `ItemErrors` where an answer has none, so that no other is written again."""
        rows, errors = torch.full((len(batch), len(self.params.cues)), torch.nan), {}
        for place, (clip, prompt) in enumerate(zip(batch.clips(), batch.prompts, strict=True)):
            try:
                text = self._text(prompt, len(clip))
                (answer,) = self.vlm.generate([clip], [text], self.params.max_new_tokens)
                batch.notes[place] = answer
                rows[place] = torch.tensor([self._read(answer, cue) for cue in self.params.cues.values()])
            except ValueError as error:
                errors[place] = error
        scores = dict(zip(self.params.cues, rows.T, strict=True))
        if errors:
            raise ItemErrors(errors, scores)
        return scores

    def _expected(self, choices: Sequence[Tensor]) -> Tensor:
        chances = torch.stack([tokens.sum() for tokens in choices]).softmax(dim=0)
        return (chances * torch.arange(self.params.lowest, self.params.highest + 1)).sum()

    def _read(self, answer: str, cue: str) -> float:
        rating = parse_rating(answer, cue)
        if rating is None:
            raise ValueError(f"The judge gave no number after '{cue}'; it wrote: {answer.strip()[:200]!r}")
        if not self.params.lowest <= rating <= self.params.highest:
            raise ValueError(f"The judge's rating after '{cue}' is {rating}, outside of {self.bounds(self.params)}.")
        return rating

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        return [False] * len(prompts)  # a prompt that does not fit is an error


def parse_rating(answer: str, cue: str) -> float | None:
    """The number behind the last occurrence of the cue, stars and spaces in between; None without one.

    >>> parse_rating("cat (animal): 1, **Final Score:** 3.5", "Final Score:")
    3.5
    """
    found = re.findall(re.escape(cue) + r"[\s*\[]*(-?\d+(?:\.\d+)?)", answer, flags=re.IGNORECASE)
    return float(found[-1]) if found else None


def read_template(params: UnifiedReward.Params) -> str:
    """What the judge is told, ``{prompt}`` still in it.

    Raises:
        ValueError: the file is missing, not text, or has no ``{prompt}``.
    """
    text = TEMPLATE
    if params.template is not None:
        path = params.template.expanduser()
        try:
            text = path.read_text(encoding="utf-8").rstrip("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"template: {path} cannot be read as text ({error}).") from None
        if "{prompt}" not in text:
            raise ValueError(f"template: {path} has no {{prompt}}, so every row would be asked the same.")
    return text.replace("{lowest}", str(params.lowest)).replace("{highest}", str(params.highest))


EVALUATOR = UnifiedReward
