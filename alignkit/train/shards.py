"""Whole tensors out of a model that is spread over processes, and back into it: PyTorch's FSDP, and plain models.

Checkpoints and final weights have one layout whatever trained them: what a single process writes. What DeepSpeed holds
is asked of `zero`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from alignkit.models.adapters import TRAINED
from alignkit.models.parameters import take_probe, whole
from alignkit.train import zero
from alignkit.train.ranks import is_main


def set_up(trainer: Any) -> None:
    """Make accelerate shard when the launcher asked for FSDP; call it when the accelerator has just been made.

    On the CPU accelerate 1.15 falls back to DDP without a word: its state knows FSDP on accelerators only. And its
    precision policy rounds gradients, before they are summed, and the model's outputs to 16 bits: log-probabilities
    of whole answers would be off by whole nats. Activations are recomputed by transformers, not by accelerate's
    wrappers around layers: with FSDP 2 it is the same work, and PEFT does not save the adapters of wrapped layers.
    """
    accelerator = trainer.accelerator
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        trainer.is_fsdp_enabled = True
    if state.fsdp_plugin.activation_checkpointing:
        state.fsdp_plugin.activation_checkpointing = False
        trainer.args.activation_checkpointing = trainer.args.gradient_checkpointing = True
    if accelerator.mixed_precision != "no":
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float16
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)


def settle(trainer: Any) -> None:
    """Take a first forward pass with every adapter on; call it when the model has just been sharded.

    FSDP looks in its first pass at which weights are trained, and in what precision their gradients are summed. In
    DPO that pass would be the reference's, with the adapters switched off, and their gradients would stay 16 bits.
    """
    if isinstance(trainer.model, PeftModel) and trainer.is_fsdp_enabled:
        kind = trainer.model.peft_config[TRAINED].task_type
        take_probe(trainer.model, vocab_size=len(trainer.processing_class), reward=kind == "SEQ_CLS")
        reshard(trainer.model)


def is_sharded(trainer: Any) -> bool:
    """Tell whether a rank holds a part of each weight only, so that every rank must take part in a forward pass."""
    return bool(trainer.is_fsdp_enabled) or (trainer.is_deepspeed_enabled and zero.shards_weights(trainer))


def gather_model(trainer: Any) -> dict[str, torch.Tensor] | None:
    """Gather the weights to save under the model's own names, whole and on the CPU; on other ranks than 0 None.

    Of a model with adapters these are the adapters and what is saved with them. All ranks must call it. None, too,
    for a model that is whole in every process.
    """
    model = trainer.model
    adapted, named = isinstance(model, PeftModel), model.state_dict(keep_vars=True)
    wanted = ((name, weight) for name, weight in named.items() if not adapted or is_adapter(name))
    if trainer.is_deepspeed_enabled:
        return gather(wanted, zero.trained_weight)
    return gather(wanted) if is_sharded(trainer) else None


@torch.no_grad()
def gather(
    named: Iterable[tuple[str, torch.Tensor]], put_together: Callable[[torch.Tensor], torch.Tensor] = whole
) -> dict[str, torch.Tensor] | None:
    """Gather tensors on rank 0's CPU, whole; elsewhere None. All ranks must call it with the same names.

    Tied weights stay one tensor, as `save_pretrained` expects.
    """
    state: dict[str, torch.Tensor] = {}
    seen: dict[int, torch.Tensor] = {}
    for name, tensor in named:
        if id(tensor) not in seen:
            full = put_together(tensor).detach()
            seen[id(tensor)] = full.cpu().contiguous() if is_main() else torch.empty(0)
        state[name] = seen[id(tensor)]
    return state if is_main() else None


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale gradients to a total norm of at most `max_norm` and return what it was; some may be sharded, some whole."""
    given = [parameter for parameter in parameters if parameter.grad is not None]
    groups = [[p for p in given if isinstance(p, DTensor) == sharded] for sharded in (True, False)]
    norms = [whole(get_total_norm([p.grad for p in group if p.grad is not None])) for group in groups if group]
    total = torch.stack(norms).norm() if norms else torch.zeros(())
    for group in groups:
        clip_grads_with_norm_(group, max_norm, total)
    return total


def gather_optimizer(trainer: Any) -> dict[str, Any] | None:
    """Gather the optimizer's state as a single process has it, on the CPU; on other ranks than 0 None."""
    if trainer.is_deepspeed_enabled:
        return zero.gather_optimizer(trainer)
    if not is_sharded(trainer):
        return dict(trainer.optimizer.state_dict()) if is_main() else None
    found = trainer.optimizer.state_dict()
    state = {
        number: {name: _to_main(value) if isinstance(value, torch.Tensor) else value for name, value in values.items()}
        for number, values in found["state"].items()
    }
    return {**found, "state": state} if is_main() else None


def scatter_model(places: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    """Copy saved tensors into the places of the same names: whole ones, or this rank's part of each."""
    with torch.no_grad():
        for name, value in saved.items():
            place = places[name]
            if zero.holds(place):
                zero.place_weight(place, value)
            elif isinstance(place, DTensor):
                place.to_local().copy_(_my_part(place, value.to(place.dtype)).to_local())
            else:
                place.copy_(value)


def scatter_optimizer(trainer: Any, saved: dict[str, Any]) -> None:
    """Load the state that a single process would load, of which each rank keeps its part."""
    if trainer.is_deepspeed_enabled:
        zero.scatter_optimizer(trainer, saved)
        return
    parameters = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]

    def place(parameter: torch.Tensor, value: Any) -> Any:
        is_per_weight = isinstance(value, torch.Tensor) and value.shape == parameter.shape
        return _my_part(parameter, value) if isinstance(parameter, DTensor) and is_per_weight else value

    state = {
        number: {name: place(parameters[number], value) for name, value in values.items()}
        for number, values in saved["state"].items()
    }
    trainer.optimizer.load_state_dict({**saved, "state": state})


def is_adapter(name: str) -> bool:
    """Tell whether a weight of an adapted model is saved with its adapter."""
    return ".lora_" in name or ".modules_to_save." in name


def reshard(model: torch.nn.Module) -> None:
    """Let go of the whole weights that FSDP keeps between a forward pass and its backward, when none follows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered_root(model: torch.nn.Module) -> Iterator[None]:
    """Hold whole what lies outside a sharded model's layers; `generate` of an adapted model passes by its forward."""
    if isinstance(model, FSDPModule):
        model.unshard()
    yield
    if isinstance(model, FSDPModule):
        model.reshard()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a weight."""
    if isinstance(tensor, DTensor):
        return tensor.detach().to_local()
    return getattr(tensor, "ds_tensor", tensor).detach()


def _to_main(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor on rank 0's CPU; elsewhere nothing is kept of it."""
    full = whole(tensor)
    return full.cpu() if is_main() else torch.empty(0)


def _my_part(like: DTensor, value: torch.Tensor) -> DTensor:
    """Spread a tensor as `like` is, each rank cutting its part from the whole it has: nothing is sent."""
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
