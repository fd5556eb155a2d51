"""Check a diffusers checkpoint folder before anything is loaded from it.

The loaders of diffusers and transformers fill a missing tensor with random numbers, and drop an unexpected one, with no
more than a warning in the log; a tokenizer without its vocabulary loads as one with two tokens. A run that starts so
is lost without anybody noticing. ``check_folder`` reads the headers of the safetensors files (no tensor data for
diffusers components) and refuses such a folder with every fault in one message.
"""

import importlib
import inspect
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mmalign import paths
from mmalign.progress import quiet_transformers

_SHOWN = 3
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack")
_WEIGHT_NAMES = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
# The VAE of SD 1.x on the hub has the names that attention had in diffusers before version 0.12.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION_KEY = re.compile(r"(?<=\.)(query|key|value|proj_attn)(?=\.(?:weight|bias)$)")

Shapes = dict[str, tuple[int, ...]]


def check_folder(path: str | Path, *, variant: str | None = None, skip: Collection[str] = ()) -> None:
    """Check that a folder is a complete diffusers pipeline whose tensors fit its configuration.

    Args:
        path: folder with a ``model_index.json``, as ``save_pretrained`` writes it.
        variant: as in ``from_pretrained``: with ``"fp16"``, ``model.fp16.safetensors`` is meant where it exists.
        skip: components that will not be loaded (for example ``safety_checker``) and are not looked at.

    Raises:
        ValueError: the folder is missing, is no pipeline, holds pickled weights where safetensors are expected, or a
            component has missing, unexpected or mis-shaped tensors. The message names them and the fix.
    """
    folder = Path(path)
    components = {name: entry for name, entry in index_parts(folder).items() if entry[0] and name not in skip}
    faults = [
        f"  {name} ({class_name}): {fault}"
        for name, (library, class_name) in components.items()
        for fault in component_faults(folder / name, library, class_name, variant)
    ]
    if faults:
        raise ValueError(f"the checkpoint folder '{folder}' cannot be used:\n" + "\n".join(faults))


def variant_in(folder: Path, variant: str | None) -> str | None:
    """`variant` where a pipeline, or a part of one, has weights of it; else None, as `from_pretrained` wants."""
    whole = (folder / "model_index.json").is_file()
    parts = [folder / name for name in index_parts(folder)] if whole else [folder]
    marks = (f"*.{variant}.safetensors", f"*.{variant}-*.safetensors")
    return variant if variant and any(any(part.glob(mark)) for part in parts for mark in marks) else None


def index_parts(folder: Path) -> dict[str, tuple[str, str]]:
    """Library and class name of each part in a pipeline's index; empty ones for a part that it comes without."""
    entries = {name: entry for name, entry in _read_index(folder).items() if not name.startswith("_")}
    pairs = {name: entry for name, entry in entries.items() if isinstance(entry, list) and len(entry) == 2}
    return {name: (library or "", kind or "") for name, (library, kind) in pairs.items()}


def part_class(folder: Path, name: str) -> tuple[str, str]:
    """Library and class name of a pipeline's part, from its index or, where that has none, from the pipeline's own.

    Raises:
        ValueError: the pipeline takes several classes for the part, so that the index has to say which.
    """
    library, class_name = index_parts(folder)[name]
    if library:
        return library, class_name
    import diffusers

    pipeline = getattr(diffusers, _read_index(folder)["_class_name"])
    kind = inspect.signature(pipeline.__init__).parameters[name].annotation
    if not isinstance(kind, type) or not hasattr(kind, "from_pretrained") or kind.__name__.endswith("PreTrainedModel"):
        raise ValueError(f"{folder / 'model_index.json'} does not say of which class {name} is; write it there")
    return kind.__module__.split(".")[0], kind.__name__


