"""SparsePO's masks (Christopoulou et al. 2410.05102): how much a token counts, from the reference's hidden states."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmalign.methods_mllm import Sparse

__all__ = ["Masks"]


class Masks(nn.Module):
    """Masks of tokens; trained with the policy where they are learned, and not exported.

    The released code has a head per layer and a mixer by default, and heads of the last layer as an option; these are
    of the last layer. Its activation masks average over every activation of every layer; here it is the last hidden
    state alone.
    """

    def __init__(self, settings: Sparse, width: int):
        super().__init__()
        self.settings = settings
        heads = 0 if settings.mask == "activation" else 2 if settings.independent else 1
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(heads))
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, hidden: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """(of log-ratios, of KLs), [N] >= 0 each.

        Args:
            hidden: [N, C] where each token of all answers is predicted; gets no gradient.
            lengths: of the answers, in order.
        """
        states = hidden.detach().float()
        if not self.heads:
            mask = torch.cat([_spread(part) for part in states.mean(1).split(lengths)])
            return mask, mask
        made = [self.dropout(torch.relu(head(states)[:, 0])) for head in self.heads]
        return made[0], made[-1]


def _spread(values: Tensor) -> Tensor:
    """From 0 to 1 over an answer's tokens; 1 where they are all alike."""
    low, high = values.min(), values.max()
    return torch.ones_like(values) if high <= low else (values - low) / (high - low)
