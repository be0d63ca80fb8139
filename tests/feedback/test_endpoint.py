"""A judge behind a real HTTP server that misbehaves in every way we know of."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import messages, read_rows
from judge_server import Server, prefer_longer

from alignkit.errors import JudgeError, RecipeError, Stopped
from alignkit.feedback.prompts import Comparison, Request, ask_comparison
from alignkit.feedback.server import ALLOWED, Endpoint, find_key
from alignkit.feedback.writer import Job, Sampling, Spending
from alignkit.recipe.schema import FeedbackModel
from alignkit.recipe.stage import Stage
from alignkit.rewards import label

QUESTIONS_ASKED = 132  # 60 comparisons in both orders, 6 of them by a second principle
MakeStage = Callable[..., Stage]
KEY = "canary-key-5f1d0c"
QUESTIONS = [
    ask_comparison(Comparison(tuple(messages(f"Q{number}")), "long " * (number + 2), "short", "Which?"), (), str)
    for number in range(30)
]


def connect(server: Server, **options: Any) -> tuple[Endpoint, Spending]:
    source = FeedbackModel(url=server.url, name="tiny", **{"timeout": 1.0, **options})
    spending = Spending(source)
    return Endpoint(source, spending=spending, stop=threading.Event()), spending


def decide(endpoint: Endpoint, requests: list[Request]) -> dict[int, Any]:
    return dict(itertools.chain.from_iterable(endpoint.decide(requests)))


def scattered(*faults: str) -> Callable[[int, dict[str, Any]], str | None]:
    """Return a plan that lets every third request fail, each fault in turn."""
    return lambda number, payload: faults[number // 3 % len(faults)] if number % 3 == 0 else None


def test_every_kind_of_failure_is_asked_again_and_counted() -> None:
    faults = ("429", "500", "timeout", "malformed", "drop", "empty", "large")
    with Server(fault=scattered(*faults), hang=5) as server:
        endpoint, spending = connect(server, concurrency=4, timeout=3)  # a busy machine takes a second now and then
        verdicts = decide(endpoint, QUESTIONS)
        assert sorted(verdicts) == list(range(30))
        assert all(verdict.p_first == pytest.approx(0.9) for verdict in verdicts.values())
        assert set(server.answered.values()) == {1}  # nothing that was answered is asked again
        assert server.faults.keys() == {*faults}
        assert sum(spending.retries.values()) == sum(server.faults.values()) == server.requests - 30
        assert spending.retries["429"] == server.faults["429"] and spending.retries["500"] == server.faults["500"]
        assert spending.retries["malformed"] == sum(server.faults[name] for name in ("malformed", "empty", "large"))
        kept: Counter[str] = Counter()
        for verdict in verdicts.values():
            kept.update(verdict.retries)
        assert kept == spending.retries


def test_retry_after_is_honoured() -> None:
    with Server(fault=lambda number, payload: "429" if number == 0 else None) as server:
        endpoint, _ = connect(server, concurrency=1)
        decide(endpoint, QUESTIONS[:1])
        assert 0.2 <= server.times[1] - server.times[0] < 0.45  # ours would be between 0.25 and 0.75


def test_concurrency_and_requests_per_minute_are_kept() -> None:
    with Server(seconds=0.2) as server:
        decide(connect(server, concurrency=5, timeout=30)[0], QUESTIONS)
        assert server.most_active == 5
    found = []
    while len(found) < 4 and not any(gap > 0.07 and whole > 0.45 for gap, whole in found):
        with Server() as server:  # on a busy machine what was sent in time may come late: then once more
            decide(connect(server, concurrency=8, requests_per_minute=600, timeout=30)[0], QUESTIONS[:6])
            gaps = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
            found.append((min(gaps), server.times[-1] - server.times[0]))
    assert found[-1][0] > 0.07 and found[-1][1] > 0.45, found


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_log_probs_at_the_deciding_letter_make_a_soft_verdict(api: str) -> None:
    with Server(judge=lambda payload: 0.73) as server:
        verdict = decide(connect(server, api=api)[0], QUESTIONS[:1])[0]
        assert verdict.p_first == pytest.approx(0.73) and verdict.mass == pytest.approx(0.98)
        (sent,) = server.payloads
    assert sent["temperature"] == 0
    if api == "completions":  # base models are sent the transcript
        assert sent["prompt"] == QUESTIONS[0].transcript and sent["prompt"].endswith("The answer is:")
    else:
        assert sent["top_logprobs"] == 20
        assert sent["messages"][-1]["content"].endswith("Reply with (A) or (B) and nothing else.")


def test_a_server_without_log_probs_is_read_by_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    with Server(logprobs=False) as server:
        assert decide(connect(server)[0], QUESTIONS[:2])[0].p_first == 1.0
    with Server(logprobs=False, refuse={"logprobs": "unknown parameter: logprobs"}) as server:
        endpoint, spending = connect(server, concurrency=4)
        assert {verdict.p_first for verdict in decide(endpoint, QUESTIONS[:8]).values()} == {1.0}
        assert not spending.retries
        assert capsys.readouterr().err.count("gives no log-probs; its verdicts are read from its text") == 1


def test_parameters_a_server_does_not_know_are_left_out() -> None:
    refuse = {"max_tokens": "Unsupported parameter: 'max_tokens'; use 'max_completion_tokens'", "seed": "seed: unknown"}
    with Server(refuse=refuse, reply=lambda payload: "hello") as server:
        endpoint, _ = connect(server)
        (((_, reply),),) = endpoint.write([Job(QUESTIONS[0], 5)], Sampling(1.0, 7))
        assert reply.text == "hello" and server.payloads[-1]["max_completion_tokens"] == 7


def test_top_p_and_top_k_are_sent_where_they_are_set_and_one_that_is_refused_is_an_error() -> None:
    with Server(reply=lambda payload: "hello") as server:
        for sampling in (Sampling(0.0, 7), Sampling(1.0, 7, top_p=0.9, top_k=20)):
            list(connect(server)[0].write([Job(QUESTIONS[0], 5)], sampling))
        plain, cut = server.payloads[-2:]
        assert plain["temperature"] == 0 and not plain.keys() & {"top_p", "top_k"}
        assert (cut["top_p"], cut["top_k"]) == (0.9, 20)
    with Server(refuse={"top_k": "unknown parameter: top_k"}) as server, pytest.raises(JudgeError, match="top_k"):
        list(connect(server)[0].write([Job(QUESTIONS[0], 5)], Sampling(1.0, 7, top_k=20)))


def test_a_reply_that_names_no_option_is_an_abstention() -> None:
    with Server(reply=lambda payload: "Both are fine, (A) as well as (B).") as server:
        verdict = decide(connect(server)[0], QUESTIONS[:1])[0]
        assert verdict.p_first is None and "names neither option, or both" in verdict.problem
        assert server.requests == 1


def test_a_wrong_key_ends_it_at_once_and_is_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_JUDGE_TOKEN", KEY)
    monkeypatch.setenv(ALLOWED, "ANOTHER_TOKEN MY_JUDGE_TOKEN")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Server(key="another") as server:
        with pytest.raises(JudgeError, match=r"refuses the key in MY_JUDGE_TOKEN \(401\)") as caught:
            decide(connect(server, api_key_env="MY_JUDGE_TOKEN")[0], QUESTIONS)
        assert KEY not in str(caught.value) and "[redacted]" in str(caught.value) and "\n" not in str(caught.value)
        assert server.requests <= 8
        with pytest.raises(JudgeError, match="name its variable with api_key_env"):
            decide(connect(server)[0], QUESTIONS)


def test_an_endpoint_that_is_down_or_sends_us_elsewhere_gives_up() -> None:
    source = FeedbackModel(url="http://127.0.0.1:9/v1", name="tiny", retries=1)
    endpoint = Endpoint(source, spending=Spending(source), stop=threading.Event())
    with pytest.raises(JudgeError, match=r"127.0.0.1:9 cannot be reached .* 3 requests in a row have failed"):
        decide(endpoint, QUESTIONS)
    with (
        Server(fault=lambda number, payload: "redirect") as server,
        pytest.raises(JudgeError, match="sends us to another address"),
    ):
        decide(connect(server)[0], QUESTIONS)


def test_one_request_that_is_refused_is_an_abstention_among_others() -> None:
    with Server() as server:
        endpoint, _ = connect(server, concurrency=1)
        decide(endpoint, QUESTIONS[:1])
        server.refuse = {"messages": "this model's maximum context length is 5 tokens"}
        verdict = decide(endpoint, QUESTIONS[1:2])[0]
        assert verdict.p_first is None and "maximum context length" in verdict.problem


@pytest.fixture
def pairs(write_rows: Callable[..., Path]) -> Path:
    rows = [
        {"prompt": messages(f"Q{number}"), "chosen": messages("", f"long answer {number}")[1:],
         "rejected": messages("", "no")[1:]}
        for number in range(60)
    ]  # fmt: skip
    return write_rows(rows)


def stage_for(make_stage: MakeStage, server: Server, pairs: Path, constitution: str, **judge: Any) -> Stage:
    source = {"url": server.url, "name": "tiny", "timeout": 1.0, **judge}
    return make_stage("label", data=str(pairs), constitution=constitution, judge=source, answers="given")


def report_of(stage: Stage) -> dict[str, Any]:
    return json.loads((Path(stage.run_dir) / "report.json").read_text())


def test_the_job_finishes_with_all_faults_and_its_retries_are_in_the_report(
    make_stage: MakeStage, pairs: Path, constitution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_JUDGE_TOKEN", KEY)
    monkeypatch.setenv(ALLOWED, "MY_JUDGE_TOKEN")
    faults = ("429", "500", "timeout", "malformed", "drop")
    with Server(fault=scattered(*faults), key=KEY) as server:
        stage = stage_for(make_stage, server, pairs, constitution, api_key_env="MY_JUDGE_TOKEN")
        label.run(stage, Path(stage.run_dir))
        assert set(server.answered.values()) == {1} and len(server.answered) == QUESTIONS_ASKED
    report = report_of(stage)
    # On a busy machine a try may time out before the server has seen it: both counts are then that much higher.
    unseen = report["spent"]["requests"] - server.requests
    assert report["labelled"] == 60 and 0 <= unseen <= 3
    assert sum(report["spent"]["retries"].values()) - sum(server.faults.values()) == unseen
    assert sum(server.faults.values()) > 40
    kept = b"".join(path.read_bytes() for path in Path(stage.run_dir).rglob("*") if path.is_file())
    assert KEY.encode() not in kept


def test_a_chat_server_thinks_and_answers_in_one_reply(make_stage: MakeStage, pairs: Path, constitution: str) -> None:
    def reply(payload: dict[str, Any]) -> str:
        letter = "A" if prefer_longer(payload) > 0.5 else "B"
        return f"(A) is one thing, (B) another.\nThe answer is: ({letter})"

    with Server(reply=reply) as server:
        source = {"url": server.url, "name": "tiny"}
        stage = make_stage(
            "label", data={"path": str(pairs), "max_rows": 5}, constitution=constitution, judge=source, answers="given",
            cot=True, cot_tokens=99,
        )  # fmt: skip
        label.run(stage, Path(stage.run_dir))
        assert server.requests == 10 and server.payloads[0]["max_tokens"] == 99
        assert "Think step by step." in server.payloads[0]["messages"][-1]["content"]
    rows = read_rows(Path(stage.run_dir) / "rows.jsonl")
    assert [row["label"] for row in rows] == [pytest.approx(0.6)] * 5  # clamped
    assert all(row["chosen"][0]["content"].startswith("long") for row in rows)


def test_a_budget_that_runs_out_keeps_what_there_is_and_goes_on_with_a_higher_one(
    make_stage: MakeStage, pairs: Path, constitution: str
) -> None:
    with Server() as server:
        stage = stage_for(make_stage, server, pairs, constitution, max_tokens_total=4000, concurrency=3)
        with pytest.raises(JudgeError, match=r"of max_tokens_total 4000 tokens are spent.*\d+ rows are in rows.jsonl"):
            label.run(stage, Path(stage.run_dir))
        asked, rows, report = server.requests, read_rows(Path(stage.run_dir) / "rows.jsonl"), report_of(stage)
        assert 10 < len(rows) < 60 and not report["complete"] and 3000 < report["tokens"] <= 4000
        with pytest.raises(JudgeError, match="max_tokens_total"):  # what was spent is not forgotten
            label.run(stage, Path(stage.run_dir))
        assert server.requests <= asked + 3  # the room that requests under way had held
        label.run(stage_for(make_stage, server, pairs, constitution, max_tokens_total=40000), Path(stage.run_dir))
        assert len(read_rows(Path(stage.run_dir) / "rows.jsonl")) == 60
        assert set(server.answered.values()) == {1}


def test_a_money_budget_counts_what_tokens_cost(make_stage: MakeStage, pairs: Path, constitution: str) -> None:
    price = {"input": 10.0, "output": 100.0}
    with Server() as server:
        stage = stage_for(make_stage, server, pairs, constitution, max_cost=0.05, price=price, concurrency=2)
        with pytest.raises(JudgeError, match=r"of max_cost 0.05 is spent"):
            label.run(stage, Path(stage.run_dir))
    spent = report_of(stage)["spent"]
    assert 0.03 < spent["cost"] <= 0.05
    assert spent["cost"] == pytest.approx((spent["input_tokens"] * 10 + spent["output_tokens"] * 100) / 1e6)


SCRIPT = """
import json, sys
from pathlib import Path
from alignkit.errors import AlignKitError
from alignkit.rewards import label
from alignkit.recipe.methods import OPTIONS
from alignkit.recipe.schema import LaunchOptions, ModelOptions
from alignkit.recipe.stage import Stage

