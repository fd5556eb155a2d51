"""The contract, discovery in the folder and through entry points, and the conformance kit's own eyesight."""

import json
import os
import subprocess
import sys

import pytest
import torch
from plugin_package import install

from mmalign.discovery import evaluator_class, find_evaluators, load_evaluator
from mmalign.evaluation import (
    Backbones,
    BackboneSpec,
    Batch,
    Evaluator,
    SetEvaluator,
    check_class,
    resolve_device,
    subscores,
)
from mmalign.testing import check_evaluator

SHIPPED = {"hps", "clip_score", "aesthetic"}


# ------------------------------------------------------------------------------------------------ batches


def test_batch_takes_items_and_shares_work():
    batch = Batch(
        images=[torch.full((3, 2, 2), i) for i in range(3)], prompts=["a", "b", "c"], aux=[{"n": i} for i in range(3)]
    )
    assert len(batch) == 3 and [clip.shape[0] for clip in batch.clips()] == [1, 1, 1]
    part = batch.take([2, 0])
    assert part.prompts == ["c", "a"] and part.aux == [{"n": 2}, {"n": 0}] and int(part.images[0][0, 0, 0]) == 2
    assert part.frames == [] and part.references == []
    calls = []
    assert batch.shared("key", lambda: calls.append(1) or 5) == 5
    assert batch.shared("key", lambda: calls.append(1) or 6) == 5
    assert calls == [1]
    assert part.shared("key", lambda: 7) == 7, "a taken batch has other items, so it shares nothing"


def test_backbones_load_once_per_loader_arguments_device_and_dtype():
    loads = []

    def loader(*, size, device, dtype):
        loads.append((size, device, dtype))
        return object()

    shared, cpu = Backbones(), torch.device("cpu")
    first = shared.get(BackboneSpec.of(loader, size=1), cpu, torch.float32)
    assert shared.get(BackboneSpec.of(loader, size=1), cpu, torch.float32) is first
    assert shared.get(BackboneSpec.of(loader, size=2), cpu, torch.float32) is not first
    assert shared.get(BackboneSpec.of(loader, size=1), cpu, torch.bfloat16) is not first
    assert len(loads) == 3


def test_subscores_refuse_what_is_no_score():
    assert subscores(torch.ones(2), 2, "x")["score"].dtype == torch.float64
    with pytest.raises(TypeError, match=r"a tensor of torch\.int64 for 'score'"):
        subscores(torch.ones(2, dtype=torch.long), 2, "x")
    with pytest.raises(TypeError, match="list"):
        subscores([1.0, 2.0], 2, "x")
    with pytest.raises(ValueError, match=r"shape \[2, 1\].*expected \[2\]"):
        subscores({"a": torch.ones(2, 1)}, 2, "x")


def test_contract_names_every_wrong_declaration():
    class Wrong(Evaluator):
        needs = {"image", "sound"}
        modality = {"video"}

    with pytest.raises(TypeError) as error:
        check_class(Wrong, "here")
    for part in ("does not define score", "'sound'", "needs 'frames', not 'image'", "licence", "source"):
        assert part in str(error.value)
    with pytest.raises(TypeError, match="not a subclass"):
        check_class(print, "here")


def test_a_set_evaluator_has_to_define_both_of_its_methods():
    class Half(SetEvaluator):
        needs = {"image"}
        modality = {"image"}
        licence = "Apache-2.0"
        source = "a test"

        def update(self, batch):
            self.seen = batch

    with pytest.raises(TypeError, match=r"Half breaks the evaluator contract: does not define compute\.$"):
        check_class(Half, "here")

    class Whole(Half):
        def compute(self):
            return 0.0

    assert check_class(Whole, "here") is Whole


