from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import messages, read_rows
from judge_server import Server

from alignkit.data import DataReport, Rejects
from alignkit.data import read_rows as read_data
from alignkit.errors import DataError, JudgeError, RecipeError, RunError
from alignkit.recipe.schema import DataSource
from alignkit.recipe.stage import Stage
from alignkit.rewards import label

MakeStage = Callable[..., Stage]


def run(stage: Stage) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    label.run(stage, Path(stage.run_dir))
    report = json.loads((Path(stage.run_dir) / "report.json").read_text())
    return read_rows(Path(stage.run_dir) / "rows.jsonl"), report


def kinds_kept(stage: Stage) -> Counter[str]:
    return Counter(record["kind"] for record in read_rows(Path(stage.run_dir) / "feedback.jsonl"))


@pytest.fixture
def pairs(write_rows: Callable[..., Path]) -> Path:
    """40 pairs; the longer answer stands first and second by turns."""
    rows = []
    for number in range(40):
        answers = [f"short {number}", f"a much longer answer {number}"]
        first, second = answers if number % 2 else answers[::-1]
        sides = {side: messages("", text)[1:] for side, text in (("chosen", first), ("rejected", second))}
        rows.append({"prompt": messages(f"Q{number}"), **sides})
    return write_rows(rows)


@pytest.fixture
def given(make_stage: MakeStage, pairs: Path, constitution: str) -> MakeStage:
    """Make a stage that labels the 40 pairs."""

    def make(judge: Path | Server | dict[str, Any], **options: Any) -> Stage:
        source = {"url": judge.url, "name": "tiny"} if isinstance(judge, Server) else judge
        source = str(source) if isinstance(source, Path) else source
        return make_stage("label", **{
            "data": str(pairs), "constitution": constitution, "judge": source, "answers": "given", **options,
        })  # fmt: skip

    return make


def test_local_judge_labels_sampled_answers(
    make_stage: MakeStage, write_rows: Callable[..., Path], chat_model: Path, constitution: str
) -> None:
    prompts = write_rows([{"prompt": messages(f"Review film {number}.")} for number in range(12)])
    stage = make_stage(
        "label", data=str(prompts), constitution=constitution, judge=str(chat_model), start=chat_model, answers=3,
        max_new_tokens=8,
    )  # fmt: skip
    rows, report = run(stage)
    assert report["comparisons"] == 36 and report["labelled"] == 36
    assert all(set(row) == {"prompt", "chosen", "rejected", "label"} for row in rows)
    assert all(row["chosen"][0]["role"] == "assistant" for row in rows)
    assert kinds_kept(stage) == {"answer": 36, "label": 72 + 6}  # both orders; second opinions
    labels = read_rows(Path(stage.run_dir) / "labels.jsonl")
    for row, one in zip(rows, labels, strict=True):
        assert one["p_first"] == pytest.approx(sum(one["orders"]) / 2)
        assert row["label"] == pytest.approx(max(one["p_first"], 1 - one["p_first"]))
        assert row["chosen"] == (one["first"] if one["p_first"] >= 0.5 else one["second"])
    assert {one["principle"] for one in labels} == {"one", "two", "three", "four"}
    result = json.loads((Path(stage.run_dir) / "result.json").read_text())
    assert result["status"] == "finished" and result["step"] == len(rows)


def test_answers_and_labels_do_not_depend_on_the_batch_or_on_an_interruption(
    make_stage: MakeStage, write_rows: Callable[..., Path], chat_model: Path, constitution: str
) -> None:
    prompts = write_rows([{"prompt": messages(f"Review film {number}.")} for number in range(7)])
    options = {"data": str(prompts), "constitution": constitution, "judge": str(chat_model), "max_new_tokens": 8}
    whole, _ = run(make_stage("label", name="whole", start=chat_model, **options))
    stage = make_stage("label", name="again", start=chat_model, batch_size=2, **options)
    before, _ = run(stage)
    store = Path(stage.run_dir) / "feedback.jsonl"
    lines = store.read_text().splitlines(keepends=True)
    store.write_text("".join(lines[:9]) + lines[9][:20])  # a kill in the middle of a write
    (Path(stage.run_dir) / "result.json").unlink()
    again, _ = run(stage)
    assert again == before  # to the last bit: the batches are those of a run that was not cut off
    assert again == [{**row, "label": pytest.approx(row["label"], abs=1e-5)} for row in whole]
    assert sorted(store.read_text().splitlines()[:9]) == sorted(line.strip() for line in lines[:9])


