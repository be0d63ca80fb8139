"""A request to stop, heard between two answers: what is under way is kept, and the command ends in order.

Apart from the trainers' signals: there is no step to finish and no other rank to agree with.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

from alignkit.errors import Stopped

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Stop:
    """Remembers the first signal; a second one ends the process at once. Waits of other threads end with it."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self._number: signal.Signals | None = None

    def check(self) -> None:
        """Raise Stopped when a signal came."""
        if self._number is not None:
            raise self._stopped("everything answered is kept; the same command goes on from there")

    def _stopped(self, message: str) -> Stopped:
        assert self._number is not None
        code = 130 if self._number == signal.SIGINT else 143
        return Stopped(f"stopped by {self._number.name}: {message}", exit_code=code)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self._number is not None
        self._number = self._number or signal.Signals(number)
        self.event.set()
        if again:
            raise self._stopped("at once, by a second signal; everything answered is kept")

    def listen(self) -> None:
        """Hear signals beside the trainer, which then says what a second one does and puts back what was there."""
        for number in _SIGNALS:
            if callable(handle := signal.getsignal(number)):
                signal.signal(number, partial(self._hear, handle))

    def _hear(self, handle: Callable[[int, FrameType | None], Any], number: int, frame: FrameType | None) -> None:
        self._number = self._number or signal.Signals(number)
        self.event.set()
        handle(number, frame)


@contextmanager
def catch_signals() -> Iterator[Stop]:
    """Turn the stop signals into a Stop while the block runs; outside the main thread nothing is caught."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    wanted = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores on purpose
    before = {number: signal.signal(number, stop._handle) for number in wanted}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
