"""~, environment variables and relative paths are resolved once, relative to the file that says them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.recipe import Recipe

Load = Callable[..., Recipe]
Complain = Callable[..., list[str]]


def text(path: str) -> str:
    return f"model: {{path: gpt2}}\nsft:\n  data: {{path: {path}}}\n"


def data_path(recipe: Recipe) -> str:
    return recipe.stages["sft"].options.data[0].path


@pytest.mark.parametrize(
    "name", ["Anthropic/hh-rlhf", "imdb", "builtin:reviews?rows=9", "hf://datasets/a/b", "$", "a$"]
)
def test_names_that_are_not_local_stay(load: Load, name: str) -> None:
    assert data_path(load(text(name))) == name


@pytest.mark.parametrize("name", ["./rows", "../rows", "rows.jsonl", "rows.jsonl.gz", "some/deep/rows", "a/b.parquet"])
def test_local_looking_names_are_absolute_even_when_missing(load: Load, directory: Path, name: str) -> None:
    assert data_path(load(text(name))) == str((directory / name).resolve())


def test_what_exists_is_local(load: Load, directory: Path) -> None:
    (directory / "org").mkdir()
    (directory / "org" / "name").mkdir()
    assert data_path(load(text("org/name"))) == str(directory / "org" / "name")


def test_paths_of_a_fragment_start_at_the_fragment(load: Load, directory: Path) -> None:
    (directory / "parts").mkdir()
    (directory / "parts" / "base.yaml").write_text("model: {path: ./weights, chat_template: t.jinja}\n")
    recipe = load("extends: parts/base.yaml\nsft: {data: ./rows}\n", "sft.eval=./other")
    assert recipe.model.path == str(directory / "parts" / "weights")
    assert recipe.model.chat_template == str(directory / "parts" / "t.jinja")
    assert data_path(recipe) == str(directory / "rows")
    assert recipe.stages["sft"].options.eval[0].path == str(directory / "other")


def test_the_name_of_a_template_of_ours_is_not_a_path(load: Load, directory: Path) -> None:
    (directory / "llama3").mkdir()
    assert load(text("x/y"), "model.chat_template=llama3").model.chat_template == "llama3"


def test_environment_and_home_are_filled_in(load: Load, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROWS", "/srv/rows")
    monkeypatch.setenv("HOME", "/home/me")
    assert data_path(load(text('"${ROWS}/a"'))) == "/srv/rows/a"
    assert data_path(load(text("$ROWS/a.jsonl"))) == "/srv/rows/a.jsonl"
    assert data_path(load(text("~/a"))) == "/home/me/a"


def test_what_cannot_be_filled_in_is_refused_with_its_place(
    complain: Complain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.setenv("HF_TOKEN", "x")
    assert complain(text("$NOWHERE/a")) == ["a.yaml:3: sft.data.path: the environment variable NOWHERE is not set"]
    assert complain(text('"${a b}"')) == [
        "a.yaml:3: sft.data.path: ${a b} is not an environment variable; write ${NAME}"
    ]
    assert complain(text("$HF_TOKEN/a")) == ["a.yaml:3: sft.data.path: $HF_TOKEN is a secret; a path cannot hold one"]


def test_the_override_decides_before_the_variable_is_needed(load: Load, directory: Path) -> None:
    assert data_path(load(text("$NOWHERE/a"), "sft.data.path=./b")) == str(directory / "b")
