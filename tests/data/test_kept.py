"""Rows are parsed once a command: what is kept of them, and how often their files are opened."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alignkit.data import DataReport, Rejects, read_rows, sources, store
from alignkit.data.files import read_file
from alignkit.data.store import forget_parsed
from alignkit.recipe import load_recipe, resolve

Read = Callable[..., Any]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the files of rows that were opened, in order."""
    names: list[str] = []

    def read(path: Path, **settings: Any) -> Any:
        names.append(path.name)
        return read_file(path, **settings)

    monkeypatch.setattr(sources, "read_file", read)
    forget_parsed()
    yield names


def turns(text: str) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": [1, None, "é\u2028"]}}}
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "", "tool_calls": [call]}]


SHAPES: list[tuple[str, Callable[[int], dict[str, Any]]]] = [
    ("sft", lambda n: {"messages": turns(f"{n}"), "id": n}),
    ("sft", lambda n: {"prompt": f"{n} é\n", "completion": "" if n % 7 == 0 else "\ud83d" if n % 7 == 1 else "a"}),
    ("sft", lambda n: {"input_ids": [n, n + 1], "labels": [-100, n + 1]}),
    ("rm", lambda n: {"prompt": f"{n}", "completions": ["a", "b", "c"], "scores": [n % 3, 1.5, 1.5]}),
    ("dpo", lambda n: {"prompt": f"{n}", "chosen": "a", "rejected": "b", "label": n % 2 / 4, "margin": 2}),
    ("dpo", lambda n: {"text": "one"} if n % 9 == 0 else {"prompt": "q", "completion": f"{n}", "label": n % 2}),
]


@pytest.mark.parametrize(("method", "shape"), SHAPES)
def test_rows_and_what_is_said_of_them_are_the_same_in_every_pass(
    read: Read, lines: Callable[..., Path], opened: list[str], method: str, shape: Callable[[int], dict[str, Any]]
) -> None:
    lines("a.jsonl", ["{", *map(shape, range(5000))])  # more than is held in memory
    first, second = (read(method, "a.jsonl", on_bad_row="skip") for _ in range(2))
    assert opened == ["a.jsonl"]
    assert first.rows == second.rows != []
    assert first.report.to_dict() == second.report.to_dict()
    assert first.rejects.count == second.rejects.count > 0
    assert [type(value) for value in vars_of(first.rows[-1])] == [type(value) for value in vars_of(second.rows[-1])]


def vars_of(row: Any) -> list[Any]:
    return [getattr(row, name) for name in row.__slots__]


def test_long_rows_do_not_wait_in_memory(read: Read, lines: Callable[..., Path], opened: list[str]) -> None:
    lines("a.jsonl", [{"text": f"{n}" * 1_900_000} for n in range(9)])
    first, second = (read("sft", "a.jsonl").rows for _ in range(2))
    assert first == second and len(first) == 9
    [kept] = store._kept.values()
    assert sum(len(parsed.row.completions[0]) for parsed in kept._fresh if parsed.row) < 10_000_000


def test_rows_are_read_anew_where_the_disk_is_full(
    read: Read, lines: Callable[..., Path], opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_SPARE_BYTES", 1 << 62)
    lines("a.jsonl", [{"text": f"{n}"} for n in range(9000)])
    first, second = (read("sft", "a.jsonl", on_bad_row="skip") for _ in range(2))
    assert first.rows == second.rows and len(first.rows) == 9000
    assert opened == ["a.jsonl"] * 4  # in either pass for the commonest format, then for the rows


def test_what_is_read_further_goes_on_where_the_last_pass_ended(read: Read, lines: Callable, opened: list[str]) -> None:
    lines("a.jsonl", [{"text": f"{n}"} for n in range(5000)])
    for most in (3, 4500, 100, None, 4096):
        assert len(read("sft", "a.jsonl", max_rows=most).rows) == (most or 5000)
    assert opened == ["a.jsonl"]
    lines("a.jsonl", [{"text": f"{n}"} for n in range(3)])  # another file of the same name
    assert len(read("sft", "a.jsonl").rows) == 3
    lines("a.json", ["[", '{"text": "a"},', "{"])
    assert read("sft", "a.json").message == read("sft", "a.json").message
    assert opened == ["a.jsonl", "a.jsonl", "a.json", "a.json"]


def test_a_command_opens_each_file_of_rows_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str]
) -> None:
    """A look ahead, the commonest format, both sides of a split and the comparison with a run's rows."""
    from alignkit.models.chat import load_chat
    from alignkit.preflight.requirements import require_ready
    from alignkit.train.fingerprint import hash_data
    from alignkit.train.tables import prepare_tables

    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(20)]
    Path("a.jsonl").write_text("{\n" + "\n".join(map(json.dumps, rows)))
    Path("r.yaml").write_text(
        "name: a\nmodel: {path: builtin:tiny-gpt2}\ndpo: {data: a.jsonl, eval: 0.3, on_bad_row: skip}\n"
    )
    stage = resolve(load_recipe(Path("r.yaml")), "dpo")
    require_ready(stage)
    tables = prepare_tables(stage, load_chat(stage), tmp_path / "cache", rejects=Rejects())
    assert tables.eval is not None and len(tables.train) + len(tables.eval) == 20
    assert hash_data(stage) == tables.report.fingerprint
    assert len(list(read_rows(stage, stage.options.data, report=DataReport(), rejects=Rejects()))) == 20
    assert opened == ["a.jsonl"]
