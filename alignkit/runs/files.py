"""Writing files that are either whole or absent, and reading them back; knows nothing of runs."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignkit.errors import DiskError, RunError

_DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}
# What torch.save and safetensors say when a write comes up short: neither keeps the errno.
_DISK_MESSAGES = ("No space left", "unexpected pos", "PytorchStreamWriter failed", "Disk quota", "File too large")


def sync(path: Path) -> None:
    """Flush a file's or a directory's content to the disk; quiet where the file system cannot."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a file with this text, in one step and on the disk before returning."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def write_json(path: Path, data: Any) -> None:
    """Replace `path` by this data as JSON, in one step."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in `path`; raises RunError when it is not readable JSON."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot be read ({error}); start over with --force", where=str(path)) from error
    if not isinstance(data, dict):
        raise RunError("holds no JSON object; start over with --force", where=str(path))
    return data


def is_disk_failure(error: BaseException) -> bool:
    """Tell whether an exception of a save means that the disk is full or not writable."""
    if isinstance(error, OSError) and error.errno in _DISK_ERRNOS:
        return True
    return any(message in str(error) for message in _DISK_MESSAGES)


@contextmanager
def disk_failures(directory: Path, what: str) -> Iterator[None]:
    """Turn a failed write below `directory` into one DiskError that says what is needed and what is free."""
    try:
        yield
    except Exception as error:
        if not is_disk_failure(error):
            raise
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "no space left"
        raise DiskError(
            f"{directory}: cannot write {what} ({reason}; {describe_bytes(free_bytes(directory))} free); "
            "nothing complete was touched: make room and run the same command again"
        ) from error


def free_bytes(path: Path) -> int:
    """Return the bytes a user may still write below `path` (or its nearest existing parent)."""
    while not path.exists():
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def directory_bytes(path: Path) -> int:
    """Return the bytes of all files below `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def describe_bytes(num_bytes: float) -> str:
    """Return a size with a unit, such as `1.3 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
