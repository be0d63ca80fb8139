"""`alignkit run`: what it decides for each stage, the span it looks at, its table, its figures, a kill."""

from __future__ import annotations

import html
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.errors import UsageError
from alignkit.launch.placement import Command
from alignkit.launch.run import Measuring, plan_run
from alignkit.recipe import load_recipe, pick_span, resolve
from alignkit.runs.directory import RunDir, write_result

COMMON = "batch_size: 4, max_length: 160, samples: {num: 0}, learning_rate: 1e-3"
RECIPE = f"""\
model: {{path: builtin:tiny-llama}}
evaluate: {{max_rows: 8, metrics: [perplexity, pairs]}}
sft: {{data: rows.jsonl, eval: 0.5, max_steps: 2, {COMMON}}}
rm: {{start_from: sft, data: {{path: builtin:preferences, max_rows: 16}}, max_steps: 2, {COMMON}}}
dpo: {{start_from: sft, data: {{path: builtin:preferences, max_rows: 16}}, max_steps: 2, {COMMON}}}
"""
ROWS = "".join(json.dumps({"prompt": f"What is {n}?", "completion": f"It is {n}."}) + "\n" for n in range(32))


@pytest.fixture(scope="module")
def trained(alignkit_in: Callable, shared_directory: Callable) -> Path:
    """A directory in which `alignkit run` has been run to its end."""

    def train(folder: Path) -> None:
        (folder / "r.yaml").write_text(RECIPE)
        (folder / "rows.jsonl").write_text(ROWS)
        done = alignkit_in(folder, "run", "-r", "r.yaml", "--json")
        assert done.returncode == 0, done.stderr
        (folder / "said.json").write_text(done.stdout)

    return shared_directory("run", train)


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to be changed."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(*overrides: str, force: bool = False, allow_change: tuple[str, ...] = ()) -> dict[str, tuple[str, str]]:
    """Return what would be done with each stage, and why."""
    loaded = load_recipe(Path("r.yaml"), overrides=overrides)
    commands = [Command(resolve(loaded, name), overrides, allow_change=allow_change) for name in loaded.order]
    return {entry.stage.name: (entry.will, entry.why) for entry in plan_run(commands, force=force)}


LEFT = ("leave alone", "finished, nothing has changed")


def test_a_changed_stage_runs_again_and_so_does_all_that_needs_it(folder: Path) -> None:
    after_sft = {name: ("run again", "sft runs before it") for name in ("rm", "dpo")}
    left = dict.fromkeys(("sft", "rm", "dpo"), LEFT)
    assert plan() == plan("dpo.logging_steps=7") == left  # which is watched, not trained
    assert plan("dpo.beta=0.5") == left | {"dpo": ("run again", "dpo.beta: 0.1 (default) -> 0.5")}
    assert plan("sft.learning_rate=2e-3") == {"sft": ("run again", "sft.learning_rate: 0.001 -> 0.002"), **after_sft}
    assert plan("sft.learning_rate=2e-3", allow_change=("learning_rate",))["sft"] == LEFT
    assert [will for will, _ in plan("seed=3").values()] == ["run again"] * 3
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "And?", "completion": "No."}\n')
    found = plan()
    assert found["sft"][0] == "run again" and found["sft"][1].startswith("data: ")
    assert found == {"sft": found["sft"], **after_sft}


def test_a_file_whose_bytes_are_not_compared_is_known_by_its_directory(folder: Path) -> None:
    def values(*overrides: str) -> dict:
        return resolve(load_recipe(Path("r.yaml"), overrides=overrides), "rm").fingerprint_values()

    for name in ("one", "other"):
        (folder / name).mkdir()
        shutil.copy(folder / "rows.jsonl", folder / name / "rows.jsonl")
    one, other = (
        values("rm.normalize=bias", f"rm.normalize_data={folder}/{name}/rows.jsonl") for name in ("one", "other")
    )
    assert {key for key in one if one[key] != other[key]} == {"rm.normalize_data"}
    assert values(f"rm.data={folder}/one/rows.jsonl") == values(f"rm.data={folder}/other/rows.jsonl")


def test_nothing_is_measured_where_no_stage_has_a_model(folder: Path) -> None:
    label = (
        "label={method: label, start_from: sft, judge: sft, constitution: builtin:helpfulness, data: builtin:prompts}"
    )
    recipe = load_recipe(Path("r.yaml"), overrides=[label])
    assert Measuring.of(recipe, ["label"], trust_code=False) is None
    assert Measuring.of(recipe, ["sft", "label"], trust_code=False) is not None


