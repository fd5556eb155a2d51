"""DeepSpeed's ZeRO, stage 2, under the training loop: whole weights in each process, a share of gradients and moments.

DeepSpeed steps where it clips, and keeps float32 copies and moments of all trained weights as one flat tensor that is
cut among processes. Here that optimiser looks like torch's AdamW to the loop: its state, in a checkpoint, is whole and
by parameter, as in every other run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmalign.jobs import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def check() -> None:
    """ValueError where DeepSpeed is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "sharding: zero2 needs DeepSpeed; install it with `pip install deepspeed`, or use sharding: fsdp2"
        ) from error


def prepare(module: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig) -> tuple[Any, SharedAdamW]:
    """DeepSpeed's engine around the module, and the optimiser as the loop knows it."""
    import deepspeed

    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    processes, batch = dist.get_world_size(), config.optim.batch_size
    settings = {
        "train_micro_batch_size_per_gpu": batch, "train_batch_size": batch * processes,
        "gradient_accumulation_steps": 1,  # the loop counts micro-batches itself
        "gradient_clipping": config.optim.max_grad_norm or 0.0,
        "zero_optimization": {"stage": 2, "overlap_comm": False},
        "zero_allow_untested_optimizer": True, "steps_per_print": 10**12,
    }  # fmt: skip
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles a kernel of inference for CPUs
    engine = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)[0]
    return engine, SharedAdamW(engine, trained)


class SharedAdamW:
    """An AdamW whose moments are cut among processes. All of them have to call its methods."""

    def __init__(self, engine: Any, parameters: Sequence[nn.Parameter]):
        self._engine, self._parameters = engine, list(parameters)

    @property
    def _torch(self) -> torch.optim.Optimizer:
        found: torch.optim.Optimizer = self._engine.optimizer.optimizer
        return found

    def backward(self, loss: Tensor, last: bool) -> None:
        """Gradients of a micro-batch.

        Every parameter gets one: DeepSpeed adds them up in the order of their coming, which has to be the same in
        processes where a part of the model had no work (a batch without images).
        """
        nothing = torch.stack([parameter.sum() for parameter in self._parameters]).sum() * 0
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss + nothing.to(loss.dtype))

    def clip(self) -> Tensor:
        """The norm of the gradient before clipping; DeepSpeed takes the optimiser's step with it, unless it is not
        finite."""
        self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32)

    def step(self) -> None:
        """Taken by `clip`."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Done by `clip`."""

    def state_dict(self) -> dict[str, Any]:
        """As torch's AdamW would have it, moments whole, on the CPU."""
        state = {}
        for entry in self._torch.state.values():  # one flat tensor's, and none before the first step
            for index, parameter in enumerate(self._parameters):
                moments = {name: self._whole(parameter, name) for name in MOMENTS}
                state[index] = {"step": entry["step"].detach().cpu().clone(), **moments}
        (group,) = self._torch.param_groups
        return {"state": state, "param_groups": [{**group, "params": list(range(len(self._parameters)))}]}

    def _whole(self, parameter: nn.Parameter, name: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        found: Tensor = safe_get_full_optimizer_state(parameter, name).detach().cpu()
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state of `state_dict` or of torch's AdamW, once the module's weights are the checkpoint's."""
        zero, inner = self._engine.optimizer, self._torch
        zero.refresh_fp32_params()
        (saved,) = state["param_groups"]
        inner.param_groups[0].update({name: value for name, value in saved.items() if name != "params"})
        if not state["state"]:
            return
        (flat,) = zero.single_partition_of_fp32_groups
        entry: dict[str, Any] = {"step": torch.as_tensor(state["state"][0]["step"]).clone()}
        for name in MOMENTS:
            entry[name] = torch.zeros_like(flat)
            for index, parameter in enumerate(self._parameters):
                place = parameter._hp_mapping  # type: ignore[attr-defined]  # None where the share is another process's
                if place is not None:
                    here, there = place.lp_fragment_address, place.hp_fragment_address
                    part = state["state"][index][name].flatten()[here.start : here.start + here.numel]
                    entry[name][there.start : there.start + there.numel] = part.to(flat)
        inner.state[flat] = entry
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
