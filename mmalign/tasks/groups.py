"""What was said of a batch of groups, as the tensors that objectives take."""

from __future__ import annotations

import torch
from torch import Tensor

from mmalign.judgements import Group
from mmalign.methods import Preference


def grid(values: Tensor, mask: Tensor) -> Tensor:
    """Values of all pictures [N] as [B, k], zeros where a group has none."""
    if mask.all():
        return values.reshape(mask.shape)
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def judgement(groups: list[Group]) -> dict[str, Tensor]:
    """What people or rewards said of these groups, under every name that an objective may need."""
    widest = max(len(group.media) for group in groups)

    def padded(rows: list[tuple[float, ...]]) -> Tensor:
        return torch.tensor([[*row, *[0.0] * (widest - len(row))] for row in rows])

    phi = padded([group.values for group in groups])
    found = {
        "phi": phi, "label": phi[:, 0], "desirable": phi[:, 0] > 0.5,
        "mask": padded([(1.0,) * len(group.media) for group in groups]).bool(),
        "reward": padded([group.rewards for group in groups]),
        "weight": torch.tensor([group.weight for group in groups]),
    }  # fmt: skip
    if all(group.scores is not None for group in groups):
        found["scores"] = padded([group.scores or () for group in groups])
    if widest == 2 and bool(found["mask"].all()):
        found["gap"] = torch.tensor([group.gap for group in groups])
    return found


def constants(groups: list[Group], objective: Preference) -> dict[str, Tensor]:
    """Numbers of the whole table that an objective needs. ValueError if the table lacks what they are made of."""
    if "scores" in objective.needs and any(group.scores is None for group in groups):
        name = objective.kind  # type: ignore[attr-defined]
        raise ValueError(f"loss.kind {name} needs scores, and some rows have labels or ranks alone; `mmalign prefer` "
                         "adds the scores of any evaluator")  # fmt: skip
    if "mean_strength" not in objective.needs:
        return {}
    mean = sum(group.gap**objective.power for group in groups) / len(groups)  # type: ignore[attr-defined]
    if not mean:
        raise ValueError("no pair is stronger than another: all gaps are 0; use diffusion_dpo, or give scores")
    return {"mean_strength": torch.tensor(mean)}
