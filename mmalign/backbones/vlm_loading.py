"""Folders of image-text models: which files decide an answer, and loading that leaves nothing to chance.

A folder is what ``save_pretrained`` writes for a model and its processor::

    config.json, generation_config.json            the architecture; when an answer ends
    model.safetensors, or shards and their index   weights (pytorch_model*.bin is read with weights_only)
    preprocessor_config.json, processor_config.json, tokenizer files, chat_template.jinja

transformers warns of missing weights and fills them with random ones; here that is an error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign import paths
from mmalign.progress import quiet_transformers
from mmalign.weights import check_scorer, read_state_dict
from mmalign.weights_read import BAD_CONFIG, first_line

__all__ = [
    "check_report",
    "load_model",
    "load_parts",
    "load_text_parts",
    "model_folder",
    "most_tokens",
    "read_tensors",
    "unreadable",
    "vlm_files",
]

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "chat_template.*", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "spiece.model",
)  # fmt: skip


def model_folder(folder: str | Path, parameter: str = "model", weights: bool = True) -> Path:
    """The folder, if it holds a transformers model; with ``weights`` False its weights may lie elsewhere.

    Raises:
        ValueError: it does not exist, or lacks a config or weights; nothing is ever downloaded. Or it is a scorer that
            was fitted here, whose head answers no questions; the right evaluator is named.
    """
    path = paths.find(Path(folder).expanduser())
    if not path.is_dir():
        if path.exists():
            raise ValueError(f"{parameter}: {path} is a file; give the folder that has the model's config.json.")
        raise ValueError(f"{parameter}: the model folder {path} does not exist. {paths.advice_for_missing_model(path)}")
    config = path / "config.json"
    if not config.is_file():
        raise ValueError(f"{parameter}: {path} has no config.json, so it is no transformers model folder.")
    try:
        described = json.loads(config.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{parameter}: {config} is not JSON ({error}); copy it again.") from None
    if not isinstance(described, dict) or "model_type" not in described:
        raise ValueError(f"{parameter}: {config} names no model_type, so transformers cannot tell what it is.")
    if weights:
        check_scorer(path)
    if weights and not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        raise ValueError(f"{parameter}: {path} has a config.json and no weights (*.safetensors); fetch them too.")
    return path


def vlm_files(folder: str | Path, parameter: str = "model", weights: bool = True) -> list[Path]:
    """Every file of the folder whose content decides an answer, sorted by name; ValueError as `model_folder`."""
    path = model_folder(folder, parameter, weights)
    patterns = (*FILES, *WEIGHTS) if weights else FILES
    return sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint file, or of the safetensors of a folder, by name.

    Raises:
        ValueError: as `mmalign.weights.read_state_dict`; or a folder without safetensors, or with a name twice.
    """
    path = Path(path)
    if not path.is_dir():
        return read_state_dict(path)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{path}: holds no *.safetensors.")
    state: dict[str, Tensor] = {}
    for file in files:
        more = read_state_dict(file)
        if twice := sorted(state.keys() & more.keys()):
            raise ValueError(f"{file}: {twice[0]} is in another file of the folder too; keep one set of weights.")
        state |= more
    return state


