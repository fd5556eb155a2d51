"""One pass over VBench's quality dimensions gives what VBench's own way of computing them gives: bench/vbench.py."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import vbench
import vbench_weights
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ARGUMENTS = ["--size", "tiny", "--clips", "2", "--rounds", "1", "--device", "cpu", "--decode-workers", "1"]
FRAMES = 6


def options(tmp_path: Path, *more: str) -> argparse.Namespace:
    return vbench.parser().parse_args([*ARGUMENTS, "--tmp", str(tmp_path), "--folder", str(tmp_path / "w"), *more])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The lines of a run of both ways: odd sides, so that frames are padded, and a rate that leaves frames out."""
    found = options(tmp_path_factory.mktemp("bench"), "--clip", f"{FRAMES}x130x150@12", "--ways", *vbench.WAYS)
    return list(vbench.measure(found))


def test_both_ways_give_the_same_numbers(measured: list[dict[str, Any]]) -> None:
    found = measured[0]
    assert set(found["largest_differences"]) == set(vbench.DIMENSIONS)
    # 8 bits of a drawn frame may turn over at a boundary, and twenty updates of flow add up.
    assert max(found["largest_differences"].values()) < 2e-5
    values = {name: row["score"] for name, row in found["values"].items()}
    assert 0 < values["subject_consistency"] < 1 and 0 < values["temporal_flickering"] < 1
    assert len(set(values.values())) == len(values)  # none is stuck at 0 or 1 with another
    assert found["values"]["dynamic_degree"]["pairs"] == 2  # every second frame of 12 per second


def test_counts_are_those_of_the_two_ways(measured: list[dict[str, Any]]) -> None:
    one, other = measured[0]["counts"]["one_pass"], measured[0]["counts"]["reference"]
    assert (one["decodes"], other["decodes"]) == (2, 2 * 7)
    assert one["loads"] == other["loads"] == 7  # aesthetic_quality has a head, flicker has none
    # A clip's three frames of RAFT: as two pairs, four in the feature encoder and two contexts; shared, three and two.
    assert other["pictures"] - one["pictures"] == 2 * 1
    assert one["encoder_calls"] < other["encoder_calls"]
    flops = measured[0]["gflop_per_clip"]
    for name in set(vbench.DIMENSIONS) - {"dynamic_degree"}:
        assert flops["one_pass"][name] == pytest.approx(flops["reference"][name], rel=1e-6), name
    assert 0 < flops["one_pass"]["dynamic_degree"] < flops["reference"]["dynamic_degree"]
    assert measured[0]["ratio_by_flops"] > 1


def test_times_are_of_both_ways_and_of_their_parts(measured: list[dict[str, Any]]) -> None:
    ratios = {kind: line for line in measured for kind in line if kind.startswith("ratio_of")}
    assert set(ratios["ratio_of_seconds"]["ratio_of_seconds"]) == {"one_pass", "early"}
    assert "ratio_of_core_seconds" in ratios
    for line in (each for each in measured if "way" in each):
        assert set(line["dimensions"]) == set(vbench.DIMENSIONS)
        assert sum(line["parts"].values()) == pytest.approx(line["seconds"]["median"], rel=0.2)
    shown = vbench.table(measured).splitlines()
    assert len({len(re.findall(r"\|", line)) for line in shown}) == 1 and len(shown) == 2 + 7 + 4 + 1
    json.dumps(measured)


def test_a_difference_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = vbench.Reference.temporal_flickering
    monkeypatch.setattr(
        vbench.Reference, "temporal_flickering", lambda *given: {"score": kept(*given)["score"] * 0.999}
    )
    wanted = options(tmp_path, "--clip", "3x64x64@8", "--dimensions", "temporal_flickering")
    with pytest.raises(AssertionError, match=r"temporal_flickering: the two ways differ by 0\.0009"):
        next(vbench.measure(wanted))


def test_files_are_written_once_and_in_published_layouts(tmp_path: Path) -> None:
    files = vbench_weights.write(tmp_path, "tiny")
    known = {path: path.stat().st_mtime_ns for path in (files.dino, files.raft, files.clip_l14)}
    assert vbench_weights.write(tmp_path, "tiny") == files
    assert all(path.stat().st_mtime_ns == before for path, before in known.items())
    with torch.device("meta"):
        names = set(vbench_weights.build_vit(vbench_weights.VIT_B_16).state_dict())
    assert {"cls_token", "pos_embed", "blocks.11.mlp.fc2.bias", "norm.weight"} < names


def test_torchs_fused_attention_counts_as_the_written_out_one() -> None:
    attention = nn.MultiheadAttention(24, 2, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(3, 5, 24)
    counts = []
    for fast in (True, False):
        torch.backends.mha.set_fastpath_enabled(fast)
        try:
            with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=vbench.UNKNOWN) as counter:
                attention(x, x, x, need_weights=False)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_clips_size_is_read_or_refused() -> None:
    assert vbench._clip("49x480x720@24") == (49, 480, 720, 24.0) and vbench._clip("3x64x64") == (3, 64, 64, 8.0)
    with pytest.raises(argparse.ArgumentTypeError, match="FRAMESxHEIGHTxWIDTH"):
        vbench._clip("480p")
