"""Writes recipes into an empty working directory and reads back what the user would be told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.errors import RecipeError
from alignkit.recipe import Recipe, load_recipe

MODEL = "model: {path: gpt2}\n"  # line 1 of most recipes here


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def load() -> Callable[..., Recipe]:
    """Write a text as a.yaml and load it."""

    def load(text: str | bytes, *overrides: str) -> Recipe:
        Path("a.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe(Path("a.yaml"), overrides=overrides)

    return load


@pytest.fixture
def complain(load: Callable[..., Recipe]) -> Callable[..., list[str]]:
    """Load a text that must be refused and return the message's lines."""

    def complain(text: str | bytes, *overrides: str) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides)
        assert caught.value.exit_code == 2
        return str(caught.value).split("\n")

    return complain
