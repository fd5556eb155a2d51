"""A small RT-DETRv2 on COCO's classes and a small BLIP that captions, random, in the layout of published folders.

With their answers once more, by loops in float64.
"""

import functools
import math

import torch

from mmalign.backbones.mask2former import COCO, VOC_NAMES

SIDE = 64
LEAST = 0.92  # about the middle of what the small detector says
WORDS = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *("a", "an", "of", "in", "the", "narrow", "alley", "library", "indoor", "march", "arch", "sky", "##scraper", "bar"),
)
DEC = len(WORDS)  # like BLIP's, where a caption begins: an id behind the tokeniser's vocabulary


def rtdetr_folder(folder, seed=0, labels=COCO, sure=2.0):
    """`sure` scales what the queries say of classes, so that a few detections pass a threshold."""
    from transformers import RTDetrImageProcessor, RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    voc = {coco: name for name, coco in VOC_NAMES.items()}  # as some published configs name them
    config = RTDetrV2Config(
        backbone_config=backbone,
        id2label={number: voc.get(name, name) for number, name in enumerate(labels)},
        encoder_hidden_dim=16,
        encoder_in_channels=[8, 16, 16],
        encoder_layers=1,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_in_channels=[16, 16, 16],
        d_model=16,
        num_queries=7,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        num_denoising=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = RTDetrV2ForObjectDetection(config).eval()
        with torch.no_grad():
            for name, value in model.named_parameters():
                if value.ndim > 1:  # so that what is in a picture reaches the queries
                    value.normal_(0.0, 1.5 / value[0].numel() ** 0.5)
                if "class_embed" in name:
                    value.mul_(sure) if value.ndim > 1 else value.fill_(-2 * sure)
                elif "bbox" in name and "layers.2" in name:
                    value.mul_(0.3)
    model.save_pretrained(folder)
    RTDetrImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def blip_folder(folder, seed=0):
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})
    text = {
        "vocab_size": len(WORDS) + 2, "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64,
        "bos_token_id": DEC, "pad_token_id": 0, "eos_token_id": 3, "sep_token_id": 3,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": 16,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).eval()
        for name, value in model.named_parameters():
            value.data.normal_(1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0, 0.4)
    model.save_pretrained(folder)
    pictures = BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    BlipProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


def clips(sizes=((SIDE, SIDE), (40, 90), (SIDE, SIDE)), frames=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (frames, 3, *size), dtype=torch.uint8, generator=generator) for size in sizes]


@functools.cache
def doubled(name, folder):
    import transformers

    return getattr(transformers, name).from_pretrained(folder).double().eval()


def expected_objects(folder, frame, least):
    """From the network's raw answers, by loops in float64; the frame needs no resizing."""
    model = doubled("RTDetrV2ForObjectDetection", folder)
    with torch.no_grad():
        output = model(pixel_values=frame[None].double() / 255)
    pairs = []
    for query, logits in enumerate(output.logits[0].tolist()):
        pairs += [(1 / (1 + math.exp(-value)), query, label) for label, value in enumerate(logits)]
    pairs.sort(reverse=True)
    height, width = frame.shape[-2:]
    found = []
    for score, query, label in pairs[: len(output.logits[0])]:  # as many pairs as there are queries
        if score > least:
            x, y, w, h = output.pred_boxes[0, query].tolist()
            box = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
            found.append((COCO[label], box, score))
    return found


def greedy(folder, frame, longest):
    """Word after word, the likeliest; the picture needs no resizing."""
    model = doubled("BlipForConditionalGeneration", folder)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)[:, None, None]
    words = [DEC]
    with torch.no_grad():
        image = model.vision_model((frame.double() / 255 - mean)[None] / std).last_hidden_state
        for _ in range(longest):
            output = model.text_decoder(input_ids=torch.tensor([words]), encoder_hidden_states=image)
            words.append(int(output.logits[0, -1].argmax()))
            if WORDS[words[-1] : words[-1] + 1] == ("[SEP]",):
                break
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    text = " ".join(WORDS[word] for word in words[1:] if word < len(WORDS) and WORDS[word] not in special)
    return text.replace(" ##", "")
