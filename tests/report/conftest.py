"""Run directories of every kind, written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from written_runs import WriteRun, writer


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Return a function that writes a run directory below the test's own."""
    return writer(tmp_path)
