"""Each method of building as two steps: what a model says of one row, as plain JSON values; and rows of all of that.

The first is what takes time: it is kept row by row, so that a run goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mmalign import noise
from mmalign.backbones.vlm import VisionLanguageModel, load_vlm
from mmalign.backbones.vlm_generate import Asked, Decoding
from mmalign.builders import claims, multi_image
from mmalign.builders.habit import anew, likeness
from mmalign.builders.kit import Kit
from mmalign.builders.self_reward import Itself
from mmalign.devices import resolve_device, resolve_dtype
from mmalign.jobs_build import BuildConfig, Claims, Negatives, SelfReward, Several
from mmalign.jobs_mllm import BDHS
from mmalign.media import write_image
from mmalign.mllm.attention import attention_to_prompt, coordinates, image_places, inside, share_of, token_centres
from mmalign.mllm.encode import Media
from mmalign.mllm.negatives import fitted, negative
from mmalign.mllm.passes import Branching
from mmalign.mllm.rows import AnswerRow, Turn, parts_of
from mmalign.paths import find
from mmalign.records import MediaRef
from mmalign.reward_models.clip import picture
from mmalign.shapes.claims import read_description
from mmalign.shapes.questions import questions_of

Said = Mapping[str, Any]


class Maker(Protocol):
    """A method of building."""

    def say(self, number: int, row: AnswerRow) -> dict[str, Any]:
        """What is found out about one row; {"why": reason} where nothing can be built of it."""

    def rows(self, given: Sequence[AnswerRow], said: Sequence[Said]) -> list[AnswerRow]:
        """The built rows of those of which something was found out."""


def maker(config: BuildConfig, given: Sequence[AnswerRow]) -> Maker:
    """The method of a config; its models are loaded here."""
    build = config.build
    if isinstance(build, BDHS):
        return FromHabit(config, build)
    if isinstance(build, Claims):
        return FromClaims(config, build)
    if isinstance(build, Several):
        return AmongSeveral(config, build, given)
    if isinstance(build, SelfReward):
        return Itself(config, build)
    return WithNegatives(config, build, given)


class FromHabit:
    """BDHS: a rejected answer for each good one."""

    def __init__(self, config: BuildConfig, settings: BDHS):
        assert config.model is not None
        self.config, self.settings, self.kit = config, settings, Kit.load(config.model)
        self.similar = likeness(settings.encoder, resolve_device(config.model.device))

    def say(self, number: int, row: AnswerRow) -> dict[str, Any]:
        if row.chosen is None or not row.images:
            return {"why": "no answer" if row.chosen is None else "no image"}
        kit = self.kit
        framed = kit.framed(row.prompt)
        prompt = kit.prompt(framed, Media(tuple(picture(image) for image in row.images)))
        generator = noise.generator("bdhs", self.config.seed, row.chosen, *(image.hash() for image in row.images))
        built = anew(
            row.chosen, framed, prompt, kit.image_tokens(prompt), kit.encoder.chat, kit.decoder, self.similar,
            self.settings, generator, max_new_tokens=kit.asked.max_new_tokens, temperature=kit.asked.temperature,
        )  # fmt: skip
        if not built.text or built.text == row.chosen.strip():
            return {"why": "the same answer" if built.text else "no words"}
        return {
            "rejected": built.text, "tries": built.tries, "similarity": built.similarity, "unguided": built.unguided
        }  # fmt: skip

    def rows(self, given: Sequence[AnswerRow], said: Sequence[Said]) -> list[AnswerRow]:
        plain: dict[str, Any] = {"chosen_spans": None, "rejected_spans": None, "label": None, "source": "bdhs"}
        return [replace(row, rejected=each["rejected"], **plain) for row, each in zip(given, said, strict=True)]


class FromClaims:
    """RLAIF-V: answers of one model, judged claim by claim by itself."""

    def __init__(self, config: BuildConfig, settings: Claims):
        assert config.model is not None
        self.config, self.settings, self.asked = config, settings, config.model
        device, dtype = resolve_device(self.asked.device), resolve_dtype(self.asked.dtype)
        lora = str(find(self.asked.lora)) if self.asked.lora else None
        conversation = self.asked.conversation
        self.vlm = load_vlm(
            folder=str(find(self.asked.path)), device=device, dtype=dtype, conversation=conversation, lora=lora
        )
        self.splitter: VisionLanguageModel = self.vlm
        if settings.splitter:
            self.splitter = load_vlm(folder=str(find(settings.splitter)), device=device, dtype=dtype)

    def say(self, number: int, row: AnswerRow) -> dict[str, Any]:
        users = [turn for turn in row.prompt if turn.role == "user"]
        if len(row.images) != 1 or len(users) != 1:
            return {"why": "not one question about one image"}
        question, image = users[0].text, picture(row.images[0])
        text = self.vlm.words.chat(question + self.asked.suffix, 1)
        first = noise.generator("claims", self.config.seed, question, row.images[0].hash()).initial_seed() % 2**31
        asked = [Asked(text, (image,), first + i) for i in range(self.asked.per_prompt)]
        decoding = Decoding(self.asked.max_new_tokens, self.asked.temperature, self.asked.top_p)
        written = self.vlm.writer.write(asked, decoding)
        answers = list(dict.fromkeys(each.text.strip() for each in written if not isinstance(each, ValueError)))
        judged = [self._judged(question, answer, image) for answer in answers if answer]
        return {"answers": judged} if len(judged) > 1 else {"why": "less than two different answers"}

    def _judged(self, question: str, answer: str, image: Tensor) -> dict[str, Any]:
        """An answer with its claims and whether the model accepts each."""
        by_rule = self.settings.split == "shapes"
        asked = questions_of(read_description(answer)) if by_rule else self._questions(question, answer)
        accepted = []
        if asked:
            media = self.vlm.see([image[None]])
            suffix = "" if by_rule else claims.SUFFIX  # which that world's models have never read
            texts = [self.vlm.words.chat(each + suffix, 1) for each in asked]
            choices = [[*claims.YES, *claims.NO]] * len(texts)
            for probabilities in self.vlm.log_likelihoods(media, [texts], [choices])[0]:
                accepted.append(claims.accepted([float(each[0]) for each in probabilities]))
        return {"text": answer, "claims": asked, "accepted": accepted}

    def _questions(self, question: str, answer: str) -> list[str]:
        """What the splitter asks about an answer's claims."""
        greedy = Decoding(self.asked.max_new_tokens)
        found = self._list(claims.SPLIT.format(question=question, answer=claims.shortened(answer)), greedy)
        if not found:
            return []
        asked = self._list(claims.ASK.format(claims="\n".join(f"- {claim}" for claim in found)), greedy)
        return asked[: len(found)]

    def _list(self, text: str, decoding: Decoding) -> list[str]:
        (found,) = self.splitter.writer.write([Asked(self.splitter.words.chat(text, 0))], decoding)
        if isinstance(found, ValueError):
            raise found
        return claims.listed(found.text)

    def rows(self, given: Sequence[AnswerRow], said: Sequence[Said]) -> list[AnswerRow]:
        found = []
        for row, each in zip(given, said, strict=True):
            judged = [
                claims.Judged(one["text"], tuple(one["claims"]), tuple(one["accepted"])) for one in each["answers"]
            ]
            generator = noise.generator("pairs", self.config.seed, *(one.text for one in judged))
            for better, worse in claims.pairs(
                judged, at_most=self.settings.pairs, least=self.settings.least, generator=generator
            ):
                meta = {"scores": [better.score, worse.score]}
                found.append(replace(
                    row, chosen=better.text, rejected=worse.text, margin=float(better.score - worse.score), label=None,
                    chosen_spans=None, rejected_spans=None, source="claims", meta=meta,
                ))  # fmt: skip
        if not self.settings.length_filter:
            return found
        lengths = [(len((row.chosen or "").split()), len((row.rejected or "").split())) for row in found]
        limit = claims.length_limit(lengths)
        return [row for row, pair in zip(found, lengths, strict=True) if not claims.too_long(pair, limit)]


