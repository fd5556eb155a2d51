"""Fitting scorers through the loop: every head, labels, resuming, export, scoring, what is trained, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting_kit import CPU, LINEAR, PROMPTS, SHAPES, config, fit, pictures, table, tensors
from scorer_kit import TINY, clip_folder
from training_kit import records

from mmalign.backbones.fitted import open_reward, read_reward
from mmalign.cache import Cache
from mmalign.discovery import load_evaluator
from mmalign.evaluation import Backbones, Batch, subscores
from mmalign.jobs import ScoreConfig
from mmalign.jobs_align import EvaluatorSpec
from mmalign.results import read_results
from mmalign.reward_models.clip import FrozenClip
from mmalign.score import run as score
from mmalign.tables import PreferenceRow, write_preferences
from mmalign.tasks.reward import RewardTask
from mmalign.testing import check_evaluator

ACROSS, BY_AXIS = {"table": "t", "pairing": "across"}, {"table": "t", "axes": ["VQ", "TA"]}


@pytest.fixture(scope="module", name="pairs")
def _pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return table(tmp_path_factory.mktemp("pairs"))


HEADS: dict[str, dict[str, Any]] = {
    "linear": LINEAR,
    "gaussian": {"kind": "gaussian"},
    "gpm": {"kind": "gpm"},
    "pal-a": {"kind": "pal", "variant": "A", "prototypes": 2, "dim": 8, "hidden": [16]},
    "pal-b": {"kind": "pal", "prototypes": 2, "dim": 8, "hidden": [16], "similarity": "distance"},
    "vpl": {"kind": "vpl", "latent": 3, "hidden": 16, "context": 4},
}


@pytest.fixture(scope="module", name="fitted")
def _fitted(tmp_path_factory: pytest.TempPathFactory, pairs: Path) -> dict[str, Path]:
    """The export folder of a run of each head, six steps with a checkpoint at four."""
    home = tmp_path_factory.mktemp("fitted")
    found = {}
    for name, head in HEADS.items():
        loss = {"kind": "gaussian_bt" if name == "gaussian" else "bradley_terry"}
        found[name] = fit(home / name, {"table": str(pairs)}, **run_of(head, loss))
    return found


def run_of(head: dict[str, Any], loss: dict[str, Any]) -> dict[str, Any]:
    return {
        "reward": {"train": "head", "head": head}, "loss": loss, "checkpoint": {"every": 4},
        "optim": {"steps": 6, "batch_size": 8, "lr": 3e-3},
    }  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_resuming_ends_in_the_same_bytes(name: str, fitted: dict[str, Path], pairs: Path, tmp_path: Path) -> None:
    loss = {"kind": "gaussian_bt" if name == "gaussian" else "bradley_terry"}
    whole, stopped = fitted[name].parent, tmp_path / "run"
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-00000006")
    shutil.rmtree(stopped / "export")
    fit(stopped, {"table": str(pairs)}, resume=True, **run_of(HEADS[name], loss))
    for file in ("checkpoints/step-00000006/weights.safetensors", "export/head.safetensors", "export/reward.json"):
        assert (stopped / file).read_bytes() == (whole / file).read_bytes(), file


def test_the_loop_learns_and_says_what_it_learned_from(pairs: Path, tmp_path: Path) -> None:
    optim = {"steps": 60, "batch_size": 8, "lr": 5e-3}
    run = fit(
        tmp_path / "run", {"table": str(pairs)}, reward={"train": "head", "head": HEADS["pal-a"]}, optim=optim
    ).parent
    found = records(run)
    assert found[-1]["loss"] < 0.5 * found[0]["loss"], "users who disagree are told apart"
    facts = json.loads((run / "run.json").read_text())
    assert facts["users"] == 4 and facts["head"] == "pal" and "kept all 24 rows; 24 pairs" in facts["data"]
    single = fit(tmp_path / "single", {"table": str(pairs)}, optim=optim)
    assert records(single.parent)[-1]["loss"] > 2 * found[-1]["loss"]


# -------------------------------------------------------------------------------------------------- export and scoring


def test_an_export_scores_as_the_task_did(fitted: dict[str, Path], pairs: Path, tmp_path: Path) -> None:
    """Through `mmalign score` on a table, against the head of the checkpoint and features of the evaluator's towers."""
    folder = pairs.parent / "images"
    paths = sorted(folder.glob("*.png"))
    rows = [
        {"sample": str(i), "media": str(path), "prompt": PROMPTS[i % 4], "user_id": f"user-{i % 5}"}
        for i, path in enumerate(paths)
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    specs = [
        EvaluatorSpec(name="fitted_reward", params={"model": str(fitted["linear"])}),
        EvaluatorSpec(name="personal_reward", params={"model": str(fitted["pal-b"])}),
    ]
    output = score(
        ScoreConfig(table=tmp_path / "t.jsonl", output=tmp_path / "out", evaluators=tuple(specs), device="cpu")
    )
    written = {(row["evaluator"].partition("[")[0], row["sample"]): row["score"] for row in read_results(output).rows}
    prompts, images = [row["prompt"] for row in rows], tensors(paths)
    for name, head in (("fitted_reward", "linear"), ("personal_reward", "pal-b")):
        scorer = open_reward(fitted[head])
        users = [row["user_id"] for row in rows]
        expected = scorer.scores(scorer.features(images, prompts), users)["score"]
        found = torch.tensor([written[name, row["sample"]] for row in rows])
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
        assert expected.std() > 0.01, "the case tells nothing"
    users = [row["user_id"] for row in rows]
    assert "user-4" in users and "user-4" not in read_reward(fitted["pal-b"]).users, "one of them is a stranger"


@pytest.mark.parametrize("name", [name for name in HEADS if name != "gpm"])
def test_fitted_reward_keeps_the_contract(name: str, fitted: dict[str, Path]) -> None:
    if name == "gaussian":  # sub-scores, which score_tensor has not
        evaluator: Any = load_evaluator("fitted_reward", {"model": fitted[name]}, "cpu")
        images = [torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8) for _ in range(3)]
        found = evaluator.score(Batch(images=images, prompts=list(PROMPTS[:3])))
        assert list(subscores(found, 3, "x")) == ["score", "spread"] and (found["spread"] > 0).all()
        return
    check_evaluator("fitted_reward", {"model": str(fitted[name])}, processes=1, tolerance=2e-5)


