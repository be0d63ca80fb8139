"""Where a stage's processes run: its command, to be started again, and how many processes on which nodes."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alignkit.errors import Problem, RecipeError
from alignkit.recipe import Stage
from alignkit.recipe.methods import FEEDBACK
from alignkit.recipe.stage import check_batch

Device = Literal["cpu", "cuda", "mps", "npu", "xpu"]
Precision = Literal["no", "bf16", "fp16"]
_PRECISION_OF: dict[str, Precision] = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
DEFAULT_PORT = 29500
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Command:
    """The command of a stage as it was given: what decides the work; not --force, --retries or --json."""

    stage: Stage
    overrides: Sequence[str] = ()
    out: Path | None = None
    allow_change: tuple[str, ...] = ()
    allow_key: tuple[str, ...] = ()
    node_rank: int | None = None  # --node-rank: of this machine, so never part of `arguments`

    def arguments(self) -> list[str]:
        """List what stands after `alignkit`; the command of critique and label stages is rlaif."""
        stage = self.stage
        method = "rlaif" if stage.method in FEEDBACK else stage.method
        words = [method, "--recipe", stage.recipe_path, "--stage", stage.name]
        options = {"--set": self.overrides, "--allow-change": self.allow_change, "--allow-key": self.allow_key}
        words += [word for option, values in options.items() for value in values for word in (option, value)]
        words += ["--out", str(self.out)] if self.out else []
        return words + (["--trust-code"] if stage.trust_code else [])

    def argv(self) -> list[str]:
        return [sys.executable, "-m", "alignkit", *self.arguments()]


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


def count_cuda(environment: Mapping[str, str] = os.environ) -> int:
    """Count the CUDA devices a process started here would see."""
    present = len(list(Path("/dev").glob("nvidia[0-9]*"))) or len(_ask_nvidia_smi("--list-gpus"))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None or present == 0:
        return present
    names = [name.strip() for name in visible.split(",")]
    # As the driver reads it: everything after a number it does not know is ignored.
    ends = [not name or (name.lstrip("-").isdigit() and not 0 <= int(name) < present) for name in names]
    return [*ends, True].index(True)


def pick_device(stage: Stage) -> Device:
    """Decide what `launch.device` means on this machine."""
    if stage.launch.device != "auto":
        return stage.launch.device
    if count_cuda():
        return "cuda"
    return "mps" if (platform.system(), platform.machine()) == ("Darwin", "arm64") else "cpu"


def mixed_precision(stage: Stage, device: Device) -> Precision:
    """Decide what matrix products are computed in: by itself bfloat16 on devices that have it."""
    if stage.launch.mixed_precision != "auto":
        return stage.launch.mixed_precision
    if stage.model.dtype != "auto":
        return _PRECISION_OF[stage.model.dtype]
    if device != "cuda":
        return "no"
    found = [float(line) for line in _ask_nvidia_smi("--query-gpu=compute_cap", "--format=csv,noheader") if line]
    return "bf16" if all(capability >= 8.0 for capability in found) else "no"


def _ask_nvidia_smi(*arguments: str) -> list[str]:
    """Read the lines of an answer, none where the tool is absent or does not work."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        answer = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in answer.stdout.splitlines()] if answer.returncode == 0 else []


def place(
    stage: Stage, node_rank: int | None = None, *, strict: bool = True, environment: Mapping[str, str] = os.environ
) -> Placement:
    """Find where this node stands in the job; only with `strict` must all be known that several nodes need."""
    launch, device = stage.launch, pick_device(stage)
    visible = count_cuda() if device == "cuda" else None
    processes = launch.processes if launch.processes != "auto" else visible or 1
    problems = []
    # Outside `srun` a recipe that names no nodes may use one of an allocation's.
    step = environment.get("SLURM_STEP_NUM_NODES")
    allocated = _first_number(step, environment.get("SLURM_NNODES"))
    given = stage.origins.get("launch.nodes", "default") != "default"
    if allocated is not None and allocated != launch.nodes and (given or step):
        what = f"launch.nodes is {launch.nodes}, but SLURM runs this on {allocated}; set launch.nodes to {allocated}"
        problems.append(Problem(f"{what}, or ask SLURM for {launch.nodes}", stage.where("launch.nodes")))
    on_node = _first_number(environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0])
    if (on_node or 1) > 1:
        what = f"SLURM started {on_node} tasks on this node; ask for one (--ntasks-per-node=1): alignkit starts the "
        problems.append(Problem(f"{what}processes of launch.processes itself", stage.where("launch.processes")))
    what, key = "", "launch.processes"
    if device == "mps" and processes > 1:
        what = f"launch.processes is {processes}, but mps is one device; set launch.device: cpu"
    elif visible == 0:
        what = "launch.device is cuda, but no CUDA device is visible here; leave it out, or set it to cpu"
        key = "launch.device"
    elif visible is not None and processes > visible:
        what = f"launch.processes is {processes}, but {visible} CUDA devices are visible here; set it to auto"
        what += ", or launch.device: cpu"
    if what and strict:
        problems.append(Problem(what, stage.where(key)))
    if batch := check_batch(stage, launch.nodes * processes):
        problems.append(batch)
    address, port = LOOPBACK, launch.main_port
    if launch.nodes == 1:
        if node_rank:
            problems.append(Problem(f"--node-rank is {node_rank}, but launch.nodes is 1", stage.where("launch.nodes")))
        node_rank = 0
    else:
        node_rank = _first_number(node_rank, environment.get("SLURM_NODEID"), environment.get("NODE_RANK"))
        slurm_nodes = environment.get("SLURM_JOB_NODELIST")
        address = launch.main_address or environment.get("MASTER_ADDR") or first_host(slurm_nodes or "")
        port = _first_number(port, environment.get("MASTER_PORT"), DEFAULT_PORT)
        where = stage.where("launch.nodes")
        if node_rank is not None and node_rank >= launch.nodes:
            what = f"this is node {node_rank}, but launch.nodes is {launch.nodes}: nodes are 0 to {launch.nodes - 1}"
            problems.append(Problem(what, where))
        if strict and node_rank is None:
            what = f"launch.nodes is {launch.nodes}, but which of them this machine is, is not known; give --node-rank "
            problems.append(Problem(f"{what}or NODE_RANK, or start it with srun (SLURM_NODEID)", where))
        if strict and not address:
            what = f"launch.nodes is {launch.nodes}, but where node 0 is reached is not known; give --main-address, "
            what += "launch.main_address or MASTER_ADDR, or start it with srun (SLURM_JOB_NODELIST)"
            problems.append(Problem(what, where))
        for name in ("SLURM_NODEID", "NODE_RANK", "MASTER_PORT"):
            if (value := environment.get(name)) and not value.strip().isdigit():
                what = f"{name} is {value!r} in the environment; it must be a whole number, or not be set"
                problems.append(Problem(what))
    if problems:
        raise RecipeError(problems)
    return Placement(processes, launch.nodes, node_rank, address or None, port, device, launch.strategy)


def first_host(nodes: str) -> str:
    """Read the first host of a SLURM node list: `rack[1-2]n[07,9],login` gives rack1n07."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0]) if first else nodes


def _first_number(*values: int | str | None) -> int | None:
    return next((int(value) for value in values if value is not None and str(value).strip().isdigit()), None)
