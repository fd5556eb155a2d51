"""Several processes of one run, through accelerate: copies of the model (DDP), or a share of it each (FSDP2, ZeRO).

A checkpoint and an export hold whole tensors however the run is laid out, so that one process can go on where two
stopped, and the other way round.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from mmalign import zero
from mmalign.jobs import TrainConfig

PATIENCE = timedelta(hours=2)
"""How long processes wait for each other: validation pictures and the export are made by one of them."""

_ELSEWHERE = {
    "ACCELERATE_USE_FSDP": "use_fsdp: write `sharding: fsdp2` into the config",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed: write `sharding: zero2` into the config",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM, which mmalign does not use: write `sharding: fsdp2` into the config",
}


def accelerator(config: TrainConfig, device: torch.device) -> Accelerator:
    """The accelerator of a run. Precision, accumulation and sharding are the config's, not accelerate's own.

    Raises:
        ValueError: accelerate's configuration asks for another way to share a model, or there is nobody to share with.
    """
    for name, what in _ELSEWHERE.items():
        if os.environ.get(name, "false").lower() == "true":
            raise ValueError(f"accelerate's configuration turns on {what}, and leave it out of `accelerate config`")
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ValueError("accelerate's configuration turns on torch.compile: write optim.compile: true instead")
    precision = "no" if config.precision == "fp32" else config.precision
    if AcceleratorState._shared_state:  # kept for the whole process; a second run in it may want others
        AcceleratorState._reset_state(reset_partial_state=True)
    if device.index is not None:
        torch.cuda.set_device(device)
    plugin = _plugin() if config.sharding == "fsdp2" else None
    if config.sharding == "zero2":
        zero.check()
    made = Accelerator(
        mixed_precision=precision, cpu=device.type == "cpu", log_with=list(config.log.trackers) or None,
        project_dir=config.output, fsdp_plugin=plugin,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop counts micro-batches itself
        kwargs_handlers=[
            # Some parameters have no part in a loss: text branches of a last block, layers above the one that is read.
            DistributedDataParallelKwargs(find_unused_parameters=True), InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )  # fmt: skip
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # set by the line above, for launchers that are not used here
    if config.sharding != "none" and made.num_processes == 1:
        raise ValueError(
            f"sharding: {config.sharding} shares a model among processes, and there is one; start several with "
            "`accelerate launch --num_processes 2 -m mmalign train ...` (on CPUs `torchrun --nproc-per-node 2 -m "
            "mmalign train ...`), or use sharding: none"
        )
    if plugin is not None:
        _on_cpu_too(made, plugin)
    return made


def _plugin() -> FullyShardedDataParallelPlugin:
    """FSDP2 in the tensors' own precision: what is computed in half precision is autocast's business, as elsewhere."""
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=[],
        reshard_after_forward=True, cpu_ram_efficient_loading=False, activation_checkpointing=False,
        mixed_precision_policy=MixedPrecisionPolicy(), state_dict_type="FULL_STATE_DICT",
    )  # fmt: skip


def _on_cpu_too(made: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """accelerate (1.15) forgets the plugin where processes are on CPUs and would copy the model; torch can share it."""
    if made.distributed_type == DistributedType.MULTI_CPU:
        made.state.fsdp_plugin = plugin
        made.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def prepare(
    made: Accelerator, module: nn.Module, task: Any, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> tuple[Any, Any]:
    """`accelerator.prepare`, with what a task's modules need of DDP, FSDP2 or ZeRO.

    Under FSDP2 the blocks of the task's network are gathered one after the other, what is outside of blocks with the
    whole module.
    """
    if config.sharding == "zero2":
        return zero.prepare(module, optimizer, config)
    if is_shared(made):
        if getattr(task, "frozen", None) is not None:
            module.reference = task.frozen  # shared like the policy; nothing of it is trained or saved
        made.state.fsdp_plugin.transformer_cls_names_to_wrap = _blocks(task.network)
    elif made.num_processes > 1:
        large = ("trained.lagged.", "trained.watch._weights.")
        lagged = [name for name, _ in module.named_buffers() if name.startswith(large)]
        # Alike in all processes by themselves, and as large as the model.
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, lagged)
    wrapped, prepared = made.prepare(module, optimizer)
    return wrapped, prepared


def adding_up(made: Accelerator, wrapped: nn.Module, optimizer: Any, last: bool) -> AbstractContextManager[Any]:
    """Around the forward of a micro-batch: gradients are sent with the last one of a step, where they can wait."""
    return nullcontext() if last or isinstance(optimizer, zero.SharedAdamW) else made.no_sync(wrapped)


def backward(made: Accelerator, optimizer: Any, loss: Tensor, last: bool) -> None:
    """Gradients of a micro-batch; `last`: of a step."""
    if isinstance(optimizer, zero.SharedAdamW):
        optimizer.backward(loss, last)
    else:
        made.backward(loss)


def clip(made: Accelerator, optimizer: Any, parameters: Sequence[Tensor], limit: float) -> Tensor:
    """Clips the gradient to the norm `limit` in all processes together; its norm before that, float32 scalar."""
    if isinstance(optimizer, zero.SharedAdamW):
        return optimizer.clip()
    norm: Tensor = whole(torch.as_tensor(made.clip_grad_norm_(parameters, limit)))
    return norm


def _blocks(network: nn.Module) -> list[str]:
    """Class names of a network's blocks, as diffusers and transformers list them for splitting over devices."""
    names = set(getattr(network, "_no_split_modules", None) or ())
    there = {type(module).__name__ for module in network.modules() if any(True for _ in module.parameters())}
    return sorted(names & there)


