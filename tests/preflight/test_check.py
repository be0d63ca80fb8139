from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignkit.errors import EnvironmentProblem, Problem, RecipeError, UsageError
from alignkit.preflight.check import CheckReport, StageCheck, check_recipe, find_doubts, require_space
from alignkit.preflight.requirements import require_packages
from alignkit.recipe import load_recipe, resolve

NO_DOUBTS = {
    "rows": 1000,
    "duplicates": 10,
    "sources": [{"equal_answers": 0}],
    "longer_chosen_share": 0.65,
    "comparisons": 1000,
    "overlap": 0,
    "overlap_places": [],
}


def _write(directory: Path, recipe: str, **files: str) -> Path:
    for name, text in files.items():
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
    path = directory / "recipe.yaml"
    path.write_text(recipe, encoding="utf-8")
    return path


def test_nothing_unusual_raises_no_doubt() -> None:
    assert find_doubts(NO_DOUBTS) == []


@pytest.mark.parametrize(
    ("change", "doubt"),
    [
        ({"duplicates": 11}, "11 of 1000 rows repeat an earlier one; dedupe: true drops them"),
        ({"sources": [{"equal_answers": 3}]}, "3 rows have the same answer as chosen and rejected"),
        (
            {"longer_chosen_share": 0.2},
            "the chosen answer is the shorter one in 80% of 1000 comparisons (77% to 82%): the model may learn length "
            "instead of quality",
        ),
        (
            {"overlap": 2, "overlap_places": ["a:1", "a:2"]},
            "2 held-out rows have a prompt that is also trained on, first at a:1, a:2",
        ),
    ],
)
def test_each_doubt_is_said_with_its_number(change: dict[str, object], doubt: str) -> None:
    assert find_doubts(NO_DOUBTS | change) == [doubt]


def test_a_bias_of_length_that_chance_can_make_is_no_doubt() -> None:
    assert find_doubts(NO_DOUBTS | {"longer_chosen_share": 0.75, "comparisons": 8}) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("optim: galore_adamw\n  optim_target_modules: all-linear",
         "optim galore_adamw needs galore_torch, not installed here; pip install galore-torch"),
        ("optim: schedule_free_adamw", "optim schedule_free_adamw needs schedulefree, not installed here; "
         "pip install schedulefree"),
        ("report_to: [neptune]", "report_to neptune needs neptune, not installed here; pip install neptune"),
        ("report_to: comet_ml", "report_to comet_ml needs comet_ml, not installed here; pip install comet-ml"),
    ],
)  # fmt: skip
def test_a_package_that_is_missing_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # whatever is installed here
    path = _write(tmp_path, f"model: builtin:tiny-gpt2\nsft:\n  data: builtin:instructions\n  {line}\n")
    with pytest.raises(EnvironmentProblem) as caught:
        require_packages(resolve(load_recipe(path), "sft"))
    assert str(caught.value) == f"{path}:4: {message}" and caught.value.exit_code == 8


@pytest.mark.parametrize(
    ("model", "code", "message"),
    [
        ("attn_implementation: kernels-community/flash-attn2", 2,
         "model.attn_implementation runs code of the hub, which a recipe cannot allow; give --trust-code on the "
         "command line"),
        ("use_kernels: true", 2,
         "model.use_kernels runs code of the hub, which a recipe cannot allow; give --trust-code on the command line"),
        ("attn_implementation: flash_attention_4", 8,
         "model.attn_implementation flash_attention_4 needs kernels, not installed here; pip install "
         "'alignkit[kernels]'"),
    ],
)  # fmt: skip
def test_kernels_of_the_hub_are_code_and_need_their_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, code: int, message: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # whatever is installed here
    path = _write(tmp_path, f"model:\n  path: builtin:tiny-llama\n  {model}\nsft: {{data: builtin:instructions}}\n")
    with pytest.raises((UsageError, EnvironmentProblem)) as caught:
        require_packages(resolve(load_recipe(path), "sft"))
    assert str(caught.value) == f"{path}:3: {message}" and caught.value.exit_code == code


def test_too_little_space_says_how_much_is_needed_and_what_to_do(tmp_path: Path) -> None:
    assert require_space(tmp_path / "runs" / "a", 1024, num_checkpoints=3) > 1024
    with pytest.raises(EnvironmentProblem, match=r"3 checkpoints and the final model need about 1048576\.00 GiB; free"):
        require_space(tmp_path / "runs" / "a", 2**50, num_checkpoints=3)


def test_a_check_notes_what_a_user_can_act_on_and_lets_bugs_through() -> None:
    check = StageCheck("sft", "sft")

    def fail(error: Exception) -> None:
        raise error

    assert check.note(fail, RecipeError("beta is -1", where="a.yaml:7")) is None
    assert check.note(fail, EnvironmentProblem("no cuda")) is None
    assert (check.problems, check.environment) == ([Problem("beta is -1", "a.yaml:7")], ["no cuda"])
    with pytest.raises(KeyError):
        check.note(fail, KeyError("a bug"))