def test_personal_reward_keeps_the_contract(fitted: dict[str, Path]) -> None:
    params = {"model": str(fitted["vpl"])}
    check_evaluator("personal_reward", params, aux={"user_id": "user-1"}, tolerance=2e-5)
    evaluator: Any = load_evaluator("personal_reward", {**params, "population": False}, "cpu")
    images = [torch.zeros(3, 8, 8, dtype=torch.uint8)] * 2
    aux = [{"user_id": "user-1"}, {"user_id": "stranger"}]
    scores = evaluator.score(Batch(images=images, prompts=["a", "a"], aux=aux))
    assert torch.isfinite(scores[0]) and torch.isnan(scores[1])


def test_towers_are_shared_with_other_scorers(fitted: dict[str, Path]) -> None:
    """The fitted head costs no pass of its own beside hps on the same towers."""
    shared = Backbones()
    hps: Any = load_evaluator("hps", {"checkpoint": "assets/shapes-clip"}, "cpu", backbones=shared)
    ours: Any = load_evaluator("fitted_reward", {"model": fitted["linear"]}, "cpu", backbones=shared)
    assert ours.reward.clip is hps.clip
    calls: list[int] = []
    hps.clip._model.visual.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    batch = Batch(images=[torch.zeros(3, 64, 64, dtype=torch.uint8)] * 2, prompts=["a", "b"])
    hps.score(batch)
    ours.score(batch)
    assert calls == [2]


