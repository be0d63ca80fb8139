"""Watch the processes of one try on this node until they have ended, or end them all and say why."""

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from alignkit import console
from alignkit.errors import SUPERVISED, AlignKitError, Problem, RankError, Stopped, UsageError
from alignkit.launch.placement import Placement
from alignkit.recipe.schema import LaunchOptions
from alignkit.runs import signals
from alignkit.runs.directory import newest_step
from alignkit.runs.signals import SIGNALS, Beat, End, stopped_by

_POLL_SECONDS = 0.1
_STOPS = (130, 143)  # exit codes of an orderly stop
# Between the first sign of a failure and the verdict: the others write down what they know meanwhile.
_SETTLE_SECONDS = 1.0
_SETTLE_NODES_SECONDS = 5.0
_STOP_SECONDS = 30.0  # for the rest, after one process has left by a stop signal
_EXIT_SECONDS = 20.0  # for processes that have said how they end, and their launcher
_OWN_PAUSE_SECONDS = 3.0  # longer between two looks: we were stopped ourselves, and so may the others have been
_GONE_SECONDS = 10.0  # for what was killed
_PR_SET_PDEATHSIG = 1
_ABORT = "abort.json"  # why a node has ended the job: node, host, exit code and problems

# What gloo, NCCL and the store say when somebody else has gone.
_PEER_LOST = re.compile(
    r"unexpected (Dist\w*Error|RuntimeError|Connection\w*Error|BrokenPipeError|TimeoutError|OSError): .*"
    r"(connection (closed|reset|refused)|broken pipe|\bgloo\b|\bnccl\b|\bTCPStore\b|\bsocket\b|timed out|"
    r"not connected|remote process)",
    re.IGNORECASE,
)
_LOG = re.compile(r" \(traceback: .*\)$")  # a path may hold any of these words


@dataclass(frozen=True)
class Death:
    """A process that vanished without a word."""

    beat: Beat
    status: int | None  # the wait status, where the kernel still had it

    @property
    def signal(self) -> int:
        return (self.status or 0) & 0x7F

    def __str__(self) -> str:
        if self.signal == signal.SIGKILL:
            how = "was killed (SIGKILL: by somebody, or by the kernel for want of memory)"
        elif self.signal:
            how = f"was ended by {signal.Signals(self.signal).name}"
        elif self.status:
            how = f"ended with exit code {self.status >> 8} without a word"
        else:
            how = "is gone without a word"
        return f"{self.beat} {how} {self.beat.place}"


def describe_frozen(beat: Beat, seconds: float, *, stopped: bool) -> str:
    why = "; it is stopped (SIGSTOP)" if stopped else ""
    what = f"{beat} has given no sign of life for {seconds:.0f} s{why}, last seen {beat.place}"
    return f"{what}; launch.heartbeat_seconds bounds that"


def describe_stuck(beats: Iterable[Beat], seconds: float) -> str:
    last = min(beats, key=lambda beat: (-1 if beat.step is None else beat.step, -beat.idle_seconds))
    what = f"{last} got no further for {seconds:g} s (launch.timeout_seconds), last seen {last.place}"
    return f"{what}; raise it if this work takes so long"


def _failed(end: End) -> bool:  # otherwise than by an agreed stop
    return end.exit_code not in (0, *_STOPS)


def _lost_peer(end: End) -> bool:  # all it knows is that another process is gone
    return end.unexpected and any(_PEER_LOST.search(_LOG.sub("", problem)) for problem in end.problems)


def find_cause(ends: Mapping[int, End], deaths: Iterable[Death], hung: str | None) -> AlignKitError | str | None:
    """Find the error a process reported, or in words what happened to one. A condition that a user can act on comes
    first, then a death, a hang, a bug, and a stop last: what a process says after its peer has gone is no news."""
    in_order = sorted(ends.values(), key=lambda end: end.seconds)
    known = [end for end in in_order if _failed(end) and not end.unexpected]
    own = [end for end in known if not end.shared]
    lost = [end for end in in_order if _lost_peer(end)]
    bugs = [end for end in in_order if end.unexpected and end not in lost]
    if own:
        return _report(next((end for end in own if end.rank == 0 and end.problems == own[0].problems), own[0]))
    if what := next(filter(None, (*deaths, hung)), None):
        return str(what)
    if bugs or known:
        return _report([*bugs, *known][0])
    if lost:
        return f"rank {lost[0].rank} lost the connection to another process: {'; '.join(lost[0].problems)}"
    stops = [end for end in ends.values() if end.exit_code in _STOPS]
    return _report(min(stops, key=lambda end: end.rank)) if stops else None


