"""Does an evaluator keep its contract? One call in a plug-in's tests asks everything that the runner relies on."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmalign.discovery import configured, find_evaluators, load_evaluator
from mmalign.evaluation import PIXELS, Batch, Evaluator, figures_declared, subscores
from mmalign.media import write_image

__all__ = ["check_evaluator"]

PROMPTS = (
    "a red circle on a blue background",
    "two green squares",
    "ein Würfel, 立方体, \N{GRINNING FACE}",
    "a photo of " + "a very, very long list of things " * 30,
    "a red circle on a blue background",
    "x",
)
RESPONSES = ("Yes", "No, there is none.", "", "a red circle.\nTwo squares", "是", "I cannot tell. Yes")
SIZES = ((64, 64), (33, 70), (150, 224), (2, 2), (5, 301), (64, 64))


def check_evaluator(
    name: str,
    params: Mapping[str, Any] | None = None,
    *,
    prompts: Sequence[str] = PROMPTS,
    sizes: Sequence[tuple[int, int]] = SIZES,
    aux: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    responses: Sequence[str] | None = None,
    tolerance: float = 1e-5,
    processes: int = 2,
    seed: int = 0,
) -> None:
    """Try an evaluator on random, constant, odd-sized and one-frame media, on the CPU; pass silently or say what is
    wrong.

    Checked: it is found by name and its summary can be read; shape, dtype and range; repeatability; an item's score
    depends neither on the rest of its batch nor on its place in it; odd sizes; constant media; one-frame clips, which
    are scored or refused by a ValueError for each; the gradient where it is declared, of clips where it scores these
    alone; and the results of one process, figures of the whole table among them, equal those of several, through the
    real runner. An evaluator that looks at no pixels gets the columns alone, as it does there.

    Args:
        name: as configs name it: a file of ``evaluators/`` or an entry point that is installed.
        params: its parameters.
        prompts, sizes, aux, responses: prompts, (height, width), further columns (of all, or of each item) and answers
            of a model for the items. Their numbers have to be equal, at least 2. Give your own where the evaluator
            reads only certain prompts or sizes.
        tolerance: largest difference between scores that have to be equal, as a share of max(1, |score|).
        processes: how many are spawned for the last check; 1 leaves it out.
        seed: of the random media.

    Raises:
        AssertionError: the contract is broken; the message says where.
        ValueError, TypeError: as `mmalign.discovery.load_evaluator` raises them.
    """
    assert len(prompts) == len(sizes) >= 2, "give as many prompts as sizes, at least 2"
    columns = _columns(prompts, aux, responses)
    found = find_evaluators().get(name)
    if found is not None:
        assert found.error is None, f"{name} is listed as broken: {found.error}"
        assert found.summary, f"{name}: the class has no docstring, so lists have no summary for it"
    cls, checked = configured(name, params or {})
    assert issubclass(cls, Evaluator), f"{name} scores whole sets; check_evaluator is for evaluators of single items"
    evaluator = load_evaluator(name, params, "cpu")
    assert isinstance(evaluator, Evaluator)
    bounds = cls.bounds(checked)
    for modality in sorted(cls.modality):
        batches = _batches(modality, columns, sizes, seed) if PIXELS & set(cls.needs) else {"random": columns}
        for kind, batch in batches.items():
            if kind == "one-frame" and _refused(evaluator, batch, f"{name} on {kind} {modality}s"):
                continue
            _check_values(evaluator, batch, f"{name} on {kind} {modality}s", bounds, tolerance)
        _check_invariance(evaluator, batches["random"], f"{name} on {modality}s", tolerance)
    if cls.differentiable:
        _check_gradient(evaluator, prompts, tolerance, seed)
    if processes > 1 and "image" in cls.modality:
        _check_processes(name, params or {}, columns, sizes, tolerance, processes, seed, figures_declared(cls))


def _columns(
    prompts: Sequence[str], aux: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None, responses: Sequence[str] | None
) -> Batch:
    """The items without their media."""
    each = [aux or {}] * len(prompts) if isinstance(aux, Mapping) or aux is None else aux
    answers = (RESPONSES * len(prompts))[: len(prompts)] if responses is None else responses
    assert len(each) == len(answers) == len(prompts), "give as many aux and responses as prompts"
    return Batch(
        prompts=list(prompts),
        aux=[dict(one) for one in each],
        samples=[str(number) for number in range(len(prompts))],
        responses=list(answers),
    )


def _batches(modality: str, columns: Batch, sizes: Sequence[tuple[int, int]], seed: int) -> dict[str, Batch]:
    clips = _media(sizes, 1 if modality == "image" else 3, seed)
    batches = {"random": _batch(modality, clips, columns)}
    for value in (0, 128, 255):
        batches[f"constant ({value})"] = _batch(modality, [torch.full_like(c, value) for c in clips], columns)
    if modality == "video":
        batches["one-frame"] = _batch(modality, [clip[:1] for clip in clips], columns)
    return batches


def _media(sizes: Sequence[tuple[int, int]], frames: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (frames, 3, *size), dtype=torch.uint8, generator=generator) for size in sizes]


def _batch(modality: str, clips: list[Tensor], columns: Batch) -> Batch:
    return Batch(
        images=[clip[0] for clip in clips] if modality == "image" else [],
        frames=clips,
        prompts=columns.prompts,
        references=[clip.flip(0, -1) for clip in clips],
        fps=[None if modality == "image" else 8.0] * len(clips),
        aux=columns.aux,
        samples=columns.samples,
        responses=columns.responses,
    )


def _score(evaluator: Evaluator, batch: Batch) -> dict[str, Tensor]:
    with torch.no_grad():
        return subscores(evaluator.score(batch), len(batch), evaluator.name)


def _refused(evaluator: Evaluator, batch: Batch, where: str) -> bool:
    """Whether every item is one that cannot have a score, said by a ValueError in words; as a measure of pairs does."""
    refused = []
    for index in range(len(batch)):
        try:
            _score(evaluator, batch.take([index]))
        except ValueError as error:
            assert str(error), f"{where}: a ValueError without words"
            refused.append(index)
    assert len(refused) in (0, len(batch)), f"{where}: the items {refused} are refused and the others are scored"
    return bool(refused)


def _check_values(
    evaluator: Evaluator, batch: Batch, where: str, bounds: tuple[float | None, float | None], tolerance: float
) -> None:
    first, again = _score(evaluator, batch.take(range(len(batch)))), _score(evaluator, batch.take(range(len(batch))))
    for name, values in first.items():
        low, high = (0.0, None) if name in evaluator.counts else bounds
        assert bool(torch.isfinite(values).all()), f"{where}: '{name}' is not finite: {values.tolist()}"
        assert torch.equal(values, again[name]), f"{where}: '{name}' differs when the same batch is scored again"
        if name in evaluator.counts:
            continue
        assert low is None or float(values.min()) >= low - tolerance, (
            f"{where}: '{name}' is below {low}: {values.tolist()}"
        )
        assert high is None or float(values.max()) <= high + tolerance, (
            f"{where}: '{name}' is above {high}: {values.tolist()}"
        )


def _check_invariance(evaluator: Evaluator, batch: Batch, where: str, tolerance: float) -> None:
    together = _score(evaluator, batch)
    size = len(batch)
    alone = [_score(evaluator, batch.take([index])) for index in range(size)]
    backwards = _score(evaluator, batch.take(range(size - 1, -1, -1)))
    for name, values in together.items():
        single = torch.stack([scores[name][0] for scores in alone])
        _close(single, values, tolerance, f"{where}: '{name}' depends on the rest of the batch")
        _close(backwards[name].flip(0), values, tolerance, f"{where}: '{name}' depends on the order of the batch")


def _check_gradient(evaluator: Evaluator, prompts: Sequence[str], tolerance: float, seed: int) -> None:
    clips = set(evaluator.modality) == {"video"}
    drawn = _media([(48, 48)] * len(prompts), 3 if clips else 1, seed + 1)
    pixels = torch.stack(drawn) if clips else torch.cat(drawn)
    images = (pixels.float() / 255).requires_grad_(True)
    scores = evaluator.score_tensor(images, list(prompts))
    where = f"{evaluator.name}.score_tensor"
    assert scores.shape == (len(prompts),), f"{where} returned shape {list(scores.shape)}, expected [{len(prompts)}]"
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert bool(torch.isfinite(gradient).all()), f"{where}: the gradient is not finite"
    still = [place for place, one in enumerate(gradient) if not bool(one.any())]
    assert not still, f"{where}: the gradient does not reach the pixels of the images {still}"
    plain = _score(evaluator, Batch(images=[] if clips else list(pixels), frames=drawn, prompts=list(prompts)))
    name, values = next(iter(plain.items()))
    _close(scores.detach().double(), values, tolerance, f"{where} differs from '{name}' of score on the same images")


def _check_processes(
    name: str,
    params: Mapping[str, Any],
    columns: Batch,
    sizes: Sequence[tuple[int, int]],
    tolerance: float,
    processes: int,
    seed: int,
    figures: bool,
) -> None:
    from mmalign.jobs import EvaluatorSpec, ScoreConfig
    from mmalign.results import read_json, read_results
    from mmalign.score import run

    with tempfile.TemporaryDirectory() as folder:
        table = _table(Path(folder), columns, sizes, seed)
        results, wholes = [], []
        for number in (1, processes):
            config = ScoreConfig(
                table=table,
                output=Path(folder) / f"results-{number}",
                evaluators=(EvaluatorSpec(name=name, params=dict(params)),),
                batch_size=2,
                processes=number,
                device="cpu",
            )
            rows = read_results(run(config)).rows
            wholes += list(read_json(config.output / "summary.json")["evaluators"].values())
            results.append({(row["sample"], row["subscore"]): row for row in rows})
    one, several = results
    assert one.keys() == several.keys(), f"{name}: one process and {processes} gave different rows"
    for key, row in one.items():
        assert row["status"] == several[key]["status"] == "ok", f"{name}: {key} failed: {row['reason']}"
        pair = torch.tensor([row["score"]]), torch.tensor([several[key]["score"]])
        _close(*pair, tolerance, f"{name}: {key} differs between one process and {processes}")
    if figures:
        assert "figures_problem" not in wholes[0], f"{name}.figures failed: {wholes[0]['figures_problem']}"
        assert wholes[0]["figures"], f"{name}.figures gave none"
        assert wholes[0]["figures"] == wholes[1]["figures"], f"{name}: figures of one process and {processes} differ"


def _table(folder: Path, columns: Batch, sizes: Sequence[tuple[int, int]], seed: int) -> Path:
    lines = []
    for index, (prompt, clip) in enumerate(zip(columns.prompts, _media(sizes, 1, seed), strict=True)):
        pixels: Any = np.ascontiguousarray(clip[0].permute(1, 2, 0).numpy())
        write_image(folder / f"{index}.png", pixels)
        write_image(folder / f"{index}-reference.png", np.ascontiguousarray(pixels[:, ::-1]))
        row = {"sample": str(index), "prompt": prompt, "media": f"{index}.png", "reference": f"{index}-reference.png"}
        aux = columns.aux[index]
        lines.append(json.dumps(row | {"response": columns.responses[index]} | ({"aux": aux} if aux else {})))
    (folder / "table.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "table.jsonl"


def _close(found: Tensor, expected: Tensor, tolerance: float, message: str) -> None:
    allowed = tolerance * expected.abs().clamp(min=1.0)
    if bool(((found - expected).abs() > allowed).any()):
        raise AssertionError(f"{message}: {found.tolist()} and {expected.tolist()}")
