"""The stages of a recipe in one process: each trains as it would alone, nothing of it stays, the first failure ends it.

A run is a fork of this process, which has imported the libraries once; every fork starts with the same clean state.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.errors import RecipeError
from alignkit.launch.placement import Command
from alignkit.launch.run import check_order, let_go, plan_run, run_stages
from alignkit.recipe import load_recipe, resolve

COMMON = "max_steps: 2, batch_size: 4, max_length: 160, samples: {num: 0}, learning_rate: 1e-3"
RECIPE = f"""\
model: {{path: builtin:tiny-llama, dtype: DTYPE}}
LORA
sft: {{data: {{path: builtin:instructions, max_rows: 16}}, {COMMON}}}
rm: {{start_from: sft, data: {{path: builtin:preferences, max_rows: 16}}, {COMMON}}}
dpo: {{start_from: sft, data: {{path: builtin:preferences, max_rows: 16}}, {COMMON}}}
"""


def write(path: Path, *, dtype: str = "float32", lora: str = "") -> Path:
    path.write_text(RECIPE.replace("DTYPE", dtype).replace("LORA", lora))
    return path


def stages_of(recipe: Path, *names: str) -> list[Command]:
    return [Command(resolve(load_recipe(recipe), name)) for name in names]


def fork(work: Callable[[], object], directory: Path) -> object:
    """Run a function in a fork of this process, in a directory of its own, and return its (JSON) value."""
    directory.mkdir(exist_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            os.chdir(directory)
            (directory / "value.json").write_text(json.dumps(work()))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return json.loads((directory / "value.json").read_text())


def digest(model: str) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path(model).glob("*.safetensors")))).hexdigest()


def count_models() -> int:
    from transformers import PreTrainedModel, Trainer

    return sum(issubclass(type(thing), (PreTrainedModel, Trainer)) for thing in gc.get_objects())


@pytest.fixture(scope="module")
def warm() -> None:
    """Import in this process what every fork needs."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import alignkit.train.dpo
    import alignkit.train.rm
    import alignkit.train.sft  # noqa: F401


def test_stages_in_one_process_end_with_the_weights_they_end_with_alone(warm: None, tmp_path: Path) -> None:
    lora = "lora: {r: 4, dropout: 0.1}"
    full = write(tmp_path / "full.yaml")
    half = write(tmp_path / "half.yaml", dtype="bfloat16", lora=lora)
    line = [(full, "sft"), (full, "rm"), (half, "sft"), (half, "dpo"), (full, "dpo")]

    def together() -> dict[str, object]:
        gc.unfreeze()
        gc.collect()  # what other tests have left to this process
        alive: list[int] = []
        jobs = [job for recipe, name in line for job in stages_of(recipe, name)]
        results = list(run_stages(plan_run(jobs), before=lambda entry: alive.append(count_models())))
        return {"alive": alive, "weights": [digest(result.model_dir) for result in results]}

    def alone(recipe: Path, name: str) -> str:
        return digest(next(run_stages(plan_run(stages_of(recipe, name)))).model_dir)

    one = fork(together, tmp_path / "together")
    many = [fork(lambda recipe=recipe, name=name: alone(recipe, name), tmp_path / "alone") for recipe, name in line]
    assert isinstance(one, dict)
    assert one["weights"] == many
    assert len(set(many)) == len(line)
    assert one["alive"] == [0] * len(line)  # nothing of a stage is left when the next one begins


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can forget a peak")
def test_the_peak_of_a_stage_is_not_that_of_the_one_before(tmp_path: Path) -> None:
    def peaks() -> list[int]:
        found = []
        for num_bytes in (600 << 20, 50 << 20):
            held = bytearray(num_bytes)
            found.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
            del held
            let_go()
        return found

    first, second = fork(peaks, tmp_path / "peaks")
    assert first - second > 500  # MiB


def test_a_finished_stage_is_left_alone_and_the_first_failure_ends_the_run(
    warm: None, run_alignkit: Callable, tmp_path: Path
) -> None:
    write(tmp_path / "r.yaml")
    fork(lambda: [result.step for result in run_stages(plan_run(stages_of(Path("r.yaml"), "sft")))], tmp_path)
    done = run_alignkit(
        "run", "-r", "r.yaml", "--set", "stages=[sft, dpo, rm]", "--set", "dpo.learning_rate=1e30",
        "--set", "dpo.max_grad_norm=1e30", "--set", "dpo.max_steps=6",
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "sft: already finished, nothing to do" in done.stderr
    assert done.stderr.count("error:") == 1
    ended = [line.split()[:2] for line in done.stdout.splitlines()[2:5]]
    assert ended == [["sft", "finished"], ["dpo", "not"], ["rm", "not"]]
    assert not (tmp_path / "runs/r/rm").exists()


def test_a_stage_before_the_one_it_starts_from_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml")
    assert load_recipe(recipe).order == ("sft", "rm", "dpo")  # where the recipe lists none
    with recipe.open("a") as file:
        file.write("stages: [dpo, sft]\n")
    loaded = load_recipe(recipe)
    assert loaded.order == ("dpo", "sft")
    with pytest.raises(RecipeError, match=r"r\.yaml:5: dpo starts from sft, .* before it; put it first$"):
        check_order([resolve(loaded, name) for name in loaded.order])
    with pytest.raises(RecipeError, match=r"r\.yaml:5: dpo starts from sft, .*; run --stage sft first, or add it"):
        check_order([resolve(loaded, "dpo")])


def test_the_last_stage_is_checked_before_the_first_is_trained(run_alignkit: Callable, tmp_path: Path) -> None:
    write(tmp_path / "r.yaml")
    done = run_alignkit("run", "-r", "r.yaml", "--set", "dpo.data.path=./absent.jsonl")
    assert done.returncode == 2
    assert done.stderr == "error: r.yaml:5: dpo.data: absent.jsonl: no such file\n"
    assert not (tmp_path / "runs").exists()
