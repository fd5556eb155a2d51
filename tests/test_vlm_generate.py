"""Answers in words: batches against single questions, images or none, seeds, lengths, adapters."""

import pytest
import torch
from vlm_kit import FAMILIES, SEVERAL, clips, vlm_folder

from mmalign.backbones.vlm import load_vlm
from mmalign.backbones.vlm_generate import Asked, Decoding, _Draw

CPU = torch.device("cpu")
GREEDY = Decoding(8)


@pytest.fixture(scope="module", name="models")
def _models(tmp_path_factory):
    folders = {name: vlm_folder(tmp_path_factory.mktemp(name), name) for name in (*FAMILIES, "qwen3_vl")}
    loaded = {}

    def get(family, dtype=torch.float32, **kwargs):
        key = (family, dtype, *kwargs.items())
        if key not in loaded:
            loaded[key] = load_vlm(folder=str(folders[family]), device=CPU, dtype=dtype, **kwargs)
        return loaded[key]

    get.folders = folders
    return get


def questions(vlm, several=True):
    """Questions of several lengths about pictures of several sizes: one, none, and two where the family reads them."""
    pictures = [clip[0] for clip in clips([(28, 28), (40, 70), (56, 28), (28, 84)])]
    asked = [
        ("Is it red?", pictures[:1]),
        ("Describe the circle, please, in a sentence.", pictures[1:2]),
        ("Is it?", []),
    ]
    if several:
        asked += [("Which of them is red, the first or the second?", pictures[2:4])]
    asked += [("Please answer with Yes or No: does a bird sing?", []), ("x", pictures[3:])]
    return [Asked(vlm.words.chat(text, len(images)), tuple(images), seed=7) for text, images in asked]


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_vl"])
def test_a_batch_answers_as_single_questions_do(models, family):
    vlm = models(family)
    asked = questions(vlm, family in SEVERAL)
    together = vlm.writer.write(asked, GREEDY)
    alone = [vlm.writer.write([one], GREEDY)[0] for one in asked]
    backwards = vlm.writer.write(asked[::-1], GREEDY)[::-1]
    assert together == alone == backwards
    assert len({one.text for one in together}) > 1, "the questions matter"
    assert vlm._processor.tokenizer.padding_side == load_side(models.folders[family])


def load_side(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).padding_side


def test_greedy_answers_are_those_of_generate(models):
    vlm = models("qwen2_vl")
    asked = [one for one in questions(vlm) if len(one.images) == 1]
    found = [one.text for one in vlm.writer.write(asked, GREEDY)]
    assert found == vlm.generate([torch.stack(one.images) for one in asked], [one.text for one in asked], 8)


def test_a_sampled_answer_depends_on_its_seed_alone(models):
    vlm = models("qwen2_vl")
    draw = Decoding(8, temperature=1.0, top_p=0.9)
    text, image = vlm.words.chat("Is it red?", 1), clips([(28, 28)])[0][0]
    asked = [Asked(text, (image,), seed) for seed in range(6)]
    together = vlm.writer.write(asked, draw)
    assert together == [vlm.writer.write([one], draw)[0] for one in asked]
    assert len({one.text for one in together}) > 3
    assert together[2] == vlm.writer.write([Asked(text, (image,), 2), *questions(vlm)], draw)[0]
    cold = vlm.writer.write(asked, Decoding(8, temperature=1e-6))
    assert {one.text for one in cold} == {vlm.writer.write(asked[:1], GREEDY)[0].text}


def test_draws_follow_the_probabilities_and_keep_to_the_nucleus():
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    for top_p, due in ((1.0, [0.5, 0.3, 0.15, 0.05]), (0.7, [0.625, 0.375, 0, 0]), (0.4, [1, 0, 0, 0])):
        drawn = _Draw(range(4000), Decoding(1, 1.0, top_p))(torch.zeros(0), scores).argmax(dim=1)
        shares = torch.bincount(drawn, minlength=4) / 4000
        assert shares.tolist() == pytest.approx(due, abs=0.03)
        assert all(share == 0 for share, wanted in zip(shares, due, strict=True) if not wanted)
    sharp = _Draw(range(4000), Decoding(1, 0.5))(torch.zeros(0), scores).argmax(dim=1)
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert (torch.bincount(sharp, minlength=4) / 4000).tolist() == pytest.approx(
        (squares / squares.sum()).tolist(), abs=0.03
    )


