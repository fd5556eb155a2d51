"""Checkpoints of published scorers: where they lie, what tells one copy from another, how a mismatch is named.

`mmalign.weights_read` reads them. Nothing here downloads anything.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmalign import paths
from mmalign.explain import nearest
from mmalign.known_weights import KNOWN, NO_TENSORS, Checkpoint
from mmalign.weights_read import count_numbers, read_json, read_state_dict

__all__ = [
    "RECORD",
    "REWARD_FILE",
    "MissingWeights",
    "all_missing",
    "check_scorer",
    "count_numbers",
    "fetched",
    "file_hash",
    "files_hash",
    "find_checkpoint",
    "how_to_get",
    "known",
    "load_into",
    "read_record",
    "read_state_dict",
    "scorer_of",
    "weight_files_of",
]

RECORD = "weights.json"
REWARD_FILE = "reward.json"
"""What `mmalign train` (task: reward) writes into the folder of a fitted scorer."""
SAFETENSORS, PICKLED = {".safetensors"}, {".pt", ".pth", ".bin", ".ckpt"}
# Whose fitted folders hold tensors that are read as a checkpoint of these layouts.
_FITTED = {**dict.fromkeys(("open_clip", "hf_clip", "long_clip"), "fitted_reward"), "image_reward": "image_reward"}


class MissingWeights(ValueError):
    """A published file that is not where it is looked for.

    Attributes:
        known: its key in `KNOWN`.
        found: what is there instead.
    """

    def __init__(self, known: str, found: str, how: str, parameter: str, name: str):
        self.known, self.found, self._how, self._name = known, found, how, name
        super().__init__(self.told(f"set `{parameter}` to"))

    def told(self, ask: str) -> str:
        """The message, where `ask` is how the file is named to the program: "set `checkpoint` to", "give --weights"."""
        return f"{self.known} weights: {self.found}.{self._how}, and {ask} the file or its folder.{self._name}"


# What `all_missing` has met; None where the first file that is missing ends the search.
_MET: ContextVar[list[MissingWeights] | None] = ContextVar("missing weights", default=None)


def all_missing(look: Callable[[], object]) -> list[MissingWeights]:
    """Every file that `look` misses, by looking on with the name of the first file where none is.

    Raises:
        ValueError, OSError: of `look`, where nothing was missing before.
    """
    met: list[MissingWeights] = []
    token = _MET.set(met)
    try:
        look()
    except (ValueError, OSError):  # it wanted to read a file that is missing
        if not met:
            raise
    finally:
        _MET.reset(token)
    return met


def how_to_get(missing: Iterable[str]) -> list[str]:
    """Sentences that say how to get these keys of `KNOWN` to where they are looked for: one command, then by hand."""
    names = list(dict.fromkeys(missing))
    offered = [name for name in names if not KNOWN[name].by_hand]
    command = [f"Run `mmalign weights fetch {' '.join(offered)}`."] if offered else []
    by_hand = [
        f"{name}: {KNOWN[name].by_hand}, and put it into {fetched(name)}." for name in names if KNOWN[name].by_hand
    ]
    return command + by_hand


def known(name: str) -> Checkpoint:
    """The entry of the table of known weights.

    Raises:
        ValueError: an unknown name, with the nearest one.
    """
    if name not in KNOWN:
        near = nearest(name, list(KNOWN))
        raise ValueError(f"There are no known weights '{name}'.{near} `mmalign weights list` shows them.")
    return KNOWN[name]


def fetched(known: str) -> Path:
    """The folder where `mmalign weights fetch` puts a checkpoint: below ``$MMALIGN_WEIGHTS``, or ``weights`` here."""
    return Path(os.environ.get("MMALIGN_WEIGHTS") or "weights").expanduser() / known


def find_checkpoint(path: str | Path | None, known: str, parameter: str = "checkpoint") -> Path:
    """The checkpoint file that a user's setting means.

    Args:
        path: a file, or a folder that holds one of the known file names; None is the folder `fetched`.
        known: a key of `KNOWN`.
        parameter: the setting's name, for the message.

    Raises:
        MissingWeights: there is no such file, with the names looked for and where the file is published.
        ValueError: it is a scorer that was fitted here for another evaluator, which is named.
    """
    entry = KNOWN[known]
    path = fetched(known) if path is None else paths.find(Path(path).expanduser())
    folder = path if path.is_dir() else path.parent
    if entry.keys not in NO_TENSORS:
        check_scorer(folder, *filter(None, [_FITTED.get(entry.keys)]))
    if path.is_file():
        return path
    # Where the authors' own file is a pickle, which is never read, a converted one beside it is what is meant.
    names = (*entry.files[1:], entry.files[0]) if entry.pickled else entry.files
    for name in names if path.is_dir() else ():
        if (path / name).is_file():
            return path / name
    found = f"the folder {path} holds none of {', '.join(entry.files)}" if path.is_dir() else f"{path} does not exist"
    where = entry.repo if "://" in entry.repo else f"the Hugging Face repository {entry.repo}"
    how = entry.by_hand or f"Run `mmalign weights fetch {known}`, or get {entry.files[0]} from {where}"
    name = f" The authors' name for it is {entry.files[0]}, of {entry.repo}." if entry.by_hand else ""
    own = None if entry.keys in NO_TENSORS else scorer_of(folder)
    fitted = f" What is there was fitted by `mmalign train`; it is scored by {own}." if own else ""
    missing = MissingWeights(known, found, f"{fitted} {how}", parameter, name)
    met = _MET.get()
    if met is None:
        raise missing
    met.append(missing)
    return folder / entry.files[0]


def scorer_of(folder: str | Path) -> str | None:
    """The evaluator that a fitted scorer's folder names; None for folders that were not fitted here.

    Raises:
        ValueError: reward.json is damaged.
    """
    path = paths.find(Path(folder).expanduser()) / REWARD_FILE
    if not path.is_file():
        return None
    told = read_json(path, "copy the whole export/ folder again")
    if "scorer" in told:
        return str(told["scorer"])
    return "vlm_reward" if "asked" in told else "fitted_reward" if "family" in told else None  # before it was written


def check_scorer(folder: str | Path, *wanted: str) -> None:
    """ValueError, with the right evaluator's name, for a folder that says it is read by none of these."""
    found = scorer_of(folder)
    if found is not None and found not in wanted:
        raise ValueError(f"{folder}: was fitted for another evaluator; it is scored by {found}.")


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `mmalign weights fetch` wrote beside the files of a checkpoint; None where it wrote nothing.

    Returns:
        ``name`` (of the known weights), ``repo``, ``licence``, ``revision`` where the hub told it, and ``files``:
        sha256 by name, names below the folder.

    Raises:
        ValueError: the record is damaged.
    """
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # undecodable bytes among the latter
        raise ValueError(f"{path}: is not JSON ({error}); delete it, and fetch the weights again.") from None
    files = record.get("files") if isinstance(record, dict) else None
    if (
        not isinstance(files, dict)
        or not isinstance(record.get("name"), str)
        or not all(isinstance(digest, str) for digest in files.values())
    ):
        raise ValueError(f"{path}: is no record of fetched weights; delete it, and fetch the weights again.")
    return dict(record)


def load_into(module: nn.Module, state: Mapping[str, Tensor], origin: str, *, assign: bool = False) -> None:
    """Load every tensor, or refuse and say by name what does not fit.

    Args:
        module: on any device; on the meta device together with ``assign``.
        state: names to tensors, in the module's own layout.
        origin: the file, for the message.
        assign: put the tensors themselves into the module, in their own dtype, instead of copying values.

    Raises:
        ValueError: missing, unexpected or mis-shaped tensors, all three listed by name.
    """
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    wrong = [
        f"{name} is {list(state[name].shape)} and has to be {list(shape)}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    problems = [
        f"{len(names)} {what}: {_some(names)}"
        for names, what in ((missing, "missing"), (unexpected, "unexpected"), (wrong, "of the wrong shape"))
        if names
    ]
    if problems:
        raise ValueError(f"{origin}: the tensors do not fit {type(module).__name__}. " + "; ".join(problems) + ".")
    module.load_state_dict(dict(state), strict=True, assign=assign)


def weight_files_of(place: str | Path) -> list[Path]:
    """The weight files that a path means: itself, or those in a folder (safetensors alone where it has both kinds).

    Nothing for what is no path, such as the name of an architecture.
    """
    path = paths.find(Path(place).expanduser())
    if path.is_file():
        return [path] if path.suffix in SAFETENSORS | PICKLED else []
    for suffixes in (SAFETENSORS, PICKLED) if path.is_dir() else ():
        files = sorted(file for file in path.iterdir() if file.suffix in suffixes)
        if files:
            return files
    return []


def file_hash(path: str | Path) -> str:
    """sha256 of a file as 64 hex digits; remembered as long as the file's size and time stamp stay."""
    path = Path(path).resolve()
    status = path.stat()
    return _file_hash(str(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _file_hash(path: str, size: int, modified_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_hash(files: Iterable[str | Path]) -> str | None:
    """One sha256 for several files in the given order, the file's own digest for a single one, None for none."""
    digests = [file_hash(path) for path in files]
    if len(digests) < 2:
        return digests[0] if digests else None
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _some(names: list[str], limit: int = 6) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
