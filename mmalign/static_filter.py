"""`mmalign vbench static-filter`: of each prompt's clips the first five in which nothing moves.

These are what VBench measures temporal flickering on. Clips are measured by the evaluator ``static_filter`` through
`mmalign.score`, in rounds, so that a run that was stopped goes on where it was, and clips behind the fifth static one
are left alone. The output folder holds::

    filtered_videos/                {prompt}-0.mp4 to -4.mp4, copies
    table.jsonl                     the same as a media table, each row for temporal_flickering
    filtered_static_video.json      per prompt how many were found, and their paths, as VBench writes it
    scores/                         results of what was measured
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmalign.jobs import ScoreConfig
from mmalign.locks import alone_in
from mmalign.media import VIDEO_SUFFIXES
from mmalign.results import is_ok, read_results
from mmalign.score import run as score
from mmalign.source import content_hash, whole_file
from mmalign.tables import MediaRow, write_media_table
from mmalign.vbench.motion import Rules, file_order, first_static

__all__ = ["CLIPS", "DIMENSION", "Found", "Settings", "clips_of", "run", "suite_prompts"]

DIMENSION = "temporal_flickering"
CLIPS = 5
"""Clips of a prompt that VBench scores."""


@dataclass(frozen=True)
class Settings:
    """What to filter, and how.

    Attributes:
        folder: clips named ``{prompt}-{number}.mp4``, directly in it.
        suite: VBench's JSON; the prompts that list temporal_flickering count.
        output: see above; may be given again to go on.
        clips: how many of each prompt are wanted.
        params: of the evaluator ``static_filter``.
        scoring: settings of `mmalign.jobs.ScoreConfig` for the scoring, such as ``device``.
    """

    folder: Path
    suite: Path
    output: Path
    clips: int = CLIPS
    params: Mapping[str, object] = field(default_factory=dict)
    scoring: Mapping[str, object] = field(default_factory=dict)

    @property
    def rules(self) -> Rules:
        return "strict" if self.params.get("rules") == "strict" else "compat"


@dataclass(frozen=True)
class Found:
    """What came of it.

    Attributes:
        static: per prompt its static clips, in order, at most as many as wanted.
        clips: per prompt how many clips there were.
        wanted: of each prompt.
        failed: clips that could not be measured, and why. They count as moving.
        measured: how many clips were.
        other: files of the folder that belong to no prompt of the suite.
    """

    static: dict[str, list[Path]]
    clips: dict[str, int]
    wanted: int
    failed: dict[str, str]
    measured: int
    other: int

    def account(self) -> list[str]:
        """Lines for a person: coverage, and each prompt that has too few."""
        kept, whole = sum(map(len, self.static.values())), self.wanted * len(self.static)
        full = sum(len(each) == self.wanted for each in self.static.values())
        lines = [
            f"{kept} of {whole} clips ({100 * kept // whole} %): {full} of {len(self.static)} prompts have "
            f"{self.wanted}; {self.measured} clips were measured, {self.other} files belong to no prompt"
        ]
        for prompt, found in self.static.items():
            if len(found) < self.wanted:
                lines.append(f"  {len(found)} of {self.wanted}, of {self.clips[prompt]} clips: {prompt}")
        lines += [f"  not measured, counted as moving: {name}: {reason}" for name, reason in self.failed.items()]
        return lines


def suite_prompts(suite: Path) -> list[str]:
    """The suite's prompts for temporal flickering, each once.

    Raises:
        ValueError: no JSON list of rows with ``prompt_en`` and ``dimension``, naming the row; or none for flickering.
    """
    try:
        rows = json.loads(suite.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{suite}: is not JSON ({error}); give VBench_full_info.json.") from None
    if not isinstance(rows, list):
        raise ValueError(f"{suite}: holds {type(rows).__name__}, not a list of prompts; give VBench_full_info.json.")
    prompts: dict[str, None] = {}
    for number, row in enumerate(rows):
        named = isinstance(row, dict) and isinstance(row.get("prompt_en"), str)
        if not named or not isinstance(row.get("dimension"), list):
            raise ValueError(f"{suite} row {number}: has no text prompt_en and list dimension; give a VBench suite.")
        if DIMENSION in row["dimension"]:
            prompts[row["prompt_en"]] = None
    if not prompts:
        raise ValueError(f"{suite}: no prompt is for {DIMENSION}, so there is nothing to filter.")
    return list(prompts)


def clips_of(folder: Path, prompts: Sequence[str], rules: Rules) -> tuple[dict[str, list[str]], int]:
    """File names of each prompt's clips, in the order in which they are tried; and how many files are none of them."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; name the one that holds the clips.")
    found: dict[str, list[str]] = {prompt: [] for prompt in prompts}
    names = [file.name for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]
    other = 0
    for name in file_order(names, rules):
        path = Path(name)
        prompt = re.sub(r"-\d+$", "", path.stem)
        if prompt in found and path.suffix.lower() in VIDEO_SUFFIXES:
            found[prompt].append(name)
        else:
            other += 1
    if not any(found.values()):
        raise ValueError(
            f"{folder}: none of its {len(names)} files is a clip called after a prompt of the suite, such as "
            f"'{prompts[0]}-0.mp4'."
        )
    return found, other


