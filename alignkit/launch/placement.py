"""How many processes run where: from `launch:`, the command line, SLURM and the environment, which must agree.

It looks at this machine only to count devices, opens no port and starts nothing.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from alignkit.errors import Problem, RecipeError
from alignkit.recipe import Stage
from alignkit.recipe.stage import check_batch

Device = Literal["cpu", "cuda", "mps"]
Precision = Literal["no", "bf16", "fp16"]
_PRECISION_OF: dict[str, Precision] = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def count_cuda(environment: Mapping[str, str] = os.environ) -> int:
    """Return the CUDA devices a process started here would see."""
    present = len(list(Path("/dev").glob("nvidia[0-9]*"))) or len(_ask_nvidia_smi("--list-gpus"))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None or present == 0:
        return present
    count = 0
    for entry in visible.split(","):  # as the driver reads it: everything after a number it does not know is ignored
        name = entry.strip()
        if not name or (name.lstrip("-").isdigit() and not 0 <= int(name) < present):
            break
        count += 1
    return count


def pick_device(stage: Stage) -> Device:
    """Return what `launch.device` means on this machine."""
    wanted = stage.launch.device
    if wanted != "auto":
        return wanted
    if count_cuda():
        return "cuda"
    return "mps" if (platform.system(), platform.machine()) == ("Darwin", "arm64") else "cpu"


def mixed_precision(stage: Stage, device: Device) -> Precision:
    """Return what the launcher is told that matrix products are computed in.

    With nothing given it is bfloat16 on devices that have it, as `model.dtype: auto` says.
    """
    if stage.launch.mixed_precision != "auto":
        return stage.launch.mixed_precision
    if stage.model.dtype != "auto":
        return _PRECISION_OF[stage.model.dtype]
    if device != "cuda":
        return "no"
    found = [float(line) for line in _ask_nvidia_smi("--query-gpu=compute_cap", "--format=csv,noheader") if line]
    return "bf16" if all(capability >= 8.0 for capability in found) else "no"


def _ask_nvidia_smi(*arguments: str) -> list[str]:
    """Return the lines of an answer, none where the tool is absent or does not work."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        answer = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in answer.stdout.splitlines()] if answer.returncode == 0 else []


DEFAULT_PORT = 29500
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Placement:
    """Where the processes of a job run, as seen from one of its nodes."""

    processes: int  # on each node
    nodes: int
    node_rank: int | None  # None: nobody said, which only --dry-run may leave so
    main_address: str | None
    main_port: int | None  # None: a free one, chosen at the start
    device: Device
    strategy: str

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes

    @property
    def is_main(self) -> bool:
        """Whether rank 0 runs on this node."""
        return self.node_rank == 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "world_size": self.world_size}


def place(
    stage: Stage, node_rank: int | None = None, *, strict: bool = True, environment: Mapping[str, str] = os.environ
) -> Placement:
    """Return where this node stands in the job; `node_rank` is the command line's.

    Raises RecipeError for what contradicts each other and, when `strict`, for what several nodes still need to know.
    """
    launch = stage.launch
    device = pick_device(stage)
    processes = launch.processes if launch.processes != "auto" else max(count_cuda() if device == "cuda" else 1, 1)
    problems = [*_check_slurm(stage, environment), *(_check_devices(stage, processes, device) if strict else ())]
    if batch := check_batch(stage, launch.nodes * processes):
        problems.append(batch)
    address: str | None = LOOPBACK
    if launch.nodes == 1:
        if node_rank:
            problems.append(_contradiction(stage, f"--node-rank is {node_rank}, but launch.nodes is 1"))
        node_rank, port = 0, launch.main_port
    else:
        node_rank = _first_number(node_rank, environment.get("SLURM_NODEID"), environment.get("NODE_RANK"))
        slurm_nodes = environment.get("SLURM_JOB_NODELIST")
        address = (
            launch.main_address or environment.get("MASTER_ADDR") or (first_host(slurm_nodes) if slurm_nodes else None)
        )
        port = _first_number(launch.main_port, environment.get("MASTER_PORT"), DEFAULT_PORT)
        problems += _check_nodes(stage, node_rank, address, strict=strict)
        problems += _check_numbers(environment, "SLURM_NODEID", "NODE_RANK", "MASTER_PORT")
    if problems:
        raise RecipeError(problems)
    return Placement(processes, launch.nodes, node_rank, address, port, device, launch.strategy)


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM node list: `rack[1-2]n[07,9],login` gives rack1n07."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0]) if first else nodes


