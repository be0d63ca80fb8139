"""Files that are whole or absent, records read back by one rule, and checksums. No link is followed."""

import errno
import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from alignkit import console
from alignkit.errors import DISK_FULL_MESSAGES, AlignKitError, DiskError, RunError

# What stands at the place of a file, where more room would not help.
_PLACE_ERRNOS = {
    errno.EBUSY, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG,
}  # fmt: skip
_DISK_ERRNOS = _PLACE_ERRNOS | {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ESTALE,
}  # fmt: skip


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


def open_own(path: Path, flags: int, *, mode: int = 0o666) -> int:
    """Open a file of a run, which is no link; flags as for os.open."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode)


@contextmanager
def replacing(path: Path, *, mode: str = "w") -> Iterator[IO[Any]]:
    """Write a file in the block; at its end it takes the place of `path` in one step, on the disk. Raises DiskError."""
    temporary = path.with_name(path.name + ".tmp")
    with disk_failures(path.parent, path.name):
        temporary.unlink(missing_ok=True)
        try:
            descriptor = open_own(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            with os.fdopen(descriptor, mode, encoding="utf-8" if mode == "w" else None) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a file with this text, in one step and on the disk before returning; raises DiskError."""
    with replacing(path) as file:
        file.write(text)


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n")


# What the records of a run must hold to be used, by their file names; a type with ? may be absent.
_SHAPES: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("records.json").read_text("utf-8"))
_TYPES: Any = {"text": str, "count": int, "number": (int, float), "object": dict, "list": list, "flag": bool}


def _find_fault(name: str, data: Any) -> str | None:
    """Say why a record of this file name cannot be used; None if it can."""
    if not isinstance(data, dict):
        return f"holds {type(data).__name__}, not an object"
    for key, kind in _SHAPES.get(name, {}).items():
        value = data.get(key)
        if not isinstance(value, _TYPES[kind.rstrip("?")]) and not (value is None and kind.endswith("?")):
            return f"has no {key}" if key not in data else f"{key} is {json.dumps(data[key])[:40]}"
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in `path`; raises RunError when it is not readable JSON, or not what such a file holds."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        fault = _find_fault(path.name, data)
    except (OSError, ValueError, RecursionError) as error:
        fault = f"cannot be read ({error})"
    if fault is not None:
        raise RunError(f"{fault}; put the file back as it was, or start over with --force", where=str(path))
    return dict(data)


def read_record(path: Path) -> dict[str, Any]:
    """Read a file that others can do without: empty, after a warning, where it cannot be used."""
    if not os.path.lexists(path):
        return {}
    try:
        return read_json(path)
    except RunError as error:
        console.warn(f"{path}: {error.problems[0].what.partition(';')[0]}; it is left out")
        return {}


def scan_lines(lines: IO[bytes], name: str) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield each whole line of a JSON Lines file with its record, None for an unusable one; only newlines end it."""
    for line in lines:
        if not line.endswith(b"\n"):
            return
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            data = None
        yield line, data if _find_fault(name, data) is None else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the records of a JSON Lines file; lines that cannot be used are left out, with one warning."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        found = [record for line, record in scan_lines(file, path.name) if line.strip()]
    tell_bad_lines(path, [number for number, record in enumerate(found, 1) if record is None], "left out")
    return [record for record in found if record is not None]


def tell_bad_lines(path: Path, numbers: list[int], what: str) -> None:
    """Say, where there are any, which lines of a file cannot be used and what becomes of them."""
    if numbers:
        lines = "1 line" if len(numbers) == 1 else f"{len(numbers)} lines"
        console.warn(f"{path}: {lines} cannot be read (first: line {numbers[0]}); {what}")


def put_aside(path: Path) -> Path:
    """Give a file or directory that cannot be used another name beside the old one, and return it."""
    aside = path.with_name(f"bad-{path.name}-{time.time_ns() // 1_000_000}")
    with disk_failures(path.parent, path.name):
        os.replace(path, aside)
    return aside


@contextmanager
def disk_failures(directory: Path, what: str) -> Iterator[None]:
    """Turn a failed write below `directory` into one DiskError that says what is needed and what is free."""
    try:
        yield
    except AlignKitError:
        raise  # of a block within this one
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        is_full = any(message in str(error) for message in DISK_FULL_MESSAGES)
        if number not in _DISK_ERRNOS and not is_full:
            raise
        reason = os.strerror(number) if number else "no space left, or a quota or a limit on file sizes"
        if number == errno.ELOOP:
            reason = "it is a link, and none is followed out of a run directory"
        remedy = "put that right" if number in _PLACE_ERRNOS else "make room"
        what = f"{directory}: cannot write {what} ({reason}; {describe_bytes(free_bytes(directory))} free); nothing "
        raise DiskError(f"{what}complete was touched: {remedy} and run the same command again") from error


def free_bytes(path: Path) -> int:
    """Count the bytes a user may still write below `path` (or its nearest existing parent)."""
    while not path.exists():
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def describe_bytes(num_bytes: float) -> str:
    """Format a size with a unit, such as `1.3 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


# Checksums: damage is the enemy here, not an attacker, and CRC-32 runs at some GB/s. Larger files are read again only
# where their size, or the time of their last change, is not what it was: a few seconds for each GB would otherwise be
# spent by every command. That time (ctime) cannot be set by hand.
_ALWAYS_READ_BYTES = 1 << 28


def checksum(path: Path) -> str:
    """Compute the CRC-32 of a file as eight hex digits."""
    crc = 0
    with path.open("rb") as file, console.Meter(f"MB of {path.name} hashed", path.stat().st_size >> 20) as meter:
        while chunk := file.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
            meter.advance(len(chunk) >> 20)
    return f"{crc:08x}"


@lru_cache(maxsize=256)
def _checksum_once(path: Path, *_state: int) -> str:  # for each state the file has been in
    return checksum(path)


def describe_files(directory: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Take sizes and checksums of files below a directory, by their names in it."""
    found = {}
    for path in sorted(files):
        state = path.stat()
        facts = {"bytes": state.st_size, "crc32": checksum(path), "changed_ns": state.st_ctime_ns}
        found[path.relative_to(directory).as_posix()] = facts
    return found


def find_damaged_file(directory: Path, files: Mapping[str, Mapping[str, Any]], *, thorough: bool = False) -> str | None:
    """Find a file that is not as `describe_files` found it, None when all are; `thorough` reads large ones too."""
    for name, known in files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        state = path.stat()
        if state.st_size != known["bytes"]:
            return f"{name} has {state.st_size} bytes instead of {known['bytes']}"
        if not thorough and state.st_size > _ALWAYS_READ_BYTES and state.st_ctime_ns == known.get("changed_ns"):
            continue
        if _checksum_once(path, state.st_size, state.st_ctime_ns, state.st_ino) != known["crc32"]:
            return f"{name} has other bytes than were saved"
    return None
