"""What the supervisor makes of the processes of a job: one cause out of what they left behind."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest

from alignkit.errors import AlignKitError, Stopped, UsageError
from alignkit.launch.placement import Placement
from alignkit.launch.supervise import Death, Supervisor, describe_frozen, describe_stuck, find_cause
from alignkit.recipe.schema import LaunchOptions
from alignkit.runs import signals
from alignkit.runs.signals import Beat, End


def end(rank: int, code: int, *problems: str, unexpected: bool = False, shared: bool = False, at: float = 0.0) -> End:
    return End(rank, code, problems, unexpected, shared, at)


def beat(rank: int, step: int | None = 7, idle_seconds: float = 0.0) -> Beat:
    return Beat(rank, 40 + rank, "host", 9, "training", step, idle_seconds)


LOST = "unexpected RuntimeError: [gloo] Connection closed by peer (traceback: e.log)"
BUG = "unexpected KeyError: 'x' (traceback: e.log)"


def cause(*ends: End, deaths: tuple[Death, ...] = (), hung: str | None = None) -> AlignKitError | str | None:
    return find_cause({end.rank: end for end in ends}, deaths, hung)


def test_a_users_mistake_is_the_cause_whoever_died_of_it() -> None:
    found = cause(end(0, 1, LOST, unexpected=True), end(1, 2, "a.jsonl:3: bad", "a.jsonl:4: bad", at=1.0),
                  deaths=(Death(beat(2), signal.SIGTERM),))  # fmt: skip
    assert isinstance(found, UsageError) and str(found) == "a.jsonl:3: bad\na.jsonl:4: bad"


def test_the_same_mistake_of_all_is_that_of_rank_0_and_copies_do_not_count() -> None:
    found = cause(end(1, 3, "loss is nan", at=1.0), end(0, 3, "loss is nan", at=2.0), end(2, 2, "copy", shared=True))
    assert isinstance(found, AlignKitError) and (found.exit_code, str(found)) == (3, "loss is nan")


def test_a_bug_whose_words_look_like_a_lost_connection_stays_a_bug() -> None:
    for text in ("unexpected KeyError: 'vector_store' (traceback: e.log)",
                 "unexpected RuntimeError: shapes differ (traceback: /data/gloo/store/e.log)"):  # fmt: skip
        found = cause(end(1, 1, text, unexpected=True))
        assert isinstance(found, AlignKitError) and found.exit_code == 1 and text in str(found)


def test_a_death_is_the_cause_of_a_lost_connection() -> None:
    found = cause(end(0, 1, LOST, unexpected=True), deaths=(Death(beat(1), signal.SIGKILL),))
    assert found == (
        "rank 1 (process 41 on host) was killed (SIGKILL: by somebody, or by the kernel for want of memory) "
        "in step 7 (training)"
    )


def test_a_bug_is_reported_with_its_rank_before_what_it_led_to() -> None:
    found = cause(end(0, 1, LOST, unexpected=True, at=1.0), end(1, 1, BUG, unexpected=True, at=2.0))
    assert isinstance(found, AlignKitError) and (found.exit_code, str(found)) == (1, f"rank 1: {BUG}")
    assert cause(end(0, 1, LOST, unexpected=True)) == f"rank 0 lost the connection to another process: {LOST}"


def test_an_agreed_stop_is_a_stop() -> None:
    found = cause(end(1, 143, "step 4 is saved"), end(0, 143, "step 4 is saved"))
    assert isinstance(found, Stopped) and (found.exit_code, str(found)) == (143, "step 4 is saved")
    assert cause(end(0, 0), end(1, 0)) is None


def test_ways_to_die_have_words() -> None:
    assert "ended with exit code 137 without a word" in str(Death(beat(0), 137 << 8))
    assert "was ended by SIGSEGV" in str(Death(beat(0), signal.SIGSEGV | 0x80))  # with a core dump
    assert "is gone without a word while training" in str(Death(beat(0, step=None), None))


def test_the_one_furthest_behind_is_named() -> None:
    beats = [beat(0, 8, 120.0), beat(1, 7, 119.0), beat(2, 8, 121.0)]
    assert describe_stuck(beats, 100).startswith("rank 1 (process 41 on host) got no further for 100 s")
    frozen = describe_frozen(beat(2), 12.3, stopped=True)
    assert frozen.startswith("rank 2 (process 42 on host) has given no sign of life for 12 s; it is stopped (SIGSTOP)")


ENDS_WELL = """\
import sys, time; from pathlib import Path; from alignkit.runs import signals
signals.start(Path(sys.argv[1]), 0); time.sleep(0.2); signals.write_end(Path(sys.argv[1]), 0, 0)
"""


def test_an_end_that_is_written_while_we_look_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_slowly(directory: Path, read=signals.read_ends) -> dict[int, End]:
        found = read(directory)
        time.sleep(2)  # the process writes its end and exits meanwhile
        return found

    monkeypatch.setattr(signals, "read_ends", read_slowly)
    one = Placement(1, nodes=1, node_rank=0, main_address=None, main_port=None, device="cpu", strategy="ddp")
    one_try = Supervisor(tmp_path, one, tmp_path, LaunchOptions(heartbeat_seconds=30, timeout_seconds=60), [])
    one_try.watch([sys.executable, "-c", ENDS_WELL, str(tmp_path)], extra={})
