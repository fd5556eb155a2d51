"""`mmalign prefer-answers`: preference rows of answers, built row by row and gone on with after a stop."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from mmalign.backbones.vlm_lora import adapter_files
from mmalign.builders.makers import Maker, maker
from mmalign.jobs_build import BuildConfig, SelfReward
from mmalign.locks import alone_in
from mmalign.mllm import loading
from mmalign.mllm.answers_writing import write_answers
from mmalign.mllm.formats import read_answers
from mmalign.mllm.rows import AnswerRow
from mmalign.paths import find
from mmalign.progress import track
from mmalign.tables import summary
from mmalign.weights import files_hash

PARTS, ROWS, FACTS = "said.jsonl", "rows.jsonl", "build.json"


def run(config: BuildConfig) -> Path:
    """Builds rows as the config says and returns the table.

    Raises:
        ValueError: rows or model cannot be used, the folder holds what another config has built, or nothing could be
            built of any row.
    """
    table = read_answers(
        find(config.rows), config.format, config.root, limit=config.limit, columns=config.columns or None,
        unknown_columns=config.unknown_columns,
    )  # fmt: skip
    given = table.rows
    config.output.mkdir(parents=True, exist_ok=True)
    with alone_in(config.output, "mmalign prefer-answers"):
        identity = _identity(config)
        known = _known(config.output / PARTS, identity)
        made = _Lazily(config, given)
        with (config.output / PARTS).open("a", encoding="utf-8") as file:
            for number, row in track(enumerate(given), f"building {config.build.kind}", len(given)):
                key = _key(number, row)
                if key not in known:
                    known[key] = made.maker.say(number, row)
                    file.write(json.dumps({"key": key, "identity": identity, "said": known[key]}) + "\n")
                    file.flush()
        said = [known[_key(number, row)] for number, row in enumerate(given)]
        usable = [place for place, each in enumerate(said) if "why" not in each]
        left_out = Counter(each["why"] for each in said if "why" in each)
        if not usable:
            raise ValueError(f"nothing could be built of {len(given)} rows: {_told(left_out)}")
        rows = made.maker.rows([given[place] for place in usable], [said[place] for place in usable])
        if not rows:
            raise ValueError(f"no pair is left of {len(given)} rows: {_told(left_out) or 'their answers are level'}")
        write_answers(rows, config.output / ROWS)
        facts = {
            "read": summary(len(given), table.dropped), "built": len(rows), "left_out": dict(left_out),
            "config": json.loads(config.model_dump_json()),
        }  # fmt: skip
        (config.output / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return config.output / ROWS


class _Lazily:
    """The maker, loaded when it is first asked: a finished run loads no model."""

    def __init__(self, config: BuildConfig, given: list[AnswerRow]):
        self._config, self._given = config, given
        self._made: Maker | None = None

    @property
    def maker(self) -> Maker:
        if self._made is None:
            self._made = maker(self._config, self._given)
        return self._made


def _told(left_out: Counter[str]) -> str:
    return ", ".join(f"{count} {why}" for why, count in left_out.most_common())


def _identity(config: BuildConfig) -> str:
    """What decides what is said of a row besides the row: method, model and seed."""
    told: list[Any] = [config.build.model_dump_json(exclude={"earlier"}), config.seed]
    if config.model is not None:
        plain = config.model.model_dump_json(exclude={"path", "lora", "device", "batch_size"})
        earlier = config.build.earlier if isinstance(config.build, SelfReward) else None
        adapters = [files_hash(adapter_files(folder)) if folder else None for folder in (config.model.lora, earlier)]
        told += [plain, loading.identity(find(config.model.path)), adapters]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _key(number: int, row: AnswerRow) -> str:
    media = [image.hash() for image in (*row.images, *row.videos)]
    return hashlib.sha256(repr((number, row.prompt, row.chosen, row.rejected, media)).encode()).hexdigest()


def _known(path: Path, identity: str) -> dict[str, dict[str, Any]]:
    """What was said before a stop; a last line that was cut off is forgotten.

    Raises:
        ValueError: it was said by another model or method.
    """
    found: dict[str, dict[str, Any]] = {}
    if not path.is_file():
        return found
    lines = path.read_text(encoding="utf-8").splitlines()
    whole = []
    for place, line in enumerate(lines):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            if place != len(lines) - 1:
                raise ValueError(f"{path} line {place + 1} is damaged; delete the folder and build again") from None
            continue
        if entry["identity"] != identity:
            raise ValueError(
                f"{path.parent} was built by another model, method or seed; give another output, or delete the folder"
            )
        whole.append(line)
        found[entry["key"]] = entry["said"]
    if len(whole) != len(lines):
        path.write_text("".join(line + "\n" for line in whole), encoding="utf-8")
    return found
