"""A process that accelerate or torchrun started: what it refuses, what it sets, who speaks; and signs of life."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.errors import EnvironmentProblem, RecipeError
from alignkit.launch.accelerate import apply_strategy, require_agreement, require_launcher
from alignkit.runs import signals
from alignkit.runs.signals import is_worker

# What torchrun and `accelerate launch` set for the second of two processes on one node.
TORCHRUN = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip
ACCELERATE = TORCHRUN | {"ACCELERATE_MIXED_PRECISION": "no"}
FSDP = ACCELERATE | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"}


def zero(stage: int, **settings: object) -> dict[str, str]:
    content = json.dumps({"zero_optimization": {"stage": stage, **settings}})
    encoded = base64.urlsafe_b64encode(content.encode()).decode()
    return ACCELERATE | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": encoded}


@pytest.mark.parametrize(
    ("launch", "environment"),
    [
        ("", TORCHRUN),
        ("", FSDP),
        ("", zero(2)),
        ("processes: 2, strategy: ddp", ACCELERATE),
        ("processes: auto, strategy: fsdp", FSDP),
        ("strategy: fsdp", TORCHRUN),
        ("strategy: zero3, offload: all", zero(3, offload_param={"device": "cpu"})),
        ("mixed_precision: bf16", ACCELERATE),  # accelerate says no where nobody asked it
        ("mixed_precision: bf16", ACCELERATE | {"ACCELERATE_MIXED_PRECISION": "bf16"}),
        ("nodes: 2", TORCHRUN | {"WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"}),
    ],
)
def test_what_agrees_is_accepted(make_stage: Callable, launch: str, environment: dict[str, str]) -> None:
    require_launcher(environment)
    require_agreement(make_stage(launch), environment)


@pytest.mark.parametrize(
    ("launch", "environment", "message"),
    [
        ("processes: 4", TORCHRUN, "launch.processes is 4, but the launcher started 2 on this node (LOCAL_WORLD"),
        ("nodes: 2", TORCHRUN, "launch.nodes is 2, but the launcher runs 1 (WORLD_SIZE=2, LOCAL_WORLD_SIZE=2)"),
        ("", TORCHRUN | {"WORLD_SIZE": "3", "GROUP_WORLD_SIZE": "2"},
         "the nodes run different numbers of processes: 2 here, 3 on all 2 together"),
        ("strategy: fsdp", ACCELERATE, "launch.strategy is fsdp, but accelerate launch was told ddp"),
        ("strategy: ddp", FSDP, "launch.strategy is ddp, but accelerate launch was told fsdp"),
        ("strategy: zero3", zero(2), "launch.strategy is zero3, but accelerate launch was told zero2"),
        ("", zero(1), "accelerate launch was told DeepSpeed stage 1; use stage 2 or 3"),
        ("", FSDP | {"FSDP_VERSION": "1"}, "accelerate launch was told FSDP version 1"),
        ("strategy: fsdp, offload: all", FSDP, "launch.offload is all, but accelerate launch was told none"),
        ("strategy: zero2, offload: optimizer", zero(2),
         "launch.offload is optimizer, but accelerate launch was told none"),
        ("strategy: fsdp, activation_checkpointing: false", FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
         "launch.activation_checkpointing is false, but accelerate launch was told fsdp_activation_checkpointing"),
        ("mixed_precision: no", ACCELERATE | {"ACCELERATE_MIXED_PRECISION": "bf16"},
         "launch.mixed_precision is no, but accelerate launch was told mixed_precision bf16"),
        ("", ACCELERATE | {"ACCELERATE_USE_MEGATRON_LM": "true"}, "the launcher set ACCELERATE_USE_MEGATRON_LM"),
    ],
)  # fmt: skip
def test_a_contradiction_names_both_sides(
    make_stage: Callable, launch: str, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        require_agreement(make_stage(launch), environment)
    [problem] = caught.value.problems
    assert problem.what.startswith(message)
    assert problem.where == ("r.yaml:2" if launch else "r.yaml")


def test_all_contradictions_are_found_at_once_and_the_precision_of_the_model_counts(make_stage: Callable) -> None:
    with pytest.raises(RecipeError) as caught:
        require_agreement(make_stage("processes: 3, nodes: 3, strategy: zero2"), FSDP)
    assert len(caught.value.problems) == 3
    stage = make_stage(model="path: builtin:tiny-llama, dtype: float32")
    with pytest.raises(
        RecipeError, match="model.dtype is float32, but accelerate launch was told mixed_precision fp16"
    ):
        require_agreement(stage, ACCELERATE | {"ACCELERATE_MIXED_PRECISION": "fp16"})


def test_half_a_launcher_is_refused() -> None:
    assert not is_worker({}) and not is_worker({"WORLD_SIZE": "1"})
    assert is_worker({"RANK": "0"}) and is_worker({"WORLD_SIZE": "2"}) and is_worker({"ALIGNKIT_LAUNCH_DIR": "x"})
    require_launcher({"ALIGNKIT_LAUNCH_DIR": "x"})
    for environment, said in (
        ({"RANK": "0"}, "has RANK but not WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR"),
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE but not RANK"),
        (TORCHRUN | {"MASTER_PORT": "0"}, "MASTER_PORT is 0; give torchrun --standalone, or a port"),
        (TORCHRUN | {"RANK": "x"}, "RANK is 'x' in the environment, which is no number"),
    ):
        with pytest.raises(EnvironmentProblem, match=said):
            require_launcher(environment)


def test_under_torchrun_the_recipe_sets_the_strategy(make_stage: Callable) -> None:
    environment = dict(TORCHRUN)
    apply_strategy(make_stage("strategy: fsdp, device: cpu"), environment)
    assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_RESHARD_AFTER_FORWARD"] == "true"
    environment = dict(TORCHRUN)
    apply_strategy(make_stage("strategy: zero3, device: cpu"), environment)
    require_agreement(make_stage("strategy: zero3"), environment)  # its own settings, read back
    accelerate = dict(ACCELERATE)
    apply_strategy(make_stage("device: cpu"), accelerate)
    assert accelerate == ACCELERATE


def test_a_contradiction_under_torchrun_is_said_once_by_a_node(
    run_python: Callable, write_recipe: Callable, tmp_path: Path
) -> None:
    write_recipe("processes: 4, device: cpu")
    ended = run_python(
        "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
        "-m", "alignkit", "sft", "-r", "r.yaml",
    )  # fmt: skip
    assert [line for line in ended.stderr.splitlines() if line.startswith("error: ")] == [
        "error: r.yaml:2: launch.processes is 4, but the launcher started 2 on this node (LOCAL_WORLD_SIZE=2); make "
        "them equal, or leave launch.processes out"
    ]
    assert not (tmp_path / "runs").exists()


def test_signs_of_life_come_and_an_end_is_kept(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from alignkit.runs import signals as h\n"
        "h.pulse('ignored'); h.stop(); assert not list(Path('.').iterdir())\n"
        "h.start(Path('.'), 3, interval_seconds=0.05)\n"
        "h.pulse('training', 7); time.sleep(0.3)\n"
        "h.write_end(Path('.'), 3, 2, ['first', 'x' * 40000]); h.stop()\n"
    )
    assert (signals.read_beats(tmp_path), signals.read_ends(tmp_path)) == ({}, {})
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    beat = signals.read_beats(tmp_path)[3]
    assert (beat.phase, beat.step, beat.count > 2, beat.idle_seconds >= 0.2) == ("training", 7, True, True)
    end = signals.read_ends(tmp_path)[3]
    assert (end.exit_code, end.problems, end.unexpected) == (2, ("first",), False)
    assert (tmp_path / "rank-3.end").stat().st_size == 1 << 14  # its room was taken before
