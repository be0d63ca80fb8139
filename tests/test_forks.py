from __future__ import annotations

import os
import signal
import time

from tqdm.auto import tqdm


def test_a_fork_that_is_killed_while_it_draws_a_bar_stops_no_other() -> None:
    list(tqdm([1], disable=True))  # which makes the lock, where there is none
    if not (pid := os.fork()):
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    if not (pid := os.fork()):
        list(tqdm([1], disable=True))
        os._exit(0)
    ends = time.monotonic() + 20
    while not (found := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > ends:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(found[1]) == 0