def run(settings: Settings) -> Found:
    """Measure, choose, copy. The same call goes on after a stop, and computes nothing twice.

    Raises:
        ValueError: suite or folder are not what they have to be, weights are missing, another run works in the output,
            or a file in ``filtered_videos`` would be replaced by another clip.
        OSError: the disk.
    """
    prompts = suite_prompts(settings.suite)
    clips, other = clips_of(settings.folder, prompts, settings.rules)
    with alone_in(settings.output, "mmalign vbench static-filter"):
        answers, failed = _measure(settings, clips)
        chosen = {prompt: first_static(names, answers.get, settings.clips)[0] for prompt, names in clips.items()}
        static = {prompt: [settings.folder / name for name in names] for prompt, names in chosen.items()}
        _write(settings, static)
    counts = {prompt: len(names) for prompt, names in clips.items()}
    return Found(static, counts, settings.clips, failed, len(answers) - len(failed), other)


def _measure(settings: Settings, clips: Mapping[str, Sequence[str]]) -> tuple[dict[str, bool], dict[str, str]]:
    """Whether clips are static, of each prompt as many as it takes; and why some could not be measured."""
    answers: dict[str, bool] = {}
    failed: dict[str, str] = {}
    rows: list[MediaRow] = []
    while True:
        asked = []
        for prompt, names in clips.items():
            found, known = first_static(names, answers.get, settings.clips)
            if len(found) < settings.clips:
                asked += [(prompt, name) for name in names[known : known + settings.clips]]
        if not asked:
            return answers, failed
        rows += [MediaRow(name, prompt, str((settings.folder / name).absolute()), "video") for prompt, name in asked]
        table = settings.output / "scores" / "measured.jsonl"
        write_media_table(table, rows)
        evaluator = {"name": "static_filter", "params": dict(settings.params)}
        config = ScoreConfig.model_validate(
            {"table": table, "output": table.parent, "evaluators": [evaluator], **settings.scoring}
        )
        for row in read_results(score(config)).rows:
            if row["subscore"] == "score":
                answers[row["sample"]] = is_ok(row) and row["score"] == 1
                if not is_ok(row):
                    failed[row["sample"]] = str(row["reason"])


def _write(settings: Settings, static: Mapping[str, Sequence[Path]]) -> None:
    """Copies, table and record. Nothing is replaced by something else: that is found out before the first copy."""
    home = settings.output / "filtered_videos"
    targets = {
        home / f"{prompt}-{number}{clip.suffix}": (prompt, clip)
        for prompt, found in static.items()
        for number, clip in enumerate(found)
    }
    files = sorted(home.iterdir()) if home.is_dir() else []
    there = [file for file in files if file.is_file() and not file.name.startswith(".")]  # hidden: cut off by a kill
    strange = [file for file in there if file not in targets or content_hash(file) != content_hash(targets[file][1])]
    if strange:
        raise ValueError(
            f"{strange[0]} is not what this run chose ({len(strange)} such file{'s' * (len(strange) > 1)}), and is not "
            f"replaced; move {home} away, or give another --output."
        )
    home.mkdir(parents=True, exist_ok=True)
    for target, (_, clip) in targets.items():
        if target not in there:
            with whole_file(target) as temporary:
                shutil.copyfile(clip, temporary)
    record = {
        prompt: {"static_count": len(found), "static_path": [str(path) for path in found]}
        for prompt, found in static.items()
    }
    with whole_file(settings.output / "filtered_static_video.json") as temporary:
        temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    kept = [
        MediaRow(target.name, prompt, str(target.absolute()), "video", dimensions=(DIMENSION,))
        for target, (prompt, _) in targets.items()
    ]
    if kept:
        write_media_table(settings.output / "table.jsonl", kept)
