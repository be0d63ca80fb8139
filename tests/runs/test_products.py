"""Files of a finished run that were changed since are noticed, whatever has become of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.data.sources import locate
from alignkit.errors import RunError
from alignkit.models.files import inspect_model_dir
from alignkit.recipe.schema import DataSource
from alignkit.runs.directory import RunDir, find_damaged_product, require_whole, write_result
from alignkit.runs.files import checksum, describe_files, find_damaged_file


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "stage.json").write_text("{}")
    (tmp_path / "model/model.safetensors").write_bytes(b"123456789")
    (tmp_path / "model/README.md").write_text("the card")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    write_result(RunDir(tmp_path), {"status": "finished"}, [tmp_path / "model", tmp_path / "rows.jsonl"])
    return tmp_path


def test_the_checksum_is_crc_32(run_dir: Path) -> None:
    assert checksum(run_dir / "model/model.safetensors") == "cbf43926"  # the check value of the CRC catalogue
    assert find_damaged_product(run_dir) is None
    (run_dir / "model/README.md").write_text("the card, written anew")
    assert find_damaged_product(run_dir) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.unlink(), "model/model.safetensors is missing"),
        (lambda path: path.write_bytes(b"1234"), "model/model.safetensors has 4 bytes instead of 9"),
        (lambda path: path.write_bytes(b"123456788"), "model/model.safetensors has other bytes than were saved"),
    ],
)
def test_every_reader_of_a_run_notices_damage(run_dir: Path, change: Callable[[Path], object], said: str) -> None:
    change(run_dir / "model/model.safetensors")
    assert find_damaged_product(run_dir) == said
    for read in (
        lambda: require_whole(run_dir / "model"),
        lambda: inspect_model_dir(run_dir / "model", trust_code=False),
        lambda: locate([DataSource(path=str(run_dir / "rows.jsonl"))]),
    ):
        with pytest.raises(RunError, match=f"{said}.*run the stage's own command again"):
            read()


def test_what_no_run_has_made_is_not_looked_at(run_dir: Path) -> None:
    (run_dir / "model/model.safetensors").unlink()
    (run_dir / "stage.json").unlink()
    require_whole(run_dir / "model")


def test_a_torn_result_counts_as_damage_and_one_without_files_is_believed(run_dir: Path) -> None:
    (run_dir / "result.json").write_text('{"status": "fini')
    assert find_damaged_product(run_dir) == "result.json cannot be read (JSONDecodeError)"
    (run_dir / "result.json").write_text(json.dumps({"status": "finished"}))
    assert find_damaged_product(run_dir) is None


def test_large_files_are_read_again_only_where_they_were_touched(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignkit.runs.files._ALWAYS_READ_BYTES", 1)
    weights = run_dir / "model/model.safetensors"
    known = describe_files(run_dir, [weights])
    known["model/model.safetensors"]["crc32"] = "00000000"
    assert find_damaged_file(run_dir, known) is None  # the time of its last change is the same
    assert find_damaged_file(run_dir, known, thorough=True) is not None
    time.sleep(0.05)  # clocks of file systems are coarse
    weights.write_bytes(b"123456780")
    assert find_damaged_file(run_dir, known) == "model/model.safetensors has other bytes than were saved"
