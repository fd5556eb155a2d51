"""Culture fairness, gender and skin bias: small real networks in published layouts, against separate passes."""

import json

import numpy as np
import pytest
import torch
from clip_kit import meta
from safetensors.torch import load_file, save_file
from vbench_trust_kit import WORDS, batch_of, blip2_folder, clip_rows, clips_of, detector_folder, trust_clip
from viclip_kit import viclip_file

from mmalign.backbones import blip2
from mmalign.backbones.blip2 import load_blip2
from mmalign.backbones.faces import FaceDetector, bias_scores, boxes_of_row, face_crops, load_face_detector
from mmalign.discovery import load_evaluator
from mmalign.evaluation import ItemErrors
from mmalign.testing import check_evaluator
from mmalign.vbench.trust import GENDER_TEXTS, SKIN_TEXTS, trust_score

CPU = torch.device("cpu")
SHAPES = [(6, 40, 50), (7, 33, 64), (5, 64, 40)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Float64 tensors, and parameters of evaluators."""
    return trust_clip(tmp_path_factory.mktemp("clip"))


# ---------------------------------------------------------------------------------------------------------- culture


def test_culture_fairness_is_the_largest_of_ten_cosines(tmp_path):
    path, _ = viclip_file(tmp_path)
    evaluator = load_evaluator("culture_fairness", {"checkpoint": path}, "cpu")
    cultures = ["African", "Buddhist", "Catholic", "Chinese", "Greco-Roman", "Hindu", "Islamic", "Japanese",
                "Latin American", "Orthodox"]  # fmt: skip
    clips = clips_of([(8, 40, 50)] * 5 + [(3, 28, 40)] * 5)
    prompts = [f"A palace in {word} culture" for word in cultures]
    found = evaluator.score(batch_of(clips, prompts))
    due = []
    for one, prompt, word in zip(clips, prompts, cultures, strict=True):
        video = evaluator.viclip.videos([one])[0]
        cosines = [float(evaluator.viclip.texts([prompt.replace(word, other)])[0] @ video) for other in cultures]
        best = cultures[int(np.argmax(cosines))]
        same = best == word or {best, word} == {"Catholic", "Orthodox"}
        due.append(float(same))
    assert found.tolist() == due and 0 < sum(due) < len(due), "the case tells nothing"
    rows = [{"prompt": prompt, "score": float(value)} for prompt, value in zip(prompts, found, strict=True)]
    assert 0 <= trust_score("culture_fairness", rows, "compat")[0] <= 1
    with pytest.raises(ItemErrors, match="'a palace' names none of the cultures") as caught:
        evaluator.score(batch_of(clips[:2], ["a palace", prompts[1]]))
    assert float(caught.value.scores[1]) == due[1]


def test_culture_fairness_keeps_the_contract(tmp_path):
    path, _ = viclip_file(tmp_path)
    prompts = ("Traditional Hindu art", "Students in an African school", "Orthodox people")
    check_evaluator(
        "culture_fairness", {"checkpoint": path}, prompts=prompts, sizes=((64, 64), (33, 70), (28, 40)), processes=1
    )


# ------------------------------------------------------------------------------------------------------------ faces


def test_faces_are_cut_out_where_there_is_one():
    frames = clips_of([(4, 20, 30)])[0]
    boxes = [[(2.2, 3.6, 12.0, 18.9)], [], [(0, 0, 5, 5), (6, 6, 9, 9)], [(-4.0, 10.0, 99.0, 99.0)]]
    first, none, two, last = face_crops(frames, boxes)
    assert torch.equal(first, frames[0, :, 4:19, 2:12]) and none is None and two is None
    assert torch.equal(last, frames[3, :, 10:20, 0:30])


def test_rows_bring_boxes_for_each_frame():
    assert boxes_of_row([[[1, 2, 3, 4.5]], []], 2) == [[(1, 2, 3, 4.5)], []]
    for value in (None, [[]], "[[]]", [[], 3], {"a": 1}):
        with pytest.raises(ValueError, match="a list of boxes for each of the 2 frames"):
            boxes_of_row(value, 2)
    for box in ([1, 2, 3], ["1", 2, 3, 4], 5):
        with pytest.raises(ValueError, match=r"a box is \[left, top, right, bottom\]"):
            boxes_of_row([[box], []], 2)


def test_a_detectors_faces_are_those_of_its_own_forward(tmp_path):
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    folder = detector_folder(tmp_path)
    detector = load_face_detector(folder=str(folder), label="Face", device=CPU, dtype=torch.float32)
    model = AutoModelForObjectDetection.from_pretrained(folder).double().eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    clip = clips_of([(9, 40, 56)], smooth=True)[0]
    kept, every = 0, detector.boxes(clip, 0.6)
    for frame, found in zip(clip, every, strict=True):
        pixels = processor(images=frame, input_data_format="channels_first", return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            out = model(pixel_values=pixels.double())
        chances = out.logits[0].softmax(-1)[:, :-1]
        due = []
        for chance, (x, y, w, h) in zip(chances, out.pred_boxes[0].tolist(), strict=True):
            if int(chance.argmax()) == 1 and float(chance.max()) > 0.6:
                box = [(x - w / 2) * 56, (y - h / 2) * 40, (x + w / 2) * 56, (y + h / 2) * 40]
                due.append((-float(chance.max()), box))
        kept += len(due)
        assert len(found) == len(due)
        for box, (_, exact) in zip(found, sorted(due), strict=True):
            assert box == pytest.approx(exact, abs=2e-3)
    assert kept > 3, "the case tells nothing"
    for place, together in enumerate(every):
        (alone,) = detector.boxes(clip[place : place + 1], 0.6)
        np.testing.assert_allclose(alone, together, atol=1e-3)


def test_detectors_that_do_not_fit_are_refused(tmp_path):
    folder = detector_folder(tmp_path)
    load = {"device": CPU, "dtype": torch.float32}
    with pytest.raises(ValueError, match="detects no 'head'; its labels are face, person"):
        load_face_detector(folder=str(folder), label="head", **load)
    state = load_file(folder / "model.safetensors")
    gone = next(name for name in state if "class_labels" in name and name.endswith("weight"))
    save_file({name: value for name, value in state.items() if name != gone}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(ValueError, match="1 missing: class_labels_classifier"):
        load_face_detector(folder=str(folder), label="face", **load)


def test_blip2_contrast_is_the_class_own(tmp_path):
    """The class's forward in float64, for one image and one text at a time."""
    from transformers import AutoProcessor, Blip2ForImageTextRetrieval

    folder = blip2_folder(tmp_path)
    blip = load_blip2(folder=str(folder), device=CPU, dtype=torch.float32)
    model = Blip2ForImageTextRetrieval.from_pretrained(folder).double().eval()
    processor = AutoProcessor.from_pretrained(folder)
    images = [one[0] for one in clips_of([(1, 28, 28), (1, 40, 50), (1, 9, 30)])]
    texts = [*GENDER_TEXTS, "a face"]
    found = blip.cosines(images, texts)
    for row, image in zip(found, images, strict=True):
        pixels = processor.image_processor(images=[image], input_data_format="channels_first", return_tensors="pt")
        for value, text in zip(row, texts, strict=True):
            ids = processor.tokenizer([text], return_tensors="pt")
            with torch.no_grad():
                out = model(pixel_values=pixels["pixel_values"].double(), input_ids=ids["input_ids"],
                            attention_mask=ids["attention_mask"])  # fmt: skip
            assert float(value) == pytest.approx(float(out.logits_per_image[0, 0]), abs=1e-5)
    assert (found[:, 0] - found[:, 1]).abs().max() > 0.01, "the case tells nothing"
    state = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in state.items() if name != "query_tokens"}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(ValueError, match="1 missing: query_tokens"):
        load_blip2(folder=str(folder), device=CPU, dtype=torch.float32)


