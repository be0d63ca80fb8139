"""What the tests of the feedback room share: rows, messages, and where the published files are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

PUBLISHED = Path(__file__).resolve().parents[2] / "../shared/data/constitutional-ai"


def real_data(test: Any) -> Any:
    """Mark a test that needs the published files; it is skipped where they are not."""
    skip = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published files are not beside the repository")
    return pytest.mark.real_data(skip(test))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def messages(*contents: str) -> list[dict[str, str]]:
    """Return turns of user and assistant in their order."""
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]
