"""All that is seen in the terminal: results on stdout; progress, warnings and errors on stderr, from rank 0 only."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from alignkit.errors import AlignKitError, UsageError

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

_Item = TypeVar("_Item")
# The shapes of secrets: recipes, records, messages, pages and uploads are all searched for them.
_SECRET = re.compile("|".join(Path(__file__).with_name("secrets.txt").read_text("utf-8").splitlines()), re.DOTALL)
# C0 and C1 controls but tab and line feed, marks that reverse the direction of writing, halves of surrogate pairs.
_CONTROL = re.compile("\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def redact(text: str) -> str:
    """Replace everything that looks like a credential."""
    return _SECRET.sub(lambda found: f"{found['name'] or found['query'] or ''}[redacted]", text)


def holds_secret(text: str) -> bool:
    return bool(_SECRET.search(text))


def printable(text: str) -> str:
    """Replace control characters: a model, a server or a file must not steer the terminal."""
    return _CONTROL.sub("\ufffd", text)


hushed = False  # nothing but errors is said: another process speaks for the job
_record: Callable[[str], None] | None = None
_unrecorded: list[str] = []


def is_main() -> bool:
    """Tell whether this process speaks for the job."""
    return os.environ.get("RANK", "0") == "0" and not hushed


def write(text: str = "", *, stderr: bool = False, end: str = "\n") -> None:
    """Write a text to stdout or stderr, control characters replaced."""
    print(printable(text), file=sys.stderr if stderr else sys.stdout, end=end, flush=stderr or not end)


def note(message: str) -> None:
    if is_main():
        write(redact(message), stderr=True)


def warn(message: str) -> None:
    """Write one warning, and hand it to whoever records the run."""
    message = printable(redact(message))
    note(f"warning: {message}")
    if is_main():
        (_record or _unrecorded.append)(message)


@contextmanager
def recording(record: Callable[[str], None]) -> Iterator[None]:
    """Give `record` every warning of the block, and first those said since the last recording ended."""
    global _record
    before, _record = _record, record
    try:
        for message in _unrecorded:
            record(message)
        _unrecorded.clear()
        yield
    finally:
        _record = before


def list_problems(error: AlignKitError) -> list[str]:
    return [str(problem) for problem in error.problems] if isinstance(error, UsageError) else [str(error)]


def print_error(error: AlignKitError) -> None:
    """Write one `error:` line per problem, and how many there are; a process other than rank 0 says which it is."""
    rank = os.environ.get("RANK", "0")
    prefix = "" if rank == "0" else f"rank {rank}: "
    problems = list_problems(error)
    for problem in problems:
        write(redact(f"error: {prefix}{problem}"), stderr=True)
    if len(problems) > 1:
        write(f"{len(problems)} problems; nothing was started", stderr=True)


def _open_console(*, stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=True, highlight=False)


def restore_terminal() -> None:
    """Show the cursor again: a process that was killed while it drew a table has left it hidden."""
    if sys.stderr.isatty():
        print("\x1b[?25h", end="", file=sys.stderr, flush=True)


_STATES = {
    "waiting": "dim", "left alone": "dim", "running": "bold cyan", "finished": "green", "stopped": "bold red",
}  # fmt: skip
_LINE_INTERVAL_SECONDS = 10.0
_board: Board | None = None  # the table on the screen now


@dataclass
class _Row:
    name: str
    method: str
    why: str
    state: str = "waiting"
    step: int = 0
    total: int = 0
    facts: str = ""
    began: float | None = None
    ended: float | None = None
    seconds_left: float | None = None


class Board:
    """The stages of a run, (name, method, why), as a table; a line as each begins where stderr is no terminal."""

    def __init__(self, rows: Sequence[tuple[str, str, str]]) -> None:
        self._rows = {row[0]: _Row(*row) for row in rows}
        self.doing = ""  # what the running stage does beside its steps
        self._live: Live | None = None

    def __enter__(self) -> Board:
        global _board
        if is_main() and sys.stderr.isatty():
            from rich.live import Live

            self._live = Live(
                get_renderable=self._draw, console=_open_console(stderr=True), refresh_per_second=4,
                redirect_stdout=False, transient=len(self._rows) != 1)  # fmt: skip
            self._live.start()
            _board = self
        return self

    def __exit__(self, *_: object) -> None:
        global _board
        _board = None
        for row in self._rows.values():
            if row.state == "running":
                self.end(row.name, state="stopped")
        if self._live is not None:
            self._live.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the table off the screen while other processes write to the terminal."""
        global _board
        if self._live is not None:
            self._live.stop()
        _board = None
        try:
            yield
        finally:
            if self._live is not None:
                _board = self
                self._live.start()

    def begin(self, name: str) -> None:
        row = self._rows[name]
        row.state, row.began = "running", time.monotonic()
        if self._live is None:
            note(f"{name} ({list(self._rows).index(name) + 1} of {len(self._rows)}): {row.why}")

    def update(self, name: str, step: int, total: int, facts: str, seconds_left: float | None) -> None:
        if row := self._rows.get(name):
            row.step, row.total, row.facts, row.seconds_left = step, total, facts, seconds_left

    def end(self, name: str, *, state: str = "finished", metrics: Mapping[str, Any] | None = None) -> None:
        """Show a stage as ended, with the first two of its metrics."""
        row = self._rows[name]
        row.state, row.seconds_left, row.ended = state, None, time.monotonic()
        if metrics is not None:
            shown = [f"{key} {value:.4g}" for key, value in metrics.items() if isinstance(value, (int, float))]
            row.facts = " ".join(shown[:2])

    def _draw(self) -> Table | Group:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_header=bool(self._rows))
        for column in ("stage", "method", "state", "progress", "steps", "time", "left"):
            table.add_column(column, no_wrap=True, overflow="ellipsis")
        table.add_column("figures")  # which alone gives way where the terminal is narrow
        for row in self._rows.values():
            running = row.state == "running"
            seconds = None if row.began is None else (row.ended or time.monotonic()) - row.began
            times = (seconds, row.seconds_left)
            clocks = ["" if each is None else str(timedelta(seconds=round(each))) for each in times]
            table.add_row(
                Text(printable(row.name)), row.method, Text(row.state, _STATES[row.state]),
                ProgressBar(total=row.total, completed=row.step, width=16) if running and row.total else "",
                f"{row.step}/{row.total}" if row.total else "", *clocks,
                Text(printable(row.facts or row.why), "" if row.facts else "dim", no_wrap=True, overflow="ellipsis"),
            )  # fmt: skip
        return Group(table, Text(printable(self.doing), "cyan")) if self.doing else table