def _read_index(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise ValueError(f"the model folder '{folder}' does not exist. {paths.advice_for_missing_model(folder)}")
    if folder.is_file():
        raise ValueError(
            f"'{folder}' is a file, and a model is a folder with a model_index.json. Convert a single-file checkpoint "
            "once with diffusers: StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER), or the same "
            "with StableDiffusionXLPipeline."
        )
    file = folder / "model_index.json"
    if not file.is_file():
        raise ValueError(f"the folder '{folder}' has no model_index.json. {_advice_for_no_index(folder)}")
    index = _read_json(file)
    if "_class_name" not in index:
        raise ValueError(f"'{file}' names no pipeline class (_class_name); copy the file again from its source.")
    return index


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{file}' is not valid JSON ({error}); copy the file again from its source.") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{file}' does not hold a JSON object; copy the file again from its source.")
    return content


def _advice_for_no_index(folder: Path) -> str:
    if (folder.parent / "model_index.json").is_file():
        return f"It is one component of a pipeline; give the pipeline: '{folder.parent}'."
    inside = sorted(file.parent for file in folder.glob("*/model_index.json"))
    if inside:
        return f"Did you mean '{inside[0]}'?"
    if (folder / "pytorch_lora_weights.safetensors").is_file():
        return "It holds a LoRA, which is loaded on top of a model; give the folder of the base model."
    return "Give a folder that a diffusers pipeline's save_pretrained has written."


def component_faults(folder: Path, library: str, class_name: str, variant: str | None) -> list[str]:
    """List what is wrong with one component, each fault with its fix."""
    from torch import nn

    if not folder.is_dir():
        return [f"its folder '{folder.name}' is missing; copy it again from the model's source."]
    cls = _resolve(library, class_name)
    if cls is None:
        return [f"library '{library}' has no class of this name; install a version that has it."]
    is_model = issubclass(cls, nn.Module)
    config = folder / (getattr(cls, "config_name", None) or "config.json")
    # Schedulers and models name their configuration file; tokenizers and image processors have other files.
    if (is_model or hasattr(cls, "config_name")) and not config.is_file():
        return [f"'{folder.name}/{config.name}' is missing; copy it again from the model's source."]
    if not is_model:
        return _tokenizer_faults(folder, cls)
    if "quantization_config" in _read_json(config):
        return ["its weights are quantised and cannot be trained; use the checkpoint in fp32, fp16 or bf16."]
    is_diffusers = hasattr(cls, "load_config")
    files = _weight_files(folder, _WEIGHT_NAMES["diffusers" if is_diffusers else "transformers"], variant)
    if not files:
        return [_no_safetensors(folder, cls, variant)]
    unreadable = [fault for file in files for fault in _unreadable(file)]
    if unreadable:
        return unreadable
    return _diffusers_faults(folder, cls, files) if is_diffusers else _transformers_faults(folder, cls, files, variant)


def _resolve(library: str, class_name: str) -> Any:
    """Return the class that a ``model_index.json`` entry names, or None; custom code is never imported."""
    if library in ("diffusers", "transformers"):
        return getattr(importlib.import_module(library), class_name, None)
    # Entries such as ["stable_diffusion", "StableDiffusionSafetyChecker"] name a pipeline package of diffusers.
    package = getattr(importlib.import_module("diffusers.pipelines"), library, None)
    return None if package is None else getattr(package, class_name, None)


def _tokenizer_faults(folder: Path, cls: Any) -> list[str]:
    names = dict(getattr(cls, "vocab_files_names", None) or {})
    whole = names.pop("tokenizer_file", None)
    absent = [name for name in names.values() or [whole] if name and not (folder / name).is_file()]
    # A vocabulary of sentencepiece may be there in place of the one file that the class names (Gemma's).
    instead = [*folder.glob("*.model")] if not names else []
    if not absent or instead or (whole is not None and (folder / whole).is_file()):
        return []
    return [f"its vocabulary is missing ({', '.join(absent)}); copy it again from the model's source."]


def _weight_files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """Return the safetensors files that ``from_pretrained`` would read: those of the variant where there are any."""
    for mark in [f".{variant}", ""] if variant else [""]:
        index = folder / f"{stem}.safetensors.index{mark}.json"
        single = folder / f"{stem}{mark}.safetensors"
        if index.is_file() and single.is_file():
            raise ValueError(f"'{folder}' has both {single.name} and {index.name}; remove the one that is not meant.")
        if index.is_file():
            return [folder / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
        if single.is_file():
            return [single]
    return []


def _no_safetensors(folder: Path, cls: Any, variant: str | None) -> str:
    others = sorted(folder.glob("*.safetensors"))
    pickles = sorted(file for file in folder.iterdir() if file.suffix in _PICKLES)
    if others:
        mark = re.search(r"\.(\w+)(-\d+-of-\d+)?\.safetensors$", others[0].name)
        hint = f"set model.variant to {mark[1]}" if mark and mark[1] != variant else "rename the file"
        return f"it has {others[0].name}, which is not the name that is loaded; {hint}."
    if pickles:
        command = (
            f"from {cls.__module__.split('.')[0]} import {cls.__name__} as M; p = '{folder}'; "
            "M.from_pretrained(p, use_safetensors=False).save_pretrained(p)"
        )
        return (
            f"{pickles[0].name} is a pickle, which can run code when it is loaded, and is refused. Convert it once, if "
            f'you trust its source: python -c "{command}"'
        )
    return f"it has no weights in '{folder}'; copy them again from the model's source."


def _unreadable(file: Path) -> list[str]:
    if not file.is_file():
        return [f"the shard {file.name} that its index names is missing; copy it again from the model's source."]
    try:
        _shapes(file)
    except (SafetensorError, OSError) as error:
        return [f"{file.name} cannot be read as safetensors ({error}); copy it again from the model's source."]
    return []


def _shapes(file: Path) -> Shapes:
    with safe_open(str(file), framework="pt") as tensors:
        return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118


def _diffusers_faults(folder: Path, cls: Any, files: list[Path]) -> list[str]:
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = cls.from_config(cls.load_config(str(folder)))
    expected: Shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found: Shapes = {}
    for file in files:
        for key, shape in _shapes(file).items():
            modern = _OLD_ATTENTION_KEY.sub(lambda match: _OLD_ATTENTION[match[1]], key)
            found[modern if key not in expected and modern in expected else key] = shape
    ignored = cls._keys_to_ignore_on_load_unexpected or []
    extra = [key for key in found if key not in expected and not any(re.search(rule, key) for rule in ignored)]
    wrong = [(key, found[key], expected[key]) for key in expected if key in found and found[key] != expected[key]]
    return _describe([key for key in expected if key not in found], extra, wrong)


def _transformers_faults(folder: Path, cls: Any, files: list[Path], variant: str | None) -> list[str]:
    # transformers renames keys while it loads (CLIPTextModel lost its "text_model." prefix in version 5), so its own
    # loader does the comparison, on the meta device: nothing is allocated, and the report is what a real load meets.
    with quiet_transformers():
        _, report = cls.from_pretrained(
            str(folder),
            variant=variant if variant and f".{variant}" in files[0].name else None,
            device_map={"": "meta"},
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    wrong = [(key, tuple(found), tuple(expected)) for key, found, expected in report["mismatched_keys"]]
    # Checkpoints written before transformers 4.31 store this buffer, a plain 0..n-1 that the model makes itself.
    extra = [key for key in report["unexpected_keys"] if not key.endswith("position_ids")]
    return _describe(list(report["missing_keys"]), extra, wrong)


def _describe(
    missing: list[str], extra: list[str], wrong: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
) -> list[str]:
    shapes = [f"{key} is {list(found)} and must be {list(expected)}" for key, found, expected in sorted(wrong)]
    faults = [
        f"{len(names)} {kind} tensor{'s' if len(names) > 1 else ''}: {', '.join(names[:_SHOWN])}"
        + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        for kind, names in (("missing", sorted(missing)), ("unexpected", sorted(extra)), ("mis-shaped", shapes))
        if names
    ]
    if faults:
        faults[-1] += ". The weights and config.json do not belong together; copy both from the model's source."
    return faults
