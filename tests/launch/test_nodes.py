"""Two nodes of one job, here two supervisors on this machine that share a run directory: what they tell each other."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranked_runs import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = """\
name: nodes
model: {path: builtin:tiny-llama}
launch: {nodes: 2, processes: 1, device: cpu, main_address: ADDRESS, heartbeat_seconds: 10, timeout_seconds: 90}
sft:
  data: {path: builtin:instructions, max_rows: 32}
  max_steps: 400
  save_steps: 1
  batch_size: 4
  max_length: 96
  samples: {num: 0}
  learning_rate: 1e-3
"""
Node = subprocess.Popen[str]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Return a function that starts the command as a node of the job."""
    nodes: list[Node] = []
    (tmp_path / "r.yaml").write_text(RECIPE.replace("ADDRESS", "127.0.0.1"))

    def begin(rank: int, port: int, *arguments: str) -> Node:
        environment = {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        nodes.append(
            subprocess.Popen(
                [sys.executable, "-m", "alignkit", "sft", "-r", "r.yaml", "--node-rank", str(rank),
                 "--main-port", str(port), *arguments],
                cwd=tmp_path, env=os.environ | environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
        return nodes[-1]

    yield begin
    for node in nodes:
        node.kill()
        node.wait()


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("sft: ")]


def wait_for_steps(tmp_path: Path, step: int, *nodes: Node) -> dict[int, int]:
    """Return the process ids by rank, once both have a step behind them."""
    from alignkit.runs.signals import read_beats

    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        beats = read_beats(tmp_path / "runs/nodes/sft/launch/attempt-1")
        if len(beats) == 2 and all((beat.step or 0) >= step for beat in beats.values()):
            return {rank: beat.pid for rank, beat in beats.items()}
        assert all(node.poll() is None for node in nodes)
        time.sleep(0.05)
    raise AssertionError("no rank got so far")


def finish(*nodes: Node, seconds: float = 60) -> list[tuple[int, str, str]]:
    """Wait for the nodes; return exit code, stdout and stderr of each."""
    said = [node.communicate(timeout=seconds) for node in nodes]
    return [(node.returncode, *texts) for node, texts in zip(nodes, said, strict=True)]


@pytest.mark.slow
def test_two_nodes_train_and_only_node_0_speaks(start: Callable[..., Node], tmp_path: Path) -> None:
    port = free_port()
    second = start(1, port, "--set", "sft.max_steps=3")
    time.sleep(2)  # it waits for node 0
    main = start(0, port, "--set", "sft.max_steps=3")
    (code, said, told), silent = finish(main, second, seconds=240)
    assert code == 0 and silent == (0, "", ""), told + silent[2]
    assert "finished at step 3" in said and errors(told) == []
    assert "starting 1 processes on each of 2 nodes (ddp, cpu)" in told


@pytest.mark.slow
def test_a_death_on_one_node_ends_the_other(start: Callable[..., Node], tmp_path: Path) -> None:
    port = free_port()
    main, second = start(0, port), start(1, port)
    pids = wait_for_steps(tmp_path, 2, main, second)
    began = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    (code, _, told), (other_code, _, silence) = finish(main, second)
    seconds = time.monotonic() - began
    print(f"\nSIGKILL on node 1: both nodes gone after {seconds:.1f} s\n  {errors(told)}\n  {errors(silence)}")
    assert seconds < 15
    assert (code, other_code) == (6, 6) and len(errors(told)) == len(errors(silence)) == 1
    assert f"rank 1 (process {pids[1]} on " in told and f"error: rank 1 (process {pids[1]} on " in silence


@pytest.mark.slow
def test_a_signal_to_one_node_stops_both(start: Callable[..., Node], tmp_path: Path) -> None:
    port = free_port()
    main, second = start(0, port), start(1, port)
    wait_for_steps(tmp_path, 2, main, second)
    second.terminate()
    (code, _, told), (other_code, _, silence) = finish(main, second)
    assert (code, other_code) == (143, 143), told + silence
    assert len(errors(told)) == 1 and "stopped by SIGTERM: step " in told


@pytest.mark.slow
def test_nodes_with_other_numbers_of_processes_are_refused(start: Callable[..., Node]) -> None:
    port = free_port()
    main, second = start(0, port), start(1, port, "--set", "launch.processes=2")
    # Node 0 is told, and does not wait for the rest of launch.timeout_seconds.
    (other_code, _, told), (code, _, heard) = finish(second, main, seconds=120)
    assert (other_code, code) == (2, 2)
    assert errors(told) == [
        f"error: --set: the nodes do not start the same job: processes is 1 on node 0 ({socket.gethostname()}) and 2 "
        f"on node 1 ({socket.gethostname()}); start the same command, recipe and alignkit on all of them"
    ]
    assert len(errors(heard)) == 1 and "processes is 1 on node 0" in heard


@pytest.mark.parametrize(
    ("rank", "arguments", "code", "said"),
    [
        (1, ("--main-address", "no-such-host.invalid"), 2,
         r"error: --set: the main address no-such-host\.invalid cannot be resolved on .*--main-address or launch"),
        (1, (), 2,
         r"error: r\.yaml:3: nobody answers at 127\.0\.0\.1:\d+ after 10 s; start the same command on node 0, check "
         "--main-address and --main-port, and that no firewall stands between$"),
        (0, (), 6, r"error: node 1 did not come within 10 s; start the same command there; "),
    ],
)  # fmt: skip
def test_a_node_that_is_not_there_is_one_message(
    start: Callable[..., Node], rank: int, arguments: tuple[str, ...], code: int, said: str
) -> None:
    ((ended, _, told),) = finish(start(rank, free_port(), "--set", "launch.timeout_seconds=10", *arguments))
    [line] = errors(told)
    assert ended == code and re.match(said, line), line
