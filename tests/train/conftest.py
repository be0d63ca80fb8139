"""Stages of small recipes, resolved from real files in an empty directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.recipe import Stage, load_recipe, resolve


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
