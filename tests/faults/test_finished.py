"""Finished runs that were damaged, odd files, moved directories, and settings that were changed on purpose."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.recipe import Stage, load_recipe, resolve
from alignkit.runs.directory import MANIFEST, newest_step, seal_checkpoint
from alignkit.runs.files import read_json

RECIPE = """
name: faults
model: {{path: builtin:tiny-llama}}
sft: {{data: "builtin:instructions?rows={rows}", {options}, max_length: 160, learning_rate: 1e-3, {samples}}}
"""


def make(tmp_path: Path, out: str, *, rows: int = 32, options: str, samples: str = "samples: {num: 0}") -> Stage:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(rows=rows, options=options, samples=samples))
    return resolve(load_recipe(path), None, method="sft", out=tmp_path / out)


def unfinish(run: Path, *, last: int) -> None:
    """Take a finished run back to what it was when its checkpoint before step `last` had been saved."""
    shutil.rmtree(run / "model")
    shutil.rmtree(run / f"checkpoints/checkpoint-{last}")
    for name in ("result.json", "report.html"):
        (run / name).unlink()


def read_metrics(run: Path, *names: str) -> list[list]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[row["step"], *(row[name] for name in names)] for row in rows if names[0] in row]


def say_other_bits(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def reseal(checkpoint: Path, name: str, content: bytes) -> None:
    facts = read_json(checkpoint / MANIFEST)
    (checkpoint / name).write_bytes(content)
    seal_checkpoint(checkpoint, {key: facts[key] for key in facts.keys() - {"files", "crc32", "format"}})


def test_what_was_damaged_is_made_again_and_nothing_else(run: Callable, digest: Callable, tmp_path: Path) -> None:
    options = "max_steps: 7, save_steps: 1, batch_size: 4, logging_steps: 3"
    assert run(make(tmp_path, "whole", options=options)).code == 0
    weights = digest(tmp_path / "whole")
    losses = read_metrics(tmp_path / "whole", "loss")
    assert [step for step, _ in losses] == [1, 3, 6, 7]

    def once_more(name: str, change: Callable[[Path], object], said: str, *, code: int = 0) -> Path:
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        change(tmp_path / name)
        ended = run(make(tmp_path, name, options=options))
        assert ended.code == code and said in ended.stderr and "Traceback" not in ended.stderr, (name, ended.stderr)
        if code == 0:
            assert digest(tmp_path / name) == weights and (tmp_path / name / "report.html").is_file(), name
            assert read_metrics(tmp_path / name, "loss") == losses, name
        return tmp_path / name

    file = "model/model.safetensors"
    again = "; it goes on from its last checkpoint"
    once_more("gone", lambda at: (at / file).unlink(), f"{file} is missing{again}")
    once_more("cut", lambda at: os.truncate(at / file, 1000), f"{file} has 1000 bytes instead of")
    once_more("bit", lambda at: say_other_bits(at / file), f"{file} has other bytes than were saved{again}")
    once_more("torn result", lambda at: (at / "result.json").write_text("{}"), "the earlier result is kept as bad-")

    page = once_more("page", lambda at: ((at / "report.html").unlink(), (at / "model/README.md").unlink()), "already")
    assert (page / "model/README.md").is_file()

    def lose_all(at: Path) -> None:
        unfinish(at, last=7)
        shutil.rmtree(at / "checkpoints")

    lost = once_more("lost", lose_all, "its checkpoints are gone, though the run had saved some", code=2)
    assert not (lost / "model").exists()

    def break_line(at: Path) -> None:
        unfinish(at, last=7)
        text = (at / "metrics.jsonl").read_text()
        (at / "metrics.jsonl").write_text('{"st\n' + text)

    once_more("line", break_line, "metrics.jsonl: 1 line cannot be read (first: line 1)")

    def lose_metrics(at: Path) -> None:
        unfinish(at, last=7)
        (at / "metrics.jsonl").write_text("")

    unfinished = tmp_path / "unfinished"
    shutil.copytree(tmp_path / "whole", unfinished)
    lose_metrics(unfinished)
    ended = run(make(tmp_path, "unfinished", options=options))
    assert ended.code == 0 and "metrics.jsonl has lost 3 logged steps, 1 to 6: its curves" in ended.stderr
    assert digest(unfinished) == weights

    def put_directory(at: Path) -> None:
        unfinish(at, last=7)
        (at / "preview.json").unlink()
        (at / "preview.json").mkdir()

    once_more("directory", put_directory, "cannot write preview.json (Is a directory", code=4)
    for name, content in (
        ("trainer_state.json", b'{"global_step": 99999999, "epoch": "x"}'),
        ("model.safetensors", b"\xff" * 8 + b"{"),
        ("optimizer.pt", b"\xff" * 8 + b"{"),
    ):

        def change(at: Path, name: str = name, content: bytes = content) -> None:
            shutil.rmtree(at / "model")
            (at / "result.json").unlink()
            reseal(at / "checkpoints/checkpoint-7", name, content)

        found = once_more("sealed", change, f"{name} ")
        assert len(list((found / "checkpoints").glob("bad-checkpoint-7-*"))) == 1


def test_another_batch_size_and_a_longer_run_go_on_from_the_row(run: Callable, tmp_path: Path) -> None:
    options = "save_steps: 4, batching: shuffled, logging_steps: 1"
    assert run(make(tmp_path, "whole", options=f"num_train_epochs: 1, batch_size: 4, {options}")).code == 0
    whole = json.loads((tmp_path / "whole/result.json").read_text())
    for size, last in ((8, 6), (2, 12)):  # four steps of 4 rows, and the other 16 rows
        shutil.copytree(tmp_path / "whole", tmp_path / f"of{size}")
        unfinish(tmp_path / f"of{size}", last=8)
        stage = make(tmp_path, f"of{size}", options=f"num_train_epochs: 1, batch_size: {size}, {options}")
        assert run(stage, allow_change=("batch_size",)).code == 0
        result = json.loads((tmp_path / f"of{size}/result.json").read_text())
        assert (result["step"], result["tokens"]) == (last, whole["tokens"])  # each row once
        assert read_metrics(tmp_path / f"of{size}", "loss", "epoch")[-1][::2] == [last, 1.0]
    longer = make(tmp_path, "whole", options=f"num_train_epochs: 2, batch_size: 4, {options}")
    ended = run(longer, allow_change=("num_train_epochs",))
    assert ended.code == 0 and "num_train_epochs: 1 -> 2; it goes on from its last checkpoint" in ended.stderr
    result = json.loads((tmp_path / "whole/result.json").read_text())
    assert (result["step"], result["tokens"]) == (16, 2 * whole["tokens"])


def test_max_steps_counts_steps_and_a_stream_goes_on_at_its_row_after_another_batch_size(
    run: Callable, digest: Callable, tmp_path: Path
) -> None:
    options = "max_steps: 8, save_steps: 4, logging_steps: 1"
    for name, extra in (("table", "batching: shuffled"), ("stream", "streaming: true")):
        assert run(make(tmp_path, name, options=f"{options}, batch_size: 4, {extra}")).code == 0
        whole = json.loads((tmp_path / name / "result.json").read_text())
        for size, same in ((8, 6), (2, 12)):  # four steps of 4 rows are done: the other 16 rows
            out = f"{name}{size}"
            shutil.copytree(tmp_path / name, tmp_path / out)
            unfinish(tmp_path / out, last=8)
            changed = f"{options.replace('8', str(same))}, batch_size: {size}, {extra}"
            ended = run(make(tmp_path, out, options=changed), allow_change=("batch_size", "max_steps"))
            assert ended.code == 0, ended.stderr
            result = json.loads((tmp_path / out / "result.json").read_text())
            assert (result["step"], result["tokens"]) == (same, whole["tokens"])  # each row once
        shutil.rmtree(tmp_path / f"{name}8")
        shutil.copytree(tmp_path / name, tmp_path / f"{name}8")
        unfinish(tmp_path / f"{name}8", last=8)
        stage = make(tmp_path, f"{name}8", options=f"{options}, batch_size: 8, {extra}")
        ended = run(stage, allow_change=("batch_size",))
        assert ended.code == 0 and "max_steps: 6 reads as many rows as before" in ended.stderr
        assert json.loads((tmp_path / f"{name}8/result.json").read_text())["step"] == 8


def test_one_interrupt_ends_an_evaluation_and_the_next_sitting_makes_up_for_it(
    run: Callable, digest: Callable, tmp_path: Path
) -> None:
    options = "eval: 0.9, max_steps: 2, batch_size: 4, logging_steps: 1, eval_steps: 1, eval_on_start: false"
    options += ", eval_share: null"  # evaluation is nearly all that this run does
    assert run(make(tmp_path, "whole", rows=1200, options=options)).code == 0
    stage = make(tmp_path, "cut", rows=1200, options=options)
    sent: list[float] = []

    def evaluates() -> bool:  # an evaluation follows the loss of the first step
        if not (tmp_path / "cut/metrics.jsonl").is_file():
            return False
        sent.append(time.monotonic())
        return True

    ended = run(stage, kill_after=evaluates, number=signal.SIGINT)
    assert ended.code == 130 and time.monotonic() - sent[0] < 3
    assert "SIGINT: stopping as soon as the step is saved; once more stops at once" in ended.stderr
    assert "step 1 is saved" in ended.stderr and read_metrics(tmp_path / "cut", "eval_loss") == []
    assert run(stage).code == 0
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    for name in ("loss", "eval_loss"):
        assert read_metrics(tmp_path / "cut", name) == read_metrics(tmp_path / "whole", name)


def test_one_interrupt_ends_the_drawing_of_samples(run: Callable, digest: Callable, tmp_path: Path) -> None:
    options = "max_steps: 4, batch_size: 4, logging_steps: 1"  # save_steps: never before the end
    drawn = "samples: {num: 32, max_new_tokens: 100}"  # half a second and more
    assert run(make(tmp_path, "whole", rows=64, options=options, samples=drawn)).code == 0
    for step, delay in ((0, 0.1), (2, 0.1), (2, 0.0)):  # before the first step, before the third one, just before that
        cut = tmp_path / f"cut-{step}-{delay}"
        stage = make(tmp_path, cut.name, rows=64, options=options, samples=drawn)
        sent: list[float] = []

        def draws(step: int = step, delay: float = delay, cut: Path = cut, sent: list[float] = sent) -> bool:
            begun, metrics = (cut / "preview.json").is_file(), cut / "metrics.jsonl"
            if begun and (step == 0 or (metrics.is_file() and len(read_metrics(cut, "loss")) == step)):
                sent.append(time.monotonic())
            return bool(sent) and time.monotonic() - sent[0] > delay

        ended = run(stage, kill_after=draws, number=signal.SIGINT)
        assert ended.code == 130 and time.monotonic() - sent[-1] < 1, (step, delay, ended.stderr)
        kept = (cut / "samples.jsonl").read_text() if (cut / "samples.jsonl").is_file() else ""
        assert ("during" if step else "before") not in kept  # the drawing was not brought to its end
        assert ("starts again" if step == 0 else "goes on from what is saved") in ended.stderr
        ended = run(stage)
        assert ended.code == 0 and ("going on from step 2" in ended.stderr) == (step == 2)
        assert digest(cut) == digest(tmp_path / "whole")
        assert (cut / "samples.jsonl").read_bytes() == (tmp_path / "whole/samples.jsonl").read_bytes()


@pytest.mark.parametrize("how", ["moved", "deleted"])
def test_a_run_directory_that_vanishes_ends_the_run_in_one_line(run: Callable, tmp_path: Path, how: str) -> None:
    place = tmp_path / "run"
    stage = make(tmp_path, "run", options="max_steps: 400, save_steps: 1, batch_size: 4")

    def vanish() -> bool:
        if newest_step(place / "checkpoints") is None:
            return False
        place.rename(tmp_path / "elsewhere")
        if how == "deleted":
            shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
        return True

    ended = run(stage, kill_after=vanish, number=0)
    assert ended.code == 4 and not place.exists()
    assert ended.stderr.count("the run directory was moved or deleted") == 1 and "Traceback" not in ended.stderr


def test_the_disk_is_checked_before_the_first_step(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignkit.train.checkpoint.free_bytes", lambda path: 1000)
    ended = run(make(tmp_path, "run", options="max_steps: 2, batch_size: 4"))
    assert ended.code == 4 and "1000 B are free" in ended.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()
