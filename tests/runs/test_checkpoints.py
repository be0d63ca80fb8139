"""Sealing, verifying, falling back and rotating checkpoints: real files, real damage."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.errors import RunError
from alignkit.runs import checkpoints
from alignkit.runs.files import write_json

FILES = {
    "model.safetensors": b"w" * 5000,
    "optimizer.pt": b"o" * 3000,
    "trainer_state.json": b"{}",
    "rng_state.pth": b"r",
}


def make(directory: Path, step: int, *, sealed: bool = True) -> Path:
    checkpoint = directory / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name, content in FILES.items():
        (checkpoint / name).write_bytes(content)
    if sealed:
        checkpoints.seal(checkpoint, {"step": step, "num_tokens": 0})
    return checkpoint


def zero_tail(content: bytes) -> bytes:
    return content[: len(content) // 2] + bytes(len(content) - len(content) // 2)


def flip_bit(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[len(content) // 2] ^= 4
    return bytes(changed)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"", "cut": lambda content: content[: len(content) // 2], "zero_tail": zero_tail,
    "flip_bit": flip_bit,
}  # fmt: skip


@pytest.mark.parametrize("damage", ["delete", *DAMAGE])
@pytest.mark.parametrize("name", [*FILES, checkpoints.MANIFEST])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_older_one_used(
    tmp_path: Path, name: str, damage: str
) -> None:
    older, newest = make(tmp_path, 9), make(tmp_path, 10)
    content = (newest / name).read_bytes()
    (newest / name).unlink()
    if damage != "delete":
        (newest / name).write_bytes(DAMAGE[damage](content))
    warnings: list[str] = []
    assert checkpoints.find_resumable(tmp_path, warn=warnings.append) == older
    assert len(warnings) == 1 and warnings[0].startswith(str(newest))
    assert not newest.exists()
    assert len(list(tmp_path.glob("bad-checkpoint-10-*"))) == 1


def test_all_damaged_or_gone_is_an_error_and_never_a_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        (make(tmp_path, step) / "optimizer.pt").write_bytes(b"p" * 3000)
    for _ in range(2):  # the second try finds them set aside, and must not start afresh either
        with pytest.raises(RunError, match="none of its checkpoints is whole, 2 were set aside"):
            checkpoints.find_resumable(tmp_path, warn=lambda _: None)
    directory = tmp_path / "checkpoints"
    write_json(directory.parent / checkpoints.SEALED, {"step": 2})
    with pytest.raises(RunError, match="its checkpoints are gone, though the run had saved some"):
        checkpoints.find_resumable(directory, warn=lambda _: None)


def test_a_sealed_checkpoint_that_cannot_be_loaded_is_set_aside(tmp_path: Path) -> None:
    older, newest = make(tmp_path, 9), make(tmp_path, 10)
    warnings: list[str] = []
    faults = {newest: "optimizer.pt cannot be loaded"}
    found = checkpoints.find_resumable(tmp_path, warn=warnings.append, find_fault=faults.get)
    assert found == older and not newest.exists()
    assert warnings[0].startswith(f"{newest}: optimizer.pt cannot be loaded; set aside as bad-checkpoint-10-")


def test_a_partly_written_or_renamed_checkpoint_does_not_count(tmp_path: Path) -> None:
    make(tmp_path, 1, sealed=False)
    assert checkpoints.find_resumable(tmp_path, warn=lambda _: None) is None
    os.rename(make(tmp_path, 5), tmp_path / "checkpoint-50")
    assert checkpoints.find_damage(tmp_path / "checkpoint-50") == "its manifest is of step 5"


def test_rotation_goes_by_step_not_by_time(tmp_path: Path) -> None:
    for step in (2, 10, 9, 1):
        make(tmp_path, step)
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    make(tmp_path, 11, sealed=False)
    checkpoints.rotate(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11", "checkpoint-9"]
    os.rename(tmp_path / "checkpoint-9", tmp_path / "trash-checkpoint-9")  # an interrupted rotation
    checkpoints.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11"]