def test_weights_that_were_trained_anew_run_what_needs_them(folder: Path) -> None:
    weights = folder / "runs/r/sft/model/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-8] ^= 1
    weights.write_bytes(bytes(data))
    found = plan()  # as long as the result says otherwise, they are damaged
    assert found["sft"] == ("go on", "model/model.safetensors has other bytes than were saved")
    assert found["rm"] == found["dpo"] == ("run again", "sft goes on before it")
    run = RunDir(folder / "runs/r/sft")
    write_result(run, json.loads(run.result.read_text()), [run.model])
    found = plan()
    assert found["sft"] == LEFT
    assert all(will == "run again" and "start_weights" in why for will, why in (found["rm"], found["dpo"]))


def test_a_run_that_is_gone_is_run_and_one_that_stopped_goes_on(folder: Path) -> None:
    shutil.rmtree("runs/r/rm")
    shutil.rmtree("runs/r/dpo/model")
    assert plan() == {"sft": LEFT, "rm": ("run", "no run yet"), "dpo": ("run again", "its model is gone")}
    Path("runs/r/sft/result.json").unlink()
    assert plan() == {
        "sft": ("go on", "stopped; step 2 is saved"), "rm": ("run", "no run yet"),
        "dpo": ("run again", "sft goes on before it"),
    }  # fmt: skip
    assert plan(force=True)["sft"] == ("run again", "--force")


def test_a_dry_run_says_why_and_touches_nothing(run_alignkit: Callable, folder: Path) -> None:
    before = sorted(str(path) for path in folder.rglob("*"))
    done = run_alignkit("run", "-r", "r.yaml", "--dry-run", "--set", "dpo.beta=0.5", "--from", "rm")
    assert done.returncode == 0, done.stderr
    rows = [line.split(maxsplit=3) for line in done.stdout.splitlines()[2:]]
    assert rows == [
        ["rm", "rm", "sft", "leave alone  finished, nothing has changed"],
        ["dpo", "dpo", "sft", "run again    dpo.beta: 0.1 (default) -> 0.5"],
        ["evaluate", "-", "-", "run          models to measure"],
    ]
    shown = json.loads(run_alignkit("run", "-r", "r.yaml", "--dry-run", "--json").stdout)
    assert [(entry["stage"], entry["will"], entry["needs"]) for entry in shown] == [
        ("sft", "leave alone", []), ("rm", "leave alone", ["sft"]), ("dpo", "leave alone", ["sft"]),
        ("evaluate", "leave alone", []),
    ]  # fmt: skip
    assert sorted(str(path) for path in folder.rglob("*")) == before


def test_a_dry_run_refuses_rows_that_are_not_there_and_an_order_that_cannot_be_run(
    run_alignkit: Callable, tmp_path: Path
) -> None:
    (tmp_path / "rows").mkdir()
    for name in ("train", "test"):
        (tmp_path / "rows" / f"{name}.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "r.yaml").write_text(
        "model: {path: builtin:tiny-gpt2}\nsft: {data: {path: ./rows, split: tset}, eval: ./no.jsonl}\n"
    )
    for command in ("sft", "run"):
        done = run_alignkit(command, "-r", "r.yaml", "--dry-run")
        assert done.returncode == 2
        assert done.stderr.splitlines()[:2] == [
            f"error: r.yaml:2: sft.data: {tmp_path / 'rows'}: has no split tset; it has test, train: write split: NAME",
            "error: r.yaml:2: sft.eval: no.jsonl: no such file",
        ]
    right = ("--set", "sft.data.split=test", "--set", "sft.eval=null")
    assert run_alignkit("sft", "-r", "r.yaml", "--dry-run", *right).returncode == 0
    (tmp_path / "order.yaml").write_text(RECIPE)
    wrong = ("--set", "stages=[rm,sft]", "--set", "evaluate=null")
    done = run_alignkit("run", "-r", "order.yaml", *wrong, "--dry-run")
    assert done.returncode == 2
    assert "rm starts from sft, which neither has been run nor is run before it; put it first" in done.stderr


def test_a_failure_is_on_the_page_of_the_recipe(run_alignkit: Callable, folder: Path) -> None:
    page = folder / "runs/r/report.html"
    page.unlink()
    too_large = ("--set", "dpo.learning_rate=1e30", "--set", "dpo.warmup_steps=0", "--set", "dpo.max_grad_norm=0")
    done = run_alignkit("run", "-r", "r.yaml", *too_large)
    assert done.returncode == 3, done.stderr
    error = done.stderr.splitlines()[-1].removeprefix("error: ")
    assert "Lower learning_rate" in error
    assert [line.split()[:2] for line in done.stdout.splitlines()[2:5]] == [
        ["sft", "finished"], ["rm", "finished"], ["dpo", "not"],
    ]  # fmt: skip
    text = html.unescape(page.read_text())
    assert "2 of 3 stages finished" in text and "It ended with an error." in text and error in text


