"""A process that somebody else started joins the job: launcher and recipe must not contradict each other.

It starts no process. Under our supervisor the checks of the recipe are done and the run directory is locked already.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import AlignKitError, EnvironmentProblem, Problem, RecipeError
from alignkit.launch import accelerate
from alignkit.launch.command import Command
from alignkit.launch.local import train_here, train_in
from alignkit.launch.placement import mixed_precision, pick_device
from alignkit.launch.worker import is_supervised, rank
from alignkit.preflight.requirements import require_ready
from alignkit.recipe import Stage

if TYPE_CHECKING:
    from alignkit.runs.directory import Result

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def join(stage: Stage, command: Command, *, force: bool, retries: int) -> Result:
    """Train a stage as one of several processes and return how it ended.

    Rank 0 checks and locks the run directory unless our supervisor has. Raises what `fit` raises, and RecipeError
    naming both sides when `launch:` and the launcher contradict each other.
    """
    try:
        _prepare(stage, retries=retries)
    except AlignKitError as error:
        # Each process finds the same: one of them on each node speaks.
        error.shared = os.environ.get("LOCAL_RANK", "0") != "0"
        raise
    if rank() == 0 and not is_supervised():
        return train_here(stage, force=force, allow_change=command.allow_change)
    return train_in(stage, Path(stage.run_dir).expanduser().absolute(), allow_change=command.allow_change)


def _prepare(stage: Stage, *, retries: int) -> None:
    """Refuse what contradicts, and set what torchrun leaves unsaid."""
    if retries:
        raise RecipeError(
            "starts a job again, which a process that accelerate or torchrun started cannot do; leave it out, or start "
            "alignkit without them",
            where="--retries",
        )
    require_launcher(os.environ)
    require_agreement(stage, os.environ)
    apply_strategy(stage, os.environ)
    if not is_supervised() and rank() != 0 and os.environ["LOCAL_RANK"] == "0":
        require_ready(stage)  # this node may lack a file that node 0 has


def require_launcher(environment: Mapping[str, str]) -> None:
    """Raise EnvironmentProblem when a launcher's variables are there in part only."""
    if "RANK" not in environment and environment.get("WORLD_SIZE", "1") == "1":
        return
    missing = [name for name in _NEEDED if name not in environment]
    numbers = [name for name in _NEEDED[:4] if name in environment and not environment[name].isdigit()]
    if numbers:
        raise EnvironmentProblem(f"{numbers[0]} is {environment[numbers[0]]!r} in the environment, which is no number")
    if environment.get("MASTER_PORT") == "0":  # the processes would wait for each other at a port that is none
        raise EnvironmentProblem("MASTER_PORT is 0; give torchrun --standalone, or a port with --master_port")
    if missing:
        found = ", ".join(name for name in _NEEDED if name in environment)
        raise EnvironmentProblem(
            f"the environment has {found} but not {', '.join(missing)}; start with `accelerate launch` or torchrun, "
            f"or unset {found} to let alignkit start the processes"
        )


def require_agreement(stage: Stage, environment: Mapping[str, str]) -> None:
    """Raise RecipeError naming both sides where `launch:` says otherwise than who started this process."""
    if "RANK" not in environment:
        return
    findings = [*_compare_counts(stage, environment), *_compare_strategy(stage, environment)]
    findings += _compare_precision(stage, environment)
    if findings:
        raise RecipeError([Problem(what, stage.where(f"launch.{key}")) for key, what in findings])


def _is_given(stage: Stage, key: str) -> bool:
    return stage.origins.get(f"launch.{key}", "default") != "default"