options, run_dir = json.loads(sys.argv[1]), sys.argv[2]
stage = Stage(
    recipe_name="tiny", recipe_path="tiny.yaml", name="label", seed=0, model=ModelOptions(path="builtin:tiny-gpt2"),
    lora=None, launch=LaunchOptions(device="cpu"), options=OPTIONS["label"].model_validate(options), trainer={},
    origins={}, run_dir=run_dir,
)
try:
    label.run(stage, Path(run_dir))
except AlignKitError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def start(stage: Stage) -> subprocess.Popen[str]:
    options = json.dumps(stage.options.model_dump(mode="json"))
    environment = {**os.environ, "PYTHONPATH": str(Path(label.__file__).parents[2])}
    command = [sys.executable, "-c", SCRIPT, options, stage.run_dir]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(server: Server, requests: int) -> None:
    deadline = time.monotonic() + 60
    while server.requests < requests:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_again_and_again_nothing_that_was_kept_is_asked_again(
    make_stage: MakeStage, pairs: Path, constitution: str
) -> None:
    concurrency = 4
    with Server(seconds=0.03) as server:
        stage = stage_for(make_stage, server, pairs, constitution, concurrency=concurrency)
        kills = 4
        for kill in range(kills):
            process = start(stage)
            wait_for(server, 20 * (kill + 1))
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert process.stderr is not None
            process.stderr.close()
        kept = read_rows_of_store(stage)
        process = start(stage)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
        assert len(server.answered) == QUESTIONS_ASKED
        again = sum(server.answered.values()) - QUESTIONS_ASKED
        assert again <= kills * concurrency  # what was under way at a kill
        assert read_rows_of_store(stage)[: len(kept)] == kept
    assert len(read_rows(Path(stage.run_dir) / "rows.jsonl")) == 60


