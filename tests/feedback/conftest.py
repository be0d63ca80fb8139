"""Small real models on disk that write and judge, and what tests of the feedback room share."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))  # the tests here share a server and some helpers

import torch

from alignkit.models.start import builtin_config, builtin_tokenizer, random_model
from alignkit.recipe.methods import OPTIONS
from alignkit.recipe.schema import LaunchOptions, ModelOptions
from alignkit.recipe.stage import Stage

CHATML = Path(__file__).resolve().parents[2] / "alignkit/models/templates/chatml.jinja"


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a builder of model directories: random weights, with a chat template or without."""

    def make(name: str = "builtin:tiny-gpt2", *, seed: int = 1, chat: bool = True, sharpness: float = 1.0) -> Path:
        directory = tmp_path_factory.mktemp("model")
        model = random_model(builtin_config(name), seed=seed, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(sharpness)
        model.save_pretrained(directory)
        tokenizer = builtin_tokenizer()
        if chat:
            tokenizer.chat_template = CHATML.read_text(encoding="utf-8")
        tokenizer.save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def chat_model(make_model: Callable[..., Path]) -> Path:
    return make_model(sharpness=3.0)


@pytest.fixture(scope="session")
def base_model(make_model: Callable[..., Path]) -> Path:
    """A model without a chat template."""
    return make_model("builtin:tiny-llama", chat=False, sharpness=3.0)


@pytest.fixture
def make_stage(tmp_path: Path) -> Callable[..., Stage]:
    """Return a builder of critique and label stages, each with a run directory that is there."""

    def make(
        method: str, *, name: str | None = None, seed: int = 0, start: Path | None = None, **options: Any
    ) -> Stage:
        run_dir = tmp_path / (name or method)
        run_dir.mkdir(exist_ok=True)
        return Stage(
            recipe_name="tiny",
            recipe_path="tiny.yaml",
            name=name or method,
            seed=seed,
            model=ModelOptions(path="builtin:tiny-gpt2"),
            lora=None,
            launch=LaunchOptions(device="cpu"),
            options=OPTIONS[method].model_validate({"method": method, **options}),
            trainer={},
            origins={},
            run_dir=str(run_dir),
            start_dir=str(start) if start else None,
        )

    return make


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes rows as JSON lines."""

    def write(rows: Sequence[dict[str, Any]], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


FOUR_WORDINGS = """
name: positive
principles:
  - {name: one, critique: Where is it negative?, revision: Make it positive., comparison: Which is more positive?}
  - {name: two, critique: What is gloomy?, revision: Cheer it up., comparison: Choose the one that likes the film.}
  - {name: three, critique: What is unkind?, revision: Be kinder., comparison: Which of these is friendlier?}
  - {name: four, critique: Where is praise missing?, revision: Praise it., comparison: Pick the one that praises more.}
"""


@pytest.fixture
def constitution(tmp_path: Path) -> str:
    path = tmp_path / "positive.yaml"
    path.write_text(FOUR_WORDINGS)
    return str(path)
