"""Whole processes timed against each other in one session: A B A B, so that a drifting machine hits both alike.

It judges nothing: it returns what was measured.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """A process to time; `prepare` runs before each start, untimed, and `expect` is its exit code."""

    name: str
    arguments: Sequence[str]
    directory: Path
    expect: int = 0
    variables: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[], None] | None = None


@dataclass(frozen=True)
class Run:
    """One finished process; processor time and memory are the operating system's, of the process and its children."""

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str


def start(command: Command) -> Run:
    """Run a command once. Raises RuntimeError with its output when the exit code is not the expected one."""
    if command.prepare is not None:
        command.prepare()
    with tempfile.TemporaryFile("w+") as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            list(command.arguments),
            cwd=command.directory,
            env={**os.environ, **command.variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode != command.expect:
        raise RuntimeError(f"{command.name} ended with {process.returncode}, not {command.expect}:\n{text[-4000:]}")
    kilobyte = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * kilobyte, text)


def alternate(commands: Sequence[Command], *, runs: int, warmups: int = 1, at_once: int = 1) -> dict[str, list[Run]]:
    """Run the commands in turn, `runs` rounds after `warmups` uncounted ones; return the runs by command name.

    `at_once` of them share the machine: of use where they have one thread each and tell processor seconds."""
    found: dict[str, list[Run]] = {command.name: [] for command in commands}
    with ThreadPoolExecutor(at_once) as pool:
        for number in range(warmups + runs):
            for command, run in zip(commands, pool.map(start, commands), strict=True):
                if number >= warmups:
                    found[command.name].append(run)
                print(f"  {command.name}: {run.wall_seconds:.2f} s", file=sys.stderr, flush=True)
    return found


def median_seconds(runs: Sequence[Run]) -> float:
    """Return the median wall time."""
    return statistics.median(run.wall_seconds for run in runs)


def median_ratio(ours: Sequence[Run], theirs: Sequence[Run]) -> float:
    """Return the median over rounds of our wall time by theirs."""
    pairs = zip(ours, theirs, strict=True)
    return statistics.median(mine.wall_seconds / other.wall_seconds for mine, other in pairs)