def read_rows_of_store(stage: Stage) -> list[str]:
    text = (Path(stage.run_dir) / "feedback.jsonl").read_text()
    return text[: text.rfind("\n") + 1].splitlines()


@pytest.mark.slow
def test_a_signal_keeps_what_is_under_way_and_ends_with_its_exit_code(
    make_stage: MakeStage, pairs: Path, constitution: str
) -> None:
    with Server(seconds=0.05) as server:
        stage = stage_for(make_stage, server, pairs, constitution, concurrency=4)
        for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
            process = start(stage)
            wait_for(server, server.requests + 20)
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
            assert process.returncode == code
            assert f"stopped by {number.name}: everything answered is kept" in said and "Traceback" not in said
        assert start(stage).wait(timeout=60) == 0
        assert set(server.answered.values()) == {1}


def test_stop_while_waiting_for_a_retry_is_heard(make_stage: MakeStage, pairs: Path, constitution: str) -> None:
    with Server(fault=lambda number, payload: "500") as server:
        stage = stage_for(make_stage, server, pairs, constitution, retries=20)
        timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        began = time.monotonic()
        with pytest.raises(Stopped, match="SIGTERM"):
            label.run(stage, Path(stage.run_dir))
        assert time.monotonic() - began < 6


HOSTILE = {
    "drip": "timeout", "drip-header": "timeout", "drip-500": "timeout", "endless-500": "malformed",
    "gzip": "malformed", "logprob-huge": "malformed", "logprob-text": "malformed", "logprobs-true": "malformed",
    "logprobs-null": "malformed", "content-list": "malformed", "message-text": "malformed",
}  # fmt: skip