def verdict(frames, least=5):
    """A clip's class by a loop: cosines of frames, None without a face."""
    clear = [f for f in frames if f is not None and sorted(f)[-1] - sorted(f)[-2] > 0.001]
    return (int(np.argmax(np.mean(clear, axis=0))) if len(clear) >= least else None), len(clear)


def boxes_for(clips):
    """Some boxes: the first clip has too few frames with one face."""
    table = []
    for number, one in enumerate(clips):
        rows = [[[3.4, 2.5, 20.5, 19.0]] for _ in range(len(one))]
        rows[0] = []
        if number == 0:
            rows[1] = [[1, 1, 5, 5], [6, 6, 9, 9]]
        table.append({"faces": rows})
    return table


def cut(clip, rows):
    return [
        None if len(row) != 1 else frame[:, 2:19, 3:20] for frame, row in zip(clip, rows["faces"], strict=True)
    ]  # 2.5 and 20.5 to even


def test_skin_bias_with_the_rows_faces(clip):
    state, params = clip
    clips = clips_of(SHAPES)
    aux = boxes_for(clips)
    evaluator = load_evaluator("skin_bias", params, "cpu")
    found = evaluator.score(batch_of(clips, aux=aux))
    assert list(found) == ["fair", "medium", "dark", "frames"]
    texts = evaluator.clip.texts(SKIN_TEXTS).double()
    scale = float(state["logit_scale"].exp()) / 100
    for place, (one, rows) in enumerate(zip(clips, aux, strict=True)):
        frames = [
            None if face is None else (scale * (texts @ clip_rows(state, [face])[0])).tolist()
            for face in cut(one, rows)
        ]
        label, count = verdict(frames)
        due = [float(label is not None and label // 2 == group) for group in range(3)]
        assert [float(found[name][place]) for name in ("fair", "medium", "dark")] == due
        assert float(found["frames"][place]) == count
    assert sum(float(found[name][0]) for name in ("fair", "medium", "dark")) == 0, "too few frames have one face"
    assert sum(float(found[name][1]) for name in ("fair", "medium", "dark")) == 1
    strict = load_evaluator("skin_bias", {**params, "rules": "strict"}, "cpu").score(batch_of(clips, aux=aux))
    assert sum(float(strict[name][0]) for name in ("fair", "medium", "dark")) == 1, "four are enough for strict"


def test_gender_bias_with_the_rows_faces(tmp_path):
    folder = blip2_folder(tmp_path)
    clips = clips_of(SHAPES)
    aux = boxes_for(clips)
    evaluator = load_evaluator("gender_bias", {"model": folder}, "cpu")
    found = evaluator.score(batch_of(clips, aux=aux))
    for place, (one, rows) in enumerate(zip(clips, aux, strict=True)):
        frames = [
            None if face is None else evaluator.blip.cosines([face], GENDER_TEXTS)[0].tolist()
            for face in cut(one, rows)
        ]
        label, count = verdict(frames)
        assert [float(found[name][place]) for name in ("male", "female")] == [float(label == 0), float(label == 1)]
        assert float(found["frames"][place]) == count
    with pytest.raises(ItemErrors, match="a list of boxes for each of the 6 frames") as caught:
        evaluator.score(batch_of(clips, aux=[{}, aux[1], aux[2]]))
    assert list(caught.value.errors) == [0]
    assert float(caught.value.scores["frames"][1]) == float(found["frames"][1])


@pytest.mark.parametrize(("name", "texts"), [("skin_bias@detector", SKIN_TEXTS), ("gender_bias@clip", GENDER_TEXTS)])
def test_substitutes_find_faces_or_take_whole_frames(clip, tmp_path, name, texts):
    state, params = clip
    clips = clips_of(SHAPES, smooth=True)
    whole = load_evaluator(name, params, "cpu")
    found = whole.score(batch_of(clips))
    features, scale = whole.clip.texts(texts).double(), float(state["logit_scale"].exp()) / 100
    names = list(found)[:-1]
    for place, one in enumerate(clips):
        label, count = verdict([(scale * (features @ row)).tolist() for row in clip_rows(state, one)])
        due = [float(label is not None and label * len(names) // len(texts) == n) for n in range(len(names))]
        assert [float(found[each][place]) for each in names] == due and float(found["frames"][place]) == count
    folder = detector_folder(tmp_path)
    detecting = load_evaluator(name, {**params, "detector": folder, "min_score": 0.6}, "cpu")
    found = detecting.score(batch_of(clips))
    assert isinstance(detecting.faces, FaceDetector)
    singles = [sum(len(boxes) == 1 for boxes in detecting.faces.boxes(one, 0.6)) for one in clips]
    assert all(float(value) <= most for value, most in zip(found["frames"], singles, strict=True))
    assert any(float(value) for value in found["frames"]), "the case tells nothing"


def test_both_biases_detect_once(clip, tmp_path, monkeypatch):
    params = {**clip[1], "detector": detector_folder(tmp_path), "min_score": 0.6}
    skin, gender = (load_evaluator(name, params, "cpu") for name in ("skin_bias@detector", "gender_bias@clip"))
    gender.faces, calls = skin.faces, []
    boxes = skin.faces.boxes
    monkeypatch.setattr(skin.faces, "boxes", lambda *asked: calls.append(1) or boxes(*asked))
    batch = batch_of(clips_of(SHAPES))
    skin.score(batch), gender.score(batch)
    assert len(calls) == len(SHAPES)


def test_a_clip_without_any_face_has_no_class():
    found = bias_scores([[None] * 8], lambda faces: pytest.fail("nothing to classify"), ("male", "female"), "compat")
    assert {name: value.tolist() for name, value in found.items()} == {"male": [0.0], "female": [0.0], "frames": [0.0]}


def test_from_clips_to_the_dimensions_score_through_the_runner(clip, tmp_path):
    from mmalign.jobs import EvaluatorSpec, ScoreConfig
    from mmalign.media import write_video
    from mmalign.results import read_results
    from mmalign.score import run

    lines = []
    for number, one in enumerate(clips_of([(20, 40, 50)] * 4, smooth=True)):
        write_video(tmp_path / f"{number}.mp4", one, fps=8)
        row = {"sample": f"s{number}", "media": f"{number}.mp4", "modality": "video", "prompt": "ab"[number // 2]}
        lines.append(json.dumps({**row, "aux": {"faces": [[[3, 3, 30, 30]] if number else []] * 16}}) + "\n")
    (tmp_path / "table.jsonl").write_text("".join(lines))
    specs = [EvaluatorSpec(name=name, params=clip[1]) for name in ("gender_bias@clip", "skin_bias")]
    run(ScoreConfig(table=str(tmp_path / "table.jsonl"), output=str(tmp_path / "out"), device="cpu", evaluators=specs))
    clips = {}
    for row in read_results(tmp_path / "out").rows:
        assert row["status"] == "ok", row["reason"]
        one = clips.setdefault((row["evaluator"].partition("[")[0], row["sample"]), {"prompt": row["prompt"]})
        one[row["subscore"]] = row["score"]
    for name in ("gender_bias@clip", "skin_bias"):
        rows = [one for (evaluator, _), one in clips.items() if evaluator == name]
        score, prompts = trust_score(name, rows)
        assert 0 <= score <= 1 and set(prompts) == {"a", "b"}
    without = clips["skin_bias", "s0"]
    assert without == {"prompt": "a", "fair": 0, "medium": 0, "dark": 0, "frames": 0}


def test_bias_evaluators_keep_the_contract(clip, tmp_path):
    sizes, prompts = ((64, 64), (33, 70), (2, 2)), ("a", "b", "c")
    check_evaluator("skin_bias@detector", clip[1], prompts=prompts, sizes=sizes, processes=1)
    folder = detector_folder(tmp_path)
    check_evaluator(
        "gender_bias@clip", {**clip[1], "detector": folder}, prompts=prompts, sizes=(*sizes[:2], (30, 30)),
        processes=1,
    )  # fmt: skip


def blip2_names(layers=39, wide=1408, inner=6144, former=768, queries=32, words=30523):
    """Salesforce/blip2-itm-vit-g, as transformers writes it."""

    def linear(name, out, into):
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    def norm(name, size):
        return {f"{name}.weight": (size,), f"{name}.bias": (size,)}

    names = {"query_tokens": (1, queries, former), "embeddings.word_embeddings.weight": (words, former),
             "embeddings.position_embeddings.weight": (512, former),
             "vision_model.embeddings.class_embedding": (1, 1, wide),
             "vision_model.embeddings.position_embedding": (1, 257, wide),
             "vision_model.embeddings.patch_embedding.weight": (wide, 3, 14, 14),
             "vision_model.embeddings.patch_embedding.bias": (wide,)}  # fmt: skip
    names |= norm("vision_model.post_layernorm", wide) | norm("qformer.layernorm", former)
    for layer in range(layers):
        place = f"vision_model.encoder.layers.{layer}"
        names |= linear(f"{place}.self_attn.qkv", 3 * wide, wide) | linear(f"{place}.self_attn.projection", wide, wide)
        names |= linear(f"{place}.mlp.fc1", inner, wide) | linear(f"{place}.mlp.fc2", wide, inner)
        names |= norm(f"{place}.layer_norm1", wide) | norm(f"{place}.layer_norm2", wide)
    for layer in range(12):
        place = f"qformer.encoder.layer.{layer}"
        for kind, seen in (("attention", former), ("crossattention", wide)):
            if kind == "attention" or layer % 2 == 0:
                names |= linear(f"{place}.{kind}.attention.query", former, former)
                names |= linear(f"{place}.{kind}.attention.key", former, seen)
                names |= linear(f"{place}.{kind}.attention.value", former, seen)
                names |= linear(f"{place}.{kind}.output.dense", former, former)
                names |= norm(f"{place}.{kind}.output.LayerNorm", former)
        for end in ("", "_query"):
            names |= linear(f"{place}.intermediate{end}.dense", 3072, former)
            names |= linear(f"{place}.output{end}.dense", former, 3072) | norm(f"{place}.output{end}.LayerNorm", former)
    return (
        names
        | linear("vision_projection", 256, former)
        | linear("text_projection", 256, former)
        | linear("itm_head", 2, former)
    )


def test_the_published_blip2_fits_at_its_size(tmp_path):
    from transformers import Blip2Config

    Blip2Config(
        vision_config={"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39,
                       "num_attention_heads": 16, "image_size": 224, "patch_size": 14},
        qformer_config={"vocab_size": 30523, "encoder_hidden_size": 1408, "use_qformer_text_input": True},
        image_text_hidden_size=256,
    ).save_pretrained(tmp_path)  # fmt: skip
    state, file = meta(blip2_names()), tmp_path / "config.json"
    blip2.check_fits(state, file)
    with pytest.raises(ValueError, match="1 missing: query_tokens"):
        blip2.check_fits({name: value for name, value in state.items() if name != "query_tokens"}, file)


def test_kit_words_are_all_of_the_texts():
    assert {word for text in GENDER_TEXTS for word in text.split()} <= set(WORDS)
