"""Small models on disk, drawn from a seed: two policies that read the same tokens, and a reward model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from alignkit.evaluate.shelf import Shelf
from alignkit.models.builtin import builtin_tokenizer

ROOT = Path(__file__).resolve().parents[2]
POSITIONS = 96


def _save(path: Path, *, seed: int, reward: bool = False) -> Path:
    tokenizer = builtin_tokenizer()
    tokenizer.chat_template = (ROOT / "alignkit/models/templates/chatml.jinja").read_text()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=POSITIONS, n_embd=32, n_layer=1, n_head=2, num_labels=1,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(seed)
    (GPT2ForSequenceClassification if reward else GPT2LMHeadModel)(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("models") / "policy", seed=0)


@pytest.fixture(scope="session")
def reference_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("models") / "reference", seed=1)


@pytest.fixture(scope="session")
def reward_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("models") / "reward", seed=2, reward=True)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf(device="cpu")
