"""Object HalBench: objects that a detailed description names and its COCO picture does not have."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveInt, field_validator, model_validator

from mmalign.backbones.text_model import text_model_spec
from mmalign.backbones.vlm_generate import Asked, Decoding
from mmalign.backbones.vlm_loading import vlm_files
from mmalign.evaluation import BackboneSpec, Batch, Evaluator, FigureRow, Scores, score_ready
from mmalign.hallucination.coco import CocoFiles, Objects, image_of
from mmalign.hallucination.judged import columns, note_absent
from mmalign.hallucination.object_halbench import PROMPT, SHORT, counted, figures, listed
from mmalign.hallucination.words import mentions, named
from mmalign.hallucination.yes_no import length

Named = list[str] | None | ValueError
"""Classes that a response names; None where the judge's list cannot be read; why the judge could not be asked."""


class ObjectHalbench(Evaluator):
    """Share of the COCO objects that a response names which are in the picture; CHAIR_s, CHAIR_i and recall of all.

    Reads saved responses: `response`, and COCO's number of the picture from `aux.image_id` or the end of its name.
    """

    needs, may_read = frozenset({"response", "sample"}), frozenset({"aux"})
    modality = frozenset({"image", "text"})
    higher_is_better, score_range = True, (0.0, 1.0)
    counts = frozenset({"mentions", "hallucinated", "objects", "found", "words", "unparsed"})
    version = 1
    licence = "Apache-2.0; the synonyms' own, the judge's own; COCO's annotations CC BY 4.0"
    source = "Object HalBench, 2312.00849, 2405.17220; RLHF-V/RLAIF-V (rules and prompt written anew)"

    class Params(CocoFiles):
        """COCO's files, and who says which objects a response names.

        Attributes:
            extract: rules reads the words of the whole response as CHAIR does; llm has a local model list the objects.
            model: folder of that model, of text or of images and text; only with llm.
            conversation: all that it reads, with {question} in it, in place of its chat template.
            max_new_tokens: after which its answer is cut, and then is not read.
        """

        extract: Literal["rules", "llm"] = "rules"
        model: Path | None = None
        conversation: str | None = None
        max_new_tokens: PositiveInt = 512

        @field_validator("conversation")
        @classmethod
        def _place(cls, value: str | None) -> str | None:
            if value is not None and "{question}" not in value:
                raise ValueError("needs {question}, as in 'USER: {question} ASSISTANT:'")
            return value

        @model_validator(mode="after")
        def _judge(self) -> "ObjectHalbench.Params":
            if (self.extract == "llm") != (self.model is not None):
                raise ValueError("`model` is the judge's folder and belongs to `extract: llm`, and to it alone")
            if self.extract == "rules" and self.conversation is not None:
                raise ValueError("`conversation` is the judge's and belongs to `extract: llm`")
            return self

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.known = Objects(params.synonyms, params.objects)
        self.judge: Any = backbones.get("judge")

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        return {} if params.model is None else {"judge": text_model_spec(params.model, params.conversation)}

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        judge = [] if params.model is None else vlm_files(params.model)
        return [*params.files("docs/scorers/object_halbench.md"), *judge]

    def score(self, batch: Batch) -> Scores:
        found = self._by_rules(batch.responses) if self.judge is None else self._by_judge(batch)
        return score_ready(
            len(batch), lambda place: self._counted(batch, place, found[place]), lambda _, all_: columns(all_)
        )

    def _counted(self, batch: Batch, place: int, found: Named) -> dict[str, float]:
        if isinstance(found, ValueError):
            raise found
        image = image_of(batch.aux[place] if batch.aux else {}, batch.samples[place])
        truth = self.known.of(image)
        reply = "" if self.judge is None else batch.notes.get(place, "")
        note_absent(batch, place, [name for name in found or () if name not in truth], reply)
        return counted(batch.responses[place], found, truth)

    def _by_rules(self, responses: Sequence[str]) -> list[Named]:
        return [[name for name, _ in mentions(response, self.known.synonyms)] for response in responses]

    def _by_judge(self, batch: Batch) -> list[Named]:
        """What the judge lists of each response, its reply noted; short ones name nothing and are not shown to it."""
        found: list[Named] = [[] for _ in batch.responses]
        asked: dict[int, Asked] = {}
        for place, response in enumerate(batch.responses):
            if length(response) > SHORT:
                try:
                    asked[place] = Asked(self.judge.words.chat(PROMPT.replace("{answer}", response.strip()), 0))
                except ValueError as error:  # a control token of the judge's in the response
                    found[place] = error
        written = self.judge.writer.write(list(asked.values()), Decoding(self.params.max_new_tokens))
        for place, one in zip(asked, written, strict=True):
            if isinstance(one, ValueError):
                found[place] = one
                continue
            batch.notes[place] = one.text
            names = None if one.cut else listed(one.text)
            found[place] = None if names is None else named(names, self.known.synonyms)
        return found

    @classmethod
    def figures(cls, params: Any, rows: Sequence[FigureRow]) -> dict[str, float | None]:
        return figures(rows)


EVALUATOR = ObjectHalbench