class TrainingProgress:
    """How far a training is: a row of the table on the screen, a table of its own, or lines every ten seconds."""

    def __init__(self, name: str, *, total_steps: int, start_step: int = 0) -> None:
        self._name, self._total, self._start, self._step = name, total_steps, start_step, -1
        self._began = self._last_line = time.monotonic()
        self._own: Board | None = None
        if is_main() and sys.stderr.isatty() and _board is None:
            self._own = Board([(name, "", "")]).__enter__()
            self._own.begin(name)
            self._own.update(name, start_step, total_steps, "", None)

    def update(self, step: int, facts: Mapping[str, float]) -> None:
        if step == self._step and _board is None:
            return
        self._step, now = step, time.monotonic()
        text = printable(" ".join(f"{name} {value:.4g}" for name, value in facts.items()))
        left = (now - self._began) / max(step - self._start, 1) * (self._total - step)
        if _board is not None:
            _board.update(self._name, step, self._total, text, left)
        elif step in (self._start + 1, self._total) or now - self._last_line >= _LINE_INTERVAL_SECONDS:
            self._last_line = now
            note(f"{self._name}: step {step}/{self._total} {text} ({left:.0f} s left)")

    def close(self) -> None:
        if self._own is not None:
            if self._step >= self._total:
                self._own.end(self._name)
            self._own.__exit__()


_meters: list[Meter] = []  # from the outermost one inwards
_BAR_WIDTH, _TICK_SECONDS = 16, 0.25


