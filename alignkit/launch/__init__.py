"""Where a stage runs: in this process, in several that are started and watched, or in one that a launcher started."""

import gc
import importlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from alignkit import console
from alignkit.errors import SUPERVISED, DiskError, EnvironmentProblem
from alignkit.launch.placement import Command, place
from alignkit.launch.supervise import kill_all, list_marked
from alignkit.preflight.requirements import require_ready
from alignkit.recipe import Stage
from alignkit.recipe.methods import FEEDBACK, ROOMS
from alignkit.runs.directory import Result, RunDir, compare_fingerprints, open_run, set_aside
from alignkit.runs.record import began, record_warnings
from alignkit.runs.signals import is_worker
from alignkit.train.fingerprint import fingerprint_stage, unread

_STRAY_SECONDS = 45.0


def launch_stage(stage: Stage, command: Command | None = None, *, force: bool = False, retries: int = 0) -> Result:
    """Train a stage in its run directory and return how it ended; `command` starts it again in other processes."""
    command = command or Command(stage)
    makes_rows = stage.method in FEEDBACK
    if makes_rows:
        if given := [key for key in ("processes", "nodes", "strategy") if stage.origins[f"launch.{key}"] != "default"]:
            console.note(f"{stage.name}: makes rows in one process; launch.{', launch.'.join(given)} is for training")
        if retries:
            console.note(f"{stage.name}: --retries is for training; the same command goes on where this stage stopped")
    if stage.model.path.startswith("builtin:"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # its matrices are so small that threads only wait for each other
    if is_worker():
        from alignkit.launch.accelerate import join_launcher

        if makes_rows:
            raise EnvironmentProblem(f"a {stage.method} stage runs in one process; start it without a launcher")
        join_launcher(stage, retries=retries)
        if SUPERVISED in os.environ or os.environ.get("RANK", "0") != "0":  # somebody has checked and locked the run
            return _train(stage, command)
    elif not makes_rows:
        placement = place(stage, command.node_rank)
        if placement.world_size == 1 and placement.strategy != "ddp":
            console.warn(f"launch.strategy {placement.strategy} has no effect with one process; set launch.processes")
        if placement.world_size > 1 or retries:
            from alignkit.launch.job import Job

            return Job(command, placement, hold_run).run(force=force, retries=retries)
    require_ready(stage)
    with hold_run(command, force=force):
        return _train(stage, command)


def _train(stage: Stage, command: Command) -> Result:
    """Train in this process, in a run directory that somebody holds for it."""
    began[:] = [time.monotonic()]
    run = RunDir(Path(stage.run_dir))
    method = importlib.import_module(f"alignkit.{ROOMS.get(stage.method, 'train')}.{stage.method}")
    gc.enable()
    gc.freeze()  # what the libraries made stays for good: never look through it again
    # TensorBoard, unless the user says where, would make a directory of this host's name inside the checkpoints.
    given = "TENSORBOARD_LOGGING_DIR" in os.environ
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run.path / "tensorboard"))
    try:
        with record_warnings(run.warnings):
            result: Result = method.run(stage, run.path, allow_change=command.allow_change)
    finally:
        if not given:
            del os.environ["TENSORBOARD_LOGGING_DIR"]
    return result


@contextmanager
def hold_run(command: Command, *, force: bool, check: Callable[[], None] = lambda: None) -> Iterator[RunDir]:
    """Have a run directory for one command alone: locked, and with nobody in it whose supervisor was killed; `check` is
    called while those are waited for. Raises RunError for a run with other settings, unless `force` moves it aside."""
    stage = command.stage
    run, lock = open_run(Path(stage.run_dir), force=False)
    try:
        # Processes of an earlier command that was killed save and end by themselves; then the rest is killed.
        deadline, told = time.monotonic() + _STRAY_SECONDS, False
        while strays := list_marked(run.launch):
            if not told:
                console.note(f"waiting for {len(strays)} processes of an earlier command in {run.path} to end")
                told = True
            if time.monotonic() > deadline:
                kill_all([stray.pid for stray in strays], run.launch)
                break
            check()
            time.sleep(0.2)
        if force:
            lock = set_aside(run, lock)
    except BaseException:
        lock.close()
        raise
    what = "the run directory was moved or deleted meanwhile; move it back, and the same command goes on from there"
    gone = DiskError(f"{run.path}: {what}")
    try:
        if run.stage.is_file() and stage.method not in ROOMS:
            known = {**fingerprint_stage(stage), **unread(run)}
            compare_fingerprints(run, known, allow_change=command.allow_change)
        yield run
        if not lock.is_current():
            raise gone
    except Exception as error:
        if error is gone or lock.is_current():
            raise
        raise gone from error  # whatever else went wrong began there
    finally:
        # While it is ours: another command may lock it as soon as we let go. A stage refused before it began leaves
        # nothing behind.
        if lock.is_current() and {entry.name for entry in run.path.iterdir()} <= {".lock", "cache", "warnings.jsonl"}:
            shutil.rmtree(run.path, ignore_errors=True)
        lock.close()
