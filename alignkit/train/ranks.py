"""The processes of one job: who they are, what they tell each other, and what one of them does for all. Objects travel
as JSON: nothing is ever unpickled."""

import atexit
import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

import alignkit
from alignkit import errors
from alignkit.errors import AlignKitError, EnvironmentProblem, Problem, RankError, RunError, Stopped, UsageError
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
    from accelerate import PartialState

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
