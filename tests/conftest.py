"""What every test can use: the command line as a real process, and the environment it runs in."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from forks import Forks
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


def clean_environment() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "ALIGNKIT_DEBUG"}
    return environment | {
        "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120",
    }  # fmt: skip


@pytest.fixture
def run_python(tmp_path: Path) -> Run:
    """Run Python with the given arguments in an empty directory, without network; return the finished process."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=clean_environment() | variables, capture_output=True,
            text=True, timeout=600, check=False,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """One process of this worker that others are forks of."""
    shared = Forks()
    yield shared
    shared.close()


@pytest.fixture(scope="session")
def alignkit_in(forks: Forks) -> Run:
    """Run `alignkit` with the given arguments in a directory, as a fork; return the finished process."""

    def run(
        directory: Path, *arguments: str, main: str = "alignkit.cli:main", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryDirectory() as said:
            files = {name: f"{said}/{name}" for name in ("stdout", "stderr")}
            process = {"main": main, "argv": ["alignkit", *arguments], "cwd": str(directory), **files}
            (code,) = forks.run(process | {"env": clean_environment() | variables})
            return subprocess.CompletedProcess(arguments, code, *(Path(path).read_text() for path in files.values()))

    return run


@pytest.fixture
def run_alignkit(alignkit_in: Run, tmp_path: Path) -> Run:
    """Run `alignkit` with the given arguments in an empty directory."""
    return partial(alignkit_in, tmp_path)


@pytest.fixture
def run_code(alignkit_in: Run, tmp_path: Path) -> Run:
    """Run Python code with the given arguments in an empty directory, where the libraries are imported already."""
    return partial(alignkit_in, tmp_path, main="forks:run_code")


@pytest.fixture(scope="session")
def shared_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Return a function that makes a directory of a name, which every worker of pytest-xdist shares.

    Whichever comes first fills it, the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def share(name: str, fill: Callable[[Path], object]) -> Path:
        directory = base / name
        directory.mkdir(exist_ok=True)
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (base / f"{name}.filled").exists():
                fill(directory)
                (base / f"{name}.filled").touch()
        return directory

    return share


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
