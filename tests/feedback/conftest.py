"""Small real models on disk that write and judge, and what tests of the feedback room share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from alignkit.models.builtin import builtin_config, builtin_tokenizer
from alignkit.models.scratch import random_model

CHATML = Path(__file__).resolve().parents[2] / "alignkit/models/templates/chatml.jinja"
PUBLISHED = Path(__file__).resolve().parents[3] / "shared/data/constitutional-ai"

real_data = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published files are not beside the repository")


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
