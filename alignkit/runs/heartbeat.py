"""Signs of life of the processes of a job, as small files that whoever started them reads.

`rank-N.beat` is rewritten about once a second and says how far the main thread has come; `rank-N.end` says how the
process ended. Without `start` nothing is written.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# The end record's room is taken when the process begins, so that a full disk cannot keep it from saying so.
_END_BYTES = 1 << 14
_NAME = re.compile(r"rank-(\d+)\.(?:beat|end)")


@dataclass(frozen=True)
class Beat:
    """The newest sign of life of one process."""

    rank: int
    pid: int
    host: str
    count: int  # beats so far: stands still in a frozen process
    phase: str
    step: int | None
    idle_seconds: float  # since the main thread was last seen


@dataclass(frozen=True)
class End:
    """How a process ended, in its own words."""

    rank: int
    exit_code: int
    problems: tuple[str, ...]
    unexpected: bool  # not a condition a user can act on: a bug, or the loss of a peer
    shared: bool  # another process has the same to say, and it happened there
    seconds: float  # of its host's clock, since the epoch


class _Heart:
    """What this process writes; one of it, or none."""

    def __init__(self, directory: Path, rank: int, interval_seconds: float, each: Callable[[], None] | None) -> None:
        self._directory, self._rank, self._interval = directory, rank, interval_seconds
        self._each = each
        self._count, self._phase, self._step = 0, "starting", None  # type: tuple[int, str, int | None]
        self._seen = time.monotonic()
        self._stop = threading.Event()
        self._host = socket.gethostname()
        with (directory / f"rank-{rank}.end").open("wb") as file:
            file.write(b" " * _END_BYTES)
        self._write()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def pulse(self, phase: str, step: int | None) -> None:
        self._phase, self._step, self._seen = phase, step, time.monotonic()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=2)

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._write()
            if self._each is not None:
                self._each()

    def _write(self) -> None:
        self._count += 1
        beat = Beat(
            self._rank, os.getpid(), self._host, self._count, self._phase, self._step,
            round(time.monotonic() - self._seen, 1),
        )  # fmt: skip
        path = self._directory / f"rank-{self._rank}.beat"
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            temporary.write_text(json.dumps(asdict(beat)))  # not synced: a busy disk would look like a frozen process
            os.replace(temporary, path)
        except OSError:
            # A full disk: a new time is a sign of life too. Where even that fails, silence is all there is.
            with suppress(OSError):
                os.utime(path)


_heart: _Heart | None = None


def start(directory: Path, rank: int, *, interval_seconds: float = 1.0, each: Callable[[], None] | None = None) -> None:
    """Begin to write signs of life of this process; `each` is called in the writing thread after every beat."""
    global _heart
    _heart = _Heart(directory, rank, interval_seconds, each)


def pulse(phase: str, step: int | None = None) -> None:
    """Tell that the main thread got here: what it does now, and at which optimizer step. Costs nothing."""
    if _heart is not None:
        _heart.pulse(phase, step)


def stop() -> None:
    """End the signs of life, if there are any."""
    global _heart
    if _heart is not None:
        _heart.stop()
    _heart = None


def write_end(
    directory: Path,
    rank: int,
    exit_code: int,
    problems: Sequence[str] = (),
    *,
    unexpected: bool = False,
    shared: bool = False,
) -> None:
    """Write how this process ends, into the room that `start` has taken."""
    kept = list(problems)
    record = {
        "rank": rank, "exit_code": exit_code, "unexpected": unexpected, "shared": shared, "seconds": time.time()
    }  # fmt: skip
    while len(data := json.dumps({**record, "problems": kept}).encode()) > _END_BYTES:
        kept = kept[: len(kept) // 2] if len(kept) > 1 else [kept[0][: len(kept[0]) // 2]]
    descriptor = os.open(directory / f"rank-{rank}.end", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.pwrite(descriptor, data.ljust(_END_BYTES), 0)
        os.fsync(descriptor)
    except OSError:  # then this process looks killed, which is the next best to say
        pass
    finally:
        os.close(descriptor)


def read_beats(directory: Path) -> dict[int, Beat]:
    """Read the newest sign of life of each process that has given one."""
    return {rank: Beat(**data) for rank, data in _read_all(directory, "beat").items()}


def read_ends(directory: Path) -> dict[int, End]:
    """Read how each process ended that said so."""
    return {
        rank: End(**{**data, "problems": tuple(data["problems"])}) for rank, data in _read_all(directory, "end").items()
    }


def beat_time(directory: Path, rank: int) -> int:
    """Take a number that changes whenever a process writes a sign of life, even on a full disk."""
    try:
        return (directory / f"rank-{rank}.beat").stat().st_mtime_ns
    except OSError:
        return 0


def _read_all(directory: Path, kind: str) -> dict[int, dict[str, Any]]:
    found = {}
    for path in directory.glob(f"rank-*.{kind}"):
        match = _NAME.fullmatch(path.name)
        try:
            text = path.read_text(encoding="utf-8").strip()
            data = json.loads(text) if text else None
        except (OSError, ValueError):  # being written: the next look finds it whole
            continue
        if match and isinstance(data, dict):
            found[int(match[1])] = data
    return found
