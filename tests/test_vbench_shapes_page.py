"""docs/vbench_shapes.md against its ledger, and what UMT is trained on against its evaluator."""

import json
from pathlib import Path

import pytest
import torch
import umt_kit
import vbench_shapes
from vbench_shapes_models import ACTIONS, BACKWARDS, FRAME, UMT_FRAMES, _turned, _umt_pixels

from mmalign.backbones.dino import IMAGENET
from mmalign.discovery import load_evaluator
from mmalign.shapes.clip_data import drawn_clips

PAGE = (Path(__file__).parents[1] / "docs" / "vbench_shapes.md").read_text(encoding="utf-8")


def test_the_page_has_the_tables_of_the_ledger():
    lines = [line for line in vbench_shapes.table().splitlines() if line]
    assert len(lines) > len(vbench_shapes.ON_TARGET)
    assert [line for line in PAGE.splitlines() if line.startswith("|")] == lines


def test_the_ledger_has_each_figure_once():
    held = [json.loads(line) for line in vbench_shapes.LEDGER.read_text(encoding="utf-8").splitlines()]
    keys = [(each["seed"], each["series"], each["label"], each["subscore"]) for each in held]
    assert len(keys) == len(set(keys))


def test_a_correlation_with_a_truth_of_two_values():
    rho, low, high = vbench_shapes.rank_correlation([0.0, 1.0] * 8, [0.0, 1.0] * 8)
    assert (rho, low, high) == pytest.approx((1, 1, 1))


def test_umt_is_trained_on_what_its_evaluator_reads(tmp_path):
    """The same frames, and pixels that differ by the rounding of two kernels at most."""
    (item,) = drawn_clips(1, 3, counts=(1.0, 0.0), side=FRAME)
    clip = torch.from_numpy(item.clip()).permute(0, 3, 1, 2)
    evaluator = load_evaluator("human_action", {"checkpoint": umt_kit.umt_file(tmp_path)[0]}, "cpu")
    difference = (_umt_pixels(clip)[UMT_FRAMES] - evaluator._pixels(clip)).abs().max().item()
    assert difference <= 1.01 / 255 / min(IMAGENET.std)


def test_an_action_run_backwards_is_the_opposite_one():
    turned = [
        ACTIONS[_turned(action, BACKWARDS)] for action in ("circle moving up", "cross moving left", "square standing")
    ]
    assert turned == ["circle moving down", "cross moving right", "square standing"]
