"""What the supervisor makes of a process's end."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from alignkit.launch import supervise
from alignkit.launch.placement import Placement
from alignkit.runs import heartbeat
from alignkit.runs.heartbeat import End

ENDS_WELL = """\
import sys, time; from pathlib import Path; from alignkit.runs import heartbeat
heartbeat.start(Path(sys.argv[1]), 0); time.sleep(0.2); heartbeat.write_end(Path(sys.argv[1]), 0, 0)
"""


def test_an_end_that_is_written_while_we_look_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_slowly(directory: Path, read=heartbeat.read_ends) -> dict[int, End]:
        found = read(directory)
        time.sleep(2)  # the process writes its end and exits meanwhile
        return found

    monkeypatch.setattr(heartbeat, "read_ends", read_slowly)
    one = Placement(1, nodes=1, node_rank=0, main_address=None, main_port=None, device="cpu", strategy="ddp")
    one_try = supervise.Supervisor(
        tmp_path, one, heartbeat_seconds=30, timeout_seconds=60, received=[], resume_hint=lambda: ""
    )
    one_try.watch([sys.executable, "-c", ENDS_WELL, str(tmp_path)], extra={})