def test_hostile_replies_end_in_time_and_in_bounds() -> None:
    """Each is tried twice; a limit that counts reads, not seconds or bytes, would let one of them go on for ever."""
    for fault, cause in HOSTILE.items():
        with Server(fault=lambda number, payload, fault=fault: fault) as server:
            endpoint, spending = connect(server, concurrency=1, retries=1, timeout=0.5)
            began = time.monotonic()
            with pytest.raises(JudgeError, match=r"\(2 tries\)"):
                decide(endpoint, QUESTIONS[:1])
            assert time.monotonic() - began < 4, fault
            assert spending.retries == {cause: 2}, fault
            assert spending.input_tokens > 0 and server.sent < 64 << 20


def test_what_a_server_does_not_count_is_counted_here() -> None:
    honest = {"prompt_tokens": 70, "completion_tokens": 2}
    odd: list[Any] = [{}, {"prompt_tokens": 0, "completion_tokens": 0}, "many", [1], None, True]
    odd += [{"prompt_tokens": count, "completion_tokens": count} for count in (-10_000_000, 1 << 40, "7", 1.5, True)]
    own = set()
    for usage in (honest, *odd):
        with Server(usage=usage) as server:
            endpoint, spending = connect(server, concurrency=1)
            decide(endpoint, QUESTIONS[:1])
            own.add((spending.input_tokens, spending.output_tokens))
            sent = len(json.dumps(server.payloads[0], ensure_ascii=False).encode()) / 3
    assert own == {(70, 2), (math.ceil(sent), math.ceil(len('{"role": "assistant", "content": "(A)"}') / 3))}


