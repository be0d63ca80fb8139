"""Asking a run to stop: a flag the training loop reads at the end of a step, or an exception where no step runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from alignkit import console
from alignkit.errors import SUPERVISED, Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopFlag:
    """Remembers the first signal; a second one ends the process at once.

    Not so under our supervisor: a scheduler signals it and every process, it passes the signal on, and so the same
    request comes twice. It ends the processes itself when it is asked twice.
    `joined` says whether all processes have met: before, a signal only waits, since one that left alone would leave the
    others waiting for it. `training` says whether steps are running: only then is there something to save, and the loop
    will look here.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None  # the loop sets it, too, when another rank was asked
        self._heard = False
        self.at_once = False  # a second one came: wherever the program was, nothing more is saved
        self.joined = False
        self.training = False
        self.saved = False  # whether there is a step to go on from
        self.at_risk: Callable[[], str] = lambda: "the last sealed checkpoint counts"  # what a second signal costs

    @property
    def exit_code(self) -> int:
        return 130 if self.signal == signal.SIGINT else 143

    def stopped(self, message: str) -> Stopped:
        """Return the exception that ends the command with this signal's exit code."""
        name = self.signal.name if self.signal else "SIGTERM"
        return Stopped(f"stopped by {name}: {message}", exit_code=self.exit_code)

    def not_begun(self) -> Stopped:
        """Return the exception for a signal that came while no step was running."""
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
            raise self.stopped(f"at once, by a second signal; {self.at_risk()}")
        if self.joined and not self.training:
            raise self.not_begun()
        with suppress(RuntimeError):  # the signal came in the middle of another line
            console.note(f"{self.signal.name}: stopping as soon as the step is saved; once more stops at once")


@contextmanager
def catch_signals() -> Iterator[StopFlag]:
    """Route the stop signals to a flag while the block runs, then restore what was there.

    A worker under our supervisor has had them blocked until now, and has again afterwards: one that came while it
    started is heard now, and one that comes when all is done cannot keep it from saying how it ended.
    """
    flag = StopFlag()
    # nohup and some schedulers ignore a signal on purpose: leave that as it is.
    wanted = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, flag._handle) for number in wanted}
    supervised = SUPERVISED in os.environ
    try:
        if supervised:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        yield flag
    finally:
        if supervised:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for number, handler in before.items():
            signal.signal(number, handler)
