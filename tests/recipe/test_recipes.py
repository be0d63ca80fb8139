"""Every recipe in the repository loads, resolves, and explains each of its keys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from alignkit.recipe import Recipe, load_recipe, resolve
from alignkit.recipe.methods import PpoOptions

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
RECIPES = sorted([*FOLDER.glob("*.yaml"), *FOLDER.glob("papers/*/*.yaml")])
FRAGMENTS = sorted((FOLDER / "launch").glob("*.yaml"))


def test_the_recipes_are_there() -> None:
    names = {path.stem for path in RECIPES}
    assert names >= {"tiny-cpu", "llama-qlora", "qwen-lora", "full-finetune", "hh-real", "smoke", "ppo-llama-qlora"}
    assert {path.stem for path in FRAGMENTS} == {"one-gpu", "node-8gpu-ddp", "node-8gpu-fsdp", "cluster-4-nodes"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_stage_resolves(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem or path.parent.parent.name == "papers"
    for name in recipe.stage_names:
        stage = resolve(recipe, name)
        assert stage.run_dir == f"runs/{recipe.name}/{name}"
        assert stage.options.data


@pytest.mark.parametrize("path", [*RECIPES, *FRAGMENTS], ids=lambda path: path.stem)
def test_every_key_has_a_comment(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    bare = [line for line in lines if re.match(r"\s*[\w-]+:\s*\S", line.split("#")[0]) and "  # " not in line]
    assert [line for line in bare if " # " not in line] == []


def options_of_ppo(name: str) -> PpoOptions:
    stage = resolve(load_recipe(next(path for path in RECIPES if path.stem == name)), method="ppo")
    assert isinstance(stage.options, PpoOptions)
    return stage.options


def test_the_demos_need_no_code_and_start_the_critic_from_the_reward_model() -> None:
    for name in ("tiny-cpu", "smoke", "ppo-llama-qlora"):
        options = options_of_ppo(name)
        assert [(source.model, source.function) for source in options.reward] == [(f"runs/{name}/rm/model", None)]
        assert all(source.function is None for source in options.gold or ())
        assert options.critic_start == "reward"


def test_the_large_ppo_recipe_controls_its_kl() -> None:
    options = options_of_ppo("ppo-llama-qlora")
    assert (options.kl_target, options.kl_horizon, options.max_kl) == (6.0, 10_000, 40)
    assert options.batch_size * options.minibatches == 512
    recipe = load_recipe(next(path for path in RECIPES if path.stem == "ppo-llama-qlora"))
    assert recipe.lora is not None and recipe.model.quantization == "nf4"  # one 4-bit base holds the four roles


def test_hh_real_takes_its_path_from_the_command_line(tmp_path: Path) -> None:
    recipe = load_recipe(next(path for path in RECIPES if path.stem == "hh-real"), overrides=[f"data.path={tmp_path}"])
    assert {source.path for section in recipe.stages.values() for source in section.options.data} == {str(tmp_path)}


def on_top(tmp_path: Path, recipe: str, *fragments: str) -> Recipe:
    """Load a recipe with launch fragments on top, as a person would put them together."""
    files = [str(FOLDER / f"{recipe}.yaml"), *(str(FOLDER / "launch" / f"{name}.yaml") for name in fragments)]
    (tmp_path / "mine.yaml").write_text(f"extends: [{', '.join(files)}]\n")
    return load_recipe(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("recipe", "fragments", "expected"),
    [
        ("full-finetune", (), (1, 8, "fsdp")),
        ("full-finetune", ("cluster-4-nodes",), (4, 8, "fsdp")),
        ("llama-qlora", (), (1, 1, "ddp")),
        ("llama-qlora", ("one-gpu",), (1, 1, "ddp")),
        ("llama-qlora", ("node-8gpu-ddp",), (1, 8, "ddp")),
        ("llama-qlora", ("cluster-4-nodes",), (4, 8, "ddp")),
        ("qwen-lora", ("node-8gpu-ddp",), (1, 8, "ddp")),
    ],
)
def test_launch_fragments_fit_the_recipes(
    recipe: str, fragments: tuple[str, ...], expected: tuple[int, int, str], tmp_path: Path
) -> None:
    loaded = on_top(tmp_path, recipe, *fragments)
    launch = loaded.launch
    assert (launch.nodes, launch.processes, launch.strategy) == expected
    assert loaded.name == recipe  # the same runs, wherever they are trained
    for section in loaded.stages.values():
        assert section.options.batch_size % (launch.nodes * int(launch.processes)) == 0, section.name


def test_quantised_weights_do_not_take_the_sharding_fragment(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"launch\.strategy is fsdp, which cannot shard nf4 weights"):
        on_top(tmp_path, "llama-qlora", "node-8gpu-fsdp")


def test_runs_are_found_beside_the_recipe_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    for folder in (home, other):
        folder.mkdir()
    stages = "model: {path: builtin:tiny-gpt2}\nsft: {data: builtin:instructions}\n"
    (home / "two.yaml").write_text(f"{stages}dpo: {{start_from: sft, data: builtin:preferences}}\n")
    monkeypatch.chdir(other)
    stage = resolve(load_recipe("../home/two.yaml"), "dpo")
    assert (stage.run_dir, stage.start_dir) == ("runs/two/dpo", "runs/two/sft/model")  # there is none yet
    (home / "runs/two").mkdir(parents=True)
    beside = resolve(load_recipe("../home/two.yaml"), "dpo")
    assert (beside.run_dir, beside.start_dir) == (f"{home}/runs/two/dpo", f"{home}/runs/two/sft/model")
    assert beside.fingerprint_values() == stage.fingerprint_values()
    (other / "runs/two").mkdir(parents=True)
    assert resolve(load_recipe("../home/two.yaml"), "dpo").run_dir == "runs/two/dpo"
    (home / "two.yaml").write_text(f"runs_dir: ../kept\n{(home / 'two.yaml').read_text()}")
    assert resolve(load_recipe("../home/two.yaml"), "dpo").run_dir == f"{tmp_path}/kept/two/dpo"
