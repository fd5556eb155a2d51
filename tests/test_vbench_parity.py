"""The seven quality dimensions from clips to the results file, against one plain pipeline that is written as VBench is.

Frame by frame and clip by clip: PyAV's own decoding, torchvision's transforms, timm's, open_clip's and torchvision's
networks (those of MUSIQ and AMT are written out in `musiq_reference` and `amt_reference`), numpy's means.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import amt_reference
import av
import dino_kit
import musiq_reference
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from media_kit import needs_decord
from raft_kit import authors_layout, small_raft
from scorer_kit import TINY, clip_folder
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from mmalign.backbones.clip import PUBLISHED
from mmalign.backbones.raft import RaftFlow
from mmalign.jobs import EvaluatorSpec, ScoreConfig
from mmalign.jobs_vbench import VBench
from mmalign.media import write_video
from mmalign.results import read_results
from mmalign.score import run
from mmalign.vbench.record import read_record

NAMES = (
    *("subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness"),
    *("dynamic_degree", "aesthetic_quality", "imaging_quality"),
)
CLIPS = {"a bus": (4, 128, 528, 8), "a cat": (9, 200, 129, 15), "a red kite": (14, 137, 176, 30)}  # T, H, W, fps
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP = {**TINY, "quick_gelu": True}


def slow_raft() -> Any:
    """A random network whose flow is near the threshold, so that some clips move and some do not."""
    network: Any = small_raft()
    with torch.no_grad():
        for value in network.update_block.flow_head.conv2.parameters():
            value.mul_(0.058)
    return network


@pytest.fixture(scope="module", name="home")
def _home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, a suite, and the five networks as they are published."""
    home = tmp_path_factory.mktemp("parity")
    (home / "clips").mkdir()
    for seed, (prompt, (frames, height, width, fps)) in enumerate(CLIPS.items()):
        pixels = dino_kit.clip_of(frames, height, width, seed)
        if seed:
            pixels = torch.stack([frame.roll(5 * t, -1) for t, frame in enumerate(pixels)])
        write_video(home / "clips" / f"{prompt}-0.mp4", pixels, fps=fps)
    suite = [{"prompt_en": prompt, "dimension": list(NAMES)} for prompt in CLIPS]
    (home / "suite.json").write_text(json.dumps(suite))
    dino_kit.dino_file(home)
    torch.save(amt_reference.random_state(), home / "amt-s.pth")
    torch.save(musiq_reference.random_state(), home / "musiq_spaq_ckpt-358bb6af.pth")
    torch.save(authors_layout(slow_raft().state_dict()), home / "raft-things.pth")
    (home / "clip").mkdir()
    clip_folder(home / "clip", "open_clip_pytorch_model.bin", CLIP)
    generator = torch.Generator().manual_seed(5)
    head = {"weight": torch.randn(1, 24, generator=generator), "bias": torch.tensor([5.0])}
    torch.save(head, home / "sa_0_4_vit_l_14_linear.pth")
    return home


@pytest.fixture(autouse=True)
def _tiny_clip(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ViT-B-32", "ViT-L-14"):
        monkeypatch.setitem(PUBLISHED, name, (str(home / "clip"), PUBLISHED[name][1]))


def scored(home: Path, output: Path, *names: str, block: dict[str, Any] | None = None, **more: Any) -> Path:
    """What `mmalign score` writes; like configs/score/vbench_quality.yaml, with the weights of `home`."""
    clip = home / "clip" / "open_clip_pytorch_model.bin"
    files: dict[str, dict[str, Any]] = {name: {"checkpoint": home} for name in NAMES}
    files["temporal_flickering"] = {}
    files["background_consistency"] = {"checkpoint": clip}
    files["aesthetic_quality"] = {"checkpoint": home, "clip_checkpoint": clip}
    evaluators = tuple(EvaluatorSpec(name=name, params=files[name]) for name in names or NAMES)
    settings = VBench(**{"suite": home / "suite.json", "samples": 1, "name": "quality", **(block or {})})
    given = {"media": home / "clips", "device": "cpu", "batch_size": 32, "decode_workers": 1, **more}
    return run(ScoreConfig(output=output, evaluators=evaluators, vbench=settings, **given))


# ------------------------------------------------------------------------------------------------ the reference


def frames_of(path: Path) -> tuple[np.ndarray, float]:
    """uint8 [T, H, W, 3] and the rate."""
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), rate


def tensor(frame: np.ndarray) -> torch.Tensor:
    """float32 [1, 3, H, W] from 0 to 255."""
    return torch.from_numpy(frame).permute(2, 0, 1)[None].float()


