"""Why a suite's clips may be missing from a folder, guessed from the names that are there."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mmalign.vbench.names import FORMS, Clip, Clips, folded
from mmalign.vbench.suite import SuitePrompt

__all__ = ["causes"]

_MEDIA = frozenset(form for form in FORMS if form)
_NUMBER = re.compile(r"(.+)-\d+", re.DOTALL)
_SHORTEST = 30  # letters of a name that is taken for the beginning of a prompt


def causes(held: Clips, prompts: Sequence[SuitePrompt], samples: int, left: Sequence[Clip]) -> list[str]:
    """Sentences that say what is probably wrong; the likelier first, and none where nothing shows.

    Args:
        held: the folder's clips.
        prompts: of the suite, of which some clips are missing.
        left: clips of the folder that are called after no prompt.
    """
    if not held.files:
        return [_nothing(held)]
    found: list[str] = []
    texts = [each.prompt for each in prompts]
    known = {folded(text): text for text in texts}
    shifted = [text for text in texts if 0 not in (numbers := held.numbers(text)) and samples in numbers]
    if shifted:
        found.append(
            f"numbers begin at 1: {shifted[0]!r} has -1 to -{samples}; the suite counts from 0, so rename them, or "
            "name the prompts in a media table"
        )
    found += _other_suffix(held, known)
    found += _other_spelling(left, known)
    bases = {folded(_base(clip.stem)) for clip in left}
    strangers = bases - set(known)
    used = sum(bool(held.numbers(text)) for text in texts)
    if not found and len(strangers) > max(2, used):
        example = next(_base(clip.stem) for clip in left if folded(_base(clip.stem)) in strangers)
        found.append(f"{len(strangers)} names are no prompt of this suite, such as {example!r}: is it another suite?")
    if not found:
        short = Counter(len(held.numbers(text)) for text in texts if 0 < len(held.numbers(text)) < samples)
        none = [text for text in texts if not held.numbers(text)]
        if none:
            found.append(f"{len(none)} prompts have no clip at all, such as {none[0]!r}; has sampling ended early?")
        if short:
            most = short.most_common(1)[0][0]
            found.append(f"{sum(short.values())} prompts have fewer than {samples} clips, mostly {most}; see samples")
    return found


def _nothing(held: Clips) -> str:
    """A folder without one clip: perhaps they lie in a folder of it."""
    folder = held.folder
    inside = [each for each in sorted(folder.iterdir()) if each.is_dir() and not each.name.startswith(".")]
    for each in inside:
        number = sum(Path(name).suffix.lower() in _MEDIA for name in os.listdir(each))
        if number:
            return f"{folder} holds no clip itself, and {each} holds {number}; name that folder"
    if not inside and not held.others:
        return f"{folder} is empty"
    what = f"{len(held.others)} other entries, such as {held.others[0]!r}" if held.others else "nothing else"
    return f"{folder} holds no clip; it holds {what}"


def _base(stem: str) -> str:
    numbered = _NUMBER.fullmatch(stem)
    return numbered[1] if numbered else stem


def _other_suffix(held: Clips, known: dict[str, str]) -> list[str]:
    named = [name for name in held.others if not name.endswith("/") and folded(_base(Path(name).stem)) in known]
    suffixes = Counter(Path(name).suffix for name in named)
    if not suffixes:
        return []
    suffix, number = suffixes.most_common(1)[0]
    known_ones = ", ".join(FORMS[:4])
    return [f"{number} files are called after prompts and end in {suffix!r}; clips end in {known_ones}, ..."]


def _other_spelling(left: Sequence[Clip], known: dict[str, str]) -> list[str]:
    found = []
    whole = [clip for clip in left if folded(clip.stem) in known]
    if whole:
        found.append(f"{len(whole)} names have no number, such as {whole[0].name!r}; the suite has -0, -1, ...")
    spaced = {folded(text.replace(" ", "_")): text for text in known.values()}
    spaced |= {folded(re.sub(r"[^\w-]+", "_", text).strip("_")): text for text in known.values()}
    scored = [clip for clip in left if folded(_base(clip.stem)) in spaced and folded(_base(clip.stem)) not in known]
    if scored:
        found.append(f"{len(scored)} names have _ for spaces, such as {scored[0].name!r}; rename them, or give a table")
    cut = [
        clip
        for clip in left
        if len(base := folded(_base(clip.stem))) >= _SHORTEST
        and base not in known
        and any(each.startswith(base) for each in known)
    ]
    if cut:
        longest = max(len(_base(clip.stem)) for clip in cut)
        found.append(f"{len(cut)} names are cut at {longest} letters, such as {cut[0].name!r}; give a media table")
    return found
