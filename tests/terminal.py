"""alignkit on a real terminal: what is typed, what is on the screen."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A command of alignkit whose input and output are a terminal of 100 columns."""

    def __init__(self, *arguments: str, cwd: Path | None = None) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                                    "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}  # fmt: skip
        self._leader, follower = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "alignkit", *arguments], cwd=cwd,
            stdin=follower, stdout=follower, stderr=follower, env=environment, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(follower)
        self.screen = ""

    def type(self, text: str) -> None:
        os.write(self._leader, text.encode())

    def interrupt_prompt(self) -> None:
        """Type Ctrl-C at a prompt once the command sleeps until something is typed.

        Python's readline module forgets a signal between writing its prompt and waiting for a key, until the next
        key: 6 of 201,782 were lost on a busy machine (measured), none of 138,288 this way.
        """
        stat = Path(f"/proc/{self.process.pid}/stat")
        while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "S":
            time.sleep(0.001)
        self.type("\x03")

    def wait_for(self, wanted: str, *, seconds: float = 60) -> str:
        """Return what was written up to and with the text that is waited for, and forget it."""
        end = time.monotonic() + seconds
        while wanted not in self.screen:
            ready, _, _ = select.select([self._leader], [], [], max(end - time.monotonic(), 0))
            if not ready:
                raise AssertionError(f"{wanted!r} did not come; the screen has {self.screen[-600:]!r}")
            try:
                self.screen += _ESCAPES.sub("", os.read(self._leader, 65536).decode(errors="replace"))
            except OSError as error:
                raise AssertionError(f"it ended before {wanted!r}: {self.screen[-600:]!r}") from error
        found, _, self.screen = self.screen.partition(wanted)
        return found + wanted

    def look(self, *, seconds: float = 0.05) -> None:
        """Take in what is written meanwhile: a command whose screen nobody reads stands still."""
        if select.select([self._leader], [], [], seconds)[0]:
            self.screen += _ESCAPES.sub("", os.read(self._leader, 65536).decode(errors="replace"))

    def read_to_end(self, *, seconds: float = 120) -> str:
        """Return all that is still written, until the command ends."""
        end = time.monotonic() + seconds
        while select.select([self._leader], [], [], max(end - time.monotonic(), 0))[0]:
            try:
                self.screen += _ESCAPES.sub("", os.read(self._leader, 65536).decode(errors="replace"))
            except OSError:
                break
        return self.screen

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._leader)
