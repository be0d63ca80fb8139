from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from alignkit.feedback.cache import Store, key_of


def test_records_are_there_again_after_opening(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.jsonl")
    store.put([("a", {"text": "one\nline \u2028 and é", "n": 1})])
    store.put([("b", {"n": 2}), ("c", {"text": "x" * 50_000}), ("a", {"n": 99})])
    assert store.get("a") == {"key": "a", "text": "one\nline \u2028 and é", "n": 1}  # the first one stays
    store.close()
    again = Store(tmp_path / "s.jsonl")
    assert len(again) == 3 and "b" in again and again.get("d") is None
    assert [record["key"] for record in again.values()] == ["a", "b", "c"]
    assert again.get("c") == {"key": "c", "text": "x" * 50_000}


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "s.jsonl"
    records = [("a", {"n": 1}), ("b", {"text": "second record that is torn"})]
    with closing(Store(path)) as store:
        store.put(records)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with closing(Store(path)) as store:
        assert len(store) == 1 and store.get("b") is None
        store.put([records[1]])
    assert path.read_bytes() == whole


def test_damaged_lines_inside_are_named_and_asked_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.jsonl"
    store = Store(path)
    store.put([(key, {"n": number}) for number, key in enumerate("abc")])
    store.close()
    lines = path.read_bytes().splitlines(keepends=True)
    changed = lines[1].replace(b'"n": 1', b'"n": 7')  # JSON still, with another answer than was given
    of_earlier_version = b'{"key": "d", "n": 3}\n'
    path.write_bytes(lines[0] + bytes(20) + b"\n" + changed + lines[2] + of_earlier_version)
    store = Store(path)
    found = [store.get(key) for key in "abcd"]
    assert found == [{"key": "a", "n": 0}, None, {"key": "c", "n": 2}, {"key": "d", "n": 3}]
    said = f"warning: {path}: 2 lines cannot be read (first: line 2); what they answered is asked again"
    assert said in capsys.readouterr().err
    store.put([("b", {"n": 1})])
    store.close()
    assert Store(path).get("b") == {"key": "b", "n": 1}


def test_threads_may_put_at_the_same_time(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.jsonl")

    def put(number: int) -> None:
        for n in range(20):
            store.put([(f"{number} {n}", {"text": "y" * (100 * number + n)})])

    threads = [threading.Thread(target=put, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Store(tmp_path / "s.jsonl")) == 120
    assert all(
        store.get(f"{a} {b}") == {"key": f"{a} {b}", "text": "y" * (100 * a + b)} for a in range(6) for b in (0, 19)
    )


def test_questions_are_asked_once_with_a_file_and_without_one(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def count(letters: list[str]) -> list[int]:
        asked.append(letters)
        return [ord(letter) - ord("a") for letter in letters]

    for path in (tmp_path / "deep" / "cache.jsonl", None):
        asked.clear()
        store = Store(path)
        assert store.ask("x", ["a", "b", "a", "c"], count, batch_size=2) == [0, 1, 0, 2]
        assert store.ask("x", ["c", "d", "a"], count) == [2, 3, 0] and store.ask("y", ["a"], count) == [0]
        assert asked == [["a", "b"], ["c"], ["d"], ["a"]]


def test_half_a_surrogate_pair_is_kept_as_an_escape(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.jsonl")
    store.put([("a", {"text": "half \ud83d"})])
    record = store.get("a")
    assert record is not None and record["text"].startswith("half ")
    assert len(Store(tmp_path / "s.jsonl")) == 1


def test_keys_differ_when_any_fact_does() -> None:
    keys = {key_of(ask="a", n=1), key_of(ask="a", n=2), key_of(ask="b", n=1), key_of(ask="a", n="1"), key_of(ask="a")}
    assert len(keys) == 5
    assert key_of(a=1, b=2) == key_of(b=2, a=1)


FULL = """
import resource, sys
from pathlib import Path
from alignkit.errors import DiskError
from alignkit.feedback.cache import Store
store = Store(Path(sys.argv[1]))
store.put([("a", {"n": 1})])
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    store.put([("b", {"text": "x" * 1000})])
except DiskError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, env=environment)
    assert resource.RLIMIT_FSIZE >= 0 and done.returncode == 4, done.stderr
    assert "cannot write s.jsonl (File too large" in done.stdout
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [1]


SHARED = """
import sys
from pathlib import Path
from alignkit.feedback.cache import Store
store, first = Store(Path(sys.argv[1])), int(sys.argv[2])
asked = []
def answer(questions):
    asked.extend(questions)
    return ["x" * (number % 97) for number in questions]
found = store.ask("common", list(range(first, first + 300)), answer, batch_size=1)
assert found == ["x" * (number % 97) for number in range(first, first + 300)]
print(len(asked))
"""


def test_processes_share_a_file_and_take_what_another_has_written(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    running = [
        subprocess.Popen([sys.executable, "-c", SHARED, str(path), first], stdout=-1, stderr=-1, env=environment)
        for first in ("0", "150", "300")
    ]
    said = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], said
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 600 == len({line["key"] for line in lines}) == len(Store(path))
    assert all(b"cannot be read" not in errors for _, errors in said)
