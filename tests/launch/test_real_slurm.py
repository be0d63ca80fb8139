"""The batch script under Slurm itself: a cluster of two nodes on this machine, set up by the test and taken down again.

Needs slurmctld and slurmd (22.05 or newer, with auth/none) and root; nothing of this machine's own Slurm is touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "srun", "scancel", "sinfo", "setpriv")
MISSING = [name for name in PROGRAMS if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"Slurm is not installed: no {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd starts jobs as root only"),
]

CONFIG = """\
ClusterName=alignkit
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
SlurmctldPort={port}
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 RealMemory=1000
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""

RECIPE = """\
name: cluster
model: {path: builtin:tiny-llama}
launch: {device: cpu, LAUNCH, slurm: {partition: main, cpus_per_process: 1}}
sft:
  data: {path: builtin:instructions, max_rows: 64}
  batch_size: 4
  max_length: 160
  max_steps: STEPS
  save_steps: 10
  logging_steps: 1
  samples: {num: 0}
dpo:
  start_from: sft
  data: {path: builtin:preferences, max_rows: 32}
  batch_size: 4
  max_length: 160
  max_steps: 2
  samples: {num: 0}
stages: [sft, dpo]
"""


def free_ports(count: int) -> int:
    """Return the first of `count` neighbouring ports that nobody has."""
    for first in range(21000, 29000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no free ports")


class Cluster:
    """A running Slurm, asked through its own programs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.hurried: set[tuple[str, str]] = set()
        first = free_ports(4)
        (directory / "state").mkdir()
        for node in ("n1", "n2"):
            (directory / f"spool-{node}").mkdir()
        text = CONFIG.format(directory=directory, port=first, first=first + 1, last=first + 2)
        (directory / "slurm.conf").write_text(text)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle; skip where they cannot run."""
        for command in (["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]):
            log = (self.directory / f"{command[0]}-{command[-1]}.out").open("wb")
            tied = ["setpriv", "--pdeathsig", "TERM", *command]  # also when this process is killed
            self.daemons.append(
                subprocess.Popen(tied, env=self.environment, stdout=log, stderr=log, start_new_session=True)
            )
        until = time.monotonic() + 30
        while self.ask("sinfo", "--noheader", "--format=%T %D", check=False).strip() != "idle 2":
            if time.monotonic() > until or any(daemon.poll() is not None for daemon in self.daemons):
                logs = "".join(path.read_text()[-300:] for path in self.directory.glob("*.out"))
                pytest.skip(f"Slurm does not start here: {logs[-500:]}")
            time.sleep(0.3)

    def ask(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def alignkit(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "alignkit", *arguments]
        return subprocess.run(
            command, cwd=cwd, env=self.environment, capture_output=True, text=True, check=False, timeout=300
        )

    def facts(self, job: str) -> dict[str, str]:
        shown = self.ask("scontrol", "show", "job", "--oneliner", job)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, job: str, *states: str, seconds: float = 240) -> dict[str, str]:
        """Wait until a job is in one of these states; a requeued one need not sit out Slurm's two minutes."""
        until = time.monotonic() + seconds
        while (facts := self.facts(job))["JobState"] not in states:
            assert time.monotonic() < until, (facts, self.log(facts))
            sitting = (job, facts["Restarts"])
            if facts.get("Reason") == "BeginTime" and sitting not in self.hurried:
                self.hurried.add(sitting)
                self.ask("scontrol", "update", f"JobId={job}", "StartTime=now+2", check=False)
            time.sleep(0.3)
        return facts

    def log(self, facts: dict[str, str]) -> str:
        path = Path(facts["StdOut"])
        return path.read_text() if path.exists() else "(no log)"

    def stop(self) -> None:
        """End jobs and daemons, and everything that jobs left."""
        self.ask("scancel", "--user=root", "--full", "--signal=KILL", check=False)
        self.ask("scancel", "--user=root", check=False)
        time.sleep(1)
        for daemon in self.daemons:
            daemon.terminate()
        for daemon in self.daemons:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=10)
        for process in self.left():
            process.kill()

    def left(self) -> list[psutil.Process]:
        """Return the processes that carry this cluster's configuration in their environment."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"] and process.pid != os.getpid():
                    found.append(process)
        return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.stop()
    assert made.left() == []


def write(directory: Path, *, steps: int, launch: str = "processes: 1") -> Path:
    """Write the recipe and return the directory of its sft run."""
    (directory / "r.yaml").write_text(RECIPE.replace("STEPS", str(steps)).replace("LAUNCH", launch))
    return directory / "runs/cluster/sft"


def submit(cluster: Cluster, directory: Path, *arguments: str) -> dict[str, str]:
    """Run a command with --submit and return the job id of each stage."""
    done = cluster.alignkit(*arguments, "-r", "r.yaml", "--slurm", "--submit", cwd=directory)
    assert done.returncode == 0, done.stderr
    return {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()[2:]}


def wait_for_checkpoint(cluster: Cluster, job: str, run: Path, *, beyond: int = 0) -> int:
    """Wait until a running job has sealed a checkpoint later than this step; return its step."""
    until = time.monotonic() + 180
    while True:
        sealed = [int(path.parent.name.split("-")[1]) for path in run.glob("checkpoints/*/alignkit_manifest.json")]
        if max(sealed, default=0) > beyond:
            return max(sealed)
        facts = cluster.facts(job)
        assert time.monotonic() < until and facts["JobState"] == "RUNNING", cluster.log(facts)
        time.sleep(0.05)


def run_whole(cluster: Cluster, directory: Path, *arguments: str) -> Path:
    """Train without Slurm; return the run."""
    whole = cluster.alignkit("sft", "-r", "r.yaml", "--out", str(directory / "whole"), *arguments, cwd=directory)
    assert whole.returncode == 0, whole.stderr
    return directory / "whole"


def digest(run: Path) -> str:
    return hashlib.sha256((run / "model/model.safetensors").read_bytes()).hexdigest()


def losses(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def test_a_job_runs_to_its_end_from_a_directory_with_a_hostile_name(cluster: Cluster, tmp_path: Path) -> None:
    write(tmp_path, steps=2)
    run = tmp_path / "a b\"c'd $(touch canary) %j"
    job = submit(cluster, tmp_path, "sft", "--out", str(run))["sft"]
    facts = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    log = (run / f"launch/slurm-{job}.log").read_text()
    assert facts["JobState"] == "COMPLETED", log
    assert (run / "result.json").exists()
    assert "sft: step 2/2" in log
    assert not list(tmp_path.rglob("canary"))
    assert not list(run.glob("launch/ended-*"))


def test_a_job_told_to_stop_saves_requeues_itself_resumes_and_ends_the_same(cluster: Cluster, tmp_path: Path) -> None:
    run = write(tmp_path, steps=300)
    whole = run_whole(cluster, tmp_path)
    job = submit(cluster, tmp_path, "sft")["sft"]
    cluster.wait(job, "RUNNING")
    reached = wait_for_checkpoint(cluster, job, run)
    cluster.ask("scancel", "--signal=USR1", "--batch", job)
    cluster.wait(job, "PENDING")
    assert cluster.facts(job)["Restarts"] == "1"
    cluster.wait(job, "RUNNING")
    wait_for_checkpoint(cluster, job, run, beyond=reached + 10)
    # Preempted: Slurm sends SIGTERM to the processes, not to the batch shell.
    cluster.ask("scancel", "--signal=TERM", job)
    cluster.wait(job, "PENDING")
    facts = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    log = cluster.log(facts)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "2"), log
    assert log.count("alignkit: ended with code 143; requeued") == 2
    assert log.count("sft: going on from step") == 2
    assert digest(run) == digest(whole)
    assert losses(run) == losses(whole)


def test_a_cancelled_job_saves_and_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    run = write(tmp_path, steps=100000)
    job = submit(cluster, tmp_path, "sft")["sft"]
    cluster.wait(job, "RUNNING")
    wait_for_checkpoint(cluster, job, run)
    cluster.ask("scancel", job)
    facts = cluster.wait(job, "CANCELLED")
    until = time.monotonic() + 30
    while cluster.ask("squeue", "--noheader", f"--jobs={job}", check=False).strip() and time.monotonic() < until:
        time.sleep(0.3)
    assert cluster.facts(job)["JobState"] == "CANCELLED"
    log = cluster.log(facts)
    assert "is saved; the same command goes on from there" in log
    assert "requeued" not in log


def test_a_mistake_is_not_requeued_and_cancels_what_waits_for_it(cluster: Cluster, tmp_path: Path) -> None:
    write(tmp_path, steps=2)
    jobs = submit(cluster, tmp_path, "run", "--set", "sft.max_length=8")
    facts = cluster.wait(jobs["sft"], "FAILED", "COMPLETED")
    assert facts["ExitCode"] == "2:0", cluster.log(facts)
    assert "error: r.yaml:" in cluster.log(facts) and "max_length" in cluster.log(facts)
    assert cluster.wait(jobs["dpo"], "CANCELLED")["JobState"] == "CANCELLED"


def test_a_chain_of_stages_runs_one_after_the_other(cluster: Cluster, tmp_path: Path) -> None:
    run = write(tmp_path, steps=200)
    jobs = submit(cluster, tmp_path, "run")
    assert list(jobs) == ["sft", "dpo"]
    assert cluster.facts(jobs["dpo"])["Dependency"].startswith(f"afterok:{jobs['sft']}")
    cluster.wait(jobs["sft"], "RUNNING")
    wait_for_checkpoint(cluster, jobs["sft"], run)
    cluster.ask("scancel", "--signal=USR1", "--batch", jobs["sft"])
    cluster.wait(jobs["sft"], "PENDING")
    assert cluster.facts(jobs["dpo"])["JobState"] == "PENDING"  # a requeued job has not failed
    first = cluster.wait(jobs["sft"], "COMPLETED", "FAILED")
    second = cluster.wait(jobs["dpo"], "COMPLETED", "FAILED", "CANCELLED")
    assert (first["JobState"], second["JobState"]) == ("COMPLETED", "COMPLETED"), cluster.log(second)
    assert second["StartTime"] >= first["EndTime"]


@pytest.mark.parametrize("launch", ["processes: 2", "processes: 1, nodes: 2, main_address: 127.0.0.1"])
def test_a_job_of_two_processes_is_stopped_requeued_and_ends_as_one_process_does(
    launch: str, cluster: Cluster, tmp_path: Path
) -> None:
    run = write(tmp_path, steps=40, launch=launch)
    whole = run_whole(cluster, tmp_path, "--set", "launch.processes=1", "--set", "launch.nodes=1")
    job = submit(cluster, tmp_path, "sft")["sft"]
    cluster.wait(job, "RUNNING")
    wait_for_checkpoint(cluster, job, run)
    cluster.ask("scancel", "--signal=USR1", "--batch", job)
    facts = cluster.wait(job, "PENDING", "FAILED", "COMPLETED")
    assert facts["JobState"] == "PENDING", cluster.log(facts)
    facts = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    log = cluster.log(facts)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), log
    assert log.count("sft: going on from step") == 1
    expected = losses(whole)
    assert [step for step, _ in losses(run)] == [step for step, _ in expected]
    for (step, loss), (_, other) in zip(losses(run), expected, strict=True):
        assert abs(loss - other) < 1e-3, step
