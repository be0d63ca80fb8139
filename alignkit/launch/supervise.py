"""Watch the processes of one try on this node until they have ended, or end them all and say why.

It starts the launcher, forwards stop signals, and kills. It neither trains nor decides whether to try again.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from alignkit import console
from alignkit.errors import SUPERVISED, AlignKitError, RankError, Stopped, UsageError
from alignkit.launch import causes, processes, rendezvous
from alignkit.launch.placement import Placement
from alignkit.launch.worker import INTERVAL, SUPERVISOR
from alignkit.runs import heartbeat
from alignkit.runs.heartbeat import Beat, End

_POLL_SECONDS = 0.1
_STOPS = (130, 143)  # exit codes of an orderly stop
# Between the first sign of a failure and the verdict: the others write down what they know meanwhile.
_SETTLE_SECONDS = 1.0
_SETTLE_NODES_SECONDS = 5.0
_STOP_SECONDS = 30.0  # for the rest, after one process has left by a stop signal
_EXIT_SECONDS = 20.0  # for processes that have said how they end, and their launcher
_OWN_PAUSE_SECONDS = 3.0  # longer between two looks: we were stopped ourselves, and so may the others have been


class StopRequest:
    """Signals this process was sent: the first is passed on, the second ends the job at once."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def handle(self, number: int, frame: object) -> None:
        self.received.append(number)

    @property
    def exit_code(self) -> int:
        return 130 if self.received and self.received[0] == signal.SIGINT else 143

    def stopped(self, message: str) -> Stopped:
        name = signal.Signals(self.received[0]).name if self.received else "SIGTERM"
        return Stopped(f"stopped by {name}: {message}", exit_code=self.exit_code)

    def check(self) -> None:
        """Raise Stopped when a signal has come."""
        if self.received:
            raise self.stopped("nothing was being trained; the same command starts again")


@dataclass
class _Sight:
    """What was last seen of a process, and when by our clock."""

    sign: tuple[int, int]
    seen: float


