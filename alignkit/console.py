"""Everything a person or a script sees: the only module that draws.

Results go to stdout, progress, warnings and errors to stderr, from rank 0 only. rich is loaded when something is drawn.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from alignkit.errors import AlignKitError, UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_PLAIN_INTERVAL_SECONDS = 10.0
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


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=True, highlight=False)


def restore_terminal() -> None:
    """Show the cursor again: a process that was killed while it drew a bar has left it hidden."""
    if sys.stderr.isatty():
        print("\x1b[?25h", end="", file=sys.stderr, flush=True)


def note(message: str) -> None:
    """Say one line of progress."""
    if is_main():
        print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Say one warning, and hand it to whoever records the run."""
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
        print(f"error: {prefix}{problem}", file=sys.stderr)
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


def print_launch(launch: Mapping[str, Any]) -> None:
    """Write to stdout what would be started where; `launch` is `Plan.to_dict()`."""
    place = launch["placement"]
    if launch["mode"] == "worker":
        print("would start: nothing, this is one of the processes that a launcher has started")
        return
    if launch["mode"] == "in-process":
        print(f"would start: nothing else, it runs in this process on {place['device']}")
        return
    nodes = f"{place['nodes']} nodes with " if place["nodes"] > 1 else ""
    each = " each" if nodes else ""
    print(f"would start: {nodes}{place['processes']} processes{each} ({place['strategy']}, {place['device']})")
    if nodes:
        known = {key: "not known yet" if place[key] is None else place[key] for key in place}
        print(f"this node: {known['node_rank']}; node 0 at {known['main_address']}:{known['main_port']}")
    print(f"$ {launch['command']}")
    for name in ("config", "deepspeed"):
        if launch[name]:
            print(f"\n{launch[f'{name}_file']}:")
            text = launch[name] if isinstance(launch[name], str) else json.dumps(launch[name], indent=2)
            print("\n".join(f"  {line}" for line in text.splitlines()))


def print_result(result: Mapping[str, Any]) -> None:
    """Write how a stage ended to stdout."""
    made = f"at step {result['step']}, model in {result['model_dir']}" if result["model_dir"] else ""
    print(f"{result['stage']}: {result['status']} {made or 'with {} rows'.format(result['step'])}")
    for key, value in result.get("metrics", {}).items():
        print(f"  {key} = {_cell(value)}")


def print_paths(paths: Mapping[str, str]) -> None:
    """Write what was made and where it is to stdout, one line each."""
    for name, path in paths.items():
        print(f"{name}: {path}")


def print_jobs(jobs: Sequence[Mapping[str, Any]], *, scripts: bool) -> None:
    """Write batch jobs to stdout: what was submitted, or the commands that would, ready for a shell.

    `jobs` are `Job.to_dict()`; with `scripts` their text comes first.
    """
    for job in jobs if scripts else ():
        print(f"# {job['path']}\n{job['script']}")
    if any(job["job_id"] for job in jobs):
        rows = [(job["stage"], job["job_id"], ", ".join(job["depends_on"]) or None, job["path"]) for job in jobs]
        print_table("", ("stage", "job", "after", "script"), rows)
        return
    for number, job in enumerate(jobs, 1):
        # `$job_N` is for the shell to fill in; everything else is quoted.
        line = " ".join(word if word.startswith("--dependency=") else shlex.quote(word) for word in job["submit"])
        print(f"job_{number}=$({line})  # {job['stage']}" if len(jobs) > 1 else line)


def print_run(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> None:
    """Write one line for each stage of a run to stdout: how it ended, or that it did not."""
    by_name = {result["stage"]: result for result in results}
    rows = []
    for name in names:
        result = by_name.get(name, {"status": "not finished"})
        seconds = result.get("wall_seconds")
        rows.append(
            (name, result["status"], result.get("step"), None if seconds is None else f"{seconds:.0f}",
             result.get("model_dir") or None)
        )  # fmt: skip
    print_table("", ("stage", "status", "steps or rows", "seconds", "model"), rows)


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
    console = _console(stderr=False)
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