def _compare_counts(stage: Stage, environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    world, local = int(environment["WORLD_SIZE"]), int(environment["LOCAL_WORLD_SIZE"])
    nodes = int(environment.get("GROUP_WORLD_SIZE") or max(world // local, 1))
    if nodes * local != world:
        yield (
            "processes",
            f"the nodes run different numbers of processes: {local} here, {world} on all {nodes} together; start the "
            "same number on each",
        )
        return
    wanted = stage.launch.processes
    if wanted != "auto" and wanted != local and _is_given(stage, "processes"):
        yield (
            "processes",
            f"launch.processes is {wanted}, but the launcher started {local} on this node (LOCAL_WORLD_SIZE={local}); "
            "make them equal, or leave launch.processes out",
        )
    if stage.launch.nodes != nodes and _is_given(stage, "nodes"):
        yield (
            "nodes",
            f"launch.nodes is {stage.launch.nodes}, but the launcher runs {nodes} (WORLD_SIZE={world}, "
            f"LOCAL_WORLD_SIZE={local}); make them equal, or leave launch.nodes out",
        )


def launcher_strategy(environment: Mapping[str, str]) -> str | None:
    """Return the strategy the launcher has set, None when it said nothing, as torchrun does."""
    if _is_on(environment, "ACCELERATE_USE_FSDP"):
        return "fsdp"
    if _is_on(environment, "ACCELERATE_USE_DEEPSPEED"):
        return f"zero{_zero_settings(environment).get('stage', environment.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', 2))}"
    return "ddp" if "ACCELERATE_MIXED_PRECISION" in environment else None


def _compare_strategy(stage: Stage, environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    found, wanted = launcher_strategy(environment), stage.launch.strategy
    for name in ("ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        if _is_on(environment, name):
            yield "strategy", f"the launcher set {name}, which alignkit does not know; use ddp, fsdp, zero2 or zero3"
    if found is None:
        return
    if found != wanted and _is_given(stage, "strategy"):
        yield (
            "strategy",
            f"launch.strategy is {wanted}, but accelerate launch was told {found}; give it a config for {wanted}, "
            "leave launch.strategy out, or start alignkit itself, which writes one",
        )
    elif found == "fsdp" and environment.get("FSDP_VERSION", "1") != "2":
        yield "strategy", "accelerate launch was told FSDP version 1; set fsdp_version: 2 in its config"
    elif found not in ("ddp", "fsdp", "zero2", "zero3"):
        yield "strategy", f"accelerate launch was told DeepSpeed stage {found[4:]}; use stage 2 or 3"
    elif _is_given(stage, "offload") and (offload := _launcher_offload(found, environment)) != stage.launch.offload:
        yield "offload", f"launch.offload is {stage.launch.offload}, but accelerate launch was told {offload}"
    by_fsdp = found == "fsdp" and _is_on(environment, "FSDP_ACTIVATION_CHECKPOINTING")
    if by_fsdp and stage.launch.activation_checkpointing is False:
        yield (
            "activation_checkpointing",
            "launch.activation_checkpointing is false, but accelerate launch was told fsdp_activation_checkpointing: "
            "true; make them equal",
        )


def _launcher_offload(strategy: str, environment: Mapping[str, str]) -> str:
    if strategy == "fsdp":
        return "all" if _is_on(environment, "FSDP_OFFLOAD_PARAMS") else "none"
    zero = _zero_settings(environment)
    devices = [
        zero.get(f"offload_{part}", {}).get("device")
        or environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE")
        for part in ("param", "optimizer")
    ]
    away = [device not in (None, "none") for device in devices]
    return "all" if away[0] else "optimizer" if away[1] else "none"


def _compare_precision(stage: Stage, environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Compare only what was said on both sides: `accelerate launch` without the flag says no, and means nothing."""
    found = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if found == "no":
        return
    key, value = "launch.mixed_precision", str(stage.launch.mixed_precision)
    if value == "auto":
        key, value = "model.dtype", stage.model.dtype
    if value != "auto" and mixed_precision(stage, "cpu") != found:
        yield (
            "mixed_precision",
            f"{key} is {value}, but accelerate launch was told mixed_precision {found}; make them equal",
        )


def apply_strategy(stage: Stage, environment: MutableMapping[str, str]) -> None:
    """Set what accelerate reads of `launch.strategy`, where the launcher said nothing of it."""
    if "RANK" not in environment or launcher_strategy(environment) is not None:
        return
    found = accelerate.worker_environment(stage, mixed_precision(stage, pick_device(stage)))
    for name, value in found.items():
        environment.setdefault(name, value)


def _zero_settings(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return `zero_optimization` of the launcher's DeepSpeed config, empty where it has none."""
    source = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if not source or source == "none":
        return {}
    try:
        if os.path.isfile(source):
            text = Path(source).read_text(encoding="utf-8")
        else:
            text = base64.urlsafe_b64decode(source).decode()
        found = json.loads(text).get("zero_optimization", {})
    except (OSError, ValueError, AttributeError) as error:
        raise EnvironmentProblem(f"{source[:200]}: is no DeepSpeed config that can be read ({error})") from error
    return found if isinstance(found, dict) else {}


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("true", "1", "yes")
