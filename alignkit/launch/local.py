"""Run a stage in this process: what can be refused at once, then run directory and lock around the method's `run`.

It deliberately starts no process and knows no method's details. Of other processes it knows only those that an
earlier command has left in the run directory.
"""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from alignkit import console
from alignkit.data import DataReport, Rejects, read_rows
from alignkit.data.sources import Located, locate
from alignkit.errors import DataError, DiskError, ModelError, Problem
from alignkit.launch import processes
from alignkit.models.files import find_model_dir, inspect_model_dir
from alignkit.preflight.check import check_packages
from alignkit.preflight.feedback import require_feedback
from alignkit.preflight.lineage import list_data, require_made, without_unmade
from alignkit.preflight.versions import require_versions
from alignkit.recipe import Stage
from alignkit.recipe.schema import FEEDBACK, DataSource
from alignkit.rewards.kinds import check_rewards
from alignkit.runs.directory import RunDir, open_run, refuse_foreign, set_aside
from alignkit.runs.record import record_warnings

if TYPE_CHECKING:
    from alignkit.runs.directory import Result

# Files up to this size are read and checked in half a second, before the libraries load in ten; larger ones are
# checked only when they are tokenised.
_READ_AHEAD_BYTES = 8 << 20
_STRAY_SECONDS = 45.0


def check_first(stage: Stage, *, coming: Collection[str] = ()) -> None:
    """Refuse what can be refused within a second, before a library or a process is loaded for it.

    `coming` are stages of the recipe that will be run before it. Raises UsageError of each kind, and
    EnvironmentProblem.
    """
    require_made(stage, coming=coming)
    check_rewards(stage, coming=coming)
    require_feedback(stage, coming=coming)
    if stage.start_stage is None or stage.start_stage not in coming:
        _inspect_weights(stage)
    refuse_foreign(Path(stage.run_dir))
    _read_ahead(stage, coming)
    require_versions()
    check_packages(stage)


def train_here(stage: Stage, *, force: bool, allow_change: tuple[str, ...] = ()) -> Result:
    """Check, hold the run directory, and train in this process.

    Raises what `fit` raises, and RunError when another process holds the directory.
    """
    check_first(stage)
    with hold_run(Path(stage.run_dir), force=force) as run:
        return train_in(stage, run.path, allow_change=allow_change)


@contextmanager
def hold_run(path: Path, *, force: bool, check: Callable[[], None] = lambda: None) -> Iterator[RunDir]:
    """Have a run directory for one command alone: locked, and with nobody in it whose supervisor was killed.

    With `force` an earlier run is moved aside, but only when those processes have ended: they know the run by its path,
    and their last save would land in the new one. `check` is called while they are waited for, and may raise.
    """
    run, lock = open_run(path, force=False)
    try:
        _end_strays(run, check)
        if force:
            lock = set_aside(run, lock)
    except BaseException:
        lock.release()
        raise
    try:
        yield run
        if not lock.is_current():
            raise _gone(run)
    except Exception as error:
        if lock.is_current():
            raise
        raise _gone(run) from error  # whatever else went wrong began there
    finally:
        if lock.is_current():
            _remove_if_empty(run.path)  # while it is ours: another command may lock it as soon as we let go
        lock.release()


def _gone(run: RunDir) -> DiskError:
    return DiskError(
        f"{run.path}: the run directory was moved or deleted while the run went on; move it back, and the same command "
        "goes on from what was saved"
    )


def train_in(stage: Stage, run_dir: Path, *, allow_change: tuple[str, ...]) -> Result:
    """Train in this process, in a run directory that somebody holds for it."""
    room = "feedback" if stage.method in FEEDBACK else "train"
    method = importlib.import_module(f"alignkit.{room}.{stage.method}")
    gc.enable()
    gc.freeze()  # what the libraries made stays for good: never look through it again
    with _tensorboard_in(run_dir), record_warnings(RunDir(run_dir).warnings):
        result: Result = method.run(stage, run_dir, allow_change=allow_change)
    return result


