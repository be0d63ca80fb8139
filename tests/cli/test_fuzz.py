"""Command lines, recipes and data files of a tired user: each ends with a message and the exit code of a mistake."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from data import test_fuzz as data_fuzz
from recipe import test_fuzz as recipe_fuzz

from alignkit.cli import main

RECIPE = """\
model: builtin:tiny-gpt2
sft: {data: builtin:instructions, max_steps: 1}
dpo: {start_from: sft, data: builtin:preferences, max_steps: 1}
stages: [sft, dpo]
"""
MORE = """\
ppo:
  start_from: sft
  reward: rm
  data: builtin:prompts
  kl_coef: 0.05
  max_new_tokens: 16
  ppo_epochs: 2
critique:
  start_from: sft
  constitution: builtin:harmlessness
  data: builtin:prompts
  rounds: 2
  max_new_tokens: 16
label:
  start_from: sft
  constitution: builtin:helpfulness
  data: builtin:prompts
  judge:
    url: http://127.0.0.1:9/v1
    name: m
    timeout: 2
    retries: 1
  answers: 2
  clamp: [0.4, 0.6]
evaluate:
  metrics: [perplexity]
  max_rows: 2
stages: [sft, rm, dpo, ppo, critique, label]
"""
STAGE = ("--stage", "--set", "--out", "--retries", "--allow-change", "--allow-key", "--node-rank", "--main-address",
         "--main-port")  # fmt: skip
OPTIONS = {
    "sft": STAGE,
    "dpo": STAGE,
    "run": ("--stage", "--set", "--retries", "--allow-change", "--from"),
    "rlaif": STAGE,
    "check": ("--set", "--allow-key"),
    "preview": ("--stage", "--rows", "-n", "--html", "--set"),
    "report": ("--out", "--push"),
    "diff": (),
    "schema": (),
    "migrate": ("--out", "--gpus"),
    "merge": ("--out",),
    "chat": ("--compare", "--temperature", "--max-new-tokens", "--seed", "--device", "--system"),
    "eval": ("--stage", "--judge", "--judge-name", "--split", "--reward", "--against", "--allow-key", "--metric",
             "--data", "--task", "--out", "--device", "-k"),
}  # fmt: skip
VALUES = (
    "", " ", "-1", "0", "1e400", "nan", "x" * 300, "x" * 5000, "../..", "/", "/dev/null", "/proc/1/x", "a\nb", "a\0b",
    "Ünïcödé", "🎉", "\udcff", "sft", "sft.beta=1", "sft.max_steps=-3", "sft.max_steps", "=", "a=b=c", "sft=",
    "model=null", "sft.data=./absent.jsonl", "launch.processes=-2", "[", "{a: ", "*", "~", "~nobody/x", "d", "d/e.json",
    "$(touch canary)", "; touch canary", "\x1b[31mred", "99999999999999999999", "a.yaml", "b.yaml", "--",
)  # fmt: skip
FLAGS = ("--dry-run", "--json", "--force", "--recpe", "--slurm", "-z", "--submit", "--trust-code", "--public", "--help")


def mistaken(random: Random) -> list[str]:
    """A command line with odd options, odd values or a file that is not there."""
    command = random.choice([*OPTIONS, "sft", "dpo", "run", "tune", ""])
    words = [command]
    if command in ("sft", "dpo", "run", "rlaif", "check", "preview"):
        words += ["--recipe", random.choice(["a.yaml"] * 5 + ["b.yaml", ".", "", "x" * 300 + ".yaml"])]
        words += [] if command in ("check", "preview") else ["--dry-run"]
    for _ in range(random.randrange(1, 4)):
        options = OPTIONS.get(command, ())
        kind = random.randrange(4)
        words += [random.choice(options)] if options and kind else []
        words += [random.choice(VALUES)] if kind != 1 else [random.choice(FLAGS)]
    return words


Tell = Callable[[list[str]], int]


@pytest.fixture
def tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Tell]:
    """Run a command line in this process; what it says, and how it ends, is what a user can act on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # commands write into it
    monkeypatch.setattr("gc.disable", lambda: None)

    def run(words: list[str]) -> int:
        monkeypatch.setattr("sys.argv", ["alignkit", *words])
        code = main()
        told = capsys.readouterr()
        said = told.err
        assert code in (0, 2, 8) and "Traceback" not in said and "error: unexpected" not in said, (words, code, said)
        assert code == 0 or said.startswith("error: ") or "\nerror: " in said, (words, said)
        assert len(said) < 20_000 and "\x1b" not in said + told.out, words
        return code

    yield run
    assert not (tmp_path / "canary").exists() and not (tmp_path / "alignkit-error.log").exists()
    assert not (tmp_path / "runs").exists()


def numbers(few: int, many: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


@numbers(25, 250)
def test_odd_command_lines(tmp_path: Path, tell: Tell, count: int) -> None:
    (tmp_path / "a.yaml").write_text(RECIPE)
    (tmp_path / "d").mkdir()
    random = Random(count)
    codes = [tell(mistaken(random)) for _ in range(count)]
    assert codes.count(2) > count / 2 and codes.count(0) >= count // 50


@numbers(6, 400)
def test_broken_recipes_are_checked_to_the_end(
    tmp_path: Path, tell: Tell, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe_fuzz, "BASE", recipe_fuzz.BASE.rpartition("stages:")[0] + MORE)
    random, codes = Random(count), []
    for _ in range(count):
        kind = random.choice((recipe_fuzz.break_value, recipe_fuzz.break_value, recipe_fuzz.break_text))
        (tmp_path / "a.yaml").write_bytes(kind(random).data)
        codes.append(tell(["check", "--recipe", "a.yaml"]))
    assert codes.count(0) >= count // 20


@numbers(8, 200)
def test_damaged_data_files_are_checked_to_the_end(tmp_path: Path, tell: Tell, count: int) -> None:
    random, codes = Random(count), []
    for _ in range(count):
        path = data_fuzz.make_file(random, tmp_path)
        method = random.choice(["sft", "sft", "rm", "dpo"])
        stage = {"data": path.name, "on_bad_row": random.choice(["error", "skip"])}
        (tmp_path / "a.yaml").write_text(json.dumps({"model": "builtin:tiny-llama", method: stage}))
        codes.append(tell([random.choice(["check", "preview"]), "--recipe", "a.yaml"]))
        path.unlink()
    assert codes.count(0) >= count // 20
