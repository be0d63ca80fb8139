"""A run that is killed, stopped, damaged or starved of disk ends with the weights of an undisturbed one."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from faults.conftest import damage, damage_each

from alignkit.recipe import Stage, load_recipe, resolve
from alignkit.recipe.schema import DataSource, EvaluateOptions
from alignkit.runs.directory import MANIFEST, find_damage, list_checkpoints, seal_checkpoint, step_of
from alignkit.runs.files import read_json
from alignkit.train import checkpoint as train_checkpoint

QUICK = [("sft", "full"), ("rm", "lora"), ("dpo", "qlora")]
CASES = [(method, kind) for method in ("sft", "rm", "dpo") for kind in ("full", "lora", "qlora")]
SLOW = pytest.mark.slow
ONE = [QUICK[0], *(pytest.param(*case, marks=SLOW) for case in QUICK[1:])]  # of what no method has a part in
NUM_STEPS = 12  # of every run here, as make_stage has it


@pytest.fixture
def undisturbed(make_stage: Callable, run: Callable, digest: Callable, shared_directory: Callable) -> Callable:
    """Return a function that trains a kind once for all tests and gives the digest of its weights and its seconds."""

    def give(method: str, kind: str) -> tuple[str, float]:
        def train(directory: Path) -> None:
            ended = run(make_stage(method, kind, str(directory / "whole")))
            assert ended.code == 0, ended.stderr
            (directory / "seconds").write_text(str(ended.seconds))

        directory = shared_directory(f"undisturbed-{method}-{kind}", train)
        return digest(directory / "whole"), float((directory / "seconds").read_text())

    return give


def kill_until_finished(stage: object, run: Callable, rng: random.Random, seconds: float, num_kills: int = 3) -> int:
    """Kill the run at random moments, then let it finish; return how many kills hit it while it ran."""
    hits = 0
    for _ in range(num_kills):
        ended = run(stage, kill_after=rng.uniform(0.02, seconds))
        hits += ended.code == -signal.SIGKILL
    ended = run(stage)
    assert ended.code == 0, ended.stderr
    return hits


@pytest.mark.parametrize(("method", "kind", "least"), [
    *((*case, 1) for case in QUICK), *(pytest.param(*case, 10, marks=SLOW) for case in CASES),
])  # fmt: skip
def test_kills_leave_the_final_weights_bit_identical(
    method: str, kind: str, least: int, undisturbed: Callable, make_stage: Callable, run: Callable, digest: Callable,
    tmp_path: Path,
) -> None:  # fmt: skip
    whole, seconds = undisturbed(method, kind)
    rng, hits = random.Random(method + kind), 0
    for part in range(4):  # a run that is killed late is nearly done: several runs make ten kills hit
        hits += kill_until_finished(make_stage(method, kind, f"killed{part}"), run, rng, seconds * 0.8)
        assert digest(tmp_path / f"killed{part}") == whole
        if hits >= least:
            break
    assert hits >= 1
    print(f"{method} {kind}: {hits} kills, {part + 1} runs, all exact")


@pytest.mark.parametrize(("method", "kind"), ONE)
def test_a_kill_while_a_checkpoint_is_written_beside_the_steps_falls_back_to_the_one_before(
    method: str, kind: str, undisturbed: Callable, make_stage: Callable, run: Callable, digest: Callable, tmp_path: Path
) -> None:
    whole, _ = undisturbed(method, kind)
    places = [tmp_path / "killed" / "checkpoints" / f"checkpoint-{n}" for n in (3, 4)]

    def slow_disk() -> None:
        def seal_late(checkpoint: Path, facts: dict) -> None:
            time.sleep(1.0 if checkpoint == places[1] else 0.0)
            seal_checkpoint(checkpoint, facts)

        train_checkpoint.seal_checkpoint = seal_late  # in the child alone

    ended = run(make_stage(method, kind, "killed"), kill_after=(places[1] / "optimizer.pt").exists, prepare=slow_disk)
    assert ended.code == -signal.SIGKILL
    assert find_damage(places[0]) is None and not (places[1] / MANIFEST).exists()
    ended = run(make_stage(method, kind, "killed"))
    assert ended.code == 0 and "checkpoint-4: it was never sealed" in ended.stderr
    assert "going on from step 3" in ended.stderr and digest(tmp_path / "killed") == whole


@pytest.mark.parametrize("what", ["stream", "encoder-decoder"])
def test_a_killed_run_goes_on_at_its_row_of_a_stream_and_with_its_own_words(
    what: str, make_stage: Callable, run: Callable, digest: Callable, tmp_path: Path
) -> None:
    def make(out: str) -> Stage:
        if what == "stream":  # 12 steps of 4 rows: a pass over the 32 rows and a half
            stage, given = make_stage("sft", "full", out), {"streaming": True}
        else:
            stage = make_stage("sft", "full", out, model="builtin:rnnsearch")
            given = {"objective": "seq2seq", "data": [DataSource(path="builtin:translation", max_rows=32)]}
        return replace(stage, options=stage.options.model_copy(update=given))

    ended = run(make("whole"))
    assert ended.code == 0, ended.stderr
    assert kill_until_finished(make("killed"), run, random.Random(3), ended.seconds) >= 1
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")


def test_a_killed_run_keeps_the_same_best_weights_and_stops_at_the_same_step(
    make_stage: Callable, run: Callable, digest: Callable, tmp_path: Path
) -> None:
    def make(out: str) -> Stage:
        stage = make_stage("sft", "lora", out)  # with dropout, of which evaluation must draw nothing
        given = {"eval": 0.4, "keep_best": "-loss", "patience": 2, "keep_checkpoints": 1, "eval_share": None,
                 "evaluate_every": 1}  # fmt: skip
        stage = replace(stage, evaluate=EvaluateOptions(max_rows=3, max_new_tokens=4, temperature=1.0))
        rates = {"learning_rate": 0.3, "lr_scheduler_type": "constant", "eval_strategy": "steps", "eval_steps": 1}
        options = stage.options.model_copy(update=given)
        return replace(stage, options=options, trainer={**stage.trainer, **rates, "eval_on_start": True})

    ended = run(make("whole"))
    assert ended.code == 0, ended.stderr
    result = json.loads((tmp_path / "whole/result.json").read_text())
    rows = list(map(json.loads, (tmp_path / "whole/metrics.jsonl").read_text().splitlines()))
    losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    best = min(list(losses)[1:], key=lambda step: losses[step])  # the first is of the start
    assert list(losses) == list(range(best + 3)) and result["step"] == best + 2 < NUM_STEPS
    assert result["metrics"]["kept_step"] == best and result["metrics"]["eval_loss"] == losses[best]
    assert f"the model is that of step {best} of {best + 2}, whose loss was the best" in ended.stderr
    kept = {step_of(path) for path in list_checkpoints(tmp_path / "whole/checkpoints")}
    assert kept == {best, best + 2}
    assert kill_until_finished(make("killed"), run, random.Random(3), ended.seconds) >= 1
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")
    assert json.loads((tmp_path / "killed/result.json").read_text())["metrics"] == result["metrics"]
    again = list(map(json.loads, (tmp_path / "killed/metrics.jsonl").read_text().splitlines()))
    measured = [{row["step"]: (row["eval_perplexity"], row["eval_response_length"]) for row in found
                 if "eval_loss" in row} for found in (rows, again)]  # fmt: skip
    assert measured[0] == measured[1] and len(measured[0]) == best + 3


STEPS = "max_steps: 6, save_steps: 1, batch_size: 4, learning_rate: 1e-3, samples: {num: 0}"
START = f"sft: {{data: {{path: builtin:instructions, max_rows: 32}}, max_length: 160, {STEPS}}}"
CHAINS = {
    "rounds": f"""{START}
