"""People as judges: votes that survive a kill, the page in a real Chromium, and what becomes of the votes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, open_browser

from alignkit.errors import UsageError
from alignkit.evaluate.people import People, is_turned, key_of, serve
from alignkit.evaluate.target import read_measured
from alignkit.recipe.schema import DataSource

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>\u202e</pre>"
PAIRS = [(f"Question {number}?", f"ours {number}", f"theirs {number}") for number in range(3)]


def _vote(people: People, rater: str, wins: list[str]) -> None:
    """Vote for what each of the pairs is to become, whatever side it is on."""
    for pair, wanted in zip(PAIRS, wins, strict=True):
        first_wins = (wanted == "ours") != is_turned(rater, key_of(pair))
        people.vote(rater, key_of(pair), 3 if wanted == "equal" else 1 if first_wins else 2)


def _compare(people: People) -> Any:
    people._rater = "nobody"  # whose terminal has ended
    return people.compare(*map(list, zip(*PAIRS, strict=True)))


def test_votes_become_verdicts_agreement_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    people = People(tmp_path)
    people.pairs = {key_of(pair): pair for pair in PAIRS}
    _vote(people, "ann", ["ours", "theirs", "equal"])
    _vote(people, "ben", ["ours", "ours", "equal"])
    assert _compare(people) == [(1.0,), (0.5,), (0.5,)]
    assert people.report["agreement"] == [[1.0], [0.0], [1.0]]
    people.vote("ben", "", 0)  # undo: equal
    people.vote("ben", "", 0)  # and ours 1
    again = People(tmp_path)  # read back
    assert _compare(again) == [(1.0,), (0.0,), (0.5,)] and again.report["agreement"] == [[1.0]]
    assert again.ask("ben")["key"] == key_of(PAIRS[1])
    rows, _ = read_measured([DataSource(path=str(tmp_path / "preferences.jsonl"))], share=None, seed=0, max_rows=9,
                            warn=lambda message: pytest.fail(message))  # fmt: skip
    found = [(row.kind, row.prompt, *row.completions) for row in rows]
    assert found == [
        ("pair", "Question 0?\n", "ours 0", "theirs 0"), ("pair", "Question 1?\n", "theirs 1", "ours 1"),
        ("pair", "Question 0?\n", "ours 0", "theirs 0"),
    ]  # fmt: skip


def test_without_a_vote_there_is_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(UsageError, match="nobody has judged yet"):
        People(tmp_path, rater="ann").compare(["a", "b"], ["same", "one"], ["same", "two"])
    with pytest.raises(UsageError, match="all prompts are answered alike"):
        People(tmp_path).compare(["a"], ["same"], ["same"])


def test_sides_are_drawn_for_each_rater_and_names_are_not_shown(tmp_path: Path) -> None:
    people = People(tmp_path)
    people.pairs = {key_of(PAIRS[0]): PAIRS[0]}
    shown = [people.ask(f"rater {number}")["answers"] for number in range(40)]
    assert 8 < sum(answers == ["ours 0", "theirs 0"] for answers in shown) < 32
    assert shown == [people.ask(f"rater {number}")["answers"] for number in range(40)]
    assert set(people.ask("a")) == {"done", "of", "key", "prompt", "answers"}


def _start(run_dir: Path, *words: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "alignkit", "compare", "runs/tiny/dpo", "runs/tiny/sft", "-n", "4", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=run_dir.parents[2], env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **options)  # fmt: skip


def _post(url: str, **given: Any) -> Any:
    request = urllib.request.Request(url.replace("/?", "/vote?"), json.dumps(given).encode())
    return json.load(urllib.request.urlopen(request, timeout=20))


def _status(url: str, **headers: str) -> int:
    try:
        return int(urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20).status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_votes_survive_a_kill_and_end_in_the_run(run_dir: Path) -> None:
    process = _start(run_dir)
    url = process.stdout.readline().strip()
    shown = _post(url, rater="ann", choice=None)
    assert shown["done"] == 0
    assert _post(url, rater="ann", key=shown["key"], choice=1, note="shorter")["done"] == 1
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)

    process = _start(run_dir)
    url = process.stdout.readline().strip()
    shown = _post(url, rater="ann", choice=None)
    assert shown["done"] == 1
    while "key" in shown:
        shown = _post(url, rater="ann", key=shown["key"], choice=2)
    _post(url, rater="ann", choice="finish")
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "win_rate" in said and "preferences.jsonl" in said, errors
    votes = [json.loads(line) for line in (run_dir / "votes.jsonl").read_text().splitlines()]
    assert len(votes) == shown["of"] and votes[0]["note"] == "shorter"
    figures = {each["metric"]: each for each in json.loads((run_dir / "eval.json").read_text())["results"]}
    rate = figures["win_rate"]
    assert rate["settings"]["judge"] == "people" and rate["low"] <= rate["value"] <= rate["high"] and rate["n"] == 4
    assert "people" in (run_dir / "report.html").read_text()

    process = _start(run_dir, "--rater", "ben", stdin=subprocess.PIPE)
    said, errors = process.communicate("3 both fine\nu\n" + "3\n" * shown["of"], timeout=60)
    assert process.returncode == 0 and "rater_agreement" in said, errors


def _open(people: People) -> tuple[threading.Thread, str]:
    server, said = threading.Thread(target=serve, args=(people,), daemon=True), io.StringIO()
    with contextlib.redirect_stdout(said):
        server.start()
        while "\n" not in said.getvalue():
            time.sleep(0.01)
    return server, said.getvalue().strip()


def test_only_who_has_the_address_may_vote(tmp_path: Path) -> None:
    people = People(tmp_path)
    people.pairs = {key_of(pair): pair for pair in PAIRS}
    server, url = _open(people)
    port = int(url.split(":")[2].split("/")[0])
    with pytest.raises(UsageError, match=rf"--port: {port} cannot be had: Address already in use"):
        serve(people, port=port)
    assert _status(url) == 200
    assert _status(url.split("token=")[0] + "token=guess") == 403
    assert _status(url.replace("/?", "/votes.jsonl?")) == 403
    assert _status(url, Host=f"evil.example:{port}") == 403
    assert _status(url, Origin="http://evil.example") == 403
    for given in ({"key": "nothing", "choice": 1}, {"key": key_of(PAIRS[0]), "choice": 4}, {"choice": "1"}):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            _post(url, rater="ann", **given)
    assert not people.votes and _post(url, rater="ann", key=key_of(PAIRS[0]), choice=3)["done"] == 1
    _post(url, rater="ann", choice="finish")
    server.join(20)
    assert not server.is_alive()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt-get install chromium)")
def test_the_page_judges_by_keys_and_shows_hostile_answers_as_text(tmp_path: Path) -> None:
    people = People(tmp_path)
    pairs = [("Question?", HOSTILE, "a plain answer"), ("Another?", "one", "two " * 500)]
    people.pairs = {key_of(pair): pair for pair in pairs}
    server, url = _open(people)
    with open_browser(tmp_path / "profile") as browser:
        for width in (1280, 390):
            browser.open(url, width=width)
            settle = "new Promise((done) => setTimeout(done, 300)).then(() => document.body.innerText)"
            assert HOSTILE.replace("\u202e", "\ufffd") in browser.run(settle).replace("\u202e", "\ufffd")
            assert browser.overlaps() == [] and browser.complaints() == []
        assert browser.run("document.title") == "Which answer is better?"
        assert browser.run("document.images.length + document.scripts.length") == 1

        def press(key: str) -> str:
            browser.ask("Input.dispatchKeyEvent", type="keyDown", key=key, text=key)
            browser.ask("Input.dispatchKeyEvent", type="keyUp", key=key)
            return str(browser.run(settle))

        assert "1 of 2" in press("1")
        assert "0 of 2" in press("u")
        assert "1 of 2" in press("2")
        browser.run("document.getElementById('note').value = 'a note'")
        assert "2 of 2" in press("3") and "All of them are judged" in press("9")
        hidden = browser.run("document.getElementById('asked').hidden")
        browser.run("document.querySelector('[data-choice=finish]').click()")
        browser.run(settle)
    server.join(20)
    assert hidden and not server.is_alive()
    choices = [(vote["choice"], vote.get("note")) for vote in people.votes.values()]
    turned = is_turned("me", key_of(pairs[0]))
    assert choices == [("ours" if turned else "theirs", ""), ("equal", "a note")]
