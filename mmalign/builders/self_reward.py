"""A model that rewards its own answers: drawn from its last round, ranked by what that round changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmalign import noise
from mmalign.backbones.vlm import load_vlm
from mmalign.backbones.vlm_generate import Asked, Decoding
from mmalign.builders.consistency import agreement
from mmalign.devices import resolve_device, resolve_dtype
from mmalign.jobs_build import BuildConfig, SelfReward
from mmalign.mllm.encode import Media
from mmalign.mllm.implicit import BASE, Implicit
from mmalign.mllm.rows import AnswerRow
from mmalign.paths import find
from mmalign.reward_models.clip import picture


class Itself:
    """The best of several answers against the worst, and the same the other way round as far as rounds disagree."""

    def __init__(self, config: BuildConfig, settings: SelfReward):
        assert config.model is not None
        assert config.model.lora is not None
        self.config, self.settings, self.asked = config, settings, config.model
        lora = config.model.lora
        device, dtype = resolve_device(self.asked.device), resolve_dtype(self.asked.dtype)
        self.vlm = load_vlm(
            folder=str(find(self.asked.path)), device=device, dtype=dtype, conversation=self.asked.conversation,
            lora=str(find(lora)),
        )  # fmt: skip
        adapters = {"last": lora}
        if settings.earlier:
            adapters["earlier"] = settings.earlier
        self.implicit = Implicit(self.asked.path, adapters, dtype=dtype, device=device, system=self.asked.system)

    def say(self, number: int, row: AnswerRow) -> dict[str, Any]:
        users = [turn for turn in row.prompt if turn.role == "user"]
        if len(row.images) > 1 or len(users) != 1 or row.videos:
            return {"why": "not one question about one image"}
        question, images = users[0].text, tuple(picture(image) for image in row.images)
        text = self.vlm.words.chat(question + self.asked.suffix, len(images), system=self.asked.system)
        hashes = [image.hash() for image in row.images]
        first = noise.generator("self", self.config.seed, question, *hashes).initial_seed() % 2**31
        asked = [Asked(text, images, first + i) for i in range(self.asked.per_prompt)]
        decoding = Decoding(self.asked.max_new_tokens, self.asked.temperature, self.asked.top_p)
        written = self.vlm.writer.write(asked, decoding)
        told = dict.fromkeys(each.text.strip() for each in written if not isinstance(each, ValueError))
        answers = [answer for answer in told if answer]
        if len(answers) < 2:
            return {"why": "less than two different answers"}
        found = self.implicit.means(row.prompt, Media(images), answers)
        return {"answers": answers, "rewards": found["last"], "earlier": found.get("earlier", found[BASE])}

    def rows(self, given: Sequence[AnswerRow], said: Sequence[Mapping[str, Any]]) -> list[AnswerRow]:
        agreed = [agreement(each["rewards"], each["earlier"]) for each in said]
        whole = sum(agreed) / len(agreed)
        found = []
        for row, each, own in zip(given, said, agreed, strict=True):
            rewards = each["rewards"]
            best, worst = (choose(range(len(rewards)), key=rewards.__getitem__) for choose in (max, min))
            gap = rewards[best] - rewards[worst]
            if gap <= self.settings.least:
                continue
            plain: dict[str, Any] = {"label": None, "chosen_spans": None, "rejected_spans": None, "source": "self"}
            meta = {"rewards": [rewards[best], rewards[worst]], "agreement": own, "mean_agreement": whole}
            pair = replace(
                row, chosen=each["answers"][best], rejected=each["answers"][worst], margin=gap, meta=meta, **plain
            )
            if self.settings.consistency == "off":
                found.append(pair)
                continue
            sure = whole if self.settings.consistency == "mean" else own
            found.append(replace(pair, weight=2 * sure))  # of two rows, so that their mean is the paper's loss
            turned = replace(pair, chosen=pair.rejected, rejected=pair.chosen, weight=2 * (1 - sure), margin=None)
            found.append(turned)
        return [row for row in found if row.weight > 0]
