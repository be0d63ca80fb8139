from __future__ import annotations

import json
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


@pytest.fixture
def pairs(write_rows: Callable[..., Path]) -> Path:
    """40 pairs; the longer answer stands first and second by turns."""
    rows = []
    for number in range(40):
        answers = [f"short {number}", f"a much longer answer {number}"]
        first, second = answers if number % 2 else answers[::-1]
        rows.append(
            {"prompt": messages(f"Q{number}"), "chosen": messages("", first)[1:], "rejected": messages("", second)[1:]}
        )
    return write_rows(rows)


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
    assert all(set(row) == {"prompt", "chosen", "rejected", "label"} and 0.5 <= row["label"] <= 1 for row in rows)
    assert all(row["chosen"][0]["role"] == "assistant" for row in rows)
    kept = read_rows(Path(stage.run_dir) / "feedback.jsonl")
    assert Counter(record["kind"] for record in kept) == {"answer": 36, "label": 72 + 6}  # both orders; second opinions
    labels = read_rows(Path(stage.run_dir) / "labels.jsonl")
    for row, one in zip(rows, labels, strict=True):
        assert one["p_first"] == pytest.approx(sum(one["orders"]) / 2)
        assert row["label"] == pytest.approx(max(one["p_first"], 1 - one["p_first"]))
        assert row["chosen"] == (one["first"] if one["p_first"] >= 0.5 else one["second"])
    assert {one["principle"] for one in labels} == {"one", "two", "three", "four"}
    result = json.loads((Path(stage.run_dir) / "result.json").read_text())
    assert result["status"] == "finished" and result["step"] == len(rows)


def test_rows_are_read_back_by_the_data_room(
    make_stage: MakeStage, pairs: Path, chat_model: Path, constitution: str
) -> None:
    stage = make_stage("label", data=str(pairs), constitution=constitution, judge=str(chat_model), answers="given")
    rows, _ = run(stage)
    source = [DataSource(path=str(Path(stage.run_dir) / "rows.jsonl"))]
    read = list(read_data(stage, source, report=DataReport(), rejects=Rejects(), method="dpo"))
    assert [row.label for row in read] == [row["label"] for row in rows]
    assert all(row.kind == "pair" and row.conversational for row in read)


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
    make_stage: MakeStage, pairs: Path, chat_model: Path, base_model: Path, constitution: str
) -> None:
    options = {"data": str(pairs), "constitution": constitution, "answers": "given"}
    stage = make_stage("label", judge=str(chat_model), **options)
    run(stage)
    before = (Path(stage.run_dir) / "feedback.jsonl").stat().st_mtime_ns
    label.run(stage, Path(stage.run_dir))
    assert (Path(stage.run_dir) / "feedback.jsonl").stat().st_mtime_ns == before
    other = make_stage("label", judge=str(base_model), **options)
    with pytest.raises(RunError, match="judge.model: .* -> "):
        label.run(other, Path(other.run_dir))
    asked_faster = make_stage("label", judge=str(chat_model), batch_size=2, **options)
    assert label.run(asked_faster, Path(stage.run_dir)).status == "finished"


