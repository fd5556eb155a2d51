"""What an evaluator's parameters mean to its results: as canonical text for keys, and in short for its label.

A file counts by its content, which `weight_files` names and `Job.weight_hash` holds, never by where it lies: whoever
moves a folder, or leaves out what is found in ``weights/`` anyway, finds the same scores again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from mmalign import paths
from mmalign.config import Strict

__all__ = ["further_paths", "label_of", "params_text"]

LONGEST = 40
"""Letters of a value that a label shows in full."""
_FILE = "<file>"


def params_text(params: Strict, files: Sequence[Path], further: Collection[str] = ()) -> str:
    """The parameters as canonical JSON, without those that only say where a file lies.

    Left out are paths, given or not, and texts that name one of the files or its folder. Within lists and dictionaries,
    and for what is in `further`, ``<file>`` stands in their place.

    Args:
        files: whose content counts besides.
        further: of `further_paths`.
    """
    places = _Places(files)
    values = {}
    for name, value, annotation in _fields(params):
        found = places.without(value, annotation)
        if (found != _FILE or name in further) and not (value is None and _takes(annotation, Path)):
            values[name] = found
    return json.dumps(values, sort_keys=True, ensure_ascii=False, default=str)


def further_paths(params: Strict, files: Sequence[Path], files_of: Callable[[Any], Sequence[Path]]) -> set[str]:
    """Names of given paths that bring files of their own: without such a one there would be another number of files.

    They have to be told apart by name, since contents alone do not say which of two was given. A path whose file is
    found by itself where it is left out, or that has to be given, is none of them.

    Args:
        files_of: the files for other values of the parameters; ValueError where one is missing.
    """
    found = set()
    for name, value, annotation in _fields(params):
        if isinstance(value, Path) and type(None) in get_args(annotation):
            try:
                without = files_of(params.model_copy(update={name: None}))
            except ValueError:  # it has to be given
                continue
            if len(without) != len(files):
                found.add(name)
    return found


def label_of(name: str, params: Strict, files: Sequence[Path], weight_hash: str | None) -> str:
    """The evaluator's name, with the parameters in brackets that are not at their default.

    It follows from `params_text` and the weights. Paths are left out, and of several their number is shown; of a text
    that names a folder of weights the beginning of their hash, and of a long value its own beginning and that of its
    hash.
    """
    places = _Places(files)
    changed = []
    for key, value, annotation in _fields(params):
        if isinstance(value, Path) or value == type(params).model_fields[key].default:
            continue
        if isinstance(value, tuple) and value and all(isinstance(each, Path) for each in value):
            changed.append(f"{key}={len(value)} file{'s' if len(value) > 1 else ''}")
            continue
        found = places.without(value, annotation)
        changed.append(f"{key}={str(weight_hash)[:8] if found == _FILE else _short(found)}")
    return f"{name}[{', '.join(changed)}]" if changed else name


def _fields(params: Strict) -> list[tuple[str, Any, Any]]:
    """(name, value, annotation) of each."""
    return [(name, value, type(params).model_fields[name].annotation) for name, value in params]


def _short(value: Any) -> str:
    text = str(value)
    if len(text) <= LONGEST and text.isprintable():
        return text
    start = " ".join(text.split())[: LONGEST - 12]
    return f"{start}...{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


class _Places:
    """Values that only say where something lies: paths, and texts that name one of these files or its folder."""

    def __init__(self, files: Sequence[Path]) -> None:
        ends = {end for file in files for end in _absolute(file)}
        self._known = ends | {end.parent for end in ends}

    def without(self, value: Any, annotation: Any) -> Any:
        """The value with ``<file>`` in their place; the value itself where there is none.

        One word of several that a parameter may be is no place, though a folder may be called so.
        """
        return self._without(value, _takes(annotation, str))

    def _without(self, value: Any, texts: bool) -> Any:
        if isinstance(value, Path) or (isinstance(value, str) and texts and self._is_place(value)):
            return _FILE
        if isinstance(value, Mapping):
            return {key: self._without(each, texts) for key, each in value.items()}
        if isinstance(value, set | frozenset):
            return sorted((self._without(each, texts) for each in value), key=str)
        if isinstance(value, list | tuple):
            changed = [self._without(each, texts) for each in value]
            return changed if isinstance(value, list) else tuple(changed)
        if isinstance(value, BaseModel):
            inner = {key: self._without(each, texts) for key, each in value}
            return inner if inner != dict(value) else value
        return value

    def _is_place(self, text: str) -> bool:
        # A text may be anything: one without a letter (".", "/") names no folder here.
        if "\0" in text or not any(map(str.isalnum, text)):
            return False
        return not self._known.isdisjoint(_absolute(Path(text)))


def _absolute(path: Path) -> set[Path]:
    """The path as written and with its links followed: hubs keep folders of links to files elsewhere."""
    try:
        path = paths.find(path.expanduser())
        return {Path(os.path.abspath(path)), Path(os.path.realpath(path))}
    except (OSError, RuntimeError):  # a text that no path can be; "~name" of nobody
        return set()


def _takes(annotation: Any, kind: type) -> bool:
    return annotation is kind or any(_takes(each, kind) for each in get_args(annotation))
