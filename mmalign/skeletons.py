"""What `mmalign new` writes: an evaluator that works as it stands, with its test, to be made one's own."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from mmalign.discovery import find_evaluators
from mmalign.source import whole_file
from mmalign.vbench.dimensions import DIMENSIONS

__all__ = ["checkout", "new_evaluator", "new_package"]

_EVALUATOR = '''"""{name}: how steady the brightness of a clip is, until your own measure stands here."""

import torch

from mmalign.evaluation import AllFrames, Batch, Evaluator, Strict


class {cls}(Evaluator):
    """How steady the brightness is: 1 less the largest difference between two frames."""  # shown by `mmalign list`

    # Change what follows to what your measure is.
    needs = frozenset({{"frames"}})  # of: image frames prompt reference fps aux
    modality = frozenset({{"video"}})  # or {{"image"}}, or both
    frames = AllFrames()  # or Uniform(8), Middle(16), EveryFps(2), StrideFps(8): what is decoded
    score_range = (0.0, 1.0)  # None where there is no bound
    higher_is_better = True
    version = 1  # raise it when scores change, and earlier results are computed again
    licence = "Apache-2.0"  # of the method and its weights, shown with every result
    source = "this file"  # a paper, or where the weights are from

    class Params(Strict):
        """Attributes: darkest: brightness below which all frames count as black, from 0 to 1."""

        darkest: float = 0.0  # set in a config under `params`

    def score(self, batch: Batch) -> torch.Tensor:
        """One score per clip, [B]. A score must not depend on the other clips; NaN means that it cannot be given."""
        return torch.stack([self._one(clip) for clip in batch.clips()])

    def _one(self, clip: torch.Tensor) -> torch.Tensor:
        """The score of a clip, uint8 [T, 3, H, W]. This is the line to begin with."""
        brightness = (clip.double().mean((1, 2, 3)) / 255).clamp(min=self.params.darkest)
        return 1 - (brightness.max() - brightness.min())


EVALUATOR = {cls}
'''

_TEST = '''"""{name} keeps the contract of evaluators, and gives the figures that it should."""

import pytest
import torch

from mmalign.discovery import load_evaluator
from mmalign.evaluation import Batch
from mmalign.testing import check_evaluator


def test_contract():
    """Ranges, odd sizes, one frame, order and batches; see docs/evaluators.md."""
    check_evaluator("{name}")


def test_known_values():
    """Clips whose score you can work out by hand."""
    still = torch.full((4, 3, 8, 8), 100, dtype=torch.uint8)
    flash = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    flash[1] = 51  # a fifth of the way to white
    scores = load_evaluator("{name}", device="cpu").score(Batch(frames=[still, flash], prompts=["", ""]))
    assert scores.tolist() == pytest.approx([1.0, 0.8])
'''

_PROJECT = """[build-system]
requires = ["setuptools>=68"]
build-backend = "setuptools.build_meta"

[project]
name = "mmalign-{dashed}"
version = "0.1.0"
description = "An evaluator for mmalign."
requires-python = ">=3.11"
dependencies = ["mmalign"]

[project.entry-points."mmalign.evaluators"]
"{name}" = "{module}:{cls}"

[tool.setuptools]
py-modules = ["{module}"]
"""


def checkout() -> Path | None:
    """The folder of the checkout that mmalign is installed from; None where it came as a wheel."""
    import importlib.util

    spec = importlib.util.find_spec("mmalign.evaluators")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    homes = [Path(place).parent for place in places]
    return next((home for home in homes if (home / "pyproject.toml").is_file() and (home / "tests").is_dir()), None)


def new_evaluator(name: str, root: Path | None = None) -> list[Path]:
    """Write ``evaluators/NAME.py`` and ``tests/test_NAME.py`` into a checkout.

    Args:
        name: as configs shall have it; an @ becomes two underscores in the names of files.
        root: of the checkout; None: the one that mmalign is installed from.

    Returns:
        The files written.

    Raises:
        ValueError: a bad or taken name, a file that is there, or no checkout; with what to do.
    """
    _check_name(name)
    home = root or checkout()
    if home is None:
        raise ValueError(
            "mmalign is installed from a wheel, so that there is no evaluators/ folder to add to; write a package of "
            f"your own, which is found like any other: mmalign new evaluator {name} --package"
        )
    stem = name.replace("@", "__")
    words = {"name": name, "cls": _class_name(name)}
    return _write(
        {home / "evaluators" / f"{stem}.py": _EVALUATOR, home / "tests" / f"test_{stem}.py": _TEST}, words, home
    )


def new_package(name: str, folder: Path) -> list[Path]:
    """Write a package of its own with the evaluator, its entry point and its test.

    Args:
        folder: is made, and holds ``pyproject.toml``, the module and ``tests/``.

    Raises:
        ValueError: a bad or taken name, or a file that is there.
    """
    _check_name(name)
    stem = name.replace("@", "__")
    words = {
        "name": name,
        "cls": _class_name(name),
        "module": f"mmalign_{stem}",
        "dashed": re.sub(r"[@_]+", "-", name),
    }
    files = {
        folder / "pyproject.toml": _PROJECT,
        folder / f"{words['module']}.py": _EVALUATOR,
        folder / "tests" / f"test_{stem}.py": _TEST,
    }
    return _write(files, words, folder)


def _write(files: dict[Path, str], words: dict[str, str], home: Path) -> list[Path]:
    """Fill the texts in and write them, all or none."""
    there = [str(path.relative_to(home)) for path in files if path.exists()]
    if there:
        raise ValueError(f"{home} has {' and '.join(there)} already; take another name, or remove what is there")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            temporary.write_text(text.format(**words), encoding="utf-8")
    return list(files)


def _class_name(name: str) -> str:
    return "".join(part.capitalize() for part in re.split(r"[@_]+", name))


def _check_name(name: str) -> None:
    parts = name.split("@")
    if len(parts) > 2 or not all(re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", part) for part in parts):
        near = "@".join(map(_nearest, parts[:2])).strip("@")
        hint = f"; write {near}" if re.fullmatch(r"[a-z][a-z0-9_]*(@[a-z][a-z0-9_]*)?", near) else ""
        raise ValueError(
            f"{name!r} is no name for an evaluator: lower case, digits and single underscores, a letter first, and at "
            f"most one @{hint}"
        )
    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        raise ValueError(f"{name!r} is a word of Python's own; write {name}_score")
    if name in DIMENSIONS:
        raise ValueError(
            f"{name} is a dimension of VBench, and its name stands for the reference's own measure; "
            f"call one that measures it by other means {name}@mine"
        )
    found = find_evaluators()
    if name in found:
        raise ValueError(f"there is an evaluator {name} already ({found[name].origin}); take another name")


def _nearest(part: str) -> str:
    """The name that was most likely meant; what begins with a digit loses it, unless hardly anything is left."""
    whole = re.sub(r"[^a-z0-9]+", "_", _snake(part)).strip("_")
    rest = whole.lstrip("0123456789_")
    return rest if len(rest) > 1 or rest == whole else f"score_{whole}"


def _snake(text: str) -> str:
    """Camel case with underscores, in lower case."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text).lower()
