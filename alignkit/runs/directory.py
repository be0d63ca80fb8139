"""The run directory: where each file of a run lives, who may write to it, and whether it may go on.

It deliberately knows nothing of training: it opens, locks and compares, and hands out paths.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from alignkit import console
from alignkit.errors import RunError
from alignkit.recipe.fields import method_fields
from alignkit.runs.files import disk_failures, open_own, read_json, read_record, write_json
from alignkit.runs.manifest import describe

CARD = "README.md"  # the model card, beside the weights


@dataclass(frozen=True)
class RunDir:
    """Paths of one run; `path` is absolute."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def stage(self) -> Path:
        return self.path / "stage.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def rejects(self) -> Path:
        return self.path / "rejects.jsonl"

    @property
    def warnings(self) -> Path:
        """Every warning that was said while the run was trained, with its time."""
        return self.path / "warnings.jsonl"

    @property
    def preview(self) -> Path:
        """A few rows as the trainer saw them: tokens, and which of them are learnt."""
        return self.path / "preview.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def base(self) -> Path:
        """A base this run had to make itself (built-in, scratch, or merged); adapters point to it."""
        return self.path / "base"

    @property
    def cache(self) -> Path:
        """Tokenised rows; deleted when the run is finished."""
        return self.path / "cache"

    @property
    def launch(self) -> Path:
        """How the run was started: launcher configuration, batch script, what the processes left."""
        return self.path / "launch"

    @property
    def probe(self) -> Path:
        return self.path / "probe.json"

    @property
    def evaluation(self) -> Path:
        """What `alignkit eval` has measured."""
        return self.path / "eval.json"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def error_log(self) -> Path:
        return self.path / "error.log"

    def is_finished(self) -> bool:
        """Tell whether the run ended well, whatever has become of its files since; a torn result.json does not."""
        return read_record(self.result).get("status") == "finished"


class RunLock:
    """An exclusive hold on a run directory; the kernel drops it when the process dies, however it dies."""

    def __init__(self, run: RunDir) -> None:
        """Take the lock. Raises RunError naming the holder when another process has it."""
        self._path = run.path / ".lock"
        self._file: IO[str] = os.fdopen(
            open_own(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT), "a+", encoding="utf-8"
        )
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = self._path.read_text(encoding="utf-8").strip() or "another process"
            self._file.close()
            raise RunError(
                f"in use by {holder}; wait for it, or give this run its own directory with --out, a whole recipe with "
                "--set name=NAME",
                where=str(run.path),
            ) from error
        if not self.is_current():
            self._file.close()
            raise RunError("in use by another process, which has just ended; try again", where=str(run.path))
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Let another process have the directory."""
        self._file.close()

    def is_current(self) -> bool:
        """Tell whether this is still the directory's lock: the directory may have been removed or moved."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False


def open_run(path: Path, *, force: bool) -> tuple[RunDir, RunLock]:
    """Create or reuse a run directory and lock it.

    With `force` an existing run is moved aside at once, as `set_aside` does. Raises RunError when the directory holds
    something that is not a run of ours, or is in use; DiskError when it cannot be made.
    """
    run = RunDir(path.expanduser().absolute())
    refuse_foreign(run.path)
    with disk_failures(run.path, "the run directory"):
        for directory in (run.path.parent, run.path):  # the recipe's own too: its page shows what the runs' pages do
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        _refuse_links(run.path)
        lock = RunLock(run)
    return run, set_aside(run, lock) if force else lock


def _refuse_links(directory: Path) -> None:
    """Raise RunError for a symbolic link anywhere in a run: what it points to would be written, emptied or renamed."""
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            if os.path.islink(path := os.path.join(folder, name)):
                raise RunError(
                    f"is a link to {os.readlink(path)}; a run's files lie in its directory: put what it points to in "
                    "its place, or remove it",
                    where=path,
                )