@dataclass
class Job:
    """One try on this node; `watch` is the only thing to call."""

    directory: Path  # where its processes write their signs of life
    placement: Placement
    heartbeat_seconds: float
    timeout_seconds: float
    stop: StopRequest
    resume_hint: Callable[[], str]  # what a restart goes on from, for messages
    _deaths: dict[int, causes.Death] = field(default_factory=dict)
    _sights: dict[int, _Sight] = field(default_factory=dict)
    _signalled: set[int] = field(default_factory=set)

    def watch(self, argv: Sequence[str], *, extra: dict[str, str]) -> None:
        """Start the processes and return when all of this node's have ended well.

        Raises what a process reported, Stopped after a signal, RankError for one that died or hung; then none of them
        is left.
        """
        environment = os.environ | extra | {
            SUPERVISED: str(self.directory),
            SUPERVISOR: str(os.getpid()),
            INTERVAL: f"{min(1.0, self.heartbeat_seconds / 4):g}",
            "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        solo = self.placement.world_size == 1
        with self._log_path.open("w") as log:
            self._process = processes.start(argv, environment, output=_terminal(), log=log, deaf=not solo)
        try:
            self._watch()
        except AlignKitError as error:
            self._kill()
            if self.placement.nodes > 1:
                problems = error.problems if isinstance(error, UsageError) else (str(error),)
                lines = tuple(str(problem) for problem in problems)
                rendezvous.abort(self.directory, self.placement, error.exit_code, lines)
            raise
        except BaseException:
            self._kill()
            raise

    @property
    def _log_path(self) -> Path:
        number = self.placement.node_rank
        return self.directory / (f"launcher-node{number}.log" if number else "launcher.log")

    @property
    def _ranks(self) -> range:
        first = int(self.placement.node_rank or 0) * self.placement.processes
        return range(first, first + self.placement.processes)

    def _watch(self) -> None:
        began = looked = time.monotonic()
        suspect: float | None = None  # since when something is wrong
        ended: float | None = None  # since when all ranks have said how they end
        while True:
            exited = self._process.poll()  # first: what has exited by now has written its end before we read
            beats, ends = heartbeat.read_beats(self.directory), heartbeat.read_ends(self.directory)
            now = time.monotonic()
            if now - looked > _OWN_PAUSE_SECONDS:
                self._forgive(now - looked)
            looked = now
            self._see_signals(beats, ends)
            self._see_deaths(beats, ends, exited)
            self._see_abort()
            hung = self._find_hung(beats, ends, now) or self._find_absent(beats, now - began)
            mine = {rank: end for rank, end in ends.items() if rank in self._ranks}
            if exited is not None and len(mine) < len(self._ranks) and not self._deaths:
                hung = hung or self._describe_launcher(exited)
            wrong = bool(hung or self._deaths) or any(causes.failed(end) for end in ends.values())
            stopping = not wrong and any(end.exit_code for end in ends.values())
            if exited is not None and not wrong and len(mine) == len(self._ranks):
                self._finish(ends)
                return
            suspect = (suspect or now) if wrong or stopping else None
            if suspect is not None and now - suspect >= self._patience(wrong, hung, ends):
                self._raise(ends, hung)
            if exited is None and not wrong and len(ends) == self.placement.world_size:
                ended = ended or now
                if now - ended > _EXIT_SECONDS or self._is_over(beats):
                    self._kill()
            time.sleep(_POLL_SECONDS)

    def _is_over(self, beats: dict[int, Beat]) -> bool:
        """Tell whether only the launcher is left; with several nodes it keeps the others' store, and waits for them."""
        alive = (processes.is_alive(beat.pid, child_of=self._process.pid) for beat in beats.values())
        return self.placement.nodes == 1 and not any(alive)

    def _patience(self, wrong: bool, hung: str | None, ends: dict[int, End]) -> float:
        """Return how long to wait for the others' words before the cause is told."""
        if not wrong:
            return _STOP_SECONDS
        if hung or any(causes.failed(end) and not end.unexpected and not end.shared for end in ends.values()):
            return 0.0 if self.placement.nodes == 1 else _SETTLE_SECONDS
        if self.placement.nodes == 1 or self._deaths:
            return _SETTLE_SECONDS
        if all(causes.lost_peer(end) for end in ends.values() if causes.failed(end)):
            return self.heartbeat_seconds + _SETTLE_NODES_SECONDS  # whose silence it was shows no sooner
        return _SETTLE_NODES_SECONDS

    def _finish(self, ends: dict[int, End]) -> None:
        """Return when all that ended on this node ended well; raise what they reported otherwise."""
        if any(end.exit_code for end in ends.values()):
            self._raise(ends, None)

    def _told_status(self, pid: int) -> int | None:
        """Find the wait status of a process in the launcher's log, where it asked the kernel before we looked."""
        told = re.search(rf"exitcode *: (-?\d+)\)?[^\n]*\(pid: {pid}\)", self._log_path.read_text(errors="replace"))
        if told is None:
            return None
        code = int(told[1])
        return -code if code < 0 else code << 8

    def _raise(self, ends: dict[int, End], hung: str | None) -> None:
        for rank, death in self._deaths.items():
            if death.status is None:
                self._deaths[rank] = causes.Death(death.beat, self._told_status(death.beat.pid))
        if any(end.exit_code in _STOPS for end in ends.values()):
            # One that stopped while the stage was loading left alone: the others' lost connections are no news.
            ends = {rank: end for rank, end in ends.items() if not causes.lost_peer(end)}
        cause = causes.find_cause(ends, self._deaths.values(), hung)
        by_us = {int(death.signal or 0) for death in self._deaths.values()} & {*self.stop.received}
        if by_us and not isinstance(cause, AlignKitError):
            raise self.stop.stopped(f"nothing was being trained; {self.resume_hint()}")
        if isinstance(cause, AlignKitError):
            raise cause
        raise RankError(f"{cause or 'a process failed'}; all processes were ended; {self.resume_hint()}")

    def _see_signals(self, beats: dict[int, Beat], ends: dict[int, End]) -> None:
        """Pass the first signal on to this node's workers, also to those that appear later; end all at the second."""
        if not self.stop.received:
            return
        if len(self.stop.received) > 1:
            raise self.stop.stopped(f"at once, by a second signal; {self.resume_hint()}")
        local = [beat for rank, beat in beats.items() if rank in self._ranks]
        if not local:
            raise self.stop.stopped(f"nothing was being trained; {self.resume_hint()}")
        for beat in local:
            if beat.rank not in self._signalled and beat.rank not in ends:
                self._signalled.add(beat.rank)
                with suppress(OSError):
                    os.kill(beat.pid, self.stop.received[0])

    def _see_deaths(self, beats: dict[int, Beat], ends: dict[int, End], exited: int | None) -> None:
        for rank, beat in beats.items():
            if rank not in self._ranks or rank in ends or rank in self._deaths:
                continue
            if self._process.pid == beat.pid and exited is not None:
                status = -exited if exited < 0 else exited << 8
            elif processes.is_alive(beat.pid, child_of=self._process.pid):
                continue
            else:
                status = processes.death_of(beat.pid) or 0
            if rank not in heartbeat.read_ends(self.directory):  # it may have written its end as we looked
                self._deaths[rank] = causes.Death(beat, status or None)

    def _see_abort(self) -> None:
        """Raise what another node says the job ended of."""
        told = rendezvous.read_abort(self.directory) if self.placement.nodes > 1 else None
        if told is None:
            return
        text = f"node {told.node} ({told.host}) ended the job: " + "; ".join(told.problems)
        if told.exit_code in (130, 143):
            raise Stopped(text, exit_code=told.exit_code)
        error = RankError(text)
        error.exit_code = told.exit_code
        raise error

    def _find_hung(self, beats: dict[int, Beat], ends: dict[int, End], now: float) -> str | None:
        running = {rank: beat for rank, beat in beats.items() if rank not in ends and rank not in self._deaths}
        for rank, beat in running.items():
            sign = (beat.count, heartbeat.beat_time(self.directory, rank))
            if rank not in self._sights or self._sights[rank].sign != sign:
                self._sights[rank] = _Sight(sign, now)
            silent = now - self._sights[rank].seen
            if silent > self.heartbeat_seconds:
                here = rank in self._ranks and beat.host == socket.gethostname()
                return causes.describe_frozen(beat, silent, stopped=here and processes.is_stopped(beat.pid))
        stuck = [beat for beat in running.values() if beat.idle_seconds > self.timeout_seconds]
        return causes.describe_stuck(running.values(), self.timeout_seconds) if stuck else None

    def _find_absent(self, beats: dict[int, Beat], seconds: float) -> str | None:
        """Say which processes never appeared, once launch.timeout_seconds have passed."""
        absent = [rank for rank in range(self.placement.world_size) if rank not in beats]
        if not absent or seconds <= self.timeout_seconds:
            return None
        if self.placement.nodes > 1:
            away = sorted({*range(self.placement.nodes)} - rendezvous.arrived(self.directory))
            if away:
                which = ", ".join(map(str, away))
                return f"node {which} did not come within {self.timeout_seconds:g} s; start the same command there"
        log = self._log_path
        return f"rank {absent[0]} did not start within {self.timeout_seconds:g} s (the launcher's output: {log})"

    def _forgive(self, seconds: float) -> None:
        for sight in self._sights.values():
            sight.seen += seconds

    def _describe_launcher(self, code: int) -> str:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        lines = [line.strip() for line in self._log_path.read_text(errors="replace").splitlines() if line.strip()]
        last = f": {lines[-1][:300]}" if lines else ""
        return f"the launcher {how} before its processes{last} (its output: {self._log_path})"

    def _kill(self) -> None:
        pids = [self._process.pid]
        pids += [beat.pid for rank, beat in heartbeat.read_beats(self.directory).items() if rank in self._ranks
                 and processes.is_alive(beat.pid, child_of=self._process.pid)]  # fmt: skip
        processes.kill_all(pids, self.directory)
        console.restore_terminal()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)


def _terminal() -> int:
    """Return the file descriptor of our stderr: what the workers print goes there."""
    try:
        return sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):  # replaced by something that is no file, as test runners do
        return 2
