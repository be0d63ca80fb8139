"""Stages of small recipes, resolved from real files in an empty directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from alignkit.recipe import Stage, load_recipe, resolve

if TYPE_CHECKING:
    from alignkit.data import Rejects
    from alignkit.models.chat import Chat
    from alignkit.train.tables import Tables


@pytest.fixture
def make_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stage]:
    """Return a function that writes a recipe, changes into its directory and resolves one of its stages."""
    monkeypatch.chdir(tmp_path)

    def make(text: str, stage: str, *overrides: str) -> Stage:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return resolve(load_recipe(path, overrides=overrides), stage)

    return make


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes rows as JSON lines."""

    def write(rows: list[dict], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def resume_exactly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[Stage], Path]:
    """Return a function that trains a stage, and again from its last checkpoint but one, to the same bits."""

    def resume(stage: Stage) -> Path:
        from safetensors.torch import load_file

        from alignkit.launch.run import launch_stage
        from alignkit.runs.directory import list_checkpoints, step_of

        whole, half = tmp_path / "whole", tmp_path / "half"
        launch_stage(replace(stage, run_dir=str(whole)))
        shutil.copytree(whole, half)
        newest, before = list_checkpoints(half / "checkpoints")[:2]
        for gone in (newest, half / "model"):
            shutil.rmtree(gone)
        (half / "result.json").unlink()
        capsys.readouterr()
        launch_stage(replace(stage, run_dir=str(half)))
        assert f"going on from step {step_of(before)}" in capsys.readouterr().err
        ends = [load_file(next((run / "model").glob("*model.safetensors"))) for run in (whole, half)]
        assert ends[0].keys() == ends[1].keys() and all((ends[0][name] == ends[1][name]).all() for name in ends[0])
        return half

    return resume


@dataclass
class Prepared:
    """A stage's rows as its trainer reads them."""

    stage: Stage
    chat: Chat
    tables: Tables
    rejects: Rejects

    def decode(self, ids: list[int]) -> str:
        text: str = self.chat.tokenizer.decode(ids)
        return text

    def learnt(self, number: int = 0) -> str:
        """The text of what an sft row teaches."""
        return self.decode([label for label in self.tables.train[number]["labels"] if label != -100])


@pytest.fixture
def prepare(make_stage: Callable[..., Stage], write_rows: Callable[..., Path], tmp_path: Path) -> Callable:
    """Return a function that writes rows.jsonl and makes the token tables of a one-stage recipe that reads it."""

    def prepare(rows: list[dict] | None, recipe: str, *overrides: str, model: str = "builtin:tiny-llama") -> Any:
        from alignkit.data import Rejects
        from alignkit.models.chat import Chat, load_tokenizer
        from alignkit.train.tables import prepare_tables

        if rows is not None:
            write_rows(rows)
        text = f"model: {{path: {model}}}\n{recipe}"
        stage = make_stage(text, recipe.partition(":")[0], *overrides)
        chat, rejects = Chat(load_tokenizer(stage)), Rejects()
        return Prepared(stage, chat, prepare_tables(stage, chat, tmp_path / "cache", rejects=rejects), rejects)

    return prepare
