"""Tests that need a CUDA device: `make test-gpu` runs them, every other selection leaves them out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session", autouse=True)
def card() -> str:
    """The name of the card; skips where there is none."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device here")
    return str(torch.cuda.get_device_name())


@pytest.fixture
def note(card: str) -> Callable[..., None]:
    """Return a function that prints measured values, and appends them to ALIGNKIT_GPU_LOG where that is set."""

    def say(what: str, **values: object) -> None:
        line = json.dumps({"what": what, "card": card, **values})
        print(line)
        if path := os.environ.get("ALIGNKIT_GPU_LOG"):
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    return say


@pytest.fixture
def run_card(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs `alignkit` in an empty directory; `kill_at` kills it when that file exists."""
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "COLUMNS": "120"}

    def run(*arguments: str, kill_at: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "alignkit", *arguments]
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment | variables, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        while kill_at is not None and process.poll() is None:
            if kill_at.exists():
                process.send_signal(signal.SIGKILL)
            time.sleep(0.02)
        output, _ = process.communicate(timeout=300)
        return subprocess.CompletedProcess(command, process.returncode, output)

    return run
