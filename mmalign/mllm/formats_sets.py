"""Answer formats of public data sets of preferences and of feedback in words, each by one pure generator."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

from mmalign.mllm.fields import Fields
from mmalign.mllm.rows import AnswerRow, Safer, Turn, Unusable, only_user, turn
from mmalign.records import MediaRef


def rlhf_v(row: Fields) -> Iterator[AnswerRow]:
    """RLHF-V (Yu et al., 2312.00849): image, and text, a JSON string of question, chosen, rejected."""
    said = row.get("text")
    try:
        said = json.loads(said) if isinstance(said, str) else said
    except ValueError as error:
        raise Unusable("bad text", f"text is no valid JSON ({error})") from None
    if not isinstance(said, dict):
        raise Unusable("bad text", f"text is {said!r:.40}, not an object")
    images = row.first_media("image", "image_path")
    yield from row.pair(said.get("question"), said.get("chosen"), said.get("rejected"), images)


def rlaif_v(row: Fields) -> Iterator[AnswerRow]:
    """RLAIF-V (Yu et al., 2405.17220) as released: image, question, chosen, rejected."""
    images = row.first_media("image", "image_path")
    yield from row.pair(row.get("question"), row.get("chosen"), row.get("rejected"), images)


def rlaif_v_pairs(row: Fields) -> Iterator[AnswerRow]:
    """The pairs that RLAIF-V's own scripts write: image_path, question, chosen, rejected, org_infos with the scores."""
    margin = row.get("margin")
    if margin is None:
        margin = _score_difference(row.get("org_infos"))
    images = row.first_media("image_path", "image")
    yield from row.pair(row.get("question"), row.get("chosen"), row.get("rejected"), images, margin=margin)


def _score_difference(infos: Any) -> float | None:
    """How many fewer claims of the chosen answer were rejected; None if the file does not say."""
    try:
        scores = infos["scores"]
        return float(scores["chosen"]["score"]) - float(scores["rejected"]["score"])
    except (KeyError, TypeError, ValueError):
        return None


def mm_rlhf(row: Fields) -> Iterator[AnswerRow]:
    """MM-RLHF's dpo_pairs.jsonl (Zhang et al., 2502.10391): image or video, prompt, chosen, rejected, reasons."""
    if row.get("is_tie") in (True, 1, "true", "True"):
        raise Unusable("tie", "is_tie is set")
    negatives = row.media("rejected_images", "mixed_up_image") or None
    yield from row.pair(
        row.get("prompt"), row.get("chosen"), row.get("rejected"), row.media("image"),
        videos=row.media("video"), rejected_images=negatives,
    )  # fmt: skip


def mia_dpo(row: Fields) -> Iterator[AnswerRow]:
    """MIA-DPO (Liu et al., 2410.17637): image (a list), prompt with <image-placeholder>, chosen, rejected, gt."""
    yield from row.pair(row.get("prompt"), row.get("chosen"), row.get("rejected"), row.media("image", "images"))


def plain_dpo(row: Fields) -> Iterator[AnswerRow]:
    """VL-RLHF's plain_dpo: image, prompt, chosen, rejected, all of them text. By name only: `trl` reads it as well."""
    yield from row.pair(row.get("prompt"), row.get("chosen"), row.get("rejected"), row.media("image"))


_VICUNA = re.compile(r"\s*(USER|ASSISTANT):[ \t]*")
_PREAMBLE = re.compile(
    r"A chat between a curious user and an artificial intelligence assistant\. "
    r"The assistant gives helpful, detailed, and polite answers to the user's questions\."
)


def mdpo(row: Fields) -> Iterator[AnswerRow]:
    """mDPO (Wang et al., 2406.11839): img_path, prompt (the whole Vicuna text, up to ASSISTANT:), chosen, rejected."""
    images = row.media("img_path")
    turns = vicuna(row.text("prompt", "no prompt"))
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if chosen is None or rejected is None:
        raise Unusable("empty answer", f"{'chosen' if chosen is None else 'rejected'} is missing")
    yield row.row(turns, chosen, rejected, images)


def vicuna(text: str) -> tuple[Turn, ...]:
    """The turns of a text in Vicuna's template; its standard preamble belongs to the template and goes."""
    pieces = _VICUNA.split(text.replace("</s>", ""))
    system = _PREAMBLE.sub("", pieces[0]).strip()
    if len(pieces) == 1:
        raise Unusable("no prompt", "the prompt has no USER: and so is not in Vicuna's template")
    roles = {"USER": "user", "ASSISTANT": "assistant"}
    turns = [turn(roles[role], said.strip()) for role, said in zip(pieces[1::2], pieces[2::2], strict=True)]
    if turns[-1].role == "assistant" and not turns[-1].parts:
        turns.pop()
    return (turn("system", system), *turns) if system else tuple(turns)


def spa_vl(row: Fields) -> Iterator[AnswerRow]:
    """SPA-VL (Zhang et al., 2406.12030): image, question, chosen, rejected, image_name."""
    yield from row.pair(row.get("question"), row.get("chosen"), row.get("rejected"), row.first_media("image"))


def _of_two(row: Fields, column: str) -> int | None:
    """1 or 2, as a number or as text; None for all else."""
    value = row.get(column)
    if isinstance(value, str) and value.strip() in ("1", "2"):
        return int(value)
    return value if value in (1, 2) and not isinstance(value, bool) else None