def test_a_span_of_stages(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "r.yaml")
    spans = [(), ("rm",), (None, "rm"), ("rm", "rm")]
    assert [pick_span(recipe, *span) for span in spans] == [["sft", "rm", "dpo"], ["rm", "dpo"], ["sft", "rm"], ["rm"]]
    for span, said in (
        (("dpo", "sft"), "--until sft comes before --from dpo"),
        (("dpp", None), r"--from dpp is not a stage; did you mean dpo\?"),
        ((None, "nothing"), "--until nothing is not a stage; there are sft, rm, dpo"),
    ):
        with pytest.raises(UsageError, match=said):
            pick_span(recipe, *span)


def test_the_models_are_measured_once(trained: Path, run_alignkit: Callable, folder: Path) -> None:
    said = json.loads((trained / "said.json").read_text())
    assert [evaluation["name"] for evaluation in said["evaluations"]] == ["r/sft", "r/rm", "r/dpo"]
    assert all(figure["n"] > 0 for evaluation in said["evaluations"] for figure in evaluation["results"])
    assert "perplexity" in (folder / "runs/r/report.html").read_text()
    file = folder / "runs/r/dpo/eval.json"
    before = file.stat().st_mtime_ns
    done = run_alignkit("run", "-r", "r.yaml")
    assert done.returncode == 0 and "evaluate: already measured, nothing to do" in done.stderr
    assert done.stderr.count("already finished, nothing to do") == 3
    assert file.stat().st_mtime_ns == before
    done = run_alignkit("run", "-r", "r.yaml", "--set", "evaluate.max_rows=4", "--from", "dpo")
    assert done.returncode == 0 and file.stat().st_mtime_ns > before
    figures = json.loads(file.read_text())["results"]
    assert {figure["n"] for figure in figures if figure["metric"] == "perplexity"} == {8, 4}  # both are kept


def test_the_run_before_is_kept_when_a_stage_runs_again(run_alignkit: Callable, folder: Path) -> None:
    done = run_alignkit("run", "-r", "r.yaml", "--set", "dpo.beta=0.5", "--set", "evaluate=null")
    assert done.returncode == 0, done.stderr
    assert "dpo (3 of 3): run again: dpo.beta: 0.1 (default) -> 0.5" in done.stderr
    (old,) = (folder / "runs/r").glob("dpo.old-*")
    assert f"the earlier run is kept as {old}" in done.stderr
    assert (old / "result.json").is_file()
    assert json.loads((folder / "runs/r/dpo/stage.json").read_text())["trainer"]["beta"] == 0.5


def test_a_kill_in_the_middle_and_the_same_command_again(
    run_alignkit: Callable, open_terminal: Callable, folder: Path
) -> None:
    shutil.rmtree("runs/r/dpo")
    longer = ("--set", "dpo.max_steps=150", "--set", "dpo.save_steps=3")
    terminal = open_terminal("run", "-r", "r.yaml", *longer, cwd=folder)
    terminal.wait_for("left alone")
    terminal.wait_for("running")  # the live table
    checkpoints = folder / "runs/r/dpo/checkpoints"
    end = time.monotonic() + 120
    while not list(checkpoints.glob("checkpoint-*/alignkit_manifest.json")):
        assert time.monotonic() < end and terminal.process.poll() is None
        terminal.look()
    os.killpg(terminal.process.pid, signal.SIGKILL)
    terminal.process.wait()
    sealed = [path.parent for path in checkpoints.glob("checkpoint-*/alignkit_manifest.json")]
    saved = max(int(path.name.removeprefix("checkpoint-")) for path in sealed)
    spent = json.loads((checkpoints / f"checkpoint-{saved}/alignkit_manifest.json").read_text())["seconds"]
    done = run_alignkit("run", "-r", "r.yaml", *longer, "--dry-run")
    assert "go on        stopped; step" in done.stdout
    before = (folder / "runs/r/rm/result.json").stat().st_mtime_ns
    done = run_alignkit("run", "-r", "r.yaml", *longer, "--json")
    assert done.returncode == 0, done.stderr
    assert "dpo: going on from step " in done.stderr
    assert int(done.stderr.partition("going on from step ")[2].split()[0]) >= saved - 3
    result = json.loads(done.stdout)["stages"][2]
    assert result["step"] == 150 and result["wall_seconds"] > spent > 0
    assert (folder / "runs/r/rm/result.json").stat().st_mtime_ns == before