def test_exit_code_is_2_for_mistakes_and_8_when_only_the_machine_is_wrong() -> None:
    mistaken = StageCheck("sft", "sft", problems=[Problem("beta is -1", "a.yaml:7")], environment=["no cuda"])
    lacking = StageCheck("dpo", "dpo", environment=["no cuda"])
    both = CheckReport("a.yaml", [mistaken, lacking], []).error()
    assert isinstance(both, UsageError)
    assert (str(both), both.exit_code) == ("a.yaml:7: beta is -1\nno cuda", 2)
    only = CheckReport("a.yaml", [lacking], []).error()
    assert only is not None
    assert (str(only), only.exit_code) == ("no cuda", 8)
    assert CheckReport("a.yaml", [StageCheck("sft", "sft")], []).error() is None
    doubtful = [StageCheck("sft", "sft", warnings=["3 of 4 rows are ties"])]
    assert CheckReport("a.yaml", doubtful, []).error() is None
    strict = CheckReport("a.yaml", doubtful, [], strict=True).error()
    assert strict is not None and (str(strict), strict.exit_code) == ("sft: 3 of 4 rows are ties", 2)


@pytest.mark.slow
def test_good_recipe_is_described_stage_by_stage(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        "name: good\n"
        "model: {path: builtin:tiny-llama}\n"
        "lora: {r: 4}\n"
        "sft:\n"
        "  data: {path: rows.jsonl}\n"
        "dpo:\n"
        "  start_from: sft\n"
        "  data: {path: builtin:preferences, max_rows: 40}\n"
        "  eval: 0.2\n",
        rows='{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "dd", "source": "x"}\n',
    )
    report = check_recipe(load_recipe(path))
    assert report.error() is None
    sft, dpo = report.stages
    assert sft.facts["starts from"] == "builtin:tiny-llama"
    assert sft.facts[f"data {tmp_path / 'rows.jsonl'}"] == (
        "2 rows read, 2 kept (2 trl prompt_completion); columns not used: source; read as turns of the chat template"
    )
    # of a completion one or two tokens, and the end of its turn
    assert sft.facts["tokens"].endswith("of which 5 are trained")
    assert dpo.facts["starts from"] == "sft, not trained yet: looked at with builtin:tiny-llama"
    assert dpo.facts["chat template"].endswith(
        "an answer ends with <|im_end|>, which is trained; no tools; reasoning is written as <think> in the answer"
    )
    assert {"device", "held out", "chosen is longer"} <= set(dpo.facts)
    # Three checkpoints of weights and two optimizer values, in float32, and a tenth more.
    needed = 1.1 * 3 * 3 * 4 * int(dpo.facts["trained parameters"].replace(",", ""))
    assert dpo.facts["disk"].startswith(f"needs {int(needed) / 1024:.1f} KiB, ")
    assert list(tmp_path.iterdir()) != [] and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_advice_fails_where_it_is_asked_to(run_alignkit, tmp_path: Path) -> None:
    rows = [{"prompt": "Which?", "chosen": "This one.", "rejected": "That one."}]
    rows += [{"prompt": "Which?", "chosen": "That one.", "rejected": "This one."}]
    _write(
        tmp_path, "name: odd\nmodel: {path: builtin:tiny-gpt2}\ndpo:\n  data: {path: rows.jsonl}\n",
        rows="".join(json.dumps(row) + "\n" for row in rows),
    )  # fmt: skip
    what = "1 rows say the opposite of an earlier one with the same prompt and answers, first rows.jsonl:2"
    done = run_alignkit("check", "recipe.yaml", "--json")
    assert (done.returncode, json.loads(done.stdout)["stages"][0]["warnings"]) == (0, [what])
    done = run_alignkit("check", "recipe.yaml", "--json", "--strict")
    assert (done.returncode, json.loads(done.stdout)["ok"]) == (2, False)
    assert f"error: dpo: {what}\n" in done.stderr


@pytest.mark.slow
def test_all_problems_of_all_stages_come_at_once(run_alignkit, tmp_path: Path) -> None:
    _write(
        tmp_path,
        "name: bad\n"
        "model: {path: builtin:tiny-gpt2}\n"
        "sft:\n"
        "  data: {path: rows.jsonl}\n"
        "rm:\n"
        "  data: {path: missing.jsonl}\n",
        rows='{"prompt": "a", "completion": "b"}\nnot json\n{"prompt": "a", "completion": null}\n',
    )
    done = run_alignkit("check", "--recipe", "recipe.yaml", "--json")
    assert done.returncode == 2
    for place in ("rows.jsonl:2: ", "rows.jsonl:3: ", "missing.jsonl: no such file"):
        assert done.stderr.count(place) == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is False
    assert [len(stage["problems"]) > 0 for stage in report["stages"]] == [True, True]
    assert [entry.name for entry in tmp_path.iterdir() if entry.name not in ("recipe.yaml", "rows.jsonl")] == []
