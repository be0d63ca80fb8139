"""Metrics files that survive a kill, and secrets that do not get in."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignkit import console
from alignkit.runs.record import JsonLines, memory_bytes, record_warnings, spare_memory_bytes, versions


def test_a_torn_last_line_is_cut_and_the_rest_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    lines = JsonLines(path)
    lines.append({"step": 3, "loss": float("nan")})
    assert lines.read() == [{"step": 1}, {"step": 2}, {"step": 3, "loss": "nan"}]


def test_lines_that_cannot_be_used_go_aside_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    text = '{"step": 1}\n{"st\nnull\n{"step": "x"}\n{"step": 2}\n'
    path.write_text(text)
    assert JsonLines(path).read() == [{"step": 1}, {"step": 2}]
    (aside,) = tmp_path.glob("bad-metrics.jsonl-*")
    assert aside.read_text() == text
    assert (
        f"3 lines cannot be read (first: line 2); the file as it was is kept as {aside.name}" in capsys.readouterr().err
    )


def test_rows_of_steps_that_come_again_are_dropped_and_a_text_keeps_its_separators(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "samples.jsonl")
    for step in (1, 2, 3):
        lines.append({"step": step, "answer": "one\u2028two\u0085three"})
    lines.keep(lambda row: row["step"] <= 2)
    assert lines.read() == [{"step": step, "answer": "one\u2028two\u0085three"} for step in (1, 2)]


def test_versions_name_what_can_change_a_result() -> None:
    assert {"python", "torch", "transformers", "trl", "peft"} <= versions().keys()


def test_spare_memory_is_that_of_the_machine_and_of_the_control_group_where_a_cache_counts_as_free(
    tmp_path: Path,
) -> None:
    assert 0 < spare_memory_bytes(tmp_path) <= memory_bytes()
    (tmp_path / "memory.current").write_text("7000\n")
    (tmp_path / "memory.stat").write_text("anon 4000\nfile 3000\ninactive_file 2000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert spare_memory_bytes(tmp_path) > 10**6
    (tmp_path / "memory.max").write_text("9000\n")
    assert spare_memory_bytes(tmp_path) == 4000  # 9000 less 5000 that cannot go


def test_warnings_are_kept_with_their_time_and_without_secrets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with record_warnings(tmp_path / "before.jsonl"):
        pass  # what other tests in this process have said
    monkeypatch.delenv("RANK", raising=False)
    path = tmp_path / "warnings.jsonl"
    console.warn("said before the run was known")
    with record_warnings(path):
        console.warn("the token hf_abcdefghijklmnop is wrong")
        console.note("no warning")
        monkeypatch.setenv("RANK", "1")
        console.warn("rank 1 says nothing")
    monkeypatch.delenv("RANK")
    assert [row["message"] for row in JsonLines(path).read()] == [
        "said before the run was known",
        "the token [redacted] is wrong",
    ]
    assert all(row["time"].endswith("+00:00") for row in JsonLines(path).read())
    with record_warnings(tmp_path / "next.jsonl"):
        pass
    assert not (tmp_path / "next.jsonl").exists()
    assert "warning: said before the run was known" in capsys.readouterr().err
