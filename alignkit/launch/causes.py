"""Why a job of several processes failed: one cause out of what its processes wrote and how they vanished.

Pure: it takes what was seen and returns the error to report. Losing a peer is a consequence, never the cause, unless
nothing else is known.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from alignkit.errors import AlignKitError, Problem, RankError, Stopped, UsageError
from alignkit.runs.heartbeat import Beat, End

_STOPS = (130, 143)
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
    def signal(self) -> signal.Signals | None:
        number = (self.status or 0) & 0x7F
        return signal.Signals(number) if number else None

    def __str__(self) -> str:
        if self.signal is signal.SIGKILL:
            how = "was killed (SIGKILL: by somebody, or by the kernel for want of memory)"
        elif self.signal is not None:
            how = f"was ended by {self.signal.name}"
        elif self.status:
            how = f"ended with exit code {self.status >> 8} without a word"
        else:
            how = "is gone without a word"
        return f"{describe(self.beat)} {how} {_where(self.beat)}"


def describe(beat: Beat) -> str:
    """Name a process so that a person finds it."""
    return f"rank {beat.rank} (process {beat.pid} on {beat.host})"


def _where(beat: Beat) -> str:
    return f"while {beat.phase}" if beat.step is None else f"in step {beat.step} ({beat.phase})"


def describe_frozen(beat: Beat, seconds: float, *, stopped: bool) -> str:
    """Say that a process gives no sign of life."""
    why = "; it is stopped (SIGSTOP)" if stopped else ""
    return (
        f"{describe(beat)} has given no sign of life for {seconds:.0f} s{why}, last seen {_where(beat)}; "
        "launch.heartbeat_seconds bounds that"
    )


def describe_stuck(beats: Iterable[Beat], seconds: float) -> str:
    """Say that the main threads got no further, naming the one that is furthest behind."""
    last = min(beats, key=lambda beat: (-1 if beat.step is None else beat.step, -beat.idle_seconds))
    return (
        f"{describe(last)} got no further for {seconds:g} s (launch.timeout_seconds), last seen {_where(last)}; "
        "raise it if this work takes so long"
    )


def failed(end: End) -> bool:
    """Whether a process ended otherwise than well or by an agreed stop."""
    return end.exit_code != 0 and end.exit_code not in _STOPS


def lost_peer(end: End) -> bool:
    """Whether all a process knows is that another one is gone."""
    return end.unexpected and any(_PEER_LOST.search(_LOG.sub("", problem)) for problem in end.problems)


def find_cause(ends: Mapping[int, End], deaths: Iterable[Death], hung: str | None) -> AlignKitError | str | None:
    """Return the error a process reported, or in words what happened to one; None when there is no cause.

    A condition that a user can act on comes first, then a death, a hang, a stop, and a bug last: what a process says
    after its peer has gone is no news.
    """
    known = sorted((end for end in ends.values() if failed(end) and not end.unexpected), key=lambda end: end.seconds)
    own = [end for end in known if not end.shared]
    if own:
        return _report(next((end for end in own if end.rank == 0 and end.problems == own[0].problems), own[0]))
    bugs = sorted((end for end in ends.values() if end.unexpected), key=lambda end: end.seconds)
    bug = next((end for end in bugs if not lost_peer(end)), None)
    for death in deaths:
        return str(death)
    if hung:
        return hung
    if bug is not None:
        return _report(bug)
    stops = [end for end in ends.values() if end.exit_code in _STOPS]
    if known:
        return _report(known[0])
    if bugs:
        return f"rank {bugs[0].rank} lost the connection to another process: {'; '.join(bugs[0].problems)}"
    return _report(min(stops, key=lambda end: end.rank)) if stops else None


def _report(end: End) -> AlignKitError:
    """Return the error that a process wrote down, to be raised as if it had happened here."""
    prefix = f"rank {end.rank}: " if end.rank and end.unexpected else ""
    lines = [f"{prefix}{line}" for line in end.problems] or [f"rank {end.rank} ended with exit code {end.exit_code}"]
    if end.exit_code in _STOPS:
        return Stopped("\n".join(lines), exit_code=end.exit_code)
    error: AlignKitError
    if end.exit_code == UsageError.exit_code:
        error = UsageError([Problem(line) for line in lines])
    else:
        error = RankError("\n".join(lines))
        error.exit_code = end.exit_code
    return error
