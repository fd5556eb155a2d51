"""The import directions of the design, read from the source; and that the command line starts light."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
import time
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mmalign"

# A module may import from its own layer and from those below it, never from one above.
LAYERS: list[set[str]] = [
    {"cli", "commands", "__main__"},
    {
        "train",
        "sample",
        "build_answers",
        "respond",
        "score",
        "quickstart",
        "quickstart_answers",
        "skeletons",
        "report",
        "compare",
        "compare_figures",
        "doctor",
        "rounds",
        "testing",
        "runs",
        "checkpoints",
        "compiling",
        "distributed",
        "zero",
        "guidance",
    }
    | {"memory", "memory_autoencoder", "memory_estimate", "memory_show"}
    | {"optimise_prompt", "prefer", "prefer_pool", "prefer_summary", "routing", "audit", "audit_figures", "audit_table"}
    | {"reward_bench", "reward_scores", "reward_show"}
    | {"static_filter"}
    | {
        "score_decode",
        "score_figures",
        "score_plan",
        "score_preview",
        "score_processes",
        "score_ray",
        "score_sets",
        "score_store",
        "score_summary",
    }
    | {
        "score_media",
        "score_params",
        "score_shares",
        "score_answers",
        "score_vbench",
        "score_vbench_results",
        "score_worker",
        "report_media",
        "report_plots",
        "report_run",
        "report_sheet",
        "report_vbench",
    },
    {"tasks"},
    {
        "models",
        "reward_models",
        "export",  # the file formats of the model families, which a task writes at its end
        "losses",
        "tables",
        "media_table",
        "media_folder",
        "formats",
        "formats_video",
        "preference_row",
        "records",
        "evaluation",
        "pixel_scores",
        "discovery",
        "results",
        "stats",
        "figures",
        "labelling",
        "agreement",
    }
    | {
        "backbones",
        "builders",
        "protocols",
        "inversion",
        "judgements",
        "kohya",
        "mllm",
        "shapes",
        "vbench",
        "hallucination",
    },
    {
        "noise",
        "devices",
        "media",
        "decoding",
        "source",
        "stills",
        "video",
        "video_container",
        "video_writer",
        "provenance",
        "frame_plans",
        "cache",
        "config",
        "explain",
        "yaml12",
        "jobs",
        "methods",
        "methods_mllm",
        "methods_mllm_terms",
        "methods_reward",
        "objective",
        "turns",
        "order",
        "jobs_align",
        "jobs_answers",
        "jobs_bench",
        "jobs_build",
        "jobs_guidance",
        "jobs_inputs",
        "jobs_mllm",
        "jobs_prefer",
        "jobs_prompts",
        "jobs_respond",
        "jobs_reward",
        "jobs_vbench",
        "errors",
        "locks",
        "paths",
        "progress",
        "weights",
        "known_weights",
        "weights_convert",
        "weights_fetch",
        "weights_read",
        "weights_verify",
    },
]
HEAVY = {
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "open_clip",
    "peft",
    "accelerate",
    "pyarrow",
    "matplotlib",
}
# What these may import besides the standard library and the package itself.
LIGHT = {
    "config": {"pydantic", "yaml"},
    "jobs": {"pydantic"},
    "jobs_answers": {"pydantic"},
    "jobs_bench": {"pydantic"},
    "jobs_build": {"pydantic"},
    "jobs_guidance": {"pydantic"},
    "jobs_mllm": {"pydantic"},
    "methods_mllm": {"pydantic"},
    "methods_mllm_terms": {"pydantic"},
    "jobs_inputs": {"pydantic"},
    "jobs_prefer": {"pydantic"},
    "jobs_prompts": {"pydantic"},
    "jobs_respond": {"pydantic"},
    "jobs_vbench": {"pydantic"},
    "explain": {"pydantic"},
    "yaml12": {"yaml"},
    "paths": set(),
    "losses": {"torch"},
    "noise": {"torch"},
    "stats": {"numpy"},
    "labelling": {"numpy"},
    "guidance.neighbourhood": {"numpy"},
    "agreement": {"numpy"},
    "protocols.pairs": {"numpy"},
    "protocols.tables": {"numpy"},
    "protocols.ties": {"numpy"},
    "protocols.correlations": {"numpy"},
}
EVALUATORS_MAY = {"mmalign.evaluation", "mmalign.media", "mmalign.config", "mmalign.weights"}


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, inner: bool = True) -> set[str]:
    """Full names of what a file imports, but for typing; ``inner`` includes the imports inside functions."""
    module = module_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not inner:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])]
                )
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                is_module = base.split(".")[0] in {"mmalign", "evaluators"} and _is_module(whole)
                found.add(whole if is_module else base)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def _is_module(name: str) -> bool:
    path = ROOT / Path(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def part(name: str) -> str:
    """The module or folder directly under the package that a full name belongs to; empty for the package itself."""
    return name.split(".")[1] if "." in name else ""


def layer(name: str) -> int | None:
    """The layer of a module; None for the package itself."""
    return next((index for index, names in enumerate(LAYERS) if part(name) in names), None)


def first_parts(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


PARTS = sorted({part(module_of(path)) for path in sources(PACKAGE)} - {""})


@pytest.mark.parametrize("name", PARTS)
def test_every_part_has_one_layer(name: str) -> None:
    assert sum(name in names for names in LAYERS) == 1, (
        f"put mmalign.{name} into the layer of LAYERS that it belongs to"
    )


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda path: module_of(path))
def test_imports_point_down(path: Path) -> None:
    own = layer(module_of(path))
    for name in sorted(imports(path)):
        other = layer(name) if name.split(".")[0] == "mmalign" else None
        assert own is None or other is None or other >= own, (
            f"{module_of(path)} may not import {name}, a layer above it"
        )


def test_the_page_on_architecture_shows_these_layers() -> None:
    """Its table has every part once, where the list above has it; ``score_*`` stands for all that begin so."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = page.split("### Imports point down")[1].split("\n## ")[0]
    shown = [row.split("`")[1].split() for row in rows.splitlines() if re.match(r"\| \w+ \| `", row)]
    named = [{part for part in PARTS if any(fnmatch(part, each) for each in names)} for names in shown]
    assert named == [names - {"__main__"} for names in LAYERS]
    idle = [each for names in shown for each in names if not any(fnmatch(part, each) for part in PARTS)]
    assert not idle, f"the page names {idle}, which are gone"