def _remove_if_empty(directory: Path) -> None:
    """Leave nothing behind of a stage that was refused before it began."""
    if {entry.name for entry in directory.iterdir()} <= {".lock", "cache", "warnings.jsonl"}:
        shutil.rmtree(directory, ignore_errors=True)


def _end_strays(run: RunDir, check: Callable[[], None]) -> None:
    """Wait for processes of an earlier command that was killed: they save and end by themselves; then kill the rest."""
    root = run.launch
    deadline = time.monotonic() + _STRAY_SECONDS
    told = False
    while strays := processes.marked(root):
        if not told:
            console.note(f"waiting for {len(strays)} processes of an earlier command in {run.path} to end")
            told = True
        if time.monotonic() > deadline:
            processes.kill_all([stray.pid for stray in strays], root)
            return
        check()
        time.sleep(0.2)


@contextmanager
def _tensorboard_in(directory: Path) -> Iterator[None]:
    """Let TensorBoard write below the run, unless the user says where.

    Its own default is a directory named after this host, inside the checkpoints.
    """
    given = "TENSORBOARD_LOGGING_DIR" in os.environ
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(directory / "tensorboard"))
    try:
        yield
    finally:
        if not given:
            del os.environ["TENSORBOARD_LOGGING_DIR"]


def _inspect_weights(stage: Stage) -> None:
    """Raise ModelError for local weights that loading would refuse: pickles, remote code, damaged files."""
    source = stage.start_dir or stage.model.path
    directory = None if stage.model.init == "scratch" and not stage.start_dir else find_model_dir(source)
    if directory is None:
        return
    files = inspect_model_dir(directory, trust_code=stage.trust_code)
    if files.reward and stage.method != "rm":
        raise ModelError(
            f"{directory} is a reward model; {stage.method} needs a policy to start from",
            where=stage.where(f"{stage.name}.start_from" if stage.start_dir else "model.path"),
        )


def _read_ahead(stage: Stage, coming: Collection[str]) -> None:
    """Find missing files, and bad rows of small ones, while nothing heavy is loaded.

    Raises DataError as `read_rows` does.
    """
    groups, located = locate_rows(stage, coming=coming)
    if _local_bytes(located) <= _READ_AHEAD_BYTES:
        for key in ("data", "eval"):
            for _ in read_rows(stage, groups[key], report=DataReport(), rejects=Rejects()) if key in groups else ():
                pass


def locate_rows(stage: Stage, *, coming: Collection[str] = ()) -> tuple[dict[str, list[DataSource]], list[Located]]:
    """Find the sources of a stage, by key and all of them, without reading any.

    Raises DataError for files and splits that are not there, with their place in the recipe.
    """
    located: list[Located] = []
    problems: list[Problem] = []
    groups: dict[str, list[DataSource]] = {}
    for key, source in list_data(stage):
        if without_unmade([source], stage, coming=coming):
            groups.setdefault(key, []).append(source)
    for key, sources in groups.items():
        located += _locate(stage, sources, key, problems)
    if problems:
        raise DataError(problems)
    return groups, located


def _locate(stage: Stage, sources: Sequence[DataSource], key: str, problems: list[Problem]) -> list[Located]:
    """Find the sources of a key, adding what is wrong to `problems` with its place in the recipe."""
    try:
        return locate(sources)
    except DataError as error:
        key = f"{stage.name}.{key}"
        problems += [Problem(f"{key}: {problem}", stage.where(key)) for problem in error.problems]
        return []


def _local_bytes(located: list[Located]) -> float:
    """Return the size of all files; rows that are not in files (hub, built-in) are not read ahead."""
    sizes = [sum(path.stat().st_size for path in place.files) if place.files else float("inf") for place in located]
    return sum(sizes)
