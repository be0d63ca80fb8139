"""Where the processes of a job run, from recipe, flags, SLURM and environment, and what --dry-run says of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.errors import RecipeError
from alignkit.launch import placement
from alignkit.launch.accelerate import plan_launch
from alignkit.launch.placement import Command, Placement, count_cuda, first_host, place

SLURM = {"SLURM_NNODES": "4", "SLURM_STEP_NUM_NODES": "4", "SLURM_NODEID": "2", "SLURM_JOB_NODELIST": "gpu[11-14]"}


@pytest.mark.parametrize(
    ("launch", "node_rank", "environment", "found"),
    [
        ("device: cpu", None, {}, Placement(1, 1, 0, "127.0.0.1", None, "cpu", "ddp")),
        ("device: cpu, processes: auto", None, {}, Placement(1, 1, 0, "127.0.0.1", None, "cpu", "ddp")),
        ("device: cuda, processes: auto", None, {}, Placement(2, 1, 0, "127.0.0.1", None, "cuda", "ddp")),
        # SLURM says which node this is and where node 0 is.
        ("nodes: 4, processes: 2, device: cpu", None, SLURM, Placement(2, 4, 2, "gpu11", 29500, "cpu", "ddp")),
        # What is given goes before the environment.
        ("nodes: 4, device: cpu, main_address: head, main_port: 4000", 0,
         {**SLURM, "MASTER_ADDR": "other", "MASTER_PORT": "1"}, Placement(1, 4, 0, "head", 4000, "cpu", "ddp")),
        ("nodes: 2, device: cpu", None, {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4444"},
         Placement(1, 2, 1, "10.0.0.1", 4444, "cpu", "ddp")),
        # One node of an allocation may be used alone.
        ("device: cpu", None, {"SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "gpu[11-14]"},
         Placement(1, 1, 0, "127.0.0.1", None, "cpu", "ddp")),
    ],
)  # fmt: skip
def test_where_processes_run(
    make_stage: Callable, monkeypatch: pytest.MonkeyPatch, launch: str, node_rank: int | None,
    environment: dict[str, str], found: Placement,
) -> None:  # fmt: skip
    monkeypatch.setattr(placement, "count_cuda", lambda: 2)  # whatever this machine has
    assert place(make_stage(launch), node_rank, environment=environment) == found
    assert found.world_size == found.nodes * found.processes


@pytest.mark.parametrize(
    ("launch", "node_rank", "environment", "problems"),
    [
        ("device: cuda, processes: 8", None, {},
         ["r.yaml:2: launch.processes is 8, but 2 CUDA devices are visible here; set it to auto, or launch.device: "
          "cpu"]),
        ("nodes: 2, device: cpu", None, {},
         ["r.yaml:2: launch.nodes is 2, but which of them this machine is, is not known; give --node-rank or "
          "NODE_RANK, or start it with srun (SLURM_NODEID)",
          "r.yaml:2: launch.nodes is 2, but where node 0 is reached is not known; give --main-address, "
          "launch.main_address or MASTER_ADDR, or start it with srun (SLURM_JOB_NODELIST)"]),
        ("nodes: 2, device: cpu", 1, SLURM,
         ["r.yaml:2: launch.nodes is 2, but SLURM runs this on 4; set launch.nodes to 4, or ask SLURM for 2"]),
        # srun on four nodes: four jobs in one directory
        ("device: cpu", None, SLURM,
         ["r.yaml: launch.nodes is 1, but SLURM runs this on 4; set launch.nodes to 4, or ask SLURM for 1"]),
        ("nodes: 4, device: cpu", None, SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x4)"},
         ["r.yaml: SLURM started 8 tasks on this node; ask for one (--ntasks-per-node=1): alignkit starts the "
          "processes of launch.processes itself"]),
        ("nodes: 2, device: cpu", 2, {"MASTER_ADDR": "head"},
         ["r.yaml:2: this is node 2, but launch.nodes is 2: nodes are 0 to 1"]),
        ("device: cpu", 1, {}, ["r.yaml: --node-rank is 1, but launch.nodes is 1"]),
    ],
)  # fmt: skip
def test_what_contradicts_is_refused(
    make_stage: Callable, monkeypatch: pytest.MonkeyPatch, launch: str, node_rank: int | None,
    environment: dict[str, str], problems: list[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(placement, "count_cuda", lambda: 2)
    with pytest.raises(RecipeError) as caught:
        place(make_stage(launch), node_rank, environment=environment)
    assert [str(problem) for problem in caught.value.problems] == problems


@pytest.mark.parametrize(
    ("visible", "count"), [("", 0), ("-1", 0), ("0,1", 2), ("1,9,0", 1), ("GPU-1a2b", 1), (None, 4)]
)
def test_visible_devices_are_read_as_the_driver_does(
    visible: str | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "glob", lambda path, pattern: iter([Path(f"nvidia{number}") for number in range(4)]))
    assert count_cuda({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == count


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("node7", "node7"), ("node[1-3,7]", "node1"), ("node[007,009],other", "node007"),
     ("rack[1-2]n[05-08],login", "rack1n05"), ("a,b[1-2]", "a")],
)  # fmt: skip
def test_the_first_host_of_a_slurm_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_a_plan_says_what_is_started_and_what_is_not_known_yet(make_stage: Callable) -> None:
    found = plan_launch(Command(make_stage("device: cpu")))
    assert (found["mode"], found["command"], found["config"]) == ("in-process", "", None)
    stage = make_stage("nodes: 4, processes: 4, strategy: zero3, device: cpu", seed="3")
    found = plan_launch(Command(stage, ["seed=3"]))
    assert found["placement"]["world_size"] == 16
    assert "--mixed_precision no --machine_rank UNKNOWN --main_process_ip UNKNOWN" in found["command"]
    assert found["command"].startswith(f"{sys.executable} -m accelerate.commands.launch --config_file ")
    assert found["command"].endswith("-m alignkit sft --recipe r.yaml --stage sft --set seed=3")
    assert found["deepspeed"]["zero_optimization"]["stage"] == 3
    assert not Path("runs").exists()
    with pytest.raises(
        RecipeError, match=r"sft\.batch_size is 16, which 32 processes cannot divide; .* multiple of 32$"
    ):
        plan_launch(Command(make_stage("nodes: 4, processes: 8, device: cpu")))


def test_dry_run_shows_command_and_config(run_alignkit: Callable, write_recipe: Callable, tmp_path: Path) -> None:
    write_recipe("processes: 8, strategy: fsdp, device: cpu")
    lines = run_alignkit("sft", "-r", "r.yaml", "--dry-run").stdout.splitlines()
    start = lines.index("would start: 8 processes (fsdp, cpu)")
    run = tmp_path / "runs/r/sft/launch"
    assert lines[start + 1 :] == [
        f"$ {sys.executable} -m accelerate.commands.launch --config_file {run}/accelerate.yaml "
        "--main_process_port UNKNOWN --monitor_interval 1 -m alignkit sft --recipe r.yaml --stage sft",
        "",
        f"{run}/accelerate.yaml:",
        "  # Generated by alignkit from launch: in r.yaml, anew at each start; edit the recipe instead.",
        '  compute_environment: "LOCAL_MACHINE"',
        '  distributed_type: "FSDP"',
        "  fsdp_config:",
        "    fsdp_version: 2",
        '    fsdp_auto_wrap_policy: "TRANSFORMER_BASED_WRAP"',
        "    fsdp_reshard_after_forward: true",
        '    fsdp_state_dict_type: "FULL_STATE_DICT"',
        "    fsdp_offload_params: false",
        "    fsdp_activation_checkpointing: false",
        "    fsdp_cpu_ram_efficient_loading: false",
        '  mixed_precision: "no"',
        "  num_machines: 1",
        "  num_processes: 8",
        '  rdzv_backend: "static"',
        "  same_network: true",
        "  use_cpu: true",
    ]
    shown = run_alignkit("sft", "-r", "r.yaml", "--dry-run", "--json")
    assert json.loads(shown.stdout)["would_start"]["mode"] == "accelerate"
