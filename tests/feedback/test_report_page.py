"""The page of a stage that made rows: what its judge is like, what was said, what it took."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest
from helpers import messages
from judge_server import Server

from alignkit.errors import JudgeError
from alignkit.feedback import critique
from alignkit.recipe.stage import Stage
from alignkit.report.publish import write_report
from alignkit.rewards import label

MakeStage = Callable[..., Stage]


def read_page(run_dir: Path) -> str:
    """Return the visible text of report.html, its spaces as one."""
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    page = re.sub(r"<(script|style).*?</\1>", " ", page, flags=re.S)
    return re.sub(r"[\s\u202f\xa0]+", " ", unescape(re.sub(r"<[^>]+>", " ", page)))


def test_the_page_of_a_label_stage_says_what_its_judge_is_like(
    make_stage: MakeStage, write_rows: Callable[..., Path], constitution: str
) -> None:
    rows = [{"prompt": f"Q{n}", "chosen": f"<b>long</b> answer {n}", "rejected": "short"} for n in range(24)]
    check = write_rows([{"prompt": "Q", "chosen": "a longer one", "rejected": "y" * (5 + 10 * (n > 5))}
                        for n in range(8)], "check.jsonl")  # fmt: skip
    with Server(fault=lambda number, payload: "500" if number == 3 else None) as server:
        judge = {"url": server.url, "name": "tiny", "price": {"input": 1, "output": 1}}
        stage = make_stage(
            "label", data=str(write_rows(rows)), constitution=constitution, judge=judge, answers="given",
            check=str(check),
        )  # fmt: skip
        label.run(stage, Path(stage.run_dir))
    text = read_page(Path(stage.run_dir))
    for what in (
        "comparisons by a judge finished",
        "right on known answers 75.0 %",
        "both orders agree 100.0 %",
        "Judge: picks the longer answer labels 100.0 % 86.2 % to 100.0 %",
        "Judge: picks the first place labels 50.0 %",
        "Judge: right ↑ comparisons with known answers 75.0 % 40.9 % to 92.9 %",
        "Baseline: longer is better comparisons with known answers 75.0 %",
        "Calibration error (ECE) ↓ comparisons with known answers 15.0 %",
        "The first 8 comparisons and what the judge said",
        "<b>long</b> answer 0",  # as text: unescaped here only
        "of them tried again 1",
        "price of the tokens",
    ):
        assert what in text, what
    assert "steps" not in text.partition("Data")[0]


def test_the_page_of_a_critique_stage_shows_chains_and_a_spent_budget_leaves_the_rounds_there_are(
    make_stage: MakeStage, write_rows: Callable[..., Path], constitution: str
) -> None:
    prompts = write_rows([{"prompt": messages(f"Do something bad, number {number}.")} for number in range(3)])
    with Server(reply=lambda payload: f"said {len(payload['messages'])}") as server:
        source = {"url": server.url, "name": "tiny", "concurrency": 1, "retries": 0}
        stage = make_stage(
            "critique", data=str(prompts), constitution=constitution, generator=source, rounds=2, examples="none"
        )
        server.fault = lambda number, payload: "500" if number >= 11 else None
        with pytest.raises(JudgeError, match="3 rows are in rows.jsonl, and .* again: run the same command"):
            critique.run(stage, Path(stage.run_dir))
        report = json.loads((Path(stage.run_dir) / "report.json").read_text())
        assert (report["complete"], report["rows"]) == (False, 3)
        write_report(Path(stage.run_dir))
        assert "not finished" in read_page(Path(stage.run_dir))
        server.fault = lambda number, payload: None
        critique.run(stage, Path(stage.run_dir))
    report = json.loads((Path(stage.run_dir) / "report.json").read_text())
    assert (report["complete"], report["rows"]) == (True, 6)
    text = read_page(Path(stage.run_dir))
    assert "The first answers, criticised and revised prompt principle critique answer, then its revisions" in text
    assert "Do something bad, number 0. said 1" in text and "Answers, round by round" in text
    assert "Judge:" not in text and "rows written 6" in text


def test_the_page_of_published_chains_shows_them(make_stage: MakeStage, tmp_path: Path) -> None:
    steps = [{"cst_key": "kind", "critique": {"sample": "It is rude."}, "revision": {"sample": f" Try {n}."}}
             for n in (1, 2)]  # fmt: skip
    chain = {"rl_prompt": "\n\nHuman: Hello\n\nAssistant:", "initial_response": [{"sample": " Go away."}], "cst": steps}
    path = tmp_path / "chains.jsonl"
    path.write_text(json.dumps(chain) + "\n")
    stage = make_stage("critique", replay=[str(path)])
    critique.run(stage, Path(stage.run_dir))
    page = read_page(Path(stage.run_dir))
    assert "Go away." in page and "kind Try 1. kind Try 2." in page