def test_probabilities_of_preferences(fitted: dict[str, Path]) -> None:
    one, other = (torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8) for _ in range(2))
    for name in HEADS:
        scorer = open_reward(fitted[name])
        sides = [scorer.features(list(images), list(PROMPTS)) for images in (one, other)]
        users = ["user-0", "user-1", "user-2", None]
        p = scorer.probability(*sides, users)
        torch.testing.assert_close(p + scorer.probability(*sides[::-1], users), torch.ones(4), rtol=0, atol=1e-5)
        assert (p - 0.5).abs().max() > 1e-4
        if name == "linear":
            scores = [scorer.scores(side)["score"] for side in sides]
            torch.testing.assert_close(p, torch.sigmoid(scores[0] - scores[1]))
    with pytest.raises(ValueError, match="has no score of a single medium"):
        scorer = open_reward(fitted["gpm"])
        scorer.scores(scorer.features(list(one), list(PROMPTS)))
    with pytest.raises(ValueError, match=r"FittedReward\.probability"):
        load_evaluator("fitted_reward", {"model": fitted["gpm"]}, "cpu")


@pytest.mark.parametrize("name", ["pal-a", "vpl"])
def test_a_new_user_is_learned_and_stored(name: str, fitted: dict[str, Path], pairs: Path, tmp_path: Path) -> None:
    scorer = open_reward(fitted[name])
    images = tensors(sorted((pairs.parent / "images").glob("*.png")))[:8]
    one, other = (scorer.features(side, [PROMPTS[0]] * 4) for side in (images[:4], images[4:]))
    everybody = scorer.features(images, [PROMPTS[1]] * 8)
    before = scorer.scores(everybody, ["user-2"] * 8)["score"]
    scorer.adapt("newcomer", one, other, torch.tensor([1.0, 0.0, 1.0, 1.0]))
    scorer.save(tmp_path / "more")
    again = open_reward(tmp_path / "more")
    assert again.facts.users == (*scorer.facts.users[:4], "newcomer")
    torch.testing.assert_close(
        again.scores(everybody, ["newcomer"] * 8)["score"], scorer.scores(everybody, ["newcomer"] * 8)["score"]
    )
    assert torch.equal(again.scores(everybody, ["user-2"] * 8)["score"], before), "others stay as they were"
    scorer.adapt("newcomer", one, other, torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert len(scorer.facts.users) == 5
    with pytest.raises(ValueError, match="no pairs"):
        scorer.adapt("x", one.rows(slice(0, 0)), other.rows(slice(0, 0)))
    with pytest.raises(ValueError, match="knows no users"):
        open_reward(fitted["linear"]).adapt("x", one, other)


@pytest.mark.parametrize("name", ["pal-a", "vpl"])
def test_labels_of_a_new_user_are_looked_at(name: str, fitted: dict[str, Path]) -> None:
    scorer = open_reward(fitted[name])
    images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(6)]
    one, other = (scorer.features(side, list(PROMPTS[:3])) for side in (images[:3], images[3:]))
    cases: list[tuple[str, torch.Tensor, Any, str]] = [
        ("x", torch.tensor([1.0, float("nan"), 0.0]), other, "the label nan is no probability"),
        ("x", torch.tensor([1.0, -1.0, 0.0]), other, "the label -1 is no probability"),
        ("x", torch.tensor([1.0, 2.0, 0.0]), other, "the label 2 is no probability"),
        ("x", torch.tensor([1.0, 0.0]), other, r"labels of shape \[2\]; give one of each"),
        ("x", torch.tensor([[1.0], [0.0], [1.0]]), other, r"labels of shape \[3, 1\]"),
        ("x", torch.tensor([1.0, 0.0, 1.0]), other.rows(slice(0, 2)), "3 and 2 media"),
        ("", torch.tensor([1.0, 0.0, 1.0]), other, "needs a name"),
    ]
    if name == "vpl":
        cases.append(("x", torch.full((3,), 0.5), other, "every pair is a tie"))
    for user, label, beside, message in cases:
        with pytest.raises(ValueError, match=message):
            scorer.adapt(user, one, beside, label)
        assert "x" not in scorer.facts.users and len(scorer.head.users) == 4
    scorer.adapt("x", one, other, torch.tensor([1, 0, 1]))
    assert scorer.facts.users[-1] == "x"


