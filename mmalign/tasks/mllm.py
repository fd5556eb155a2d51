"""Answers of a vision-language model: one step compares chosen and rejected answers under the policy and a reference.

The task gives log-probabilities of every token of every answer to the objective's pure functions
(`mmalign.losses.answers`); what these need besides is in the settings' `needs`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.cache import Cache
from mmalign.jobs import TrainConfig
from mmalign.losses import answers as losses
from mmalign.losses.errors import across_processes, from_process_before
from mmalign.methods_mllm import MLLM, Sparse
from mmalign.methods_mllm_terms import TReg
from mmalign.mllm import export as exporting
from mmalign.mllm import loading
from mmalign.mllm.chat import Chat
from mmalign.mllm.encode import Encoded, Encoder
from mmalign.mllm.passes import Branching, Passes, shares
from mmalign.mllm.readout import Head, guided_log_probs, kl, log_probs
from mmalign.paths import find
from mmalign.progress import track
from mmalign.tables import summary
from mmalign.tasks import answer_flat, answer_sources, answer_validation, finish
from mmalign.tasks.answer_online import OnlineAnswers
from mmalign.tasks.answer_state import State, function
from mmalign.tasks.answers import Answers
from mmalign.tasks.state import rebuilt
from mmalign.tasks.token_masks import Masks
from mmalign.tasks.token_rewards import contrasted, load_guide

Batch = dict[str, Any]


@dataclass
class Model:
    """A model with its passes and its head."""

    module: Any
    passes: Passes
    head: Head


@dataclass
class Known:
    """What a reference says: log-probabilities of all tokens [N], hidden states where they were asked for."""

    log_probs: Tensor
    hidden: Tensor | None = None
    head: Any = None


class MLLMTask:
    """`loss.terms` say what is read of an answer, and whether rows are pairs or single answers."""

    def __init__(self, config: TrainConfig, device: torch.device):
        assert isinstance(config.loss, MLLM)
        self.config, self.objective, self.device = config, config.loss, device
        self.unit = self.objective.items
        self.folder = find(config.model.path)
        rows, dropped = answer_sources.rows(config, self.objective.items)
        module, self.processor = loading.load(
            self.folder, config.mllm, finish.frozen_dtype(config), device, from_scratch=bool(config.model.from_scratch),
            seed=config.seed,
        )  # fmt: skip
        self.encoder = self._encoder(module)
        needs = self.objective.needs
        self.answers = Answers(
            rows, config, self.encoder, loading.processor_identity(self.folder),
            blind=bool({"blind", "guided"} & needs), segments="changed" in needs,
        )  # fmt: skip
        self.size = len(self.answers.rows)
        self.held_out = answer_validation.held_out(config, self.answers)
        if not self.size:
            raise ValueError(f"no row is left to train on: {summary(0, [*dropped, *self.answers.dropped])}")
        self.shared = self._shares(module)
        loading.make_trainable(
            module, config.mllm.vision, config.lora, config.seed, config.optim.gradient_checkpointing
        )
        if config.lora and config.lora.init:
            loading.begin_from(module, config.lora.init)
        self.alike = loading.sees_alike(module) and not config.reference.other
        self.policy = self._model(module)
        self.other = self._other(device)
        self.state = State(self.objective.terms)
        wanted = config.mllm.online
        self.online = OnlineAnswers(wanted, self.answers, module, self.policy.head, config.seed) if wanted else None
        self.guide = self._guide(device)
        self.modules = nn.ModuleDict({"model": module, "state": self.state})
        if isinstance(self.objective.tokens, Sparse):
            width = int(module.config.get_text_config().hidden_size)
            self.modules["masks"] = Masks(self.objective.tokens, width).to(device)
        self.cache = Cache(config.data.cache_dir) if config.reference.kind == "cached" else None
        self.reference_key = self._reference_identity() if self.cache else ""
        if self.cache and self.other is not None:
            self._measure_all()
            self.other = None  # everything is in the cache: the second model is not needed again
        self.facts = self._facts([*dropped, *self.answers.dropped])

    # ------------------------------------------------------------------------------------------------------ making

    def _encoder(self, module: Any) -> Encoder:
        settings = self.config.mllm
        template = find(settings.chat_template).read_text(encoding="utf-8") if settings.chat_template else None
        chat = Chat(self.processor, loading.ends(module), template)
        own = getattr(module.config.get_text_config(), "max_position_embeddings", None)
        tokens = self.objective.tokens
        wanted = next((term for term in self.objective.terms if isinstance(term, TReg)), None)
        return Encoder(
            self.processor, chat, loading.media_ids(module.config), max_length=settings.max_length or own,
            policy=settings.over_long, system=settings.system, arguments=settings.processor,
            min_block=getattr(tokens, "min_block", 3), both_sides=getattr(tokens, "both_sides", False),
            contrast=(wanted.better, wanted.worse) if wanted else None,
        )  # fmt: skip

    def _shares(self, module: Any) -> bool:
        wanted, why = self.config.mllm.shared_prompt, shares(module)
        if wanted == "on" and why:
            raise ValueError(f"mllm.shared_prompt: on, but {why}; use auto")
        return wanted != "off" and not why and self.objective.items == "pairs"

    def _model(self, module: Any) -> Model:
        return Model(module, Passes(module, self.shared), Head.of(module))

    @property
    def frozen(self) -> nn.Module | None:
        """The second model, if there is one, for processes that share it."""
        return None if self.other is None else self.other.module

    def _other(self, device: torch.device) -> Model | None:
        """The reference, where it is another model than the policy with its adapters off."""
        config = self.config
        if self.objective.reference_free or (config.lora and not config.reference.other):
            return None
        if not config.reference.other:
            return self._model(loading.frozen_copy(self.policy.module, config.optim.gradient_checkpointing))
        assert config.reference.model is not None
        other, _ = loading.load(find(config.reference.model), config.mllm, finish.frozen_dtype(config), device)
        return self._model(other.requires_grad_(False).eval())

    def _guide(self, device: torch.device) -> Model | None:
        """The model that says what tokens are worth."""
        config = self.config
        if config.mllm.guide is None:
            return None
        return self._model(
            load_guide(config.mllm.guide, config.model.path, config.mllm, finish.frozen_dtype(config), device)
        )

    def _facts(self, dropped: list[Any]) -> dict[str, Any]:
        told = summary(self.size, dropped)
        if self.answers.smaller:
            told += f"; {self.answers.smaller} with smaller images, to fit into mllm.max_length"
        why = shares(self.policy.module)
        reference = "none" if self.objective.reference_free else self.config.reference.kind
        return {
            "data": told, "contents": self.answers.digest(), "reference": reference,
            "shared_prompt": self.shared, "shared_prompt_why_not": None if self.shared else why,
            "images_encoded_once": self.alike,
        }  # fmt: skip

    # ----------------------------------------------------------------------------------------------------- batches

    def load(self, positions: list[tuple[int, int]]) -> Batch:
        return self.answers.load([item for item, _ in positions])

    def loss(self, batch: Batch, alone: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """`alone`: no other process takes part, and rows are as they are."""
        if self.online is not None and not alone:
            batch = self.online.renewed(batch)
        objective, pairs = self.objective, self.measure(batch, alone)
        scores = function(objective.tokens)(pairs, **objective.tokens.own())
        beta = self._beta(pairs, scores)
        metrics = losses.metrics(scores, beta)
        if pairs.chosen.sparse is not None:
            metrics["sparsity"] = (pairs.chosen.sparse[pairs.chosen.mask] == 0).float().mean()
        terms = []
        for term in objective.terms:
            each = function(term)(scores, beta=beta, **term.own(), **self.state.given(term))
            terms.append((term.weight, each))
            if len(objective.terms) > 1:
                metrics[f"loss_{term.kind}"] = each.detach().mean()
        metrics |= self.state.seen(scores, beta)
        return losses.combine(terms, pairs.weight), metrics

    def _beta(self, pairs: losses.Pairs, scores: losses.Scores) -> Tensor | float:
        """beta, or one for each row by its margin."""
        beta, wanted = self.objective.beta, self.objective.margin
        if wanted is None:
            return beta
        if wanted.kind == "released":
            return losses.batch_beta(beta, scores.difference, scale=wanted.scale)
        assert pairs.margin is not None
        return losses.margin_beta(beta, pairs.margin, scale=wanted.scale, rate=wanted.rate)

    def begin(self, step: int) -> None:
        """Called before each optimiser step."""
        if self.online is not None:
            self.online.step = step

    @property
    def tracks(self) -> tuple[str, ...]:
        """Metrics that the objective remembers between steps."""
        return self.state.tracks

    def track(self, means: dict[str, Tensor]) -> None:
        self.state.track(means)

    def describe(self, batch: Batch) -> str:
        return ", ".join(self.answers.rows[i].origin or f"row {i}" for i in batch["items"])

    # ---------------------------------------------------------------------------------------------------- measuring

    def measure(self, batch: Batch, alone: bool = False) -> losses.Pairs:
        """Log-probabilities of every token of the batch's answers, under policy and reference."""
        needs, encoded = self.objective.needs, batch["encoded"]
        asks = answer_flat.asks(encoded)
        count, ids = len(answer_flat.ids(asks[: len(encoded)])), answer_flat.ids(asks).to(self.device)
        policy, others = self.policy, asks if "blind" in needs else asks[: len(encoded)]
        with nullcontext() if not self.alike else torch.no_grad():
            seen = policy.passes.see([ask.prompt for ask in asks])
        hidden = policy.passes.hidden(others, seen)
        found: dict[str, Tensor] = {"policy": log_probs(policy.head, hidden, ids[: len(hidden)])}
        if not self.objective.reference_free:
            known = self._reference(asks, seen if self.alike else None, wanted=bool({"kl", "guided", "mask"} & needs))
            found["reference"] = known.log_probs
            found |= self._of_tokens(encoded, asks[: len(encoded)], ids[:count], known)
            if "kl" in needs:
                assert known.hidden is not None
                found["kl"] = kl(policy.head, hidden[:count], known.head, known.hidden[:count])
            guidance = self.objective.visual_guidance
            if guidance is not None:
                assert known.hidden is not None
                guided = guided_log_probs(
                    policy.head, hidden[:count], known.head, known.hidden[count:], ids[:count], **guidance.model_dump()
                )  # fmt: skip
                found["policy"] = torch.cat([guided, found["policy"][count:]])
        pairs = self._sides(batch, answer_flat.parted(found, count))
        return replace(pairs, drift=self._drift(encoded, seen, alone)) if "drift" in needs else pairs

    def _of_tokens(
        self, encoded: Sequence[Encoded], asks: Sequence[Branching], ids: Tensor, known: Known
    ) -> dict[str, Tensor]:
        """What single tokens are worth or count, where the objective asks for it: flat [N] each."""
        needs, found = self.objective.needs, {}
        if "contrast" in needs:
            found["rewards"] = contrasted(encoded, lambda two: self._reference(two, None, wanted=False).log_probs)
        if self.guide is not None:
            with torch.no_grad():
                hidden = self.guide.passes.hidden(asks, self.guide.passes.see([ask.prompt for ask in asks]))
                values = log_probs(self.guide.head, hidden, ids)
            found["rewards"] = self.objective.beta * (values - known.log_probs[: len(ids)])
        if "mask" in needs:
            assert known.hidden is not None
            lengths = [len(answer) for each in encoded for answer in each.answers]
            found["sparse"], found["sparse_kl"] = self.modules["masks"](known.hidden[: len(ids)], lengths)
        return found

    @torch.no_grad()
    def _drift(self, encoded: Sequence[Encoded], seen: dict[int, Any], alone: bool) -> Tensor:
        """KTO's z_0: how far the policy is from the reference on answers to other rows' prompts, in nats per answer and
        not below 0; 0 where there is no other row. Each prompt gets the answer of the row before, as in TRL, over all
        processes' rows."""
        ones = torch.tensor(float(len(encoded)), device=self.device)
        rows = ones if alone else across_processes(ones)
        if rows == 1:
            return torch.zeros((), device=self.device)
        last = encoded[-1].answers[:1]
        before = [last if alone else from_process_before(last), *(each.answers[:1] for each in encoded[:-1])]
        asks = [Branching(each.prompt, answer) for each, answer in zip(encoded, before, strict=True)]
        ids = answer_flat.ids(asks).to(self.device)
        policy = log_probs(self.policy.head, self.policy.passes.hidden(asks, seen), ids)
        known = self._reference(asks, seen if self.alike else None, wanted=False).log_probs
        total = (policy - known).sum()
        return ((total if alone else across_processes(total)) / rows).clamp(min=0)

    def _sides(self, batch: Batch, flat: dict[str, Tensor]) -> losses.Pairs:
        """Flat values of all tokens as one table [B, T] per side."""
        encoded: list[Encoded] = batch["encoded"]
        lengths = [[len(answer) for answer in each.answers] for each in encoded]
        longest = max(length for row in lengths for length in row)
        tables = {name: answer_flat.tables(value, lengths, longest) for name, value in flat.items()}
        ones = torch.ones(sum(map(sum, lengths)), dtype=torch.bool, device=self.device)
        masks = answer_flat.tables(ones, lengths, longest)
        changed: list[Tensor] | None = None
        if encoded[0].changed is not None:
            marks = torch.tensor([m for each in encoded for answer in each.changed or () for m in answer])
            changed = answer_flat.tables(marks.to(self.device), lengths, longest)
        sides = [
            losses.Side(
                mask=masks[i], changed=changed[i] if changed else None,
                **{name: table[i] for name, table in tables.items()},
            )
            for i in range(len(masks))
        ]  # fmt: skip
        told = {name: value.to(self.device) for name, value in batch.items() if isinstance(value, Tensor)}
        return losses.Pairs(sides[0], sides[1] if len(sides) > 1 else None, **told)

    # ---------------------------------------------------------------------------------------------------- reference

    def _reference_identity(self) -> str:
        """What the reference's log-probabilities depend on besides a row: its files, seed if it is made from nothing,
        precision, attention and quantisation."""
        config = self.config
        folder = find(config.reference.model) if config.reference.model else self.folder
        scratch = config.model.from_scratch and not config.reference.model
        weights = f"from scratch, seed {config.seed}" if scratch else loading.identity(folder)
        told = (
            weights,
            str(finish.frozen_dtype(config)),
            config.precision,
            config.mllm.attention,
            config.mllm.quantise,
        )
        return hashlib.sha256(repr(told).encode()).hexdigest()

    @contextmanager
    def _referring(self) -> Any:
        """The reference model inside, without gradients."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.other is None:
                stack.enter_context(loading.adapters_off(self.policy.module))
            yield self.other or self.policy

    def _reference(self, asks: Sequence[Branching], seen: dict[int, Any] | None, wanted: bool) -> Known:
        """What the reference says of every token: from the cache where that is asked for, else one pass.

        Args:
            seen: features of the prompts, where the reference has the policy's; None lets it look for itself.
            wanted: keep the hidden states too.
        """
        if self.cache is not None:
            return Known(torch.cat([self._remembered(ask) for ask in asks]).to(self.device))
        with self._referring() as model:
            seen = seen if seen is not None else model.passes.see([ask.prompt for ask in asks])
            hidden = model.passes.hidden(asks, seen)
            values = log_probs(model.head, hidden, answer_flat.ids(asks).to(self.device))
            return Known(values, hidden if wanted else None, model.head)

    def _remembered(self, ask: Branching) -> Tensor:
        """Of one prompt's answers, each an entry of the cache; measured without any neighbours where one is missing."""
        assert self.cache is not None
        keys = [
            self.cache.key(reference=self.reference_key, **answer_flat.content(ask.prompt), answer=list(a))
            for a in ask.answers
        ]
        entries = [self.cache.get("reference_log_probs", key) for key in keys]
        if any(entry is None for entry in entries):
            with self._referring() as model:
                hidden = model.passes.hidden([ask], model.passes.see([ask.prompt]))
                values = log_probs(model.head, hidden, answer_flat.ids([ask]).to(self.device)).float().cpu()
            parts = values.split([len(answer) for answer in ask.answers])
            for key, value in zip(keys, parts, strict=True):
                self.cache.put("reference_log_probs", key, {"log_probs": value.clone()})
            return values
        return torch.cat([entry["log_probs"] for entry in entries if entry is not None])

    def _measure_all(self) -> None:
        """Every row's reference log-probabilities, before the run; the next run with these rows finds them."""
        for rows in filter(None, (self.answers, self.held_out)):
            for index in track(range(len(rows.rows)), "reference log-probabilities", len(rows.rows)):
                for ask in answer_flat.asks(rows.load([index])["encoded"]):
                    self._remembered(ask)

    # ------------------------------------------------------------------------------------------------------ the loop

    @property
    def network(self) -> nn.Module:
        """What several processes may share."""
        network: nn.Module = self.policy.module
        return network

    def take_whole(self, state: dict[str, Tensor]) -> None:
        shared = self.policy.module
        with torch.device("meta"):
            plain = type(shared)(shared.config)
        self.policy.module = rebuilt(plain, shared, state)

    def validate(self, folder: Path, step: int) -> None:
        """The held-out rows' loss and accuracy, as a line of `folder/metrics.jsonl`."""
        if self.held_out is not None:
            half = self.config.precision
            with torch.autocast(self.device.type, finish.PRECISIONS[half], enabled=half != "fp32"):
                found = answer_validation.measured(self, self.held_out, self.config.optim.batch_size)
            answer_validation.write(found, len(self.held_out.rows), folder, step)

    def export(self, folder: Path) -> None:
        exporting.export(
            self.policy.module, self.processor, folder, config=self.config.model_dump(mode="json"),
            data=str(self.facts["data"]), base_model=str(self.config.model.path),
        )  # fmt: skip
