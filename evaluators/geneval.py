"""GenEval, objects, counts, colours and relations as a prompt asks for them (Ghosh et al., 2310.11513)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from mmalign.backbones.clip import PUBLISHED, clip_weight_files
from mmalign.backbones.clip_scoring import ClipBackbone, load_clip_backbone
from mmalign.backbones.colours import COLOURS, name_colours
from mmalign.backbones.detector import Detections, Detector, detector_weight_files, load_detector
from mmalign.backbones.mask2former import COCO
from mmalign.evaluation import BackboneSpec, Batch, Evaluator, Scores, Strict, find_checkpoint, score_ready

GREY = 0x99
# The benchmark's names are COCO's but for three.
RENAMED = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
NAMES = tuple(RENAMED.get(name, name) for name in COCO)

Tag = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
Relation = Literal["left of", "right of", "above", "below"]


class Clause(Strict):
    """One line of ``include`` or ``exclude``; the benchmark's own keys.

    Attributes:
        name: class, under the key ``class``.
        count: how many there have to be at least; in ``exclude``, how many are too many.
        color: of each of the first ``count``.
        position: relation to the objects of an earlier clause, and that clause's number.
    """

    model_config = ConfigDict(populate_by_name=True)
    name: str = Field(alias="class")
    count: int = Field(ge=1)
    color: str | None = None
    position: tuple[Relation, int] | None = None

    @model_validator(mode="after")
    def _known(self) -> Clause:
        if self.name not in NAMES:
            raise ValueError(f"class '{self.name}' is none of the benchmark's 80, such as '{NAMES[0]}'")
        if self.color is not None and self.color not in COLOURS:
            raise ValueError(f"color '{self.color}' is none of {', '.join(COLOURS)}")
        return self


class Asked(Strict):
    """What an image has to show: a line of evaluation_metadata.jsonl, further keys apart.

    Attributes:
        tag: the task.
        include: all of these.
        exclude: none of these.
    """

    model_config = ConfigDict(extra="ignore")
    tag: Tag
    include: tuple[Clause, ...] = Field(min_length=1)
    exclude: tuple[Clause, ...] = ()

    @model_validator(mode="after")
    def _earlier(self) -> Asked:
        for number, clause in enumerate(self.include):
            if clause.position is not None and not 0 <= clause.position[1] < number:
                raise ValueError(f"include {number} stands to clause {clause.position[1]}, which is not an earlier one")
        return self


@dataclass(frozen=True)
class Found:
    """One object: box left, top, right, bottom in pixels, and its colour where it was looked at."""

    box: tuple[float, float, float, float]
    colour: str | None = None


@dataclass(frozen=True)
class Verdict:
    """Which of the demands hold; what is not asked holds, what needs an object that is not there does not."""

    count: bool
    colour: bool
    position: bool

    @property
    def correct(self) -> bool:
        return self.count and self.colour and self.position


def relations(a: Found, b: Found, offset: float) -> set[Relation]:
    """Where `a` is from `b`: none, one or two of the four relations; y grows downwards.

    The distance of the centres is shortened in each direction by ``offset`` times the sum of both extents, then
    divided by its length before that; a relation holds where more than half of it is left.
    """
    (ax, ay, aw, ah), (bx, by, bw, bh) = (
        ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, abs(box[2] - box[0]), abs(box[3] - box[1]))
        for box in (a.box, b.box)
    )
    dx, dy = ax - bx, ay - by
    x, y = max(abs(dx) - offset * (aw + bw), 0.0), max(abs(dy) - offset * (ah + bh), 0.0)
    if max(x, y) < 1e-3:
        return set()
    length = (dx**2 + dy**2) ** 0.5
    found: set[Relation] = set()
    if x / length > 0.5:
        found.add("left of" if dx < 0 else "right of")
    if y / length > 0.5:
        found.add("above" if dy < 0 else "below")
    return found


def judge(asked: Asked, objects: Mapping[str, Sequence[Found]], offset: float = 0.1) -> Verdict:
    """The benchmark's rules on what was found.

    A clause looks at its first ``count`` objects alone, so the surest have to come first. A relation has to hold
    between each of them and each of the earlier clause's, which has to hold itself.

    Args:
        objects: by class, the surest first; those that a colour is asked of have theirs.
        offset: see `relations`.
    """
    held: list[Sequence[Found] | None] = []
    count = colour = position = True
    for clause in asked.include:
        found = list(objects.get(clause.name, ()))[: clause.count]
        there = len(found) == clause.count
        right = clause.color is None or (there and all(one.colour == clause.color for one in found))
        placed = clause.position is None
        if clause.position is not None and there and right:
            relation, target = clause.position
            others = held[target]
            placed = others is not None and all(
                relation in relations(one, other, offset) for one in found for other in others
            )
        count, colour, position = count and there, colour and right, position and placed
        held.append(found if there and right and placed else None)
    too_many = any(len(objects.get(clause.name, ())) >= clause.count for clause in asked.exclude)
    return Verdict(count and not too_many, colour, position)


def kept(detections: Detections, min_score: float, limit: int) -> dict[str, list[int]]:
    """By class, which detections are above a score: the surest first, at most ``limit``. Nothing is suppressed."""
    result: dict[str, list[int]] = {}
    for index in (detections.scores > min_score).nonzero().flatten().tolist():
        indices = result.setdefault(NAMES[int(detections.labels[index])], [])
        if len(indices) < limit:
            indices.append(index)
    return result


def cut_out(image: Tensor, box: Tensor, mask: Tensor) -> Tensor:
    """An object on grey: uint8 [3, H, W] with all that is not in the mask grey, cut to the box."""
    left, top, right, bottom = box.tolist()
    part = slice(top, bottom), slice(left, right)
    return torch.where(mask[part], image[:, *part], GREY)


class GenEval(Evaluator):
    """GenEval: 1 where an image shows what its metadata asks (objects, counts, colours, a relation), 0 otherwise.

    A COCO detector finds the objects, CLIP names their colours. Sub-scores, each 0 or 1: ``correct``, which is the
    benchmark's, and its three parts ``count``, ``colour`` and ``position``; a part that is not asked is 1. The
    benchmark's score is the mean over the six tasks of each task's mean of ``correct``, four images a prompt.
    """

    needs = frozenset({"image", "aux"})
    higher_is_better, score_range = True, (0.0, 1.0)
    version = 2
    licence = "MIT (GenEval, OpenAI CLIP); detector Apache-2.0 (MMDetection's) or other (facebook's)"
    source = "GenEval, 2310.11513; weights Mask2Former Swin-S, 2112.01527, and OpenAI CLIP, 2103.00020"

    class Params(Strict):
        """Which networks, which thresholds; the defaults are the authors'.

        Attributes:
            detector: MMDetection's Mask2Former Swin-S, the authors' detector; or facebook/mask2former-swin-small-
                coco-instance, another training of the same network; a file, or a folder that holds it.
            clip_checkpoint: OpenAI's ViT-L/14, as for clip_score.
            model: open_clip model of clip_checkpoint.
            threshold: what the score of a detection has to be above.
            counting_threshold: the same for the task counting.
            limit: most objects of a class.
            offset: share of both objects' extents within which they are not beside each other, up to 1.
            short_edge, long_edge: what images are resized to fit before detection. Smaller is quicker and gives other
                verdicts.
        """

        detector: Path | None = None
        clip_checkpoint: Path | None = None
        model: str = "ViT-L-14-quickgelu"
        threshold: float = Field(0.3, ge=0, lt=1)
        counting_threshold: float = Field(0.9, ge=0, lt=1)
        limit: int = Field(16, ge=1)
        offset: float = Field(0.1, ge=0, le=1)
        short_edge: int = Field(800, ge=32)
        long_edge: int = Field(1333, ge=32)

        @model_validator(mode="after")
        def _edges(self) -> GenEval.Params:
            if self.short_edge > self.long_edge:
                raise ValueError(f"short_edge ({self.short_edge}) is above long_edge ({self.long_edge}); exchange them")
            return self

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.clip: ClipBackbone = backbones["clip"]
        self.clip.preprocess.check_cropped(params.model)
        self.detector: Detector = backbones["detector"]

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        detector, clip = _files(params)
        return {
            "clip": BackboneSpec.of(load_clip_backbone, config=_model(params), checkpoint=clip),
            "detector": BackboneSpec.of(load_detector, checkpoint=detector),
        }

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        detector, clip = _files(params)
        return [*detector_weight_files(detector), *clip_weight_files(_model(params), clip)]

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """Sub-scores float32 [B]. Rows whose metadata the benchmark does not know are `ItemErrors`."""
        lowest = min(self.params.threshold, self.params.counting_threshold)
        edges = self.params.short_edge, self.params.long_edge
        key = (id(self.detector), lowest, *edges)

        def read(places: Sequence[int], asked: Sequence[Asked]) -> Scores:
            found = batch.shared(key, lambda: self.detector.detect(batch.images, lowest, *edges))
            return self._judged([batch.images[place] for place in places], asked, [found[place] for place in places])

        return score_ready(len(batch), lambda place: parse(batch.aux[place]), read)

    def _judged(
        self, images: Sequence[Tensor], asked: Sequence[Asked], found: Sequence[Detections]
    ) -> dict[str, Tensor]:
        params = self.params
        objects = []
        for one, detections in zip(asked, found, strict=True):
            least = params.counting_threshold if one.tag == "counting" else params.threshold
            objects.append(kept(detections, least, params.limit))
        colours = self._name_colours(images, asked, found, objects)
        verdicts = []
        for index, (one, detections, classes) in enumerate(zip(asked, found, objects, strict=True)):
            boxes = [Found(tuple(box)) for box in detections.boxes.tolist()]
            seen = {
                name: [replace(boxes[i], colour=colours.get((index, i))) for i in indices]
                for name, indices in classes.items()
            }
            verdicts.append(judge(one, seen, params.offset))
        return {
            name: torch.tensor([float(getattr(verdict, name)) for verdict in verdicts])
            for name in ("correct", "count", "colour", "position")
        }

    def _name_colours(
        self,
        images: Sequence[Tensor],
        asked: Sequence[Asked],
        found: Sequence[Detections],
        objects: Sequence[Mapping[str, Sequence[int]]],
    ) -> dict[tuple[int, int], str]:
        """Colours by (image, detection) of all objects that a colour is asked of, in one pass of CLIP."""
        places, names, crops = [], [], []
        for index, one in enumerate(asked):
            for clause in one.include:
                there = objects[index].get(clause.name, ())
                if clause.color is None or len(there) < clause.count:
                    continue
                for i in there[: clause.count]:
                    image = images[index].to(found[index].masks.device)
                    crops.append(cut_out(image, found[index].boxes[i], found[index].masks[i]))
                    places.append((index, i))
                    names.append(clause.name)
        return dict(zip(places, name_colours(self.clip, crops, names), strict=True))


def parse(aux: Mapping[str, Any]) -> Asked:
    """What a row asks, from its columns ``tag``, ``include`` and ``exclude``.

    Raises:
        ValueError: a column is missing, or holds what the benchmark does not know.
    """
    try:
        return Asked.model_validate({key: value for key, value in aux.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(
            f"geneval needs the columns tag, include and exclude of the benchmark's evaluation_metadata.jsonl beside "
            f"each image; {f'{where}: ' if where else ''}{first['msg']}."
        ) from None


def _files(params: GenEval.Params) -> tuple[Path, Path]:
    detector = find_checkpoint(params.detector, "geneval-mask2former", "detector")
    return detector, find_checkpoint(params.clip_checkpoint, "openai-clip-l14", "clip_checkpoint")


def _model(params: GenEval.Params) -> str:
    """OpenAI's weights need QuickGELU, which open_clip's plain names do not have."""
    return PUBLISHED[params.model][0] if params.model in PUBLISHED else params.model


EVALUATOR = GenEval
