"""Evaluators by name: the files of ``evaluators/`` and the entry points of installed packages.

There is no list to edit. A file ``evaluators/sharpness.py`` that sets ``EVALUATOR = Sharpness`` is the evaluator
``sharpness``; ``evaluators/color__clip.py`` is ``color@clip``, which measures what a benchmark calls ``color`` by other
means, so that its scores are not compared with published ones by mistake. Another package offers one with an entry
point in the group ``mmalign.evaluators``. Nothing is imported before it is asked for, and a plug-in that cannot be
imported is named with its distribution and version and hinders no other.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmalign import config
from mmalign.evaluation import Backbones, Evaluator, SetEvaluator, check_class, resolve_device, resolve_dtype

__all__ = [
    "GROUP",
    "Found",
    "configured",
    "evaluator_class",
    "find_evaluators",
    "load_evaluator",
    "make_evaluator",
    "parse_params",
]

GROUP = "mmalign.evaluators"


@dataclass(frozen=True)
class Found:
    """An evaluator that can be named.

    Attributes:
        name: as configs write it.
        origin: ``built in``, or the distribution with its version, and where its class is.
        summary: first line of its docstring; empty where it could not be read.
        error: why it cannot be used, or None.
    """

    name: str
    origin: str
    summary: str
    error: str | None = None


@dataclass(frozen=True)
class _Source:
    """Where an evaluator comes from, before anything of it is imported."""

    name: str
    origin: str
    file: Path | None = None
    entry_point: importlib.metadata.EntryPoint | None = None


def find_evaluators(plugins: bool = True) -> dict[str, Found]:
    """Every evaluator by name, sorted.

    Summaries of the shipped files are read from their text; entry points have to be imported, which is tried for each.

    Args:
        plugins: False leaves the entry points of other packages alone.

    Raises:
        RuntimeError: the package was not installed, so that its evaluators cannot be found.
    """
    result = {}
    for name, sources in _sources(plugins).items():
        if len(sources) > 1:
            result[name] = Found(name, _origins(sources), "", _twice(name, sources))
        else:
            result[name] = _look(sources[0])
    return result


def evaluator_class(name: str, plugins: bool = True) -> type[Evaluator] | type[SetEvaluator]:
    """Import the evaluator of this name, and no other.

    Raises:
        ValueError: an unknown name (with the nearest one), a name used twice, or a module that cannot be imported.
        TypeError: its class breaks the contract.
    """
    sources = _sources(plugins)
    if name not in sources:
        raise ValueError(
            f"There is no evaluator '{name}'.{config.nearest(name, list(sources))} Known are: {', '.join(sources)}."
        )
    if len(sources[name]) > 1:
        raise ValueError(_twice(name, sources[name]))
    source = sources[name][0]
    try:
        value = _import(source)
    except Exception as error:
        raise ValueError(f"The evaluator '{name}' ({source.origin}) cannot be imported: {_reason(error)}.") from error
    return check_class(value, f"{name} ({source.origin})")


def load_evaluator(
    name: str,
    params: Mapping[str, Any] | None = None,
    device: str | torch.device = "auto",
    dtype: str = "float32",
    backbones: Backbones | None = None,
    plugins: bool = True,
) -> Evaluator | SetEvaluator:
    """An evaluator ready to score.

    Args:
        name: a file of ``evaluators/`` or an entry point.
        params: its parameters, checked against its ``Params``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or a torch device.
        dtype: ``float32`` or ``bfloat16``, for the backbones.
        backbones: hand the same object to several evaluators and they share their networks.
        plugins: whether entry points count.

    Raises:
        ValueError: unknown name or parameter (with the nearest one), missing or unfitting weights, unknown device.
        TypeError: the class breaks the contract.
    """
    cls, checked = configured(name, params or {}, plugins)
    return make_evaluator(cls, name, checked, device, dtype, backbones)


def configured(
    name: str, params: Mapping[str, Any], plugins: bool = True
) -> tuple[type[Evaluator] | type[SetEvaluator], config.Strict]:
    """The class that scores with these parameters (`Evaluator.variant`), and the parameters, checked.

    Raises:
        ValueError, TypeError: as `evaluator_class` and `parse_params`.
    """
    cls = evaluator_class(name, plugins)
    checked = parse_params(cls, name, params)
    return check_class(cls.variant(checked), name), checked


def parse_params(cls: type[Evaluator] | type[SetEvaluator], name: str, params: Mapping[str, Any]) -> config.Strict:
    """Parameters checked against the evaluator's schema.

    Raises:
        ConfigError: every mistake at once, with the nearest parameter's name.
    """
    return config.build(cls.Params, params, f"evaluator {name}")


def make_evaluator(
    cls: type[Evaluator] | type[SetEvaluator],
    name: str,
    params: config.Strict,
    device: str | torch.device = "auto",
    dtype: str = "float32",
    backbones: Backbones | None = None,
) -> Evaluator | SetEvaluator:
    """As `load_evaluator`, from a class and checked parameters."""
    where = resolve_device(device) if isinstance(device, str) else device
    precision = resolve_dtype(dtype)
    shared = backbones or Backbones()
    loaded = {key: shared.get(spec, where, precision) for key, spec in cls.backbone_specs(params).items()}
    evaluator = cls(params, loaded, where)
    evaluator.name, evaluator.summary = name, _first_line(cls.__doc__)
    return evaluator


def _sources(plugins: bool) -> dict[str, list[_Source]]:
    result: dict[str, list[_Source]] = {}
    spec = importlib.util.find_spec("mmalign.evaluators")
    if spec is None or spec.submodule_search_locations is None:
        raise RuntimeError("mmalign.evaluators is not installed; run `pip install -e .` in the project's folder.")
    for folder in spec.submodule_search_locations:
        for file in sorted(Path(folder).glob("*.py")):
            if not file.stem.startswith("_"):
                name = file.stem.replace("__", "@")
                result.setdefault(name, []).append(_Source(name, f"built in, {file.name}", file=file))
    for entry in importlib.metadata.entry_points(group=GROUP) if plugins else ():
        maker = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unnamed distribution"
        result.setdefault(entry.name, []).append(_Source(entry.name, f"{maker}, {entry.value}", entry_point=entry))
    return dict(sorted(result.items()))


def _look(source: _Source) -> Found:
    if source.file is not None:
        try:
            return Found(source.name, source.origin, _summary_from_text(source.file))
        except (SyntaxError, UnicodeDecodeError, ValueError) as error:
            return Found(source.name, source.origin, "", f"{source.origin}: {_reason(error)}")
    try:
        cls = check_class(_import(source), source.origin)
    except Exception as error:  # a plug-in may fail in any way, and the others still have to be listed
        return Found(source.name, source.origin, "", f"{source.origin}: {_reason(error)}")
    return Found(source.name, source.origin, _first_line(cls.__doc__))


def _import(source: _Source) -> object:
    if source.entry_point is not None:
        return source.entry_point.load()
    module = importlib.import_module(f"mmalign.evaluators.{source.name.replace('@', '__')}")
    if not hasattr(module, "EVALUATOR"):
        raise ValueError("the file sets no EVALUATOR; end it with `EVALUATOR = YourClass`")
    return module.EVALUATOR


def _summary_from_text(file: Path) -> str:
    """The class's summary without importing its file, which would import torch and more for a mere list."""
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    name = next(
        (
            node.value.id
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Name)
            and any(isinstance(target, ast.Name) and target.id == "EVALUATOR" for target in node.targets)
        ),
        None,
    )
    if name is None:
        raise ValueError("the file sets no EVALUATOR; end it with `EVALUATOR = YourClass`")
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _first_line(ast.get_docstring(node))
    return _first_line(ast.get_docstring(tree))


def _first_line(text: str | None) -> str:
    lines = inspect.cleandoc(text or "").splitlines()
    return lines[0] if lines else ""


def _origins(sources: list[_Source]) -> str:
    return " and ".join(source.origin for source in sources)


def _twice(name: str, sources: list[_Source]) -> str:
    return f"The evaluator name '{name}' is used twice: {_origins(sources)}. Uninstall one, or leave plug-ins out."


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
