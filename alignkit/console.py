"""Everything a person or a script sees: the only module that draws.

Results go to stdout, progress, warnings and errors to stderr, from rank 0 only. rich is loaded when something is drawn.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alignkit.errors import AlignKitError, UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_PLAIN_INTERVAL_SECONDS = 10.0


def is_main() -> bool:
    """Tell whether this process speaks for the job."""
    return os.environ.get("RANK", "0") == "0"


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=True, highlight=False)


def note(message: str) -> None:
    """Say one line of progress."""
    if is_main():
        print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Say one warning."""
    note(f"warning: {message}")


def print_error(error: AlignKitError) -> None:
    """Say what is wrong: one `error:` line per problem, and how many when there are several."""
    problems = [str(problem) for problem in error.problems] if isinstance(error, UsageError) else [str(error)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if len(problems) > 1:
        print(f"{len(problems)} problems; nothing was started", file=sys.stderr)


def print_json(data: Any) -> None:
    """Write data to stdout for a script."""
    print(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table to stdout: aligned columns, no decoration a pipe would have to strip."""
    cells = [[str(column) for column in columns], *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    if title:
        print(title)
    for number, row in enumerate(cells):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if number == 0:
            print("  " + "  ".join("-" * width for width in widths))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_stage(stage: Mapping[str, Any], *, will: str) -> None:
    """Write a resolved stage to stdout: what would run, then every value with its origin.

    `stage` is `Stage.to_dict()`.
    """
    name, origins = stage["stage"], stage["origins"]
    print(f"stage {name} ({stage['method']}) of {stage['recipe_path']}")
    print(f"would run: {will}")
    print(f"run directory: {stage['run_dir']}")
    rows: list[tuple[str, Any, str]] = [("seed", stage["seed"], origins.get("seed", "default"))]
    for section, values in (("model", stage["model"]), ("lora", stage["lora"]), ("launch", stage["launch"])):
        rows += [
            (f"{section}.{key}", value, origins.get(f"{section}.{key}", "default"))
            for key, value in (values or {}).items()
        ]
    for values in (stage["options"], stage["trainer"]):
        rows += [(f"{name}.{key}", value, origins.get(f"{name}.{key}", "default")) for key, value in values.items()]
    print_table("", ("key", "from", "value"), [(key, origin, json.dumps(value)) for key, value, origin in rows])


def print_result(result: Mapping[str, Any]) -> None:
    """Write how a stage ended to stdout."""
    print(f"{result['stage']}: {result['status']} at step {result['step']}, model in {result['model_dir']}")
    for key, value in result.get("metrics", {}).items():
        print(f"  {key} = {_cell(value)}")


class TrainingProgress:
    """Steps, loss, reward accuracy, tokens per second and time left: a live bar on a terminal, plain lines elsewhere.

    Plain lines come at the first and last step and at most every ten seconds between.
    """

    def __init__(self, name: str, *, total_steps: int, start_step: int = 0) -> None:
        self._name, self._total, self._start = name, total_steps, start_step
        self._began = self._last_line = time.monotonic()
        self._shown_step = -1
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if is_main() and sys.stderr.isatty():
            self._open_bar()

    def _open_bar(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=_console(stderr=True),
        )
        self._task = self._bar.add_task(self._name, total=self._total, completed=self._start, facts="")
        self._bar.start()

    def update(self, step: int, facts: Mapping[str, float]) -> None:
        """Show a step; `facts` are the newest metrics by name."""
        text = " ".join(f"{name} {value:.4g}" for name, value in facts.items())
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, facts=text)
            return
        now = time.monotonic()
        if step == self._shown_step:
            return
        if step in (self._start + 1, self._total) or now - self._last_line >= _PLAIN_INTERVAL_SECONDS:
            self._last_line, self._shown_step = now, step
            done = max(step - self._start, 1)
            left = (now - self._began) / done * (self._total - step)
            note(f"{self._name}: step {step}/{self._total} {text} ({left:.0f} s left)")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
