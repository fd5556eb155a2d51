"""Which file of a folder is a prompt's clip: names such as ``an alley-0.mp4``, as generators write them.

The reference looks for the exact name and nothing else. Here other spellings are found too, where they can mean one
prompt only: Unicode written another way (macOS decomposes it), small letters for capitals, signs that file systems
refuse (``/ \\ : * ? " < > |``) replaced by ``_`` or ``-`` or left out, and prompts of more than 180 letters cut there,
as VBench-2.0 names them. An exact name goes before all others.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mmalign.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES

__all__ = ["CUT", "FORMS", "Clip", "Clips", "spellings"]

FORMS: tuple[str, ...] = (".mp4", *sorted(VIDEO_SUFFIXES - {".mp4"}), ".gif", *sorted(IMAGE_SUFFIXES - {".gif"}), "")
"""What a clip may be, and which is taken where a name is there in several forms; "" is a folder of frames."""
CUT = 180
"""Letters at which VBench-2.0 cuts prompts for their names."""
_REFUSED = '/\\:*?"<>|'
_NUMBERED = re.compile(r"(.+)-(\d+)", re.DOTALL)


def spellings(prompt: str) -> tuple[str, ...]:
    """What a clip's name may begin with: the prompt, then its other spellings; the likelier one first."""
    found = dict.fromkeys([prompt])
    for instead in ("_", "-", ""):
        found[prompt.replace("/", instead)] = None
        found["".join(instead if letter in _REFUSED else letter for letter in prompt)] = None
    if len(prompt) > CUT:
        found |= dict.fromkeys([each[:CUT] for each in found])
    # A slash can be in no name.
    return tuple(each for each in found if "/" not in each and each.strip())


def same(text: str) -> str:
    """Text as one of its Unicode spellings."""
    return unicodedata.normalize("NFC", text)


def folded(text: str) -> str:
    """Text as a file system sees it that tells capitals not from small letters."""
    return same(same(text).casefold())


@dataclass(frozen=True)
class Clip:
    """A clip that is there.

    Attributes:
        stem: its name without suffix.
        form: of `FORMS`.
    """

    path: str
    stem: str
    form: str

    @property
    def name(self) -> str:
        """As the folder lists it."""
        return os.path.basename(self.path)


class Clips:
    """The clips of one folder, by name.

    Args:
        prompts: all that clips are looked for; a spelling that could mean two of them is nobody's.

    Attributes:
        others: names of what is no clip, and of folders.
        doubles: names of clips that are there in a likelier form too, and not taken.
    """

    def __init__(self, folder: Path, prompts: Iterable[str]) -> None:
        self.folder = folder
        self.others: list[str] = []
        self.doubles: list[str] = []
        self._exact: dict[str, list[Clip]] = {}
        self._folded: dict[str, list[Clip]] = {}
        self._numbers: dict[str, dict[str, set[int]]] = {}
        for clip in self._listed():
            self._exact.setdefault(same(clip.stem), []).append(clip)
            self._folded.setdefault(folded(clip.stem), []).append(clip)
            if numbered := _NUMBERED.fullmatch(clip.stem):
                known = self._numbers.setdefault(folded(numbered[1]), {})
                known.setdefault(same(numbered[1]), set()).add(int(numbered[2]))
        self._owners: dict[str, set[str]] = {}
        self._spelt: dict[str, tuple[str, ...]] = {}
        for prompt in prompts:
            self._spelt[prompt] = spellings(prompt)
            for each in self._spelt[prompt]:
                self._owners.setdefault(folded(each), set()).add(prompt)

    def _listed(self) -> Iterator[Clip]:
        try:
            entries = sorted(os.scandir(self.folder), key=lambda entry: entry.name)
        except OSError as error:
            raise ValueError(f"{self.folder} cannot be listed ({error.strerror}); check path and permissions") from None
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            if entry.name.startswith("."):
                continue
            path = os.path.abspath(entry.path)
            if entry.is_dir():
                self.others.append(f"{entry.name}/")
                yield Clip(path, entry.name, "")
            elif suffix.lower() in FORMS and suffix:
                yield Clip(path, stem, suffix.lower())
            else:
                self.others.append(entry.name)

    @property
    def files(self) -> list[Clip]:
        """Every clip that is a file, in the order of their names."""
        return sorted((clip for held in self._exact.values() for clip in held if clip.form), key=lambda each: each.name)

    def find(self, prompt: str, number: int) -> Clip | None:
        """The prompt's clip of this number, or None."""
        for spelt in self._spelt[prompt]:
            found = self._exact.get(same(f"{spelt}-{number}"))
            if found and (same(spelt) == same(prompt) or self._alone(spelt, prompt)):
                return self._best(found)
        for spelt in self._spelt[prompt]:
            if self._alone(spelt, prompt) and (found := self._folded.get(folded(f"{spelt}-{number}"))):
                return self._best(found)
        return None

    def _alone(self, spelt: str, prompt: str) -> bool:
        return self._owners[folded(spelt)] == {prompt}

    def _best(self, found: list[Clip]) -> Clip:
        ordered = sorted(found, key=lambda clip: (FORMS.index(clip.form), clip.name))
        self.doubles += [clip.name for clip in ordered[1:] if clip.name not in self.doubles]
        return ordered[0]

    def numbers(self, prompt: str) -> list[int]:
        """The numbers of all clips that are called after this prompt, as `find` finds them."""
        known = {number for each in self._spelt[prompt] for held in (self._numbers.get(folded(each)) or {}).values()
                 for number in held}  # fmt: skip
        return [number for number in sorted(known) if self.find(prompt, number)]

    def expected(self, prompt: str, number: int, form: str) -> str:
        """Where the clip would lie."""
        return os.path.abspath(self.folder / f"{self._spelt[prompt][0]}-{number}{form}")

    def collisions(self) -> list[tuple[str, str]]:
        """Pairs of prompts that differ in case alone, of which the folder has clips of one and none of the other.

        Where file systems do not tell them apart, either's clips may have been written over the other's.
        """
        groups: dict[str, list[str]] = {}
        for prompt in self._spelt:
            groups.setdefault(folded(prompt), []).append(prompt)
        found = []
        for key, group in groups.items():
            written = self._numbers.get(key, {})
            if len(group) > 1 and written:
                there = [prompt for prompt in group if same(prompt) in written]
                absent = [prompt for prompt in group if same(prompt) not in written]
                found += [(there[0] if there else group[0], each) for each in absent if each != (there or group)[0]]
        return found
