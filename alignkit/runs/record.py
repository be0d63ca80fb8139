"""Records of a run: metrics and warnings as they come, versions, git state and hardware."""

import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignkit import console
from alignkit.runs.files import disk_failures, open_own, put_aside, read_lines, scan_lines, tell_bad_lines, write_text

PACKAGES = ("alignkit", "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")
began: list[float] = []  # when this process took a stage up, before the stage's libraries were loaded


class JsonLines:
    """A file of JSON objects that grows by lines; when opened, a torn end is cut off and bad lines are put aside."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.is_file() or path.is_symlink():
            return
        num_bytes, lines = path.stat().st_size, self._scan()
        bad = [number for number, (_, row) in enumerate(lines, 1) if row is None]
        aside = put_aside(path) if bad else path
        if bad or sum(len(line) for line, _ in lines) < num_bytes:
            self._write(line for line, row in lines if row is not None)
        tell_bad_lines(path, bad, f"the file as it was is kept as {aside.name}")

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one object, NaN as a string (JSON has none), and hand it to the operating system; raises DiskError."""
        odd = {key: str(value) for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
        with disk_failures(self._path.parent, self._path.name):
            descriptor = open_own(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(json.dumps({**row, **odd}, ensure_ascii=False) + "\n")

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the rows for which `wanted(row)` is false: those of steps that a resumed run will take again."""
        if self._path.is_file():
            self._write(line for line, row in self._scan() if row is not None and wanted(row))

    def read(self) -> list[dict[str, Any]]:
        return read_lines(self._path)

    def _scan(self) -> list[tuple[bytes, dict[str, Any] | None]]:
        with self._path.open("rb") as file:
            return list(scan_lines(file, self._path.name))

    def _write(self, lines: Iterable[bytes]) -> None:
        write_text(self._path, b"".join(lines).decode("utf-8", "replace"))


def record_warnings(path: Path) -> AbstractContextManager[None]:
    """Append every warning that is said meanwhile to the file at `path`: when it was said, and what it says."""

    def record(message: str) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        JsonLines(path).append({"time": now, "message": console.redact(message)})

    return console.recording(record)


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Look up the installed versions that can change a result."""
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_state(directory: Path) -> dict[str, Any] | None:
    """Ask git for the commit around `directory` and whether it has changes; None outside a repository."""
    command = ["git", "-C", str(directory), "--no-optional-locks", "status", "--porcelain=v2", "--branch"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    commit = re.search(r"(?m)^# branch.oid (\w+)", told)  # none before the first one
    return {"commit": commit[1], "dirty": bool(re.search(r"(?m)^[^#]", told))} if commit else None


def find_commit() -> str | None:
    """Find the commit that alignkit itself is of: written down when it was built, or of its clone."""
    package = Path(__file__).parents[1]
    if (stamp := package / "COMMIT").is_file():
        return stamp.read_text(encoding="utf-8").strip()
    state = git_state(package.parent) if (package.parent / ".git").exists() else None
    return f"{state['commit'][:9]}{', changed' if state['dirty'] else ''}" if state else None


def describe_hardware() -> dict[str, Any]:
    """Describe system, processor, cores, memory and torch's devices, without host or user; loads torch."""
    processor = platform.processor() or platform.machine()
    with suppress(OSError):  # Linux knows the model, Python the architecture only
        listing = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if model := re.search(r"^model name\s*:\s*(.*\S)", listing, re.MULTILINE):
            processor = model[1]
    found = {"system": platform.platform(terse=True), "processor": processor, "cores": count_cores()}
    return {**found, "memory_bytes": memory_bytes(), "devices": describe_devices()}


def count_cores() -> int:
    """Count the cores this process may use, which a container or a scheduler can make fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Read the host memory this process may use: physical, or the control group's limit where that is lower."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(physical, int(text)) if text.isdigit() else physical


def spare_memory_bytes(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Read how much more host memory this process may take before something is swapped or killed; 0 if nothing says."""
    facts, limit = Path("/proc/meminfo"), group / "memory.max"
    if not facts.is_file():
        return 0
    spare = 1024 * int(facts.read_text().partition("MemAvailable:")[2].split()[0])
    if limit.is_file() and (most := limit.read_text().strip()).isdigit():
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])  # a cache that can go
        spare = min(spare, int(most) - used)
    return spare


def describe_devices() -> dict[str, str]:
    """List torch's devices by name with their memory; loads torch."""
    import torch

    devices = {}
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = f"{found.total_memory / 2**30:.1f} GiB"
        devices[f"cuda:{index}"] = f"{found.name}, {memory}, compute capability {found.major}.{found.minor}"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU, shared memory"
    threads = torch.get_num_threads()
    return {**devices, "cpu": f"{threads} thread" if threads == 1 else f"{threads} threads"}
