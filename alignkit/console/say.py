"""Lines of progress, warnings and errors on stderr, from rank 0 only."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from alignkit.console.clean import printable, redact
from alignkit.errors import AlignKitError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

_hushed = False
_record: Callable[[str], None] | None = None
_unrecorded: list[str] = []


def hush() -> None:
    """Say nothing but errors from now on: another process speaks for the job."""
    global _hushed
    _hushed = True


def is_main() -> bool:
    """Tell whether this process speaks for the job."""
    return os.environ.get("RANK", "0") == "0" and not _hushed


def open_console(*, stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=True, highlight=False)


def restore_terminal() -> None:
    """Show the cursor again: a process that was killed while it drew a bar has left it hidden."""
    if sys.stderr.isatty():
        print("\x1b[?25h", end="", file=sys.stderr, flush=True)


def write(text: str = "", *, stderr: bool = False, end: str = "\n") -> None:
    """Write a text to stdout or stderr as it may be shown: everything that is printed passes here."""
    print(printable(text), file=sys.stderr if stderr else sys.stdout, end=end, flush=stderr or not end)


def note(message: str) -> None:
    """Say one line of progress."""
    if is_main():
        write(redact(message), stderr=True)


def warn(message: str) -> None:
    """Say one warning, and hand it to whoever records the run, as it may be shown."""
    message = printable(redact(message))
    note(f"warning: {message}")
    if is_main():
        (_record or _unrecorded.append)(message)


@contextmanager
def recording(record: Callable[[str], None]) -> Iterator[None]:
    """Give `record` every warning that is said meanwhile, and first those said since the last recording ended."""
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
    """Return what an error says, one text per problem."""
    return [str(problem) for problem in error.problems] if isinstance(error, UsageError) else [str(error)]


def print_error(error: AlignKitError) -> None:
    """Say what is wrong: one `error:` line per problem, and how many when there are several.

    A process other than rank 0 says which it is.
    """
    rank = os.environ.get("RANK", "0")
    prefix = "" if rank == "0" else f"rank {rank}: "
    problems = list_problems(error)
    for problem in problems:
        write(redact(f"error: {prefix}{problem}"), stderr=True)
    if len(problems) > 1:
        write(f"{len(problems)} problems; nothing was started", stderr=True)
