"""An rlaif section: the stages it stands for, what each of them takes from it, and what is wrong with it where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.errors import RecipeError
from alignkit.recipe import Recipe, pick_steps, recipe_schema, resolve
from alignkit.recipe.methods import STEPS, CritiqueOptions, LabelOptions, PpoOptions
from alignkit.recipe.schema import FeedbackModel
from alignkit.recipe.sections import list_steps
from alignkit.recipe.yaml import Node, Origin

Load = Callable[..., Recipe]
Complain = Callable[..., list[str]]

HEAD = "model: {path: builtin:tiny-gpt2}\nsft: {data: builtin:instructions}\n"
RLAIF = """\
rlaif:
  start_from: sft
  constitution: builtin:harmlessness
  data: builtin:prompts
  judge: sft
"""


def made(load: Load, more: str = "", *overrides: str) -> Recipe:
    return load(HEAD + RLAIF + more, *overrides)


# What it stands for


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        ("", "critique sft label dpo"),
        ("  critique: false\n", "label dpo"),
        ("  train: rm+ppo\n", "critique sft label rm ppo"),
        ("  train: ppo\n", "critique sft ppo"),
        ("  critique: false\n  train: ppo\n", "ppo"),
    ],
)
def test_the_stages_a_section_stands_for(load: Load, more: str, steps: str) -> None:
    recipe = made(load, more)
    names = [f"rlaif-{step}" for step in steps.split()]
    assert recipe.order == ("sft", *names)
    assert recipe.groups == {"rlaif": tuple(names)}
    assert [resolve(recipe, name).method for name in names] == steps.split()
    assert [resolve(recipe, name).run_dir for name in names] == [f"runs/a/{name}" for name in names]


def test_without_training_on_labels_no_judge_is_needed(load: Load) -> None:
    recipe = load(HEAD + RLAIF.replace("  judge: sft\n", "  train: none\n"))
    assert recipe.groups["rlaif"] == ("rlaif-critique", "rlaif-sft")


def test_each_step_starts_where_the_one_before_it_ended(load: Load) -> None:
    recipe = made(load)
    found = {name: resolve(recipe, name) for name in recipe.order}
    rows = [source.path for source in found["rlaif-sft"].options.data]
    assert rows == ["runs/a/rlaif-critique/rows.jsonl"]
    assert found["rlaif-sft"].source_stages == {rows[0]: "rlaif-critique"}
    assert [source.path for source in found["rlaif-dpo"].options.data] == ["runs/a/rlaif-label/rows.jsonl"]
    assert {name: stage.start_stage for name, stage in found.items()} == {
        "sft": None, "rlaif-critique": "sft", "rlaif-sft": "sft", "rlaif-label": "rlaif-sft", "rlaif-dpo": "rlaif-sft",
    }  # fmt: skip
    assert [source.path for source in found["rlaif-critique"].options.data] == ["builtin:prompts"]
    label = found["rlaif-label"].expect(LabelOptions)
    assert label.judge == FeedbackModel(model="runs/a/sft/model") and label.generator is None
    assert found["rlaif-label"].source_stages == {"runs/a/sft/model": "sft"}
    assert found["rlaif-critique"].expect(CritiqueOptions).rounds == 4


def test_without_critiques_the_section_s_own_model_answers_and_learns(load: Load) -> None:
    recipe = made(load, "  critique: false\n")
    assert [resolve(recipe, f"rlaif-{step}").start_stage for step in ("label", "dpo")] == ["sft", "sft"]


def test_the_reward_model_is_the_reward_and_else_the_judge(load: Load) -> None:
    (reward,) = resolve(made(load, "  train: rm+ppo\n"), "rlaif-ppo").expect(PpoOptions).reward
    assert (reward.model, reward.judge) == ("runs/a/rlaif-rm/model", None)
    stage = resolve(made(load, "  train: ppo\n"), "rlaif-ppo")
    (reward,) = stage.expect(PpoOptions).reward
    assert reward.judge == FeedbackModel(model="runs/a/sft/model") and reward.constitution == "builtin:harmlessness"
    assert stage.expect(PpoOptions).critic_start == "policy"  # a judge has no weights for one
    assert stage.source_stages == {"runs/a/sft/model": "sft"}


def test_keys_of_a_step_go_before_those_of_the_section_and_keep_their_places(load: Load) -> None:
    more = (
        "  critique: {rounds: 2}\n  sft: {start_from: null, learning_rate: 1e-3}\n  label: {generator: other/model}\n"
    )
    recipe = made(load, more, "rlaif.dpo.beta=0.3")
    assert resolve(recipe, "rlaif-critique").expect(CritiqueOptions).rounds == 2
    assert resolve(recipe, "rlaif-critique").origins["rlaif-critique.rounds"] == "a.yaml:8"
    assert resolve(recipe, "rlaif-sft").start_dir is None  # the paper's pre-trained model
    generator = resolve(recipe, "rlaif-label").expect(LabelOptions).generator
    assert generator is not None and generator.model == "other/model"
    dpo = resolve(recipe, "rlaif-dpo")
    assert (dpo.trainer["beta"], dpo.origins["rlaif-dpo.beta"]) == (0.3, "--set")
    assert dpo.origins["rlaif-dpo.start_from"] == "a.yaml:3"


def test_published_chains_need_neither_prompts_nor_principles(load: Load) -> None:
    Path("chains.jsonl").touch()
    recipe = made(load, "  critique: {replay: chains.jsonl}\n")
    stage = resolve(recipe, "rlaif-critique")
    options = stage.expect(CritiqueOptions)
    assert (options.data, options.constitution, stage.start_dir) == ([], None, None)
    assert options.replay == [str(Path("chains.jsonl").absolute())]
    recipe = load("data: builtin:prompts\n" + HEAD + RLAIF + "  critique: {replay: chains.jsonl}\n")
    assert resolve(recipe, "rlaif-critique").options.data == []  # nor the recipe's own


def test_the_recipe_s_data_are_the_prompts_and_its_eval_is_for_training_alone(load: Load) -> None:
    recipe = load("data: builtin:prompts\neval: 0.1\n" + HEAD + RLAIF.replace("  data: builtin:prompts\n", ""))
    assert [source.path for source in resolve(recipe, "rlaif-label").options.data] == ["builtin:prompts"]
    assert resolve(recipe, "rlaif-dpo").training.eval == 0.1
    assert [source.path for source in resolve(recipe, "rlaif-dpo").options.data] == ["runs/a/rlaif-label/rows.jsonl"]


def test_a_list_of_stages_may_name_the_section(load: Load) -> None:
    recipe = made(
        load, "dpo: {start_from: rlaif-sft, data: [rlaif-label, builtin:preferences]}\nstages: [rlaif, dpo]\n"
    )
    assert recipe.order == ("rlaif-critique", "rlaif-sft", "rlaif-label", "rlaif-dpo", "dpo")
    paths = [source.path for source in resolve(recipe, "dpo").options.data]
    assert paths == ["runs/a/rlaif-label/rows.jsonl", "builtin:preferences"]


def test_rows_are_made_in_one_process_whatever_trains(load: Load) -> None:
    recipe = made(load, "launch: {processes: 2, strategy: fsdp}\n")
    launch = resolve(recipe, "rlaif-label").launch
    assert (launch.processes, launch.strategy) == (1, "ddp")
    assert resolve(recipe, "rlaif-dpo").launch.processes == 2


def test_critique_and_label_are_stages_of_their_own_too(load: Load) -> None:
    recipe = load(
        HEAD + "label: {start_from: sft, data: builtin:preferences, answers: given, judge: sft, "
        "constitution: [builtin:helpfulness, builtin:harmlessness]}\ndpo: {start_from: sft, data: label}\n"
    )
    assert resolve(recipe, "label").expect(LabelOptions).answers == "given"
    assert resolve(recipe, "dpo").source_stages == {"runs/a/label/rows.jsonl": "label"}
    assert pick_steps(recipe) == ["label"]


def test_paths_are_relative_to_the_recipe(load: Load) -> None:
    Path("mine.yaml").touch()
    recipe = load(
        HEAD + RLAIF.replace("builtin:harmlessness", "[mine.yaml, absent.yaml]")
        + "  label: {examples: mine.yaml}\n  critique: {examples: none}\n"
    )  # fmt: skip
    here = Path.cwd()
    label = resolve(recipe, "rlaif-label").expect(LabelOptions)
    assert label.constitution == [str(here / "mine.yaml"), str(here / "absent.yaml")]
    assert (label.examples, resolve(recipe, "rlaif-critique").expect(CritiqueOptions).examples) == (
        str(here / "mine.yaml"), "none"
    )  # fmt: skip


@pytest.mark.parametrize("cot", [False, True])
def test_labels_are_clamped_with_a_chain_of_thought_alone(load: Load, cot: bool) -> None:
    recipe = made(load, f"  label: {{cot: {str(cot).lower()}}}\n")
    bounds = resolve(recipe, "rlaif-label").expect(LabelOptions).bounds
    assert bounds == ((0.4, 0.6) if cot else (0.0, 1.0))
    recipe = made(load, "  label: {clamp: [0.2, 0.8]}\n")
    assert resolve(recipe, "rlaif-label").expect(LabelOptions).bounds == (0.2, 0.8)


def test_how_a_judge_is_asked_does_not_change_the_fingerprint(load: Load) -> None:
    def values(more: str) -> dict[str, object]:
        judge = f"  train: ppo\n  critique: false\n  judge: {{url: 'http://h/v1', name: m{more}}}\n"
        return resolve(load(HEAD + RLAIF.replace("  judge: sft\n", judge)), "rlaif-ppo").fingerprint_values()

    assert values("") == values(", concurrency: 2, max_cost: 3, price: {input: 1, output: 1}, api_key_env: MY_KEY")
    assert values("") != values(", api: completions")


# Which stages a command runs


def test_the_command_runs_the_whole_line_or_one_step(load: Load) -> None:
    recipe = made(load)
    assert pick_steps(recipe) == ["rlaif-critique", "rlaif-sft", "rlaif-label", "rlaif-dpo"]
    assert pick_steps(recipe, "rlaif") == pick_steps(recipe)
    assert pick_steps(recipe, "label") == pick_steps(recipe, "rlaif-label") == ["rlaif-label"]
    assert pick_steps(recipe, "sft") == ["rlaif-sft"]  # the section's, as with the other steps
    with pytest.raises(RecipeError, match=r"--stage labl: the recipe has no such stage of rlaif; did you mean label\?"):
        pick_steps(recipe, "labl")
    with pytest.raises(RecipeError, match="the recipe has no rlaif section$"):
        pick_steps(load(HEAD))
    with pytest.raises(RecipeError, match="--stage sft is a stage of sft; run `alignkit sft`"):
        pick_steps(load(HEAD), "sft")


def test_two_sections_are_told_apart(load: Load) -> None:
    recipe = made(load, RLAIF.replace("rlaif:", "second:\n  method: rlaif"))
    with pytest.raises(RecipeError, match="several rlaif sections: rlaif, second; name one with --stage"):
        pick_steps(recipe)
    assert pick_steps(recipe, "second")[0] == "second-critique"
    with pytest.raises(RecipeError, match="--stage label is in several sections: rlaif-label, second-label; name one"):
        pick_steps(recipe, "label")


def test_a_method_command_takes_the_stage_that_is_not_a_step(load: Load) -> None:
    recipe = made(load)
    assert resolve(recipe, method="sft").name == "sft"
    assert resolve(recipe, method="dpo").name == "rlaif-dpo"
    assert resolve(recipe, "rlaif-sft", method="sft").name == "rlaif-sft"


# What is wrong


@pytest.mark.parametrize(
    ("more", "messages"),
    [
        ("  dpo: {betta: 1}\n", ["8: rlaif.dpo.betta is not a key of rlaif.dpo; did you mean beta?"]),
        ("  labl: {}\n", ["8: rlaif.labl is not a key of rlaif; did you mean label?"]),
        ("  critique: {rounds: 0}\n", ["8: rlaif.critique.rounds is 0; it must be at least 1 and at most 32"]),
        ("  label: {learning_rate: 1}\n", ["8: rlaif.label.learning_rate is not a key of label; it belongs in a stage, "
         "such as sft"]),
        ("  critique: {eval: 0.1}\n", ["8: rlaif.critique.eval is not a key of critique; it belongs in a stage, such "
         "as sft"]),
        ("  train: rm+ppo\n  dpo: {beta: 0.1}\n", ["9: rlaif.dpo has no effect with train: rm+ppo"]),
        ("  train: ppo\n  label: {}\n", ["9: rlaif.label has no effect with train: ppo"]),
        ("  critique: false\n  sft: {}\n", ["9: rlaif.sft has no effect with critique: false"]),
        ("  train: none\n  critique: false\n", ["7: rlaif.judge has no effect with train: none",
         "8: rlaif.train is none and critique is false, so nothing is left to do"]),
        ("  train: rm\n  ppo: {kl_coef: 1}\n", ["8: rlaif.train is rm; it must be one of dpo, rm+ppo, ppo, none"]),
        ("  critique: 3\n", ["8: rlaif.critique is 3; it must be true or false or a mapping"]),
        ("  label: {answers: given, generator: sft}\n", ["8: rlaif.label.generator has no effect with answers: given, "
         "which samples none"]),
        ("  label: {answers: 1}\n", ["8: rlaif.label.answers is 1; it must be at least 2 and at most 64"]),
        ("  label: {clamp: [0.6, 0.4]}\n", ["8: rlaif.label.clamp is [0.6, 0.4]; it must be [low, high], such as "
         "[0.4, 0.6]"]),
        ("  label: {hard: true, clamp: [0.4, 0.6]}\n", ["8: rlaif.label.clamp has no effect with hard: true, which "
         "rounds labels to 0 or 1"]),
        ("  label: {temperature: 0}\n", ["8: rlaif.label.temperature is 0, with which all answers to a prompt are the "
         "same; set it above 0, or answers: given"]),
        ("  critique: {temperature: 0, top_p: 0.9}\n", ["8: rlaif.critique.top_p has no effect with temperature: 0, "
         "which takes the likeliest token"]),
        ("  label: {cot_tokens: 9}\n", ["8: rlaif.label.cot_tokens has no effect without cot: true"]),
        ("  critique: {replay: a.jsonl, rounds: 3}\n", ["8: rlaif.critique.rounds has no effect with replay, which "
         "takes published critiques and revisions; nothing is sampled"]),
        ("  label: {judge: {replay: labels.jsonl}, orders: one}\n", ["8: rlaif.label.orders has no effect with "
         "judge.replay: the labels are made already"]),
        ("  dpo: {data: rlaif-critique}\n", ["8: rlaif.dpo.data is rlaif-critique, which makes prompts with one "
         "answer; dpo compares: name a label stage"]),
        ("  dpo: {method: sft}\n", ["8: rlaif.dpo.method is sft; it must be dpo"]),
        ("rlaif-sft: {method: sft, data: x/y}\n", ["3: rlaif has a stage rlaif-sft, and so has the recipe; rename one "
         "of the two sections"]),
        ("rm: {data: sft}\n", ["8: rm.data is sft, which trains a model and makes no rows; critique and label stages "
         "do"]),
        ("dpo: {start_from: rlaif, data: rlaif-label}\n", ["8: dpo.start_from is rlaif, which stands for several "
         "stages; name one of them: rlaif-sft, rlaif-dpo"]),
        ("dpo: {start_from: rlaif-label, data: x/y}\n", ["8: dpo.start_from is rlaif-label, which trains no model; "
         "name a stage that does"]),
        ("pol: {method: sft, start_from: sft, data: lab}\nlab: {method: label, start_from: sft, data: x/y, judge: pol, "
         "constitution: builtin:helpfulness}\n", ["8: pol.data goes round in a circle: pol -> lab -> pol",
         "9: lab.judge goes round in a circle: lab -> pol -> lab"]),
        ("stages: [sft, rlaf]\n", ["8: stages names rlaf, which is not a stage here; did you mean rlaif?"]),
    ],
)  # fmt: skip
def test_what_a_section_says_wrong(complain: Complain, more: str, messages: list[str]) -> None:
    assert complain(HEAD + RLAIF + more) == [f"a.yaml:{message}" for message in messages]


@pytest.mark.parametrize(
    ("old", "new", "messages"),
    [
        ("builtin:harmlessness", "builtin:harmlesness", ["5: rlaif.constitution is builtin:harmlesness; it must be a "
         "file, builtin:harmlessness, builtin:helpfulness, builtin:positive-reviews; did you mean "
         "builtin:harmlessness?"]),
        ("  judge: sft\n", "", ["3: rlaif.judge is missing; what compares or scores the answers: a stage, a model or "
         "{url: ...}"]),
        ("judge: sft", "judge: sfd", ["7: rlaif.judge is sfd, which is neither a stage nor a path that exists; did you "
         "mean sft?"]),
        ("judge: sft", "judge: {model: sft, url: 'http://x/v1'}", ["7: rlaif.judge needs exactly one of model, url and "
         "replay, and has model and url"]),
        ("judge: sft", "judge: {url: 'ftp://x', name: m}", ["7: rlaif.judge.url is ftp://x; write http://HOST:PORT/v1 "
         "or https://HOST/v1, without a question mark or a key"]),
        ("judge: sft", "judge: {url: 'http://x:99999/v1', name: m}", ["7: rlaif.judge.url is http://x:99999/v1; write "
         "http://HOST:PORT/v1 or https://HOST/v1, without a question mark or a key"]),
        ("judge: sft", "judge: {url: 'http://x/v1/chat/completions', name: m}", ["7: rlaif.judge.url is "
         "http://x/v1/chat/completions; give the address that ends in /v1: what comes after it is added (api)"]),
        ("judge: sft", "judge: {url: 'http://x/v1'}", ["7: rlaif.judge has a url without name; say which of the "
         "server's models is meant"]),
        ("judge: sft", "judge: {url: 'http://x/v1', name: m, max_cost: 1}", ["7: rlaif.judge.max_cost needs price: "
         "{input, output}, per million tokens"]),
        ("judge: sft", "judge: {model: sft, retries: 3}", ["7: rlaif.judge.retries has no effect with model; it is for "
         "a server (url)"]),
        ("judge: sft", "judge: {url: 'http://x/v1', name: m, concurency: 3}", ["7: rlaif.judge.concurency is not a key "
         "of rlaif.judge; did you mean concurrency?"]),
        ("judge: sft", "judge: sft\n  generator: {replay: a.jsonl}", ["8: rlaif.generator needs exactly one of model "
         "and url, and has replay"]),
        ("start_from: sft", "start_from: sftt", ["4: rlaif.start_from is sftt, which is neither a stage nor a path "
         "that exists; did you mean sft?"]),
        ("  constitution: builtin:harmlessness\n  data: builtin:prompts\n", "", ["3: rlaif.constitution is missing; "
         "principles: YAML or JSON files, builtin:harmlessness or builtin:helpfulness; several are joined",
         "3: rlaif.data is missing; prompts, here or as the recipe's own `data:`"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_once_however_many_steps_have_it(
    complain: Complain, old: str, new: str, messages: list[str]
) -> None:
    assert complain(HEAD + RLAIF.replace(old, new)) == [f"a.yaml:{message}" for message in messages]


def test_random_weights_have_no_answers(complain: Complain) -> None:
    head = HEAD.replace("}", ", init: scratch}", 1)
    assert complain(head + RLAIF.replace("  start_from: sft\n", "")) == [
        "a.yaml:3: rlaif.critique.start_from is missing, and model.init is scratch: random weights have no answers; "
        "name a stage"
    ]


def test_a_key_in_a_judge_is_refused_and_never_shown(complain: Complain) -> None:
    key = "sk-" + "abcdefgh12345678" * 2
    (message,) = complain(HEAD + RLAIF.replace("judge: sft", f"judge: {{url: 'http://x/v1', name: m, api_key: {key}}}"))
    assert message.startswith("a.yaml:7: rlaif.judge.api_key is the name of a secret") and key not in message
    message, *_ = complain(HEAD + RLAIF.replace("judge: sft", "judge: {url: 'https://me:word@x/v1', name: m}"))
    assert message.startswith("a.yaml:7: rlaif.judge.url holds what looks like a secret") and "word" not in message


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("{judge: sft}", "has a judge without a constitution; add constitution: builtin:harmlessness or a file"),
        ("{judge: {url: 'http://x/v1'}, constitution: c.yaml}", ".judge has a url without name; say which of the "
         "server's models is meant"),
        ("{judge: {replay: x}, constitution: c.yaml}", ".judge needs exactly one of model and url, and has replay"),
        ("{model: x/y, constitution: c.yaml}", "has a constitution, which only a judge goes by; take it out, or give a "
         "judge"),
        ("{judge: sft, model: x/y, constitution: c.yaml}", "needs exactly one of model, function, judge and verify "
         "for each part, and has model x/y and a judge"),
        ("{judge: dpp, constitution: c.yaml}", ".judge is dpp, which is neither a stage nor a path that exists; did "
         "you mean ppo?"),
    ],
)  # fmt: skip
def test_a_judge_as_reward_that_cannot_be(complain: Complain, reward: str, message: str) -> None:
    dot = "" if message.startswith(".") else " "
    found = complain(HEAD + f"ppo: {{start_from: sft, data: builtin:prompts, reward: {reward}}}\n")
    assert found == [f"a.yaml:3: ppo.reward{dot}{message}"]


# The pure parts


def test_the_steps_come_in_the_order_they_run_in() -> None:
    origin = Origin("a.yaml", Path())
    assert list_steps({}) == ("critique", "sft", "label", "dpo")
    assert set(STEPS) == {"critique", "sft", "label", "dpo", "rm", "ppo"}
    assert list_steps({"train": Node(3, origin)}) == list_steps({})  # what it is instead has a message of its own


def test_an_editor_completes_the_keys_of_every_step() -> None:
    properties = recipe_schema()["$defs"]["rlaif_section"]["properties"]
    assert properties["dpo"]["$ref"] == "#/$defs/dpo_stage"
    assert {"$ref": "#/$defs/critique_stage"} in properties["critique"]["anyOf"]
    assert recipe_schema()["properties"]["rlaif"] == {"$ref": "#/$defs/rlaif_section"}
