"""Seconds per clip of VBench's seven quality dimensions: one pass, against a dimension at a time.

    python bench/vbench.py --folder runs/vbench_bench --clips 4 --rounds 5 --json vbench.jsonl
    python bench/vbench.py --size tiny --clip 6x144x192@8         # tiny networks: shows that it works

Networks have their published sizes, random weights and published layouts, in files that are written once into
`--folder`. Both ways begin with these files and with MP4s, and end with numbers:

- one pass: `mmalign.score.run` on a media table with the seven evaluators: hashes of the media, loading, decoding, the
  networks, results on disk. Digests of weight files are known, as they are in any run but the first.
- reference: `recipes/vbench_calls.py`, VBench's own way, the same networks called as VBench calls them: for each
  dimension its network is loaded, each clip decoded, and frames or pairs go through it one by one.
- early (asked for by --ways): the one pass, which ends dynamic_degree when the answer is known.

Before the clock runs both ways score the same clips, and every sub-score has to agree; the largest difference is
printed. That round counts decodes, loads, calls of encoders (of the layers that read three channels), and the products
of all networks in FLOPs. Then rounds alternate, forwards and backwards. A ratio is of two ways within a round; of n
rounds the range holds the true median with confidence 1 - 2^(1-n). On a CPU the same is given of the seconds that cores
were at work, decoders included, which other tenants of the machine change less. On a GPU the share of copies to it is
taken from one more pass under torch's profiler.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onednn
import torch
import vbench_weights
from machine import clock, machine, matmul_ceiling
from recipes.vbench_calls import Reference
from score_figures import spread
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmalign import score_decode, score_worker
from mmalign.evaluation import Backbones, resolve_device
from mmalign.jobs import EvaluatorSpec, ScoreConfig
from mmalign.media import write_video
from mmalign.results import read_results
from mmalign.score import run

Rows = dict[tuple[str, int], dict[str, float]]
"""(dimension, clip) -> sub-scores."""
WAYS = ("one_pass", "reference", "early")
DIMENSIONS = (
    "subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness",
    "dynamic_degree", "aesthetic_quality", "imaging_quality",
)  # fmt: skip
BOUND = 2e-4
"""Of differences, as a share of max(1, value); speeds of flow after twenty updates are the loosest."""


# ------------------------------------------------------------------------------------------------ clips


def write_clips(folder: Path, number: int, shape: tuple[int, int, int], fps: float) -> list[Path]:
    """MP4s of a smooth random picture that wanders, faster from clip to clip, the first one standing still."""
    frames, height, width = shape
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for index in range(number):
        generator = torch.Generator().manual_seed(index)
        step = 3 * index
        wide = torch.rand(1, 3, height // 16 + 2, (width + step * frames) // 16 + 2, generator=generator)
        size = (height, width + step * frames)
        picture = nn.functional.interpolate(wide, size, mode="bicubic", align_corners=True).clamp(0, 1)[0]
        clip = torch.stack([picture[..., step * t : step * t + width] for t in range(frames)])
        clip = (clip + 0.03 * torch.randn(clip.shape, generator=generator)).clamp(0, 1)
        files.append(folder / f"{index}.mp4")
        write_video(files[-1], (clip * 255).round().byte(), fps)
    return files


# ------------------------------------------------------------------------------------------------ the two ways


class OnePass:
    """`mmalign score` on a table of the clips, each call into a folder of its own."""

    def __init__(self, weights: vbench_weights.Files, clips: Sequence[Path], options: Any, folder: Path):
        self.params, self.options, self.folder = weights.params(), options, folder
        self.table, self.calls = folder / "table.jsonl", 0
        rows = ({"media": str(clip), "sample": str(index), "prompt": "a thing"} for index, clip in enumerate(clips))
        self.table.write_text("\n".join(map(json.dumps, rows)))

    def __call__(self, early: bool = False) -> tuple[Rows, dict[str, float]]:
        """Sub-scores, and each dimension's seconds for all clips."""
        self.calls += 1
        params = {**self.params}
        if early:
            params["dynamic_degree"] = {**params["dynamic_degree"], "early": True}  # type: ignore[dict-item]
        config = ScoreConfig(
            table=self.table, output=self.folder / f"out-{self.calls}", device=self.options.device,
            evaluators=tuple(EvaluatorSpec(name=name, params=params[name]) for name in self.options.dimensions),
            decode_workers=self.options.decode_workers,
        )  # fmt: skip
        found: Rows = defaultdict(dict)
        seconds: dict[str, float] = {}
        for row in read_results(run(config, plugins=False)).rows:
            assert row["status"] == "ok", row["reason"]
            name = row["evaluator"].partition("[")[0].partition("(")[0]
            found[name, int(row["sample"])][row["subscore"]] = row["score"]
            seconds[name, row["sample"]] = row["seconds"]  # type: ignore[index]  # the same for its sub-scores
        totals: dict[str, float] = defaultdict(float)
        for (name, _), value in seconds.items():  # type: ignore[misc]
            totals[name] += value
        return dict(found), dict(totals)