class AmongSeveral:
    """MIA-DPO: the row's picture among others of the table."""

    def __init__(self, config: BuildConfig, settings: Several, given: Sequence[AnswerRow]):
        assert config.model is not None
        self.config, self.settings, self.given = config, settings, given
        self.kit = Kit.load(config.model, attention="eager")
        tokenizer, model = self.kit.encoder.processor.tokenizer, self.kit.model.config
        self.placeholder = tokenizer.convert_tokens_to_ids(self.kit.encoder.processor.image_token)
        self.feature = getattr(model, "image_token_id", None) or model.image_token_index

    def say(self, number: int, row: AnswerRow) -> dict[str, Any]:
        users = [turn for turn in row.prompt if turn.role == "user"]
        if row.chosen is None or len(row.images) != 1 or len(users) != 1:
            return {"why": "not one question about one image with an answer"}
        generator = noise.generator("several", self.config.seed, users[0].text, row.images[0].hash())
        form = self.settings.forms[int(torch.randint(0, len(self.settings.forms), (), generator=generator))]
        count = 2 if form == "pic_in_pic" else self._draw(self.settings.counts, generator)
        made = self._composed(row, form, count, users[0].text, generator)
        if made is None:
            return {"why": "too few other images"}
        kit = self.kit
        framed = kit.framed((Turn("user", parts_of(made.text)),))
        prompt = kit.prompt(framed, Media(made.images))
        answer = kit.answer(prompt)
        if not answer:
            return {"why": "no words"}
        share = self._share(framed.text, prompt, answer, made)
        text = kit.encoder.chat.behind((), answer).strip()
        perplexity = self._perplexity(prompt, answer)
        said = {"share": share, "perplexity": perplexity, "form": form, "count": count}
        why = multi_image.accepted(
            text, row.chosen, share, perplexity, form, count, longest=self.settings.longest,
            least_perplexity=self.settings.least_perplexity, length_ratio=self.settings.length_ratio,
        )  # fmt: skip
        if why:
            return {**said, "why": why}
        return {**said, "rejected": text, "text": made.text, "images": _saved(self.config.output, number, made.images)}

    @staticmethod
    def _draw(values: Sequence[int], generator: torch.Generator) -> int:
        return values[int(torch.randint(0, len(values), (), generator=generator))]

    def _composed(
        self, row: AnswerRow, form: str, count: int, question: str, generator: torch.Generator
    ) -> multi_image.Composed | None:
        """The row's picture at a drawn place among `count`, the others drawn from the table."""
        others = list({image.hash(): image for other in self.given for image in other.images}.values())
        others = [image for image in others if image.hash() != row.images[0].hash()]
        if len(others) < count - 1:
            return None
        drawn = [picture(others[i]) for i in torch.randperm(len(others), generator=generator)[: count - 1].tolist()]
        own = picture(row.images[0])
        if form == "pic_in_pic":
            return multi_image.pic_in_pic(own, drawn[0], question)
        target = int(torch.randint(0, count, (), generator=generator))
        images = [*drawn[:target], own, *drawn[target:]]
        return (multi_image.sequence if form == "sequence" else multi_image.collage)(images, target, question)

    def _share(self, text: str, prompt: Any, answer: tuple[int, ...], made: multi_image.Composed) -> float:
        """Of the attention to images, what goes to the picture asked about."""
        kit = self.kit
        attention = attention_to_prompt(kit.passes, Branching(prompt, (answer,)), self.settings.layer)
        counts = kit.passes.counts(prompt) if len(made.images) > 1 else None
        places = image_places(prompt.ids, kit.encoder.chat.ids(text), self.placeholder, self.feature, counts)
        everything = [place for each in places for place in each]
        target = places[made.target]
        if len(made.images) == 1:  # a region of the only image
            height, width = made.images[0].shape[-2:]
            one, black, white = (kit.encoder.prompt(text, Media((each,))) for each in coordinates(height, width))
            kept = inside(token_centres(one, black, white, len(target)), made.box)
            target = [place for place, inner in zip(target, kept.tolist(), strict=True) if inner]
        return share_of(attention, target, everything)

    @torch.no_grad()
    def _perplexity(self, prompt: Any, answer: tuple[int, ...]) -> float:
        """exp of minus the mean log-probability of the likeliest token at each place of a greedy answer."""
        passes = self.kit.passes
        hidden = passes.hidden([Branching(prompt, (answer,))], passes.see([prompt]))
        logits = self.kit.head(hidden)
        return float(torch.exp(-(logits.max(1).values - logits.logsumexp(1)).mean()))

    def rows(self, given: Sequence[AnswerRow], said: Sequence[Said]) -> list[AnswerRow]:
        found = []
        for row, each in zip(given, said, strict=True):
            images = tuple(MediaRef(str(self.config.output / name)) for name in each["images"])
            turns = (Turn("user", parts_of(each["text"])),)
            meta = {name: each[name] for name in ("form", "count", "share", "perplexity")}
            found.append(replace(
                row, prompt=turns, images=images, rejected=each["rejected"], chosen_spans=None, rejected_spans=None,
                label=None, source="several", meta=meta,
            ))  # fmt: skip
        return found


