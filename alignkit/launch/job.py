"""A stage in processes of its own: checked and locked here once, tried, watched, and tried again when that can help.

It loads no torch and trains nothing: the processes it starts are `alignkit` again, as workers.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from alignkit import console
from alignkit.errors import AlignKitError, EnvironmentProblem, Stopped, UsageError
from alignkit.launch import accelerate, rendezvous
from alignkit.launch.command import Command
from alignkit.launch.local import hold_run, refuse_changes
from alignkit.launch.placement import Placement, Precision, mixed_precision
from alignkit.launch.supervise import Job, StopRequest
from alignkit.launch.worker import STOP_SIGNALS
from alignkit.preflight.requirements import require_ready
from alignkit.recipe import Stage
from alignkit.runs import checkpoints
from alignkit.runs.directory import Result, RunDir, read_result
from alignkit.runs.files import disk_failures
from alignkit.runs.record import count_cores, record_warnings

# A process died or hung, was killed, was told to end while this one was not. Anything else would happen again.
RETRIED = frozenset({6, 137, 143})
_KEPT_ATTEMPTS = 5


def run_job(stage: Stage, command: Command, placement: Placement, *, force: bool, retries: int) -> Result:
    """Train a stage in processes of its own and return how it ended.

    Raises what a process reported, RankError for one that died or hung, Stopped; no process is left then.
    """
    require_ready(stage)
    _require_deepspeed(stage)
    run = RunDir(Path(stage.run_dir).expanduser().absolute())
    with _catch() as stop:
        if not placement.is_main:
            console.hush()  # node 0 speaks
            _try_until_done(stage, command, placement, run, stop, retries)
            return read_result(run.result)
        with hold_run(run.path, force=force, check=stop.check):
            refuse_changes(stage, run, command.allow_change)
            try:
                with record_warnings(run.warnings):
                    _try_until_done(stage, command, placement, run, stop, retries)
            except UsageError:
                if not run.stage.exists():
                    _clear(run.launch)
                raise
            return read_result(run.result)


def _try_until_done(
    stage: Stage, command: Command, placement: Placement, run: RunDir, stop: StopRequest, retries: int
) -> None:
    """Run tries until one ends well; raise what the last one ended of."""
    before: int | None = -1  # the newest sealed step when the try before had ended
    attempt = 0
    for number in range(retries + 1):
        try:
            _try(stage, command, placement, run, stop, after=attempt)
            return
        except AlignKitError as error:
            if error.exit_code not in RETRIED or stop.received or number == retries:
                raise
            newest = checkpoints.newest_step(run.checkpoints)
            if newest == before:
                text = f"{error}; no new checkpoint since the try before, so it is not started again"
                raise _with_text(error, text) from error
            before = newest
            attempt = rendezvous.current_attempt(run.launch)
            console.warn(f"{stage.name}: {error}; starting again ({number + 1} of {retries} retries)")


def _with_text(error: AlignKitError, text: str) -> AlignKitError:
    if isinstance(error, Stopped):
        return Stopped(text, exit_code=error.exit_code)
    copy = type(error)(text)
    copy.exit_code = error.exit_code
    return copy


def _try(stage: Stage, command: Command, placement: Placement, run: RunDir, stop: StopRequest, *, after: int) -> None:
    """Start the processes once and watch them to their end; the number of this try is above `after`."""
    launch_dir = run.launch
    precision = mixed_precision(stage, placement.device)
    several = placement.world_size > 1
    if placement.is_main:
        if several:
            placement = replace(placement, main_port=rendezvous.choose_port(stage, placement))
        if placement.nodes > 1:
            rendezvous.require_known(stage, str(placement.main_address))
        attempt = _prepare(launch_dir, stage, placement, precision)
    else:
        rendezvous.wait_for_main(
            stage, placement, look=lambda: rendezvous.current_attempt(launch_dir) > after, pause=stop.check
        )
        attempt = rendezvous.current_attempt(launch_dir)
        try:
            rendezvous.require_same_job(stage, launch_dir, placement)
        except UsageError as error:
            rendezvous.abort(_attempt_dir(launch_dir, attempt), placement, error.exit_code, (str(error),))
            raise
    directory = _attempt_dir(launch_dir, attempt)
    argv = command.argv()
    if several:
        config = launch_dir / accelerate.CONFIG
        seconds = stage.launch.timeout_seconds
        argv = accelerate.command_line(command, placement, precision, config, timeout_seconds=seconds)
        where = f" on each of {placement.nodes} nodes" if placement.nodes > 1 else ""
        console.note(
            f"{stage.name}: starting {placement.processes} processes{where} ({placement.strategy}, {placement.device})"
        )
    with disk_failures(run.path, "launch files"):
        rendezvous.arrive(directory, placement)
    job = Job(
        directory=directory,
        placement=placement,
        heartbeat_seconds=stage.launch.heartbeat_seconds,
        timeout_seconds=stage.launch.timeout_seconds,
        stop=stop,
        resume_hint=lambda: _describe_resume(run),
    )
    job.watch(argv, extra=_environment(stage, placement))


def _prepare(launch_dir: Path, stage: Stage, placement: Placement, precision: Precision) -> int:
    """Write, as node 0, what a new try needs; return its number."""
    with disk_failures(launch_dir.parent, "launch files"):
        launch_dir.mkdir(exist_ok=True)
        older = sorted(int(path.name.removeprefix("attempt-")) for path in launch_dir.glob("attempt-*"))
        for number in older[: -_KEPT_ATTEMPTS + 1]:
            shutil.rmtree(_attempt_dir(launch_dir, number), ignore_errors=True)
        attempt = max(older, default=0) + 1
        _attempt_dir(launch_dir, attempt).mkdir()
        if placement.world_size > 1:
            accelerate.write_configs(stage, placement, precision, launch_dir)
        rendezvous.announce(launch_dir, attempt, placement)
    return attempt


def _clear(launch_dir: Path) -> None:
    """Remove what tries have left, and nothing that was put there otherwise."""
    for path in launch_dir.glob("attempt-*"):
        shutil.rmtree(path, ignore_errors=True)
    for name in (accelerate.CONFIG, accelerate.DEEPSPEED_CONFIG, rendezvous.CURRENT):
        (launch_dir / name).unlink(missing_ok=True)
    with suppress(OSError):
        launch_dir.rmdir()


def _attempt_dir(launch_dir: Path, attempt: int) -> Path:
    return launch_dir / f"attempt-{attempt}"


def _environment(stage: Stage, placement: Placement) -> dict[str, str]:
    """Return what the processes get besides our own environment; what the user has set stays."""
    found = {}
    if placement.world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        found["OMP_NUM_THREADS"] = str(max(1, count_cores() // placement.processes))
    interface = rendezvous.network_interface(placement) if placement.world_size > 1 else None
    if interface is not None and "GLOO_SOCKET_IFNAME" not in os.environ:
        found["GLOO_SOCKET_IFNAME"] = interface
    return found


def _describe_resume(run: RunDir) -> str:
    step = checkpoints.newest_step(run.checkpoints)
    return (
        f"the same command goes on from step {step}"
        if step is not None
        else "nothing was saved yet; the same command starts again"
    )


def _require_deepspeed(stage: Stage) -> None:
    if accelerate.zero_stage(stage.launch.strategy) and importlib.util.find_spec("deepspeed") is None:
        raise EnvironmentProblem(
            f"{stage.where('launch.strategy')}: launch.strategy {stage.launch.strategy} needs DeepSpeed, which is not "
            "installed; `pip install 'deepspeed>=0.19,<0.20'`, or use fsdp"
        )


@contextmanager
def _catch() -> Iterator[StopRequest]:
    """Remember stop signals while the block runs; one that was ignored on purpose stays ignored."""
    request = StopRequest()
    wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, request.handle) for number in wanted}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
