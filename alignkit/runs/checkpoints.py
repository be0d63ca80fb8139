"""Checkpoints that count: sealed by a manifest written last, verified before use, rotated by step."""

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignkit.errors import RunError
from alignkit.runs.files import describe_files, find_damaged_file, put_aside, read_json, sync, write_json

MANIFEST = "alignkit_manifest.json"
SEALED = ".sealed"  # in a run directory: it has had a checkpoint
_STEP = re.compile(r"checkpoint-(\d+)")


def step_of(checkpoint: Path) -> int:
    """Read the optimizer step from the name of a checkpoint directory, -1 from any other name."""
    match = _STEP.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def list_checkpoints(directory: Path, *, sealed: bool = False) -> list[Path]:
    """List the `checkpoint-N` directories, newest step first; with `sealed` only those that have a manifest."""
    found = sorted((path for path in directory.glob("checkpoint-*") if step_of(path) >= 0), key=step_of, reverse=True)
    return [path for path in found if not sealed or (path / MANIFEST).is_file()]


def newest_step(directory: Path) -> int | None:
    """Find the step of the newest sealed checkpoint, None without one; nothing is verified."""
    return next(map(step_of, list_checkpoints(directory, sealed=True)), None)


def _own_checksum(manifest: dict[str, Any]) -> str:
    """Compute the CRC-32 of a manifest's content, its own checksum left out."""
    content = {key: value for key, value in manifest.items() if key != "crc32"}
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def seal(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Sync every file, then write the manifest that makes this checkpoint count, with `facts` in it."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    for path in files:
        sync(path)
    manifest = json.loads(json.dumps({"format": 1, "files": describe_files(checkpoint, files), **facts}, default=str))
    write_json(checkpoint / MANIFEST, {**manifest, "crc32": _own_checksum(manifest)})
    sync(checkpoint.parent)


def find_damage(checkpoint: Path) -> str | None:
    """Find why a checkpoint cannot be used; None when every file is as it was sealed."""
    manifest_path = checkpoint / MANIFEST
    if not manifest_path.is_file():
        return "it was never sealed (the run stopped while it was written, or its manifest is gone)"
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["crc32"] != _own_checksum(manifest):
            return f"{MANIFEST} has other content than was sealed"
        if manifest["step"] != step_of(checkpoint):
            return f"its manifest is of step {manifest['step']}"
        return find_damaged_file(checkpoint, files, thorough=True)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"


def find_resumable(
    directory: Path, *, warn: Callable[[str], None], find_fault: Callable[[Path], str | None] = lambda checkpoint: None
) -> Path | None:
    """Find the newest checkpoint that verifies, setting damaged ones aside as `bad-...` with a warning each.
    `find_fault` says of one whose files are whole why it cannot be loaded all the same. Raises RunError when there were
    sealed checkpoints and none is whole, rather than train from the start in silence."""
    found = list_checkpoints(directory)
    for checkpoint in found:
        reason = find_damage(checkpoint) or find_fault(checkpoint)
        if reason is None:
            return checkpoint
        warn(f"{checkpoint}: {reason}; set aside as {put_aside(checkpoint).name}")
    # Those set aside by an earlier try count too: trying again must not start afresh in silence.
    damaged = sum((path / MANIFEST).is_file() for path in directory.glob("bad-checkpoint-*"))
    if damaged or (directory.parent / SEALED).exists():
        what = f"none of its checkpoints is whole, {damaged} were set aside as bad-*"
        what = what if damaged else "its checkpoints are gone, though the run had saved some; put them back"
        what += "; or start over with --force, which keeps this directory under another name"
        raise RunError(what, where=str(directory))
    return None


def rotate(directory: Path, *, keep: int, best: int | None = None) -> None:
    """Delete all but the newest `keep` sealed checkpoints and that of step `best`, each renamed to `trash-` first."""
    for checkpoint in list_checkpoints(directory, sealed=True)[max(keep, 1) :]:
        if step_of(checkpoint) != best:
            os.replace(checkpoint, checkpoint.with_name(f"trash-{checkpoint.name}"))
    sweep(directory)


def sweep(directory: Path) -> None:
    """Delete what an interrupted rotation left behind."""
    for path in directory.glob("trash-*"):
        shutil.rmtree(path, ignore_errors=True)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read the manifest of a sealed checkpoint."""
    return read_json(checkpoint / MANIFEST)


def expected_bytes(directory: Path, *, first_guess: int) -> int:
    """Estimate the size of the next checkpoint: that of the newest sealed one, or the caller's guess."""
    for newest in list_checkpoints(directory, sealed=True)[:1]:
        return sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    return first_guess
