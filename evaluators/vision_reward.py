"""VisionReward, a weighted checklist of yes/no questions about an image or a video (Xu et al., 2412.21059)."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.backbones.vlm import Media, VisionLanguageModel, load_vlm
from mmalign.backbones.vlm_loading import model_folder, vlm_files
from mmalign.backbones.vlm_text import VlmParams, fill
from mmalign.backbones.vlm_yes_no import YesNoParams, margins
from mmalign.evaluation import BackboneSpec, Batch, Evaluator, Scores, Uniform, score_ready

ALIGNMENT = 'Does this figure show "{prompt}"? Please answer yes or no.'


class VisionReward(Evaluator):
    """Weighted sum of a model's answers to a checklist of yes/no questions.

    ``score = coef . x + intercept`` with ``x_i = 1`` for yes and ``-1`` for no, read from the
    likelihoods of both words, all questions behind one pass over the images. A gate's answer no sets the answers that
    it guards to 0. ``reduce: mean`` is the mean of ``coef_i x_i``, as the authors score videos.
    """

    needs = frozenset({"frames", "prompt"})
    modality = frozenset({"image", "video"})
    frames = Uniform(8)
    higher_is_better, score_range = True, (None, None)
    version = 1
    licence = "Apache-2.0; the model's own licence"
    source = "VisionReward, 2412.21059; THUDM/VisionReward"

    class Params(YesNoParams):
        """The model, the checklist and its weights, in the authors' file layouts.

        Attributes:
            questions: a text file, one question per line; ``{prompt}`` or ``[[prompt]]`` is replaced.
            weights: a JSON file, ``{"coef": [...], "intercept": b}`` or a list of coefficients.
            gates: number of a gate's question -> numbers of the questions that it guards, from 0. A gate is no feature
                itself. The authors' image checklist has {0: [22, 23, 24, 28, 29], 1: [25, 26], 2: [27]}.
            alignment_model: a folder of a second model; its VQAScore of the prompt is the first feature, as in the
                authors' image version (theirs is of CLIP-FlanT5-XXL).
            answers: ``sign`` for 1 and -1; ``soft`` for ``(p(yes) - p(no)) / (p(yes) + p(no))``.
            reduce: ``sum``, or ``mean`` over the features before the intercept.
            per_question: also each question's answer x as a sub-score, ``q00`` and so on, gates included.
        """

        questions: Path
        weights: Path
        gates: dict[int, tuple[int, ...]] = {}
        alignment_model: Path | None = None
        answers: Literal["sign", "soft"] = "sign"
        reduce: Literal["sum", "mean"] = "sum"
        per_question: bool = False

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.vlm: VisionLanguageModel = backbones["vlm"]
        self.aligner: VisionLanguageModel | None = backbones.get("alignment")
        self.checklist = read_checklist(params)

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        specs = {"vlm": BackboneSpec.of(load_vlm, **params.loading())}
        if params.alignment_model is not None:
            plain = VlmParams(model=params.alignment_model)
            specs["alignment"] = BackboneSpec.of(load_vlm, **plain.loading())
        return specs

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        read_checklist(params)
        files = [*vlm_files(params.model), params.questions.expanduser(), params.weights.expanduser()]
        if params.alignment_model is not None:
            model_folder(params.alignment_model, "alignment_model")
            files += vlm_files(params.alignment_model, "alignment_model")
        return files

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        clips, words = batch.clips(), self.params.answers_asked
        media = batch.shared((id(self.vlm), "media"), lambda: self.vlm.see(clips))
        aligned = self._seen_by_aligner(batch)

        def ask(place: int) -> tuple[list[str], list[str]]:
            prompt, images = batch.prompts[place], len(clips[place])
            texts = [self.vlm.words.chat(question, images) for question in self.checklist.ask(prompt)]
            self.vlm.check(media[place], texts, [words] * len(texts), "needed")
            match = []
            if self.aligner is not None:
                match = [self.aligner.words.chat(fill(ALIGNMENT, prompt), images)]
                self.aligner.check(aligned[place], match, [["Yes"]])
            return texts, match

        def read(places: Sequence[int], ready: Sequence[tuple[list[str], list[str]]]) -> Scores:
            texts = [item for item, _ in ready]
            seen = [media[place] for place in places]
            ahead = torch.stack(margins(self.vlm, seen, texts, words))
            # tanh(m / 2) is (p(yes) - p(no)) / (p(yes) + p(no)); equal likelihoods count as no, as any other word does.
            soft = self.params.answers == "soft"
            answers = torch.tanh(ahead / 2) if soft else torch.where(ahead > 0, 1.0, -1.0)
            match = self._alignment([aligned[place] for place in places if aligned], [item for _, item in ready])
            scores = {"score": self.checklist.score(answers, match)}
            if self.params.per_question:
                scores |= {f"q{index:02d}": column for index, column in enumerate(answers.T)}
            return scores

        return score_ready(len(batch), ask, read)

    def _seen_by_aligner(self, batch: Batch) -> Sequence[Media]:
        aligner = self.aligner
        return () if aligner is None else batch.shared((id(aligner), "media"), lambda: aligner.see(batch.clips()))

    def _alignment(self, media: Sequence[Media], texts: Sequence[list[str]]) -> Tensor | None:
        """VQAScore by the second model of texts that ask it: [B], or None without one."""
        if self.aligner is None:
            return None
        tokens = self.aligner.log_likelihoods(media, texts, [[["Yes"]]] * len(texts))
        return torch.stack([answer[0] for ((answer,),) in tokens]).exp()

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        return [False] * len(prompts)  # a prompt that does not fit is an error


@dataclass(frozen=True)
class Checklist:
    """Questions and weights.

    Attributes:
        questions: as in the file, gates among them.
        coefficients: [features]: alignment first where there is one, then the questions that are no gates, in order.
        intercept: added to the sum.
        gates: gate -> the questions that it guards.
        mean: divide the sum by the number of features.
    """

    questions: tuple[str, ...]
    coefficients: tuple[float, ...]
    intercept: float
    gates: Mapping[int, tuple[int, ...]]
    mean: bool

    def ask(self, prompt: str) -> list[str]:
        """The questions about this prompt's image."""
        return [fill(question.replace("[[prompt]]", "{prompt}"), prompt) for question in self.questions]

    def score(self, answers: Tensor, alignment: Tensor | None = None) -> Tensor:
        """Answers [B, questions] in -1 to 1 and alignment [B] -> float32 [B]."""
        gated = answers.double()
        for gate, guarded in self.gates.items():
            gated[:, list(guarded)] *= (answers[:, gate] > 0).double()[:, None]
        features = [gated[:, index] for index in range(len(self.questions)) if index not in self.gates]
        if alignment is not None:
            features.insert(0, alignment.double())
        weighted = torch.stack(features, dim=1) * torch.tensor(self.coefficients, dtype=torch.float64)
        return ((weighted.mean(dim=1) if self.mean else weighted.sum(dim=1)) + self.intercept).float()


