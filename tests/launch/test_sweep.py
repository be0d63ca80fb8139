"""A swept recipe through `alignkit run`: one run directory per value, and a value added later runs alone."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

RECIPE = """\
model: {path: builtin:tiny-gpt2, init: scratch, chat_template: chatml, config: {n_layer: 1, n_embd: 32, n_head: 2}}
sft: {data: {path: builtin:instructions, max_rows: 32}, max_steps: 2, samples: {num: 0}}
dpo:
  start_from: sft
  data: {path: builtin:preferences, max_rows: 32}
  batch_size: 8
  learning_rate: 1e-3
  max_steps: 3
  samples: {num: 0}
sweep:
  dpo.beta: [0.1, 0.5]
"""


@pytest.mark.slow  # 30 s
def test_a_run_per_value_and_a_value_added_later(run_alignkit: Run, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    runs = tmp_path / "runs" / "tiny"
    done = run_alignkit("run", "-r", "tiny.yaml", "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["stages"]
    assert [result["status"] for result in results] == ["finished"] * 3
    assert {path.parent.name for path in runs.glob("*/result.json")} == {"sft", "dpo-beta-0.1", "dpo-beta-0.5"}
    for beta in (0.1, 0.5):
        stage = json.loads((runs / f"dpo-beta-{beta}" / "stage.json").read_text())
        assert stage["point"] == {"dpo.beta": beta} and stage["trainer"]["beta"] == beta
        assert stage["start_stage"] == "sft" and stage["origins"][f"dpo-beta-{beta}.beta"] == "tiny.yaml:11"
    rewards = [read_margin(runs / f"dpo-beta-{beta}") for beta in (0.1, 0.5)]
    assert rewards[0] != rewards[1]  # the value was in force, not only written down

    times = {path: path.stat().st_mtime_ns for path in runs.glob("*/result.json")}
    more = run_alignkit("run", "-r", "tiny.yaml", "--set", "sweep.dpo.beta=[0.1, 0.2, 0.5]", "--json")
    assert more.returncode == 0, more.stderr
    assert (runs / "dpo-beta-0.2" / "result.json").exists()
    assert {path: path.stat().st_mtime_ns for path in times} == times

    one = run_alignkit("dpo", "-r", "tiny.yaml", "--stage", "dpo-beta-0.5")
    assert (one.returncode, "dpo-beta-0.5: finished at step 3" in one.stdout) == (0, True)
    plain = run_alignkit("dpo", "-r", "tiny.yaml", "--stage", "dpo")
    assert plain.returncode == 2
    assert plain.stderr == (
        "error: tiny.yaml: --stage dpo is swept, so there are several; name one of them: dpo-beta-0.1, dpo-beta-0.5\n"
    )


def read_margin(run: Path) -> float:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float(next(row["rewards/margins"] for row in reversed(rows) if "rewards/margins" in row))


def test_batch_jobs_are_one_per_variant(run_alignkit: Run, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    done = run_alignkit("run", "-r", "tiny.yaml", "--slurm", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    jobs = json.loads(done.stdout)["jobs"]
    assert [job["stage"] for job in jobs] == ["sft", "dpo-beta-0.1", "dpo-beta-0.5"]
    assert [f"--stage {job['stage']} " in job["script"] for job in jobs] == [True] * 3
