"""Helpers of the data tests: a stage, files, and reading them as a stage does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from alignkit.data import DataReport, Rejects, Row, read_rows
from alignkit.errors import DataError
from alignkit.recipe.methods import OPTIONS
from alignkit.recipe.schema import DataSource, LaunchOptions, ModelOptions
from alignkit.recipe.stage import Stage


def make_stage(method: str, *, seed: int = 0, **options: Any) -> Stage:
    """A resolved stage with nothing but what reading data looks at."""
    options = {"data": ["x/y"], **options}
    return Stage(
        recipe_name="test",
        recipe_path="test.yaml",
        name=method,
        seed=seed,
        model=ModelOptions(path="builtin:tiny-gpt2"),
        lora=None,
        launch=LaunchOptions(),
        options=OPTIONS[method](**options),
        trainer={},
        origins={f"{method}.data": "test.yaml:3"},
        run_dir="runs/test",
    )


@dataclass
class Reading:
    """Everything that came of reading."""

    rows: list[Row]
    report: DataReport
    rejects: Rejects
    error: DataError | None

    @property
    def message(self) -> str:
        assert self.error is not None, "the rows were accepted"
        return str(self.error)


Read = Callable[..., Reading]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Read sources as a stage of `method` does, in a directory of its own: read("sft", "a.jsonl", dedupe=True)."""
    monkeypatch.chdir(tmp_path)

    def run(method: str, *paths: str | DataSource, seed: int = 0, **settings: Any) -> Reading:
        keys = DataSource.model_fields.keys()
        for_source = {key: settings.pop(key) for key in list(settings) if key in keys}
        sources = [DataSource(path=path, **for_source) if isinstance(path, str) else path for path in paths]
        names = {"known_prompts": "known_prompts", "read_as": "method", "template": "template"}
        extra = {names[key]: settings.pop(key) for key in list(settings) if key in names}
        reading = Reading([], DataReport(), Rejects(), None)
        stage = make_stage(method, seed=seed, **settings)
        try:
            for row in read_rows(stage, sources, report=reading.report, rejects=reading.rejects, **extra):
                reading.rows.append(row)
        except DataError as error:
            reading.error = error
        return reading

    return run


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., Path]:
    """Write rows (dicts, or text as it stands) to a file, one a line; return its path."""

    def write(name: str, rows: Iterable[Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        return path

    return write


@pytest.fixture
def rejected_rows(tmp_path: Path) -> Callable[[Rejects], list[dict[str, Any]]]:
    """Write rejects.jsonl and read it back."""

    def write(rejects: Rejects) -> list[dict[str, Any]]:
        path = tmp_path / "rejects.jsonl"
        rejects.write(path)
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return write