def set_aside(run: RunDir, lock: RunLock) -> RunLock:
    """Move a run that has begun to `<name>.old-<time>`, never delete it; return the lock of the new directory.

    Whoever still writes into the run by its path would write into the new one: end those processes first. Raises
    RunError when another process takes the new directory first.
    """
    if not run.stage.exists():
        return lock
    aside = run.path.with_name(f"{run.path.name}.old-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    with disk_failures(run.path, "the run directory"):
        os.replace(run.path, aside)
        console.note(f"{run.path.name}: the earlier run is kept as {aside}")
        lock.release()
        run.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        return RunLock(run)


def refuse_foreign(path: Path) -> None:
    """Raise RunError unless the directory is absent, empty, or a run."""
    path = path.expanduser().absolute()
    if path == path.parent or path == Path.home():
        raise RunError("is no place for a run; name a directory of its own with --out", where=str(path))
    if not path.exists():
        return
    if not path.is_dir():
        raise RunError("is a file; a run needs a directory", where=str(path))
    ours = {".lock", "stage.json", "error.log", "launch"}
    content = {entry.name for entry in path.iterdir()}
    if content and not content & ours:
        raise RunError(
            f"is not empty and holds no run (found {', '.join(sorted(content)[:3])}); "
            "choose another directory with --out",
            where=str(path),
        )


def list_changes(run: RunDir, current: Mapping[str, Any], *, allow_change: Sequence[str] = ()) -> dict[str, str]:
    """Compare the fingerprint in stage.json with the current one; return the changes that were not allowed.

    Each key has its text, "key: before -> now".
    """
    changes = _compare(run, current)
    return {key: text for key, text in changes.items() if not _is_allowed(key, allow_change)}


def compare_fingerprints(run: RunDir, current: Mapping[str, Any], *, allow_change: Sequence[str] = ()) -> list[str]:
    """Compare the fingerprint in stage.json with the current one; return the changes, all of which are allowed.

    Every changed key is named with both values. Raises RunError unless each of them is in `allow_change`.
    """
    if refused := list_changes(run, current, allow_change=allow_change):
        raise RunError(
            "this run was started with other settings:\n  "
            + "\n  ".join(refused.values())
            + "\nchange them back, use --out for a new run, --force to move this one aside and start over, "
            "or --allow-change KEY to go on with the new value",
            where=str(run.path),
        )
    return list(_compare(run, current).values())


def _compare(run: RunDir, current: Mapping[str, Any]) -> dict[str, str]:
    if not run.stage.exists():
        return {}
    before = read_json(run.stage).get("fingerprint", {})
    now = json.loads(json.dumps(dict(current), default=str))
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    fields = method_fields(str(now.get("method")))
    defaults = {key: fields.get(key.rpartition(".")[2], {}).get("default") for key in changed}
    return {
        key: f"{key}: {_show(before.get(key), defaults[key])} -> {_show(now.get(key), defaults[key])}"
        for key in changed
    }  # fmt: skip


def _show(value: Any, default: Any) -> str:
    """Return a value as the user wrote it; a fingerprint leaves out what is TRL's own default."""
    if value is not None:
        return json.dumps(value)
    return "(default)" if default is None else f"{json.dumps(default)} (default)"


def _is_allowed(key: str, allowed: Sequence[str]) -> bool:
    return any(key == name or key.endswith(f".{name}") for name in allowed)


def copy_recipe(run: RunDir, source: Path) -> None:
    """Keep the recipe as it was given; a secret in a comment stays behind."""
    if not run.recipe.exists() and source.is_file():
        text = source.read_bytes().decode("utf-8", "surrogateescape")
        run.recipe.write_bytes(console.redact(text).encode("utf-8", "surrogateescape"))


def write_result(run: RunDir, result: Mapping[str, Any], products: Sequence[Path]) -> None:
    """Write result.json, which makes a run count as finished; it names the files that others use, with checksums.

    `products` are those files, and directories of them. The model card is none of them: it is written later and again.
    """
    files = [path for product in products for path in (product.rglob("*") if product.is_dir() else [product])]
    kept = [path for path in files if path.is_file() and path.name != CARD]
    write_json(run.result, {**result, "files": describe(run.path, kept)})


@dataclass
class Result:
    """How a stage ended; result.json holds the same.

    `tokens` counts all sittings of the run, and so does `wall_seconds` where it trains, as far as they were saved;
    `tokens_per_second` and the peak are of the last one.
    """

    stage: str
    status: str
    step: int  # optimizer steps; rows written, where a stage makes data
    model_dir: str  # empty where a stage makes data
    metrics: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    wall_seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def read_result(path: Path) -> Result:
    """Read result.json; raises RunError where a field is missing or of another type."""
    data = read_json(path)
    if missing := [key for key in Result.__dataclass_fields__ if data.get(key) is None]:
        raise RunError(f"has no {missing[0]}; put the file back as it was, or start over with --force", where=str(path))
    return Result(**{key: data[key] for key in Result.__dataclass_fields__})
