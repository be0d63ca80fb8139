"""Critique and label stages that are killed, stopped or damaged end with the rows of undisturbed ones, asking nothing
twice; with a real server on the loopback, and with a real model on disk.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from faults.conftest import damage_each
from feedback.judge_server import Server

from alignkit.recipe import Stage, load_recipe, resolve

CONCURRENCY = 4
RECIPE = """
name: faults
model: builtin:tiny-gpt2
critique:
  data: {{path: builtin:prompts, max_rows: {rows}}}
  constitution: builtin:harmlessness
  generator: {model}
  rounds: 2
  max_new_tokens: 6
  examples: none
  batch_size: 4
label:
  data: {{path: builtin:prompts, max_rows: {rows}}}
  constitution: builtin:helpfulness
  generator: {model}
  judge: {model}
  max_new_tokens: 6
  batch_size: 4
"""


def reply(payload: dict) -> str:
    """Answer a judge's question with a letter, and anything else with words that depend on what was asked."""
    text = json.dumps(payload.get("messages") or payload.get("prompt")) + str(payload.get("seed"))
    letter = "AB"[sum(text.encode()) % 2]
    return f"({letter}) is better, by {sum(text.encode())}"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(reply=reply, seconds=0.02) as started:
        yield started


@pytest.fixture
def warm_feedback(warm: None) -> None:
    import openai  # noqa: F401

    import alignkit.feedback.critique
    import alignkit.feedback.local
    import alignkit.feedback.server
    import alignkit.rewards.label  # noqa: F401


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from alignkit.models.start import builtin_config, builtin_tokenizer, random_model

    directory = tmp_path_factory.mktemp("model")
    config = builtin_config("builtin:tiny-gpt2")
    config.n_positions = 4096
    random_model(config, seed=1, dtype=torch.float32).save_pretrained(directory)
    builtin_tokenizer().save_pretrained(directory)
    return directory


Make = Callable[[str], Stage]


@pytest.fixture(params=["critique-url", "label-url", "critique-model", "label-model"])
def make(request: pytest.FixtureRequest, warm_feedback: None, server: Server, model_dir: Path, tmp_path: Path) -> Make:
    """A function that resolves a stage, which asks a server or a model here, into a run directory of its own."""
    method, kind = request.param.split("-")
    model = str(model_dir)
    if kind == "url":
        model = f"{{url: {server.url}, name: m, concurrency: {CONCURRENCY}, retries: 1}}"
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(rows=16, model=model))
    return lambda out: resolve(load_recipe(path), method, out=tmp_path / out)


