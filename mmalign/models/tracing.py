"""What a computation takes, without carrying it out: bytes that are alive, and floating-point operations.

Tensors are those of torch's `FakeTensorMode`: they have shapes, dtypes and storages of the right size, and no values.
So the real modules run, layer by layer and with the real autograd graph, on models of any size.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Traced(TorchDispatchMode):
    """Inside, every operation is looked at: `live` and `peak` bytes of what it has made, and `flops`.

    A storage counts from the operation that makes it until Python and autograd let go of it, once however many tensors
    share it; what was there before (weights, arguments) does not count. Kernels' own scratch memory does not show.
    `flops` are those of matrix products, convolutions and attention, as torch's `FlopCounterMode` counts them: a
    product of an n x k and a k x m matrix has 2 n k m.

    Real tensors can be traced as well as fake ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}

    def mark(self) -> int:
        """Lets the peak begin anew at what is alive, which is returned."""
        self.peak = self.live
        return self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            self._meet(tensor, made=False)
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            self._meet(tensor, made=True)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **kwargs, out_val=out))
        return out

    def _meet(self, value: Any, *, made: bool) -> None:
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return
        storage = value.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes() if made else 0
        self._known[key] = weakref.ref(storage, partial(self._forget, key)), size
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, reference: object) -> None:
        self.live -= self._known.pop(key)[1]


def without_values(module: nn.Module, mode: FakeTensorMode, device: torch.device | str = "cpu") -> nn.Module:
    """Replaces all parameters and buffers, on whatever device, by fake ones; what was shared is shared again."""
    new: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in new:
            made: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            new[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
        return new[id(tensor)]

    with mode:
        for part in module.modules():
            tables: list[dict[str, Any]] = [part._parameters, part._buffers]
            for named in tables:
                named.update({name: fake(tensor) for name, tensor in named.items() if tensor is not None})
    return module


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; what shares a storage counts once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