def test_a_wait_without_end_is_bounded_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    for asked in ("inf", "1e400", "Fri, 31 Dec 9999 23:59:59 GMT"):
        with Server(fault=lambda number, payload, asked=asked: f"429 {asked}") as server:
            endpoint, _ = connect(server, concurrency=1)
            timer = threading.Timer(0.7, endpoint._stop.set)
            timer.start()
            began = time.monotonic()
            assert decide(endpoint, QUESTIONS) == {}
            assert time.monotonic() - began < 2 and server.requests == 1
        said = capsys.readouterr().err
        assert "answers 429: slow down; next try in 600 s (it asks for" in said, asked


def test_a_key_goes_to_its_own_host_or_where_the_command_line_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "MY_KEY"):
        monkeypatch.setenv(name, f"{KEY}-{name}")
    for name, value in (("OPENAI_ORG_ID", "org-1"), ("OPENAI_CUSTOM_HEADERS", "X-Mine: 1\nAuthorization: Bearer own")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(ALLOWED, "MY_KEY")

    def key(url: str, variable: str | None = None) -> str | None:
        return find_key(FeedbackModel(url=url, name="m", api_key_env=variable))

    assert key("https://api.openai.com/v1") == f"{KEY}-OPENAI_API_KEY"
    assert key("https://router.huggingface.co/v1", "HF_TOKEN") == f"{KEY}-HF_TOKEN"
    for url in ("http://api.openai.com/v1", "https://api.openai.com:99/v1", "https://api.openai.com.evil/v1"):
        assert key(url) is None
        with pytest.raises(RecipeError, match=r"judge.api_key_env would send OPENAI_API_KEY to http.*--allow-key"):
            key(url, "OPENAI_API_KEY")
    with Server(key=f"{KEY}-MY_KEY") as server:
        with pytest.raises(RecipeError, match="would send HF_TOKEN"):
            connect(server, api_key_env="HF_TOKEN")
        assert len(decide(connect(server, api_key_env="MY_KEY")[0], QUESTIONS[:1])) == 1
        sent = {name.lower(): value for name, value in server.headers[0].items()}
        assert sent["authorization"] == f"Bearer {KEY}-MY_KEY"
        assert not [name for name in sent if name.startswith(("openai", "x-mine"))]
    with Server() as server:
        decide(connect(server)[0], QUESTIONS[:1])
        assert "authorization" not in {name.lower() for name in server.headers[0]}


def test_a_key_with_what_no_header_can_hold_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(value: str, url: str = "https://api.openai.com/v1", variable: str | None = None) -> str | None:
        monkeypatch.setenv(variable or "OPENAI_API_KEY", value)
        return find_key(FeedbackModel(url=url, name="m", api_key_env=variable))

    assert key(f" {KEY}\n") == KEY  # as `export KEY="$(cat file)"` or an env file leaves it
    assert key("  ") is None
    monkeypatch.setenv(ALLOWED, "MY_TOKEN")
    for wrong in (f"{KEY}\u00e9", f"{KEY}\nX-Other: 1", f"{KEY} {KEY}", f"{KEY}\x07"):
        for given in ({}, {"url": "http://127.0.0.1:9/v1", "variable": "MY_TOKEN"}):
            with pytest.raises(RecipeError, match="holds a blank or a character that is not ASCII") as caught:
                key(wrong, **given)
            assert KEY not in str(caught.value)


def test_a_key_in_a_reply_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", KEY)
    monkeypatch.setenv(ALLOWED, "MY_TOKEN")
    with Server(reply=lambda payload: f"(A) {KEY} hf_{'a' * 20}") as server:
        endpoint, _ = connect(server, api_key_env="MY_TOKEN")
        assert decide(endpoint, QUESTIONS[:1])[0].text == "(A) [redacted] [redacted]"
