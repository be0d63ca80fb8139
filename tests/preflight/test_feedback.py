"""What is said of constitutions, judges and generators before anything is asked: in about a second, without torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.errors import RecipeError, UsageError
from alignkit.feedback.server import ALLOWED
from alignkit.preflight.check import check_recipe, describe_evaluation, describe_feedback
from alignkit.preflight.requirements import list_needs, require_ready, without_unmade
from alignkit.recipe import Recipe, Stage, load_recipe, resolve

RECIPE = """name: a
model: {path: builtin:tiny-gpt2}
sft: {data: {path: builtin:instructions, max_rows: 20}}
rlaif:
  start_from: sft
  constitution: CONSTITUTION
  data: {path: builtin:prompts, max_rows: 20}
  judge: JUDGE
  MORE
"""
SEES_TORCH = "import sys; from alignkit.cli import main; code = main(); print('torch' in sys.modules); sys.exit(code)"
SERVER = "{url: 'http://127.0.0.1:1/v1', name: m}"
Make = Callable[..., Recipe]


def write(path: Path, judge: str = "sft", constitution: str = "builtin:harmlessness", more: str = "") -> Path:
    text = RECIPE.replace("JUDGE", judge).replace("CONSTITUTION", constitution).replace("MORE", more)
    path.write_text(text)
    return path


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.chdir(tmp_path)
    return lambda *given, **named: load_recipe(write(tmp_path / "a.yaml", *given, **named))


def problems_of(stage: Stage) -> list[str]:
    with pytest.raises(UsageError) as caught:
        require_ready(stage, coming=["sft", "rlaif-sft"])
    return str(caught.value).split("\n")


def finish(run: Path) -> None:
    run.mkdir(parents=True)
    (run / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (run / "stage.json").write_text("{}")
    (run / "result.json").write_text('{"status": "finished"}')


def test_a_constitution_without_principles_or_without_questions(recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("principles: []\n")
    (tmp_path / "half.yaml").write_text("principles:\n  - name: kind\n    critique: c?\n    revision: r!\n")
    (line,) = problems_of(resolve(recipe(constitution="empty.yaml"), "rlaif-label"))
    assert line.startswith("empty.yaml:1: ")
    (line,) = problems_of(resolve(recipe(constitution="half.yaml"), "rlaif-label"))
    assert line.startswith("half.yaml: no principle has a question to compare answers by")
    require_ready(resolve(recipe(constitution="half.yaml"), "rlaif-critique"), coming=["sft"])  # which needs none
    (line,) = problems_of(resolve(recipe(constitution="absent.yaml"), "rlaif-label"))
    assert line == f"a.yaml:6: rlaif-label.constitution: {tmp_path}/absent.yaml is not there"


def test_a_key_that_is_not_set_is_named_with_its_place(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_JUDGE_TOKEN", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    stage = resolve(recipe(judge=SERVER.replace("}", ", api_key_env: MY_JUDGE_TOKEN}")), "rlaif-label")
    assert problems_of(stage) == [
        "a.yaml:8: rlaif-label.judge.api_key_env would send MY_JUDGE_TOKEN to http://127.0.0.1:1; if that is meant, "
        "give --allow-key MY_JUDGE_TOKEN on the command line"
    ]
    monkeypatch.setenv(ALLOWED, "MY_JUDGE_TOKEN")
    assert problems_of(stage) == [
        "a.yaml:8: rlaif-label.judge.api_key_env: the environment variable MY_JUDGE_TOKEN is not set; export "
        "MY_JUDGE_TOKEN=... first"
    ]
    monkeypatch.setenv("MY_JUDGE_TOKEN", "x" * 20)
    require_ready(stage, coming=["rlaif-sft"])
    require_ready(resolve(recipe(judge=SERVER), "rlaif-label"), coming=["rlaif-sft"])  # needs no key


def test_files_that_are_not_there(recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "labels.jsonl").touch()
    stage = resolve(recipe(judge="{replay: label.jsonl}"), "rlaif-label")
    assert problems_of(stage) == [
        f"a.yaml:8: rlaif-label.judge.replay: {tmp_path}/label.jsonl is not there; did you mean labels.jsonl?"
    ]
    stage = resolve(recipe(more="critique: {replay: [labels.jsonl, chains.jsonl]}"), "rlaif-critique")
    assert problems_of(stage) == [f"a.yaml:9: rlaif-critique.replay: {tmp_path}/chains.jsonl is not there"]


def test_a_reward_model_cannot_judge(recipe: Make, tmp_path: Path) -> None:
    folder = tmp_path / "scorer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["GPT2ForSequenceClassification"]}))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (line,) = problems_of(resolve(recipe(judge="./scorer"), "rlaif-label"))
    assert line == (
        f"a.yaml:8: rlaif-label.judge is {folder}, a reward model, which cannot write or choose; name a language model"
    )
    (line,) = problems_of(resolve(recipe(judge="./absent/model"), "rlaif-label"))
    assert line.startswith(f"a.yaml:8: rlaif-label.judge: {tmp_path}/absent/model does not exist")


def test_what_a_stage_needs_of_others_and_what_is_there(recipe: Make, tmp_path: Path) -> None:
    made = recipe()
    dpo, label = resolve(made, "rlaif-dpo"), resolve(made, "rlaif-label")
    needs = [(need.key, need.stage, need.rows) for need in list_needs(dpo)]
    assert needs == [("start_from", "rlaif-sft", False), ("data", "rlaif-label", True)]
    assert [need.key for need in list_needs(label)] == ["start_from", "judge"]
    with pytest.raises(UsageError) as caught:
        require_ready(dpo, coming=["rlaif-sft"])
    assert str(caught.value) == (
        "a.yaml:4: rlaif-dpo needs rlaif-label, which has not been run to its end; run --stage rlaif-label of a.yaml "
        "first, or name the file of rows itself"
    )
    assert without_unmade(dpo.options.data, dpo) == []
    run = tmp_path / "runs/a/rlaif-label"
    run.mkdir(parents=True)
    (run / "rows.jsonl").write_text("half of the ro")  # what an unfinished run has left does not count
    assert without_unmade(dpo.options.data, dpo) == []
    (run / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (run / "result.json").write_text('{"status": "finished"}')
    assert without_unmade(dpo.options.data, dpo) == dpo.options.data
    require_ready(dpo, coming=["rlaif-sft"])


def test_what_is_asked_of_whom_in_words(recipe: Make) -> None:
    found = describe_feedback(resolve(recipe(constitution="builtin:positive-reviews"), "rlaif-label"))
    assert found == {"judge": "sft", "principles": "4"}
    assert describe_feedback(resolve(recipe(judge=SERVER), "rlaif-label"))["judge"] == "m at 127.0.0.1:1"


def test_check_covers_every_step_before_any_of_them_is_run(recipe: Make, tmp_path: Path) -> None:
    report = check_recipe(recipe())
    assert report.error() is None
    found = {stage.name: stage.facts for stage in report.stages}
    assert list(found) == ["sft", "rlaif-critique", "rlaif-sft", "rlaif-label", "rlaif-dpo"]
    assert found["rlaif-label"]["data builtin:prompts"] == "20 rows read, 20 kept"
    assert found["rlaif-dpo"]["data runs/a/rlaif-label/rows.jsonl"] == "of rlaif-label, not made yet: not checked"
    finish(tmp_path / "runs/a/rlaif-critique")
    found = {stage.name: stage.facts for stage in check_recipe(recipe()).stages}
    assert found["rlaif-sft"]["data runs/a/rlaif-critique/rows.jsonl"].startswith("1 rows read, 1 kept")


def test_mistakes_in_every_step_come_at_once(recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("principles: []\n")
    made = recipe(constitution="mine.yaml", judge="{replay: x.jsonl}", more="label: {mix: absent.jsonl}")
    error = check_recipe(made).error()
    assert isinstance(error, UsageError)
    lines = sorted(str(error).split("\n"))
    assert [line.split(": ")[0] for line in lines] == ["a.yaml:8", "a.yaml:9", "mine.yaml:1"]


def test_a_mistake_is_told_without_torch(run_python: Callable, tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", judge="{url: 'http://x/v1', name: m, api_key_env: NOT_SET_ANYWHERE_TOKEN}")
    allow = ["--allow-key", "NOT_SET_ANYWHERE_TOKEN"]
    for command in (["rlaif", "--stage", "label", *allow], ["rlaif", *allow]):
        done = run_python("-c", SEES_TORCH, *command, "-r", "a.yaml")
        assert (done.returncode, done.stdout.splitlines()[-1]) == (2, "False"), done.stderr
    (tmp_path / "runs/a/sft/model").mkdir(parents=True)
    (tmp_path / "runs/a/rlaif-sft/model").mkdir(parents=True)
    done = run_python("-c", SEES_TORCH, "rlaif", "--stage", "label", *allow, "-r", "a.yaml")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (2, "False"), done.stderr
    assert "a.yaml:8: rlaif-label.judge.api_key_env: the environment variable NOT_SET_ANYWHERE_TOKEN" in done.stderr
    assert not (tmp_path / "runs/a/rlaif-label").exists()


def test_the_judge_of_an_evaluation_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_JUDGE_TOKEN", raising=False)
    monkeypatch.setenv(ALLOWED, "MY_JUDGE_TOKEN")
    file = tmp_path / "a.yaml"
    file.write_text(
        "name: a\nmodel: {path: builtin:tiny-gpt2, init: scratch}\nsft: {data: builtin:instructions}\n"
        "evaluate:\n  judge: {url: 'http://127.0.0.1:9/v1', name: m, api_key_env: MY_JUDGE_TOKEN}\n"
        "  constitution: kind.yaml\n"
    )
    (tmp_path / "kind.yaml").write_text("principles: [{name: kind, comparison: Which answer is kinder?}]\n")
    with pytest.raises(RecipeError, match=r"a.yaml:5: evaluate.judge.api_key_env: .* MY_JUDGE_TOKEN is not set"):
        describe_evaluation(load_recipe(file))
    monkeypatch.setenv("MY_JUDGE_TOKEN", "x")
    assert describe_evaluation(load_recipe(file)) == {"judge": "m at 127.0.0.1:9", "principles": "1"}
    (tmp_path / "kind.yaml").unlink()
    with pytest.raises(RecipeError, match="kind.yaml: the constitution is not there"):
        describe_evaluation(load_recipe(file))
