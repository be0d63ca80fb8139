"""How far a training is: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from alignkit.console.board import current
from alignkit.console.clean import printable
from alignkit.console.say import is_main, note, open_console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_PLAIN_INTERVAL_SECONDS = 10.0


class TrainingProgress:
    """Steps, loss, reward accuracy, tokens per second and time left: a live bar on a terminal, plain lines elsewhere.

    While a `Board` is on the screen its row of that name shows them. Plain lines come at the first and last step and at
    most every ten seconds between.
    """

    def __init__(self, name: str, *, total_steps: int, start_step: int = 0) -> None:
        self._name, self._total, self._start = printable(name), total_steps, start_step
        self._began = self._last_line = time.monotonic()
        self._shown_step = -1
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if is_main() and sys.stderr.isatty() and current() is None:
            self._open_bar()

    def _open_bar(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
            TimeRemainingColumn(),
            console=open_console(stderr=True),
        )
        self._task = self._bar.add_task(self._name, total=self._total, completed=self._start, facts="")
        self._bar.start()

    def update(self, step: int, facts: Mapping[str, float]) -> None:
        """Show a step; `facts` are the newest metrics by name."""
        text = printable(" ".join(f"{name} {value:.4g}" for name, value in facts.items()))
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, facts=text)
            return
        now = time.monotonic()
        if step == self._shown_step:
            return
        left = (now - self._began) / max(step - self._start, 1) * (self._total - step)
        if (board := current()) is not None:
            board.update(self._name, step, self._total, text, left)
            return
        if step in (self._start + 1, self._total) or now - self._last_line >= _PLAIN_INTERVAL_SECONDS:
            self._last_line, self._shown_step = now, step
            note(f"{self._name}: step {step}/{self._total} {text} ({left:.0f} s left)")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
