"""`doctor resume`: equal runs are called equal, and a planted difference is named with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignkit.errors import RecipeError
from alignkit.preflight.resume import find_differences, prove_resume
from alignkit.recipe import load_recipe


def write_run(path: Path, losses: list[float], weights: bytes) -> Path:
    (path / "model").mkdir(parents=True)
    rows = [{"step": step, "loss": loss, "train_runtime": 100 * loss} for step, loss in enumerate(losses, 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "model" / "model.safetensors").write_bytes(weights)
    return path


def test_the_first_metric_that_differs_and_the_weights_are_named(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "a", [1.0, 0.5, 0.25], b"weights")
    assert list(find_differences(whole, write_run(tmp_path / "b", [1.0, 0.5, 0.25], b"weights"))) == []
    assert list(find_differences(whole, write_run(tmp_path / "c", [1.0, 0.5, 0.26], b"Weights"))) == [
        "loss at step 3 is 0.25 without and 0.26 with the kill", "model/model.safetensors has other weights",
    ]  # fmt: skip
    assert list(find_differences(whole, write_run(tmp_path / "d", [1.0, 0.5], b"weights"))) == [
        "step at step 3 is 3 without and None with the kill"
    ]


def test_a_stage_that_cannot_be_tried_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model: builtin:tiny-gpt2\nsft: {data: builtin:instructions}\n")
    with pytest.raises(RecipeError, match="sft, rm and dpo stages can be tried: sft"):
        prove_resume(load_recipe(path), "dpo")


@pytest.mark.slow
def test_a_stage_is_killed_and_resumed_and_found_equal(run_alignkit, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "name: a\nmodel: {path: builtin:tiny-llama}\nlora: {r: 4}\nsft: {data: builtin:instructions}\n"
        "dpo: {start_from: sft, data: builtin:preferences, eval: 0.1, num_train_epochs: 2}\n"
    )
    done = run_alignkit("doctor", "resume", "--recipe", "a.yaml", "--stage", "dpo", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["differences"], found["model"]) == (0, [], "builtin:tiny-llama")
    assert 10 <= found["killed_at"] < found["steps"] == 20
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]