def read_checklist(params: VisionReward.Params) -> Checklist:
    """Questions and weights from their files.

    Raises:
        ValueError: a file is missing or not in its layout, a gate's number has no question, or the number of
            coefficients is not that of the features.
    """
    questions = tuple(line.strip() for line in _text(params.questions, "questions").splitlines() if line.strip())
    if not questions:
        raise ValueError(f"questions: {params.questions} is empty; it has to hold a question per line.")
    try:
        weights = json.loads(_text(params.weights, "weights"))
    except json.JSONDecodeError as error:
        raise ValueError(f"weights: {params.weights} is not JSON ({error}).") from None
    coefficients, intercept = (
        (weights.get("coef"), weights.get("intercept", 0.0)) if isinstance(weights, dict) else (weights, 0.0)
    )
    numbers = [*coefficients, intercept] if isinstance(coefficients, list) else [None]
    real = [number for number in numbers if isinstance(number, int | float) and not isinstance(number, bool)]
    if len(real) < len(numbers) or not all(map(math.isfinite, real)):
        raise ValueError(
            f'weights: {params.weights} has to hold {{"coef": [numbers], "intercept": number}} or a list of finite '
            "numbers."
        )
    known = set(range(len(questions)))
    guarded = {index for indices in params.gates.values() for index in indices}
    if strangers := sorted((set(params.gates) | guarded) - known):
        raise ValueError(f"gates: there is no question {strangers[0]}; {params.questions} has 0 to {len(known) - 1}.")
    if both := sorted(set(params.gates) & guarded):
        raise ValueError(f"gates: question {both[0]} is a gate and guarded by one; a gate is no feature.")
    features = len(questions) - len(params.gates) + (params.alignment_model is not None)
    if len(numbers) - 1 != features:
        raise ValueError(
            f"weights: {params.weights} has {len(numbers) - 1} coefficients, and there are {features} features "
            f"({len(questions)} questions, {len(params.gates)} of them gates"
            f"{', and alignment' if params.alignment_model else ''})."
        )
    values = tuple(float(number) for number in numbers)
    return Checklist(questions, values[:-1], values[-1], params.gates, params.reduce == "mean")


def _text(path: Path, parameter: str) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{parameter}: {path} cannot be read as text ({error}).") from None


EVALUATOR = VisionReward
