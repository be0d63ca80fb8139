"""Whatever a model, a server or a file says: the terminal stays the person's own, and secrets stay unseen."""

from __future__ import annotations

import io
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit import console
from alignkit.errors import DataError, Problem
from alignkit.runs.directory import RunDir, copy_recipe

NASTY = "\x1b]0;title\x07\x1b[2J\x9b1mgone\r\u202e\x7f\ud800[/red]"
SHOWN = "\ufffd]0;title\ufffd\ufffd[2J\ufffd1mgone\ufffd\ufffd\ufffd\ufffd[/red]"


def test_nothing_that_is_printed_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.note(NASTY)
    console.warn(NASTY)
    console.print_error(DataError([Problem(NASTY, NASTY)]))
    console.print_table(NASTY, [NASTY], [[NASTY]])
    console.print_text("paths", {NASTY: NASTY})
    ended = {"stage": NASTY, "status": "finished", "step": 1, "model_dir": "", "metrics": {NASTY: NASTY}}
    console.print_text("result", ended)
    console.stream({NASTY: iter(NASTY), "other": iter(["a\tb\n", "\u3000\u200d✓"])})
    progress = console.TrainingProgress(NASTY, total_steps=1)
    progress.update(1, {NASTY: 1.0})
    told = "".join(capsys.readouterr())
    assert told.count("gone") == 16 and told.count(SHOWN) == 16
    assert "a\tb\n\u3000\u200d✓" in told
    assert not [letter for letter in told if letter in NASTY[:9] and ord(letter) < 32 or letter in "\r\x9b\u202e"]


def test_tokens_of_a_preview_are_shown_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    span = {"kind": "learnt", "tokens": ["\x1b[2Jgone", "[/red]"], "special": []}
    sequence = {"label": "", "spans": [span], "num_left_out": 0}
    console.print_preview(
        {"stage": NASTY, "method": "sft", "rows": [{"sequences": [sequence]}], "facts": {NASTY: 1}, "findings": [NASTY]}
    )
    told = capsys.readouterr().out
    assert "\x1b" not in told and "[[\ufffd[2Jgone[/red]]]" in told


def test_a_long_line_of_a_preview_is_folded(capsys: pytest.CaptureFixture[str]) -> None:
    span = {"kind": "read", "tokens": [f"{number:04}" for number in range(99)], "special": []}
    sequence = {"label": "", "spans": [span], "num_left_out": 0}
    console.print_preview(
        {"stage": "a", "method": "sft", "rows": [{"sequences": [sequence]}], "facts": {}, "findings": []}
    )
    told = capsys.readouterr().out
    assert "".join(span["tokens"]) in "".join(letter for letter in told if letter.isdigit())


def test_json_keeps_every_character_as_an_escape(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"text": NASTY})
    told = capsys.readouterr().out
    assert json.loads(told) == {"text": NASTY}
    assert not set("\x1b\x07\x9b\r\u202e\x7f\ud800") & set(told)


def test_the_live_table_shows_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    board = console.Board([(NASTY, "sft", "[bold]why[/]")])
    shown = Console(width=200, force_terminal=False)
    shown.print(board._draw())
    told = capsys.readouterr().out
    assert "[bold]why[/]" in told and SHOWN in told


def test_a_meter_tells_how_far_work_is_in_lines_and_under_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    def work() -> None:
        with console.Meter("answers", 4) as answers:
            assert list(answers.over("ab")) == ["a", "b"]
            with console.Meter("tokens written", 8) as tokens, console.Meter("rows read") as rows:
                tokens.advance(6)
                rows.advance(9)

    work()
    assert capsys.readouterr().err == ""  # what takes no time says nothing
    monkeypatch.setattr(console, "_TICK_SECONDS", 0.0)
    monkeypatch.setattr(console, "_LINE_INTERVAL_SECONDS", 0.0)
    work()
    told = re.sub(r"\d+ s left", "N s left", capsys.readouterr().err).splitlines()
    assert told == [
        "answers: 1 of 4 (N s left)",
        "answers: 2 of 4 (N s left)",
        "answers: 2 of 4 (N s left), tokens written: 6 of 8 (N s left), rows read: 0",
        "answers: 2 of 4 (N s left), tokens written: 6 of 8 (N s left), rows read: 9",
    ]
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(console, "_TICK_SECONDS", 0.0)
    with console.Meter("answers", 4) as meter:
        meter.advance(3)
        assert console._board is not None and console._board.doing.startswith(
            f"answers: {12 * chr(0x2588)}{4 * chr(0x2591)} 3 of 4 ("
        )
        time.sleep(0.5)  # the table is redrawn four times a second
    assert console._board is None and "answers: " in screen.getvalue() and "3 of 4" in screen.getvalue()


def test_a_wait_that_cannot_tell_how_far_it_is_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.waiting("loading a"):
        pass
    monkeypatch.setattr(console, "_LINE_INTERVAL_SECONDS", 0.05)
    with console.waiting("loading b"):
        time.sleep(0.2)
    assert set(capsys.readouterr().err.splitlines()) == {"loading b (0 s)"}


SECRETS = {
    "hf_" + "aB3" * 12: "[redacted]",
    "sk-" + "ant-" + "x9" * 12: "[redacted]",
    "gsk_" + "x9" * 12: "[redacted]",
    "eyJ" + "a" * 12 + ".eyJ" + "b" * 12 + ".c": "[redacted]",
    "see http://h/v1?a=1&api_key=" + "SECRET&b=2": "see http://h/v1?a=1&api_key=[redacted]&b=2",
    "http://" + "SECRET@127.0.0.1:9/v1": "http://[redacted]@127.0.0.1:9/v1",
    "export MY_API_KEY=" + "SECRET": "export MY_API_KEY=[redacted]",
    "Authorization: Bearer " + "abc.def": "Authorization: [redacted]",
    "-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----": "[redacted]",
}


def test_one_list_of_secrets_for_messages_records_and_recipes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = tmp_path / "a.yaml"
    recipe.write_text("".join(f"# {line}\n" for text in SECRETS for line in text.split("\n")) + "name: a  # é\n")
    run = RunDir(tmp_path)
    copy_recipe(run, recipe)
    for text, shown in SECRETS.items():
        assert console.redact(text) == shown and console.holds_secret(text)
        console.print_error(DataError(f"the reward function r raised ValueError: {text}"))
        assert f"ValueError: {shown}\n" in capsys.readouterr().err
        if "\n" not in text:
            assert text not in run.recipe.read_text()
    assert run.recipe.read_text().endswith("name: a  # é\n")
    for text in ("hf_model", "s3://bucket/a@b", "export MY_API_KEY=... first", "task-sk-model", "a?b=c&d=token"):
        assert console.redact(text) == text


def test_a_template_s_own_words_are_shown_harmless(run_alignkit: Callable, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text('{{ raise_exception("\\x1b[2Jgone hf_' + "a" * 30 + '") }}')
    (tmp_path / "a.yaml").write_text(
        "model: {path: builtin:tiny-gpt2, chat_template: t.jinja}\nsft: {data: builtin:instructions, max_steps: 1}\n"
    )
    done = run_alignkit("check", "-r", "a.yaml")
    told = done.stdout + done.stderr
    assert done.returncode == 2 and "\x1b" not in told and "\ufffd[2Jgone [redacted]" in told


def test_a_warning_is_recorded_as_it_is_shown() -> None:
    told: list[str] = []
    with console.recording(lambda message: None):
        pass  # what earlier tests said is handed over
    with console.recording(told.append):
        console.warn(NASTY)
    assert told == [SHOWN]
