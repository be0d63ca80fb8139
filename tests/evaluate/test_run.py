"""A whole evaluation: rows that were held out, groups that fit, eval.json that grows, messages for what cannot be."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignkit.data import DataReport, Rejects, read_rows, split_eval, true_reward
from alignkit.data.rows import fingerprint_prompt
from alignkit.errors import DataError, RunError, UsageError
from alignkit.evaluate.context import Figure
from alignkit.evaluate.options import combine, name_runs, sources
from alignkit.evaluate.run import describe, evaluate, evaluate_all, merge, table
from alignkit.evaluate.target import _stage, find_target, list_siblings, read_measured
from alignkit.feedback.cache import Store
from alignkit.recipe.schema import DataSource, EvaluateOptions


def _options(**given: Any) -> EvaluateOptions:
    return EvaluateOptions(max_rows=6, max_new_tokens=8, resamples=100, **given)


def _measure(source: Path, **given: Any) -> dict[str, Any]:
    return evaluate(str(source), _options(**given), device="cpu")


def _whole(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {result["metric"]: result for result in data["results"] if result["slice"] is None}


def _rows(tmp_path: Path, *rows: Any) -> list[DataSource]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [DataSource(path=str(file))]


def test_a_run_is_measured_on_what_it_held_out_and_its_reference_is_found_where_it_lies(run_dir: Path) -> None:
    target = find_target(str(run_dir), trust_code=False)
    given, share = target.held_out()
    assert share == 0.3
    measured, label = read_measured(given, share=share, seed=3, max_rows=1000, warn=pytest.fail)
    rows = read_rows(_stage(given, 3), given, report=DataReport(), rejects=Rejects())
    assert [row.prompt for row in measured] == [row.prompt for held, row in split_eval(rows, 0.3, 3) if held]
    assert 5 < len(measured) < 30 and label == "builtin:preferences (held-out 0.3)"
    assert target.reference() == str(run_dir.parent / "sft/model")
    assert find_target(str(run_dir.parent / "sft"), trust_code=False).reference() is None
    assert find_target(str(run_dir / "model"), trust_code=False).run is not None
    # Without held-out rows builtin data has a test split, and others an error.
    options = target.stage["options"]
    options["eval"] = None
    (source,), share = target.held_out()
    assert (source.split, share) == ("test", None)
    options["data"] = [{"path": "owner/data"}]
    with pytest.raises(DataError, match="tiny/dpo kept no rows out of training: name rows to measure on with --data"):
        target.held_out()


def test_a_dpo_run_gets_every_group_that_fits(run_dir: Path) -> None:
    against = str(run_dir.parent / "sft")
    data = _measure(run_dir, against=against, best_of=[1, 2])
    whole = _whole(data)
    assert set(whole) == {
        "perplexity", "bits_per_byte", "implicit_reward_accuracy", "calibration_error", "pair_accuracy_longer",
        "pair_accuracy_shorter", "response_length", "ended_share", "true_reward", "kl", "win_rate",
        "win_rate_length_controlled",
    }  # fmt: skip
    for result in data["results"]:
        assert set(result) - {"change"} == {
            "metric", "value", "low", "high", "n", "unit", "better", "interval", "slice", "data", "settings", "details",
        }  # fmt: skip
        assert result["n"] >= 1 and result["data"] == "builtin:preferences (held-out 0.3)"
        if result["low"] is not None and result["metric"] != "calibration_error":  # never below 0: biased upwards
            assert result["low"] <= result["value"] <= result["high"]
    assert whole["kl"]["settings"]["reference"] == str(run_dir.parent / "sft/model")
    assert whole["implicit_reward_accuracy"]["settings"]["beta"] == 0.2
    # Beside each figure stands the paired difference to the run's start, on the same rows.
    compared = {name: each["change"]["start"] for name, each in whole.items() if "change" in each}
    assert compared == {
        **dict.fromkeys(("perplexity", "bits_per_byte", "response_length", "ended_share", "true_reward"), "sft"),
        "implicit_reward_accuracy": f"{compared['implicit_reward_accuracy'].split()[0]} is better",
        "win_rate": "an even score",
    }  # fmt: skip
    longer = whole["response_length"]
    assert longer["change"]["value"] == pytest.approx(longer["value"] - longer["change"]["from"])
    assert json.loads((run_dir / "eval.json").read_text()) == json.loads(json.dumps(data))
    # Again: from the cache, the same figures.
    before = (run_dir / "eval-cache.jsonl").read_text()
    assert _measure(run_dir, against=against, best_of=[1, 2])["results"] == data["results"]
    assert (run_dir / "eval-cache.jsonl").read_text() == before


def test_a_run_s_start_is_measured_on_its_rows_and_is_its_reference(run_dir: Path, reference_dir: Path) -> None:
    stage = json.loads((run_dir / "stage.json").read_text()) | {"method": "sft"}
    (run_dir / "stage.json").write_text(json.dumps(stage))
    results = _measure(run_dir, metrics=["perplexity", "answers", "kl"], start=True)["results"]
    found = {(each["metric"], each["data"]): each for each in results}
    rows = "builtin:preferences (held-out 0.3)"
    begun = f"{rows}, by its start sft"
    assert {data for _, data in found} == {rows, begun} and ("kl", rows) in found and ("kl", begun) not in found
    shutil.copytree(run_dir, run_dir.parent / "alone")
    shutil.copytree(reference_dir, run_dir.parent / "alone/model", dirs_exist_ok=True)
    for result in _measure(run_dir.parent / "alone", metrics=["perplexity", "answers"])["results"]:
        assert result["value"] == found[result["metric"], begun]["value"]
    assert found["perplexity", rows]["value"] != found["perplexity", begun]["value"]


def test_rows_that_a_model_or_its_ancestors_were_trained_on_are_named_with_their_share(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [f"Was film {number} good?" for number in range(5)]
    rows = read_measured(
        _rows(tmp_path, *({"prompt": prompt, "completion": " Yes."} for prompt in prompts)), share=None, seed=0,
        max_rows=9, warn=print,
    )[0]  # fmt: skip
    known = np.asarray([fingerprint_prompt(row) for row in rows], np.uint64)
    known[:2].tofile(run_dir.parent / "sft/prompts.u64")  # as training leaves them
    known[1:3].tofile(run_dir / "prompts.u64")
    stage = json.loads((run_dir / "stage.json").read_text())
    lineage = [{"role": "model", "path": "elsewhere/sft/model"}]  # the runs were moved
    (run_dir / "stage.json").write_text(json.dumps(stage | {"lineage": lineage}))
    chat = [[{"role": "user", "content": prompt}] for prompt in prompts]  # the same prompts as turns
    data = _measure(run_dir, data=_rows(tmp_path, *({"prompt": turns} for turns in chat)), metrics=["answers"])
    trained = {"by": ["sft", "dpo"], "rows": 3, "of": 5}
    assert {str(each.get("trained")) for each in data["results"]} == {str(trained)}
    assert data["results"][0]["data"] in table(data["results"])[1][0][-1]
    assert table(data["results"])[1][0][-1].endswith(", 3 of 5 prompts trained on")
    assert "have a prompt that sft and dpo trained on: figures on them are not of held-out rows" in data["warnings"][0]
    (run_dir / "prompts.u64").unlink()
    (run_dir.parent / "sft/prompts.u64").unlink()
    again = _measure(run_dir, data=_rows(tmp_path, *({"prompt": turns} for turns in chat)), metrics=["answers"])
    assert "trained" not in again["results"][-1]


def test_another_seed_samples_other_answers_to_the_same_held_out_prompts(run_dir: Path) -> None:
    values, asked = [], []
    for seed in (3, 4):
        data = evaluate(str(run_dir), _options(metrics=["perplexity", "answers"], start=False), seed=seed, device="cpu")
        values.append(_whole(data)["perplexity"]["value"])
        asked.append(len((run_dir / "eval-cache.jsonl").read_text().splitlines()))
    assert values[0] == values[1]
    assert asked == [12, 18]  # 6 likelihoods and 6 answers, then 6 new answers only


def test_a_repeated_prompt_is_asked_once_and_a_text_of_one_token_is_left_out(policy_dir: Path, tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "completion": " it was"} for prompt in ("one", "two", "one", "one")]
    data = _measure(policy_dir, data=_rows(tmp_path, *rows), metrics=["perplexity", "answers"])
    assert {result["metric"]: result["n"] for result in data["results"]} == {
        "perplexity": 4, "bits_per_byte": 4, "response_length": 2, "ended_share": 2,
    }  # fmt: skip
    texts = _rows(tmp_path, {"text": "a"}, {"text": "the plot was good"})
    data = _measure(policy_dir, data=texts, metrics=["perplexity"])
    assert data["results"][0]["n"] == 1
    assert [line for line in data["warnings"] if "perplexity leaves out 1 of 2 texts" in line]


def test_a_task_and_a_number_of_examples_given_twice_are_measured_once(policy_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "task.jsonl").write_text('{"context": "Q", "completion": " a", "choices": [" a", " b"]}\n')
    task, out = str(tmp_path / "task.jsonl"), tmp_path / "figures.json"
    options = EvaluateOptions(metrics=["tasks"], tasks=[task, task], shots=[0, 0])
    names = [each["metric"] for each in evaluate(str(policy_dir), options, device="cpu", out=out)["results"]]
    assert names == ["likelihood_accuracy", "likelihood_accuracy_sum"]
    with pytest.raises(UsageError, match="is a directory; name the file of the figures"):
        evaluate(str(policy_dir), options, device="cpu", out=tmp_path)


@pytest.mark.parametrize("wrong", [{"results": None}, {"results": ["x"]}, {"results": [{"settings": None}]}])
def test_figures_that_are_none_of_ours_are_replaced_with_a_word(
    policy_dir: Path, tmp_path: Path, capsys: Any, wrong: dict[str, Any]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "some text to predict"}\n')
    options = EvaluateOptions(metrics=["perplexity"], data=[{"path": str(tmp_path / "rows.jsonl")}])
    out = tmp_path / "figures.json"
    first = evaluate(str(policy_dir), options, device="cpu", out=out)
    out.write_text(json.dumps(first | wrong))
    assert evaluate(str(policy_dir), options, device="cpu", out=out)["results"] == first["results"]
    assert f"{out}: holds what is no figure of ours; none of it is kept" in capsys.readouterr().err
    assert json.loads(out.read_text())["results"] == first["results"]


def test_a_reward_model_gets_accuracy_calibration_and_baselines(reward_dir: Path) -> None:
    data = _measure(reward_dir, data=[DataSource(path="builtin:preferences", split="test")])
    whole = ["reward_accuracy", "calibration_error", "pair_accuracy_longer", "pair_accuracy_shorter"]
    assert list(_whole(data)) == whole
    assert data["warnings"][0].endswith(f"pairs are too long for {reward_dir}")  # it reads 96 tokens
    assert not (reward_dir / "eval.json").exists()  # no run: nothing is left without --out


def test_overlap_is_measured_where_there_is_one_right_answer(policy_dir: Path, tmp_path: Path) -> None:
    options = _options(data=[DataSource(path="builtin:instructions", split="test")])
    data = evaluate(str(policy_dir), options, device="cpu", out=tmp_path / "here.json")
    assert {"rouge1", "rouge2", "rougeL", "bleu", "chrf"} <= {result["metric"] for result in data["results"]}
    kept = json.loads((tmp_path / "here.json").read_text())["results"]
    assert all(isinstance(result[key], float) for result in kept for key in ("value", "low", "high"))


def test_what_cannot_be_measured_is_said(policy_dir: Path, reward_dir: Path) -> None:
    data = [DataSource(path="builtin:reviews", split="test")]
    for given, message in (
        ({"metrics": ["kl"]}, "--metric kl: it needs prompts and a reference"),
        ({"metrics": ["pairs", "tasks"]}, "pairs: the rows hold no pairs of answers; tasks: no task is named"),
        ({"against": str(policy_dir)}, "win_rate cannot be measured: it needs prompts"),
        ({"best_of": [2]}, "best_of cannot be measured"),
    ):
        with pytest.raises(UsageError, match=message):
            _measure(policy_dir, data=data, **given)
    with pytest.raises(UsageError, match="is a reward model, which says nothing"):
        _measure(reward_dir, data=data, metrics=["perplexity"])


SKIPPING: dict[str, Any] = {
    "seed": None, "out": None, "device": "cpu", "trust_code": False, "folder": Path(), "skip": True,
}  # fmt: skip


def test_stages_of_a_recipe_that_are_not_finished_are_left_out(run_dir: Path, capsys: Any) -> None:
    names = [str(run_dir.parent / name) for name in ("sft", "dpo", "later")]
    found = list(evaluate_all([(name, _options(metrics=["perplexity", "pairs"])) for name in names], **SKIPPING))
    assert [result["name"] for result in found] == ["tiny/sft", "tiny/dpo"]
    assert "pairs" in found[0]["warnings"][0]  # an sft run has no reference
    assert "later: not finished, left out" in capsys.readouterr().err
    with pytest.raises(RunError, match="no stage is finished"):
        list(evaluate_all([(name, _options()) for name in names[2:]], **SKIPPING))


def test_the_optimum_is_measured_on_the_reference_alone(run_dir: Path, policy_dir: Path, capsys: Any) -> None:
    shutil.copytree(run_dir.parent / "sft", run_dir.parent / "other")
    names = [str(run_dir.parent / name) for name in ("sft", "other", "dpo")]
    options = _options(frontier={"betas": [1.0, 1e-3], "answers": 24, "best_of": [2, 32]}, samples=2)
    requests = [(name, options) for name in names]
    found = {Path(result["model"]).name: result for result in evaluate_all(requests, **SKIPPING)}
    metrics = {name: {figure["metric"] for figure in result["results"]} for name, result in found.items()}
    wanted = {"reference_reward", "optimum_reward", "optimum_kl", "best_of_n", "best_of_n_kl"}
    assert wanted <= metrics["sft"]
    assert not wanted & (metrics["other"] | metrics["dpo"])
    assert {"true_reward", "kl"} <= metrics["dpo"]
    (start,) = (figure for figure in found["sft"]["results"] if figure["metric"] == "reference_reward")
    assert start["settings"]["answers"] == 32  # best of 32 needs as many
    assert start["n"] == 6 and len(start["details"]) > 10
    # A single stage of the recipe is no other case, and where nothing but the optimum is asked for nothing is left.
    (alone,) = evaluate_all([(name, options) for name in names[2:]], **SKIPPING)
    assert not wanted & {figure["metric"] for figure in alone["results"]}
    only = options.model_copy(update={"metrics": ["frontier"]})
    found = evaluate_all([(name, only) for name in names], **SKIPPING)
    assert [Path(result["model"]).name for result in found] == ["sft"]
    assert "dpo: no stage is held near it, left out" in capsys.readouterr().err


def test_the_optimum_is_that_of_the_answers_that_are_sampled(run_dir: Path) -> None:
    """Recomputed from the answers in the cache: the same prompts, each with its own normalisation."""
    sft, beta = run_dir.parent / "sft", 0.5
    data = evaluate(str(sft), _options(frontier={"betas": [beta], "answers": 24}, metrics=["frontier"]), device="cpu")
    cache = [json.loads(line)["value"] for line in (sft / "eval-cache.jsonl").read_text().splitlines()]
    rewards = [true_reward(value[1]) for value in cache if isinstance(value, list) and len(value) == 3]
    assert len(rewards) == 6 * 24
    found = []
    for start in range(0, len(rewards), 24):
        own = rewards[start : start + 24]
        weights = [math.exp(reward / beta) for reward in own]
        found.append(sum(w * r for w, r in zip(weights, own, strict=True)) / sum(weights))
    (figure,) = (figure for figure in data["results"] if figure["metric"] == "optimum_reward")
    assert figure["value"] == pytest.approx(sum(found) / 6)
    assert figure["settings"] | {"answers": 24, "reward": "true_reward", "temperature": 1.0} == figure["settings"]


def _described(*figures: Figure, weights: str = "w") -> dict[str, Any]:
    return describe(figures, name="n", model="m", weights=weights, seed=0, seconds=1.0, warnings=())


def _figure(metric: str, value: float | None, **given: Any) -> Figure:
    return Figure(metric, value, None, None, 5, **{"data": "d", **given})


def test_a_figure_replaces_its_older_self_and_keeps_the_others() -> None:
    kl, old, sliced = _figure("kl", 1.0), _figure("bleu", 2.0), _figure("bleu", 9.0, slice="old cut")
    new, other = _figure("bleu", 3.0), _figure("bleu", 4.0, data="e")
    merged = merge(_described(kl, old, sliced), _described(new, other))
    assert [(result["metric"], result["value"]) for result in merged["results"]] == [
        ("kl", 1.0), ("bleu", 3.0), ("bleu", 4.0),
    ]  # fmt: skip
    assert [r["value"] for r in merge(_described(kl), _described(new, weights="other"))["results"]] == [3.0]
    plain = Figure("perplexity", float("inf"), 1.0, float("nan"), 3).to_dict()  # what is not finite has no value
    assert (plain["value"], plain["low"], plain["high"]) == (None, 1.0, None)
    json.dumps(plain, allow_nan=False)


def test_the_table_shows_slices_below_their_figure_and_how_figures_differ() -> None:
    results = [Figure("kl", 1.25, 1.0, 1.5, 5, unit="nats", data="d"), _figure("kl", None, slice="K=1")]
    columns, rows = table([figure.to_dict() for figure in results])
    assert columns == ("metric", "value", "95 % interval", "n", "unit", "on")
    assert rows == [("kl", 1.25, "1 to 1.5", 5, "nats", "d"), ("  kl, K=1", None, None, 5, None, "d")]
    short, long = ({"rows": 6, "max_new_tokens": number} for number in (8, 64))
    results = [_figure("response_length", 8.0, settings=short), _figure("response_length", 30.0, settings=long)]
    results.append(_figure("kl", 1.0, settings=long))
    shown = table([figure.to_dict() for figure in results])[1]
    assert [row[-1] for row in shown] == ["d, max_new_tokens 8", "d, max_new_tokens 64", "d"]


def test_a_name_that_is_almost_a_run_is_told_which_it_may_be(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_dir.parents[2])
    for source, message in (
        ("runs/tiny", "runs/tiny: holds the runs dpo, sft; name one of them"),
        ("dpo", "dpo: is not there; did you mean runs/tiny/dpo?"),
    ):
        with pytest.raises(RunError) as caught:
            find_target(source, trust_code=False)
        assert str(caught.value) == message
    assert list_siblings("runs/tiny/dpo") == {"dpo": "runs/tiny/dpo", "sft": "runs/tiny/sft"}
    assert list_siblings("owner/model") == {}
    found = name_runs(EvaluateOptions(against="sft", reward="gpt2"), list_siblings("runs/tiny/dpo"), strict=False)
    assert (found.against, found.reward) == ("runs/tiny/sft", "gpt2")


def test_what_is_wrong_is_said_before_anything_is_measured(
    run_dir: Path, reward_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for given, message in (
        ({"against": str(reward_dir)}, "is a reward model, which says nothing"),
        ({"tasks": ["sums.jsonl"]}, "there is no such task"),
        ({"against": "runs/no/thing"}, "runs/no/thing"),
    ):
        with pytest.raises(UsageError, match=message):
            _measure(run_dir, **given)
    assert "measuring" not in capsys.readouterr().err


def test_options_of_the_command_line_lie_over_the_recipe_s(tmp_path: Path) -> None:
    base = EvaluateOptions(max_rows=9, against="sft", tasks=["sums.jsonl"])
    options = combine(base, {"max_rows": None, "shots": [2], "data": sources(["builtin:prompts"], None)})
    assert (options.max_rows, options.shots, options.against) == (9, [2], "sft")
    assert options.data is not None and options.data[0].split == "test"
    assert name_runs(options, {"sft": "runs/x/sft"}).against == "runs/x/sft"
    wrong = "--against: sft is neither a stage nor a path that exists; did you mean sft2?"
    with pytest.raises(UsageError, match=wrong):
        name_runs(options, {"sft2": "runs/x/sft2"})
    with pytest.raises(UsageError) as caught:
        combine(base, {"metrics": ["perplexitty"], "temperature": -1.0})
    assert [str(problem) for problem in caught.value.problems] == [
        "--metric: is perplexitty; it must be one of answers, best_of, classification, frontier, kl, overlap, pairs, "
        "perplexity, tasks, win_rate; did you mean perplexity?",
        "--temperature: is -1.0: input should be greater than or equal to 0",
    ]
    with pytest.raises(UsageError, match="--top-p: has no effect with temperature 0"):
        combine(base, {"temperature": 0.0, "top_p": 0.5})
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(UsageError, match="--split has no effect on"):
        sources([str(tmp_path / "rows.jsonl")], "test")


def test_greedy_answers_and_cut_tails_are_measured_and_no_kl_is_told_of_them(run_dir: Path) -> None:
    greedy = {r["metric"]: r for r in _measure(run_dir, temperature=0.0)["results"]}
    assert greedy["response_length"]["settings"]["temperature"] == 0 and "kl" not in greedy
    found = [r for r in _measure(run_dir, top_k=1)["results"] if r["settings"].get("top_k") == 1]
    (cut,) = (r for r in found if r["metric"] == "response_length")  # the greedy figure is kept beside it
    assert cut["value"] == greedy["response_length"]["value"]
    for given in ({"temperature": 0.0}, {"top_p": 0.9}):
        with pytest.raises(UsageError, match="--metric kl: it is of all that the policy says: take top_p"):
            _measure(run_dir, metrics=["kl"], **given)


def test_rows_that_do_not_fit_are_left_out_with_a_warning(tmp_path: Path) -> None:
    good = [{"prompt": letter, "completion": "b"} for letter in "ac"]
    (source,) = _rows(tmp_path, good[0], {"nonsense": 1}, good[1])
    said: list[str] = []
    measured, _ = read_measured([source], share=None, seed=0, max_rows=10, warn=said.append)
    assert len(measured) == 2
    assert said[0].startswith(f"1 rows of {source.path} were left out (first: ")


@pytest.mark.slow
def test_two_evaluations_of_a_run_at_once_keep_both_figures(run_dir: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from alignkit.recipe.schema import EvaluateOptions\n"
        "from alignkit.evaluate import run\n"
        "def merge(before, now, plain=run.merge):\n"
        "    import time; time.sleep(0.5); return plain(before, now)\n"  # the other one has time to write meanwhile
        "run.merge = merge\n"
        "options = EvaluateOptions(max_rows=6, max_new_tokens=8, resamples=100, metrics=[sys.argv[2]], start=False)\n"
        "run.evaluate(sys.argv[1], options, device='cpu')\n"
    )
    wanted = ("perplexity", "answers")
    running = [subprocess.Popen([sys.executable, "-c", script, str(run_dir), metric], stderr=-1) for metric in wanted]
    said = [process.communicate(timeout=120)[1].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0] and "cannot be read" not in "".join(said), said
    found = {result["metric"] for result in json.loads((run_dir / "eval.json").read_text())["results"]}
    assert found >= {"perplexity", "response_length"}
    assert len(Store(run_dir / "eval-cache.jsonl")) == len((run_dir / "eval-cache.jsonl").read_text().splitlines())