def test_trained_towers_are_exported_with_their_head(pairs: Path, tmp_path: Path) -> None:
    folder = fit(tmp_path / "run", {"table": str(pairs)}, reward={"head": LINEAR}, optim={"steps": 2, "batch_size": 4})
    scorer = open_reward(folder)
    assert read_reward(folder).backbone == "backbone" and (folder / "backbone" / "open_clip_config.json").is_file()
    task_weights = torch.load(folder.parent / "checkpoints" / "step-00000002" / "state.pt", weights_only=True)
    assert task_weights["step"] == 2
    moved = tmp_path / "elsewhere"
    shutil.move(folder, moved)
    images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)]
    one, two = (s.scores(s.features(images, ["a", "b"]))["score"] for s in (scorer, open_reward(moved)))
    assert torch.equal(one, two), "the folder may be moved"
    path = next((moved / "backbone").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="not the towers"):
        open_reward(moved)


def test_a_cosine_fitted_here_is_the_scaled_score_of_hps(tmp_path: Path) -> None:
    reward = {"unlocked_text": 2, "unlocked_image": 0}
    folder = fit(
        tmp_path / "run", SHAPES, loss={"kind": "pickscore"}, reward=reward, optim={"steps": 2, "batch_size": 4}
    )
    scorer = open_reward(folder)
    hps: Any = load_evaluator("hps", {"checkpoint": folder}, "cpu")
    ours: Any = load_evaluator("fitted_reward", {"model": folder}, "cpu")
    batch = Batch(images=[torch.randint(0, 256, (3, 50, 64), dtype=torch.uint8) for _ in range(3)], prompts=["a"] * 3)
    scale = scorer.clip.logit_scale.exp()
    torch.testing.assert_close(ours.score(batch), scale * hps.score(batch), rtol=1e-4, atol=1e-4)
    check_evaluator("fitted_reward", {"model": str(folder)}, processes=1)


# --------------------------------------------------------------------------------------------------- what is trained


def test_only_the_last_layers_move(tmp_path: Path) -> None:
    """A vision transformer: groups of the image tower and layers of the text tower, as HPS v2 was trained."""
    clip_folder(tmp_path / "vit", "HPS_v2.1_compressed.safetensors", TINY)
    reward = {"unlocked_image": 2, "unlocked_text": 1}
    task = RewardTask(
        config(tmp_path / "run", SHAPES, model={"path": str(tmp_path / "vit")}, loss={"kind": "hps"}, reward=reward),
        CPU,
    )
    free = {name for name, p in task.modules["clip"].named_parameters() if p.requires_grad}
    assert "visual.proj" in free and any(name.startswith("visual.transformer.resblocks.1.") for name in free)
    assert not any(name.startswith("visual.transformer.resblocks.0.") or "conv1" in name for name in free)
    assert {name for name in free if not name.startswith("visual.")} == {"text_projection", "logit_scale"}
    with pytest.raises(ValueError, match="a ResNet tower is trained whole or not at all"):
        RewardTask(config(tmp_path / "run", SHAPES, loss={"kind": "hps"}, reward={"unlocked_image": 2}), CPU)


# -------------------------------------------------------------------------------------------------- frozen features


