"""Stop signals, wherever the program is when they come."""

from __future__ import annotations

import os
import signal

import pytest

from alignkit.errors import Stopped
from alignkit.runs.signals import stop_between_answers, stop_between_steps


def test_a_signal_is_not_swallowed_by_a_library_that_catches_every_exception() -> None:
    def library() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except Exception:
            return

    with pytest.raises(Stopped, match="SIGINT: nothing was being trained; the same command starts again") as caught:  # noqa: SIM117
        with stop_between_steps() as flag:
            flag.joined = True
            library()
            pytest.fail("swallowed")
    assert caught.value.exit_code == 130
    with pytest.raises(Stopped, match="at once, by a second signal"), stop_between_answers() as stop:
        library()  # the first one is remembered
        with pytest.raises(Stopped):
            stop.check()
        library()
        pytest.fail("swallowed")