def normalised(pixels: torch.Tensor, mean: Any, std: Any) -> torch.Tensor:
    return (pixels / 255 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


def dino(home: Path) -> Any:
    """Frame -> unit-length class token, by timm's network and DINO's way with positions."""
    from timm.models.vision_transformer import VisionTransformer

    sizes = dino_kit.SMALL
    net: Any = VisionTransformer(
        img_size=224, patch_size=16, num_classes=0, embed_dim=sizes["width"], depth=sizes["depth"],
        num_heads=sizes["width"] // 64, mlp_ratio=sizes["hidden"] / sizes["width"],
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), dynamic_img_size=True,
    ).eval()  # fmt: skip
    net.load_state_dict(torch.load(home / "dino_vitbase16_pretrain.pth", weights_only=True))
    learned = net.pos_embed.detach().clone()

    def feature(frame: np.ndarray) -> torch.Tensor:
        pixels = Resize(224, antialias=False)(tensor(frame))
        pixels = normalised(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        rows, columns = pixels.shape[-2] // 16, pixels.shape[-1] // 16
        pixels = pixels[..., : rows * 16, : columns * 16]
        grid = learned[:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
        if (rows, columns) != (14, 14):
            grid = F.interpolate(grid, scale_factor=((rows + 0.1) / 14, (columns + 0.1) / 14), mode="bicubic")
        places = torch.cat([learned[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
        tokens = net.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([net.cls_token, tokens], dim=1) + places
        return F.normalize(net.norm(net.blocks(tokens))[0, 0], dim=0)

    return feature


def clip(home: Path) -> Any:
    """Frame -> unit-length image embedding, by open_clip's network."""
    from open_clip.model import CLIP as Network

    net: Any = Network(**CLIP).eval()
    net.load_state_dict(torch.load(home / "clip" / "open_clip_pytorch_model.bin", weights_only=True)["state_dict"])
    side = CLIP["vision_cfg"]["image_size"]

    def feature(frame: np.ndarray) -> torch.Tensor:
        pixels = Resize(side, InterpolationMode.BICUBIC, antialias=False)(tensor(frame))
        pixels = normalised(CenterCrop(side)(pixels), MEAN, STD)
        return F.normalize(net.encode_image(pixels)[0], dim=0)

    return feature


def consistency(features: list[torch.Tensor]) -> tuple[float, int]:
    """The sum over pairs, and how many they are."""
    total = 0.0
    for place in range(1, len(features)):
        before = max(0.0, F.cosine_similarity(features[place - 1], features[place], dim=0).item())
        first = max(0.0, F.cosine_similarity(features[0], features[place], dim=0).item())
        total += (before + first) / 2
    return total, len(features) - 1


def flickering(frames: np.ndarray) -> float:
    apart = [np.mean(np.abs(np.float32(a) - np.float32(b))) for a, b in itertools.pairwise(frames)]
    return (255.0 - np.mean(apart).item()) / 255.0


def padded(pixels: torch.Tensor, side: int) -> tuple[torch.Tensor, int, int]:
    """Edges repeated to multiples of a side, half at each end; and what is before."""
    down, across = -pixels.shape[-2] % side, -pixels.shape[-1] % side
    margins = (across // 2, across - across // 2, down // 2, down - down // 2)
    return F.pad(pixels, margins, mode="replicate"), down // 2, across // 2


def smoothness(frames: np.ndarray) -> float:
    kept, state = frames[::2], amt_reference.random_state()
    height, width = frames.shape[1:3]
    apart = []
    for place in range(len(kept) - 1):
        (one, top, left), (two, _, _) = (padded(tensor(kept[place + k]) / 255, 16) for k in (0, 1))
        drawn = amt_reference.interpolate(one[0], two[0], state)[:, top : top + height, left : left + width]
        cut = (drawn * 255).permute(1, 2, 0).numpy().astype(np.uint8)
        apart.append(np.mean(np.abs(cut.astype(int) - frames[2 * place + 1].astype(int))))
    return (255.0 - float(np.mean(apart))) / 255.0


def motion(frames: np.ndarray, rate: float) -> tuple[bool, list[float]]:
    """Whether the clip moves, and each pair's speed over the threshold."""
    network = slow_raft()
    frames = frames[:: max(1, round(rate / 8))]
    threshold = 6.0 * (min(frames.shape[1:3]) / 256.0)
    needed = round(4 * (len(frames) / 16.0))
    speeds = []
    for first, second in itertools.pairwise(frames):
        images = [2 * (padded(tensor(frame), 8)[0] / 255.0) - 1.0 for frame in (first, second)]
        flow = network(*images, num_flow_updates=20)[-1][0].numpy()
        lengths = np.sqrt(flow[0] ** 2 + flow[1] ** 2).flatten()
        fastest = np.sort(-lengths)[: int(lengths.size * 0.05)]
        speeds.append(float(np.mean(np.abs(fastest))) / threshold)
    return sum(speed > 1 for speed in speeds) >= needed, speeds


def quality(frames: np.ndarray) -> float:
    ratings = []
    for frame in frames:
        pixels, longer = tensor(frame), max(frame.shape[:2])
        if longer > 512:
            scale = 512.0 / longer
            size = [int(scale * side) for side in frame.shape[:2]]
            pixels = Resize(size, antialias=False)(pixels)
        ratings.append(musiq_reference.rate((pixels[0] / 255).numpy(), musiq_reference.random_state()))
    return float(np.mean(ratings))


@pytest.fixture(scope="module", name="reference")
def _reference(home: Path) -> dict[str, tuple[float, dict[str, float]]]:
    """Dimension -> its score and those of the clips, by prompt."""
    head = torch.load(home / "sa_0_4_vit_l_14_linear.pth", weights_only=True)
    by_dino, by_clip = dino(home), clip(home)
    rows: dict[str, dict[str, float]] = {name: {} for name in NAMES}
    micro: dict[str, list[tuple[float, int]]] = {"subject_consistency": [], "background_consistency": []}
    with torch.no_grad():
        for prompt in CLIPS:
            frames, rate = frames_of(home / "clips" / f"{prompt}-0.mp4")
            features = [by_clip(frame) for frame in frames]
            for name, found in (
                ("subject_consistency", [by_dino(frame) for frame in frames]),
                ("background_consistency", features),
            ):
                micro[name].append(consistency(found))
                rows[name][prompt] = micro[name][-1][0] / micro[name][-1][1]
            rows["temporal_flickering"][prompt] = flickering(frames)
            rows["motion_smoothness"][prompt] = smoothness(frames)
            moves, speeds = motion(frames, rate)
            assert min(abs(speed - 1) for speed in speeds) > 1e-3, "too near to the threshold to be a case"
            rows["dynamic_degree"][prompt] = moves
            rated = [(head["weight"][0] @ feature + head["bias"][0]).item() / 10 for feature in features]
            rows["aesthetic_quality"][prompt] = float(np.mean(rated))
            rows["imaging_quality"][prompt] = quality(frames)
    scores = {name: float(np.mean(list(values.values()))) for name, values in rows.items()}
    for name, parts in micro.items():
        scores[name] = sum(total for total, _ in parts) / sum(pairs for _, pairs in parts)
    scores["imaging_quality"] /= 100
    return {name: (scores[name], rows[name]) for name in NAMES}


LOWEST = (0.1462, 0.2615, 0.6293, 0.706, 0, 0, 0)
HIGHEST = (1, 1, 1, 0.9975, 1, 1, 1)
WEIGHTS = (1, 1, 1, 1, 0.5, 1, 1)


def test_the_cases_tell_something(reference: dict[str, tuple[float, dict[str, float]]]) -> None:
    for name, (_, clips) in reference.items():
        values = sorted(clips.values())
        if name == "dynamic_degree":
            assert set(values) == {True, False}
        else:
            assert min(np.diff(values)) > 1e-3, f"{name}: clips score the same"
    for name in ("subject_consistency", "background_consistency"):
        score, clips = reference[name]
        assert abs(score - np.mean(list(clips.values()))) > 1e-3, "the two means cannot be told apart"


@pytest.mark.parametrize("decoder", ["pyav", pytest.param("decord", marks=needs_decord)])
def test_scores_are_those_of_the_plain_pipeline(
    home: Path, reference: dict[str, tuple[float, dict[str, float]]], tmp_path: Path, decoder: str
) -> None:
    folder = scored(home, tmp_path, decoder=decoder)
    data = json.loads((folder / "quality_eval_results.json").read_text())
    assert list(data) == list(NAMES)
    for name, (score, clips) in reference.items():
        assert data[name][0] == pytest.approx(score, abs=2e-5), name
        found = {Path(row["video_path"]).name[: -len("-0.mp4")]: row["video_results"] for row in data[name][1]}
        assert found == pytest.approx(clips, abs=2e-3 if name == "imaging_quality" else 2e-5), name  # of 100, and of 1
        assert name != "dynamic_degree" or all(isinstance(value, bool) for value in found.values())
    record = read_record(folder)
    assert record.decoder is not None and decoder in record.decoder
    by_hand = 0.0
    for name, low, high, weight in zip(NAMES, LOWEST, HIGHEST, WEIGHTS, strict=True):
        by_hand += weight * (reference[name][0] - low) / (high - low)
    assert record.totals["quality"].value == pytest.approx(by_hand / 6.5, abs=1e-4)
    assert all(each.kind == "exact" for each in record.dimensions) and not math.isnan(by_hand)


def values_of(folder: Path) -> dict[tuple[str, str, str], float]:
    rows = read_results(folder).rows
    return {(row["evaluator"].partition("[")[0], row["sample"], row["subscore"]): row["score"] for row in rows}


def test_order_batches_and_what_is_scored_beside_change_nothing(home: Path, tmp_path: Path) -> None:
    """One clip at a time, all at once in another order, and each dimension by itself."""
    whole = values_of(scored(home, tmp_path / "whole"))
    together = values_of(scored(home, tmp_path / "together", batch_size=512))
    alone: dict[Any, float] = {}
    for name in NAMES:
        alone |= values_of(scored(home, tmp_path / name, name, batch_size=16))
    table = [
        {"media": str(home / "clips" / f"{prompt}-0.mp4"), "sample": f"{prompt}-0.mp4", "prompt": prompt}
        for prompt in reversed(CLIPS)
    ]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    turned = scored(home, tmp_path / "turned", media=tmp_path / "table.jsonl", block={"suite": None}, batch_size=512)
    assert set(whole) == set(together) == set(alone)
    for other in (together, alone):
        assert other == pytest.approx(whole, abs=2e-5)
    found = values_of(turned)
    assert len(found) == len(whole)
    assert sorted(found.values()) == pytest.approx(sorted(whole.values()), abs=2e-5)


def test_two_processes_and_a_run_in_two_parts_change_nothing(home: Path, tmp_path: Path) -> None:
    """All seven; the clips of the second part come later, when those of the first are settled."""
    clip = {"clip_checkpoint": home / "clip", "model": str(home / "clip")}
    params: dict[str, dict[str, Any]] = {name: {"checkpoint": home} for name in NAMES}
    params["temporal_flickering"] = {}
    params["background_consistency"] = {"checkpoint": home / "clip", "model": str(home / "clip")}
    params["aesthetic_quality"] |= clip
    evaluators = tuple(EvaluatorSpec(name=name, params=params[name]) for name in NAMES)

    def scores(media: Path, output: str, **more: Any) -> dict[tuple[str, str, str], float]:
        given = {"media": media, "device": "cpu", "batch_size": 16, "decode_workers": 1, **more}
        return values_of(run(ScoreConfig(output=tmp_path / output, evaluators=evaluators, vbench=VBench(), **given)))

    whole = scores(home / "clips", "one")
    assert scores(home / "clips", "two", processes=2) == pytest.approx(whole, abs=2e-5)
    later = tmp_path / "later"
    later.mkdir()
    for path in sorted((home / "clips").iterdir())[1:]:
        shutil.copy(path, later)
    first = scores(later, "parts")
    assert len(first) == len(whole) * 2 / 3
    assert scores(home / "clips", "parts", batch_size=512) == pytest.approx(whole, abs=2e-5)


def test_plain_and_shared_flow_agree(home: Path) -> None:
    """Speeds of the case, so that the booleans above are no accident of clips far from the threshold."""
    frames, rate = frames_of(home / "clips" / "a cat-0.mp4")
    frames = frames[:: max(1, round(rate / 8))]
    with torch.no_grad():
        _, speeds = motion(frames, 8)
    clip = torch.from_numpy(frames).permute(0, 3, 1, 2)
    pairs = [(t, t + 1) for t in range(len(frames) - 1)]
    limit = 6 * min(frames.shape[1:3]) / 256
    for (_, flow), start in zip(RaftFlow(slow_raft(), pixels=1).flows(clip, pairs), range(len(pairs)), strict=True):
        lengths = flow[0].square().sum(0).sqrt().flatten()
        fastest = lengths.topk(int(len(lengths) * 0.05)).values.mean().item()
        assert fastest / limit == pytest.approx(speeds[start], rel=1e-4)


def test_bfloat16_is_another_measure_and_has_another_name(home: Path, tmp_path: Path) -> None:
    """Dimensions whose networks run in it are not the reference's, so that they are in no Quality."""
    record = read_record(scored(home, tmp_path / "half", dtype="bfloat16"))
    exact = [each.name for each in record.dimensions if each.kind == "exact"]
    assert exact == ["temporal_flickering", "motion_smoothness", "dynamic_degree"]
    others = {each.name for each in record.dimensions} - set(exact)
    assert others == {f"{name}[dtype=bfloat16]" for name in NAMES if name not in exact}
    assert record.totals["quality"].value is None
    whole = read_record(scored(home, tmp_path / "whole", *exact))
    assert [each.score for each in record.dimensions if each.kind == "exact"] == [
        each.score for each in whole.dimensions
    ]
