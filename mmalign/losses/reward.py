"""Objectives that fit a scorer of (image, prompt) pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive(image: Tensor, text: Tensor, logit_scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """CLIP's symmetric cross entropy over a batch (2103.00020, figure 3).

    Args:
        image, text: [B, D] L2-normalised embeddings, row i of one belonging to row i of the other.
        logit_scale: scalar, the log of the scale.
    """
    logits = logit_scale.float().exp() * image.float() @ text.float().T
    labels = torch.arange(len(logits), device=logits.device)
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    accuracy = (logits.argmax(1) == labels).float().mean()
    return loss, {"retrieval_accuracy": accuracy.detach()}


def hps(
    image_w: Tensor, image_l: Tensor, text: Tensor, logit_scale: Tensor, label: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """HPS v2's preference loss: softmax over the two images of a prompt, soft labels (2306.09341, equation 3).

    Args:
        image_w, image_l, text: [B, D] L2-normalised embeddings.
        label: [B] probability that w is preferred (0.5 for a tie).

    The authors sum over the batch; this is the mean, so that the learning rate does not depend on batch size.
    """
    scores = torch.stack([(image_w.float() * text.float()).sum(1), (image_l.float() * text.float()).sum(1)], 1)
    log_p = F.log_softmax(logit_scale.float().exp() * scores, dim=1)
    loss = -(label * log_p[:, 0] + (1 - label) * log_p[:, 1]).mean()
    margin = scores[:, 0] - scores[:, 1]
    accuracy = (margin > 0).float() + 0.5 * (margin == 0).float()
    return loss, {"pairwise_accuracy": accuracy.mean().detach(), "margin": margin.mean().detach()}
