"""DeepSpeed's ZeRO behind the names of `shards`: whole weights and optimizer state out of its flat pieces, and back.

It writes no file of DeepSpeed's: its checkpoints are pickles that only the same number of processes can read. What it
knows of DeepSpeed beyond the documented `safe_get_full_*` and `safe_set_full_*` functions is marked.
"""

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch

from alignkit.errors import EnvironmentProblem
from alignkit.models.parameters import whole
from alignkit.train.ranks import is_main


def shards_weights(trainer: Any) -> bool:
    """Tell whether each rank holds a part of the weights only: ZeRO-3."""
    return bool(trainer.accelerator.state.deepspeed_plugin.zero_stage == 3)


def holds(tensor: torch.Tensor) -> bool:
    """Tell whether a ZeRO engine keeps this weight (private names: a part of it, or a copy in float32)."""
    return hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping")


def trained_weight(tensor: torch.Tensor) -> torch.Tensor:
    """Put together a weight in the optimizer's precision: what is held in bfloat16 is a copy of its float32."""
    from deepspeed.utils import safe_get_full_fp32_param

    full = safe_get_full_fp32_param(tensor) if tensor.requires_grad else None
    return whole(tensor).clone() if full is None else full.clone()


def place_weight(place: torch.Tensor, value: torch.Tensor) -> None:
    """Put a whole tensor where the engine holds it: what it computes with, and the optimizer's float32."""
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param

    with deepspeed.zero.GatheredParameters([place] if hasattr(place, "ds_id") else [], modifier_rank=0):
        if not hasattr(place, "ds_id") or is_main():
            place.data.copy_(value)
    if place.requires_grad:
        safe_set_full_fp32_param(place, value.to(place.device, torch.float32))


def gather_optimizer(trainer: Any) -> dict[str, Any] | None:
    """Gather the optimizer's state as a single process has it, on the CPU; on other ranks than 0 None."""
    from deepspeed.utils import safe_get_full_optimizer_state

    optimizer = _optimizer(trainer)
    _link(optimizer)
    flat: dict[str, Any] = next(iter(optimizer.optimizer.state.values()), {})
    state: dict[int, dict[str, Any]] = {}
    optimized = list(chain(*trainer.optimized_groups))  # in the order in which a single process numbers them
    for number, parameter in enumerate(optimized if flat else ()):
        values = {}
        for name, value in flat.items():
            if isinstance(value, torch.Tensor) and value.dim():
                full = safe_get_full_optimizer_state(parameter, name)
                values[name] = full.detach().cpu().clone() if is_main() else None
            else:
                values[name] = copy.deepcopy(value)
        state[number] = values
    if not is_main():
        return None
    numbers = {id(parameter): number for number, parameter in enumerate(optimized)}
    groups = [
        {**group, "params": [numbers[id(one)] for one in members]}
        for group, members in zip(optimizer.param_groups, trainer.optimized_groups, strict=True)
    ]
    return {"state": state, "param_groups": groups}


def scatter_optimizer(trainer: Any, saved: Mapping[str, Any]) -> None:
    """Load the state that a single process would load, of which each rank keeps its part."""
    from deepspeed.utils import safe_set_full_optimizer_state

    optimizer = _optimizer(trainer)
    for group, given in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group |= {key: value for key, value in given.items() if key != "params"}
    if not saved["state"]:
        return
    template, optimized = saved["state"][0], list(chain(*trainer.optimized_groups))
    for flat in _flat_parts(optimizer):  # ZeRO makes these at the first step, and needs them now
        optimizer.optimizer.state[flat] = {
            name: torch.zeros_like(flat) if _is_per_weight(value, optimized[0]) else copy.deepcopy(value)
            for name, value in template.items()
        }
    _link(optimizer)
    for number, parameter in enumerate(optimized):
        for name, value in saved["state"][number].items():
            if _is_per_weight(value, parameter):
                safe_set_full_optimizer_state(parameter, value.to(parameter.device, torch.float32), name)


def guard_backward(trainer: Any) -> None:
    """Look at the loss before the backward pass: DeepSpeed's takes the optimizer step within it.

    A gradient that is not finite where the loss is finite is seen after its step, and ends the run before a save.
    """
    backward = trainer.accelerator.backward

    def guarded(loss: torch.Tensor, **arguments: Any) -> None:
        trainer.refuse_not_finite(float(loss.detach()))
        backward(loss, **arguments)

    trainer.accelerator.backward = guarded


def _is_per_weight(value: Any, parameter: torch.Tensor) -> bool:
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape == shape


def _optimizer(trainer: Any) -> Any:
    """ZeRO's optimizer around the one that updates. DeepSpeed 0.18-0.19 has it at `engine.optimizer`."""
    optimizer = trainer.model_wrapped.optimizer
    if not hasattr(optimizer, "optimizer"):
        raise EnvironmentProblem(
            f"DeepSpeed runs {type(optimizer).__name__}, whose state alignkit cannot read; use launch.strategy zero2 "
            "or zero3 with an AdamW optimizer"
        )
    return optimizer


def _flat_parts(optimizer: Any) -> list[torch.Tensor]:
    """This rank's flat pieces, one per group. Private names: ZeRO-3's, else those of ZeRO-1 and 2."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    raise EnvironmentProblem(f"this DeepSpeed's {type(optimizer).__name__} keeps its weights elsewhere; install 0.19")


def _link(optimizer: Any) -> None:
    """Let the `safe_*` functions find the optimizer's state.

    ZeRO-2 of DeepSpeed 0.19 links it after the step of the first parameter group, when the others have none yet.
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
