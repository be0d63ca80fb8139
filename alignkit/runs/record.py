"""Records of a run: metrics and warnings as they come, versions, git state and hardware."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignkit import console
from alignkit.runs.files import disk_failures, open_own, put_aside, read_lines, scan_lines, tell_bad_lines, write_text

PACKAGES = ("alignkit", "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")


class JsonLines:
    """A file of JSON objects that grows by whole lines; it is mended when it is opened again.

    A torn last line is cut off; lines inside that cannot be used go to `bad-NAME-...` beside it, with a warning.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.is_file() and not path.is_symlink():
            self._mend()

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one object and hand it to the operating system; raises DiskError."""
        line = json.dumps({key: _finite(value) for key, value in row.items()}, ensure_ascii=False) + "\n"
        with disk_failures(self._path.parent, self._path.name):
            descriptor = open_own(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(line)

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the rows for which `wanted(row)` is false: those of steps that a resumed run will take again."""
        if self._path.is_file():
            with self._path.open("rb") as file:
                found = list(scan_lines(file, self._path.name))
            self._rewrite([line for line, row in found if row is not None and wanted(row)])

    def read(self) -> list[dict[str, Any]]:
        """Return every row."""
        return read_lines(self._path)

    def _mend(self) -> None:
        with self._path.open("rb") as file:
            found = list(scan_lines(file, self._path.name))
        bad = [number for number, (_, row) in enumerate(found, 1) if row is None]
        if bad:
            aside = put_aside(self._path)
            self._rewrite([line for line, row in found if row is not None])
            tell_bad_lines(self._path, bad, f"the file as it was is kept as {aside.name}")
        elif sum(len(line) for line, _ in found) < self._path.stat().st_size:
            self._rewrite([line for line, _ in found])

    def _rewrite(self, lines: Sequence[bytes]) -> None:
        write_text(self._path, b"".join(lines).decode("utf-8", "replace"))


def _finite(value: Any) -> Any:
    """JSON has no NaN: say it as a string rather than write a file that parsers refuse."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def record_warnings(path: Path) -> Iterator[None]:
    """Append every warning that is said meanwhile to the file at `path`: when it was said, and what it says."""

    def record(message: str) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        JsonLines(path).append({"time": now, "message": console.redact(message)})

    with console.recording(record):
        yield


def versions() -> dict[str, str]:
    """Look up the installed versions that can change a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state(directory: Path) -> dict[str, Any] | None:
    """Ask git for the commit around `directory` and whether it has changes; None outside a repository."""
    command = ["git", "-C", str(directory), "--no-optional-locks"]
    try:
        commit = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        status = subprocess.run([*command, "status", "--porcelain"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def describe_hardware() -> dict[str, Any]:
    """Describe system, processor, cores, memory and torch's devices, without host or user; loads torch."""
    processor = platform.processor() or platform.machine()
    listing = Path("/proc/cpuinfo")
    if listing.is_file():  # Linux knows the model, Python the architecture only
        lines = listing.read_text(encoding="utf-8", errors="replace").splitlines()
        models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        processor = next(models, processor)
    return {
        "system": platform.platform(terse=True),
        "processor": processor,
        "cores": count_cores(),
        "memory_bytes": memory_bytes(),
        "devices": describe_devices(),
    }


def count_cores() -> int:
    """Count the cores this process may use, which a container or a scheduler can make fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Read the host memory this process may use: physical, or the control group's limit where that is lower."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(physical, int(text)) if text.isdigit() else physical


def describe_devices() -> dict[str, str]:
    """List torch's devices by name with their memory; loads torch."""
    import torch

    devices = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.1f} GiB"
        devices[f"cuda:{index}"] = f"{properties.name}, {memory}, compute capability {capability}"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU, shared memory"
    threads = torch.get_num_threads()
    devices["cpu"] = f"{threads} thread" if threads == 1 else f"{threads} threads"
    return devices