class WithNegatives:
    """Rows as they are, with negative images in files."""

    def __init__(self, config: BuildConfig, settings: Negatives, given: Sequence[AnswerRow]):
        self.config, self.settings = config, settings
        self.others = [image for row in given for image in row.images]

    def say(self, number: int, row: AnswerRow) -> dict[str, Any]:
        if not row.images:
            return {"why": "no image"}
        made = []
        for place, image in enumerate(row.images):
            pixels = picture(image)
            generator = noise.generator("negative", self.config.seed, image.hash(), place)
            if self.settings.negative.kind == "other":
                number_of = int(torch.randint(0, len(self.others), (), generator=generator))
                made.append(fitted(picture(self.others[number_of]), pixels.shape[-2:]))
            else:
                made.append(negative(pixels, self.settings.negative, generator))
        return {"images": _saved(self.config.output, number, made)}

    def rows(self, given: Sequence[AnswerRow], said: Sequence[Said]) -> list[AnswerRow]:
        return [
            replace(row, rejected_images=tuple(MediaRef(str(self.config.output / name)) for name in each["images"]))
            for row, each in zip(given, said, strict=True)
        ]


def _saved(output: Path, number: int, images: Sequence[Tensor]) -> list[str]:
    """Files below the output folder, as PNG."""
    names = [f"images/{number:07d}-{place}.png" for place in range(len(images))]
    (output / "images").mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, images, strict=True):
        write_image(output / name, np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    return names
