"""Files as they were when they counted: sizes and checksums, and what has become of them since.

Damage is the enemy here, not an attacker: CRC-32 runs at some GB/s. Every room may look: each reads files that a run
has made.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from alignkit.errors import RunError

RESULT = "result.json"
PRODUCTS = ("model", "rows.jsonl")  # what others take from a run
_CHUNK_BYTES = 1 << 22
# Larger files are read again only where their size, or the time of their last change, is not what it was: a few seconds
# for each GB would otherwise be spent by every command. That time (ctime) cannot be set by hand.
_ALWAYS_READ_BYTES = 1 << 28


def checksum(path: Path) -> str:
    """Return the CRC-32 of a file as eight hex digits."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def describe(directory: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Take sizes and checksums of files below a directory, by their names in it."""
    found = {}
    for path in sorted(files):
        state = path.stat()
        facts = {"bytes": state.st_size, "crc32": checksum(path), "changed_ns": state.st_ctime_ns}
        found[path.relative_to(directory).as_posix()] = facts
    return found


def find_damage(directory: Path, files: Mapping[str, Mapping[str, Any]], *, thorough: bool = False) -> str | None:
    """Return which file is not as `describe` found it, None when all are; `thorough` reads large ones in any case.

    Raises what a mapping of another shape makes it raise: KeyError, TypeError, AttributeError.
    """
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


def find_damaged_product(run_dir: Path) -> str | None:
    """Return which of a finished run's files (weights, rows) is not as its result.json says, None when all are.

    Runs of earlier versions, whose result names no files, are believed.
    """
    try:
        files = json.loads((run_dir / RESULT).read_text(encoding="utf-8")).get("files", {})
        return find_damage(run_dir, files)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{RESULT} cannot be read ({type(error).__name__})"


def require_whole(product: Path) -> None:
    """Raise RunError when `product`, a model directory or a file of rows, is of a finished run and was damaged since.

    What no run of ours has made is not looked at.
    """
    product = product.absolute()
    if product.name == "critic":  # of a ppo run, inside its model
        product = product.parent
    if product.name not in PRODUCTS:
        return
    run_dir = product.parent
    if (run_dir / "stage.json").is_file() and (damage := find_damaged_product(run_dir)) is not None:
        raise RunError(
            f"{damage}: it was damaged after the run had finished; run the stage's own command again, which makes it "
            "anew from the last checkpoint, or put the file back",
            where=str(run_dir),
        )


@lru_cache(maxsize=256)
def _checksum_once(path: Path, *_state: int) -> str:
    """Return the checksum of a file, read once in this process for each state it has been in."""
    return checksum(path)
