"""Stages with a launch section, resolved in a directory of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.recipe import Stage, load_recipe, resolve


@pytest.fixture
def write_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that writes r.yaml with this launch section."""
    monkeypatch.chdir(tmp_path)

    def write(launch: str = "", model: str = "path: builtin:tiny-llama") -> None:
        Path("r.yaml").write_text(f"model: {{{model}}}\nlaunch: {{{launch}}}\nsft: {{data: builtin:instructions}}\n")

    return write


@pytest.fixture
def make_stage(write_recipe: Callable[..., None]) -> Callable[..., Stage]:
    """Return a function that resolves the stage of such a recipe; keywords are --set."""

    def make(launch: str = "", model: str = "path: builtin:tiny-llama", **changed: str) -> Stage:
        write_recipe(launch, model)
        return resolve(load_recipe(Path("r.yaml"), overrides=[f"{key}={value}" for key, value in changed.items()]))

    return make
