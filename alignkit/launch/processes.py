"""The processes of a job as who started them sees them: started so that none outlives us, looked at and killed.

Linux gives every guarantee; elsewhere a worker that finds its parent gone ends itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

from alignkit.errors import SUPERVISED
from alignkit.runs.stop import SIGNALS

_GONE_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1


def start(
    argv: Sequence[str], environment: Mapping[str, str], *, output: int, log: IO[str], deaf: bool
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own that the kernel kills when this one dies.

    Its stdout is the file descriptor `output`, its stderr goes to `log`. A `deaf` one does not hear stop signals: a
    scheduler sends them to every process of a job, and torchrun would end those that are still saving.
    """
    parent = os.getpid()
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def prepare() -> None:
        if deaf:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        if libc is not None:
            # A worker itself ends softly instead, as it finds its supervisor gone: see `heartbeat.attach`.
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if deaf else 0)
            if os.getppid() != parent:
                os._exit(1)

    return subprocess.Popen(
        argv, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=log, start_new_session=True,
        preexec_fn=prepare,
    )  # fmt: skip


def is_alive(pid: int, *, child_of: int) -> bool:
    """Tell whether a process still runs; another one that got its number later does not count."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and child_of in (process.ppid(), pid)
    except psutil.Error:
        return False


def is_stopped(pid: int) -> bool:
    """Tell whether somebody stopped a process, with SIGSTOP or a debugger."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.Error:
        return False


def death_of(pid: int) -> int | None:
    """Read the wait status of a process that has ended and whose parent has not asked yet; None when unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[-1]) if fields[0] == "Z" else None


def marked(job_root: Path) -> list[psutil.Process]:
    """List the living processes of a job, by the directory in their environment: `job_root` or one below it."""
    found = []
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(SUPERVISED)
            if mark and Path(mark).is_relative_to(job_root) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):  # another user's, or gone meanwhile
            continue
    return found


def kill_all(pids: Iterable[int], job_root: Path) -> None:
    """Kill these processes, all they started, and all that carry the job's mark, and wait until they are gone."""
    doomed: dict[int, psutil.Process] = {}
    for _ in range(3):  # what was being started while we looked shows at the next look
        family = marked(job_root)
        for pid in pids:
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                family += [process, *process.children(recursive=True)]
        fresh = [process for process in family if process.pid not in (*doomed, os.getpid())]
        if not fresh and doomed:
            break
        for process in fresh:
            doomed[process.pid] = process
            with suppress(psutil.Error):
                process.kill()
    psutil.wait_procs(list(doomed.values()), timeout=_GONE_SECONDS)