class Recipe:
    """The reference's way with its times: by dimension, and by load, decode and compute."""

    def __init__(self, weights: vbench_weights.Files, clips: Sequence[Path], options: Any):
        self.clips, self.options, self.device = clips, options, resolve_device(options.device)
        self.parts: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.reference = Reference(weights, self.device, self._timed)
        self.flops: dict[str, int] = {}

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.parts[part] += time.perf_counter() - start
        self.counts[part] += 1

    def __call__(self, counter: FlopCounterMode | None = None) -> tuple[Rows, dict[str, float]]:
        """Sub-scores, and each dimension's seconds for all clips, its loading and decoding included."""
        self.parts.clear(), self.counts.clear()
        found: Rows = {}
        seconds = {}
        for name in self.options.dimensions:
            start, before = time.perf_counter(), counter.get_total_flops() if counter else 0
            for index, row in enumerate(self.reference.score(name, self.clips)):
                found[name, index] = row
            seconds[name] = time.perf_counter() - start
            self.flops[name] = counter.get_total_flops() - before if counter else 0
        return found, seconds


# ------------------------------------------------------------------------------------------------ counting


class Watch:
    """What the engine does, from outside: its waits for decoders, loads, decodes, and each dimension's FLOPs."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.flops: dict[str, int] = defaultdict(int)
        self.counter: FlopCounterMode | None = None

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        self.parts.clear(), self.counts.clear()
        get, stream = Backbones.get, score_decode.Decoder.stream
        ask, outcomes = score_decode._Process.ask, score_worker.Worker._outcomes

        def counted_get(its: Any, *args: Any) -> Any:
            start, known = time.perf_counter(), len(its._loaded)
            found = get(its, *args)
            self.parts["load"] += time.perf_counter() - start
            self.counts["load"] += len(its._loaded) - known
            return found

        def timed_stream(its: Any, *args: Any) -> Iterator[Any]:
            pieces = stream(its, *args)
            while True:
                start = time.perf_counter()
                piece = next(pieces, None)
                self.parts["decode"] += time.perf_counter() - start
                if piece is None:
                    return
                yield piece

        def counted_ask(its: Any, *args: Any) -> Any:
            self.counts["decode"] += 1
            return ask(its, *args)

        def counted_outcomes(its: Any, label: str, evaluator: Any, batch: Any) -> Any:
            before = self.counter.get_total_flops() if self.counter else 0
            found = outcomes(its, label, evaluator, batch)
            self.flops[evaluator.name] += self.counter.get_total_flops() - before if self.counter else 0
            return found

        with ExitStack() as held:
            held.enter_context(patch.object(Backbones, "get", counted_get))
            held.enter_context(patch.object(score_decode.Decoder, "stream", timed_stream))
            held.enter_context(patch.object(score_decode._Process, "ask", counted_ask))
            held.enter_context(patch.object(score_worker.Worker, "_outcomes", counted_outcomes))
            yield self


def attention_flops(query: Any, key: Any, value: Any, width: int, *_: Any, **__: Any) -> int:
    """Of torch's fused attention without a gradient, which the counter does not know: shapes [N, L, D]."""
    number, length, _ = query
    return 2 * number * length * width * (4 * width + 2 * length)


UNKNOWN = {torch.ops.aten._native_multi_head_attention: attention_flops}


