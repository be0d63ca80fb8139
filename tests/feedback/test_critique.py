from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import PUBLISHED, messages, read_rows, real_data
from judge_server import Server, last_message

from alignkit.data import DataReport, Rejects
from alignkit.data import read_rows as read_data
from alignkit.errors import DataError, JudgeError
from alignkit.feedback import critique
from alignkit.feedback.constitution import load_constitution
from alignkit.recipe.schema import DataSource
from alignkit.recipe.stage import Stage

MakeStage = Callable[..., Stage]


def run(stage: Stage) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    critique.run(stage, Path(stage.run_dir))
    report = json.loads((Path(stage.run_dir) / "report.json").read_text())
    return read_rows(Path(stage.run_dir) / "rows.jsonl"), report


@pytest.fixture
def prompts(write_rows: Callable[..., Path]) -> Path:
    return write_rows([{"prompt": messages(f"Do something bad, number {number}.")} for number in range(6)])


@pytest.fixture
def asked(make_stage: MakeStage, prompts: Path, constitution: str) -> Callable[..., Stage]:
    """Make a stage whose chains a server writes."""

    def make(server: Server, *, source: dict[str, Any] | None = None, **options: Any) -> Stage:
        generator = {"url": server.url, "name": "tiny", **(source or {})}
        options = {"data": str(prompts), "constitution": constitution, "examples": "none", **options}
        return make_stage("critique", generator=generator, **options)

    return make


def scribe(payload: dict[str, Any]) -> str:
    """Answer like somebody who counts revisions: `answer 0`, a critique of it, `answer 1`, ..."""
    said = [message["content"] for message in payload["messages"]]
    if said[-1].endswith("Reply with the new answer only."):
        number = int(next(text for text in reversed(said) if text.startswith("answer ")).split()[1])
        return f"answer {number + 1}"
    return "It is too bad." if any(text.startswith("answer ") for text in said) else "answer 0"


def test_every_revision_becomes_a_row_and_the_next_round_sees_only_the_newest(
    asked: Callable[..., Stage], prompts: Path, constitution: str
) -> None:
    with Server(reply=scribe) as server:
        stage = asked(server)
        rows, report = run(stage)
    assert [row["completion"][0]["content"] for row in rows] == [f"answer {n}" for n in range(1, 5)] * 6
    assert [row["prompt"] for row in rows[::4]] == [row["prompt"] for row in read_rows(prompts)]
    assert report["rows"] == 24 and report["broken_chains"] == 0 and sum(report["principles"].values()) == 24
    assert [one["changed_share"] for one in report["rounds"][1:]] == [1.0] * 4
    kept = read_rows(Path(stage.run_dir) / "feedback.jsonl")
    assert Counter(record["kind"] for record in kept) == {"sample": 6, "critique": 24, "revision": 24}
    principles = {p.critique: p for p in load_constitution(constitution).principles}
    for payload in server.payloads:
        said = [message["content"] for message in payload["messages"]]
        if len(said) == 3:  # prompt, answer, critique request
            assert said[1].startswith("answer ") and said[2] in principles
        if len(said) == 5:  # and the critique, and the revision request of the same principle
            assert said[3] == "It is too bad."
            assert said[4] == f"{principles[said[2]].revision} Reply with the new answer only."
        assert len(said) in (1, 3, 5)
    drawn: dict[str, list[str]] = {}  # a principle is drawn at every round
    for record in kept:
        if record["kind"] == "revision":
            drawn.setdefault(record["place"], []).append(record["principle"])
    assert all(len(names) == 4 for names in drawn.values())
    assert len({tuple(names) for names in drawn.values()}) > 1 and any(len({*names}) > 1 for names in drawn.values())


def test_critiques_can_be_left_out(asked: Callable[..., Stage]) -> None:
    with Server(reply=scribe) as server:
        rows, _ = run(asked(server, critiques=False, rounds=2, examples="builtin"))
        assert server.requests == 18 and len(rows) == 12
        assert not any("It is too bad." in json.dumps(payload) for payload in server.payloads)


def test_helpful_answers_are_added_as_they_are(asked: Callable[..., Stage], write_rows: Callable[..., Path]) -> None:
    helpful = write_rows([{"prompt": messages(f"Help {number}")} for number in range(3)], "helpful.jsonl")
    with Server(reply=scribe) as server:
        rows, report = run(asked(server, rounds=1, helpful={"data": str(helpful), "samples": 2}, examples="builtin"))
    assert report["helpful_rows"] == 6 and len(rows) == 12
    assert [row["completion"][0]["content"] for row in rows[6:]] == ["answer 0"] * 6
    seeds = {payload["seed"] for payload in server.payloads if last_message(payload).startswith("Help")}
    assert len(seeds) == 6  # each sample draws its own numbers


