"""Fitting a scorer: features of judged media, a head on them, an objective; contrastive on captioned pictures too."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign import noise, reward_models
from mmalign.backbones.fitted_folder import BESIDE, INSIDE, RewardFile, write_reward
from mmalign.backbones.pluralistic import UNKNOWN, Context, VPLHead, Who
from mmalign.backbones.reward_folder import Grades
from mmalign.backbones.reward_heads import Compared, Features, Inputs, make_head
from mmalign.jobs import TrainConfig
from mmalign.jobs_reward import PERSONAL, TWO_TOWERS, VPL, Cosine, Own
from mmalign.judgements import Group
from mmalign.losses import reward as losses
from mmalign.methods import Contrastive
from mmalign.methods_reward import BTT, Fitting, Ordinal
from mmalign.reward_models.clip import FrozenClip, folder_hash
from mmalign.reward_models.frozen import FrozenFeatures
from mmalign.tasks import reward_labels, sources
from mmalign.tasks.noised import NoisedMedia


class RewardTask:
    """`loss.items` says what is read: captioned pictures, pairs, or lists of graded pictures."""

    def __init__(self, config: TrainConfig, device: torch.device):
        self.config, self.device = config, device
        self.objective = config.loss
        assert isinstance(self.objective, Fitting | Contrastive)
        self.unit = {"captions": "images", "pairs": "pairs", "lists": "lists"}[self.objective.items]
        self.items: list[Any]
        self.labels, self.facts = None, {}
        if isinstance(self.objective, Fitting):
            self.labels = reward_labels.read(config, self.objective)
            self.items, self.facts = self.labels.groups, dict(self.labels.facts)
        else:
            self.items, summary = reward_labels.captions(config)
            self.facts["data"] = summary
        self.size = len(self.items)
        self._network(device)
        self.facts["contents"] = self._contents()

    def _network(self, device: torch.device) -> None:
        config, reward = self.config, self.config.reward
        family = "open_clip" if config.model.family == "auto" else config.model.family
        settings = reward.head or (Cosine() if family in TWO_TOWERS else Own())
        self.users = self.labels.users if self.labels and settings.kind in PERSONAL else ()
        self.modules = nn.ModuleDict()
        frozen = reward.train == "head" and family in TWO_TOWERS
        if frozen:
            assert self.labels is not None
            self.frozen = FrozenClip(config, device)
            self.source: Any = FrozenFeatures(self.frozen, config, *self.labels.everything())
        else:
            self.source = reward_models.make(config, device)
            if family == "latent":
                assert self.labels is not None
                self.source = NoisedMedia(self.source, config)
                self.source.fit(*self.labels.everything())
            self.modules[self.source.name] = self.source.module
        torch.manual_seed(config.seed)
        gaussian = isinstance(self.objective, Fitting) and self.objective.spread
        self.head: Any = make_head(
            settings, width=self.source.width, towers=self.source.towers, axes=max(1, len(config.data.axes)),
            users=len(self.users), gaussian=gaussian,
        ).to(device)  # fmt: skip
        self.settings, self.modules["head"] = settings, self.head
        if frozen:
            inputs = self.head.inputs
            assert isinstance(inputs, Inputs)
            inputs.fit(self.source.joined(self.items))
        if isinstance(self.objective, Ordinal):
            self.modules["thresholds"] = Thresholds(self.objective.grades).to(device)
        self.facts |= {"head": settings.kind, "users": len(self.users)}
        if isinstance(settings, VPL):
            self.contexts = reward_labels.Contexts(self.items, settings.context, config.seed)

    def _contents(self) -> str:
        """What a resumed run must have too: rows and labels, and whatever else of them this head looks at."""
        plain = sources.digest(self.items)
        told = [item.user for item in self.items] if self.users else []
        margins = self.labels.margins if self.labels and self.labels.margins else []
        return hashlib.sha256(repr((plain, told, margins)).encode()).hexdigest() if told or margins else plain

    # ---------------------------------------------------------------------------------------------------- batches

    def load(self, positions: list[tuple[int, int]]) -> dict[str, Any]:
        index = [item for item, _ in positions]
        if self.labels is None:
            media, prompts = [self.items[i].media for i in index], [self.items[i].prompt for i in index]
            return {"items": index, "inputs": self.source.inputs(media, prompts)}
        assert isinstance(self.objective, Fitting)
        groups = [self._turned(self.items[item], epoch) for item, epoch in positions]
        weight = torch.tensor([self.labels.weights[i] * group.weight for i, group in zip(index, groups, strict=True)])
        batch: dict[str, Any] = {"items": index, "weight": weight}
        if self.objective.items == "lists":
            flat = [(m, p) for group in groups for m, p in zip(group.media, group.prompts, strict=True)]
            of_flat = [at for at, group in zip(positions, groups, strict=True) for _ in group.media]
            batch |= reward_labels.graded(groups, self.objective, len(self.config.data.axes))
        else:
            flat = [(group.media[side], group.prompts[side]) for side in (0, 1) for group in groups]
            of_flat = [*positions, *positions]
            batch |= reward_labels.paired(groups, self.objective)
            if self.labels.margins:
                batch["margin"] = torch.tensor([self.labels.margins[i] for i in index])
        numbers = {user: number for number, user in enumerate(self.users)}
        batch["users"] = torch.tensor([numbers.get(group.user, UNKNOWN) for group in groups])
        drawn = {}
        if isinstance(self.source, NoisedMedia):
            drawn["keys"] = [(*self.items[item].identity, epoch) for item, epoch in of_flat]
        batch["inputs"] = self.source.inputs([m for m, _ in flat], [p for _, p in flat], **drawn)
        if isinstance(self.head, VPLHead):
            batch["context"] = self._context([self.contexts.of(item, epoch) for item, epoch in positions])
        return batch

    def _turned(self, group: Group, epoch: int) -> Group:
        """The pair as it stands, or with its media and labels in the other order."""
        swap = self.config.reward.swap
        if not swap:
            return group
        generator = noise.generator("swap", self.config.seed, *group.identity, epoch)
        return reward_labels.turned(group) if torch.rand((), generator=generator).item() < swap else group

    def _context(self, chosen: list[list[int]]) -> dict[str, Any]:
        """Features of other pairs of each item's user, preferred first: [B * C] each, and the mask [B, C]."""
        longest = max(map(len, chosen))
        mask = torch.tensor([[place < len(row) for place in range(longest)] for row in chosen])
        filled = [self.items[row[min(place, len(row) - 1)]] for row in chosen for place in range(longest)]
        ordered = [reward_labels.turned(group) if group.values[0] < 0.5 else group for group in filled]
        sides = [self.source.inputs([g.media[s] for g in ordered], [g.prompts[s] for g in ordered]) for s in (0, 1)]
        return {"preferred": sides[0], "other": sides[1], "mask": mask}

    # ------------------------------------------------------------------------------------------------------- loss

    def begin(self, step: int) -> None:
        if isinstance(self.head, VPLHead):
            self.head.anneal(step)

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.source.features(batch["inputs"])
        if not isinstance(self.objective, Fitting):
            return losses.contrastive(features.image, features.text, features.scale.log())
        batch = {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        return self._of_lists(features, batch) if self.objective.items == "lists" else self._of_pairs(features, batch)

    def _of_pairs(self, features: Features, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        objective, half = self.objective, len(batch["items"])
        assert isinstance(objective, Fitting)
        winner, loser = features.rows(slice(0, half)), features.rows(slice(half, None))
        given = {name: batch[name] for name in objective.needs if batch.get(name) is not None}
        own = objective.own() | ({"margin": batch["margin"]} if "margin" in batch else {})
        if objective.towers:
            loss, metrics = _function(objective)(winner.image, loser.image, winner.text, **given, **own)
        else:
            compared: Compared = self.head(winner, loser, self._who(batch))
            if objective.spread:
                given["spread"] = compared.spread
            loss, metrics = _function(objective)(compared.winner, compared.loser, **(given | own))
            metrics = metrics | compared.metrics
            if compared.penalty is not None:
                loss = loss + compared.penalty
            metrics |= self._by_axis(compared, batch)
        if objective.anchor:
            assert features.scale is not None and winner.image is not None and loser.image is not None
            better = torch.where(batch["label"].view(half, -1).mean(1, keepdim=True) < 0.5, loser.image, winner.image)
            assert winner.text is not None
            kept, more = losses.contrastive(better, winner.text, features.scale.log())
            loss, metrics = loss + objective.anchor * kept, {**metrics, **more}
        return loss, metrics

    def _who(self, batch: dict[str, Any]) -> Who | None:
        if not self.users:
            return None
        told = batch.get("context")
        if told is None:
            return Who(batch["users"])
        mask = told["mask"].to(self.device)
        preferred, other = (
            self.source.features(told[side]).joined().view(*mask.shape, -1) for side in ("preferred", "other")
        )
        return Who(batch["users"], Context(preferred, other, mask))

    def _by_axis(self, compared: Compared, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Accuracy of each axis, under its name."""
        axes = self.config.data.axes
        if len(axes) < 2:
            return {}
        difference, mask = compared.winner - compared.loser, batch["mask"]
        each = [
            losses.pair_metrics(difference[:, a], batch["label"][:, a], mask[:, a])["pairwise_accuracy"]
            for a in range(len(axes))
        ]
        return {f"accuracy/{axis}": value for axis, value in zip(axes, each, strict=True)}

    def _of_lists(self, features: Features, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        objective, held = self.objective, batch["held"]  # held: [B, k], where there is a picture
        who = Who(batch["users"][:, None].expand_as(held)[held]) if self.users else None
        found = self.head.scores(features, who)
        scores = found.new_zeros(*held.shape, *found.shape[1:])
        scores[held] = found
        if scores.ndim == 3:  # axes become lists of their own
            scores = scores.permute(0, 2, 1).flatten(0, 1)
        each = len(scores) // len(held)
        weight = batch["weight"].repeat_interleave(each)
        given = {"target": batch["target"], "mask": batch["mask"], "weight": weight}
        if "thresholds" in self.modules:
            given["thresholds"] = self.modules["thresholds"]()
        assert isinstance(objective, Fitting)
        loss, metrics = _function(objective)(scores, **given, **objective.own())
        return loss, metrics

    # ----------------------------------------------------------------------------------------------------- export

    def validate(self, folder: Path, step: int) -> None:
        """There is nothing to draw: accuracy is in the log."""

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """What the scorer of the family reads: a fitted scorer's folder, the cosine's towers in HPSv2's layout and in
        half precision; of a network with its own head, the network's own layout."""
        config, objective = self.config, self.objective
        if isinstance(self.source, NoisedMedia):
            assert self.labels is not None
            self.source.save(folder, *self.labels.everything(), self._grades())
            return
        if isinstance(self.settings, Own):
            self.source.save(folder, self._grades())
            return
        if isinstance(self.head, VPLHead):
            self._fill_latents(self.head)
        if config.reward.train == "head":
            backbone, told = str(config.model.path), self.frozen.identity()
        else:
            cosine = isinstance(self.settings, Cosine)
            backbone = BESIDE if cosine else INSIDE
            self.source.save(folder / backbone, dtype=torch.float16 if cosine else torch.float32)
            told = folder_hash(folder / backbone)
        facts = RewardFile(
            family="open_clip", head=self.settings, axes=config.data.axes, resize=config.reward.resize,
            antialias=config.reward.antialias, width=self.source.width, towers=self.source.towers, backbone=backbone,
            backbone_hash=told, users=self.users, fold=config.reward.fold, grades=self._grades(),
            tie=objective.k if isinstance(objective, BTT) else None,
        )  # fmt: skip
        write_reward(folder, facts, self.head)

    def _grades(self) -> Grades | None:
        """What an ordinal run has learned besides scores."""
        if not isinstance(self.objective, Ordinal):
            return None
        return Grades(lowest=self.objective.lowest, thresholds=tuple(self.modules["thresholds"]().tolist()))

    def _fill_latents(self, head: VPLHead) -> None:
        """What each user's own pairs say, as scoring will use it."""
        for number, user in enumerate(self.users):
            groups = [self.items[i] for i in self.contexts.by_user[user]]
            label = torch.tensor([group.values[0] for group in groups], device=self.device)
            one, other = (
                self.source.features(self.source.inputs([g.media[s] for g in groups], [g.prompts[s] for g in groups]))
                for s in (0, 1)
            )
            head.users[number] = head.adapt(one, other, label)

    def describe(self, batch: dict[str, Any]) -> str:
        items = (self.items[i] for i in batch["items"])
        return ", ".join(str(getattr(item, "origin", None) or item.media.name) for item in items)


class Thresholds(nn.Module):
    """grades - 1 rising numbers, from evenly spaced ones around 0."""

    def __init__(self, grades: int):
        super().__init__()
        self.first = nn.Parameter(torch.tensor(-(grades - 2) / 2))
        self.steps = nn.Parameter(torch.full((grades - 2,), 0.5413))  # softplus of it is 1

    def forward(self) -> Tensor:
        return torch.cat([self.first[None], self.first + nn.functional.softplus(self.steps).cumsum(0)])


def _function(objective: Any) -> Any:
    module, _, name = objective.function.partition(":")
    return getattr(importlib.import_module(module), name)