def align_anything(row: Fields) -> Iterator[AnswerRow]:
    """align-anything's AA_TI2T: image, question, response_1, response_2, overall_response (1 or 2, the better)."""
    better = _of_two(row, "overall_response")
    if better is None:
        raise Unusable("no label", f"overall_response is {row.get('overall_response')!r:.40}, not 1 or 2")
    answers = (row.get(f"response_{better}"), row.get(f"response_{3 - better}"))
    yield from row.pair(row.get("question"), *answers, row.media("image"))


def beavertails_v(row: Fields) -> Iterator[AnswerRow]:
    """BeaverTails-V (Ji et al., 2503.17682): more_helpful_response_id says which is chosen, safer_response_id `safer`.

    Its other release has one response and is_response_safe ("yes" or "no"), which is the label of an unpaired row.
    """
    if row.get("response") is not None:
        safe = {"yes": True, "no": False}.get(str(row.get("is_response_safe")).lower())
        if safe is None:
            raise Unusable("no label", f"is_response_safe is {row.get('is_response_safe')!r:.40}, not yes or no")
        images = row.media("image")
        yield row.row(only_user(row.get("question"), len(images)), row.get("response"), None, images, label=safe)
        return
    better, safer_one = _of_two(row, "more_helpful_response_id"), _of_two(row, "safer_response_id")
    if better is None:
        value = row.get("more_helpful_response_id")
        raise Unusable("no label", f"more_helpful_response_id is {value!r:.40}, not 1 or 2")
    answers = (row.get(f"response_{better}"), row.get(f"response_{3 - better}"))
    safer: Safer | None = None if safer_one is None else "chosen" if safer_one == better else "rejected"
    yield from row.pair(row.get("question"), *answers, row.media("image"), safer=safer)


# ------------------------------------------------------------------------------------------------ feedback in words


def dress(row: Fields) -> Iterator[AnswerRow]:
    """DRESS (Chen et al., 2311.10081): image_id, interaction [{user, model, rating, critique NLF}]; refined answers.

    Of each answer and the next, which follows on what the user said of it: a row to imitate (question, answer,
    critique and wish -> next answer), and a pair (the next answer is better) unless the ratings say the opposite.
    """
    said = row.get("interaction")
    if not isinstance(said, list | tuple) or not all(isinstance(each, dict) for each in said):
        raise Unusable("no prompt", f"interaction is {said!r:.40}, not a list of {{user, model}}")
    if len(said) < 2:
        raise Unusable("no refinement", "there is one answer and no other that refines it")
    images = row.first_media("image", "image_id")
    turns = only_user(said[0].get("user"), len(images))
    for number, (first, then) in enumerate(pairwise(said), 1):
        asked = (*turns, *_reply(first, then.get("user")))
        yield from _refined(row, asked, len(turns), (first, then), images, number)
        turns = asked


def critiques(row: Fields) -> Iterator[AnswerRow]:
    """Critiques in columns of their own: question, response, critique, refined, image; gives what `dress` gives."""
    images = row.media("image", "images")
    turns = only_user(row.get("question"), len(images))
    first = {"model": row.get("response"), "critique NLF": row.get("critique")}
    asked = (*turns, *_reply(first, None))
    yield from _refined(row, asked, len(turns), (first, {"model": row.get("refined")}), images, 1)


def _critique(said: dict[str, Any]) -> Any:
    return said.get("critique NLF", said.get("critique_NLF"))


def _reply(first: dict[str, Any], wish: Any) -> tuple[Turn, Turn]:
    """An answer, and what the user says of it: the critique and what is wished for, a line each."""
    if not isinstance(first.get("model"), str):
        raise Unusable("empty answer", "an answer that is refined is missing")
    lines = [line.strip() for line in (_critique(first), wish) if isinstance(line, str) and line.strip()]
    if not lines:
        raise Unusable("no critique", "nobody says what is wrong with the answer")
    return turn("assistant", first["model"]), turn("user", "\n".join(lines))


def _rating(said: dict[str, Any]) -> float | None:
    try:
        return float(said["rating"])
    except (KeyError, TypeError, ValueError):
        return None


def _refined(
    row: Fields,
    asked: tuple[Turn, ...],
    before: int,
    answers: tuple[dict[str, Any], dict[str, Any]],
    images: tuple[MediaRef, ...],
    number: int,
) -> Iterator[AnswerRow]:
    """The refined answer to imitate after `asked`, and the pair of both answers to its first `before` turns."""
    first, then = (each.get("model") for each in answers)
    if then is None:
        raise Unusable("empty answer", "the refined answer is missing")
    ratings = [_rating(each) for each in answers]
    known: dict[str, Any] = {"margin": None, "meta": {**row.meta(), "critique": asked[-1].text, "ratings": ratings}}
    origin = f"{row.record.origin} refinement {number}"
    yield replace(row.row(asked, then, None, images, **known), origin=origin)
    if ratings[0] is not None and ratings[1] is not None:
        known["margin"] = ratings[1] - ratings[0]
        if ratings[1] < ratings[0]:
            detail = f"refinement {number} goes from {ratings[0]:g} to {ratings[1]:g}"
            raise Unusable("refined answer is rated lower", detail)
    yield replace(row.row(asked[:before], then, first, images, **known), origin=f"{origin} pair")
