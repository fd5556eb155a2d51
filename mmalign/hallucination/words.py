"""Words of a caption as CHAIR reads them: lower case, singular, double words as one.

Two modes. `strict` finds what a person would: a plural is made singular if that is a word that is looked for, hyphens
part words. `compat` has the known faults of the original (LisaAnne/Hallucination, Python 2 with pattern.en): "bus"
loses its s and is never found, a synonym that is written with two spaces before it ("motor bike") neither. Its
singulariser is a list of rules here, not that library, which no longer installs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Literal

Mode = Literal["strict", "compat"]

DOUBLE = (
    "motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal", "stop light",
    "fire hydrant", "stop sign", "parking meter", "suit case", "sports ball", "baseball bat", "baseball glove",
    "tennis racket", "wine glass", "hot dog", "cell phone", "mobile phone", "teddy bear", "hair drier", "potted plant",
    "bow tie", "laptop computer", "stove top oven", "home plate", "train track",
)  # fmt: skip
ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
MERGED = {
    **{double: double for double in DOUBLE},
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in ANIMALS},
    **{f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")},
    "bow tie": "tie",
    "toilet seat": "toilet",
}
"""Two words that stand for one; the original never finds "stove top oven", which is three."""

JOINTS = frozenset({
    "a", "an", "the", "of", "with", "without", "in", "on", "at", "by", "and", "or", "from", "to", "for", "under",
    "over", "near", "behind", "beside", "next",
})  # fmt: skip
"""Words behind which another thing is named, or a part of the first."""

IRREGULAR = {
    "people": "person", "men": "man", "women": "woman", "children": "child", "feet": "foot", "teeth": "tooth",
    "mice": "mouse", "geese": "goose", "oxen": "ox", "policemen": "policeman", "policewomen": "policewoman",
    "gentlemen": "gentleman", "servicemen": "serviceman", "cowmen": "cowman", "grandchildren": "grandchild",
    "calves": "calf", "knives": "knife", "wives": "wife", "lives": "life", "leaves": "leaf", "loaves": "loaf",
    "shelves": "shelf", "halves": "half", "wolves": "wolf",
}  # fmt: skip


def tokens(text: str, mode: Mode = "strict") -> list[str]:
    """Words in lower case, punctuation and a possessive s left out; hyphens part words in strict alone."""
    plain = re.sub("['\u2019]s\\b", "", text.lower())
    return re.findall(r"[^\W_]+" if mode == "strict" else r"[^\W_]+(?:-[^\W_]+)*", plain)


def singular(word: str, known: Collection[str], mode: Mode = "strict") -> str:
    """A word's singular.

    Args:
        known: the words that are looked for: strict makes a plural singular only if that gives one of them.
    """
    if mode == "compat":
        return _by_rules(word)
    if word in known:
        return word
    for candidate in _candidates(word):
        if candidate in known:
            return candidate
    return word


def _candidates(word: str) -> list[str]:
    found = [IRREGULAR[word]] if word in IRREGULAR else []
    endings = (
        ("ies", "y"),
        ("ies", "ie"),
        ("ves", "f"),
        ("ves", "fe"),
        ("sses", "ss"),
        ("es", ""),
        ("s", ""),
        ("men", "man"),
    )
    for ending, other in endings:
        if word.endswith(ending) and len(word) > len(ending) + 1:
            found.append(word[: -len(ending)] + other)
    return found


_RULES = (
    (r"(quiz)zes$", r"\1"), (r"(alias|status)es$", r"\1"), (r"(cris|ax|test)es$", r"\1is"), (r"(shoe)s$", r"\1"),
    (r"(o)es$", r"\1"), (r"(bus)es$", r"\1"), (r"([ml])ice$", r"\1ouse"), (r"(x|ch|ss|sh)es$", r"\1"),
    (r"(m)ovies$", r"\1ovie"), (r"(s)eries$", r"\1eries"), (r"([^aeiouy]|qu)ies$", r"\1y"), (r"([lr])ves$", r"\1f"),
    (r"([^f])ves$", r"\1fe"), (r"(n)ews$", r"\1ews"), (r"s$", ""),
)  # fmt: skip
_SAME = frozenset({"scissors", "skis", "pants", "jeans", "shorts", "glasses", "sheep", "fish", "series", "species"})


def _by_rules(word: str) -> str:
    """As pattern.en does it: the first rule that fits, the last of which takes any s ("bus" becomes "bu")."""
    if word in IRREGULAR or word in _SAME:
        return IRREGULAR.get(word, word)
    for pattern, replacement in _RULES:
        if re.search(pattern, word):
            return re.sub(pattern, replacement, word)
    return word


def merged(words: list[str], mode: Mode = "strict", synonyms: Collection[str] = ()) -> list[tuple[str, int]]:
    """Words with double ones as one, each with the place of its (first) word; strict takes those of the synonyms too.

    A seat beside a toilet is no chair: with both in a text the original drops every "seat", strict those next to one.
    """
    found: list[tuple[str, int]] = []
    place = 0
    doubles = MERGED
    if mode == "compat":
        doubles = MERGED | {"wine glas": "wine glass"}
    elif synonyms:
        doubles = {name: name for name in synonyms if " " in name} | MERGED
    while place < len(words):
        three = " ".join(words[place : place + 3])
        two = " ".join(words[place : place + 2])
        if mode == "strict" and three in doubles:
            found.append((doubles[three], place))
            place += 3
        elif place + 1 < len(words) and two in doubles:
            found.append((doubles[two], place))
            place += 2
        else:
            found.append((words[place], place))
            place += 1
    if mode == "compat" and {"toilet", "seat"} <= {word for word, _ in found}:
        found = [each for each in found if each[0] != "seat"]
    return found


def read_synonyms(file: str | Path, mode: Mode = "strict") -> dict[str, str]:
    """Word -> class of a file with a class per line, its synonyms behind commas; the first word is the class.

    Raises:
        ValueError: the file is not there, or has no line.
    """
    path = Path(file).expanduser()
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; CHAIR's synonyms.txt has a class per line") from None
    if not lines:
        raise ValueError(f"{path} is empty; CHAIR's synonyms.txt has a class per line")
    found: dict[str, str] = {}
    for line in lines:
        names = line.split(", ")
        if mode == "strict":  # "iPhone" too, since captions are read in lower case
            names = [name.strip().lower() for name in line.split(",") if name.strip()]
        for name in names:
            found.setdefault(name, names[0])
    return found


def mentions(text: str, synonyms: Mapping[str, str], mode: Mode = "strict") -> list[tuple[str, int]]:
    """Classes that a text mentions, in order and each time, with the place of the word: [(class, place)]."""
    words = _singular(text, synonyms, mode)
    return [(synonyms[word], place) for word, place in merged(words, mode, synonyms) if word in synonyms]


def named(names: Iterable[str], synonyms: Mapping[str, str]) -> list[str]:
    """Classes of things that are named one by one, a class for each word that differs: a man and a woman are two.

    What a name is of is its last word, before an "of" or the like: a table lamp is no table, a cup of tea is a cup.
    """
    found: dict[str, str] = {}
    for name in names:
        words = [word for word, _ in merged(_singular(name, synonyms), synonyms=synonyms)]
        for word, following in zip_longest(words, words[1:]):
            if word in synonyms and (following is None or following in JOINTS):
                found[word] = synonyms[word]
    return list(found.values())


def _singular(text: str, synonyms: Mapping[str, str], mode: Mode = "strict") -> list[str]:
    known = {word for name in (*synonyms, *MERGED) for word in name.split()} | set(synonyms)
    return [singular(word, known, mode) for word in tokens(text, mode)]
