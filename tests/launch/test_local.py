"""What a launch refuses at once, before torch is loaded, and that two runs never share a directory."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

RECIPE = """\
model: {path: MODEL}
sft: {data: ./rows.jsonl}
dpo: {start_from: sft, data: ./rows.jsonl}
"""
GOOD = '{"prompt": "a", "completion": "b"}\n'
SEES_TORCH = "import sys; from alignkit.cli import main; code = main(); print('torch' in sys.modules); sys.exit(code)"


@pytest.fixture
def refuse(run_python: Callable, tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs a command which must fail with exit code 2 and without torch; return its stderr."""

    def run(*arguments: str, model: str = "builtin:tiny-gpt2", rows: str | None = GOOD) -> str:
        (tmp_path / "r.yaml").write_text(RECIPE.replace("MODEL", model))
        if rows is not None:
            (tmp_path / "rows.jsonl").write_text(rows)
        ended = run_python("-c", SEES_TORCH, *arguments, "-r", "r.yaml")
        assert (ended.returncode, ended.stdout) == (2, "False\n"), ended.stderr
        return ended.stderr

    return run


def test_a_missing_file_is_named_with_its_place_in_the_recipe(refuse: Callable) -> None:
    assert refuse("sft", rows=None) == "error: r.yaml:2: sft.data: rows.jsonl: no such file\n"


def test_bad_rows_of_a_small_file_are_all_found(refuse: Callable) -> None:
    assert refuse("sft", rows=GOOD + '{"prompt": "a", "completion": null}\n' + GOOD + "{\n").splitlines()[:2] == [
        "error: rows.jsonl:2: completion: is null",
        "error: rows.jsonl:4: invalid JSON: Expecting property name enclosed in double quotes (column 2)",
    ]


def test_a_stage_that_starts_from_an_untrained_one_says_what_to_train(refuse: Callable) -> None:
    assert refuse("dpo", rows='{"prompt": "a", "chosen": "b", "rejected": "c"}\n') == (
        "error: r.yaml:3: dpo starts from sft, which has not been trained to its end; train --stage sft of r.yaml "
        "first, or name another start_from\n"
    )


def test_pickled_weights_are_refused(refuse: Callable, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "old/pytorch_model.bin").write_bytes(b"\x80\x04")
    message = refuse("sft", model="./old")
    assert "pytorch_model.bin" in message and "safetensors" in message


def test_a_second_run_in_the_same_directory_is_refused(run_python: Callable, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("MODEL", "builtin:tiny-gpt2"))
    (tmp_path / "rows.jsonl").write_text(GOOD)
    hold = (
        "import sys, time; from pathlib import Path; from alignkit.runs.directory import open_run\n"
        "held = open_run(Path('runs/r/sft'), force=False); print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env={"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        began = time.monotonic()
        ended = run_python("-m", "alignkit", "sft", "-r", "r.yaml")
    finally:
        holder.kill()
        holder.wait()
    assert ended.returncode == 2
    assert f"in use by process {holder.pid} on " in ended.stderr
    assert time.monotonic() - began < 30
