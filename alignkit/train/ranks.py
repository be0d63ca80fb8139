"""The processes of one job: who they are, what they tell each other, what one of them does for all, and whole tensors
out of a model that is spread over them, and back into it: FSDP, DeepSpeed's ZeRO, plain models.

Objects travel as JSON: nothing is ever unpickled. Checkpoints and final weights have the layout that a single process
writes. Of DeepSpeed's own nothing is written: they are pickles that only the same number of processes can read. What is
used of it beyond the documented `safe_get_full_*` and `safe_set_full_*` functions is marked.
"""

import atexit
import copy
import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain, product
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils._pytree import tree_map_only

import alignkit
from alignkit import errors
from alignkit.errors import AlignKitError, EnvironmentProblem, Problem, RankError, RunError, Stopped, UsageError
from alignkit.models.adapters import TRAINED, is_adapter
from alignkit.models.parameters import take_probe, whole
from alignkit.recipe import Stage

_Value = TypeVar("_Value")
_Error = TypeVar("_Error", bound=AlignKitError)
_TOKEN_SECONDS = 30.0  # a network file system may show a new file late


def world_size() -> int:
    """The number of processes a launcher started, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number in the job."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Tell whether this process writes the files and speaks for the job."""
    return rank() == 0


def uses_fsdp() -> bool:
    """Tell whether the launcher asked for FSDP."""
    return world_size() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def start(stage: Stage, run_dir: Path) -> None:
    """Join the other processes and make sure that all of them do the same work on the same directory."""
    if world_size() == 1:
        return
    from alignkit.models.load import pick_device

    timeout = timedelta(seconds=stage.launch.timeout_seconds)
    on_cpu = pick_device(stage.launch.device) == "cpu"
    state = PartialState(cpu=True, backend="gloo", timeout=timeout) if on_cpu else PartialState(timeout=timeout)
    if state.num_processes != world_size():
        what = f"WORLD_SIZE is {world_size()} but accelerate sees {state.num_processes} processes; start them with "
        raise EnvironmentProblem(f"{what}`accelerate launch` or torchrun")
    values = json.dumps(stage.fingerprint_values(), sort_keys=True, default=str)
    digest = hashlib.blake2b(values.encode(), digest_size=8).hexdigest()
    mine = {"run directory": str(run_dir), "alignkit version": alignkit.__version__, "recipe": digest}
    everyone = gather({"host": socket.gethostname(), **mine})
    main = everyone[0]
    for name, (number, other) in product(mine, enumerate(everyone)):
        if other[name] != main[name]:
            what = f"the processes do not do the same work: {name} is {main[name]} for rank 0 on {main['host']} and "
            what += f"{other[name]} for rank {number} on {other['host']}; start all of them with the same command, "
            raise met_by_all(RunError(f"{what}recipe and alignkit"))
    # What rank 0 writes into the run directory must be seen by every rank.
    path, token = run_dir / ".ranks", share(secrets.token_hex(8))
    once(lambda: path.write_text(token, encoding="utf-8"))
    deadline = time.monotonic() + _TOKEN_SECONDS
    while not (seen := path.is_file() and path.read_text(encoding="utf-8") == token) and time.monotonic() < deadline:
        time.sleep(0.2)
    found = gather([seen, socket.gethostname()])
    if is_main():
        path.unlink(missing_ok=True)
    for number, host in ((number, host) for number, (seen, host) in enumerate(found) if not seen):
        what = f"is not the same directory for all processes: rank {number} on {host} does not see what rank 0 writes "
        what += "there; put it on a file system that all nodes share, with --out"
        raise met_by_all(RunError(what, where=str(run_dir)))


def leave_at_exit() -> None:
    """Take leave of the other processes when this one ends; call it when all of them have finished their work."""
    if world_size() > 1:
        gather(None)  # waits for them
        atexit.unregister(dist.destroy_process_group)
        atexit.register(dist.destroy_process_group)


def gather(value: Any) -> list[Any]:
    """Collect every rank's value, by rank; values must be JSON-able. Waits for all ranks."""
    if world_size() == 1:
        return [value]
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(_device())
    sizes = [torch.zeros(1, dtype=torch.long, device=content.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([content.numel()], device=content.device))
    padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8, device=content.device)
    padded[: content.numel()] = content
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [json.loads(bytes(part[: int(size)].cpu().numpy())) for part, size in zip(parts, sizes, strict=True)]