def test_frozen_features_are_computed_once_and_kept(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    seen: list[int] = []
    embed = FrozenClip.images
    monkeypatch.setattr(FrozenClip, "images", lambda self, media: (seen.append(len(media)), embed(self, media))[1])
    data = {"table": str(pairs), "cache": "disk", "cache_dir": str(tmp_path / "cache")}
    task = RewardTask(config(tmp_path / "a", data), CPU)
    assert sum(seen) <= 16, "each of the 16 pictures once, in however many pairs it stands"
    held = {kind.kind: kind.entries for kind in Cache(tmp_path / "cache").ls()}
    assert held["features"] == sum(seen) + 4
    again = RewardTask(config(tmp_path / "b", data), CPU)
    assert len(seen) == 1 and torch.equal(task.source.image, again.source.image)
    RewardTask(config(tmp_path / "c", data, reward={"train": "head", "head": LINEAR, "antialias": True}), CPU)
    assert len(seen) == 2, "another way to resize is another feature"
    fresh = RewardTask(config(tmp_path / "d", {"table": str(pairs)}), CPU)
    assert torch.equal(fresh.source.image, task.source.image)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": {"train": "head"}}, "reward.train: head needs a head"),
        ({"reward": {"head": {"kind": "own"}}}, "use cosine"),
        ({"reward": {"head": {"kind": "vpl"}}}, "vpl needs frozen towers"),
        ({"reward": {"train": "head", "head": {"kind": "gaussian"}}}, "needs loss.kind: gaussian_bt"),
        ({"loss": {"kind": "gaussian_bt"}}, "needs a spread"),
        ({"loss": {"kind": "mse"}, "reward": {"train": "head", "head": {"kind": "gpm"}}}, "gpm has preferences and no"),
        ({"loss": {"kind": "bt_regression"}, "reward": {"train": "head", "head": {"kind": "gpm"}}}, "no scores"),
        ({"loss": {"kind": "listwise_ce"}, "reward": {"train": "head", "head": {"kind": "vpl"}}}, "takes lists"),
        ({"loss": {"kind": "triplet"}}, "use reward.head: cosine and train: all"),
        ({"loss": {"kind": "bradley_terry", "anchor": 0.1}}, "drop it"),
        ({"loss": {"kind": "contrastive"}}, "contrastive trains two towers"),
        ({"loss": {"kind": "mse"}, "reward": {"train": "head", "head": LINEAR, "swap": 0.5}}, "swap is for pairs"),
        ({"reward": {"train": "head", "head": LINEAR, "denoise": {"ensemble": ["x"], "mode": "margin"}}}, "bt_margin"),
        ({"reward": {"train": "head", "head": LINEAR, "fold": {"of": 3, "left_out": 3}}}, "from 0 to 2"),
        ({"reward": {"train": "head", "head": LINEAR, "unlocked_text": 1}}, "freezes both towers"),
        ({"loss": {"kind": "btt", "k": 1.0}}, "greater than 1"),
        ({"loss": {"kind": "contrastive"}, "reward": {"swap": 0.5}}, "reward.swap is for pairs"),
        ({"data": ACROSS, "reward": {"train": "head", "head": {"kind": "gpm"}}}, "gate looks at one; .* gate: false"),
        ({"data": ACROSS, "loss": {"kind": "triplet"}, "reward": {}}, "this objective looks at one; use pairing: with"),
        ({"data": ACROSS, "loss": {"kind": "hps", "anchor": 0.1}, "reward": {}}, "or bradley_terry without an anchor"),
        ({"data": BY_AXIS, "loss": {"kind": "scaled_bt"}}, "goes by one gap in rewards, and axes have one each"),
        ({"data": BY_AXIS, "loss": {"kind": "bt_margin", "by_gap": True}}, "goes by one gap in rewards"),
        ({"task": "sft", "loss": {"kind": "denoising"}}, "are for task reward"),
        ({"lora": {"rank": 4}}, "lora is not for open_clip"),
        ({"model": {"path": "x", "family": "sdxl"}}, "fits the families open_clip"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_its_reason(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path / "run", **{"data": SHAPES, **changes})


def test_axes_are_refused_where_they_mean_nothing(tmp_path: Path) -> None:
    for data, message in (
        ({"table": "t", "axes": ["a"], "dimension": "a"}, "not both"),
        ({"table": "t", "axes": ["a"], "ties": "half"}, "use ties: soft or drop"),
        ({"table": "t", "axes": ["a", "overall"]}, r"data\.axes: overall is what another score.*another name"),
        ({"table": "t", "axes": ["a", "b", "a"]}, r"data\.axes: a is what another score"),
    ):
        with pytest.raises(ValueError, match=message):
            config(tmp_path / "run", data)
    with pytest.raises(ValueError, match=r"data\.axes needs reward\.head: linear"):
        config(tmp_path / "run", {"table": "t", "axes": ["a"]}, reward={"train": "head", "head": {"kind": "gpm"}})


def test_tables_that_lack_what_is_needed(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mse needs scores, and .* has none; use bradley_terry"):
        RewardTask(config(tmp_path / "run", {"table": str(pairs)}, loss={"kind": "mse"}), CPU)
    with pytest.raises(ValueError, match="needs to know who judged: give rows a user_id"):
        RewardTask(config(tmp_path / "run", SHAPES, reward={"train": "head", "head": HEADS["pal-a"]}), CPU)
    lonely = tmp_path / "lonely.jsonl"
    lines = pairs.read_text().splitlines()[:4]
    lonely.write_text("\n".join(lines) + "\n")
    data = {"table": str(lonely), "root": str(pairs.parent)}
    with pytest.raises(ValueError, match="no user has two that are decided"):
        RewardTask(config(tmp_path / "run", data, reward={"train": "head", "head": HEADS["vpl"]}), CPU)
    media = pictures(tmp_path / "images", 2)
    write_preferences(tmp_path / "t.jsonl", [PreferenceRow("a", (media[0], media[1]), scores={"q": (0.5, 3.0)})])
    with pytest.raises(ValueError, match=r"grade 0\.5, and loss\.ordinal expects whole numbers from 1 to 5"):
        RewardTask(config(tmp_path / "run", {"table": str(tmp_path / "t.jsonl")}, loss={"kind": "ordinal"}), CPU)


def test_resuming_with_other_users_is_refused(fitted: dict[str, Path], pairs: Path, tmp_path: Path) -> None:
    stopped = tmp_path / "run"
    shutil.copytree(fitted["pal-a"].parent, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-00000006")
    shutil.copytree(pairs.parent, tmp_path / "data")
    other = tmp_path / "data" / "pairs.jsonl"
    other.write_text(other.read_text().replace("user-3", "user-1"))
    with pytest.raises(ValueError, match="was begun with other"):
        fit(stopped, {"table": str(other)}, resume=True, **run_of(HEADS["pal-a"], {"kind": "bradley_terry"}))


def test_unreadable_folders_are_named(fitted: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a fitted scorer is the export/ folder of a run"):
        open_reward(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(fitted["linear"], broken)
    facts = json.loads((broken / "reward.json").read_text())
    (broken / "reward.json").write_text(json.dumps({**facts, "format": 2}))
    with pytest.raises(ValueError, match="no description of a fitted scorer that this version reads"):
        open_reward(broken)
    (broken / "reward.json").write_text(json.dumps({**facts, "backbone": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match=r"frozen towers of .* which are not there"):
        open_reward(broken)
    (broken / "reward.json").write_text(json.dumps({**facts, "head": {"kind": "linear", "hidden": [7]}}))
    with pytest.raises(ValueError, match="of the wrong shape"):
        open_reward(broken)
    with pytest.raises(ValueError, match=r"knows no user 'user-9'\. Did you mean 'user-"):
        load_evaluator("fitted_reward", {"model": fitted["vpl"], "user": "user-9"}, "cpu")
    with pytest.raises(ValueError, match="knows no users; fit one of pal, vpl"):
        load_evaluator("personal_reward", {"model": fitted["linear"]}, "cpu")


def test_nan_names_the_rows(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pairs\.jsonl line \d+"):
        fit(tmp_path / "run", {"table": str(pairs)}, optim={"steps": 9, "batch_size": 8, "lr": 1e30})
