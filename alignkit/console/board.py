"""The stages of a run as one live table on a terminal: what is done, what is running and how far, what waits.

Elsewhere it says a line as each stage begins. What others print meanwhile stands above the table.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from alignkit.console.clean import printable
from alignkit.console.say import is_main, note, open_console

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

State = Literal["waiting", "left alone", "running", "finished", "stopped"]
_MARKS: dict[State, str] = {
    "waiting": "[dim]waiting[/]", "left alone": "[dim]left alone[/]", "running": "[bold cyan]running[/]",
    "finished": "[green]finished[/]", "stopped": "[bold red]stopped[/]",
}  # fmt: skip
_board: Board | None = None


def current() -> Board | None:
    """Return the table that is on the screen now, for a bar that would be drawn elsewhere otherwise."""
    return _board


@dataclass
class _Row:
    name: str
    method: str
    why: str
    state: State = "waiting"
    step: int = 0
    total: int = 0
    facts: str = ""
    began: float | None = None
    seconds: float | None = None
    seconds_left: float | None = None


class Board:
    """A table of stages; `rows` are (name, method, why it is run or not)."""

    def __init__(self, rows: Sequence[tuple[str, str, str]]) -> None:
        self._rows = {name: _Row(name, method, why) for name, method, why in rows}
        self._live: Live | None = None

    def __enter__(self) -> Board:
        global _board
        if is_main() and sys.stderr.isatty():
            from rich.live import Live

            self._live = Live(
                get_renderable=self._draw, console=open_console(stderr=True), refresh_per_second=4,
                redirect_stdout=False, transient=True,
            )  # fmt: skip
            self._live.start()
            _board = self
        return self

    def __exit__(self, *_: object) -> None:
        global _board
        _board = None
        for row in self._rows.values():
            if row.state == "running":
                self._end(row, "stopped")
        if self._live is not None:
            self._live.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the table off the screen while other processes write to the terminal."""
        global _board
        if self._live is None:
            yield
            return
        self._live.stop()
        _board = None
        try:
            yield
        finally:
            _board = self
            self._live.start()

    def begin(self, name: str) -> None:
        """Show a stage as running."""
        row = self._rows[name]
        row.state, row.began = "running", time.monotonic()
        if self._live is None:
            number = list(self._rows).index(name) + 1
            note(f"{name} ({number} of {len(self._rows)}): {row.why}")

    def update(self, name: str, step: int, total: int, facts: str, seconds_left: float | None) -> None:
        """Show how far a stage is."""
        if name in self._rows:
            row = self._rows[name]
            row.step, row.total, row.facts, row.seconds_left = step, total, facts, seconds_left

    def end(self, name: str, *, left_alone: bool = False, metrics: Mapping[str, Any] | None = None) -> None:
        """Show a stage as finished, with its first figures."""
        row = self._rows[name]
        self._end(row, "left alone" if left_alone else "finished")
        shown = [(key, value) for key, value in (metrics or {}).items() if isinstance(value, (int, float))][:2]
        row.facts = " ".join(f"{key} {value:.4g}" for key, value in shown)

    def _end(self, row: _Row, state: State) -> None:
        row.state, row.seconds_left = state, None
        if row.began is not None:
            row.seconds = time.monotonic() - row.began

    def _draw(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for column in ("stage", "method", "state", "progress", "steps", "time", "left", "figures"):
            table.add_column(column, no_wrap=True, overflow="ellipsis")
        for row in self._rows.values():
            running = row.state == "running"
            seconds = time.monotonic() - row.began if running and row.began is not None else row.seconds
            bar = ProgressBar(total=row.total, completed=row.step, width=16) if running and row.total else ""
            table.add_row(
                Text(printable(row.name)), row.method, _MARKS[row.state], bar,
                f"{row.step}/{row.total}" if row.total else "",
                "" if seconds is None else _clock(seconds),
                "" if row.seconds_left is None else _clock(row.seconds_left),
                Text(printable(row.facts)) if row.facts else Text(printable(row.why), "dim"),
            )  # fmt: skip
        return table


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
