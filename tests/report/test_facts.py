"""Reading run directories in every state, secrets taken out."""

from __future__ import annotations

import math
import re

import pytest
from written_runs import SECRET, WriteRun

from alignkit.errors import RunError
from alignkit.report.facts import Facts, find_runs, order_runs
from alignkit.report.publish import render_run


def test_a_run_that_is_being_written_is_read_up_to_its_torn_line(write_run: WriteRun) -> None:
    run = write_run(finished=False, num_steps=5)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    facts = Facts(run)
    assert (facts.step, facts.num_steps, facts.is_finished) == (5, 5, False)
    assert facts.error.startswith("Traceback")


def test_a_value_that_is_not_finite_is_a_gap_and_the_last_of_a_step_counts(write_run: WriteRun) -> None:
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": "nan"}, {"step": 2, "loss": 1.5}, {"step": 3, "loss": "inf"}]
    facts = Facts(write_run(metrics=rows))
    points = facts.series("loss")
    assert points[:2] == [(1.0, 3.0), (2.0, 1.5)] and math.isnan(points[2][1])


def test_secrets_are_gone_from_every_file(write_run: WriteRun) -> None:
    run = write_run(text=f"my token is {SECRET}", warnings=[SECRET], finished=False)
    facts = Facts(run)
    assert SECRET in "".join(file.read_text() for file in run.glob("*.*"))
    assert SECRET not in repr(facts)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("eval.json", "{", r"eval\.json: cannot be read \(.*; it is left out"),
        ("preview.json", '{"rows": "x"}', r"preview\.json: rows is \"x\"; it is left out"),
        ("result.json", "{}", r"result\.json: has no status; it is left out"),
        ("warnings.jsonl", 'null\n{"time": "x", "mess\n{"time": "x", "message": "y"}\n',
         r"2 lines cannot be read \(first: line 1\)"),
        ("rejects.jsonl", "null\nnull\n", r"rejects\.jsonl: 2 lines cannot be read"),
        ("metrics.jsonl", '{"st\n{"step": 1, "loss": 2.0}\n', r"metrics\.jsonl: 1 line cannot be read"),
    ],
)  # fmt: skip
def test_a_damaged_record_is_named_and_left_out(
    write_run: WriteRun, name: str, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run()
    (run / name).write_text(text)
    render_run(Facts(run))
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert re.search(said, warning)


def test_a_damaged_stage_json_or_none_is_refused(write_run: WriteRun) -> None:
    run = write_run()
    for text, said in (("{", "cannot be read"), ('{"stage": "sft", "method": "sft", "model": "x"}', 'model is "x"')):
        (run / "stage.json").write_text(text)
        with pytest.raises(RunError, match=rf"stage\.json: {said}"):
            Facts(run)
    with pytest.raises(RunError, match=r"runs/demo: is no run: it has no stage\.json"):
        Facts(run.parent)


def test_runs_are_found_and_put_after_what_they_need(write_run: WriteRun) -> None:
    run = write_run("ppo", "ppo", start_stage="sft", rewards={"runs/demo/rm/model": "rm"})
    write_run("rm", "rm", start_stage="sft")
    write_run("sft", "sft")
    aside = run.parent / "sft.old-20261123-010203-1"
    aside.mkdir()
    (aside / "stage.json").write_text("{}")
    found = [Facts(path) for path in find_runs(run.parent)]
    assert {facts.name for facts in found} == {"ppo", "rm", "sft"}
    assert [facts.name for facts in order_runs(found)] == ["sft", "rm", "ppo"]
    assert next(facts for facts in found if facts.name == "ppo").parents == ["sft", "rm"]


def test_metrics_leave_out_bookkeeping_and_their_final_values_are_the_result_s(write_run: WriteRun) -> None:
    facts = Facts(write_run("dpo", "dpo", num_steps=4))
    names = facts.metric_names
    assert "rewards/margins" in names and "loss" in names
    assert not {"step", "epoch", "num_tokens", "runtime", "eval_loss"} & set(names)
    assert facts.result["metrics"] == {"loss": 0.5}
    assert [facts.last(name) for name in ("loss", "eval_loss", "no such")] == [0.5, 2.1 / 4, None]
