"""A conversation on the terminal: what is typed, and answers as they grow."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from alignkit.console.say import note, open_console

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
            print(file=sys.stderr)
            return None
        except KeyboardInterrupt:
            print(file=sys.stderr)
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
            print(f"{name}: ", end="", flush=True)
        try:
            for piece in pieces:
                print(_printable(piece), end="", flush=True)
        finally:
            print(flush=True)


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
        return Columns([Panel(Text(text), title=name, width=width) for name, text in texts.items()])

    growing = dict(answers)
    with Live(draw(), console=console, refresh_per_second=12, vertical_overflow="visible") as live:
        while growing:
            for name in list(growing):
                piece = next(growing[name], None)
                if piece is None:
                    del growing[name]
                else:
                    texts[name] += _printable(piece)
            live.update(draw())


def _printable(text: str) -> str:
    """Return the text without control characters: a model must not be able to steer the terminal."""
    return "".join(letter for letter in text if letter in "\n\t" or letter.isprintable())