def test_no_circles() -> None:
    """Also within a layer, no two parts import each other, not even by way of others or inside a function."""
    graph: dict[str, set[str]] = {name: set() for name in PARTS}
    for path in sources(PACKAGE):
        own = part(module_of(path))
        if own:
            graph[own] |= {part(name) for name in imports(path) if name.startswith("mmalign.")} & (set(PARTS) - {own})
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail("these import each other in a circle: " + " <- ".join(error.args[1]))


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda path: module_of(path))
def test_nobody_imports_an_evaluator_by_name(path: Path) -> None:
    named = {name for name in imports(path) if name.startswith(("mmalign.evaluators.", "evaluators"))}
    assert not named, f"{module_of(path)} imports {named}; evaluators are found, not imported"


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_light_modules_stay_light(name: str) -> None:
    single = PACKAGE.joinpath(*name.split(".")).with_suffix(".py")
    files = [single] if single.is_file() else sources(PACKAGE / name)
    assert files, f"mmalign.{name} is gone; take it off the list"
    for path in files:
        extra = first_parts(imports(path)) - LIGHT[name] - {"mmalign"}
        assert not extra, f"{module_of(path)} imports {extra}"
        if "torch" in LIGHT[name]:
            others = {i for i in imports(path) if i.startswith("mmalign.") and not i.startswith(f"mmalign.{name}")}
            assert not others, f"{module_of(path)} imports {others}; {name} stands on torch alone"


@pytest.mark.parametrize("path", sources(ROOT / "evaluators"), ids=lambda path: path.stem)
def test_evaluators_import_the_contract_alone(path: Path) -> None:
    """The contract, the networks that scorers share, and for some the world that they tell the truth about."""
    allowed = EVALUATORS_MAY | {module_of(file) for file in sources(PACKAGE / "backbones")}
    if path.stem.startswith("shapes_"):
        allowed |= {module_of(file) for file in sources(PACKAGE / "shapes")}
    for rules in ("vbench", "hallucination"):  # rules and names of benchmarks, no networks
        allowed |= {module_of(file) for file in sources(PACKAGE / rules)}
    ours = {name for name in imports(path) if name.split(".")[0] == "mmalign"}
    assert ours <= allowed, f"{path.name} imports {sorted(ours - allowed)}"


@pytest.mark.parametrize("path", [*sources(PACKAGE), *sources(ROOT / "evaluators")], ids=lambda path: module_of(path))
def test_modules_have_a_docstring_and_a_telling_name(path: Path) -> None:
    assert path.stem not in {"utils", "util", "helpers", "misc", "common"}
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{module_of(path)} has no docstring"


def test_every_package_is_installed() -> None:
    """A wheel holds the packages that pyproject.toml names, and no others: a new folder has to be added there."""
    named = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {module_of(path) for path in sources(PACKAGE) if path.name == "__init__.py"}
    assert there <= named, f"add to [tool.setuptools] packages: {sorted(there - named)}"
    loose = {module_of(path).rpartition(".")[0] for path in sources(PACKAGE)} - {""} - there
    assert not loose, f"folders of modules without __init__.py: {sorted(loose)}"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["prefer", "--help"], ["config", "--help"], ["list", "--help"]]
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom mmalign.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('LOADED', *sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    print(f"mmalign {' '.join(arguments)}: {time.perf_counter() - start:.2f} s")
    assert "Usage" in done.stdout
    loaded = set(done.stderr.split("LOADED", 1)[1].split())
    assert "mmalign" in loaded and not loaded & HEAVY, loaded & HEAVY


def test_schemas_load_nothing_heavy() -> None:
    code = "import sys, mmalign.jobs, mmalign.commands.inspect\nprint(*{n.split('.')[0] for n in sys.modules})"
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert not set(done.stdout.split()) & HEAVY