def _first_number(*values: int | str | None) -> int | None:
    return next((int(value) for value in values if value is not None and str(value).strip().isdigit()), None)


def _check_numbers(environment: Mapping[str, str], *names: str) -> list[Problem]:
    given = {name: environment[name] for name in names if environment.get(name)}
    return [
        Problem(f"{name} is {value!r} in the environment; it must be a whole number, or not be set")
        for name, value in given.items()
        if not value.strip().isdigit()
    ]


def _contradiction(stage: Stage, what: str) -> Problem:
    return Problem(what, stage.where("launch.nodes"))


def _check_slurm(stage: Stage, environment: Mapping[str, str]) -> list[Problem]:
    """Compare `launch.nodes` with the allocation; outside `srun` a recipe that names no nodes may use one of them."""
    step = environment.get("SLURM_STEP_NUM_NODES")
    allocated = _first_number(step, environment.get("SLURM_NNODES"))
    given = stage.origins.get("launch.nodes", "default") != "default"
    problems = []
    if allocated is not None and allocated != stage.launch.nodes and (given or step):
        problems.append(
            _contradiction(
                stage,
                f"launch.nodes is {stage.launch.nodes}, but SLURM runs this on {allocated}; "
                f"set launch.nodes to {allocated}, or ask SLURM for {stage.launch.nodes}",
            )
        )
    on_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]
    if on_node.isdigit() and int(on_node) > 1:
        problems.append(
            Problem(
                f"SLURM started {on_node} tasks on this node; ask for one (--ntasks-per-node=1): alignkit starts the "
                "processes of launch.processes itself",
                stage.where("launch.processes"),
            )
        )
    return problems


def _check_devices(stage: Stage, processes: int, device: Device) -> list[Problem]:
    where = stage.where("launch.processes")
    if device == "mps" and processes > 1:
        return [Problem(f"launch.processes is {processes}, but mps is one device; set launch.device: cpu", where)]
    if device != "cuda" or processes <= (visible := count_cuda()):
        return []
    if not visible:
        what = "launch.device is cuda, but no CUDA device is visible here; leave it out, or set it to cpu"
        return [Problem(what, stage.where("launch.device"))]
    return [
        Problem(
            f"launch.processes is {processes}, but {visible} CUDA devices are visible here; "
            f"set it to auto, or launch.device: cpu",
            where,
        )
    ]


def _check_nodes(stage: Stage, node_rank: int | None, address: str | None, *, strict: bool) -> list[Problem]:
    nodes = stage.launch.nodes
    problems = []
    if node_rank is not None and node_rank >= nodes:
        problems.append(
            _contradiction(stage, f"this is node {node_rank}, but launch.nodes is {nodes}: nodes are 0 to {nodes - 1}")
        )
    if strict and node_rank is None:
        problems.append(
            _contradiction(
                stage,
                f"launch.nodes is {nodes}, but which of them this machine is, is not known; give --node-rank or "
                "NODE_RANK, or start it with srun (SLURM_NODEID)",
            )
        )
    if strict and address is None:
        problems.append(
            _contradiction(
                stage,
                f"launch.nodes is {nodes}, but where node 0 is reached is not known; give --main-address, "
                "launch.main_address or MASTER_ADDR, or start it with srun (SLURM_JOB_NODELIST)",
            )
        )
    return problems