def test_a_differentiable_evaluator_has_to_define_score_tensor():
    class Flat(Evaluator):
        needs = {"image"}
        modality = {"image"}
        licence = "Apache-2.0"
        source = "a test"

        def score(self, batch):
            return torch.zeros(len(batch))

    assert check_class(Flat, "here") is Flat
    Flat.differentiable = True
    with pytest.raises(TypeError, match="does not define score_tensor, which a differentiable one has"):
        check_class(Flat, "here")
    Flat.score_tensor = lambda self, images, prompts: images.mean(dim=(1, 2, 3))
    assert check_class(Flat, "here") is Flat
    Flat.differentiable = False
    with pytest.raises(TypeError, match="has score_tensor, but does not say differentiable = True"):
        check_class(Flat, "here")


def test_the_kit_follows_the_gradient_to_the_pixels_of_every_image():
    """A sum over the batch would not see the images that are left out."""
    from mmalign.testing.evaluators import _check_gradient

    class Half(Evaluator):
        needs, modality, licence, source, differentiable = {"image"}, {"image"}, "Apache-2.0", "a test", True
        kept = 2

        def score(self, batch):
            return torch.stack([image.float().mean() / 255 for image in batch.images])

        def score_tensor(self, images, prompts):
            means = images.mean(dim=(1, 2, 3))
            return torch.where(torch.arange(len(means)) < self.kept, means, means.detach())

    half = Half(Half.Params(), {}, torch.device("cpu"))
    with pytest.raises(AssertionError, match=r"does not reach the pixels of the images \[2, 3\]"):
        _check_gradient(half, ["a"] * 4, 1e-5, 0)
    half.kept = 4
    _check_gradient(half, ["a"] * 4, 1e-5, 0)


def test_the_kit_gives_clips_to_those_that_score_these_alone():
    """The gradient has to reach every clip; one frame is scored or refused, by all items and in words; counts have no
    bounds."""
    from mmalign.testing.evaluators import _check_gradient, _check_values, _media, _refused

    class Change(Evaluator):
        needs, modality, licence, source, differentiable = {"frames"}, {"video"}, "Apache-2.0", "a test", True
        counts, smallest, words = frozenset({"pairs"}), 0, "one frame has no neighbour"

        def score(self, batch):
            if any(len(clip) < 2 and clip.shape[-1] > self.smallest for clip in batch.frames):
                raise ValueError(self.words)
            means = torch.stack([self._mean(clip.float() / 255) for clip in batch.frames])
            return {"score": means, "pairs": torch.tensor([float(len(clip) - 1) for clip in batch.frames])}

        def score_tensor(self, images, prompts):
            return torch.stack([self._mean(clip) for clip in images])

        def _mean(self, clip):
            return (clip[1:] - clip[:-1]).abs().mean() if len(clip) > 1 else clip.mean() * 0

    change = Change(Change.Params(), {}, torch.device("cpu"))
    change.name = "change"
    _check_gradient(change, ["a"] * 2, 1e-5, 0)
    sizes = [(8, 8), (9, 20)]
    one, three = (Batch(frames=_media(sizes, frames, 0), prompts=["a"] * 2) for frames in (1, 3))
    _check_values(change, three, "change", (0.0, 1.0), 0.0)
    assert _refused(change, one, "change") and not _refused(change, three, "change")
    change.smallest = 10
    with pytest.raises(AssertionError, match=r"the items \[1\] are refused and the others are scored"):
        _refused(change, one, "change")
    change.smallest, change.words = 0, ""
    with pytest.raises(AssertionError, match="a ValueError without words"):
        _refused(change, one, "change")


def test_unknown_devices_say_what_is_known():
    with pytest.raises(ValueError, match="auto, cpu, cuda"):
        resolve_device("gpu")


# ------------------------------------------------------------------------------------------------ discovery