def _report(end: End) -> AlignKitError:
    """Make the error that a process wrote down, to be raised as if it had happened here."""
    prefix = f"rank {end.rank}: " if end.rank and end.unexpected else ""
    lines = [f"{prefix}{line}" for line in end.problems] or [f"rank {end.rank} ended with exit code {end.exit_code}"]
    return make_error(end.exit_code, lines)


def make_error(exit_code: int, lines: Sequence[str]) -> AlignKitError:
    """Make an error with this exit code and one problem a line."""
    if exit_code in _STOPS:
        return Stopped("\n".join(lines), exit_code=exit_code)
    if exit_code == UsageError.exit_code:
        return UsageError([Problem(line) for line in lines])
    error = RankError("\n".join(lines))
    error.exit_code = exit_code
    return error


def abort(directory: Path, node: int, error: AlignKitError) -> None:
    """Tell the other nodes of a try to end too, unless one has told already."""
    told = {"node": node, "host": socket.gethostname(), "exit_code": error.exit_code}
    temporary = directory / f".abort-{node}.tmp"
    with suppress(OSError):  # no room: then silence tells them, after launch.heartbeat_seconds
        if not (directory / _ABORT).exists():
            temporary.write_text(json.dumps({**told, "problems": console.list_problems(error)}))
            os.replace(temporary, directory / _ABORT)


