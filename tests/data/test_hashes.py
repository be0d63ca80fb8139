"""Hashes that tell rows apart."""

from __future__ import annotations

import sys
from hashlib import blake2b
from pathlib import Path

import pytest

from alignkit.data import report
from alignkit.data.report import Hashes, Seen
from alignkit.data.rows import Row, digest_row, prompt_key
from alignkit.errors import DiskError, explain


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_everything_but_the_place_counts() -> None:
    row = Row("pair", "p", ("a", "b"), None, None, None, "x:1")
    others = [
        Row("pair", "p", ("b", "a")),
        Row("pair", "pa", ("", "b")),
        Row("pair", "p", ("a", "b"), label=0.5),
        Row("pair", "p", ("a", "b"), margin=0.5),
        Row("ranked", "p", ("a", "b")),
        Row("ranked", "p", ("a", "b"), scores=(2.0, 1.0)),
        Row("pair", [message("user", "p")], ([message("assistant", "a")], [message("assistant", "b")])),
    ]
    assert digest_row(row) == digest_row(Row("pair", "p", ("a", "b"), None, None, None, "y:9"))
    assert len({digest_row(other) for other in [row, *others]}) == len(others) + 1


def test_no_text_can_pass_for_two() -> None:
    assert digest_row(Row("pair", "p", ("a\x1e1:b", "c"))) != digest_row(Row("pair", "p", ("a", "1:b\x1ec")))
    one = [message("user", "a9:assistant:1:b")]
    two = [message("user", "a"), message("assistant", "b")]
    assert digest_row(Row("messages", "", (one,))) != digest_row(Row("messages", "", (two,)))


def test_one_user_turn_is_the_same_prompt_as_its_text() -> None:
    assert prompt_key(Row("pair", " Hi", ("a", "b"))) == prompt_key(Row("prompt", [message("user", "Hi")], ()))
    assert prompt_key(Row("prompt", [message("system", "Hi")], ())) != prompt_key(Row("prompt", "Hi", ()))


def test_hashes_are_the_same_on_disk_as_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [digest_row(Row("text", "", (f"{number % 700}",)))[:8] for number in range(1000)]
    for held_bytes in (1 << 20, 64):
        monkeypatch.setattr(report, "_SPOOL_BYTES", held_bytes)
        hashes = Hashes()
        for value in given:
            hashes.add(value)
        assert hashes._file._rolled is (held_bytes == 64)
        assert len(hashes) == 1000
        assert b"".join(hashes.chunks()) == b"".join(given)
        distinct = sorted({int.from_bytes(value, sys.byteorder) for value in given})
        assert [number for part in hashes.distinct() for number in part.tolist()] == distinct
        assert list(hashes.sort()) == distinct
    assert [len(part) for part in Hashes().distinct()] == [0]


def test_seen_rows_are_told_from_new_ones_in_constant_memory() -> None:
    def private_kib() -> int:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])

    seen, before = Seen(), private_kib()
    for number in range(500_000):
        assert seen.add(blake2b(number.to_bytes(8, "big"), digest_size=16).digest())
    assert private_kib() - before < 24 * 1024  # a set of them took 46 MiB
    assert not any(
        seen.add(blake2b(number.to_bytes(8, "big"), digest_size=16).digest()) for number in range(0, 500_000, 999)
    )


def test_a_full_disk_of_seen_rows_is_a_disk_error() -> None:
    seen = Seen()
    seen._table.execute("PRAGMA max_page_count = 8")  # SQLite's answer is that of a full disk
    with pytest.raises(OSError, match="full") as caught:
        for number in range(10_000):
            seen.add(number.to_bytes(16, "big"))
    assert isinstance(explain(caught.value), DiskError)
