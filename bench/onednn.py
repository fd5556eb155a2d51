"""Matrix products of a CPU through oneDNN where torch takes MKL.

MKL gives processors that are not Intel's its AVX2 code: on an AMD EPYC (Zen 5) oneDNN's is 2.2 times as fast. The same
float32 products in another order: a result differs in its last digits.
"""

from __future__ import annotations

import torch

_KEPT = torch.library.Library("aten", "IMPL")  # what it holds ends with it


def use() -> None:
    """Takes oneDNN for `mm` and `addmm`, so for linear layers forward and backward, in this process from now on."""
    _KEPT.impl("mm", _mm, "CPU")
    _KEPT.impl("addmm", _addmm, "CPU")


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.dtype == b.dtype == torch.float32 and a.numel() and b.numel():
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
        return found
    return torch.bmm(a[None], b[None])[0]


def _addmm(added: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    if alpha == beta == 1 and added.dim() == 1 and a.dtype == b.dtype == torch.float32 and a.numel() and b.numel():
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), added, "none", [], "")
        return found
    return beta * added + alpha * _mm(a, b)
