"""Stages over embedded models, built without a recipe file, and small real training runs by hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from alignkit.recipe.methods import OPTIONS
from alignkit.recipe.schema import DataSource, LaunchOptions, LoraOptions, ModelOptions
from alignkit.recipe.stage import Stage


@pytest.fixture
def make_stage(tmp_path: Path) -> Callable[..., Stage]:
    """Return a builder: make_stage("dpo", lora={}, start=dir, adapter="merge", quantization="nf4", path=...)."""

    def make(
        method: str = "sft",
        *,
        start: Path | None = None,
        adapter: str | None = None,
        lora: dict[str, Any] | None = None,
        seed: int = 0,
        trust_code: bool = False,
        **model: Any,
    ) -> Stage:
        options = {"path": "builtin:tiny-gpt2", "dtype": "float32"} | model
        return Stage(
            recipe_name="tiny",
            recipe_path="tiny.yaml",
            name=method,
            seed=seed,
            model=ModelOptions(**options),
            lora=None if lora is None else LoraOptions(**({"r": 4, "alpha": 8} | lora)),
            launch=LaunchOptions(device="cpu"),
            options=OPTIONS[method](method=method, data=[DataSource(path="builtin:reviews")], adapter=adapter),
            trainer={},
            origins={},
            run_dir=str(tmp_path / method),
            start_dir=str(start) if start else None,
            trust_code=trust_code,
        )

    return make
