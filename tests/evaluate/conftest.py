"""Small models on disk, drawn from a seed: two policies that read the same tokens, and a reward model."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "feedback"))  # its server

import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from alignkit.models.start import builtin_tokenizer
from alignkit.rewards import Workspace

ROOT = Path(__file__).resolve().parents[2]
POSITIONS = 96
PAIRS = {"path": "builtin:preferences", "split": "train", "max_rows": 60}


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
def space() -> Workspace:
    return Workspace(device="cpu")


@pytest.fixture
def run_dir(tmp_path: Path, policy_dir: Path, reference_dir: Path) -> Path:
    """A dpo run as far as an evaluation reads it, beside the sft run it started from."""
    runs = tmp_path / "runs/tiny"
    for name, model in (("sft", reference_dir), ("dpo", policy_dir)):
        shutil.copytree(model, runs / name / "model")
        stage: dict[str, Any] = {
            "recipe": "tiny", "stage": name, "method": name, "seed": 3, "model": {"path": "builtin:tiny-gpt2"},
            "options": {"data": [PAIRS], "eval": 0.3}, "trainer": {"beta": 0.2},
            "start_dir": "runs/tiny/sft/model" if name == "dpo" else None,
            "start_stage": "sft" if name == "dpo" else None,
        }  # fmt: skip
        (runs / name / "stage.json").write_text(json.dumps(stage))
        (runs / name / "result.json").write_text(json.dumps({"status": "finished", "stage": name}))
    return runs / "dpo"