def test_a_question_that_is_too_long_is_left_out(models):
    vlm = models("qwen2_vl")
    image = clips([(28, 28)])[0][0]
    short, long = (vlm.words.chat(text, 1) for text in ("Is it?", "z " * 9000))
    found = vlm.writer.write([Asked(short, (image,)), Asked(long, (image,)), Asked(short, (image,))], GREEDY)
    assert isinstance(found[1], ValueError) and "this qwen2_vl model reads 8192; shorten the prompt" in str(found[1])
    assert found[0] == found[2] == vlm.writer.write([Asked(short, (image,))], GREEDY)[0]


def test_the_number_of_tokens_and_a_cut_are_told(models):
    vlm = models("qwen2_vl")
    asked = questions(vlm)
    whole = vlm.writer.write(asked, Decoding(200))
    cut = vlm.writer.write(asked, Decoding(3))
    assert all(one.cut == (one.tokens == 3) or not one.cut for one in cut) and any(one.cut for one in cut)
    ended = [(one, short) for one, short in zip(whole, cut, strict=True) if not one.cut]
    for one, short in ended:
        assert one.text.startswith(short.text) and short.cut == (one.tokens >= 3)


def test_a_system_message_stands_before_all(models):
    vlm = models("qwen2_vl")
    plain, told = vlm.words.chat("Is it?", 1), vlm.words.chat("Is it?", 1, system="Answer in verse.")
    assert "You are a helpful assistant." in plain and "You are a helpful assistant." not in told
    assert told.startswith("<|im_start|>system\nAnswer in verse.<|im_end|>\n<|im_start|>user\n")
    own = models("qwen2_vl", conversation="USER: {images}{question} ASSISTANT:")
    with pytest.raises(ValueError, match="write the system message into it"):
        own.words.chat("Is it?", 1, system="x")
    with pytest.raises(ValueError, match="im_end"):
        vlm.words.chat("Is it?", 1, system="x<|im_end|>")


# ------------------------------------------------------------------------------------------------ adapters


def adapter(folder, base, change=1.0):
    """A LoRA on the language model's query projections, saved as PEFT saves it."""
    from peft import LoraConfig, get_peft_model

    model = load_vlm(folder=str(base), device=CPU, dtype=torch.float32)._model
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_" in name:
                value.normal_(0, change)
    wrapped.save_pretrained(folder)
    return wrapped


def test_an_adapter_is_merged(models, tmp_path):
    base = models.folders["qwen2_vl"]
    wrapped = adapter(tmp_path / "lora", base)
    vlm, plain = models("qwen2_vl", lora=str(tmp_path / "lora")), models("qwen2_vl")
    asked = questions(plain)
    assert [one.text for one in vlm.writer.write(asked, GREEDY)] != [
        one.text for one in plain.writer.write(asked, GREEDY)
    ]
    inputs = vlm.writer.inputs(asked[:2])
    with torch.no_grad():
        assert torch.allclose(vlm._model(**inputs).logits, wrapped(**inputs).logits, atol=1e-4)


def test_an_adapter_of_another_model_is_refused(models, tmp_path):
    from safetensors.torch import load_file, save_file

    base = models.folders["qwen2_vl"]
    adapter(tmp_path / "lora", base)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    state = load_file(file)
    first = next(iter(state))
    for change, said in (
        ({key: value for key, value in state.items() if key != first}, "1 tensors are missing"),
        (state | {"base_model.model.other.lora_A.weight": torch.zeros(4, 32)}, "1 tensors are unexpected"),
        (state | {first: torch.zeros(4, 7)}, "does not fit the model"),
    ):
        save_file(change, file)
        with pytest.raises(ValueError, match=said):
            load_vlm(folder=str(base), device=CPU, dtype=torch.float32, lora=str(tmp_path / "lora"))
    file.unlink()
    with pytest.raises(ValueError, match=r"lora: .* has no adapter_model\.safetensors"):
        load_vlm(folder=str(base), device=CPU, dtype=torch.float32, lora=str(tmp_path / "lora"))
