"""The evaluator contract: one class in one file says what it needs, what it returns, and how a batch is scored.

An evaluator is found by name (`mmalign.discovery`), gets shared backbones, and scores batches of decoded media. The
same object scores folders, is the reward in training, and guides sampling. It never aggregates: means, intervals and
tests are the runner's work, so that a score cannot depend on the number of processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from mmalign.config import Strict, Words
from mmalign.devices import resolve_device, resolve_dtype
from mmalign.media import AllFrames, EveryFps, FramePlan, Middle, QwenFps, Starts, StrideFps, Uniform
from mmalign.weights import find_checkpoint, load_into, read_state_dict

__all__ = [
    "NEEDS",
    "AllFrames",
    "BackboneSpec",
    "Backbones",
    "Batch",
    "Evaluator",
    "EveryFps",
    "FigureRow",
    "FramePlan",
    "ItemErrors",
    "Middle",
    "QwenFps",
    "Scores",
    "SetEvaluator",
    "Starts",
    "Strict",
    "StrideFps",
    "Uniform",
    "Words",
    "check_class",
    "figures_declared",
    "find_checkpoint",
    "load_into",
    "read_state_dict",
    "resolve_device",
    "resolve_dtype",
    "score_ready",
    "subscores",
]

NEEDS = frozenset({"image", "frames", "prompt", "reference", "response", "fps", "aux", "sample"})
"""What an evaluator may need: the media as stills or as clips, and columns of the media table."""

PIXELS = frozenset({"image", "frames"})
MODALITIES = frozenset({"image", "video", "text"})

Scores = Tensor | dict[str, Tensor]
"""A float tensor [B], or named sub-scores of that shape."""

FigureRow = Mapping[str, Any]
"""What `Evaluator.figures` sees of an item: ``sample`` and ``group`` (text), ``scores`` (the sub-scores by name, counts
among them) and ``aux`` (the table's further columns). ``group`` is the row's own, else its medium, else its sample."""

Value = TypeVar("Value")


class ItemErrors(ValueError):
    """Some items of a batch cannot be scored and the others are: `score` raises it so that these are not lost.

    The runner keeps the scores, and writes an item's error as its reason; without it a batch in which one item fails is
    scored again item by item, which matters where an item takes seconds. To other callers it is the first item's error.

    Attributes:
        errors: by place in the batch.
        scores: what `score` returns otherwise; values at those places mean nothing.
    """

    def __init__(self, errors: Mapping[int, Exception], scores: Scores):
        super().__init__(str(next(iter(errors.values()))))
        self.errors, self.scores = dict(errors), scores


@dataclass
class Batch:
    """Decoded items of one modality; lists that an evaluator does not need may be empty.

    Attributes:
        images: uint8 [3, H, W] RGB each, of any sizes; empty for videos.
        frames: uint8 [T, 3, H, W] each, the frames that the evaluator's plan chose; an image is a clip of one frame.
        prompts: one per item.
        references: uint8 [T, 3, H, W] each; T = 1 for an image.
        fps: frames per second of the source; None for an image.
        aux: the table's further columns, one dictionary per item.
        samples: the names that the table gives them, for evaluators that look items up elsewhere.
        responses: what a model answered to each; text, perhaps empty.
        notes: by place, what an evaluator wants kept beside the scores of an item, such as a judge's reply; the runner
            writes it into the results and empties this before each evaluator.
    """

    images: list[Tensor] = field(default_factory=list)
    frames: list[Tensor] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    references: list[Tensor] = field(default_factory=list)
    fps: list[float | None] = field(default_factory=list)
    aux: list[dict[str, Any]] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)
    responses: list[str] = field(default_factory=list)
    notes: dict[int, str] = field(default_factory=dict, compare=False)
    _shared: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        columns = (self.frames, self.images, self.responses, self.prompts, self.aux, self.samples)
        return next((len(column) for column in columns if column), 0)

    def clips(self) -> list[Tensor]:
        """Every item as a clip uint8 [T, 3, H, W]; a still image has T = 1."""
        return self.frames or [image[None] for image in self.images]

    def shared(self, key: Any, compute: Callable[[], Value]) -> Value:
        """The value of ``compute()``, computed once per batch for all evaluators that name the same key.

        The key has to say everything that the value depends on besides this batch, for example the backbone and the
        resize.
        """
        if key not in self._shared:
            self._shared[key] = compute()
        return self._shared[key]

    def take(self, indices: Sequence[int]) -> Batch:
        """A batch of the items at these places, in this order."""
        names = ("images", "frames", "prompts", "references", "fps", "aux", "samples", "responses")
        columns: dict[str, Any] = {name: getattr(self, name) for name in names}
        taken: dict[str, Any] = {
            name: [column[i] for i in indices] if column else [] for name, column in columns.items()
        }
        return Batch(**taken)


@dataclass(frozen=True)
class BackboneSpec:
    """A network that several evaluators may share: equal specs give one instance per device and dtype.

    Attributes:
        loader: called as ``loader(**arguments, device=..., dtype=...)``.
        arguments: keyword arguments with hashable values, as sorted pairs; see `of`.
    """

    loader: Callable[..., Any]
    arguments: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, loader: Callable[..., Any], **arguments: Any) -> BackboneSpec:
        """A spec from keyword arguments."""
        return cls(loader, tuple(sorted(arguments.items())))


class Backbones:
    """Loads each backbone once per (loader, arguments, device, dtype) and hands out the same instance after that.

    Args:
        compiled: whether those that have a method ``compile_towers()`` shall compile what is run for every item.
    """

    def __init__(self, compiled: bool = False) -> None:
        self.compiled = compiled
        self._loaded: dict[tuple[BackboneSpec, str, torch.dtype], Any] = {}

    def get(self, spec: BackboneSpec, device: torch.device, dtype: torch.dtype) -> Any:
        """The instance; whatever its loader raises comes through."""
        key = (spec, str(device), dtype)
        if key not in self._loaded:
            self._loaded[key] = spec.loader(**dict(spec.arguments), device=device, dtype=dtype)
            if self.compiled and hasattr(self._loaded[key], "compile_towers"):
                self._loaded[key].compile_towers()
        return self._loaded[key]


def score_ready(
    size: int, prepare: Callable[[int], Value], score: Callable[[Sequence[int], Sequence[Value]], Scores]
) -> Scores:
    """Scores of a batch in which some items may turn out to be no questions: the others are scored together, and once.

    Args:
        size: of the batch.
        prepare: what is needed to score the item at a place; ValueError where it cannot be scored.
        score: the places of those that can be and what was prepared of each -> their scores, in this order.

    Raises:
        ItemErrors: `prepare` refused some items.
    """
    ready: dict[int, Value] = {}
    errors: dict[int, Exception] = {}
    for place in range(size):
        try:
            ready[place] = prepare(place)
        except ValueError as error:
            errors[place] = error.with_traceback(None)  # whose frames hold the batch's tensors
    if not errors:
        return score(tuple(ready), tuple(ready.values()))
    found = score(tuple(ready), tuple(ready.values())) if ready else torch.empty(0)
    places = list(ready)

    def spread(values: Tensor) -> Tensor:
        whole = torch.full((size,), torch.nan, dtype=values.dtype, device=values.device)
        whole[places] = values
        return whole

    scores = spread(found) if isinstance(found, Tensor) else {name: spread(part) for name, part in found.items()}
    raise ItemErrors(errors, scores)


class _Declared:
    """What every evaluator declares; see `Evaluator` for the meaning of each attribute."""

    needs: ClassVar[frozenset[str] | set[str]] = frozenset({"image"})
    may_read: ClassVar[frozenset[str] | set[str]] = frozenset()
    modality: ClassVar[frozenset[str] | set[str]] = frozenset({"image"})
    frames: ClassVar[FramePlan] = AllFrames()
    backbones: ClassVar[Mapping[str, BackboneSpec]] = {}
    higher_is_better: ClassVar[bool] = True
    counts: ClassVar[frozenset[str] | set[str]] = frozenset()
    score_range: ClassVar[tuple[float | None, float | None]] = (None, None)
    version: ClassVar[int] = 1
    licence: ClassVar[str] = ""
    source: ClassVar[str] = ""

    class Params(Strict):
        """This evaluator takes no parameters."""

    name: str = ""
    summary: str = ""

    def __init__(self, params: Any, backbones: Mapping[str, Any], device: torch.device):
        self.params = params
        self.device = device

    @classmethod
    def backbone_specs(cls, params: Any) -> Mapping[str, BackboneSpec]:
        """Backbones for these parameters, by the name under which ``__init__`` gets them; nothing is loaded here."""
        return cls.backbones

    @classmethod
    def weight_files(cls, params: Any) -> list[Path]:
        """Files whose content decides the scores; their hash is part of every result.

        Raises:
            ValueError: a file is missing. This runs before anything is loaded, so the user hears of it at once.
        """
        return []

    @classmethod
    def variant(cls, params: Any) -> type[Any]:
        """The class that scores with these parameters: the class itself, or a subclass that needs something else of an
        item, such as its pixels too. A subclass stands in a module, by its own name."""
        return cls

    @classmethod
    def bounds(cls, params: Any) -> tuple[float | None, float | None]:
        """Smallest and largest possible score for these parameters; None where there is no bound."""
        return cls.score_range


class Evaluator(_Declared, ABC):
    """Scores each item by itself.

    A subclass states:
        needs: any of `NEEDS`. ``image`` asks for stills, ``frames`` for clips; the others are columns of the table.
            Without these two nothing is decoded, and the media need not be there.
        may_read: columns that it reads where a row has them; a row without them is scored all the same.
        modality: any of ``image``, ``video`` and, for evaluators without pixels, ``text``: a row without media. Other
            rows are marked as skipped, with the reason.
        frames: which frames of a video are decoded.
        backbones: networks by name; override `backbone_specs` where they depend on the parameters.
        higher_is_better: direction of the score.
        counts: sub-scores that say how much there was to measure, such as pairs of frames. They are kept in the
            results and are no measure of quality: neither summarised nor ranked by.
        score_range: (lowest, highest), None for no bound; override `bounds` where it depends on the parameters.
        differentiable: whether `score_tensor` exists and lets a gradient through to the images.
        version: raise it whenever scores change; earlier results are then computed again.
        licence, source: of the method and its weights, shown with every result.
        Params: a strict schema of its parameters.

    The first line of the class's docstring is its summary in ``mmalign list evaluators``.
    """

    differentiable: ClassVar[bool] = False

    @abstractmethod
    def score(self, batch: Batch) -> Scores:
        """Scores of a batch: float [B], or a dictionary of named sub-scores [B].

        An item's score must not depend on the other items. NaN stands for "cannot be scored" and becomes an error row.

        Raises:
            Exception: the batch is scored again item by item, and what fails alone becomes an error row with these
                words. `ItemErrors` keeps the scores of the others.
        """

    @classmethod
    def figures(cls, params: Any, rows: Sequence[FigureRow]) -> dict[str, float | None]:
        """Figures of a whole table that are no means over its items: F1, a ratio of sums, a share of groups.

        Args:
            params: the evaluator's.
            rows: the items that have a score, at least one, in no particular order. In a bootstrap resample a cluster
                that is drawn twice is there twice, the second time with another ``group``, so that what counts groups
                counts it twice.

        Returns:
            By name; None where a figure is not defined, as a precision without a positive answer. A part of the rows
            may lack a figure that all of them have (one of a split that it holds nothing of), and has no further ones.
            The same rows have to give the same figures. An empty dictionary: the evaluator has none.
        """
        return {}

    def score_tensor(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores with a gradient: images float [B, 3, H, W] in [0, 1], prompts [B] -> float32 [B].

        Equal to `score` on the same images as uint8, to its first sub-score where that returns several. Only where
        ``differentiable`` is True.
        """
        raise NotImplementedError(f"{type(self).__name__} is not differentiable.")

    def truncated(self, prompts: Sequence[str]) -> list[bool] | None:
        """For each prompt, whether the text encoder saw only its beginning; None where no text is read."""
        return None


class SetEvaluator(_Declared, ABC):
    """Scores a whole set at once, such as a Fréchet distance; declared as an `Evaluator` is, never differentiable."""

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Take a batch into the statistics; the order of batches must not matter."""

    @abstractmethod
    def compute(self) -> float | dict[str, float]:
        """The score of everything seen, or named sub-scores."""


def check_class(value: object, origin: str) -> type[Evaluator] | type[SetEvaluator]:
    """The class itself, if it keeps the contract.

    Raises:
        TypeError: naming the origin and every declaration that is wrong.
    """
    if not (isinstance(value, type) and issubclass(value, (Evaluator, SetEvaluator))):
        raise TypeError(f"{origin}: {value!r} is not a subclass of mmalign.evaluation.Evaluator or SetEvaluator.")
    missing = sorted(value.__abstractmethods__)
    if issubclass(value, Evaluator) and value.differentiable and value.score_tensor is Evaluator.score_tensor:
        missing.append("score_tensor, which a differentiable one has")
    silent = (
        issubclass(value, Evaluator) and not value.differentiable and value.score_tensor is not Evaluator.score_tensor
    )
    media = PIXELS & set(value.needs)
    gradient = issubclass(value, Evaluator) and value.differentiable
    problems = [
        text
        for wrong, text in (
            (missing, f"does not define {' and '.join(missing)}"),
            (set(value.needs) - NEEDS, f"needs {sorted(set(value.needs) - NEEDS)}; known are {sorted(NEEDS)}"),
            (set(value.may_read) - NEEDS | PIXELS & set(value.may_read), "may_read has to be of the table's columns"),
            (not value.needs, "needs nothing of an item; name what it reads"),
            (not media and "reference" in value.needs, "needs 'reference', so also 'image' or 'frames'"),
            (not media and gradient, "is differentiable, so it needs 'image' or 'frames'"),
            (media and "text" in value.modality, "needs pixels, which rows of modality 'text' have none of"),
            (media == {"image"} and "video" in value.modality, "takes videos, so it needs 'frames', not 'image'"),
            (not value.modality or set(value.modality) - MODALITIES, "modality has to be of 'image', 'video', 'text'"),
            (silent, "has score_tensor, but does not say differentiable = True"),
            (not value.licence, "licence is empty"),
            (not value.source, "source is empty"),
            (not isinstance(value.version, int) or value.version < 1, "version has to be an integer from 1"),
            (not issubclass(value.Params, Strict), "Params has to derive from mmalign.evaluation.Strict"),
        )
        if wrong
    ]
    if problems:
        raise TypeError(f"{origin}: {value.__name__} breaks the evaluator contract: {'; '.join(problems)}.")
    return value


def figures_declared(cls: type[Evaluator] | type[SetEvaluator]) -> bool:
    """Whether the evaluator has `Evaluator.figures` of its own."""
    return issubclass(cls, Evaluator) and cls.figures.__func__ is not Evaluator.figures.__func__  # type: ignore[attr-defined]


def subscores(scores: object, size: int, name: str) -> dict[str, Tensor]:
    """Named float64 CPU tensors [size] from what an evaluator returned; a plain tensor is called ``score``.

    Raises:
        TypeError: not a tensor or dictionary of tensors, or not of floating point.
        ValueError: not of shape [size].
    """
    named = scores if isinstance(scores, dict) else {"score": scores}
    if not named:
        raise TypeError(f"{name} returned an empty dictionary of sub-scores.")
    result = {}
    for key, value in named.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} returned {kind} for '{key}'; it has to be a float tensor [{size}].")
        if value.shape != (size,):
            raise ValueError(
                f"{name} returned shape {list(value.shape)} for '{key}' and a batch of {size}; expected [{size}]."
            )
        result[str(key)] = value.detach().to("cpu", torch.float64)
    return result
