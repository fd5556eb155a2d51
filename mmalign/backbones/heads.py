"""Reward heads on frozen features: several layers as they are published, one affine map where that is what they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mmalign.weights import load_into, read_state_dict

__all__ = ["FiveLinear", "check_fits", "fold", "load_head"]

WIDTHS = (1024, 128, 64, 16, 1)


class FiveLinear(nn.Module):
    """Five linear layers of ``layers``, dropout after the first three: [..., width] -> [..., 1].

    LAION's aesthetic predictor v2 and ImageReward have this head at places 0, 2, 4, 6 and 7. Both wrote it with its
    activations commented out, so that it is one affine map wherever dropout is off; see `fold`. One of LAION's files
    was trained with them, and has its layers at places 0, 3, 6, 9 and 11.

    Args:
        width: number of features.
        relu: whether a ReLU follows each layer but the last.
    """

    def __init__(self, width: int, relu: bool = False):
        super().__init__()
        layers: list[nn.Module] = []
        for old, new, dropout in zip((width, *WIDTHS[:-1]), WIDTHS, (0.2, 0.2, 0.1, None, None), strict=True):
            layers.append(nn.Linear(old, new))
            if relu and new > 1:
                layers.append(nn.ReLU())
            if dropout is not None:
                layers.append(nn.Dropout(dropout))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.layers(features)
        return result


def fold(layers: nn.Sequential) -> nn.Linear:
    """The composition of linear layers, dropout apart, as one linear layer, in float64."""
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    weight = torch.eye(linears[0].in_features, dtype=torch.float64)
    bias = torch.zeros(linears[0].in_features, dtype=torch.float64)
    for layer in linears:
        weight = layer.weight.detach().double() @ weight
        bias = layer.weight.detach().double() @ bias + layer.bias.detach().double()
    folded = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    with torch.no_grad():
        folded.weight.copy_(weight)
        folded.bias.copy_(bias)
    return folded


def load_head(*, checkpoint: Path, head: str, device: torch.device, dtype: torch.dtype) -> nn.Sequential:
    """LAION's aesthetic head as a map [N, D] -> [N, 1], always float32 (`dtype` is the towers').

    Args:
        head: v1, keys ``weight, bias``; v2 and v2-ava-logos, keys ``layers.{0,2,4,6,7}.{weight,bias}``, folded exactly
            in float64; v2-ava-logos-relu, keys ``layers.{0,3,6,9,11}.{weight,bias}``.

    Raises:
        ValueError: the file cannot be read safely, or does not have these tensors.
    """
    state = read_state_dict(checkpoint)
    if head == "v1":
        linear = nn.Linear(_width(state, "weight"), 1)
        load_into(linear, state, str(checkpoint))
        layers = nn.Sequential(linear)
    else:
        relu = head.endswith("relu")
        five = FiveLinear(_width(state, "layers.0.weight"), relu)
        load_into(five, state, str(checkpoint))
        layers = five.layers if relu else nn.Sequential(fold(five.layers))
    return layers.float().eval().requires_grad_(False).to(device)


def _width(state: dict[str, Tensor], name: str) -> int:
    """Number of features that the head takes, so that heads on other CLIPs load; 768 if the file does not say."""
    return int(state[name].shape[1]) if name in state and state[name].ndim == 2 else 768


def check_fits(state: Mapping[str, Tensor], file: Path, kind: str, width: str) -> None:
    """Whether a checkpoint's names and shapes are those of a head; values are not looked at.

    Args:
        width: number of features in digits.
        kind: ``linear``, ``mlp5`` (`FiveLinear`) or ``mlp5_relu`` (with its activations).

    Raises:
        ValueError: missing, unexpected or mis-shaped tensors, all named.
    """
    with torch.device("meta"):
        head = nn.Linear(int(width), 1) if kind == "linear" else FiveLinear(int(width), kind == "mlp5_relu")
    load_into(head, state, str(file), assign=True)
