"""A stage in processes of its own: checked and locked here once, tried, watched, and tried again when that can help.
The supervisors of several nodes write files in the shared run directory: node 0 which try is running, each node that it
is there, and the first that fails why.

Or a stage as a Slurm batch job: the sbatch script beside the run, submitted on request, chained where stages follow. It
uses this interpreter, this directory and the variables of the shell that submits it.
"""

import errno
import importlib.util
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from alignkit import __version__, console
from alignkit.errors import AlignKitError, EnvironmentProblem, RecipeError, RunError, UsageError
from alignkit.launch import accelerate
from alignkit.launch.placement import LOOPBACK, Command, Placement
from alignkit.launch.supervise import Supervisor, abort, make_error
from alignkit.preflight.requirements import list_needs, require_ready
from alignkit.recipe.schema import SlurmOptions
from alignkit.recipe.stage import check_batch
from alignkit.runs.directory import MANIFEST, Result, RunDir, newest_step, open_run, read_result, refuse_foreign
from alignkit.runs.files import disk_failures, read_record, write_json, write_text
from alignkit.runs.record import count_cores, record_warnings
from alignkit.runs.signals import hearing, stopped_by

# A process died or hung, was killed, was told to end while this one was not. Anything else would happen again.
RETRIED = frozenset({6, 137, 143})
_KEPT_ATTEMPTS = 5
_LOOK_SECONDS = 0.5
_CURRENT = "current.json"  # the number of the newest try, and what node 0 starts


