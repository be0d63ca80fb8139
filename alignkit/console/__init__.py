"""Everything a person or a script sees: the only room that draws.

Results go to stdout, progress, warnings and errors to stderr, from rank 0 only. rich is loaded when something is drawn.
"""

from alignkit.console.board import Board
from alignkit.console.clean import holds_secret, printable, redact
from alignkit.console.preview import print_preview
from alignkit.console.progress import TrainingProgress
from alignkit.console.say import (
    hush,
    is_main,
    list_problems,
    note,
    print_error,
    recording,
    restore_terminal,
    warn,
    write,
)
from alignkit.console.tables import (
    print_agenda,
    print_jobs,
    print_json,
    print_launch,
    print_paths,
    print_result,
    print_run,
    print_stage,
    print_table,
)
from alignkit.console.talk import ask, stream

__all__ = [
    "Board",
    "TrainingProgress",
    "ask",
    "holds_secret",
    "hush",
    "is_main",
    "list_problems",
    "note",
    "printable",
    "print_agenda",
    "print_error",
    "print_jobs",
    "print_json",
    "print_launch",
    "print_paths",
    "print_preview",
    "print_result",
    "print_run",
    "print_stage",
    "print_table",
    "recording",
    "redact",
    "restore_terminal",
    "stream",
    "warn",
    "write",
]