class Meter:
    """How far a piece of work is, and, where its `total` is known, the time left: under the table on the screen, or
    alone there; where stderr is no terminal a line every ten seconds. Meters within meters are told in one line, those
    of other threads than the main one in none."""

    def __init__(self, what: str, total: int | None = None) -> None:
        self._what, self._total, self.done = what, total, 0
        self._own: Board | None = None

    def __enter__(self) -> Meter:
        self._began = self._said = self._shown = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            _meters.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self in _meters:
            _meters.remove(self)
            if _board is not None:
                _board.doing = ""
        if self._own is not None:
            self._own.__exit__()

    def advance(self, by: int = 1) -> None:
        """Count what is done, and show it where it is time to."""
        self.done += by
        if self not in _meters:
            return
        first, now = _meters[0], time.monotonic()
        if now - first._shown < _TICK_SECONDS or not is_main():
            return
        first._shown = now
        if sys.stderr.isatty() and _board is None:
            first._own = Board(()).__enter__()
        if _board is not None:
            _board.doing = ", ".join(map(str, _meters))
        elif now - first._said >= _LINE_INTERVAL_SECONDS:
            first._said = now
            note(", ".join(map(str, _meters)))

    def over(self, items: Iterable[_Item]) -> Iterator[_Item]:
        for item in items:
            yield item
            self.advance()

    def __str__(self) -> str:
        if not self._total:
            return f"{self._what}: {self.done}"
        full = round(_BAR_WIDTH * self.done / self._total)
        bar = "\u2588" * full + "\u2591" * (_BAR_WIDTH - full) + " " if _board is not None else ""
        told = f"{self._what}: {bar}{self.done} of {self._total}"
        if not self.done:
            return told
        seconds = (time.monotonic() - self._began) / self.done * (self._total - self.done)
        return f"{told} ({seconds:.0f} s left)"


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say every ten seconds that a piece of work goes on which cannot tell how far it is: weights are loaded."""
    ended, began = threading.Event(), time.monotonic()

    def say() -> None:
        while not ended.wait(_LINE_INTERVAL_SECONDS):
            note(f"{what} ({time.monotonic() - began:.0f} s)")

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def print_json(data: Any) -> None:
    """Write data for a script; control characters become JSON's own escapes."""
    text = json.dumps(data, indent=2, ensure_ascii=False, default=str)
    print(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    write(f"{title}\n" * bool(title) + _lay_out(columns, rows))


def _lay_out(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [[str(column) for column in columns], *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (cells[0], ["-" * width for width in widths], *cells[1:])
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"  {'  '.join(line)}".rstrip() for line in padded)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else printable(str(value))


@cache
def _open_texts() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"json": json.dumps, "cell": _cell, "quote": shlex.quote}
    environment.globals["table"] = _lay_out
    return environment.get_template("texts.jinja").module


def print_text(name: str, *given: Any) -> None:
    """Write a text of texts.jinja, such as `stage` or `plan`, made of what its macro is given."""
    write(str(getattr(_open_texts(), name)(*given)), end="")


_TOKEN_STYLES = {"learnt": "bold green", "scored": "bold black on yellow", "read": "", "padding": "dim"}
_TOKEN_MARKS = {"learnt": ("[[", "]]"), "scored": ("{{", "}}"), "padding": ("((", "))")}
_WIDE = 120  # columns from which chosen and rejected stand beside each other


def print_preview(preview: Mapping[str, Any]) -> None:
    """Write rows, counts and findings; `preview` is that of `preview_stage`."""
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.text import Text

    console = _open_console(stderr=False)
    coloured = console.is_terminal and not console.no_color
    legend = Text.assemble(
        ("learnt", _TOKEN_STYLES["learnt"]), "  read  ", ("scored", _TOKEN_STYLES["scored"]), "  ", ("padding", "dim"),
        "  ", ("control tokens", "underline"))  # fmt: skip

    def mark(sequence: Mapping[str, Any]) -> Text:
        text = Text()
        for span in sequence["spans"]:
            opening, closing = ("", "") if coloured else _TOKEN_MARKS.get(span["kind"], ("", ""))
            text.append(opening)
            for number, token in enumerate(span["tokens"]):
                style = _TOKEN_STYLES[span["kind"]] + (" underline" if number in span["special"] else "")
                text.append(printable(token), style.strip() if coloured else "")
            text.append(closing)
        if sequence["num_left_out"]:
            text.append(f" and {sequence['num_left_out']} tokens more", "dim")
        return text

    console.print(Text(printable(f"{preview['stage']} ({preview['method']})"), "bold"))
    console.print(legend if coloured else Text("[[learnt]]  read  {{scored}}  ((padding))"))
    for number, row in enumerate(preview["rows"], 1):
        panels = []
        for sequence in row["sequences"]:
            title = f"row {number}" + (f", {sequence['label']}" if sequence["label"] else "")
            panels.append(Panel(mark(sequence), title=title, title_align="left", border_style="dim"))
        wide = len(panels) == 2 and console.width >= _WIDE
        shown = [Columns(panels, width=console.width // 2 - 1, expand=True)] if wide else panels
        console.print(*shown, sep="\n", soft_wrap=False)  # long lines are folded: no token is cut off
    for name, value in preview["facts"].items():
        console.print(Text(printable(f"{name}: {value}")))
    for finding in preview["findings"]:
        console.print(Text(printable(f"warning: {finding}"), "yellow"))
    if not preview["findings"]:
        console.print(Text("nothing looks wrong", "green"))


def ask(prompt: str) -> str | None:
    """Read the next line that is typed or piped in, None at its end, or after two Ctrl-C in a row."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    import readline  # noqa: F401 - editing and history

    for again in (False, True):
        try:
            return input(prompt)
        except (EOFError, KeyboardInterrupt) as ended:
            write(stderr=True)
            if again or isinstance(ended, EOFError):
                break
            note("(Ctrl-D or a second Ctrl-C leaves)")
    return None


def stream(answers: Mapping[str, Iterator[str]]) -> None:
    """Write answers to stdout as their pieces come: several side by side on a terminal, else one after the other."""
    if len(answers) > 1 and sys.stdout.isatty():
        from rich.columns import Columns
        from rich.live import Live
        from rich.panel import Panel
        from rich.text import Text

        texts, growing, console = dict.fromkeys(answers, ""), dict(answers), _open_console(stderr=False)
        width = console.width // len(answers) - 1
        with Live(console=console, refresh_per_second=12, vertical_overflow="visible") as live:
            while growing:  # a piece of each in turn
                for name in list(growing):
                    if (piece := next(growing[name], None)) is None:
                        del growing[name]
                    else:
                        texts[name] += printable(piece)
                live.update(Columns([Panel(Text(text), title=Text(printable(name)), width=width)
                                     for name, text in texts.items()]))  # fmt: skip
        return
    for name, pieces in answers.items():
        if len(answers) > 1:
            write(f"{name}: ", end="")
        try:
            for piece in pieces:
                write(piece, end="")
        finally:
            write()
