"""Run a stage in this process: what can be refused at once, then run directory and lock around the method's `run`.

It deliberately starts no process, knows no method's details, and nothing of other processes.
"""

from __future__ import annotations

import gc
import importlib
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from alignkit.data import DataReport, Rejects, read_rows
from alignkit.data.sources import Located, locate
from alignkit.errors import DataError, ModelError, Problem, RunError
from alignkit.models.files import find_model_dir, inspect_model_dir
from alignkit.preflight.check import check_trackers
from alignkit.preflight.versions import require_versions
from alignkit.recipe import Stage
from alignkit.recipe.schema import DataSource, RmOptions
from alignkit.runs.layout import open_run, refuse_foreign

if TYPE_CHECKING:
    from alignkit.train.built import Result

# Files up to this size are read and checked in half a second, before the libraries load in ten; larger ones are
# checked only when they are tokenised.
_READ_AHEAD_BYTES = 8 << 20


def check_first(stage: Stage, *, start_comes: bool = False) -> None:
    """Refuse what can be refused within a second, before a library or a process is loaded for it.

    `start_comes` says that what the stage starts from will be trained before it. Raises UsageError of each kind, and
    EnvironmentProblem.
    """
    if not start_comes:
        _require_start(stage)
        _inspect_weights(stage)
    refuse_foreign(Path(stage.run_dir))
    _read_ahead(stage)
    require_versions()
    check_trackers(stage)


def train_here(stage: Stage, *, force: bool, allow_change: tuple[str, ...] = ()) -> Result:
    """Check, open and lock the run directory, and train in this process.

    Raises what `fit` raises, and RunError when another process holds the directory.
    """
    check_first(stage)
    run, lock = open_run(Path(stage.run_dir), force=force)
    try:
        return train_in(stage, run.path, allow_change=allow_change)
    finally:
        lock.release()
        remove_if_empty(run.path)


def train_in(stage: Stage, run_dir: Path, *, allow_change: tuple[str, ...]) -> Result:
    """Train in this process, in a run directory that somebody holds for it."""
    method = importlib.import_module(f"alignkit.train.{stage.method}")
    gc.enable()
    gc.freeze()  # what the libraries made stays for good: never look through it again
    with _tensorboard_in(run_dir):
        result: Result = method.run(stage, run_dir, allow_change=allow_change)
    return result


def remove_if_empty(directory: Path) -> None:
    """Leave nothing behind of a stage that was refused before it began."""
    if {entry.name for entry in directory.iterdir()} <= {".lock", "cache"}:
        shutil.rmtree(directory, ignore_errors=True)


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


def _require_start(stage: Stage) -> None:
    """Raise RunError when the stage that this one starts from has not been trained."""
    if stage.start_stage is None or stage.start_dir is None or Path(stage.start_dir).is_dir():
        return
    recipe = shlex.quote(stage.recipe_path)
    raise RunError(
        f"{stage.name} starts from {stage.start_stage}, which has not been trained to its end; "
        f"train --stage {stage.start_stage} of {recipe} first, or name another start_from",
        where=stage.where(f"{stage.name}.start_from"),
    )


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


def _read_ahead(stage: Stage) -> None:
    """Find missing files, and bad rows of small ones, while nothing heavy is loaded.

    Raises DataError as `read_rows` does; a file that cannot be found is named with its place in the recipe.
    """
    options = stage.options
    located: list[Located] = []
    problems: list[Problem] = []
    groups = [options.data, *([options.eval] if isinstance(options.eval, list) else [])]
    if isinstance(options, RmOptions) and options.normalize_data:
        located += _locate(stage, options.normalize_data, "normalize_data", problems)
    for sources, key in zip(groups, ("data", "eval"), strict=False):
        located += _locate(stage, sources, key, problems)
    if problems:
        raise DataError(problems)
    if _local_bytes(located) <= _READ_AHEAD_BYTES:
        for sources in groups:
            for _ in read_rows(stage, sources, report=DataReport(), rejects=Rejects()):
                pass


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