def test_a_chain_that_breaks_is_counted_with_its_reason(asked: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    def reply(payload: dict[str, Any]) -> str:
        said = scribe(payload)
        if "number 3" in payload["messages"][0]["content"] and said == "answer 2":
            return " "
        return "<|im_end|> answer" if "number 4" in last_message(payload) else said

    with Server(reply=reply) as server:
        stage = asked(server)
        rows, report = run(stage)
    assert len(rows) == 4 * 4 + 1 and report["broken_chains"] == 2
    rejects = read_rows(Path(stage.run_dir) / "rejects.jsonl")
    assert [(row["line"], row["reason"]) for row in rejects] == [
        (4, "round 2: the answer is empty"),
        (5, "round 1: the answer holds the control token <|im_end|>"),
    ]
    assert "2 of 6 chains broke off (rejects.jsonl)" in capsys.readouterr().err


@pytest.mark.parametrize("chat", [True, False])
def test_local_models_write_chains_that_an_interruption_does_not_change(
    make_stage: MakeStage, prompts: Path, constitution: str, chat_model: Path, base_model: Path, chat: bool
) -> None:
    source = str(chat_model if chat else base_model)
    options = {"data": str(prompts), "constitution": constitution, "rounds": 2, "max_new_tokens": 6, "examples": "none"}
    whole, report = run(make_stage("critique", name="whole", generator=source, **options))
    assert len(whole) == 12 - sum(2 for _ in range(report["broken_chains"])) or report["broken_chains"]
    stage = make_stage("critique", name="again", generator=source, batch_size=1, **options)
    run(stage)
    store = Path(stage.run_dir) / "feedback.jsonl"
    store.write_text("".join(store.read_text().splitlines(keepends=True)[:11]))
    (Path(stage.run_dir) / "result.json").unlink()
    again, _ = run(stage)
    assert again == whole


def test_a_generator_that_is_down_says_what_is_kept(asked: Callable[..., Stage]) -> None:
    with Server(reply=scribe, fault=lambda number, payload: "500" if number >= 10 else None) as server:
        stage = asked(server, source={"retries": 0, "concurrency": 1}, examples="builtin")
        with pytest.raises(JudgeError, match="0 rows .* the 10 answers in feedback.jsonl will not be asked for again"):
            critique.run(stage, Path(stage.run_dir))
        server.fault = lambda number, payload: None
        rows, _ = run(stage)
        assert len(rows) == 24 and set(server.answered.values()) == {1}


@real_data
def test_the_published_chains_become_rows_without_any_model(make_stage: MakeStage) -> None:
    files = sorted(str(path) for path in PUBLISHED.glob("samples_*_SLMADISON.jsonl"))
    stage = make_stage("critique", replay=files)
    rows, report = run(stage)
    assert report["chains"] == 53 and len(rows) == 212 == 53 * 4  # every step of every published chain
    assert len(report["principles"]) == 16 and [one["texts"] for one in report["rounds"]] == [53] * 5
    published = [json.loads(line) for path in files for line in Path(path).read_text().split("\n") if line]
    assert [row["completion"][0]["content"] for row in rows] == [
        step["revision"]["sample"].strip() for chain in published for step in chain["cst"]
    ]
    source = [DataSource(path=str(Path(stage.run_dir) / "rows.jsonl"))]
    read = list(read_data(stage, source, report=DataReport(), rejects=Rejects(), method="sft"))
    assert len(read) == 212 and all(row.kind == "prompt_completion" and row.conversational for row in read)


def test_a_file_that_holds_no_chains_is_named_with_its_lines(make_stage: MakeStage, tmp_path: Path) -> None:
    path = tmp_path / "chains.jsonl"
    chain = {"rl_prompt": "\n\nHuman: Hi\n\nAssistant:", "initial_response": [{"sample": "a"}], "cst": []}
    revised = chain | {"cst": [{"cst_key": "kind", "revision": {"sample": "b"}}]}
    path.write_text(f"{json.dumps(chain)}\n{{]\n{json.dumps(revised)}\n{json.dumps(revised)[:-9]}")  # the last is torn
    stage = make_stage("critique", replay=[str(path)])
    with pytest.raises(DataError) as caught:
        critique.run(stage, Path(stage.run_dir))
    said = [str(problem).rpartition("/")[2] for problem in caught.value.problems]
    assert [line[:30] for line in said[:3]] == [
        "chains.jsonl:1: is no publishe", "chains.jsonl:2: invalid JSON: ", "chains.jsonl:4: invalid JSON: ",
    ]  # fmt: skip
    assert said[3].startswith("3 of 4 rows cannot be used")
    assert not (Path(stage.run_dir) / "feedback.jsonl").exists()
    rows, _ = run(make_stage("critique", replay=[str(path)], on_bad_row="skip"))
    assert [row["completion"][0]["content"] for row in rows] == ["b"]
    assert [row["line"] for row in read_rows(Path(stage.run_dir) / "rejects.jsonl")] == [1, 2, 4]
