"""Signals of a process: the stop signals and time limits that it heeds, and its signs of life, files that whoever
started it reads. The first stop signal is remembered and heard between two answers, or after a step."""

import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from alignkit import console
from alignkit.errors import SUPERVISED, Interrupt, Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# The end record's room is taken when the process begins, so that a full disk cannot keep it from saying so.
_END_BYTES = 1 << 14
SUPERVISOR = "ALIGNKIT_SUPERVISOR"  # its process id: without it the worker ends
INTERVAL = "ALIGNKIT_BEAT_SECONDS"
_LAST_WORDS_SECONDS = 30.0


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
    written_ns: int = 0  # when the file was, as its file system says: changes even on a full disk

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def place(self) -> str:
        return f"while {self.phase}" if self.step is None else f"in step {self.step} ({self.phase})"


@dataclass(frozen=True)
class End:
    """How a process ended, in its own words."""

    rank: int
    exit_code: int
    problems: tuple[str, ...]
    unexpected: bool  # not a condition a user can act on: a bug, or the loss of a peer
    shared: bool  # another process has the same to say, and it happened there
    seconds: float  # of its host's clock, since the epoch


_seen: tuple[str, int | None, float] = ("starting", None, 0.0)  # phase and step of the main thread, and when it said so
_stopping: threading.Event | None = None
_thread: threading.Thread | None = None


def start(directory: Path, rank: int, interval_seconds: float = 1.0, each: Callable[[], None] = lambda: None) -> None:
    """Begin to write signs of life of this process; `each` is called in the writing thread after every beat."""
    global _stopping, _thread
    path, host, stopping = directory / f"rank-{rank}.beat", socket.gethostname(), threading.Event()

    def write(count: int) -> None:
        phase, step, since = _seen
        beat = Beat(rank, os.getpid(), host, count, phase, step, round(time.monotonic() - since, 1))
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            temporary.write_text(json.dumps(asdict(beat)))  # not synced: a busy disk would look like a frozen process
            os.replace(temporary, path)
        except OSError:
            # A full disk: a new time is a sign of life too. Where even that fails, silence is all there is.
            with suppress(OSError):
                os.utime(path)

    def beat_on() -> None:
        for count in itertools.count(2):
            if stopping.wait(interval_seconds):
                return
            write(count)
            each()

    (directory / f"rank-{rank}.end").write_bytes(b" " * _END_BYTES)
    pulse("starting")
    write(1)
    _stopping, _thread = stopping, threading.Thread(target=beat_on, name="heartbeat", daemon=True)
    _thread.start()


def pulse(phase: str, step: int | None = None) -> None:
    """Tell that the main thread got here: what it does now, and at which optimizer step. Costs nothing."""
    global _seen
    _seen = (phase, step, time.monotonic())


def stop() -> None:
    if _stopping is not None and _thread is not None:
        _stopping.set()
        _thread.join(timeout=2)


