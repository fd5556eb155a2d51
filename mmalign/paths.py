"""Where the shipped ``configs/`` and ``assets/`` are.

In a checkout (and so in an editable install) they lie at the top level, beside the package; in an installed wheel they
lie inside it. A path such as ``configs/shapes/dpo.yaml`` or ``assets/shapes-sd`` means the user's own file where there
is one, and the shipped one otherwise, so that the commands in the documentation work from any folder.
"""

from __future__ import annotations

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
