"""Jobs of two real processes, and what is done to them: each ends in time, with one message, and nothing is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
HEARTBEAT_SECONDS = 10
RECIPE = """\
name: ranks
model: {path: builtin:tiny-llama}
launch: {processes: PROCESSES, device: cpu, heartbeat_seconds: 10, timeout_seconds: 120}
sft:
  data: {path: builtin:instructions, max_rows: 32}
  max_steps: STEPS
  save_steps: 1
  batch_size: 4
  max_length: 96
  samples: {num: 0}
  learning_rate: 1e-3
"""


class Job:
    """A running `alignkit sft` in a directory of its own."""

    def __init__(self, directory: Path, *arguments: str, recipe: str, **variables: str) -> None:
        self.directory = directory
        self.run = directory / "runs/ranks/sft"
        (directory / "r.yaml").write_text(recipe)
        self._log = directory / "stderr.txt"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ALIGNKIT_")}
        environment |= {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "alignkit", "sft", "-r", "r.yaml", *arguments],
                cwd=directory, env=environment | variables, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

    @property
    def stderr(self) -> str:
        return self._log.read_text()

    @property
    def errors(self) -> list[str]:
        """What was said besides progress and the answer to a signal."""
        lines = [line for line in self.stderr.splitlines() if not line.startswith("sft: ")]
        return [line for line in lines if ": stopping as soon as the step is saved" not in line]

    def beats(self, attempt: int) -> dict[int, dict]:
        found = {}
        for path in (self.run / f"launch/attempt-{attempt}").glob("rank-*.beat"):
            beat = json.loads(path.read_text())
            found[beat["rank"]] = beat
        return found

    def ends(self, attempt: int) -> dict[int, dict]:
        paths = (self.run / f"launch/attempt-{attempt}").glob("rank-*.end")
        return {int(path.stem[5:]): json.loads(path.read_text()) for path in paths if path.read_text().strip()}

    def wait_for_ranks(self, attempt: int = 1, *, step: int | None = None, num: int = 2) -> dict[int, int]:
        """Return the process ids by rank, once all ranks have begun, or have a step behind them."""
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            beats = self.beats(attempt)
            if len(beats) == num and all(step is None or (beat["step"] or 0) >= step for beat in beats.values()):
                return {rank: beat["pid"] for rank, beat in beats.items()}
            assert self.process.poll() is None, self.stderr
            time.sleep(0.02)
        raise AssertionError(f"no rank got so far:\n{self.stderr}")

    def wait(self, timeout: float = 240) -> int:
        """Wait for the end; return the exit code."""
        self.stdout, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode

    def seconds_to_end(self, since: float, name: str) -> float:
        """Wait for the end and print how long it took from the fault."""
        self.wait()
        seconds = time.monotonic() - since
        print(f"\n{name}: job gone after {seconds:.1f} s, exit code {self.process.returncode}")
        print("\n".join(f"  {line}" for line in self.errors))
        return seconds

    def left(self) -> list[int]:
        """Return the processes of the job that still run."""
        found = []
        for process in psutil.process_iter():
            try:
                mark = process.environ().get("ALIGNKIT_LAUNCH_DIR", "")
                if mark.startswith(str(self.directory)) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
            except (psutil.Error, OSError):
                continue
        return found

    def sealed(self) -> list[int]:
        return sorted(
            int(path.parent.name.split("-")[1])
            for path in self.run.glob("checkpoints/checkpoint-*/alignkit_manifest.json")
        )


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def begin(*arguments: str, steps: int = 400, processes: int = 2, **variables: str) -> Job:
        recipe = RECIPE.replace("STEPS", str(steps)).replace("PROCESSES", str(processes))
        jobs.append(Job(tmp_path, *arguments, recipe=recipe, **variables))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.process.kill()
        job.process.wait()
        for pid in job.left():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_job_and_the_same_command_goes_on(start: Callable[..., Job], rank: int) -> None:
    job = start(steps=400)
    pids = job.wait_for_ranks(step=3)
    began = time.monotonic()
    os.kill(pids[rank], signal.SIGKILL)
    assert job.seconds_to_end(began, f"SIGKILL of rank {rank}") < 15
    assert (job.process.returncode, job.left()) == (6, [])
    newest = job.sealed()[-1]
    [line] = job.errors
    assert line.startswith(f"error: rank {rank} (process {pids[rank]} on {socket.gethostname()}) was killed (SIGKILL: ")
    assert line.endswith(f"; all processes were ended; the same command goes on from step {newest}")

    again = start("--set", f"sft.max_steps={newest + 1}", "--allow-change", "max_steps")
    assert again.wait() == 0, again.stderr
    assert f"going on from step {newest}" in again.stderr
    assert f"finished at step {newest + 1}" in again.stdout


def test_a_stopped_rank_ends_the_job_after_the_heartbeat(start: Callable[..., Job]) -> None:
    job = start()
    pids = job.wait_for_ranks(step=2)
    began = time.monotonic()
    os.kill(pids[1], signal.SIGSTOP)
    assert job.seconds_to_end(began, f"SIGSTOP of rank 1, heartbeat {HEARTBEAT_SECONDS} s") < HEARTBEAT_SECONDS + 30
    assert (job.process.returncode, job.left()) == (6, [])
    [line] = job.errors
    assert line.startswith(f"error: rank 1 (process {pids[1]} on ") and "no sign of life for 10 s" in line
    assert "it is stopped (SIGSTOP)" in line


def test_a_signal_to_one_rank_stops_all_at_the_same_step(start: Callable[..., Job]) -> None:
    job = start()
    pids = job.wait_for_ranks(step=2)
    began = time.monotonic()
    os.kill(pids[1], signal.SIGTERM)
    job.seconds_to_end(began, "SIGTERM to rank 1")
    assert (job.process.returncode, job.left()) == (143, [])
    newest = job.sealed()[-1]
    assert job.errors == [f"error: stopped by SIGTERM: step {newest} is saved; the same command goes on from there"]
    assert {end["exit_code"] for end in job.ends(1).values()} == {143}
    assert len({tuple(end["problems"]) for end in job.ends(1).values()}) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)])
def test_a_signal_to_the_supervisor_is_passed_on(start: Callable[..., Job], number: signal.Signals, code: int) -> None:
    job = start()
    job.wait_for_ranks(step=2)
    began = time.monotonic()
    job.process.send_signal(number)
    job.seconds_to_end(began, f"{number.name} to the supervisor")
    assert job.stderr.count(f"{number.name}: stopping as soon as the step is saved; once more stops at once") == 1
    assert (job.process.returncode, job.left()) == (code, [])
    newest = job.sealed()[-1]
    assert job.errors == [
        f"error: stopped by {number.name}: step {newest} is saved; the same command goes on from there"
    ]


@pytest.mark.slow
def test_a_second_signal_ends_at_once(start: Callable[..., Job]) -> None:
    job = start()
    pids = job.wait_for_ranks(step=2)
    os.kill(pids[1], signal.SIGSTOP)  # so that nobody can stop at a step's end
    job.process.terminate()
    time.sleep(1)
    began = time.monotonic()
    job.process.terminate()
    assert job.seconds_to_end(began, "second SIGTERM") < 5
    assert (job.process.returncode, job.left()) == (143, [])
    assert len(job.errors) == 1 and "at once, by a second signal" in job.errors[0]


def test_nothing_outlives_a_killed_supervisor(start: Callable[..., Job]) -> None:
    job = start()
    job.wait_for_ranks(step=2)
    began = time.monotonic()
    job.process.kill()
    while job.left() and time.monotonic() - began < 40:
        time.sleep(0.1)
    seconds = time.monotonic() - began
    print(f"\nSIGKILL of the supervisor: its processes gone after {seconds:.1f} s")
    assert job.left() == [] and seconds < 35
    assert {end["exit_code"] for end in job.ends(1).values()} == {143}  # they saved, as after SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "force"), [(2, True), (1, True), (1, False)])
def test_the_next_command_waits_for_what_a_killed_supervisor_left(
    start: Callable[..., Job], tmp_path: Path, processes: int, force: bool
) -> None:
    first = start()
    pids = first.wait_for_ranks(step=3).values()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    first.process.kill()
    first.wait()
    before = first.sealed()[-1]
    (tmp_path / "stderr.txt").unlink()  # the old ranks still hold it
    changes = ("--set", f"sft.max_steps={before + 20}", "--allow-change", "max_steps")
    second = start(*(("--force",) if force else ()), *changes, processes=processes)
    waits = f"waiting for 2 processes of an earlier command in {second.run} to end"
    deadline = time.monotonic() + 60
    while waits not in second.stderr and time.monotonic() < deadline:
        time.sleep(0.1)
    assert waits in second.stderr
    time.sleep(1)
    assert (second.run / "stage.json").is_file()  # nothing is moved while they may save
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    assert second.wait() == 0, second.stderr
    assert f"finished at step {before + 20}" in second.stdout
    asides = list(second.run.parent.glob("sft.old-*"))
    if force:
        [aside] = asides
        assert (aside / "stage.json").is_file()
        # Their last save went where the others are, and the forced run began anew.
        steps = [int(path.parent.name.split("-")[1]) for path in aside.glob("checkpoints/*/alignkit_manifest.json")]
        assert max(steps) > before and "going on from" not in second.stderr
    else:
        assert asides == []
        [line] = [line for line in second.stderr.splitlines() if "going on from step" in line]
        assert int(line.split("going on from step ")[1].split()[0]) > before


def test_a_signal_to_one_rank_that_is_still_starting_stops_all(start: Callable[..., Job]) -> None:
    job = start()
    pids = job.wait_for_ranks()
    assert job.beats(1)[1]["phase"] == "starting"
    began = time.monotonic()
    os.kill(pids[1], signal.SIGTERM)
    assert job.seconds_to_end(began, "SIGTERM to rank 1 as it starts") < 60
    assert (job.process.returncode, job.left()) == (143, [])
    assert job.errors == ["error: stopped by SIGTERM: nothing was being trained; the same command starts again"]
    assert {end["exit_code"] for end in job.ends(1).values()} == {143}


def test_an_error_of_all_ranks_is_said_once_and_leaves_nothing(start: Callable[..., Job], tmp_path: Path) -> None:
    # As after a killed supervisor: a process of an earlier command still writes its last checkpoint.
    mark = {"ALIGNKIT_LAUNCH_DIR": str(tmp_path / "runs/ranks/sft/launch/attempt-1")}
    stray = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(8)"], env=mark)
    job = start("--set", "sft.max_length=2")
    assert job.wait() == 2
    assert stray.poll() == 0  # the next one has waited for it
    [waited, line, *more] = job.errors
    assert waited == f"waiting for 1 processes of an earlier command in {job.run} to end"
    assert line.startswith("error: r.yaml:5: 100% of the rows are longer than sft.max_length (2 tokens; ")
    assert more == [] and job.left() == [] and not job.run.exists()


def test_a_port_in_use_is_one_message(start: Callable[..., Job]) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        job = start("--main-port", str(port))
        assert job.wait() == 2
    assert job.errors == [
        f"error: --set: port {port} is in use on {socket.gethostname()} (Address already in use); choose another with "
        "--main-port or launch.main_port"
    ]


@pytest.mark.slow
def test_retries_finish_a_run_whose_process_was_killed(start: Callable[..., Job]) -> None:
    job = start("--retries", "2", steps=80)
    os.kill(job.wait_for_ranks(step=3)[0], signal.SIGKILL)
    job.wait_for_ranks(2)
    further = job.sealed()[-1] + 2  # a step is sealed when the next has begun
    os.kill(job.wait_for_ranks(2, step=further)[1], signal.SIGKILL)
    assert job.wait() == 0, job.stderr
    assert "finished at step 80" in job.stdout
    again = [line for line in job.errors if "starting again" in line]  # a half-written checkpoint is a warning too
    assert len(again) == 2 and again[1].endswith("starting again (2 of 2 retries)")


@pytest.mark.parametrize("processes", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_retries_without_progress_end(start: Callable[..., Job], processes: int) -> None:
    job = start("--retries", "9", processes=processes)
    for attempt in (1, 2):
        os.kill(job.wait_for_ranks(attempt, num=processes)[0], signal.SIGKILL)
    assert job.wait() == 6
    warning, error = job.errors
    assert warning.endswith("; starting again (1 of 9 retries)")
    assert error.endswith("no new checkpoint since the try before, so it is not started again")
    assert job.left() == []


@pytest.mark.slow
def test_retries_do_not_follow_a_mistake(start: Callable[..., Job]) -> None:
    job = start("--retries", "9", "--set", "sft.batch_size=3")
    assert job.wait() == 2
    assert len(job.errors) == 1
