"""Stop signals and time limits: the first signal is remembered and heard between two answers, or after a step."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from alignkit import console
from alignkit.errors import SUPERVISED, Interrupt, Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


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
