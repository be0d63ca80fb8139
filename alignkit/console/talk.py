"""A conversation on the terminal: what is typed, and answers as they grow."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from alignkit.console.clean import printable
from alignkit.console.say import note, open_console, write

if TYPE_CHECKING:
    from rich.columns import Columns


def ask(prompt: str) -> str | None:
    """Return the next line that is typed or piped in, None at its end; Ctrl-C at the prompt starts a new line.

    The prompt is shown on a terminal only. With two Ctrl-C in a row the input counts as ended.
    """
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    import readline  # noqa: F401 - editing and history

    interrupted = False
    while True:
        try:
            return input(prompt)
        except EOFError:
            write(stderr=True)
            return None
        except KeyboardInterrupt:
            write(stderr=True)
            if interrupted:
                return None
            interrupted = True
            note("(Ctrl-D or a second Ctrl-C leaves)")


def stream(answers: Mapping[str, Iterator[str]]) -> None:
    """Write answers to stdout as they grow: one as it comes; several side by side on a terminal, else in turn.

    Each is an iterator of pieces. On KeyboardInterrupt what has come stays on the screen.
    """
    if len(answers) > 1 and sys.stdout.isatty():
        _stream_columns(answers)
        return
    for name, pieces in answers.items():
        if len(answers) > 1:
            write(f"{name}: ", end="")
        try:
            for piece in pieces:
                write(piece, end="")
        finally:
            write()


def _stream_columns(answers: Mapping[str, Iterator[str]]) -> None:
    """Take a piece from each answer in turn and redraw them in columns."""
    from rich.columns import Columns
    from rich.live import Live
    from rich.panel import Panel
    from rich.text import Text

    texts = dict.fromkeys(answers, "")
    console = open_console(stderr=False)
    width = console.width // len(answers) - 1

    def draw() -> Columns:
        return Columns([Panel(Text(text), title=Text(printable(name)), width=width) for name, text in texts.items()])

    growing = dict(answers)
    with Live(draw(), console=console, refresh_per_second=12, vertical_overflow="visible") as live:
        while growing:
            for name in list(growing):
                piece = next(growing[name], None)
                if piece is None:
                    del growing[name]
                else:
                    texts[name] += printable(piece)
            live.update(draw())