@contextmanager
def encoder_calls() -> Iterator[dict[str, int]]:
    """Calls of layers that read pictures, and how many pictures (or MUSIQ's patches) went through them."""
    found = {"calls": 0, "pictures": 0}

    def seen(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            found["calls"] += 1
            found["pictures"] += len(inputs[0])

    handle = nn.modules.module.register_module_forward_pre_hook(seen)
    try:
        yield found
    finally:
        handle.remove()


def largest_differences(one: Rows, other: Rows) -> dict[str, float]:
    """By dimension, of the sub-scores that both have, as a share of max(1, value)."""
    assert one.keys() == other.keys(), f"{sorted(one)} are not {sorted(other)}"
    found: dict[str, float] = defaultdict(float)
    for (name, clip), row in other.items():
        for part, value in row.items():
            found[name] = max(found[name], abs(one[name, clip][part] - value) / max(1.0, abs(value)))
    return dict(found)


# ------------------------------------------------------------------------------------------------ measuring


class Bench:
    """Both ways on one set of weights and clips."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.device = options, resolve_device(options.device)
        weights = vbench_weights.write(options.folder or folder, options.size)
        frames, height, width, fps = options.clip
        self.clips = write_clips(folder / "clips", options.clips, (frames, height, width), fps)
        self.one, self.recipe, self.watch = OnePass(weights, self.clips, options, folder), None, Watch()
        self.recipe = Recipe(weights, self.clips, options)

    def compared(self) -> dict[str, Any]:
        """Both ways once, not timed: differences, which are asserted, values and counts."""
        work: dict[str, Callable[[FlopCounterMode], tuple[Rows, dict[str, float]]]] = {
            "reference": lambda counter: self.recipe(counter), "one_pass": lambda counter: self.one(),
        }  # fmt: skip
        rows, counts, flops = {}, {}, {}
        with self.watch.watching():
            for way, call in work.items():
                with FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter, encoder_calls() as calls:
                    self.watch.counter = counter if way == "one_pass" else None
                    rows[way], _ = call(counter)
                source = self.recipe if way == "reference" else self.watch
                flops[way] = {name: source.flops[name] / len(self.clips) / 1e9 for name in self.options.dimensions}
                counts[way] = {
                    "decodes": source.counts["decode"], "loads": source.counts["load"],
                    "encoder_calls": calls["calls"], "pictures": calls["pictures"],
                }  # fmt: skip
            self.watch.counter = None
        counts["reference"]["loads"] = _networks(self.options.dimensions)
        differences = largest_differences(rows["one_pass"], rows["reference"])
        for name, value in differences.items():
            assert value <= BOUND, f"{name}: the two ways differ by {value:.3g}, more than {BOUND}"
        total = {way: sum(each.values()) for way, each in flops.items()}
        return {
            "largest_differences": differences, "bound": BOUND, "counts": counts, "gflop_per_clip": flops,
            "ratio_by_flops": total["reference"] / max(1e-9, total["one_pass"]),
            "values": {name: rows["one_pass"][name, len(self.clips) - 1] for name in self.options.dimensions},
        }  # fmt: skip

    def timed(self, way: str) -> dict[str, Any]:
        """Seconds per clip by the clock and of cores, of each dimension, and of its parts."""
        before, found = _core_seconds(), {}

        def work() -> None:
            found["of"] = (self.recipe if way == "reference" else lambda: self.one(way == "early"))()[1]

        with self.watch.watching() if way != "reference" else ExitStack():
            seconds = clock(work, self.device)
        parts = dict(self.recipe.parts if way == "reference" else self.watch.parts)
        if way != "reference":
            parts["compute"] = sum(found["of"].values())
            parts["rest"] = seconds - sum(parts.values())
        number = len(self.clips)
        return {
            "seconds": seconds / number, "core_seconds": (_core_seconds() - before) / number,
            "dimensions": {name: value / number for name, value in found["of"].items()},
            "parts": {name: value / number for name, value in parts.items()},
        }  # fmt: skip

    def rounds(self) -> list[dict[str, dict[str, Any]]]:
        """Every other round backwards; one shorter than the time left is always made."""
        found, started = [], time.perf_counter()
        for number in range(self.options.rounds):
            start = time.perf_counter()
            order = self.options.ways[:: 1 if number % 2 == 0 else -1]
            found.append({way: self.timed(way) for way in order})
            if time.perf_counter() - started + time.perf_counter() - start > self.options.seconds:
                break
        return found

    def transfer_share(self) -> float:
        """Of one more pass on a GPU, the share of the time in which pixels were copied to it."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as found:
            seconds = clock(self.one, self.device)
        copied = sum(event.device_time_total for event in found.key_averages() if "Memcpy HtoD" in event.key)
        return float(copied) / 1e6 / seconds


def _networks(dimensions: Sequence[str]) -> int:
    """How many files the reference's way reads: one for a dimension, two for aesthetic_quality, none for flicker."""
    return sum({"temporal_flickering": 0, "aesthetic_quality": 2}.get(name, 1) for name in dimensions)


def _core_seconds() -> float:
    """Of this process and of those that it has ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def summary(options: argparse.Namespace, rounds: Sequence[dict[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Ratios first."""
    others = [way for way in options.ways if way != "reference"]
    for kind in ("seconds", "core_seconds") if "reference" in options.ways else ():
        if kind == "seconds" or options.device == "cpu":
            yield {f"ratio_of_{kind}": {
                way: spread([one["reference"][kind] / one[way][kind] for one in rounds]) for way in others
            }, "rounds": len(rounds), "confidence": 1 - 2.0 ** (1 - len(rounds))}  # fmt: skip
    for way in options.ways:
        median = {
            part: {name: statistics.median(one[way][part].get(name, 0.0) for one in rounds) for name in of}
            for part, of in rounds[0][way].items() if isinstance(of, dict)
        }  # fmt: skip
        seconds = {kind: spread([one[way][kind] for one in rounds]) for kind in ("seconds", "core_seconds")}
        yield {"way": way, **seconds, **median}


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: of each dimension its seconds and GFLOP per clip in both ways, and how far apart they are."""
    ways = {line["way"]: line for line in lines if "way" in line}
    checked = next(line for line in lines if "gflop_per_clip" in line)
    names = list(checked["largest_differences"])
    shown = [f"| | {' | '.join(f'{way}, s' for way in ways)} | one pass, GFLOP | reference, GFLOP | apart |"]
    shown.append("|---" * (len(ways) + 4) + "|")
    flops = checked["gflop_per_clip"]
    for name in names:
        cells = [f"{line['dimensions'].get(name, 0):.2f}" for line in ways.values()]
        cells += [f"{flops[way][name]:.0f}" for way in ("one_pass", "reference")]
        shown.append(f"| {name} | {' | '.join(cells)} | {checked['largest_differences'][name]:.0e} |")
    for part in ("load", "decode", "compute", "rest"):
        cells = [f"{line['parts'].get(part, 0):.2f}" for line in ways.values()]
        shown.append(f"| ({part}) | {' | '.join(cells)} | | | |")
    cells = [f"{line['seconds']['median']:.2f}" for line in ways.values()]
    cells += [f"{sum(flops[way].values()):.0f}" for way in ("one_pass", "reference")]
    shown.append(f"| a clip | {' | '.join(cells)} | |")
    return "\n".join(shown)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The lines of a run."""
    with tempfile.TemporaryDirectory(dir=options.tmp) as name, patch.dict(os.environ):
        os.environ["MMALIGN_CACHE"] = str(Path(name) / "cache")  # digests, known after the round that is not timed
        bench = Bench(options, Path(name))
        frames, height, width, fps = options.clip
        about = {"clip": f"{frames}x{height}x{width}@{fps:g}", "clips": options.clips, "size": options.size}
        yield {**about, "dimensions": options.dimensions, "onednn": options.onednn} | bench.compared()
        yield from summary(options, bench.rounds())
        if bench.device.type == "cuda":
            yield {"share_of_copies_to_the_gpu": bench.transfer_share()}
        yield {"machine": machine(bench.device), "matmul_tflops": matmul_ceiling(bench.device, torch.float32)}


def _clip(text: str) -> tuple[int, int, int, float]:
    try:
        shape, _, fps = text.partition("@")
        frames, height, width = map(int, shape.split("x"))
        return frames, height, width, float(fps or 8)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a clip is FRAMESxHEIGHTxWIDTH@FPS, such as 16x320x512@8, not {text}"
        ) from None


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    found.add_argument("--clip", type=_clip, default=_clip("16x320x512@8"), help="FRAMESxHEIGHTxWIDTH@FPS")
    found.add_argument("--clips", type=int, default=16 if gpu else 2)
    found.add_argument("--rounds", type=int, default=5 if gpu else 3)
    found.add_argument("--seconds", type=float, default=1800.0, help="rounds end in time, but there is one")
    found.add_argument("--dimensions", nargs="+", choices=DIMENSIONS, default=list(DIMENSIONS))
    found.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS[:2]))
    found.add_argument("--size", choices=("full", "tiny"), default="full")
    found.add_argument("--device", default="cuda" if gpu else "cpu", choices=("cpu", "cuda"))
    found.add_argument("--decode-workers", type=int, default=None, help="default: as the engine chooses")
    found.add_argument("--onednn", action="store_true", help="matrix products of both ways by oneDNN, see onednn.py")
    found.add_argument("--folder", type=Path, help="where weights are kept for the next call (1.6 GB)")
    found.add_argument("--tmp", default=None, help="folder for what is thrown away")
    found.add_argument("--json", type=Path, default=None, help="write the lines here too, as they come")
    return found


def main() -> None:
    options = parser().parse_args()
    if options.onednn:
        onednn.use()
    lines = []
    with open(options.json or os.devnull, "w") as file:
        for line in measure(options):
            lines.append(line)
            print(json.dumps(line), flush=True)
            print(json.dumps(line), file=file, flush=True)
    print(table(lines))


if __name__ == "__main__":
    main()