def write_end(
    directory: Path, rank: int, exit_code: int, problems: Sequence[str] = (), *, unexpected: bool = False,
    shared: bool = False) -> None:  # fmt: skip
    """Write how this process ends, into the room that `start` has taken."""
    kept = list(problems)
    record = {"rank": rank, "exit_code": exit_code, "unexpected": unexpected, "shared": shared}
    while len(data := json.dumps({**record, "seconds": time.time(), "problems": kept}).encode()) > _END_BYTES:
        kept = kept[: len(kept) // 2] if len(kept) > 1 else [kept[0][: len(kept[0]) // 2]]
    descriptor = os.open(directory / f"rank-{rank}.end", os.O_WRONLY | os.O_CREAT, 0o600)
    with suppress(OSError), os.fdopen(descriptor, "wb") as file:  # else it looks killed, which is the next best to say
        file.write(data.ljust(_END_BYTES))
        file.flush()
        os.fsync(descriptor)


def read_beats(directory: Path) -> dict[int, Beat]:
    """Read the newest sign of life of each process that has given one."""
    return {data["rank"]: Beat(**{**data, "written_ns": at}) for data, at in _read_all(directory, "beat")}


def read_ends(directory: Path) -> dict[int, End]:
    """Read how each process ended that said so."""
    found = [End(**{**data, "problems": tuple(data["problems"])}) for data, _ in _read_all(directory, "end")]
    return {end.rank: end for end in found}


def _read_all(directory: Path, kind: str) -> Iterator[tuple[dict[str, Any], int]]:
    for path in directory.glob(f"rank-*.{kind}"):
        with suppress(OSError, ValueError):  # empty or being written: the next look finds it whole
            yield json.loads(path.read_text(encoding="utf-8")), path.stat().st_mtime_ns


def is_worker(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether this process was started as one of a job's, by us or by accelerate or torchrun."""
    return SUPERVISED in environment or "RANK" in environment or environment.get("WORLD_SIZE", "1") != "1"


def attach() -> None:
    """Prepare a supervised worker: give signs of life, end with its parent and the supervisor, and log to `rank-N.log`,
    from which only what rank 0 prints is exempt. Stop signals wait until `stop_between_steps` hears them: one that came
    before would kill this process, and a thread started now never takes one."""
    import psutil

    directory, rank = Path(os.environ[SUPERVISED]), int(os.environ.get("RANK", "0"))
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    log = os.open(directory / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    if rank == 0:  # the supervisor gave its own stderr as our stdout
        sys.stderr = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    else:
        os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    parent, supervisor = os.getppid(), int(os.environ[SUPERVISOR])
    alone_since: float | None = None

    def end_when_alone() -> None:
        """End this process when its parent or the supervisor is gone: first as SIGTERM would, then at once."""
        nonlocal alone_since
        if alone_since is not None:
            if time.monotonic() - alone_since > _LAST_WORDS_SECONDS:
                os._exit(143)
        elif os.getppid() != parent or not psutil.pid_exists(supervisor):
            alone_since = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)

    seconds = float(os.environ.get(INTERVAL, "1"))
    start(directory, rank, interval_seconds=seconds, each=end_when_alone)


def leave(exit_code: int, problems: Sequence[str] = (), *, unexpected: bool = False, shared: bool = False) -> int:
    """Write how this worker ends; give the exit code for torchrun, 0 for an agreed stop: others may still be saving."""
    directory, rank = Path(os.environ[SUPERVISED]), int(os.environ.get("RANK", "0"))
    pulse("ended")
    write_end(directory, rank, exit_code, problems, unexpected=unexpected, shared=shared)
    stop()
    return 0 if exit_code in (130, 143) else exit_code


def stopped_by(number: int, message: str) -> Stopped:
    """Make the exception that ends the command with a signal's exit code."""
    code = 130 if number == signal.SIGINT else 143
    return Stopped(f"stopped by {signal.Signals(number).name}: {message}", exit_code=code)


@contextmanager
def hearing(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let `handle` hear the stop signals, then put back what was there; outside the main thread nothing is heard."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores on purpose
    before = {number: signal.signal(number, handle) for number in wanted}
    try:
        yield
    except Interrupt as interrupt:
        raise interrupt.stopped from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def time_limit(seconds: float, error: BaseException, *, of_thread: bool = False) -> Iterator[None]:
    """Raise `error` in the block after `seconds`, by an alarm in this very thread: nothing is left running. Code that
    swallows it is interrupted again. Only the main thread can be interrupted, and no C extension that never comes back
    to Python. With `of_thread` the seconds are those the thread has computed: a busy machine stops nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    timer, number = (signal.ITIMER_VIRTUAL, signal.SIGVTALRM) if of_thread else (signal.ITIMER_REAL, signal.SIGALRM)
    until = time.thread_time() + seconds

    def interrupt(*_: object) -> None:
        if not of_thread or time.thread_time() >= until:
            raise error

    before = signal.signal(number, interrupt)
    signal.setitimer(timer, seconds, 0.1 if of_thread else 1.0)
    try:
        yield
    finally:
        signal.setitimer(timer, 0)
        signal.signal(number, before)


class Stop:
    """Remembers the first signal; a second one ends the process at once. Waits of other threads end with it."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self._number = 0

    def check(self) -> None:
        if self._number:
            raise stopped_by(self._number, "everything answered is kept; the same command goes on from there")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self._number = bool(self._number), self._number or number
        self.event.set()
        if again:
            raise Interrupt(stopped_by(self._number, "at once, by a second signal; everything answered is kept"))
        with suppress(RuntimeError):  # the signal came in the middle of another line
            name = signal.Signals(number).name
            console.note(f"{name}: stopping once what was sent is answered; once more stops at once")

    def listen(self) -> None:
        """Hear signals beside the trainer, which then says what a second one does and puts back what was there."""
        for number in SIGNALS:
            if callable(handle := signal.getsignal(number)):

                def hear(number: int, frame: FrameType | None, handle: Callable = handle) -> None:
                    self._number = self._number or number
                    self.event.set()
                    handle(number, frame)

                signal.signal(number, hear)


@contextmanager
def stop_between_answers() -> Iterator[Stop]:
    """Turn the stop signals into a Stop while the block runs: what is under way is kept, and the command ends."""
    stop = Stop()
    with hearing(stop._handle):
        yield stop


class StopFlag:
    """Remembers the first signal of a training; a second one ends the process at once, but under our supervisor, where
    one request comes twice: a scheduler signals it and every process, and it passes the signal on."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None  # the loop sets it, too, when another rank was asked
        self._heard = False
        self.at_once = False  # a second one came: wherever the program was, nothing more is saved
        self.joined = False  # all processes have met: before, one that left alone would leave the others waiting
        self.training = False  # steps are running: there is something to save, and the loop will look here
        self.saved = False  # whether there is a step to go on from
        self.at_risk: Callable[[], str] = lambda: "the last sealed checkpoint counts"  # what a second signal costs

    def stopped(self, message: str) -> Stopped:
        return stopped_by(self.signal or signal.SIGTERM, message)

    def not_begun(self) -> Stopped:
        """Make the exception for a signal that came while no step was running."""
        then = "goes on from what is saved" if self.saved else "starts again"
        return self.stopped(f"nothing was being trained; the same command {then}")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self._heard = self._heard, True
        # Set by another rank's signal already, or passed on by the supervisor once more: it is being done.
        if self.signal is not None and (not again or SUPERVISED in os.environ):
            return
        self.signal = signal.Signals(number)
        if again:
            self.at_once = True
            raise Interrupt(self.stopped(f"at once, by a second signal; {self.at_risk()}"))
        if self.joined and not self.training:
            raise Interrupt(self.not_begun())
        with suppress(RuntimeError):  # the signal came in the middle of another line
            console.note(f"{self.signal.name}: stopping as soon as the step is saved; once more stops at once")


@contextmanager
def stop_between_steps() -> Iterator[StopFlag]:
    """Turn the stop signals into a StopFlag in the block; a supervised worker has them blocked before and after."""
    flag, blocked = StopFlag(), SIGNALS if SUPERVISED in os.environ else ()
    with hearing(flag._handle):
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
            yield flag
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
