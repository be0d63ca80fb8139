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
from alignkit.recipe import Stage, load_recipe, resolve

TEXT = "model: {path: builtin:tiny-llama}\nlaunch: {LAUNCH}\nsft: {data: builtin:instructions}\n"


@pytest.fixture
def make_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stage]:
    monkeypatch.chdir(tmp_path)

    def make(launch: str = "", **changed: str) -> Stage:
        Path("r.yaml").write_text(TEXT.replace("LAUNCH", launch))
        return resolve(load_recipe(Path("r.yaml"), overrides=[f"{key}={value}" for key, value in changed.items()]))

    return make


def problems(stage: Stage, node_rank: int | None = None, **environment: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        place(stage, node_rank, environment=environment)
    return [str(problem) for problem in caught.value.problems]


def test_one_process_needs_nothing(make_stage: Callable) -> None:
    found = place(make_stage("device: cpu"), environment={})
    assert found == Placement(1, 1, 0, "127.0.0.1", None, "cpu", "ddp")
    assert (found.world_size, found.is_main) == (1, True)


def test_auto_is_one_process_on_the_cpu(make_stage: Callable) -> None:
    assert place(make_stage("device: cpu, processes: auto"), environment={}).processes == 1


def test_auto_takes_the_visible_devices(make_stage: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "count_cuda", lambda: 8)  # no machine of this test has eight
    assert place(make_stage("device: cuda, processes: auto"), environment={}).processes == 8


def test_more_processes_than_devices_are_refused(make_stage: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "count_cuda", lambda: 2)
    assert problems(make_stage("device: cuda, processes: 8")) == [
        "r.yaml:2: launch.processes is 8, but 2 CUDA devices are visible here; set it to auto, or launch.device: cpu"
    ]


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
    [
        ("node7", "node7"),
        ("node[1-3,7]", "node1"),
        ("node[007,009],other", "node007"),
        ("rack[1-2]n[05-08],login", "rack1n05"),
        ("a,b[1-2]", "a"),
    ],
)
def test_the_first_host_of_a_slurm_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


SLURM = {"SLURM_NNODES": "4", "SLURM_STEP_NUM_NODES": "4", "SLURM_NODEID": "2", "SLURM_JOB_NODELIST": "gpu[11-14]"}


def test_slurm_says_which_node_this_is_and_where_node_0_is(make_stage: Callable) -> None:
    found = place(make_stage("nodes: 4, processes: 2, device: cpu"), environment=SLURM)
    assert found == Placement(2, 4, 2, "gpu11", 29500, "cpu", "ddp")
    assert (found.world_size, found.is_main) == (8, False)


def test_what_is_given_goes_before_the_environment(make_stage: Callable) -> None:
    stage = make_stage("nodes: 4, device: cpu, main_address: head, main_port: 4000")
    found = place(stage, 0, environment={**SLURM, "MASTER_ADDR": "other", "MASTER_PORT": "1"})
    assert (found.node_rank, found.main_address, found.main_port) == (0, "head", 4000)


def test_the_environment_alone_is_enough(make_stage: Callable) -> None:
    found = place(
        make_stage("nodes: 2, device: cpu"),
        environment={"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4444"},
    )
    assert (found.node_rank, found.main_address, found.main_port) == (1, "10.0.0.1", 4444)


def test_several_nodes_without_rank_and_address_name_what_would_give_them(make_stage: Callable) -> None:
    assert problems(make_stage("nodes: 2, device: cpu")) == [
        "r.yaml:2: launch.nodes is 2, but which of them this machine is, is not known; give --node-rank or NODE_RANK, "
        "or start it with srun (SLURM_NODEID)",
        "r.yaml:2: launch.nodes is 2, but where node 0 is reached is not known; give --main-address, "
        "launch.main_address or MASTER_ADDR, or start it with srun (SLURM_JOB_NODELIST)",
    ]


def test_another_number_of_nodes_than_slurm_is_a_contradiction(make_stage: Callable) -> None:
    assert problems(make_stage("nodes: 2, device: cpu"), **SLURM)[0] == (
        "r.yaml:2: launch.nodes is 2, but SLURM runs this on 4; set launch.nodes to 4, or ask SLURM for 2"
    )
    assert len(problems(make_stage("device: cpu"), **SLURM)) == 1  # srun on four nodes: four jobs in one directory


def test_one_node_of_an_allocation_may_be_used_alone(make_stage: Callable) -> None:
    found = place(make_stage("device: cpu"), environment={"SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "gpu[11-14]"})
    assert found.world_size == 1


def test_one_task_a_process_is_not_how_slurm_should_start_it(make_stage: Callable) -> None:
    [line] = problems(make_stage("nodes: 4, device: cpu"), **SLURM, SLURM_STEP_TASKS_PER_NODE="8(x4)")
    assert line.startswith("r.yaml: SLURM started 8 tasks on this node; ask for one (--ntasks-per-node=1)")


def test_a_node_rank_beyond_the_nodes_is_refused(make_stage: Callable) -> None:
    where = {"MASTER_ADDR": "head"}
    assert problems(make_stage("nodes: 2, device: cpu"), 2, **where) == [
        "r.yaml:2: this is node 2, but launch.nodes is 2: nodes are 0 to 1"
    ]
    assert problems(make_stage("device: cpu"), 1) == ["r.yaml: --node-rank is 1, but launch.nodes is 1"]


def test_a_plan_for_one_process_starts_nothing(make_stage: Callable) -> None:
    stage = make_stage("device: cpu")
    found = plan_launch(Command(stage))
    assert (found["mode"], found["command"], found["config"]) == ("in-process", "", None)


def test_a_plan_says_what_is_not_known_yet(make_stage: Callable) -> None:
    stage = make_stage("nodes: 4, processes: 4, strategy: zero3, device: cpu", seed="3")
    found = plan_launch(Command(stage, ["seed=3"]))
    assert found["placement"]["world_size"] == 16
    assert "--mixed_precision no --machine_rank UNKNOWN --main_process_ip UNKNOWN" in found["command"]
    assert found["command"].startswith(f"{sys.executable} -m accelerate.commands.launch --config_file ")
    assert found["command"].endswith("-m alignkit sft --recipe r.yaml --stage sft --set seed=3")
    assert found["deepspeed"]["zero_optimization"]["stage"] == 3
    assert not Path("runs").exists()


def test_a_batch_that_the_processes_cannot_share_is_refused_before_anything_starts(make_stage: Callable) -> None:
    stage = make_stage("nodes: 4, processes: 8, device: cpu")
    with pytest.raises(
        RecipeError, match=r"sft\.batch_size is 16, which 32 processes cannot divide; .* multiple of 32$"
    ):
        plan_launch(Command(stage))


def test_dry_run_shows_command_and_config(run_alignkit: Callable, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(TEXT.replace("LAUNCH", "processes: 8, strategy: fsdp, device: cpu"))
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
