"""Public benchmark files that tests read where they lie beside the checkout; the repository holds none of them."""

from __future__ import annotations

from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
AESTHETIC_HEADS = DATA / "aesthetic"
AMBER_ANNOTATIONS = DATA / "amber" / "annotations.json"
AMBER_QUERIES = DATA / "amber" / "query_all.json"
GECKO = DATA / "gecko" / "prompts.csv"
GENEVAL = DATA / "geneval" / "evaluation_metadata.jsonl"
HALLUSION_BENCH = DATA / "hallusionbench" / "HallusionBench.json"
IMAGE_REWARD = DATA / "imagereward" / "test.json"
POPE_ADVERSARIAL = DATA / "pope" / "coco_pope_adversarial.json"
REAL_CLIP = DATA / "video" / "flipping_a_pancake.mkv"
VBENCH = DATA / "vbench" / "VBench_full_info.json"
VBENCH_I2V = DATA / "vbench" / "vbench2_i2v_full_info.json"


def needs(*public: Path) -> pytest.MarkDecorator:
    """Skip where one of these files is not there, and say which."""
    gone = [str(path.relative_to(DATA.parent)) for path in public if not path.exists()]
    return pytest.mark.skipif(bool(gone), reason=f"not beside this checkout: {', '.join(gone)}")