def list_keys(run_dir: Path) -> list[str]:
    return [json.loads(line)["key"] for line in (run_dir / "feedback.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_kills_leave_the_rows_as_they_are_and_ask_nothing_twice(
    make: Make, run: Callable, server: Server, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    whole = run(make("whole"))
    assert whole.code == 0, whole.stderr
    rows, asked = (tmp_path / "whole/rows.jsonl").read_bytes(), set(list_keys(tmp_path / "whole"))
    assert rows.count(b"\n") >= 10
    rng, hits, requests = random.Random(1), 0, len(server.answered)
    for part in range(30):
        place, landed = tmp_path / f"killed{part}", 0
        server.answered.clear()
        for _ in range(4):
            landed += run(make(place.name), kill_after=rng.uniform(0.05, whole.seconds)).code == -signal.SIGKILL
        ended = run(make(place.name))
        assert ended.code == 0, ended.stderr
        assert (place / "rows.jsonl").read_bytes() == rows
        assert len(list_keys(place)) == len(asked) and set(list_keys(place)) == asked
        # What was under way at a kill is asked again, nothing else.
        assert sum(server.answered.values()) - requests <= landed * CONCURRENCY
        hits += landed
        if hits >= 12:
            break
    print(f"{request.node.callspec.id}: {hits} kills, rows equal to the byte")
    assert hits >= 12


@pytest.mark.slow
def test_every_damage_to_every_file_is_mended_or_refused(
    make: Make, run: Callable, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    whole = run(make("whole"))
    assert whole.code == 0, whole.stderr
    part, shares = tmp_path / "part", iter((0.5, 0.4, 0.6, 0.3, 0.7, 0.8, 0.2))
    while not (part / "feedback.jsonl").exists() or not (part / "feedback.jsonl").stat().st_size:
        shutil.rmtree(part, ignore_errors=True)
        run(make("part"), kill_after=whole.seconds * next(shares))
    codes = [
        code
        for begun in (tmp_path / "whole", part)
        for code in damage_each(begun, run, make, lambda place: (place / "rows.jsonl").read_bytes())
    ]
    print(f"{request.node.callspec.id}: {len(codes)} damages, {codes.count(0)} mended, the others refused")


@pytest.mark.parametrize("make", ["label-url"], indirect=True)
def test_what_was_torn_is_made_again_without_asking(make: Make, run: Callable, server: Server, tmp_path: Path) -> None:
    assert run(make("run")).code == 0
    place, asked = tmp_path / "run", server.requests
    whole = {name: (place / name).read_bytes() for name in ("rows.jsonl", "labels.jsonl")}
    for name in ("report.json", "labels.jsonl", "rows.jsonl"):
        content = (place / name).read_bytes()
        (place / name).write_bytes(content[:50])
        ended = run(make("run"))
        assert ended.code == 0 and f"{name} has 50 bytes instead of {len(content)}; it is made" in ended.stderr
        assert json.loads((place / "report.json").read_text())["complete"]
    (place / "stage.json").unlink()
    assert run(make("run")).code == 0 and (place / "stage.json").is_file()
    assert {name: (place / name).read_bytes() for name in whole} == whole and server.requests == asked


@pytest.mark.slow
@pytest.mark.parametrize("make", ["critique-model"], indirect=True)
def test_ctrl_c_ends_the_batch_that_is_being_written(make: Make, run: Callable, tmp_path: Path) -> None:
    def long(out: str) -> Stage:
        stage = make(out)
        return replace(stage, options=stage.options.model_copy(update={"max_new_tokens": 400, "batch_size": 16}))

    whole = run(long("whole"))  # some seconds for each of its five batches
    assert whole.code == 0, whole.stderr
    sent: list[float] = []

    def is_writing() -> bool:
        if (tmp_path / "cut/stage.json").is_file():
            sent.append(time.monotonic())
        return bool(sent) and time.monotonic() - sent[0] > 0.3

    ended = run(long("cut"), kill_after=is_writing, number=signal.SIGINT)
    assert ended.code == 130 and ended.stderr.count("once more stops at once") == 1
    assert "error: stopped by SIGINT: everything answered is kept" in ended.stderr
    assert time.monotonic() - sent[-1] < 1.5 + 0.1 * whole.seconds
    assert run(long("cut")).code == 0
    assert (tmp_path / "cut/rows.jsonl").read_bytes() == (tmp_path / "whole/rows.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("make", ["label-url", "critique-model"], indirect=True)
def test_a_full_disk_exits_4_and_the_same_command_goes_on(
    make: Make, run: Callable, small_disk: Path, tmp_path: Path
) -> None:
    whole = run(make("whole"))
    assert whole.code == 0, whole.stderr
    size = (tmp_path / "whole/feedback.jsonl").stat().st_size
    filler = small_disk / "filler"
    free = shutil.disk_usage(small_disk).free
    filler.write_bytes(bytes(free - size // 2 - 28_000))  # the other files need some
    place = small_disk / "run"
    ended = run(make(str(place)))
    assert ended.code == 4 and ended.stderr.count("error:") == 1 and "No space left" in ended.stderr, ended.stderr
    kept = list_keys(place)
    assert kept
    filler.unlink()
    assert run(make(str(place))).code == 0
    assert (place / "rows.jsonl").read_bytes() == (tmp_path / "whole/rows.jsonl").read_bytes()
    assert list_keys(place)[: len(kept)] == kept and len(list_keys(place)) == len({*list_keys(place)})
