"""What happened: metrics as they come, versions, git state, and secrets kept out of all of it."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignkit import console
from alignkit.runs.files import disk_failures

PACKAGES = ("alignkit", "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")


class JsonLines:
    """A file of JSON objects that grows by whole lines; a torn last line is cut when it is opened again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.exists():
            _cut_torn_line(path)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one object and hand it to the operating system."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: _finite(value) for key, value in row.items()}, ensure_ascii=False) + "\n")

    def keep(self, wanted: Any) -> None:
        """Drop the rows for which `wanted(row)` is false: those of steps that a resumed run will take again."""
        if not self._path.exists():
            return
        rows = [line for line in self._lines() if wanted(json.loads(line))]
        temporary = self._path.with_name(self._path.name + ".tmp")
        temporary.write_text("".join(f"{line}\n" for line in rows), encoding="utf-8")
        os.replace(temporary, self._path)

    def read(self) -> list[dict[str, Any]]:
        """Return every row."""
        return [json.loads(line) for line in self._lines()]

    def _lines(self) -> list[str]:
        if not self._path.exists():
            return []
        # Not splitlines: it also cuts at separators such as U+2028, which JSON leaves inside strings.
        return [line for line in self._path.read_text(encoding="utf-8").split("\n") if line]


def _cut_torn_line(path: Path) -> None:
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])


def _finite(value: Any) -> Any:
    """JSON has no NaN: say it as a string rather than write a file that parsers refuse."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def record_warnings(path: Path) -> Iterator[None]:
    """Append every warning that is said meanwhile to the file at `path`: when it was said, and what it says."""

    def record(message: str) -> None:
        with disk_failures(path.parent, path.name):
            now = datetime.now(UTC).isoformat(timespec="seconds")
            JsonLines(path).append({"time": now, "message": console.redact(message)})

    with console.recording(record):
        yield


def versions() -> dict[str, str]:
    """Return the installed versions that can change a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state(directory: Path) -> dict[str, Any] | None:
    """Return commit and dirtiness of the repository around `directory`, or None outside one."""
    command = ["git", "-C", str(directory), "--no-optional-locks"]
    try:
        commit = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        status = subprocess.run([*command, "status", "--porcelain"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}
