"""What every test can use: the command line as a real process, and the environment it runs in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from terminal import Terminal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # quicker with tiny models, and a fork of several threads would hang
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background of a shell, which processes inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return REPOSITORY


@pytest.fixture
def run_python(tmp_path: Path) -> Run:
    """Run Python with the given arguments in an empty directory, without network; return the finished process."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "ALIGNKIT_DEBUG"}
        environment |= {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    return run


@pytest.fixture
def run_alignkit(run_python: Run) -> Run:
    """Run `python -m alignkit` with the given arguments in an empty directory."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return run_python("-m", "alignkit", *arguments, **variables)

    return run


@pytest.fixture
def open_terminal() -> Iterator[Callable[..., Terminal]]:
    """Return a function that starts `alignkit` with the given arguments in a terminal of its own."""
    opened: list[Terminal] = []

    def start(*arguments: str, **options: Any) -> Terminal:
        opened.append(Terminal(*arguments, **options))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()