def share(value: Any) -> Any:
    """Give rank 0's value to every rank; it must be JSON-able."""
    return gather(value if is_main() else None)[0]


def largest(value: int) -> int:
    """Find the largest of all ranks' whole numbers: one small reduction, cheap enough for every step."""
    if world_size() == 1:
        return value
    found = torch.tensor([value], device=_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def share_out(items: Sequence[_Value]) -> tuple[list[_Value], int]:
    """Deal out a list in equal parts, filled up with its end: this rank's part, and how much of it is its own."""
    size, last = -(-len(items) // world_size()), len(items) - 1
    start = rank() * size
    mine = [items[min(place, last)] for place in range(start, start + size)]
    return mine, max(0, min(size, len(items) - start))


def total(values: torch.Tensor) -> torch.Tensor:
    """Add up all ranks' tensors of this shape, on the CPU."""
    if world_size() == 1:
        return values.cpu()
    found = values.to(_device(), copy=True)
    dist.all_reduce(found)
    return found.cpu()


def met_by_all(error: _Error) -> _Error:
    """Mark an error that every rank raises alike, so that rank 0 reports it."""
    error.shared = not is_main()
    return error


def attempt(work: Callable[[], _Value]) -> _Value:
    """Run work that holds no collective operation on every rank; when it fails on one, it fails on all.
    The error is raised where it happened, and a copy of it elsewhere. A copy has `shared` set: whoever reports errors
    leaves it to the rank it came from."""
    result: _Value | None = None
    error: Exception | None = None
    said: dict[str, Any] | None = None
    try:
        result = work()
    except errors.Interrupt as interrupt:
        error = interrupt.stopped
    except Exception as caught:  # raised again below, on every rank
        error = caught
    if error is not None:
        text = str(error) if isinstance(error, AlignKitError) else f"{type(error).__name__}: {errors.first_line(error)}"
        problems = [(each.what, each.where) for each in error.problems] if isinstance(error, UsageError) else []
        code = getattr(error, "exit_code", 1)
        said = {"type": type(error).__name__, "text": text, "problems": problems, "code": code}
    everyone = gather(said)
    if error is not None:
        raise error
    for number, other in ((number, other) for number, other in enumerate(everyone) if other is not None):
        kind: Any = getattr(errors, other["type"], None)
        copy: AlignKitError
        if kind is None or not issubclass(kind, AlignKitError):
            copy = RankError(f"rank {number} failed: {other['text']}")
        elif issubclass(kind, UsageError):
            copy = kind([Problem(what, where) for what, where in other["problems"]])
        else:
            copy = kind(other["text"], **({"exit_code": other["code"]} if issubclass(kind, Stopped) else {}))
        copy.shared = True
        raise copy
    return result  # type: ignore[return-value]  # None only after an error


def alike(work: Callable[[], _Value]) -> _Value:
    """Run work that all ranks do alike, collectives included; the error that all of them meet is reported by rank 0."""
    try:
        return work()
    except AlignKitError as error:
        met_by_all(error)
        raise
    except errors.Interrupt as interrupt:
        raise met_by_all(interrupt.stopped) from None


def once(work: Callable[[], _Value]) -> _Value:
    """Run work on rank 0 only and return its JSON-able result on every rank; its error is raised on every rank."""
    if world_size() == 1:
        return work()
    shared: _Value = share(attempt(work if is_main() else lambda: None))
    return shared


def first(work: Callable[[], _Value]) -> _Value:
    """Run work on rank 0 and then on the others, which find in the cache what it left; it holds no collective."""
    if world_size() == 1:
        return work()
    found: list[_Value] = []
    for mine in (is_main(), not is_main()):
        attempt(lambda mine=mine: found.append(work()) if mine else None)  # type: ignore[misc]
    return found[0]


def _device() -> torch.device:
    """Where collectives take their tensors from: NCCL knows only the device's memory."""
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")


def set_up_shards(trainer: Any) -> None:
    """Make accelerate shard when the launcher asked for FSDP; call it when the accelerator has just been made.

    On the CPU accelerate 1.15 falls back to DDP: its state knows FSDP on accelerators only. Its precision policy rounds
    gradients, before they are summed, and outputs to 16 bits: log-probabilities of answers would be off by whole nats.
    Transformers recomputes activations, for PEFT does not save the adapters of layers that accelerate has wrapped."""
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


def settle_shards(trainer: Any) -> None:
    """Take a first forward pass with every adapter on; call it when the model has just been sharded.
    FSDP looks in its first pass at which weights are trained, and in what precision their gradients are summed. In
    DPO that pass would be the reference's, with the adapters switched off, and their gradients would stay 16 bits."""
    if isinstance(trainer.model, PeftModel) and trainer.is_fsdp_enabled:
        kind = trainer.model.peft_config[TRAINED].task_type
        take_probe(trainer.model, vocab_size=len(trainer.processing_class), reward=kind == "SEQ_CLS")
        reshard(trainer.model)


def is_sharded(trainer: Any) -> bool:
    """Tell whether a rank holds a part of each weight only, so that every rank must take part in a forward pass."""
    zero = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    return bool(trainer.is_fsdp_enabled) or (zero is not None and zero.zero_stage == 3)


def gather_model(trainer: Any) -> dict[str, torch.Tensor] | None:
    """Gather the weights to save under the model's own names, whole and on the CPU; on other ranks than 0 None.
    Of a model with adapters these are the adapters and what is saved with them. All ranks must call it. None, too,
    for a model that is whole in every process."""
    model = trainer.model
    adapted, named = isinstance(model, PeftModel), model.state_dict(keep_vars=True)
    wanted = ((name, weight) for name, weight in named.items() if not adapted or is_adapter(name))
    if not trainer.is_deepspeed_enabled:
        return gather_tensors(wanted) if is_sharded(trainer) else None
    from deepspeed.utils import safe_get_full_fp32_param

    def in_float32(weight: torch.Tensor) -> torch.Tensor:  # what is held in bfloat16 is a copy of the optimizer's
        full = safe_get_full_fp32_param(weight) if weight.requires_grad else None
        return whole(weight).clone() if full is None else full.clone()

    return gather_tensors(wanted, in_float32)


@torch.no_grad()
def gather_tensors(
    named: Iterable[tuple[str, torch.Tensor]], put_together: Callable[[torch.Tensor], torch.Tensor] = whole
) -> dict[str, torch.Tensor] | None:
    """Gather tensors on rank 0's CPU, whole; elsewhere None. All ranks must call it with the same names.
    Tied weights stay one tensor, as `save_pretrained` expects."""
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


def copy_tensors(state: Any) -> Any:
    """Copy a state with all of its tensors to the CPU's memory."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state)


def gather_optimizer(trainer: Any) -> dict[str, Any] | None:
    """Gather the optimizer's state as a single process has it; on other ranks than 0 None. It is a copy on the CPU, but
    for a model that is whole in every process: there these are the optimizer's own tensors."""
    if trainer.is_deepspeed_enabled:
        return _gather_zero(trainer)
    if not is_sharded(trainer):
        return dict(trainer.optimizer.state_dict()) if is_main() else None
    found = trainer.optimizer.state_dict()
    state = {}
    for number, values in found["state"].items():
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        copied = {name: value if isinstance(value, DTensor) else value.clone() for name, value in tensors.items()}
        state[number] = values | (gather_tensors(copied.items()) or {})
    return {**found, "state": state} if is_main() else None


@torch.no_grad()
def scatter_model(places: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    """Copy saved tensors into the places of the same names: whole ones, or this rank's part of each."""
    for name, value in saved.items():
        place, is_part = places[name], hasattr(places[name], "ds_id")
        if isinstance(place, DTensor):
            place.to_local().copy_(_my_part(place, value.to(place.dtype)).to_local())
        elif is_part or hasattr(place, "_hp_mapping"):  # ZeRO keeps a part of it, or its float32
            import deepspeed
            from deepspeed.utils import safe_set_full_fp32_param

            with deepspeed.zero.GatheredParameters([place] if is_part else [], modifier_rank=0):
                if not is_part or is_main():
                    place.data.copy_(value)
            if place.requires_grad:
                safe_set_full_fp32_param(place, value.to(place.device, torch.float32))
        else:
            place.copy_(value)


def scatter_optimizer(trainer: Any, saved: dict[str, Any]) -> None:
    """Load the state that a single process would load, of which each rank keeps its part."""
    if trainer.is_deepspeed_enabled:
        return _scatter_zero(trainer, saved)
    state = {number: dict(values) for number, values in saved["state"].items()}
    for number, parameter in enumerate(chain(*(group["params"] for group in trainer.optimizer.param_groups))):
        for name, value in state.get(number, {}).items():
            if isinstance(parameter, DTensor) and _is_per_weight(value, parameter):
                state[number][name] = _my_part(parameter, value)
    trainer.optimizer.load_state_dict({**saved, "state": state})


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


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a weight."""
    if isinstance(tensor, DTensor):
        return tensor.detach().to_local()
    return getattr(tensor, "ds_tensor", tensor).detach()


def _my_part(like: DTensor, value: torch.Tensor) -> DTensor:
    """Spread a tensor as `like` is, each rank cutting its part from the whole it has: nothing is sent."""
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _gather_zero(trainer: Any) -> dict[str, Any] | None:
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
    if (beside := getattr(trainer, "beside", None)) is not None:  # a critic's, numbered behind the policy's
        own = copy_tensors(beside.state_dict())
        state |= {len(optimized) + number: values for number, values in own["state"].items()}
        groups += [{**group, "params": [len(optimized) + n for n in group["params"]]} for group in own["param_groups"]]
    return {"state": state, "param_groups": groups}


def _scatter_zero(trainer: Any, saved: Mapping[str, Any]) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state

    optimizer, optimized = _optimizer(trainer), list(chain(*trainer.optimized_groups))
    groups, count = saved["param_groups"], len(optimizer.param_groups)
    if (beside := getattr(trainer, "beside", None)) is not None:
        state = {number - len(optimized): values for number, values in saved["state"].items()}
        own = [{**group, "params": [n - len(optimized) for n in group["params"]]} for group in groups[count:]]
        beside.load_state_dict({"state": {n: v for n, v in state.items() if n >= 0}, "param_groups": own})
        groups = groups[:count]
    for group, given in zip(optimizer.param_groups, groups, strict=True):
        group |= {key: value for key, value in given.items() if key != "params"}
    if not saved["state"]:
        return
    template = saved["state"][0]
    # This rank's flat pieces, one per group, by private names: ZeRO-3's, else those of ZeRO-1 and 2.
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
    if (pieces := next((getattr(optimizer, name) for name in names if hasattr(optimizer, name)), None)) is None:
        raise EnvironmentProblem(f"this DeepSpeed's {type(optimizer).__name__} has its weights elsewhere; install 0.19")
    for flat in pieces:  # ZeRO makes these at the first step, and needs them now
        optimizer.optimizer.state[flat] = {
            name: torch.zeros_like(flat) if _is_per_weight(value, optimized[0]) else copy.deepcopy(value)
            for name, value in template.items()
        }
    _link(optimizer)
    for number, parameter in enumerate(optimized):
        for name, value in saved["state"][number].items():
            if _is_per_weight(value, parameter):
                safe_set_full_optimizer_state(parameter, value.to(parameter.device, torch.float32), name)


def _is_per_weight(value: Any, parameter: torch.Tensor) -> bool:
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape == shape


def _optimizer(trainer: Any) -> Any:
    """ZeRO's optimizer around the one that updates. DeepSpeed 0.18-0.19 has it at `engine.optimizer`."""
    optimizer = trainer.model_wrapped.optimizer
    if not hasattr(optimizer, "optimizer"):
        what = f"DeepSpeed runs {type(optimizer).__name__}, whose state alignkit cannot read; use launch.strategy zero2"
        raise EnvironmentProblem(f"{what} or zero3 with an AdamW optimizer")
    return optimizer


def _link(optimizer: Any) -> None:
    """Let the `safe_*` functions find the optimizer's state. ZeRO-2 of DeepSpeed 0.19 links it after the step of the
    first parameter group, when the others have none yet."""
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
