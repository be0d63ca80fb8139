"""`sweep:` stands for one ordinary stage per combination of the values that matter to it; mistakes are said once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.errors import RecipeError
from alignkit.evaluate.options import request_stages
from alignkit.recipe import Recipe, Stage, load_recipe, pick_steps, resolve
from alignkit.recipe.methods import CritiqueOptions, LabelOptions, PpoOptions, TrainOptions

Load = Callable[..., Recipe]
Complain = Callable[..., list[str]]

# Line 10 of what is loaded is the first line after this.
PIPELINE = """\
model: {path: builtin:tiny-gpt2}
seed: 7
sft: {data: builtin:instructions}
rm: {start_from: sft, data: builtin:preferences}
dpo:
  start_from: sft
  data: builtin:preferences
ppo: {start_from: sft, reward: rm, data: builtin:prompts}
stages: [sft, rm, dpo, ppo]
"""
RLAIF = """\
model: {path: builtin:tiny-gpt2}
sft: {data: builtin:instructions}
other: {method: sft, data: builtin:instructions}
rlaif:
  start_from: sft
  constitution: builtin:harmlessness
  data: builtin:prompts
  judge: sft
"""


def swept(load: Load, text: str, *overrides: str) -> Recipe:
    return load(f"{PIPELINE}sweep: {text}\n", *overrides)


def stages(recipe: Recipe) -> dict[str, Stage]:
    return {name: resolve(recipe, name) for name in recipe.order}


# Which runs there are


def test_one_run_per_value(load: Load) -> None:
    recipe = swept(load, "{dpo.beta: [0.05, 0.1, 0.5]}")
    assert recipe.order == ("sft", "rm", "dpo-beta-0.05", "dpo-beta-0.1", "dpo-beta-0.5", "ppo")
    assert recipe.sweeps == {"dpo": ("dpo-beta-0.05", "dpo-beta-0.1", "dpo-beta-0.5")}
    found = stages(recipe)
    assert [found[name].trainer["beta"] for name in recipe.sweeps["dpo"]] == [0.05, 0.1, 0.5]
    assert [dict(stage.point) for stage in found.values()] == [
        {}, {}, {"dpo.beta": 0.05}, {"dpo.beta": 0.1}, {"dpo.beta": 0.5}, {},
    ]  # fmt: skip
    assert found["dpo-beta-0.1"].run_dir == "runs/a/dpo-beta-0.1"
    assert found["dpo-beta-0.1"].to_dict()["point"] == {"dpo.beta": 0.1}
    assert found["dpo-beta-0.1"].recipe_name == "a" and found["dpo-beta-0.1"].method == "dpo"


def test_keys_that_meet_in_no_stage_are_not_multiplied(load: Load) -> None:
    recipe = swept(load, "{dpo.beta: [0.1, 0.2, 0.3], ppo.kl_coef: [0.01, 0.02, 0.03]}")
    assert recipe.order == (
        "sft", "rm", "dpo-beta-0.1", "dpo-beta-0.2", "dpo-beta-0.3",
        "ppo-kl_coef-0.01", "ppo-kl_coef-0.02", "ppo-kl_coef-0.03",
    )  # fmt: skip


def test_what_depends_on_a_swept_stage_is_fanned_out(load: Load) -> None:
    recipe = swept(load, "{sft.learning_rate: [1e-4, 2e-4], dpo.beta: [0.1, 0.5]}")
    found = stages(recipe)
    assert list(found) == [
        "sft-learning_rate-1e-4", "sft-learning_rate-2e-4", "rm-learning_rate-1e-4", "rm-learning_rate-2e-4",
        "dpo-learning_rate-1e-4-beta-0.1", "dpo-learning_rate-1e-4-beta-0.5",
        "dpo-learning_rate-2e-4-beta-0.1", "dpo-learning_rate-2e-4-beta-0.5",
        "ppo-learning_rate-1e-4", "ppo-learning_rate-2e-4",
    ]  # fmt: skip
    for name, stage in found.items():
        if stage.method != "sft":
            assert stage.start_stage == f"sft-learning_rate-{'1e-4' if '1e-4' in name else '2e-4'}"
            assert stage.start_dir == f"runs/a/{stage.start_stage}/model"
    ppo = found["ppo-learning_rate-2e-4"]  # both that it needs are of the same learning rate: 2 runs, not 4
    assert ppo.expect(PpoOptions).reward[0].model == "runs/a/rm-learning_rate-2e-4/model"
    assert dict(ppo.reward_stages) == {"runs/a/rm-learning_rate-2e-4/model": "rm-learning_rate-2e-4"}
    assert dict(ppo.point) == {"sft.learning_rate": 2e-4}


def test_keys_of_the_top_level_reach_the_stages_that_read_them(load: Load) -> None:
    recipe = swept(load, "{seed: [0, 1], lora.r: [4, 8], model.dtype: [float32]}")
    found = stages(recipe)
    assert list(found)[:4] == [f"sft-seed-{s}-r-{r}-dtype-float32" for s in (0, 1) for r in (4, 8)]
    assert len(found) == 16
    for name, stage in found.items():
        assert f"-seed-{stage.seed}-r-{stage.lora.r if stage.lora else None}-dtype-{stage.model.dtype}" in name
        assert stage.start_stage is None or stage.start_stage == name.replace(name[: name.index("-")], "sft")


def test_rows_of_the_top_level_are_swept_for_stages_without_their_own(load: Load) -> None:
    Path("a.jsonl").write_text('{"text": "x"}\n')
    Path("b.jsonl").write_text('{"text": "x"}\n')
    recipe = load(
        "model: {path: gpt2}\nsft: {eval: 0.5}\nrm: {data: x/y}\nsweep: {data: [a.jsonl, b.jsonl], eval: [0.1, 0.2]}\n"
    )
    assert recipe.order == (
        "sft-data-a.jsonl", "sft-data-b.jsonl", "rm-eval-0.1", "rm-eval-0.2",
    )  # fmt: skip
    found = resolve(recipe, "sft-data-b.jsonl")
    assert found.options.data[0].path == str(Path("b.jsonl").resolve())
    assert dict(found.point) == {"data": "b.jsonl"}  # as it was written
    assert [resolve(recipe, f"rm-eval-{n}").expect(TrainOptions).eval for n in (0.1, 0.2)] == [0.1, 0.2]


def test_a_swept_name_of_a_stage_decides_what_else_matters(load: Load) -> None:
    recipe = swept(load, "{sft.learning_rate: [1e-4, 2e-4], dpo.start_from: [sft, builtin:tiny-gpt2]}")
    dpo = [stage for stage in stages(recipe).values() if stage.method == "dpo"]
    assert [stage.name for stage in dpo] == [
        "dpo-learning_rate-1e-4-start_from-sft", "dpo-learning_rate-2e-4-start_from-sft",
        "dpo-start_from-tiny-gpt2",
    ]  # fmt: skip
    assert [stage.start_stage for stage in dpo] == ["sft-learning_rate-1e-4", "sft-learning_rate-2e-4", None]


def test_one_variant_can_be_named_to_go_on_from(load: Load) -> None:
    text = PIPELINE.replace("ppo: {start_from: sft", "ppo: {start_from: dpo-beta-0.5")
    recipe = load(f"{text.replace('[sft, rm, dpo, ppo]', '[dpo-beta-0.5, ppo]')}sweep: {{dpo.beta: [0.1, 0.5]}}\n")
    assert recipe.order == ("dpo-beta-0.5", "ppo")
    assert resolve(recipe, "ppo").start_stage == "dpo-beta-0.5"


def test_nested_keys_and_the_command_line(load: Load) -> None:
    text = "{dpo: {beta: [0.1, 0.2]}}"
    assert swept(load, text).sweeps == swept(load, "{dpo.beta: [0.1, 0.2]}").sweeps
    assert swept(load, text, "sweep.dpo.beta=[0.3]").order[2:3] == ("dpo-beta-0.3",)
    assert swept(load, "{dpo.beta: [0.1, 0.2]}", "sweep.dpo.beta=[0.3]").order[2:3] == ("dpo-beta-0.3",)
    for off in ("sweep=null", "sweep.dpo=null", "sweep.dpo.beta=null"):
        for written in (text, "{dpo.beta: [0.1, 0.2]}"):
            recipe = swept(load, written, off)
            assert recipe.sweeps == {} and recipe.order == ("sft", "rm", "dpo", "ppo")
    assert load(PIPELINE, "sweep.seed=[1, 2]").sweeps["sft"] == ("sft-seed-1", "sft-seed-2")


def test_a_fragment_may_sweep(load: Load) -> None:
    Path("base.yaml").write_text(PIPELINE + "sweep: {dpo.beta: [0.1, 0.2]}\n")
    recipe = load("extends: base.yaml\nsweep: {seed: [1]}\n")
    assert recipe.sweeps["dpo"] == ("dpo-beta-0.1-seed-1", "dpo-beta-0.2-seed-1")


def test_without_a_sweep_nothing_is_different(load: Load) -> None:
    recipe = load(PIPELINE + "sweep: {}\n")
    assert recipe.sweeps == {} and recipe.order == ("sft", "rm", "dpo", "ppo")
    assert not any(stage.point for stage in stages(recipe).values())


# What they are called


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ("[1e-4, 2.50]", ["1e-4", "2.50"]),
        ("[+1, -1]", ["1", "-1"]),
        ("[meta/Llama-3.1-8B, ./my model/]", ["Llama-3.1-8B", "my-model"]),
        ("[a/model, b/model]", ["1", "2"]),
        ("[A, a]", ["1", "2"]),
        ("['...', x]", ["1", "x"]),
        ("[true, null]", ["true", "none"]),
        ("[{x: 1}, [2]]", ["1", "2"]),
        (f"[{'x' * 60}, y]", ["x" * 40, "y"]),
    ],
)
def test_values_as_file_names(values: str, names: list[str]) -> None:
    from alignkit.recipe.sweep import _label
    from alignkit.recipe.yaml import Origin, parse_yaml

    node = parse_yaml(values, Origin("a.yaml", Path()))
    assert node is not None and list(_label(node.value)) == names


def test_keys_with_the_same_end_are_told_apart_where_they_meet(load: Load) -> None:
    recipe = swept(load, "{sft.learning_rate: [1e-4], dpo.learning_rate: [1e-6]}")
    assert recipe.order[0] == "sft-learning_rate-1e-4"
    assert recipe.order[2] == "dpo-sft-learning_rate-1e-4-dpo-learning_rate-1e-6"


# Steps of rlaif


def test_the_steps_of_an_rlaif_section(load: Load) -> None:
    recipe = load(RLAIF + "sweep: {rlaif.critique.rounds: [1, 4], rlaif-dpo.beta: [0.1, 0.5]}\nstages: [sft, rlaif]\n")
    steps = [f"rlaif-{step}-rounds-{rounds}" for step in ("critique", "sft", "label") for rounds in (1, 4)]
    dpo = [f"rlaif-dpo-rounds-{rounds}-beta-{beta}" for rounds in (1, 4) for beta in (0.1, 0.5)]
    assert recipe.groups == {"rlaif": (*steps, *dpo)}
    assert recipe.order == ("sft", *steps, *dpo)
    found = stages(recipe)
    assert [found[f"rlaif-critique-rounds-{n}"].expect(CritiqueOptions).rounds for n in (1, 4)] == [1, 4]
    last = found["rlaif-dpo-rounds-4-beta-0.1"]
    assert last.start_stage == "rlaif-sft-rounds-4"
    assert dict(last.source_stages) == {"runs/a/rlaif-label-rounds-4/rows.jsonl": "rlaif-label-rounds-4"}
    assert dict(last.point) == {"rlaif.critique.rounds": 4, "rlaif.dpo.beta": 0.1}
    assert pick_steps(recipe) == [*steps, *dpo]
    assert pick_steps(recipe, "label-rounds-4") == ["rlaif-label-rounds-4"]
    with pytest.raises(RecipeError, match="--stage label is swept.*rlaif-label-rounds-1, rlaif-label-rounds-4"):
        pick_steps(recipe, "label")


def test_a_key_of_the_section_reaches_the_steps_that_have_it_from_there(load: Load) -> None:
    recipe = load(RLAIF + "sweep: {rlaif.judge: [sft, other]}\n")
    assert recipe.groups["rlaif"] == (
        "rlaif-critique", "rlaif-sft", "rlaif-label-judge-sft", "rlaif-label-judge-other",
        "rlaif-dpo-judge-sft", "rlaif-dpo-judge-other",
    )  # fmt: skip
    judges = [resolve(recipe, f"rlaif-label-judge-{name}").expect(LabelOptions).judge for name in ("sft", "other")]
    assert [judge.model for judge in judges] == ["runs/a/sft/model", "runs/a/other/model"]


def test_a_key_that_null_takes_away_still_tells_the_steps_apart(load: Load) -> None:
    text = RLAIF + "  generator: {model: other}\n"
    recipe = load(text + "sweep: {rlaif.generator: [null, {model: sft}]}\n")
    assert recipe.groups["rlaif"][:2] == ("rlaif-critique-generator-none", "rlaif-critique-generator-2")
    found = [resolve(recipe, name).expect(CritiqueOptions).generator for name in recipe.groups["rlaif"][:2]]
    assert [model.model if model else None for model in found] == [None, "runs/a/sft/model"]


def test_labels_are_not_bought_again_for_every_adapter(load: Load) -> None:
    text = "model: {path: gpt2}\nlora: {}\nlabel: {constitution: builtin:harmlessness, judge: gpt2/x, data: x/y}\n"
    recipe = load(text + "dpo: {data: label}\nsweep: {lora.r: [4, 8]}\n")
    assert recipe.order == ("label", "dpo-r-4", "dpo-r-8")


def test_a_swept_stage_of_feedback_is_picked_by_the_names_of_its_runs(load: Load) -> None:
    text = "model: {path: gpt2}\nlabel: {constitution: builtin:harmlessness, judge: gpt2/x, data: x/y}\n"
    assert pick_steps(load(text + "sweep: {label.hard: [true]}\n")) == ["label-hard-true"]
    with pytest.raises(RecipeError, match="no rlaif section: label-cot-true, label-cot-false; name one with --stage"):
        pick_steps(load(text + "sweep: {label.cot: [true, false]}\n"))


# Where values come from


def test_values_keep_their_lines(load: Load) -> None:
    recipe = load(PIPELINE + "sweep:\n  dpo.beta:\n    - 0.1\n    - 0.5\n  seed: [1,\n    2]\n")
    found = resolve(recipe, "dpo-beta-0.5-seed-2")
    keys = ("seed", "dpo-beta-0.5-seed-2.beta", "dpo-beta-0.5-seed-2.start_from", "model.path", "model.dtype")
    assert [found.origins[key] for key in keys] == [
        "a.yaml:15", "a.yaml:13", "a.yaml:6", "a.yaml:1", "default",
    ]  # fmt: skip
    assert found.where("dpo-beta-0.5-seed-2.beta") == "a.yaml:13"
    assert not any(key.startswith("sweep") for key in found.origins)
    assert resolve(recipe, "dpo-beta-0.1-seed-1").origins["dpo-beta-0.1-seed-1.beta"] == "a.yaml:12"


def test_the_value_and_not_the_sweep_is_in_the_fingerprint(load: Load) -> None:
    variant = resolve(swept(load, "{seed: [7]}"), "sft-seed-7").fingerprint_values()
    plain = resolve(load(PIPELINE), "sft").fingerprint_values()
    assert {key.replace("sft-seed-7.", "sft."): value for key, value in variant.items()} == plain


# What is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.1", "sweep is 0.1; it must be a mapping, such as {dpo.beta: [0.05, 0.1, 0.5]}"),
        ("{dpo.beta: 0.1}", "sweep.dpo.beta is 0.1; it must be a list of values, such as [0.1]"),
        ("{dpo.beta: }", "sweep.dpo.beta is empty; it must be a list of values, such as [0.1, 0.5]"),
        ("{dpo.beta: []}", "sweep.dpo.beta is empty; give at least one value, or take it out"),
        ("{dpo..beta: [1]}", "sweep.dpo..beta is not a dotted key, such as dpo.beta"),
        ("{dpo.bta: [0.1, 0.2]}", "sweep: dpo.bta is not a key of dpo; did you mean beta?"),
        ("{dp.beta: [0.1]}", "sweep.dp.beta leads nowhere: dp is neither a stage nor one of seed, model, lora, data, "
                             "eval; did you mean dpo?"),
        ("{model.pth: [x]}", "sweep.model.pth leads nowhere: model.pth is not a key of model; did you mean path?"),
        ("{dpo: [1]}", "sweep.dpo is a whole section; name a key of it, such as sweep.dpo.KEY"),
        ("{dpo.method: [dpo, sft]}", "sweep.dpo.method decides which stages there are; a sweep changes values only: "
                                     "write a section for each"),
        ("{name: [a, b]}", "sweep.name cannot be swept: it is the directory of all runs"),
        ("{launch.processes: [1, 2]}", "sweep.launch.processes cannot be swept: it says where stages run, not what is "
                                       "trained"),
        ("{evaluate.samples: [1, 2]}", "sweep.evaluate.samples cannot be swept: it says what is measured, not what is "
                                       "trained; give it to `alignkit eval` as options"),
        ("{dpo.logging_steps: [1, 2]}", "sweep.dpo.logging_steps changes nothing in what is trained, so every run "
                                        "would be the same"),
        ("{dpo.beta: [0.1, 1e-1]}", "sweep.dpo.beta has 0.1 twice; keep one"),
        ("{dpo.beta: [0.1], dpo: {beta: [0.2]}}", "sweep.dpo.beta is here twice, first at a.yaml:10; keep one"),
        ("{dpo.data: [a/b], dpo.data.path: [c/d]}", "sweep.dpo.data.path and sweep.dpo.data set the same value; keep "
                                                    "one"),
        ("{dpo.data.split: [train]}", "sweep.dpo.data.split: what stands before .split is a single value, not a "
                                      "section"),
        ("{data: [x/y]}", "sweep.data has no effect: every stage has data of its own, or needs none"),
        ("{dpo.token: [x]}", "sweep.dpo.token is the name of a secret; a recipe holds none: take it out and set "
                             "HF_TOKEN (or the service's own variable) in the environment"),
        ("{seed: [0, x]}", "seed is x; it must be a whole number of at least 0 and less than 4294967296"),
        ("{dpo.start_from: [sft, st]}", "dpo.start_from is st, which is neither a stage nor a path that exists; did "
                                        "you mean sft?"),
        ("{dpo.start_from: [sft, dpo]}", "dpo.start_from goes round in a circle: dpo -> dpo"),
    ],
)  # fmt: skip
def test_refused(complain: Complain, text: str, message: str) -> None:
    assert complain(f"{PIPELINE}sweep: {text}\n") == [f"a.yaml:10: {message}"]


def test_a_swept_circle_is_told_at_each_of_its_stages(complain: Complain) -> None:
    assert complain(f"{PIPELINE}sweep: {{sft.start_from: [dpo]}}\n") == [
        "a.yaml:6: dpo.start_from goes round in a circle: dpo -> sft -> dpo",
        "a.yaml:10: sft.start_from goes round in a circle: sft -> dpo -> sft",
    ]


def test_a_secret_is_not_shown(complain: Complain) -> None:
    lines = complain(PIPELINE + "sweep: {dpo.beta: [hf_abcdefghijklmnopqrstuv]}\n")
    assert lines[0].startswith("a.yaml:10: sweep.dpo.beta.0 holds what looks like a secret;")
    assert "hf_" not in "".join(lines)


def test_a_wrong_value_has_its_own_line(complain: Complain) -> None:
    text = PIPELINE + "sweep:\n  dpo.batch_size:\n  - 16\n  - many\n  - 0\n"
    assert complain(text) == [
        "a.yaml:13: dpo.batch_size is many; it must be a whole number of at least 1",
        "a.yaml:14: dpo.batch_size is 0; it must be at least 1",
    ]


def test_all_mistakes_are_said_at_once(complain: Complain) -> None:
    assert complain(PIPELINE + "sweep:\n  dp.beta: [1]\n  launch.nodes: [1]\n  dpo.beta: [0.1, -1]\n") == [
        "a.yaml:11: sweep.dp.beta leads nowhere: dp is neither a stage nor one of seed, model, lora, data, eval; "
        "did you mean dpo?",
        "a.yaml:12: sweep.launch.nodes cannot be swept: it says where stages run, not what is trained",
        "a.yaml:13: dpo.beta is -1; it must be greater than 0 (typical: 0.05 to 0.5)",
    ]


def test_a_mistake_beside_the_sweep_is_said_once(complain: Complain) -> None:
    text = PIPELINE.replace("  start_from: sft\n", "  start_from: rm\n  bet: 1\n")
    assert complain(text + "sweep: {seed: [0, 1, 2], dpo.beta: [0.1, 0.2]}\n") == [
        "a.yaml:6: dpo.start_from is rm, a reward model; a dpo stage starts from a language model",
        "a.yaml:7: dpo.bet is not a key of dpo; did you mean beta?",
    ]


def test_rules_between_options_see_every_combination(complain: Complain) -> None:
    assert complain(PIPELINE + "sweep: {dpo.batch_size: [4, 6], dpo.micro_batch_size: [2, 4]}\n") == [
        "a.yaml:10: dpo.micro_batch_size is 4, which does not divide batch_size 6"
    ]
    assert complain(PIPELINE + "sweep: {model.quantization: [none, nf4], lora: [null, {}]}\n") == [
        "a.yaml:10: model.quantization is nf4, and quantised weights cannot be trained; add a lora: section"
    ]


@pytest.mark.parametrize("key", ["rlaif.train: [dpo, ppo]", "rlaif.critique: [true, false]", "rlaif.dpo.method: [dpo]"])
def test_which_steps_there_are_cannot_be_swept(complain: Complain, key: str) -> None:
    name = key.partition(":")[0]
    assert complain(f"{RLAIF}sweep: {{{key}}}\n") == [
        f"a.yaml:9: sweep.{name} decides which stages there are; a sweep changes values only: write a section for each"
    ]


def test_a_step_that_is_not_there(complain: Complain) -> None:
    (found,) = complain(RLAIF + "sweep: {rlaif.ppo.kl_coef: [0.1]}\n")
    assert found == "a.yaml:9: sweep.rlaif.ppo.kl_coef has no effect: no stage reads it"


def test_one_value_of_a_swept_key_on_the_command_line_has_no_effect(complain: Complain) -> None:
    assert complain(PIPELINE + "sweep: {dpo.beta: [0.1]}\n", "dpo.beta=0.3") == [
        "--set: dpo.beta is swept, so one value of it has no effect; add `--set sweep.dpo.beta=null`"
    ]


def test_too_many_runs(complain: Complain) -> None:
    seeds = ", ".join(str(seed) for seed in range(65))
    assert complain(f"{PIPELINE}sweep: {{seed: [{seeds}]}}\n") == [
        "a.yaml:10: sweep makes more than 256 runs; give fewer keys or values"
    ]
    (found,) = complain(f"{PIPELINE}sweep: {{seed: [{seeds}], lora.r: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]}}\n")
    assert found == "a.yaml:10: sweep makes more than 256 runs; give fewer keys or values"


def test_a_name_that_another_stage_has(complain: Complain) -> None:
    text = PIPELINE + "sweep: {seed: [1]}\nsft-seed-1: {method: sft, data: x/y}\n"
    assert complain(text) == [
        "a.yaml:10: sweep names a run of sft sft-seed-1, which sft-seed-1 has already; rename one of them"
    ]


def test_evaluation_means_the_run_with_the_same_values(load: Load, complain: Complain) -> None:
    text = PIPELINE + "sweep: {sft.learning_rate: [1e-3, 2e-3], dpo.beta: [0.1, 0.5]}\n"
    recipe = load(text + "evaluate: {reference: sft, against: dpo}\n")
    asked = dict(request_stages(recipe, recipe.evaluate))
    dpo = next(directory for directory in asked if "/dpo-" in directory and "1e-3" in directory and "0.5" in directory)
    assert asked[dpo].reference == "runs/a/sft-learning_rate-1e-3"
    assert asked[dpo].against == dpo
    assert asked["runs/a/sft-learning_rate-2e-3"].against is None  # two dpo runs have its values
    assert complain(text + "evaluate: {reference: dpp}\n") == [
        "a.yaml:11: evaluate.reference is dpp, which is neither a stage nor a path that exists; did you mean dpo?"
    ]


def test_the_plain_name_on_the_command_line_lists_the_variants(load: Load) -> None:
    recipe = swept(load, "{dpo.beta: [0.1, 0.5]}")
    with pytest.raises(RecipeError) as caught:
        resolve(recipe, "dpo", method="dpo")
    assert str(caught.value) == (
        "a.yaml: --stage dpo is swept, so there are several; name one of them: dpo-beta-0.1, dpo-beta-0.5"
    )
    with pytest.raises(RecipeError, match="several dpo stages: dpo-beta-0.1, dpo-beta-0.5; name one with --stage"):
        resolve(recipe, method="dpo")
    assert resolve(recipe, "dpo-beta-0.1", method="dpo").trainer["beta"] == 0.1


def test_every_stage_of_a_swept_recipe_of_ours_resolves() -> None:
    folder = Path(__file__).resolve().parents[2] / "recipes"
    recipe = load_recipe(folder / "tiny-cpu.yaml", overrides=["sweep.seed=[0, 1]", "sweep.dpo.beta=[0.1, 0.2]"])
    found = stages(recipe)
    assert all(stage.point for stage in found.values())
    assert len({stage.run_dir for stage in found.values()}) == len(found) == len(recipe.order)


# Many recipes

GOOD = {
    "seed": "[0, 1]", "lora": "[null, {r: 3}]", "model.path": "[a/b, builtin:tiny-llama]", "data": "[a/b, c/d]",
    "sft.learning_rate": "[1e-4, 2e-4]", "other.batch_size": "[4, 8]", "dpo.beta": "[0.1, 0.2]",
    "dpo.start_from": "[sft, null, a/b]", "rm.start_from": "[sft, null]", "ppo.kl_coef": "[0.1, 0.2]",
    "ppo.reward": "[rm, builtin:true-reward]", "rlaif.judge": "[sft, other]", "rlaif.critique.rounds": "[1, 2]",
    "rlaif.start_from": "[sft, other, null]", "rlaif-label.answers": "[2, 4]", "rlaif.data": "[a/b, c/d]",
    "rlaif.generator": "[null, {model: other}]",
}  # fmt: skip
BAD = ["0", "x", "null", "[]", "{}", "[1]", "{path: x}", "{judge: sft}", "''", "$NOPE", "rlaif", "[sft, rm]", "1e999"]


def draw(rng: random.Random, values: Callable[[str], str]) -> str:
    """Return a recipe with one to three swept keys; `values` gives what stands after each."""
    more = ["", "  train: rm+ppo\n  generator: {model: sft}\n", "  critique: true\n"]
    base = rng.choice([PIPELINE, *(RLAIF + line for line in more)])
    keys = rng.sample(list(GOOD), rng.randint(1, 3))
    return base + "sweep:\n" + "".join(f"  {key}: {values(key)}\n" for key in keys)


def test_for_every_choice_of_values_there_is_one_variant_of_each_stage(load: Load) -> None:
    rng, loaded = random.Random(5), 0
    for _ in range(150):
        text = draw(rng, GOOD.__getitem__)
        try:
            recipe = load(text)
        except RecipeError:
            continue  # a key of the other recipe, or one that no stage reads
        loaded += 1
        found = stages(recipe)
        for stage in found.values():
            for need in (stage.start_stage, *stage.reward_stages.values(), *stage.source_stages.values()):
                assert need is None or found[need].point.items() <= stage.point.items(), text
        for variants in recipe.sweeps.values():
            for one, other in itertools.combinations([found[name].point for name in variants], 2):
                assert any(key in other and other[key] != value for key, value in one.items()), text
    assert loaded > 50


def test_whatever_is_under_sweep_ends_in_stages_or_in_messages(load: Load) -> None:
    rng = random.Random(6)
    for _ in range(300):
        text = draw(rng, lambda key: rng.choice([GOOD[key], rng.choice(BAD), f"[{rng.choice(BAD)}]"]))
        try:
            assert stages(load(text))
        except RecipeError as error:
            assert all(problem.where for problem in error.problems), text