def test_base_models_judge_transcripts_with_examples(
    make_stage: MakeStage, write_rows: Callable[..., Path], base_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "one.yaml"
    path.write_text("principles:\n  - {name: one, comparison: Which is better?}\n")
    examples = tmp_path / "examples.yaml"
    examples.write_text("comparisons:\n  - {human: Hi, better: Hello, worse: No}\n")
    data = write_rows([{"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " a", "rejected": " b c"}])
    stage = make_stage(
        "label", data=str(data), constitution=str(path), judge=str(base_model), answers="given", examples=str(examples)
    )
    rows, report = run(stage)
    assert (
        report["labelled"] == 1
        and isinstance(rows[0]["prompt"], str)
        and {rows[0]["chosen"], rows[0]["rejected"]} == {" a", " b c"}
    )


def test_thoughts_are_kept_and_labels_clamped(
    make_stage: MakeStage, pairs: Path, chat_model: Path, constitution: str
) -> None:
    stage = make_stage(
        "label", data={"path": str(pairs), "max_rows": 4}, constitution=constitution, judge=str(chat_model),
        answers="given", cot=True, cot_tokens=6,
    )  # fmt: skip
    rows, _ = run(stage)
    kept = read_rows(Path(stage.run_dir) / "feedback.jsonl")
    assert Counter(record["kind"] for record in kept) == {"thoughts": 8, "label": 8}
    assert all(0.5 <= row["label"] <= 0.6 for row in rows)


def test_hard_labels_have_no_label_and_no_ties(
    make_stage: MakeStage, pairs: Path, chat_model: Path, constitution: str
) -> None:
    options = {"data": str(pairs), "constitution": constitution, "judge": str(chat_model), "answers": "given"}
    soft, _ = run(make_stage("label", name="soft", **options))
    hard, _ = run(make_stage("label", name="hard", hard=True, **options))
    assert [{**row, "label": None} for row in hard] == [{**row, "label": None} for row in soft]
    assert all("label" not in row for row in hard)


def test_comparisons_by_people_are_mixed_in(
    make_stage: MakeStage, write_rows: Callable[..., Path], pairs: Path, chat_model: Path, constitution: str
) -> None:
    people = write_rows([{"prompt": "Text?", "chosen": "yes", "rejected": "no"}], "people.jsonl")
    options = {"data": str(pairs), "constitution": constitution, "judge": str(chat_model), "answers": "given"}
    rows, report = run(make_stage("label", mix=str(people), **options))
    assert report["rows_by_people"] == 1 and len(rows) == 41
    assert rows[-1] == {
        "prompt": messages("Text?"),
        "chosen": messages("", "yes")[1:],
        "rejected": messages("", "no")[1:],
        "label": 1.0,
    }


def test_published_labels_stand_in_for_a_judge(
    make_stage: MakeStage, write_rows: Callable[..., Path], constitution: str
) -> None:
    data = write_rows([{"prompt": f"Q{n}", "chosen": "a", "rejected": "b"} for n in range(3)])
    known = [
        {"prompt": "Q0", "chosen": "b", "rejected": "a", "label": 0.8},
        {"prompt": "Q1", "chosen": "a", "rejected": "b"},
    ]
    published = write_rows(known, "published.jsonl")
    stage = make_stage(
        "label", data=str(data), constitution=constitution, judge={"replay": str(published)}, answers="given"
    )
    rows, report = run(stage)
    assert rows == [
        {"prompt": "Q0", "chosen": "b", "rejected": "a", "label": pytest.approx(0.8)},
        {"prompt": "Q1", "chosen": "a", "rejected": "b", "label": 1.0},
    ]
    assert report["abstained_because"] == {"not among the published labels": 1}


def test_a_judge_that_always_answers_a_is_flagged(
    make_stage: MakeStage, pairs: Path, constitution: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Server(judge=lambda payload: 0.97) as server:
        judge = {"url": server.url, "name": "tiny"}
        rows, report = run(
            make_stage("label", data=str(pairs), constitution=constitution, judge=judge, answers="given")
        )
    assert report["picks_first_place"]["share"] == 1.0 and report["order_agreement"]["share"] == 0.0
    assert "the judge picks the first place in 100% of 80 verdicts: it does not compare" in capsys.readouterr().err
    assert all(row["label"] == pytest.approx(0.5) for row in rows) and report["ties"] == 40


def test_a_judge_that_prefers_length_shows_in_the_report(make_stage: MakeStage, pairs: Path, constitution: str) -> None:
    with Server() as server:
        judge = {"url": server.url, "name": "tiny"}
        rows, report = run(
            make_stage("label", data=str(pairs), constitution=constitution, judge=judge, answers="given")
        )
    assert report["length_bias"]["share"] == 1.0 and report["length_bias"]["n"] == 40
    assert report["order_agreement"]["share"] == 1.0
    assert report["agreement_between_principles"]["share"] == 1.0
    assert all("longer" in row["chosen"][0]["content"] and row["label"] == pytest.approx(0.9) for row in rows)


def test_judge_is_measured_on_comparisons_with_known_answers(
    make_stage: MakeStage, pairs: Path, write_rows: Callable[..., Path], constitution: str
) -> None:
    check = write_rows(
        [{"prompt": "Q", "chosen": "long answer" if n < 6 else "x", "rejected": "y" * (n + 2)} for n in range(8)],
        "check.jsonl",
    )
    with Server() as server:
        judge = {"url": server.url, "name": "tiny"}
        stage = make_stage(
            "label", data=str(pairs), constitution=constitution, judge=judge, answers="given", check=str(check)
        )
        rows, report = run(stage)
    assert len(rows) == 40
    found = report["check"]
    assert (found["n"], found["accuracy"], found["longer_is_better"]) == (8, 0.75, 0.75)
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


def test_a_constitution_without_questions_is_refused(make_stage: MakeStage, pairs: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("principles:\n  - {name: kind, critique: What is unkind?, revision: Be kind.}\n")
    stage = make_stage(
        "label", data=str(pairs), constitution=str(path), judge={"url": "http://127.0.0.1:9", "name": "x"}
    )
    with pytest.raises(RecipeError, match="no principle has a question to compare answers by"):
        label.run(stage, Path(stage.run_dir))


def test_orders_one_asks_half_as_often(make_stage: MakeStage, pairs: Path, constitution: str) -> None:
    with Server() as server:
        judge = {"url": server.url, "name": "tiny"}
        stage = make_stage(
            "label", data=str(pairs), constitution=constitution, judge=judge, answers="given", orders="one"
        )
        rows, report = run(stage)
        assert server.requests == 40 + 4
    assert report["order_agreement"] is None and len(rows) == 40
    shown = {record["order"] for record in read_rows(Path(stage.run_dir) / "feedback.jsonl")}
    assert shown == {"first first", "second first"}


def test_an_endpoint_that_is_down_leaves_the_rows_there_are(
    make_stage: MakeStage, pairs: Path, constitution: str
) -> None:
    judge = {"url": "http://127.0.0.1:9/v1", "name": "tiny", "retries": 0}
    stage = make_stage("label", data=str(pairs), constitution=constitution, judge=judge, answers="given")
    with pytest.raises(
        JudgeError, match=r"http://127.0.0.1:9 cannot be reached .* run the same command to go on"
    ) as caught:
        label.run(stage, Path(stage.run_dir))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 7