class Job:
    """A stage in processes of its own, as this node sees it; `run` is the only thing to call."""

    def __init__(self, command: Command, placement: Placement, hold: Callable[..., AbstractContextManager]) -> None:
        """Take `hold_run` as `hold`: node 0 has the run directory for itself meanwhile."""
        self._command, self._stage, self._placement, self._hold = command, command.stage, placement, hold
        self._run = RunDir(Path(command.stage.run_dir))
        self._received: list[int] = []  # stop signals

    def run(self, *, force: bool, retries: int) -> Result:
        """Train the stage and return how it ended; no process is left then, whatever is raised."""
        stage, run = self._stage, self._run
        require_ready(stage)
        if stage.launch.strategy in accelerate.ZERO_STAGES and importlib.util.find_spec("deepspeed") is None:
            what = f"{stage.where('launch.strategy')}: launch.strategy {stage.launch.strategy} needs DeepSpeed, not "
            raise EnvironmentProblem(f"{what}installed here; `pip install 'deepspeed>=0.19,<0.20'`, or use fsdp")
        with hearing(lambda number, frame: self._received.append(number)):
            if self._placement.node_rank != 0:
                console.hushed = True  # node 0 speaks
                self._try_until_done(retries)
                return read_result(run.result)
            with self._hold(self._command, force=force, check=self._heed_signal):
                try:
                    with record_warnings(run.warnings):
                        self._try_until_done(retries)
                except UsageError:
                    if not run.stage.exists():  # what tries have left goes, and nothing that was put there otherwise
                        for path in run.launch.glob("attempt-*"):
                            shutil.rmtree(path, ignore_errors=True)
                        for name in (accelerate.CONFIG, accelerate.DEEPSPEED_CONFIG, _CURRENT):
                            (run.launch / name).unlink(missing_ok=True)
                        with suppress(OSError):
                            run.launch.rmdir()
                    raise
                return read_result(run.result)

    def _heed_signal(self) -> None:
        if self._received:
            raise stopped_by(self._received[0], "nothing was being trained; the same command starts again")

    def _try_until_done(self, retries: int) -> None:
        """Run tries until one ends well; raise what the last one ended of."""
        before: int | None = -1  # the newest sealed step when the try before had ended
        attempt = 0
        for number in range(retries + 1):
            try:
                self._try(after=attempt)
                return
            except AlignKitError as error:
                if error.exit_code not in RETRIED or self._received or number == retries:
                    raise
                newest = newest_step(self._run.checkpoints)
                if newest == before:
                    text = f"{error}; no new checkpoint since the try before, so it is not started again"
                    raise make_error(error.exit_code, [text]) from error
                before, attempt = newest, self._current().get("attempt", 0)
                console.warn(f"{self._stage.name}: {error}; starting again ({number + 1} of {retries} retries)")

    def _try(self, *, after: int) -> None:
        """Start the processes once and watch them to their end; the number of this try is above `after`."""
        stage, placement = self._stage, self._placement
        several = placement.world_size > 1
        if placement.nodes > 1:
            try:
                socket.getaddrinfo(address := str(placement.main_address), None)
            except OSError as error:
                what = f"the main address {address} cannot be resolved on {socket.gethostname()} ({error.strerror}); "
                what += "give the name or IP of node 0 with --main-address or launch.main_address"
                raise RunError(what, where=stage.where("launch.main_address")) from error
        if placement.node_rank == 0:
            if several:
                placement = replace(placement, main_port=self._choose_port())
            directory = self._announce(placement)
        else:
            self._wait_for_main(after)
            theirs, ours = self._current(), self._facts()
            directory = self._run.launch / f"attempt-{theirs['attempt']}"
            for key in (key for key in ours if key != "host" and theirs.get(key) != ours[key]):
                sides = f"{theirs.get(key)} on node 0 ({theirs.get('host')}) and {ours[key]} on node "
                sides += f"{placement.node_rank} ({ours['host']}); start the same command, recipe and alignkit on all"
                what = f"the nodes do not start the same job: {key} is {sides} of them"
                refused = RunError(what, where=stage.where(f"launch.{key}"))
                abort(directory, int(placement.node_rank or 0), refused)
                raise refused
        argv = self._command.argv()
        extra: dict[str, str] = {}  # what the user has set stays
        if several:
            argv = accelerate.command_line(self._command, placement)
            where = f" on each of {placement.nodes} nodes" if placement.nodes > 1 else ""
            text = f"starting {placement.processes} processes{where} ({placement.strategy}, {placement.device})"
            console.note(f"{stage.name}: {text}")
            extra["OMP_NUM_THREADS"] = str(max(1, count_cores() // placement.processes))
            if (interface := _find_interface(placement)) is not None:
                extra["GLOO_SOCKET_IFNAME"] = interface
        with disk_failures(self._run.path, "launch files"):
            write_json(directory / f"node-{placement.node_rank}.json", self._facts())
        supervisor = Supervisor(directory, placement, self._run.checkpoints, stage.launch, self._received)
        supervisor.watch(argv, extra={name: value for name, value in extra.items() if name not in os.environ})

    def _facts(self) -> dict[str, Any]:
        known = {name: getattr(self._placement, name) for name in ("processes", "nodes", "strategy", "device")}
        return {**known, "version": __version__, "host": socket.gethostname()}

    def _current(self) -> dict[str, Any]:
        return read_record(self._run.launch / _CURRENT)

    def _announce(self, placement: Placement) -> Path:
        """Write, as node 0, what a new try needs; return its directory."""
        launch = self._run.launch
        with disk_failures(self._run.path, "launch files"):
            launch.mkdir(exist_ok=True)
            older = sorted(int(path.name.removeprefix("attempt-")) for path in launch.glob("attempt-*"))
            for number in older[: -_KEPT_ATTEMPTS + 1]:
                shutil.rmtree(launch / f"attempt-{number}", ignore_errors=True)
            attempt = max(older, default=0) + 1
            directory = launch / f"attempt-{attempt}"
            directory.mkdir()
            if placement.world_size > 1:
                for name, text in accelerate.make_configs(self._stage, placement).items():
                    (launch / name).write_text(text, encoding="utf-8")
            write_json(launch / _CURRENT, {"attempt": attempt, **self._facts()})
        return directory

    def _choose_port(self) -> int:
        """Find the port node 0 opens: the one that was given, which must be free, else any free one."""
        wanted = self._placement.main_port or 0
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does: a dying connection is no user
            try:
                probe.bind((LOOPBACK if self._placement.nodes == 1 else "", wanted))
            except OSError as error:
                which = f"port {wanted}" if wanted else "no free port"
                state = "is in use" if error.errno == errno.EADDRINUSE else "cannot be opened"
                what = f"{which} {state} on {socket.gethostname()} ({error.strerror}); choose another with --main-port "
                raise RunError(f"{what}or launch.main_port", where=self._stage.where("launch.main_port")) from error
            return int(probe.getsockname()[1])

    def _wait_for_main(self, after: int) -> None:
        """Wait until node 0 answers at its port and has announced a try above `after`."""
        address, port = str(self._placement.main_address), int(self._placement.main_port or 0)
        seconds = self._stage.launch.timeout_seconds
        deadline = time.monotonic() + seconds
        while True:
            with suppress(OSError):
                socket.create_connection((address, port), timeout=2).close()
                if self._current().get("attempt", 0) > after:
                    return
            if time.monotonic() > deadline:
                what = f"nobody answers at {address}:{port} after {seconds:g} s; start the same command on node 0, "
                what += "check --main-address and --main-port, and that no firewall stands between"
                raise RunError(what, where=self._stage.where("launch.main_address"))
            self._heed_signal()
            time.sleep(_LOOK_SECONDS)


def _find_interface(placement: Placement) -> str | None:
    """Find the interface the processes reach each other through, None where it cannot be told; gloo takes the one that
    this host's name resolves to, which on many machines is none the others reach."""
    import psutil

    if placement.nodes == 1:
        return "lo" if sys.platform == "linux" else None
    try:
        address = str(placement.main_address), placement.main_port
        family, kind, protocol, _, target = socket.getaddrinfo(*address, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # sends nothing: it only asks the kernel for the way
            own = probe.getsockname()[0]
    except OSError:
        return None
    found = (name for name, addresses in psutil.net_if_addrs().items() if own in {each.address for each in addresses})
    return next(found, None)


def write_jobs(
    commands: Sequence[Command], *, submit: bool, dry_run: bool, force: bool = False
) -> list[dict[str, Any]]:
    """Write `<run dir>/launch/job.sbatch` for each stage and, with `submit`, hand them to sbatch in this order; tell of
    each what it is, what it waits for (`depends_on`), and the command that submits it, in which `$job_N` stands for the
    N-th job's id until that is known. With `force` an existing run is moved aside now, not at each start of the job."""
    if submit and not dry_run and shutil.which("sbatch") is None:
        what = "submit on a machine of the cluster, or take --submit away to write the script"
        raise EnvironmentProblem(f"sbatch is not on PATH here; {what}")
    jobs: dict[str, dict[str, Any]] = {}
    for command in commands:
        stage = command.stage
        refuse_foreign(Path(stage.run_dir))
        needs = dict.fromkeys(need.stage for need in list_needs(stage))
        if not dry_run:
            require_ready(stage, coming=[*jobs, *(() if submit else needs)])
        path = str(RunDir(Path(stage.run_dir)).launch / "job.sbatch")
        after = [name for name in needs if name in jobs]
        ids = [f"$job_{list(jobs).index(name) + 1}" for name in after]
        jobs[stage.name] = {
            "stage": stage.name, "path": path, "script": build_script(command), "depends_on": after,
            "submit": _order(ids, path), "job_id": None}  # fmt: skip
    if dry_run:
        return list(jobs.values())
    for command, job in zip(commands, jobs.values(), strict=True):
        run, lock = open_run(Path(command.stage.run_dir), force=force)
        with closing(lock), disk_failures(run.path, "the batch script"):
            run.launch.mkdir(exist_ok=True)
            write_text(Path(job["path"]), job["script"])
    for job in jobs.values() if submit else ():
        job["submit"] = _order([jobs[name]["job_id"] for name in job["depends_on"]], job["path"])
        done = subprocess.run(job["submit"], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = [f"sbatch refuses {job['path']}: {' '.join(done.stderr.split())}"]
            said += [f"{name} is submitted as job {each['job_id']}" for name, each in jobs.items() if each["job_id"]]
            raise EnvironmentProblem("; ".join(said))
        job["job_id"] = done.stdout.strip().split(";")[0]  # `--parsable` prints id, or id;cluster
    return list(jobs.values())


def _order(ids: Sequence[str], path: str) -> list[str]:
    """Make the command that submits a script; it waits for other jobs, and is cancelled when one of them fails."""
    after = [f"--dependency=afterok:{':'.join(ids)}", "--kill-on-invalid-dep=yes"] if ids else []
    return ["sbatch", "--parsable", *after, path]


def build_script(command: Command) -> str:
    stage = command.stage
    launch, slurm = stage.launch, stage.launch.slurm or SlurmOptions()
    given = slurm.gpus_per_node
    if launch.processes == "auto" and not given:
        what = "launch.processes is auto, and the devices here say nothing of the cluster's; --slurm needs a number "
        raise RecipeError(f"{what}there or in launch.slurm.gpus_per_node", where=stage.where("launch.processes"))
    processes = given or 1 if launch.processes == "auto" else launch.processes
    wanted = 0 if launch.device == "cpu" else processes  # one for each process unless it trains on the CPU
    if given is not None and 0 < given < wanted:
        what = f"launch.slurm.gpus_per_node is {given}, but launch.processes is {wanted}, one a GPU; make them equal"
        raise RecipeError(what, where=stage.where("launch.slurm.gpus_per_node"))
    gpus = wanted if given is None else given
    run = RunDir(Path(stage.run_dir))
    seconds = read_time(slurm.time) if slurm.time else 0
    if seconds and seconds <= slurm.signal_seconds + 60:  # Slurm signals up to 60 s early
        what = f"launch.slurm.time is {slurm.time}, and launch.slurm.signal_seconds stops the job "
        what += f"{slurm.signal_seconds} to 60 more seconds before that; raise the one or lower the other"
        raise RecipeError(what, where=stage.where("launch.slurm.time"))
    if problem := check_batch(stage, launch.nodes * processes):
        raise RecipeError(problem)
    cpus = slurm.cpus_per_process * processes
    options = {
        "job-name": f"{stage.recipe_name}-{stage.name}", "nodes": launch.nodes, "ntasks-per-node": 1,
        "cpus-per-task": cpus, "gpus-per-node": gpus or None, "mem": slurm.memory,
        **{name: getattr(slurm, name) for name in ("time", "partition", "account", "qos", "constraint")},
        **slurm.options, "output": f"{str(run.launch).replace('%', '%%')}/slurm-%j.log", "open-mode": "append",
        "requeue": "", "signal": f"B:USR1@{slurm.signal_seconds}"}  # fmt: skip
    directives = [f"#SBATCH --{name}{quote(value)}" for name, value in options.items() if value is not None]
    script = Path(__file__).with_name("job.sh.jinja").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    return environment.from_string(script).render(
        directives="\n".join(directives), directory=shlex.quote(os.getcwd()), run=shlex.quote(str(run.path)),
        manifest=MANIFEST, several_nodes=launch.nodes > 1, max_requeues=slurm.max_requeues, cpus=cpus,
        command=shlex.join(command.argv()))  # fmt: skip


def read_time(text: str) -> int:
    """Read the seconds of M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; 0 means no limit."""
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days or len(parts) == 3:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, minutes, seconds = 0, parts[0], sum(parts[1:])
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def quote(value: object) -> str:
    """Write `=value` as sbatch reads a directive: quotes keep blanks together, a backslash takes one character as is.
    sbatch does not read a backslash inside quotes as a shell does, so that no character is both."""
    text = str(value)
    if not text:
        return ""
    if not text.isprintable():
        raise RunError(f"{text!r} cannot stand in a batch script; choose another directory with --out")
    if re.fullmatch(r"[\w.,:@%+=/-]+", text, flags=re.ASCII):
        return f"={text}"
    parts = (part for part in re.split(r"([\"'\\])", text) if part)
    return "=" + "".join(f"\\{part}" if part in "\"'\\" else f'"{part}"' for part in parts)
