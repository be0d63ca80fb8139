"""One process among several: it joins a job that accelerate, torchrun or our supervisor started.

It starts no process. Under our supervisor it gives signs of life, writes its end down and leaves the talking to it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from alignkit.errors import SUPERVISED
from alignkit.runs import heartbeat

SUPERVISOR = "ALIGNKIT_SUPERVISOR"  # its process id: without it the worker ends
INTERVAL = "ALIGNKIT_BEAT_SECONDS"
# The launcher's own process is kept deaf to these; a worker hears them again when it can end in order.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_LAST_WORDS_SECONDS = 30.0


def is_worker(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether this process was started as one of a job's."""
    return is_supervised(environment) or "RANK" in environment or environment.get("WORLD_SIZE", "1") != "1"


def is_supervised(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether our supervisor started this process and speaks for it."""
    return SUPERVISED in environment


def rank() -> int:
    """Return this process's number in the job, 0 outside one."""
    return int(os.environ.get("RANK", "0"))


def attach() -> None:
    """Prepare a supervised worker: write to its own log, give signs of life, end with the supervisor.

    Stop signals wait until `runs.stop.stop_between_steps` hears them: one that came before would kill this process, and
    a thread started now never takes one.

    Only what rank 0 prints reaches the terminal; what libraries write to file descriptor 2 goes to `rank-N.log`.
    """
    directory = Path(os.environ[SUPERVISED])
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    log = os.open(directory / f"rank-{rank()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    if rank() == 0:  # the supervisor gave its own stderr as our stdout
        terminal = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
        os.dup2(log, 2)
        sys.stderr = terminal
    else:
        os.dup2(log, 2)
        os.dup2(log, 1)
    os.close(log)
    heartbeat.start(
        directory,
        rank(),
        interval_seconds=float(os.environ.get(INTERVAL, "1")),
        each=_Orphan(os.getppid(), int(os.environ[SUPERVISOR])).look,
    )


class _Orphan:
    """Ends this process when its parent or the supervisor is gone: first as SIGTERM would, then at once."""

    def __init__(self, parent: int, supervisor: int) -> None:
        self._parent, self._supervisor = parent, supervisor
        self._since: float | None = None

    def look(self) -> None:
        if self._since is None and self._is_alone():
            self._since = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)
        elif self._since is not None and time.monotonic() - self._since > _LAST_WORDS_SECONDS:
            os._exit(143)

    def _is_alone(self) -> bool:
        if os.getppid() != self._parent:
            return True
        try:
            os.kill(self._supervisor, 0)
        except OSError:
            return True
        return False


def leave(exit_code: int, problems: Sequence[str] = (), *, unexpected: bool = False, shared: bool = False) -> int:
    """Write how this worker ends; return the exit code its process should have.

    A stop that all ranks agreed on leaves with 0: for any other code torchrun would kill those still saving.
    """
    heartbeat.pulse("ended")
    heartbeat.write_end(Path(os.environ[SUPERVISED]), rank(), exit_code, problems, unexpected=unexpected, shared=shared)
    heartbeat.stop()
    return 0 if exit_code in (130, 143) else exit_code
