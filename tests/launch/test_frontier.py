"""Reward against KL through `alignkit run`: a swept recipe, measured and drawn at its end; nothing above it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

RECIPE = """\
name: small
model: {path: builtin:tiny-gpt2, init: scratch, chat_template: chatml}
sft:
  data:
    - {path: builtin:preferences, max_rows: 800}
    - {path: builtin:preferences, max_rows: 800, columns: {chosen: rejected, rejected: chosen}}
  batch_size: 16
  micro_batch_size: 16
  learning_rate: 4e-3
  samples: {num: 0}
dpo:
  start_from: sft
  data: {path: builtin:preferences, max_rows: 64}
  batch_size: 16
  learning_rate: 5e-4
  samples: {num: 0}
ppo:
  start_from: sft
  reward: builtin:true-reward
  data: {path: builtin:prompts, max_rows: 64}
  batch_size: 32
  micro_batch_size: 32
  max_new_tokens: 32
  total_episodes: 64
  learning_rate: 1e-3
  samples: {num: 0}
sweep:
  dpo.beta: [2, 0.1]
  ppo.kl_coef: [0.5, 0.05]
evaluate:
  data: {path: builtin:prompts, split: test}
  max_rows: 12
  samples: 8
  max_new_tokens: 32
  batch_size: 128
  frontier: {betas: [1, 0.3, 0.1], answers: 96, best_of: [4, 16]}
"""


@pytest.mark.slow  # two minutes
def test_a_swept_recipe_ends_with_its_picture(run_alignkit: Run, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE)
    done = run_alignkit("run", "-r", "small.yaml")
    assert done.returncode == 0, done.stderr
    runs = tmp_path / "runs" / "small"
    data = json.loads((runs / "frontier.json").read_text())
    (frontier,) = data["frontiers"]
    assert frontier["reference"] == "sft" and len(frontier["optima"]) > 10
    found = {(point["series"], point["label"]) for point in frontier["points"]}
    assert found == {
        ("DPO", "2"), ("DPO", "0.1"), ("PPO", "0.5"), ("PPO", "0.05"), ("best of N", "4"), ("best of N", "16"),
    }  # fmt: skip
    # The claim of the picture, on models that were really trained and answers that were really sampled.
    assert not any(point["above"] for point in frontier["points"])
    assert all(point["kl"]["value"] > 0 for point in frontier["points"] if point["series"] == "best of N")
    page = (runs / "report.html").read_text()
    assert "Reward against KL" in page and "No point lies above the optimum" in page
    assert (runs / "frontier.svg").read_text().startswith("<svg")