class Supervisor:
    """One try on this node: `watch` starts its processes, which write their signs of life to `directory`, and sees them
    to their end. Of the signals `received` the first is passed on, the second ends the job at once."""

    def __init__(
        self, directory: Path, placement: Placement, checkpoints: Path, launch: LaunchOptions, received: Sequence[int]
    ) -> None:
        self._directory, self._placement = directory, placement
        self._checkpoints, self._received = checkpoints, received
        self._heartbeat_seconds, self._timeout_seconds = launch.heartbeat_seconds, launch.timeout_seconds
        node = int(placement.node_rank or 0)
        self._ranks = range(node * placement.processes, (node + 1) * placement.processes)
        self._log = directory / (f"launcher-node{node}.log" if node else "launcher.log")
        self._deaths: dict[int, Death] = {}
        self._seen: dict[int, tuple[tuple[int, int], float]] = {}  # the newest sign of a rank, and when, by our clock
        self._signalled: set[int] = set()

    def watch(self, argv: Sequence[str], *, extra: Mapping[str, str]) -> None:
        """Start the processes and return when all of this node's have ended well. Raises what a process reported,
        Stopped after a signal, RankError for one that died or hung; then none of them is left."""
        environment = {
            **os.environ, **extra, SUPERVISED: str(self._directory), signals.SUPERVISOR: str(os.getpid()),
            signals.INTERVAL: f"{min(1.0, self._heartbeat_seconds / 4):g}", "PYTHONUNBUFFERED": "1"}  # fmt: skip
        try:
            output = sys.stderr.fileno()
        except (OSError, ValueError, AttributeError):  # replaced by something that is no file, as test runners do
            output = 2
        # A launcher does not hear stop signals: a scheduler sends them to every process of a job, and torchrun would
        # end those that are still saving. On Linux the kernel kills it when this process dies; elsewhere, and where
        # there is none, a worker that finds its parent gone ends itself (`signals.attach`).
        has_launcher, parent = self._placement.world_size > 1, os.getpid()
        libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

        def prepare() -> None:
            if has_launcher:
                signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            if libc is not None:
                libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if has_launcher else 0)
                if os.getppid() != parent:
                    os._exit(1)

        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                argv, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=log, start_new_session=True,
                preexec_fn=prepare)  # fmt: skip
        try:
            self._watch()
        except BaseException as error:
            self._kill()
            if self._placement.nodes > 1 and isinstance(error, AlignKitError):
                abort(self._directory, int(self._placement.node_rank or 0), error)
            raise

    def _watch(self) -> None:
        began = looked = time.monotonic()
        suspect: float | None = None  # since when something is wrong
        ended: float | None = None  # since when all ranks have said how they end
        while True:
            exited = self._process.poll()  # first: what has exited by now has written its end before we read
            beats, ends = signals.read_beats(self._directory), signals.read_ends(self._directory)
            now = time.monotonic()
            if (pause := now - looked) > _OWN_PAUSE_SECONDS:
                self._seen = {rank: (sign, seen + pause) for rank, (sign, seen) in self._seen.items()}
            looked = now
            self._pass_signals_on(beats, ends)
            self._see_deaths(beats, ends, exited)
            if self._placement.nodes > 1 and (told := self._directory / _ABORT).is_file():
                other = json.loads(told.read_text(encoding="utf-8"))
                said = f"node {other['node']} ({other['host']}) ended the job: {'; '.join(other['problems'])}"
                raise make_error(other["exit_code"], [said])
            hung = self._find_hung(beats, ends, now, now - began)
            all_said = all(rank in ends for rank in self._ranks)
            if exited is not None and not all_said and not self._deaths and not hung:
                how = f"was ended by {signal.Signals(-exited).name}" if exited < 0 else f"ended with exit code {exited}"
                lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
                last = f": {lines[-1][:300]}" if lines else ""
                hung = f"the launcher {how} before its processes{last} (its output: {self._log})"
            wrong = bool(hung or self._deaths) or any(_failed(end) for end in ends.values())
            stopping = not wrong and any(end.exit_code for end in ends.values())
            if exited is not None and all_said and not wrong:
                if stopping:
                    self._raise(ends, None)
                return
            suspect = (suspect or now) if wrong or stopping else None
            if suspect is not None and now - suspect >= self._patience(wrong, hung, ends):
                self._raise(ends, hung)
            if exited is None and not wrong and len(ends) == self._placement.world_size:
                ended = ended or now
                # With several nodes the launcher keeps the others' store, and waits for them.
                alone = self._placement.nodes == 1 and not any(map(self._is_alive, beats.values()))
                if alone or now - ended > _EXIT_SECONDS:
                    self._kill()
            time.sleep(_POLL_SECONDS)

    def _is_alive(self, beat: Beat) -> bool:
        with suppress(psutil.Error):
            process = psutil.Process(beat.pid)  # another one that got its number later does not count
            is_own = self._process.pid in (process.ppid(), beat.pid)
            return is_own and process.status() != psutil.STATUS_ZOMBIE
        return False

    def _patience(self, wrong: bool, hung: str | None, ends: Mapping[int, End]) -> float:
        """Decide how long to wait for the others' words before the cause is told."""
        if not wrong:
            return _STOP_SECONDS
        failures, one_node = [end for end in ends.values() if _failed(end)], self._placement.nodes == 1
        if hung or any(not end.unexpected and not end.shared for end in failures):
            return 0.0 if one_node else _SETTLE_SECONDS
        if one_node or self._deaths:
            return _SETTLE_SECONDS
        if all(map(_lost_peer, failures)):
            return self._heartbeat_seconds + _SETTLE_NODES_SECONDS  # whose silence it was shows no sooner
        return _SETTLE_NODES_SECONDS

    def _raise(self, ends: Mapping[int, End], hung: str | None) -> None:
        for rank, death in self._deaths.items():
            if death.status is None:
                # The launcher may have asked the kernel before we looked, and have written the answer to its log.
                pattern = rf"exitcode *: (-?\d+)\)?[^\n]*\(pid: {death.beat.pid}\)"
                if told := re.search(pattern, self._log.read_text(errors="replace")):
                    code = int(told[1])
                    self._deaths[rank] = Death(death.beat, -code if code < 0 else code << 8)
        if any(end.exit_code in _STOPS for end in ends.values()):
            # One that stopped while the stage was loading left alone: the others' lost connections are no news.
            ends = {rank: end for rank, end in ends.items() if not _lost_peer(end)}
        cause = find_cause(ends, self._deaths.values(), hung)
        if isinstance(cause, AlignKitError):
            raise cause
        if {death.signal for death in self._deaths.values()} & {*self._received}:
            raise self._stopped("nothing was being trained")
        raise RankError(f"{cause or 'a process failed'}; all processes were ended; {self._describe_resume()}")

    def _stopped(self, message: str) -> Stopped:
        return stopped_by(self._received[0], f"{message}; {self._describe_resume()}")

    def _describe_resume(self) -> str:
        step = newest_step(self._checkpoints)
        again = "nothing was saved yet; the same command starts again"
        return again if step is None else f"the same command goes on from step {step}"

    def _pass_signals_on(self, beats: Mapping[int, Beat], ends: Mapping[int, End]) -> None:
        """Pass the first signal on to this node's workers, also to those that appear later; end all at the second."""
        if not self._received:
            return
        if len(self._received) > 1:
            raise self._stopped("at once, by a second signal")
        local = [beat for rank, beat in beats.items() if rank in self._ranks]
        if not local:
            raise self._stopped("nothing was being trained")
        for beat in local:
            if beat.rank not in self._signalled and beat.rank not in ends:
                self._signalled.add(beat.rank)
                with suppress(OSError):
                    os.kill(beat.pid, self._received[0])

    def _see_deaths(self, beats: Mapping[int, Beat], ends: Mapping[int, End], exited: int | None) -> None:
        for rank, beat in beats.items():
            if rank not in self._ranks or rank in ends or rank in self._deaths:
                continue
            if self._process.pid == beat.pid and exited is not None:
                status = -exited if exited < 0 else exited << 8
            elif self._is_alive(beat):
                continue
            else:  # the wait status of one whose parent has not asked yet
                status = 0
                with suppress(OSError):
                    fields = Path(f"/proc/{beat.pid}/stat").read_text().rpartition(")")[2].split()
                    status = int(fields[-1]) if fields[0] == "Z" else 0
            if rank not in signals.read_ends(self._directory):  # it may have written its end as we looked
                self._deaths[rank] = Death(beat, status or None)

    def _find_hung(self, beats: Mapping[int, Beat], ends: Mapping[int, End], now: float, passed: float) -> str | None:
        """Say which process is silent or gets no further, or which never came in launch.timeout_seconds."""
        running = {rank: beat for rank, beat in beats.items() if rank not in ends and rank not in self._deaths}
        for rank, beat in running.items():
            sign = (beat.count, beat.written_ns)
            if rank not in self._seen or self._seen[rank][0] != sign:
                self._seen[rank] = (sign, now)
            silent = now - self._seen[rank][1]
            if silent > self._heartbeat_seconds:
                here = rank in self._ranks and beat.host == socket.gethostname()
                stopped = False
                with suppress(psutil.Error):  # by SIGSTOP, or a debugger
                    states = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
                    stopped = here and psutil.Process(beat.pid).status() in states
                return describe_frozen(beat, silent, stopped=stopped)
        if any(beat.idle_seconds > self._timeout_seconds for beat in running.values()):
            return describe_stuck(running.values(), self._timeout_seconds)
        absent = [rank for rank in range(self._placement.world_size) if rank not in beats]
        if not absent or passed <= self._timeout_seconds:
            return None
        arrived, limit = {path.stem for path in self._directory.glob("node-*.json")}, f"{self._timeout_seconds:g} s"
        if away := [str(node) for node in range(self._placement.nodes) if f"node-{node}" not in arrived]:
            return f"node {', '.join(away)} did not come within {limit}; start the same command there"
        return f"rank {absent[0]} did not start within {limit} (the launcher's output: {self._log})"

    def _kill(self) -> None:
        beats = signals.read_beats(self._directory)
        local = [beat.pid for rank, beat in beats.items() if rank in self._ranks and self._is_alive(beat)]
        kill_all([self._process.pid, *local], self._directory)
        console.restore_terminal()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)


def list_marked(job_root: Path) -> list[psutil.Process]:
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
        family = list_marked(job_root)
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