def test_shipped_evaluators_are_listed_without_being_imported():
    code = """
import json, sys
from mmalign.discovery import find_evaluators
found = find_evaluators(plugins=False)
heavy = ("mmalign.evaluators.", "open_clip.", "transformers.")
loaded = [name for name in sys.modules if f"{name}.".startswith(heavy) and name != "mmalign.evaluators"]
assert not loaded, loaded
print(json.dumps({name: [f.summary, f.error] for name, f in found.items()}))
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    found = json.loads(output.splitlines()[-1])
    assert set(found) >= SHIPPED
    for name, (summary, error) in found.items():
        assert error is None and len(summary) > 20, name


def test_unknown_names_get_the_nearest_one():
    with pytest.raises(ValueError, match=r"no evaluator 'aestetic'.*Did you mean 'aesthetic'\?.*Known are: .*hps"):
        load_evaluator("aestetic")


def test_plugins_are_found_and_may_be_left_out(plugins):
    found = find_evaluators()
    assert found["brightness"].summary == "Mean of all pixels, from 0 to 1."
    assert "plug-in 1.2.3" in found["brightness"].origin
    assert "brightness" not in find_evaluators(plugins=False)
    assert evaluator_class("brightness").__name__ == "Brightness"


def test_a_broken_declaration_is_listed_with_its_maker(plugins):
    error = find_evaluators()["nameless"].error
    assert "plug-in 1.2.3" in error and "licence is empty" in error
    with pytest.raises(TypeError, match="licence is empty"):
        load_evaluator("nameless")


def test_a_name_used_twice_is_an_error_that_names_both(plugins, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(install(tmp_path / "more", {"hps": "other_code:Brightness"}, "other")))
    found = find_evaluators()["hps"]
    assert "built in" in found.error and "other 1.2.3" in found.error
    with pytest.raises(ValueError, match="used twice"):
        load_evaluator("hps")
    assert find_evaluators()["clip_score"].error is None


def test_an_external_package_is_found_listed_and_run_and_a_broken_one_named(tmp_path):
    """From outside, as a user has it: two distributions on the path, one good and one that cannot be imported."""
    site = install(tmp_path / "site")
    install(site, {"ruined": "ruined_code:Nothing"}, "ruined", "import a_module_that_nobody_has\n")
    code = """
import json, sys
import numpy as np
from mmalign.discovery import find_evaluators
from mmalign.jobs import ScoreConfig
from mmalign.media import write_image
from mmalign.score import run
found = find_evaluators()
folder = sys.argv[1]
for value in (0, 51, 255):
    write_image(f"{folder}/{value}.png", np.full((8, 9, 3), value, np.uint8))
table, out = f"{folder}/table.jsonl", f"{folder}/out"
with open(table, "w") as file:
    file.writelines(json.dumps({"media": f"{value}.png"}) + "\\n" for value in (0, 51, 255))
run(ScoreConfig(table=table, output=out, evaluators=[{"name": "brightness"}], device="cpu"))
summary = json.load(open(f"{out}/summary.json"))
print(json.dumps({"found": {n: [f.origin, f.error] for n, f in found.items()}, "summary": summary}))
"""
    env = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    origin, error = result["found"]["ruined"]
    assert "ruined 1.2.3" in origin and "a_module_that_nobody_has" in error and "ruined 1.2.3" in error
    assert all(result["found"][name][1] is None for name in SHIPPED | {"brightness"})
    assert result["summary"]["evaluators"]["brightness"]["mean"] == pytest.approx(0.4)


# ------------------------------------------------------------------------------------------------ the kit


def test_the_kit_passes_a_good_evaluator(plugins):
    check_evaluator("brightness", processes=1)


def test_the_kit_sees_dependence_on_the_batch(plugins):
    with pytest.raises(AssertionError, match="depends on the rest of the batch"):
        check_evaluator("neighbourly", processes=1)


def test_the_kit_sees_scores_out_of_range(plugins):
    with pytest.raises(AssertionError, match=r"above 1\.0"):
        check_evaluator("unbounded", processes=1)


def test_the_kit_sees_scores_that_are_not_finite(plugins):
    with pytest.raises(AssertionError, match="'words' is not finite"):
        check_evaluator("words", processes=1, prompts=("one", "two words"), sizes=((8, 8), (9, 9)))
