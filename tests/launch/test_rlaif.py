"""A line of rlaif through the command line: real processes, a tiny model that answers and judges itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

COMMON = "max_steps: 2, batch_size: 4, max_length: 256, samples: {num: 0}, save_strategy: 'no'"
RECIPE = f"""\
name: r
model: {{path: builtin:tiny-gpt2, init: scratch, chat_template: chatml}}
sft: {{data: {{path: builtin:instructions, max_rows: 16}}, {COMMON}}}
rlaif:
  start_from: sft
  constitution: builtin:helpfulness
  data: {{path: builtin:prompts, max_rows: 4}}
  judge: sft
  critique: {{rounds: 1, examples: none, max_new_tokens: 4}}
  sft: {{{COMMON}, special_tokens_in_text: escape}}
  label: {{max_new_tokens: 4}}
  dpo: {{{COMMON}, special_tokens_in_text: escape}}
"""


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.slow
def test_the_whole_line_runs_and_is_not_run_again(run_alignkit: Callable, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    done = run_alignkit("run", "-r", "r.yaml", "--json")
    assert done.returncode == 0, done.stderr
    results = {result["stage"]: result for result in json.loads(done.stdout)["stages"]}
    assert [(name, result["status"]) for name, result in results.items()] == [
        (name, "finished") for name in ("sft", "rlaif-critique", "rlaif-sft", "rlaif-label", "rlaif-dpo")
    ]
    runs = tmp_path / "runs/r"
    assert results["rlaif-label"]["step"] == len((runs / "rlaif-label/rows.jsonl").read_text().splitlines())
    assert read(runs / "rlaif-sft/stage.json")["source_stages"] == {
        "runs/r/rlaif-critique/rows.jsonl": "rlaif-critique"
    }
    asked = (runs / "rlaif-label/feedback.jsonl").read_bytes()
    done = run_alignkit("rlaif", "-r", "r.yaml")
    assert done.returncode == 0 and done.stderr.count("already finished") == 4
    assert (runs / "rlaif-label/feedback.jsonl").read_bytes() == asked
    done = run_alignkit("rlaif", "-r", "r.yaml", "--stage", "label", "--set", "rlaif.label.max_new_tokens=5")
    assert done.returncode == 2 and "max_new_tokens" in done.stderr


def test_a_step_says_what_it_waits_for(run_alignkit: Callable, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    done = run_alignkit("dpo", "-r", "r.yaml")
    assert done.returncode == 2
    assert done.stderr.splitlines()[:2] == [
        "error: r.yaml:4: rlaif-dpo starts from rlaif-sft, which has not been trained to its end; train --stage "
        "rlaif-sft of r.yaml first, or name another start_from",
        "error: r.yaml:4: rlaif-dpo needs rlaif-label, which has not been run to its end; run --stage rlaif-label of "
        "r.yaml first, or name the file of rows itself",
    ]
    done = run_alignkit("rlaif", "-r", "r.yaml", "--out", "x")
    assert done.returncode == 2 and "have a run directory each; name one of them with --stage" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_shows_the_expansion(run_alignkit: Callable, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    shown = json.loads(run_alignkit("rlaif", "-r", "r.yaml", "--dry-run", "--json").stdout)
    assert [(stage["stage"], stage["method"], stage["start_stage"]) for stage in shown] == [
        ("rlaif-critique", "critique", "sft"), ("rlaif-sft", "sft", "sft"), ("rlaif-label", "label", "rlaif-sft"),
        ("rlaif-dpo", "dpo", "rlaif-sft"),
    ]  # fmt: skip
    assert not (tmp_path / "runs").exists()


def test_a_batch_job_waits_for_everything_it_needs(run_alignkit: Callable, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    jobs = json.loads(run_alignkit("rlaif", "-r", "r.yaml", "--slurm", "--dry-run", "--json").stdout)["jobs"]
    assert {job["stage"]: job["depends_on"] for job in jobs} == {
        "rlaif-critique": [], "rlaif-sft": ["rlaif-critique"], "rlaif-label": ["rlaif-sft"],
        "rlaif-dpo": ["rlaif-sft", "rlaif-label"],
    }  # fmt: skip
    assert all("rlaif --recipe" in job["script"] for job in jobs if job["stage"] in ("rlaif-critique", "rlaif-label"))


def test_a_launcher_starts_no_labels(run_alignkit: Callable, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    done = run_alignkit("rlaif", "-r", "r.yaml", "--stage", "label", RANK="0", WORLD_SIZE="2")
    assert done.returncode == 8
    assert "a label stage runs in one process" in done.stderr


@pytest.mark.slow
def test_ppo_takes_the_judge_itself_as_its_reward_and_asks_nothing_twice(
    run_alignkit: Callable, tmp_path: Path
) -> None:
    section, _, _ = RECIPE.partition("  critique:")
    (tmp_path / "r.yaml").write_text(
        f"{section}  critique: false\n  train: ppo\n"
        "  ppo: {gold: builtin:true-reward, batch_size: 4, max_new_tokens: 6, total_episodes: 8, ppo_epochs: 1, "
        "samples: {num: 1, max_new_tokens: 6}, logging_steps: 1, save_strategy: 'no'}\n"
    )
    done = run_alignkit("run", "-r", "r.yaml", "--json")
    assert done.returncode == 0, done.stderr
    assert [result["stage"] for result in json.loads(done.stdout)["stages"]] == ["sft", "rlaif-ppo"]
    run = tmp_path / "runs/r/rlaif-ppo"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(isinstance(row["reward"], float) for row in rows if "reward" in row)
    keys = [json.loads(line)["key"] for line in (run / "judged.jsonl").read_text().splitlines()]
    assert keys and len(keys) == len(set(keys))
    assert read(run / "stage.json")["source_stages"] == {"runs/r/sft/model": "sft"}