def load_parts(
    folder: str | Path, dtype: torch.dtype, state: dict[str, Tensor] | None = None, origin: str = "",
    any_logits: bool = False, **more: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """The model on the CPU in this precision, and its processor.

    Args:
        folder: of model and processor.
        state, origin: see `mmalign.backbones.vlm.load_vlm`.
        any_logits: also families that scale or cap their logits after the head.
        more: for ``from_pretrained``, such as ``attn_implementation``.

    Raises:
        ValueError: no such folder, a family that is not decoder-only or not known, code in the folder, a config or a
            processor that cannot be read, or tensors that are missing, unexpected or mis-shaped (all named).
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoProcessor

    path = model_folder(folder, weights=state is None)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(path, **local)
        _check_family(config, path, any_logits)
        processor = AutoProcessor.from_pretrained(path, **local)
        try:
            # The class itself, since the automatic one wants a folder where there are tensors.
            kind: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        except KeyError:
            raise ValueError(f"transformers has no image-text model of the type {config.model_type}.") from None
        with quiet_transformers():
            model, report = kind.from_pretrained(
                path if state is None else None,
                config=config,
                state_dict=state,
                dtype=dtype,
                ignore_mismatched_sizes=True,  # so that all of them are told at once, by check_report
                output_loading_info=True,
                local_files_only=True,
                **more,
            )
    except BAD_CONFIG as error:
        raise unreadable(str(path), error) from error
    check_report(report, origin or str(path))
    check_processor(processor, path)
    return model, processor


def check_processor(processor: Any, path: Path) -> None:
    """ValueError for a processor that puts no images into texts; one without a padding token gets its end token."""
    if getattr(processor, "image_token", None) is None or getattr(processor, "tokenizer", None) is None:
        raise ValueError(f"{path}: its processor ({type(processor).__name__}) has no image placeholder for texts.")
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token


def load_model(kind: Any, folder: str | Path, dtype: torch.dtype, parameter: str = "model") -> Any:
    """A model of one of transformers' automatic classes, on the CPU in this precision.

    Args:
        kind: the class, such as ``AutoModelForObjectDetection``.

    Raises:
        ValueError: no such folder, one that holds another kind of model or code, or tensors that do not fit.
    """
    path = model_folder(folder, parameter)
    try:
        with quiet_transformers():
            model, report = kind.from_pretrained(
                path,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that all of them are told at once, by check_report
                local_files_only=True,
                trust_remote_code=False,
            )
    except BAD_CONFIG as error:
        raise unreadable(f"{parameter}: {path}", error) from error
    check_report(report, str(path))
    return model


def load_text_parts(kind: Any, folder: str | Path, dtype: torch.dtype, parameter: str = "model") -> tuple[Any, Any]:
    """A model as by `load_model`, which says what is refused, and its tokenizer.

    A tokenizer without a padding token gets its end token.
    """
    from transformers import AutoTokenizer

    model = load_model(kind, folder, dtype, parameter)
    path = model_folder(folder, parameter)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except BAD_CONFIG as error:
        raise unreadable(f"{parameter}: {path}", error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def most_tokens(config: Any) -> int:
    """Tokens that a model reads; a number beyond all texts where its config names none."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31)


def unreadable(where: str, error: BaseException) -> ValueError:
    """What transformers could not read of a folder, in its own words; those that are a bare key or name with their
    kind."""
    words = first_line(error) if isinstance(error, LookupError | AssertionError) else str(error).strip()
    return ValueError(f"{where}: {words or type(error).__name__}")


def _check_family(config: Any, path: Path, any_logits: bool) -> None:
    text = config.get_text_config()
    if config.is_encoder_decoder or text.is_encoder_decoder:
        raise ValueError(f"{config.model_type} has an encoder and a decoder; only decoder-only models are asked here.")
    for name in () if any_logits else ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(text, name, None) not in (None, 1, 1.0):
            raise ValueError(f"{config.model_type} changes its logits after the head ({name}); that is not built here.")


def check_report(report: dict[str, Any], origin: str) -> None:
    """Refuse what transformers only warns of: ValueError naming tensors that do not fit."""
    # Buffers that libraries of 2023 stored and that every model makes itself.
    extra = [key for key in report["unexpected_keys"] if not key.endswith(("position_ids", "rotary_emb.inv_freq"))]
    wrong = [f"{key} is {list(found)} and has to be {list(due)}" for key, found, due in report["mismatched_keys"]]
    problems = []
    for names, what in (
        (sorted(report["missing_keys"]), "missing"),
        (sorted(extra), "unexpected"),
        (sorted(wrong), "of the wrong shape"),
    ):
        if names:
            rest = f" and {len(names) - 6} more" if len(names) > 6 else ""
            problems.append(f"{len(names)} {what}: {', '.join(names[:6])}{rest}")
    if problems:
        raise ValueError(f"{origin}: the tensors do not fit the model. {'; '.join(problems)}.")