def test_a_finished_stage_answers_at_once_and_refuses_another_judge(
    given: MakeStage, chat_model: Path, base_model: Path
) -> None:
    stage = given(chat_model)
    rows, _ = run(stage)
    before = (Path(stage.run_dir) / "feedback.jsonl").stat().st_mtime_ns
    label.run(stage, Path(stage.run_dir))
    assert (Path(stage.run_dir) / "feedback.jsonl").stat().st_mtime_ns == before
    with pytest.raises(RunError, match="judge.model: .* -> "):
        label.run(given(base_model), Path(stage.run_dir))
    assert label.run(given(chat_model, batch_size=2), Path(stage.run_dir)).status == "finished"
    source = [DataSource(path=str(Path(stage.run_dir) / "rows.jsonl"))]  # the data room reads the rows
    read = list(read_data(stage, source, report=DataReport(), rejects=Rejects(), method="dpo"))
    assert [row.label for row in read] == [row["label"] for row in rows]
    assert all(row.kind == "pair" and row.conversational for row in read)


def test_base_models_judge_transcripts_with_examples(
    given: MakeStage, write_rows: Callable[..., Path], base_model: Path, tmp_path: Path
) -> None:
    path, examples = tmp_path / "one.yaml", tmp_path / "examples.yaml"
    path.write_text("principles:\n  - {name: one, comparison: Which is better?}\n")
    examples.write_text("comparisons:\n  - {human: Hi, better: Hello, worse: No}\n")
    data = write_rows([{"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " a", "rejected": " b c"}])
    (row,), report = run(given(base_model, data=str(data), constitution=str(path), examples=str(examples)))
    assert report["labelled"] == 1 and isinstance(row["prompt"], str)
    assert {row["chosen"], row["rejected"]} == {" a", " b c"}


def test_thoughts_are_kept_and_labels_clamped(given: MakeStage, pairs: Path, chat_model: Path) -> None:
    stage = given(chat_model, data={"path": str(pairs), "max_rows": 4}, cot=True, cot_tokens=6)
    rows, _ = run(stage)
    assert kinds_kept(stage) == {"thoughts": 8, "label": 8}
    assert all(0.5 <= row["label"] <= 0.6 for row in rows)


def test_hard_labels_have_no_label_and_people_s_comparisons_are_mixed_in(
    given: MakeStage, write_rows: Callable[..., Path], chat_model: Path
) -> None:
    people = write_rows([{"prompt": "Text?", "chosen": "yes", "rejected": "no"}], "people.jsonl")
    soft, report = run(given(chat_model, name="soft", mix=str(people)))
    hard, _ = run(given(chat_model, name="hard", hard=True))
    assert [{**row, "label": None} for row in hard] == [{**row, "label": None} for row in soft[:-1]]
    assert all("label" not in row for row in hard)
    assert report["rows_by_people"] == 1 and len(soft) == 41
    sides = {"chosen": messages("", "yes")[1:], "rejected": messages("", "no")[1:]}
    assert soft[-1] == {"prompt": messages("Text?"), **sides, "label": 1.0}


def test_published_labels_stand_in_for_a_judge(make_stage: MakeStage, write_rows: Callable, constitution: str) -> None:
    data = write_rows([{"prompt": f"Q{n}", "chosen": "a", "rejected": "b"} for n in range(3)])
    known = [
        {"prompt": "Q0", "chosen": "b", "rejected": "a", "label": 0.8},
        {"prompt": "Q1", "chosen": "a", "rejected": "b"},
    ]
    judge = {"replay": str(write_rows(known, "published.jsonl"))}
    rows, report = run(make_stage("label", data=str(data), constitution=constitution, judge=judge, answers="given"))
    assert rows == [known[0] | {"label": pytest.approx(0.8)}, known[1] | {"label": 1.0}]
    assert report["abstained_because"] == {"not among the published labels": 1}


def test_what_a_judge_leans_to_shows_in_the_report(given: MakeStage, capsys: pytest.CaptureFixture[str]) -> None:
    with Server(judge=lambda payload: 0.97) as server:
        rows, report = run(given(server, name="always-a"))
    assert report["picks_first_place"]["share"] == 1.0 and report["order_agreement"]["share"] == 0.0
    assert "the judge picks the first place in 100% of 80 verdicts: it does not compare" in capsys.readouterr().err
    assert all(row["label"] == pytest.approx(0.5) for row in rows) and report["ties"] == 40
    with Server() as server:
        rows, report = run(given(server, name="longer"))
    assert report["length_bias"]["share"] == 1.0 and report["length_bias"]["n"] == 40
    assert report["order_agreement"]["share"] == report["agreement_between_principles"]["share"] == 1.0
    assert all("longer" in row["chosen"][0]["content"] and row["label"] == pytest.approx(0.9) for row in rows)


def test_a_judge_too_weak_to_judge_ends_the_stage_or_is_warned_of(
    given: MakeStage, chat_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weak = r"(picks the \w+ place in \d+% of 80 verdicts: it does not compare|by chance \(50%\))"
    stage = given(chat_model, on_weak_judge="stop")  # random weights
    with pytest.raises(JudgeError, match=rf"^label: .*{weak}; .*on_weak_judge: warn$"):
        run(stage)
    assert not (Path(stage.run_dir) / "result.json").exists()
    kept = (Path(stage.run_dir) / "feedback.jsonl").read_bytes()
    capsys.readouterr()
    rows, report = run(given(chat_model))  # taken all the same: nothing is asked again
    assert re.search(f"warning.*{weak}", capsys.readouterr().err)
    assert len(rows) == 40 and report["order_agreement"]["low"] <= 0.5
    assert (Path(stage.run_dir) / "feedback.jsonl").read_bytes() == kept
    with Server() as server:
        assert len(run(given(server, name="able", on_weak_judge="stop"))[0]) == 40


def test_judge_is_measured_on_comparisons_with_known_answers(given: MakeStage, write_rows: Callable[..., Path]) -> None:
    check = [{"prompt": "Q", "chosen": "long answer" if n < 6 else "x", "rejected": "y" * (n + 2)} for n in range(8)]
    with Server() as server:
        rows, report = run(given(server, check=str(write_rows(check, "check.jsonl"))))
    found = report["check"]
    assert (len(rows), found["n"], found["accuracy"], found["longer_is_better"]) == (40, 8, 0.75, 0.75)
    assert found["low"] == pytest.approx(0.4093, abs=1e-3) and found["high"] == pytest.approx(0.9285, abs=1e-3)
    assert found["ece"] == pytest.approx(0.15) and found["bins"][0]["n"] == 8  # 0.9 sure, 0.75 right


def test_empty_answers_are_left_out_with_a_reason(
    make_stage: MakeStage, write_rows: Callable[..., Path], constitution: str
) -> None:
    prompts = write_rows([{"prompt": messages(f"Q{number}")} for number in range(3)])
    with Server(reply=lambda payload: "") as silent, Server() as server:
        stage = make_stage(
            "label", data=str(prompts), constitution=constitution, judge={"url": server.url, "name": "tiny"},
            generator={"url": silent.url, "name": "tiny"},
        )  # fmt: skip
        with pytest.raises(DataError, match="the answer is empty"):
            label.run(stage, Path(stage.run_dir))
        assert server.requests == 0


def test_a_constitution_without_questions_is_refused(given: MakeStage, chat_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("principles:\n  - {name: kind, critique: What is unkind?, revision: Be kind.}\n")
    stage = given(chat_model, constitution=str(path))
    with pytest.raises(RecipeError, match="no principle has a question to compare answers by"):
        label.run(stage, Path(stage.run_dir))


def test_orders_one_asks_half_as_often(given: MakeStage) -> None:
    with Server() as server:
        stage = given(server, orders="one")
        rows, report = run(stage)
        assert server.requests == 40 + 4
    assert report["order_agreement"] is None and len(rows) == 40
    shown = {record["order"] for record in read_rows(Path(stage.run_dir) / "feedback.jsonl")}
    assert shown == {"first first", "second first"}


def test_an_endpoint_that_is_down_leaves_the_rows_there_are(given: MakeStage) -> None:
    stage = given({"url": "http://127.0.0.1:9/v1", "name": "tiny", "retries": 0})
    message = r"http://127.0.0.1:9 cannot be reached .* run the same command to go on"
    with pytest.raises(JudgeError, match=message) as caught:
        label.run(stage, Path(stage.run_dir))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 7