def is_shared(made: Accelerator) -> bool:
    """Whether each process holds only a part of the model."""
    return made.distributed_type == DistributedType.FSDP


def takes_all(made: Accelerator, optimizer: Any) -> bool:
    """Whether a checkpoint is put together from the shares of all processes."""
    return is_shared(made) or isinstance(optimizer, zero.SharedAdamW)


def any_process(made: Accelerator, flag: bool) -> bool:
    """Whether the flag is set in any process: Ctrl-C reaches them within different steps."""
    if made.num_processes == 1:
        return flag
    raised = torch.tensor(float(flag), device=made.device)
    return bool(made.reduce(raised, "sum").item() > 0)


def means(made: Accelerator, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scalars averaged over processes, float32, in one message."""
    stacked = torch.stack([value.detach().float().reshape(()).to(made.device) for value in values.values()])
    if made.num_processes > 1:
        stacked = made.reduce(stacked, "mean")
    return dict(zip(values, stacked.unbind(), strict=True))


# ---------------------------------------------------------------------------------------------- whole tensors


def whole(tree: Any, keep: bool = True) -> Any:
    """A tree of dictionaries and lists with shared tensors put together, on the CPU; to be called by all processes.

    Args:
        keep: False in processes that only take part: they get None for each shared tensor.
    """
    if isinstance(tree, DTensor):
        full = tree.full_tensor().detach()
        return full.cpu() if keep else None
    if isinstance(tree, Mapping):
        return {key: whole(value, keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(whole(value, keep) for value in tree)
    return tree


def part(full: Tensor, like: Tensor) -> Tensor:
    """This process's share of a whole tensor, cut as `like` is; the tensor itself if that is whole."""
    if not isinstance(like, DTensor):
        return full
    full = full.to(like.device, like.dtype)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)  # every process has read it


def optimizer_parts(state: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """An optimizer's state with its moments cut as the parameters are."""
    moments = {
        index: {
            name: part(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in each.items()
        }
        for index, each in state["state"].items()
    }
    return {**state, "state": moments}


# ------------------------------------------------------------------------------------ pictures and the last model


def validate(made: Accelerator, wrapped: nn.Module, task: Any, folder: Path, step: int) -> None:
    """The task's pictures, written by the main process; all take part where the model is shared."""
    if not is_shared(made):
        if made.is_main_process:
            task.validate(folder, step)
        return
    with tempfile.TemporaryDirectory() as nowhere, torch.no_grad():
        place = folder if made.is_main_process else Path(nowhere)
        wrapped(lambda: task.validate(place, step))  # within the forward, where the shared parts are at hand
    assert isinstance(wrapped, FSDPModule)
    wrapped.reshard()


def put_together(made: Accelerator, task: Any) -> None:
    """Gives the main process's task a whole network on the CPU, to export; to be called by all, at the end of a run.

    Everything trained besides (text encoders) is refused for shared runs, so that the network is all there is.
    """
    if not is_shared(made):
        return
    state = whole(dict(task.network.state_dict()), keep=made.is_main_process)
    if made.is_main_process:
        task.take_whole(state)
