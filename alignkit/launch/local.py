"""Run a stage in this process: what can be refused at once, then run directory and lock around the method's `run`."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from alignkit import console
from alignkit.errors import DiskError
from alignkit.launch import processes
from alignkit.preflight.requirements import require_ready
from alignkit.recipe import Stage
from alignkit.recipe.schema import ROOMS
from alignkit.runs.directory import RunDir, compare_fingerprints, open_run, set_aside
from alignkit.runs.record import record_warnings
from alignkit.train.fingerprint import fingerprint_stage, unread

if TYPE_CHECKING:
    from alignkit.runs.directory import Result

_STRAY_SECONDS = 45.0


def train_here(stage: Stage, *, force: bool, allow_change: tuple[str, ...] = ()) -> Result:
    """Check, hold the run directory, and train in this process.

    Raises what `fit` raises, and RunError when another process holds the directory.
    """
    require_ready(stage)
    with hold_run(stage, force=force, allow_change=allow_change) as run:
        return train_in(stage, run.path, allow_change=allow_change)


def train_in(stage: Stage, run_dir: Path, *, allow_change: tuple[str, ...]) -> Result:
    """Train in this process, in a run directory that somebody holds for it."""
    run = RunDir(run_dir)
    method = importlib.import_module(f"alignkit.{ROOMS.get(stage.method, 'train')}.{stage.method}")
    gc.enable()
    gc.freeze()  # what the libraries made stays for good: never look through it again
    # TensorBoard writes below the run, unless the user says where: by itself it makes a directory of this host's name
    # inside the checkpoints.
    given = "TENSORBOARD_LOGGING_DIR" in os.environ
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run.path / "tensorboard"))
    try:
        with record_warnings(run.warnings):
            result: Result = method.run(stage, run.path, allow_change=allow_change)
    finally:
        if not given:
            del os.environ["TENSORBOARD_LOGGING_DIR"]
    return result


@contextmanager
def hold_run(
    stage: Stage, *, force: bool, allow_change: tuple[str, ...], check: Callable[[], None] = lambda: None
) -> Iterator[RunDir]:
    """Have a run directory for one command alone: locked, and with nobody in it whose supervisor was killed.

    With `force` an earlier run is moved aside, but only when those processes have ended: they know the run by its path,
    and their last save would land in the new one. `check` is called while they are waited for, and may raise. Raises
    RunError for a run with other settings or weights before anything loads; `fit` compares its rows, too.
    """
    run, lock = open_run(Path(stage.run_dir), force=False)
    try:
        _end_strays(run, check)
        if force:
            lock = set_aside(run, lock)
    except BaseException:
        lock.release()
        raise
    gone = DiskError(
        f"{run.path}: the run directory was moved or deleted while the run went on; move it back, and the same command "
        "goes on from what was saved"
    )
    try:
        if run.stage.is_file() and stage.method not in ROOMS:
            compare_fingerprints(run, {**fingerprint_stage(stage), **unread(run)}, allow_change=allow_change)
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
        lock.release()


def _end_strays(run: RunDir, check: Callable[[], None]) -> None:
    """Wait for processes of an earlier command that was killed: they save and end by themselves; then kill the rest."""
    deadline, told = time.monotonic() + _STRAY_SECONDS, False
    while strays := processes.marked(run.launch):
        if not told:
            console.note(f"waiting for {len(strays)} processes of an earlier command in {run.path} to end")
            told = True
        if time.monotonic() > deadline:
            processes.kill_all([stray.pid for stray in strays], run.launch)
            return
        check()
        time.sleep(0.2)
