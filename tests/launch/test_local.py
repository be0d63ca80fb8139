"""What a launch refuses at once, before torch is loaded, and that two runs never share a directory."""

from __future__ import annotations

import json
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

    def run(*arguments: str, model: str = "builtin:tiny-gpt2", rows: str | None = GOOD, more: str = "") -> str:
        (tmp_path / "r.yaml").write_text(RECIPE.replace("MODEL", model) + more)
        if rows is not None:
            (tmp_path / "rows.jsonl").write_text(rows)
        ended = run_python("-c", SEES_TORCH, *arguments, "-r", "r.yaml")
        assert (ended.returncode, ended.stdout) == (2, "False\n"), ended.stderr
        return ended.stderr

    return run


@pytest.mark.parametrize("command", ["sft", "check"])
def test_what_is_not_there_is_named_with_its_place_in_the_recipe(refuse: Callable, command: str) -> None:
    assert refuse(command, rows=None).startswith("error: r.yaml:2: sft.data: rows.jsonl: no such file\n")
    assert refuse(command, model="builtin:tiny-gtp2").startswith(
        "error: r.yaml:1: model.path: 'builtin:tiny-gtp2' is not one of builtin:tiny-gpt2, builtin:tiny-llama, "
        "builtin:rnnsearch, builtin:rnnencdec; did you mean builtin:tiny-gpt2?\n"
    )


@pytest.mark.parametrize("command", [("run",), ("run", "--dry-run"), ("check",)])
def test_an_evaluation_without_rows_is_refused_before_anything_is_trained(refuse: Callable, command: str) -> None:
    line = (
        "error: r.yaml:4: evaluate: has no rows to measure on: sft keeps none out of training; add eval: to sft (a "
        "share such as 0.05, or files), or evaluate.data\n"
    )
    assert line in refuse(*command, more="evaluate: {max_rows: 4}\nstages: [sft]\n")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("chat", "runs/r/stf"), "runs/r/stf does not exist; did you mean sft?"),
        (("eval", "sft"), "sft: is not there; did you mean runs/r/sft?"),
        (("merge", "r/sft", "--out", "m"), "r/sft: is not there; did you mean runs/r/sft?"),
        (("chat", "r/stf"), "r/stf: is not there; did you mean runs/r/sft?"),
        (("eval", "policy"),
         "policy: is neither a directory nor a model on this machine; the runs here are runs/r/dpo, runs/r/sft"),
        (("chat", "runs/r"), "runs/r: holds the runs dpo, sft; name one of them"),
        (("eval", "runs/r/sft"), "runs/r/sft is a run that has no model yet; finish it first"),
        (("diff", "runs/r/sft", "runs/r/dop"), "runs/r/dop does not exist; did you mean dpo?"),
        (("report", "runs/rr"), "runs/rr does not exist; did you mean r?"),
        (("eval", "runs/r/sft", "--set", "evaluate.max_row=4"),
         "--set: evaluate.max_row is no key; did you mean max_rows?"),
        (("eval", "runs/r/sft", "--set", "dpo.beta=1"),
         "--set: dpo: only evaluate.KEY can be set for a RUN; the rest is what it was trained with"),
    ],
)  # fmt: skip
def test_a_mistyped_run_ends_at_once_with_the_runs_that_may_be_meant(
    run_python: Callable, tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    for name in ("dpo", "sft"):
        (tmp_path / f"runs/r/{name}").mkdir(parents=True)
        (tmp_path / f"runs/r/{name}/stage.json").write_text("{}")
    ended = run_python("-c", SEES_TORCH, *arguments)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "False\n", f"error: {told}\n")


def test_bad_rows_and_an_untrained_start_are_named(refuse: Callable) -> None:
    assert refuse("sft", rows=GOOD + '{"prompt": "a", "completion": null}\n' + GOOD + "{\n").splitlines()[:2] == [
        "error: rows.jsonl:2: completion: is null",
        "error: rows.jsonl:4: invalid JSON: Expecting property name enclosed in double quotes (column 2)",
    ]
    assert refuse("dpo", rows='{"prompt": "a", "chosen": "b", "rejected": "c"}\n') == (
        "error: r.yaml:3: dpo starts from sft, which has not been trained to its end; train --stage sft of r.yaml "
        "first, or name another start_from\n"
    )


def test_settings_that_cannot_be_are_refused_with_their_line(refuse: Callable, tmp_path: Path) -> None:
    assert refuse("sft", model="builtin:tiny-gpt2, chat_template: chatlm") == (
        "error: r.yaml:1: model.chat_template: 'chatlm' is neither a file nor one of chatml, llama3, plain, zephyr; "
        "did you mean chatml?\n"
    )
    assert refuse("sft", "--allow-change", "sft.max_step") == (
        "error: --allow-change: sft.max_step is no setting of these stages; did you mean sft.max_steps?\n"
    )
    (tmp_path / "runs/r/sft").mkdir(parents=True)
    before = {"stage": "sft", "method": "sft", "fingerprint": {"sft.learning_rate": 1e-3}}
    (tmp_path / "runs/r/sft/stage.json").write_text(json.dumps(before))
    assert "  sft.learning_rate: 0.001 -> 2e-05 (default)\n" in refuse("sft", "--set", "sft.learning_rate=2e-5")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "old/pytorch_model.bin").write_bytes(b"\x80\x04")
    message = refuse("sft", model="./old")
    assert "pytorch_model.bin" in message and "safetensors" in message


def test_a_second_run_in_the_same_directory_is_refused(run_alignkit: Callable, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("MODEL", "builtin:tiny-gpt2"))
    (tmp_path / "rows.jsonl").write_text(GOOD)
    hold = (
        "import sys, time; from pathlib import Path; from alignkit.runs.directory import open_run\n"
        "held = open_run(Path('runs/r/sft'), force=False); print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env={"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    ) as holder:  # fmt: skip
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        began = time.monotonic()
        ended = run_alignkit("sft", "-r", "r.yaml")
        holder.kill()
    assert ended.returncode == 2
    assert f"in use by process {holder.pid} on " in ended.stderr
    assert time.monotonic() - began < 30
