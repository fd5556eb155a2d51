"""Yes/no questions to a vision-language model: which of the two words is likelier; questions that hang on others."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from pydantic import model_validator
from torch import Tensor

from mmalign.backbones.vlm import Media, VisionLanguageModel
from mmalign.backbones.vlm_text import VlmParams
from mmalign.config import Words

__all__ = ["YesNoParams", "alive", "margins"]

Name = TypeVar("Name", bound=Hashable)


class YesNoParams(VlmParams):
    """`VlmParams`, and the two answers.

    Attributes:
        yes, no: the two answers.
    """

    yes: Words = "yes"
    no: Words = "no"

    @model_validator(mode="after")
    def _apart(self) -> YesNoParams:
        if self.yes.strip() == self.no.strip():
            raise ValueError(f"yes and no are both '{self.yes}'; they have to be two answers")
        return self

    @property
    def answers_asked(self) -> list[str]:
        """Both answers, as `VisionLanguageModel.log_likelihoods` takes them."""
        return [self.yes, self.no]


def margins(
    vlm: VisionLanguageModel, media: Sequence[Media], texts: Sequence[Sequence[str]], words: Sequence[str]
) -> list[Tensor]:
    """``log p(yes) - log p(no)`` of every text of every item, all texts of an item behind one pass over its images.

    Args:
        media, texts: as for `VisionLanguageModel.log_likelihoods`.
        words: yes and no.

    Returns:
        For each item float32 [texts] on the CPU; its sigmoid is ``p(yes) / (p(yes) + p(no))``.
    """
    tokens = vlm.log_likelihoods(media, texts, [[words] * len(item) for item in texts], end="needed")
    return [torch.stack([yes.sum() - no.sum() for yes, no in item]) for item in tokens]


def alive(passed: Mapping[Name, bool], parents: Mapping[Name, Sequence[Name]]) -> dict[Name, bool]:
    """For each question in order, whether all that it depends on has passed.

    One that is not alive has failed for those that come after it, as in DPG-Bench's code.

    Args:
        passed: whether each question's own answer is the wanted one, in the order of the questions.
        parents: what each depends on, itself among them at will.
    """
    settled, found = dict(passed), {}
    for name in passed:
        found[name] = all(settled[parent] for parent in parents[name])
        settled[name] = settled[name] and found[name]
    return found
