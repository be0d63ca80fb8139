"""The page: what it shows, that nothing of a run can run in it, and that it needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from written_runs import HOSTILE, SECRET, WriteRun, figure

from alignkit.errors import RunError
from alignkit.report.evaluation import tabulate
from alignkit.report.facts import Facts
from alignkit.report.publish import write_recipe_report, write_report


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of style and script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            self.text += data


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


EVERYTHING = [
    figure("perplexity", 4.681, 4.31, 5.1, unit="per token", better="lower"),
    figure("reward_accuracy", 0.816, 0.75, 0.865, unit="share", better="higher", data="pairs"),
    figure("reward_accuracy", 0.62, 0.48, 0.74, unit="share", better="higher", data="pairs", slice="margin 0 to 0.5"),
    figure("calibration_error", 0.04, 0.02, 0.07, unit="share", data="pairs",
           details=[{"confidence": 0.55, "accuracy": 0.5}, {"confidence": 0.9, "accuracy": 0.95}]),
    figure("kl", 0.0, interval="none"),
    figure("true_reward", None),
    figure("win_rate", 0.61, 0.54, 0.67, unit="share", settings={"against": "runs/demo/sft", "judge": "rm"},
           details=[{"prompt": "Which?", "answer": "This one.", "other": "That one.", "win": True}]),
    figure("best_of_n", 0.1, 0.0, 0.2, slice="N=1", settings={"kl": 0.0}),
    figure("best_of_n", 0.5, 0.4, 0.6, slice="N=4", settings={"kl": 0.636}),
    figure("lm_eval/arc_easy/acc", 0.25, 0.22, 0.28, unit="share"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "titles"),
    [
        ("sft", ["Loss", "Entropy", "Learning rate"]),
        ("rm", ["Loss", "Pair accuracy", "Margin", "Mean reward", "Learning rate"]),
        ("dpo", ["Loss", "Pair accuracy", "Margin", "Implicit reward", "Log-probability", "Learning rate"]),
        ("ppo", ["Loss", "Reward", "Gold reward", "KL to the reference", "Reward against √KL",
                 "Gold reward against √KL", "Length of answers", "Entropy", "Learning rate", "kl_coef"]),
    ],
)  # fmt: skip
def test_a_run_shows_its_curves_and_everything_else(write_run: WriteRun, method: str, titles: list[str]) -> None:
    run = write_run(method, method, warnings=["the rows are few"], evaluation=EVERYTHING)
    path = write_report(run)
    assert path == run / "report.html"
    page = read(path)
    charts = [attributes["aria-label"] for tag, attributes in page.tags if attributes.get("class") == "chart"]
    assert [title for title in titles if not any(chart.startswith(f"{title}:") for chart in charts)] == []
    for text in (
        "the rows are few", "finished", "Calibration", "before", "during", "after", "What the loss sees",
        "25\u2009% of the tokens are learnt", "rows.jsonl line 7", "duplicates kept", "extra", "Some CPU", "2 threads",
        "torch", "2.13.0", "1\u2009min 14\u2009s", "123\u2009456", "743.9 MiB", "0123456789ab, with changes",
        "demo.yaml:7", "Perplexity", "4.31 to 5.10", "81.6\u2009%", "margin 0 to 0.5", "lm_eval/arc_easy/acc",
        "against sft, judged by rm", "This one.",
    ):  # fmt: skip
        assert text in page.text, text


def test_slices_stand_below_their_metric_and_best_of_n_is_one_group(write_run: WriteRun) -> None:
    rows = tabulate([Facts(write_run(evaluation=EVERYTHING))])
    shown = [(row["name"], row["slice"], row["value"].replace("\u2009", " "), row["first"]) for row in rows]
    assert shown == [
        ("Win rate", "", "61.0 %", True),  # what decides comes first
        ("True reward", "", "\u2013", True),
        ("Pair accuracy", "", "81.6 %", True),
        ("Pair accuracy", "margin 0 to 0.5", "62.0 %", False),
        ("KL to the reference", "", "0", True),
        ("Calibration error (ECE)", "", "4.0 %", True),
        ("Best of N", "N=1", "0.100", True),
        ("Best of N", "N=4", "0.500", False),
        ("lm_eval/arc_easy/acc", "", "25.0 %", True),
        ("Perplexity", "", "4.68", True),
    ]


def test_several_runs_are_compared_by_the_whole(write_run: WriteRun) -> None:
    runs = [Facts(write_run(name, evaluation=EVERYTHING)) for name in ("sft", "dpo")]
    shown = [(row["name"], row["slice"], row["run"]) for row in tabulate(runs)]
    assert [run for name, text, run in shown if name == "Pair accuracy"] == ["sft", "dpo"]
    assert not [text for name, text, _ in shown if "margin" in text]
    assert {text for name, text, _ in shown if name == "Best of N"} == {"N=1", "N=4"}  # they have no whole


def test_runs_of_a_sweep_stand_together_and_other_data_is_named_where_it_changes(write_run: WriteRun) -> None:
    runs = [
        write_run(
            f"dpo-{number}", "dpo",
            evaluation=[
                figure("implicit_reward_accuracy", 0.6 + number / 10, 0.5, 0.9, unit="share", data="pairs",
                       settings={"rows": 12, "reference": f"runs/demo/sft-seed-{number}", "beta": 0.1 * (number + 1)}),
                figure("win_rate", 0.6, 0.5, 0.7, unit="share", data="pairs",
                       settings={"rows": 12, "against": f"runs/demo/sft-seed-{number}"}),
            ],
        )
        for number in range(2)
    ]  # fmt: skip
    shown = tabulate([Facts(run) for run in runs])
    assert [(row["name"], row["run"], row["data"] if row["says_data"] else "", row["first"]) for row in shown] == [
        ("Win rate", "dpo-0", "pairs, against sft-seed-0", True),
        ("Win rate", "dpo-1", "pairs, against sft-seed-1", False),
        ("Pair accuracy, implicit reward", "dpo-0", "pairs", True),
        ("Pair accuracy, implicit reward", "dpo-1", "", False),
    ]


def test_nothing_of_a_run_becomes_markup(write_run: WriteRun) -> None:
    evil = {"recipe": HOSTILE, "versions": {HOSTILE: HOSTILE}, "reward_stages": {f"runs/{HOSTILE}/model": HOSTILE}}
    evil["lineage"] = [{"role": HOSTILE, "path": HOSTILE, "action": HOSTILE}]
    source = {"path": HOSTILE, "formats": {HOSTILE: 1}, "ignored_columns": {HOSTILE: 1}}
    evil["data"] = {"read": 1, "kinds": {HOSTILE: 1}, "sources": [source]}
    metrics = [{"step": step, HOSTILE: float(step), "loss": 1.0} for step in (1, 2)]
    evaluation = [
        figure(HOSTILE, 1.0, 0.5, 1.5, unit=HOSTILE, slice=HOSTILE, data=HOSTILE, settings={HOSTILE: HOSTILE})
    ]
    for method in ("sft", "rm"):
        run = write_run(method, method, stage=evil, metrics=metrics, text=HOSTILE, evaluation=evaluation,
                        warnings=[HOSTILE], finished=method == "rm")  # fmt: skip
        page = read(write_report(run))
        assert [tag for tag, _ in page.tags if tag in ("img", "iframe", "object", "embed", "form", "base")] == []
        assert [tag for tag, _ in page.tags].count("script") == 1
        assert [name for _, attributes in page.tags for name in attributes if name.startswith("on")] == []
        assert page.text.count("<script>alert(1)</script>") > 10


def test_the_page_needs_nothing_else_and_lets_nothing_in(write_run: WriteRun) -> None:
    write_run("sft")
    run = write_run("dpo", "dpo", start_stage="sft", evaluation=EVERYTHING)
    for path in (write_report(run), write_report(run.parent)):
        html = path.read_text(encoding="utf-8")
        page = Page(html)
        for tag, attributes in page.tags:
            for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                address = attributes.get(name, "#")
                assert address.startswith(("#", "data:,", "../")), (tag, name, address)
        assert not re.search(r"url\(|@import", html)
        policy = next(each["content"] for _, each in page.tags if each.get("http-equiv") == "Content-Security-Policy")
        script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)
        assert script is not None
        digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
        assert policy.startswith("default-src 'none';") and f"script-src 'sha256-{digest}'" in policy


def test_a_failed_run_shows_how_far_it_came_and_why_without_secrets(write_run: WriteRun) -> None:
    evaluation = [figure("kl", 1.0, data=SECRET)]
    more = {"stage": {"trl": {"max_steps": 20}}, "text": SECRET, "warnings": [SECRET], "evaluation": evaluation}
    run = write_run(finished=False, num_steps=7, **more)
    page = write_report(run).read_text()
    assert SECRET not in page and "[redacted]" in page
    text = Page(page).text
    assert "not finished, at step 7 of 20" in text and "It ended with an error." in text and "ValueError" in text
    for name in ("samples.jsonl", "preview.json", "rejects.jsonl", "error.log", "warnings.jsonl", "metrics.jsonl"):
        (run / name).unlink()
    (run / "stage.json").write_text('{"stage": "sft", "method": "sft"}')
    assert "not finished, at step 0" in read(write_report(run)).text  # a run that has only begun


def test_a_recipe_shows_its_stages_in_order_and_those_that_wait(write_run: WriteRun) -> None:
    paths = {
        "ppo": write_run("ppo", "ppo", start_stage="sft", rewards={"runs/demo/rm/model": "rm"}, evaluation=EVERYTHING),
        "sft": write_run("sft", evaluation=EVERYTHING),
        "rm": write_run("rm", "rm", start_stage="sft", warnings=["few pairs"]),
    }
    stages = [*paths.items(), ("dpo", paths["sft"].with_name("dpo"))]
    path = write_recipe_report("demo", stages)
    assert path == paths["sft"].parent / "report.html"
    page = read(path)
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert sections == ["sft", "rm", "ppo"]
    assert "3 of 4 stages finished" in page.text and "not started" in page.text and "few pairs" in page.text
    words = " ".join(page.text.split())
    for made in ("from builtin:tiny-gpt2 (random weights) builtin:reviews", "from sft, rewarded by rm", "from sft"):
        assert made in words


def test_a_run_lists_what_it_was_made_from_with_links_to_pages(write_run: WriteRun) -> None:
    write_report(write_run("sft"))
    lineage = [
        {"role": "base", "path": "/models/llama"},
        {"role": "model", "path": "runs/demo/sft/model", "action": "continue"},
    ]
    rewards = {"runs/demo/rm/model": "rm"}
    run = write_run("ppo", "ppo", start_stage="sft", rewards=rewards, stage={"lineage": lineage})
    path = write_report(run)
    page = path.read_text()
    listed = page.partition('<ol class="lineage"')[2].partition("</ol>")[0]
    items = [" ".join(Page(f"<li{item}").text.split()) for item in listed.split("<li")[1:]]
    assert items == ["llama base", "sft model, continued", "rm gives the reward", "ppo from sft, rewarded by rm"]
    assert page.count('href="../sft/report.html"') == 1 and "../rm/" not in page  # rm has no page


def test_no_run_is_one_message(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(RunError, match="holds no run"):
            write_report(path)
    with pytest.raises(RunError, match="demo: no stage of this recipe has been started"):
        write_recipe_report("demo", [("sft", tmp_path / "sft")])
