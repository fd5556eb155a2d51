"""Where the shipped ``configs/`` and ``assets/`` are.

In a checkout (and so in an editable install) they lie at the top level, beside the package; in an installed wheel they
lie inside it. A path such as ``configs/shapes/dpo.yaml`` or ``assets/shapes-sd`` means the user's own file where there
is one, and the shipped one otherwise, so that the commands in the documentation work from any folder.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_SHIPPED = ("configs", "assets")


def shipped(name: str) -> Path:
    """The folder of shipped files called ``configs`` or ``assets``.

    Raises:
        ValueError: this installation came without them.
    """
    assert name in _SHIPPED, name
    for home in (_PACKAGE, _PACKAGE.parent):
        if (home / name).is_dir():
            return home / name
    raise ValueError(
        f"This installation of mmalign has no {name}/ folder. "
        "Install from a checkout (`pip install -e .`), or from a wheel."
    )


def find(path: str | Path) -> Path:
    """The user's path where it exists, else the shipped file of that name, else the path as it was given."""
    path = Path(path)
    if path.exists() or path.is_absolute() or not path.parts or path.parts[0] not in _SHIPPED:
        return path
    for home in (_PACKAGE, _PACKAGE.parent):
        if (home / path).exists():
            return home / path
    return path


def advice_for_missing_model(folder: Path) -> str:
    """What to do about a model folder that does not exist: fetch it from the hub, or the name that was meant."""
    if folder.parts[0] == "models" and not folder.parent.exists():  # as in the shipped configs
        return (
            f"Fetch it first (nothing is downloaded during a run): hf download OWNER/{folder.name} --local-dir {folder}"
        )
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(folder)) and not folder.parent.exists():
        return (
            f"If it is the name of a model on the hub, fetch it first (nothing is downloaded during a run): "
            f"hf download {folder} --local-dir models/{folder.name}, and give that folder."
        )
    missing = folder
    while not missing.parent.is_dir():
        missing = missing.parent
    siblings = sorted(entry.name for entry in missing.parent.iterdir() if entry.is_dir())
    close = difflib.get_close_matches(missing.name, siblings, n=1, cutoff=0.5)
    if close:
        candidate = missing.parent / close[0]
        whole = candidate / folder.relative_to(missing)
        return f"Did you mean '{whole if whole.exists() else candidate}'?"
    there = ", ".join(siblings[:5]) or "none"
    return f"Folders in '{missing.parent}': {there}{', ...' if len(siblings) > 5 else ''}."
