"""Checkpoints are written beside training: no step waits for the disk, and one that cannot be written ends the run."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.errors import DiskError
from alignkit.launch.run import launch_stage
from alignkit.runs.directory import find_damage, list_checkpoints, read_manifest, step_of
from alignkit.runs.record import JsonLines
from alignkit.train import checkpoint
from alignkit.train.recorder import Recorder

TEXT = """
name: t
model: builtin:tiny-llama
sft: {data: {path: builtin:instructions, max_rows: 16}, batch_size: 4, max_steps: 9, save_steps: 3, logging_steps: 1,
      learning_rate: 1e-3, keep_checkpoints: 9, samples: {num: 0}}
"""


def at_the_end_of_step(number: int, act: Callable[[Any], object], monkeypatch: pytest.MonkeyPatch) -> None:
    before = Recorder.on_step_end

    def on_step_end(self: Recorder, args: Any, state: Any, control: Any, **others: Any) -> Any:
        if state.global_step == number:
            act(self._setup.trainer)
        return before(self, args, state, control, **others)

    monkeypatch.setattr(Recorder, "on_step_end", on_step_end)


def test_steps_go_on_while_a_checkpoint_is_written_which_holds_the_state_of_its_own_step(
    make_stage: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = make_stage(TEXT, "sft", "sft.logging_steps=4")  # the third step stands within a window
    directory, taken, save = tmp_path / "runs/t/sft/checkpoints", threading.Event(), torch.save
    with monkeypatch.context() as alone:
        alone.setattr(checkpoint, "spare_memory_bytes", lambda: 0)  # no room for a copy: the step waits
        launch_stage(stage)
    first = directory / "checkpoint-3"
    expected, window = torch.load(first / "optimizer.pt"), read_manifest(first)["window"]
    assert window[0]["weights"]

    def save_late(value: Any, path: Any) -> None:
        if Path(path).parts[-2:] == ("checkpoint-3", "optimizer.pt"):
            assert taken.wait(timeout=100), "no step was taken in the meantime"
        save(value, path)

    monkeypatch.setattr(torch, "save", save_late)
    at_the_end_of_step(5, lambda trainer: taken.set(), monkeypatch)
    launch_stage(make_stage(TEXT, "sft"), force=True)
    found = torch.load(directory / "checkpoint-3/optimizer.pt")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    later = torch.load(directory / "checkpoint-6/optimizer.pt")
    assert found["state"][0]["step"] == 3 and not torch.equal(
        later["state"][0]["exp_avg"], found["state"][0]["exp_avg"]
    )
    sealed = list_checkpoints(directory, sealed=True)
    assert [step_of(path) for path in sealed] == [9, 6, 3]
    assert not any(map(find_damage, sealed))


def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_the_next_step(
    make_stage: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at the next save: every step until then would be lost."""
    at_the_end_of_step(4, lambda trainer: trainer.await_disk(), monkeypatch)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, before[1]))  # the model has 500,000 bytes, its optimizer twice
    try:
        with pytest.raises(DiskError, match=r"cannot write checkpoint-3 .*make room and run the same command again"):
            launch_stage(make_stage(TEXT, "sft"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run = tmp_path / "runs/t/sft"
    assert JsonLines(run / "metrics.jsonl").read()[-1]["step"] == 3 and not [*(run / "checkpoints").iterdir()]
    assert launch_stage(make_stage(TEXT, "sft")).status == "finished"