label: {{start_from: sft, data: rows.jsonl, reward: {{verify: regex}}, answers: 4, max_new_tokens: 8, batch_size: 4}}
dpo: {{start_from: sft, data: label, max_length: 160, {STEPS}}}
rounds: {{stages: [label, dpo], num: 2, rows: all}}
""",
    "distillation": f"""{START}
student: {{method: sft, objective: distill, data: {{path: builtin:instructions, max_rows: 32}}, max_length: 160,
  {STEPS}, teacher: {{model: sft, on_policy: 0.5, top_k: 8, max_new_tokens: 8, context: Be brief.}}}}
""",
}


@SLOW
@pytest.mark.parametrize("chain", CHAINS)
def test_ten_kills_leave_every_stage_of_a_chain_bit_identical(
    chain: str, run: Callable, digest: Callable, tmp_path: Path
) -> None:
    import alignkit.rewards.label  # noqa: F401, in the parent, as what trains

    asked = [{"prompt": f"Write {number}.", "pattern": "[a-h]"} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: faults\nmodel: builtin:tiny-llama\nlora: {{r: 4, alpha: 8, dropout: 0.1}}\n{CHAINS[chain]}")

    def make(out: str) -> list[Stage]:
        recipe = load_recipe(path, overrides=[f"runs_dir={tmp_path / out}"])
        return [resolve(recipe, name) for name in recipe.order]

    def read(stages: list[Stage]) -> list[str]:
        """Digest of each stage: its rows, or its weights."""
        rows = [Path(stage.run_dir) / "rows.jsonl" for stage in stages]
        return [it.read_text() if it.exists() else digest(it.parent) for it in rows]

    whole = run(make("whole"))
    assert whole.code == 0, whole.stderr
    expected, rng, hits = read(make("whole")), random.Random(chain), 0
    assert len(set(expected)) == len(expected) > 1
    for part in range(8):
        hits += kill_until_finished(make(f"killed{part}"), run, rng, whole.seconds * 0.7, 4)
        assert read(make(f"killed{part}")) == expected
        if hits >= 10:
            break
    print(f"{chain}: {hits} kills, {part + 1} runs, all exact")
    assert hits >= 10


def stop_in_the_middle(stage: object, run: Callable, tmp_path: Path, out: str) -> list[Path]:
    """Terminate the run between its second checkpoint and its last step; return its checkpoints, newest first."""
    delay = 1.0
    for _ in range(30):
        ended = run(stage, kill_after=delay, number=signal.SIGTERM)
        assert ended.code in (0, 143), (ended.code, ended.stderr)
        found = list_checkpoints(tmp_path / out / "checkpoints")
        if ended.code == 0 or (found and step_of(found[0]) >= NUM_STEPS - 1):
            shutil.rmtree(tmp_path / out)  # too late: start again
            delay *= 0.6
        elif len(found) >= 2:
            return found
        else:
            delay *= 1.3
    raise AssertionError("the run could not be stopped in its middle")


@pytest.mark.parametrize(("method", "kind"), ONE)
def test_sigterm_saves_at_the_end_of_the_step_and_the_same_command_goes_on(
    method: str, kind: str, undisturbed: Callable, make_stage: Callable, run: Callable, digest: Callable, tmp_path: Path
) -> None:
    whole, _ = undisturbed(method, kind)
    stage = make_stage(method, kind, "stopped")
    newest = stop_in_the_middle(stage, run, tmp_path, "stopped")[0]
    assert find_damage(newest) is None
    assert not (tmp_path / "stopped" / "model").exists()
    assert run(stage).code == 0
    assert digest(tmp_path / "stopped") == whole


WEIGHTS = {"full": ["model.safetensors", "config.json"]}
STATE = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", MANIFEST]
FEW = [("adapter_model.safetensors", "flip"), ("optimizer.pt", "delete"), ("rng_state.pth", "cut")]


@pytest.mark.parametrize(("method", "kind", "cases"), [
    ("dpo", "qlora", FEW), *(pytest.param(*case, None, marks=SLOW) for case in QUICK),
])  # fmt: skip
def test_damaged_files_fall_back_to_the_older_checkpoint_and_end_exact(
    method: str, kind: str, cases: list[tuple[str, str]] | None, undisturbed: Callable, make_stage: Callable,
    run: Callable, digest: Callable, tmp_path: Path,
) -> None:  # fmt: skip
    files = WEIGHTS.get(kind, ["adapter_model.safetensors", "adapter_config.json"]) + STATE
    cases = cases or [(name, how) for name in files for how in ("delete", "empty", "cut", "zero tail", "flip")]
    whole, _ = undisturbed(method, kind)
    stop_in_the_middle(make_stage(method, kind, "stopped"), run, tmp_path, "stopped")
    for number, (name, how) in enumerate(cases):
        out = tmp_path / f"damaged{number}"
        shutil.copytree(tmp_path / "stopped", out)
        newest = list_checkpoints(out / "checkpoints")[0]
        damage(newest / name, how)
        ended = run(make_stage(method, kind, out.name))
        assert ended.code == 0, (name, how, ended.stderr)
        warned = [line for line in ended.stderr.splitlines() if line.startswith("warning:") and newest.name in line]
        # A tail that is all zeros already is not damage.
        assert len(warned) == 1 or (how == "zero tail" and not warned), (name, how, ended.stderr)
        assert digest(out) == whole, (name, how)
    print(f"{method} {kind}: {len(cases)} damages, all exact")


@SLOW
@pytest.mark.parametrize(("method", "kind"), [("sft", "full"), ("rm", "lora")])
def test_every_damage_to_every_file_of_a_run_is_mended_or_refused(
    method: str, kind: str, make_stage: Callable, run: Callable, digest: Callable, tmp_path: Path
) -> None:
    def make(out: str) -> object:
        return make_stage(method, kind, out, steps=5)

    assert run(make("whole")).code == 0
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", part)
    shutil.rmtree(part / "model")
    for name in ("result.json", "report.html", "probe.json"):
        (part / name).unlink()
    codes = [code for begun in (tmp_path / "whole", part) for code in damage_each(begun, run, make, digest)]
    print(f"{method} {kind}: {len(codes)} damages, {codes.count(0)} mended, the others refused")


def test_a_full_disk_exits_4_keeps_what_was_sealed_and_goes_on_when_there_is_room(
    undisturbed: Callable, make_stage: Callable, run: Callable, digest: Callable, full_disk: Callable, tmp_path: Path
) -> None:
    whole, _ = undisturbed("sft", "full")
    stage = make_stage("sft", "full", "starved")
    stop_in_the_middle(stage, run, tmp_path, "starved")
    directory = tmp_path / "starved" / "checkpoints"
    before = {path.name: read_json(path / MANIFEST) for path in list_checkpoints(directory)}
    largest = max(file["bytes"] for manifest in before.values() for file in manifest["files"].values())
    ended = run(stage, prepare=full_disk(largest // 2))
    assert ended.code == 4, ended.stderr
    assert ended.stderr.count("error:") == 1 and "make room" in ended.stderr
    assert {path.name for path in list_checkpoints(directory)} == set(before)
    assert all(find_damage(path) is None for path in list_checkpoints(directory))
    assert run(stage).code == 0
    assert digest(tmp_path / "starved") == whole
