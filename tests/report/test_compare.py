"""Two runs side by side: what differs is shown once, what is the same is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignkit.errors import RunError
from alignkit.report.evaluation import compare_runs


def _run(path: Path, **changes: Any) -> Path:
    path.mkdir(parents=True)
    stage: dict[str, Any] = {
        "recipe": "tiny", "stage": path.name, "method": "dpo", "seed": 0, "start_dir": "runs/tiny/sft/model",
        "run_dir": str(path), "model": {"path": "builtin:tiny-gpt2"}, "lora": None, "launch": {"device": "cpu"},
        "options": {"method": "dpo", "batch_size": 16, "data": [{"path": "builtin:preferences", "max_rows": 100}]},
        "trainer": {"beta": changes.get("beta", 0.1)},
        "trl": {"beta": changes.get("beta", 0.1), "output_dir": str(path), "weight_decay": 0.0},
        "data": {"rows": 100, "fingerprint": changes.get("data", "aa")},
        "fingerprint": {"seed": 0, "data": changes.get("data", "aa"), "template": changes.get("template", "tt"),
                        "dpo.beta": 0.1},
        "versions": {"trl": changes.get("trl", "1.16.0"), "torch": "2.13.0"}, "git": {"commit": "abc", "dirty": False},
    }  # fmt: skip
    (path / "stage.json").write_text(json.dumps(stage))
    if "loss" in changes:
        result = {"status": "finished", "step": 10, "tokens": 5, "metrics": {"loss": changes["loss"]}}
        (path / "result.json").write_text(json.dumps(result))
        figure = {"metric": "kl", "value": changes["kl"], "slice": None, "data": "d"}
        (path / "eval.json").write_text(json.dumps({"results": [figure, {**figure, "slice": "margin 0 to 1"}]}))
    return path


def test_every_difference_is_named_and_nothing_else(tmp_path: Path) -> None:
    first = _run(tmp_path / "a", loss=0.5, kl=2.0)
    second = _run(tmp_path / "b", beta=0.3, data="bb", template="uu", trl="1.16.1", loss=0.25, kl=3.5)
    found = compare_runs(first, second)
    assert found.settings == {"stage.beta": (0.1, 0.3)}
    assert found.data == {"train.fingerprint": ("aa", "bb"), "data": ("aa", "bb"), "template": ("tt", "uu")}
    assert found.versions == {"trl": ("1.16.0", "1.16.1")}
    assert {"loss": (0.5, 0.25), "kl on d": (2.0, 3.5), "step": (10, 10)}.items() <= found.metrics.items()
    titles = [title for title, _, _ in found.tables()]
    assert titles == ["settings", "data and template", "versions", "metrics"]
    metrics = list(found.tables())[3][2]
    assert ("loss", "0.5", "0.25", "-0.25") in metrics and ("kl on d", "2", "3.5", "+1.5") in metrics


def test_a_run_differs_from_itself_in_nothing(tmp_path: Path) -> None:
    run = _run(tmp_path / "a", loss=0.5, kl=2.0)
    found = compare_runs(run, run)
    assert (found.settings, found.data, found.versions) == ({}, {}, {})
    assert list(found.tables())[0][2] == [("(no difference)", "", "")]


def test_a_run_that_is_not_finished_has_no_figures(tmp_path: Path) -> None:
    found = compare_runs(_run(tmp_path / "a"), _run(tmp_path / "b", loss=0.5, kl=1.0))
    assert found.metrics["loss"] == (None, 0.5)
    with pytest.raises(RunError, match="is no run: it has no stage.json"):
        compare_runs(tmp_path, tmp_path / "a")


def test_only_like_is_compared_with_like_and_the_rows_are_said(tmp_path: Path) -> None:
    def run(name: str, **stage: Any) -> Path:
        path = _run(tmp_path / name)
        known = json.loads((path / "stage.json").read_text()) | {"eval_lengths": {"num_rows": 10}} | stage
        known["options"] |= {"eval": 0.1}
        (path / "stage.json").write_text(json.dumps(known))
        metrics = {"loss": 0.5, "eval_loss": 0.6}
        (path / "result.json").write_text(json.dumps({"status": "finished", "step": 10, "metrics": metrics}))
        settings = {"judge": name, "reference": f"runs/t/{name}/model", "temperature": 1.0 if name == "dpo" else 0.5}
        results = [{"metric": metric, "value": 1.0, "slice": None, "data": "d", "settings": settings}
                   for metric in ("kl", "true_reward")]  # fmt: skip
        (path / "eval.json").write_text(json.dumps({"results": results}))
        return path

    dpo, other, sft = run("dpo"), run("other"), run("sft", method="sft")
    found = compare_runs(dpo, other).metrics
    assert found["loss"] == (0.5, 0.5) and found["eval_loss on 10 held-out rows"] == (0.6, 0.6)
    assert (found["kl on d, judged by dpo, from dpo"], found["kl on d, judged by other, from other"]) == (
        (1.0, None), (None, 1.0),
    )  # fmt: skip
    found = compare_runs(dpo, sft).metrics
    assert (found["loss, method dpo"], found["loss, method sft"]) == ((0.5, None), (None, 0.5))
    assert found["eval_loss on 10 held-out rows, method sft"] == (None, 0.6) and "loss" not in found
    changed = run("changed", eval_lengths={"num_rows": 10}, fingerprint={"data": "bb"})
    found = compare_runs(dpo, changed).metrics
    assert [pair for key, pair in found.items() if key.startswith("eval_loss on 10 held-out rows, held out")] == [
        (0.6, None), (None, 0.6),
    ]  # fmt: skip
