"""Two nodes on one machine: two network namespaces joined by a cable (veth), each with process numbers of its own.

Nothing but the cable and the file system connects them, so that a wrong interface, address or port shows.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

MISSING = [name for name in ("ip", "unshare") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or bool(MISSING), reason="needs Linux with iproute2 and util-linux"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may make network namespaces"),
]

STEPS, SAVE_STEPS = 60, 5
RECIPE = f"""\
model: {{path: builtin:tiny-llama}}
launch: {{nodes: 2, processes: 1, device: cpu, strategy: ddp, heartbeat_seconds: 20, timeout_seconds: 120}}
sft:
  data: {{path: builtin:instructions, max_rows: 64}}
  batch_size: 4
  max_length: 160
  max_steps: {STEPS}
  save_steps: {SAVE_STEPS}
  logging_steps: 1
  learning_rate: 1e-3
  samples: {{num: 0}}
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Node:
    """A machine as far as network and processes go; files are shared, as on a cluster."""

    def __init__(self, number: int, network: str) -> None:
        self.number, self.name, self.address = number, f"{network}-{number}", f"10.213.77.{number + 1}"
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *command: str, cwd: Path) -> subprocess.Popen[str]:
        """Start a command on this node; it sees its own processes only, and they end with it."""
        inside = ["ip", "netns", "exec", self.name, "unshare", "--fork", "--pid", "--mount-proc", "--kill-child"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "GLOO_"))}
        environment |= {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "HF_HUB_OFFLINE": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.processes.append(subprocess.Popen(
            [*inside, *command], cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        ))  # fmt: skip
        return self.processes[-1]

    def left(self) -> list[int]:
        """Return the processes that are still in this node's network, by the host's numbers."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False).stdout
        return [int(pid) for pid in found.split()]


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    """Two nodes with a cable between them; skipped where the kernel does not let us."""
    network = f"alignkit{os.getpid() % 10000}"
    made = [Node(number, network) for number in (0, 1)]
    try:
        try:
            for node in made:
                ip("netns", "add", node.name)
            ends = [f"ak{os.getpid() % 10000}-{node.number}" for node in made]
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for node, end in zip(made, ends, strict=True):
                ip("link", "set", end, "netns", node.name)
                ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", end)
                ip("-n", node.name, "link", "set", end, "up")
                ip("-n", node.name, "link", "set", "lo", "up")
            assert made[0].start("true", cwd=Path("/")).wait(20) == 0
        except (subprocess.CalledProcessError, AssertionError) as error:
            pytest.skip(f"namespaces are not permitted here: {getattr(error, 'stderr', None) or error}")
        yield made
    finally:
        for node in made:
            for pid in node.left():
                os.kill(pid, signal.SIGKILL)
            for process in node.processes:
                process.kill()
                process.communicate()
            subprocess.run(["ip", "netns", "del", node.name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", f"ak{os.getpid() % 10000}-0"], capture_output=True, check=False)


def start(nodes: list[Node], directory: Path, out: str) -> list[subprocess.Popen[str]]:
    """Start the same command on both nodes, each with its number."""
    common = ["-r", "r.yaml", "--out", out, "--main-address", nodes[0].address, "--main-port", "29512"]
    command = [sys.executable, "-m", "alignkit", "sft", *common, "--node-rank"]
    return [node.start(*command, str(node.number), cwd=directory) for node in nodes]


def end(processes: list[subprocess.Popen[str]], *, code: int = 0, seconds: float = 240) -> list[str]:
    """Wait for the processes, which must end with this code; return what each wrote to stderr."""
    until = time.monotonic() + seconds
    said = [process.communicate(timeout=max(until - time.monotonic(), 1))[1] for process in processes]
    assert {process.returncode for process in processes} == {code}, "".join(said)
    return said


def find_worker(directory: Path, rank: int) -> int:
    """Return the process of a rank, by the host's numbers."""
    for entry in Path("/proc").iterdir():
        try:
            variables = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        here = any(variable.startswith(f"ALIGNKIT_LAUNCH_DIR={directory}/".encode()) for variable in variables)
        if here and f"RANK={rank}".encode() in variables:
            return int(entry.name)
    raise AssertionError(f"no process of rank {rank}")


def sealed(run: Path) -> int:
    return max((int(path.parent.name.split("-")[1]) for path in run.glob("checkpoints/*/alignkit_manifest.json")),
               default=0)  # fmt: skip


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def digest(run: Path) -> str:
    return hashlib.sha256((run / "model/model.safetensors").read_bytes()).hexdigest()


def test_two_nodes_train_as_one_process_end_together_and_resume_exactly(nodes: list[Node], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    alone = ("-m", "alignkit", "sft", "-r", "r.yaml", "--out", "one", "--set", "launch.nodes=1")
    end([nodes[0].start(sys.executable, *alone, cwd=tmp_path)])

    began = time.monotonic()
    first, second = end(start(nodes, tmp_path, "two"))
    print(f"two nodes: {time.monotonic() - began:.1f} s")
    assert f"step {STEPS}/{STEPS}" in first and f"step {STEPS}/{STEPS}" not in second  # node 0 speaks for the job
    expected, curve = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(curve) == list(expected) == list(range(1, STEPS + 1))
    print(f"largest difference of the loss to one process: {max(abs(curve[step] - expected[step]) for step in curve)}")
    assert all(abs(curve[step] - expected[step]) < 1e-3 for step in curve)
    assert [node.left() for node in nodes] == [[], []]

    run = tmp_path / "killed"
    processes = start(nodes, tmp_path, "killed")
    until = time.monotonic() + 120
    while sealed(run) < 2 * SAVE_STEPS:
        assert time.monotonic() < until and all(process.poll() is None for process in processes)
        time.sleep(0.02)
    began = time.monotonic()
    os.kill(find_worker(run, 1), signal.SIGKILL)
    first, _ = end(processes, code=6)
    seconds = time.monotonic() - began
    print(f"both nodes ended {seconds:.1f} s after the kill: {first.splitlines()[-1]}")
    assert seconds < 15 and first.count("error:") == 1 and "rank 1" in first
    assert [node.left() for node in nodes] == [[], []]
    assert sealed(run) < STEPS

    assert "sft: going on from step" in end(start(nodes, tmp_path, "killed"))[0]
    assert digest(run) == digest(tmp_path / "two")
    assert losses(run) == losses(tmp_path / "two")


def test_a_node_that_nobody_joins_is_told_apart_from_a_wrong_address(nodes: list[Node], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("timeout_seconds: 120", "timeout_seconds: 10"))
    command = [sys.executable, "-m", "alignkit", "sft", "-r", "r.yaml", "--node-rank", "1", "--main-address"]
    (said,) = end([nodes[1].start(*command, "10.213.77.99", cwd=tmp_path)], code=2, seconds=60)
    assert said.count("error:") == 1 and "nobody answers at 10.213.77.99:29500 after 10 s" in said
