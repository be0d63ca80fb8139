"""Rounds: which stages a chain becomes, what each of them takes from the others, and what is no chain."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from alignkit.recipe import Recipe, resolve

Load = Callable[..., Recipe]
Complain = Callable[..., list[str]]

CHAIN = (
    "model: {path: builtin:tiny-gpt2}\n"
    "sft: {data: builtin:instructions}\n"
    "label: {start_from: sft, data: builtin:prompts, reward: builtin:true-reward}\n"
    "dpo: {start_from: sft, data: label}\n"
)
RLAIF = (
    "model: {path: builtin:tiny-gpt2}\nsft: {data: builtin:instructions}\n"
    "rlaif: {start_from: sft, constitution: builtin:harmlessness, data: builtin:prompts, judge: sft, critique: false, "
)


def wiring(recipe: Recipe) -> dict[str, tuple[str | None, list[str]]]:
    """What each stage starts from, and the stages whose rows it reads."""
    found = {}
    for name in recipe.order:
        stage = resolve(recipe, name)
        rows = [stage.source_stages[it.path] for it in stage.options.data if it.path in stage.source_stages]
        found[name] = (stage.start_stage, rows)
    return found


@pytest.mark.parametrize(("keys", "starts", "rows"), [
    ("num: 3", ["sft", "dpo", "dpo-2"], [["label"], ["label-2"], ["label-3"]]),
    ("num: 3, rows: all, restart: true", ["sft"] * 3,
     [["label"], ["label", "label-2"], ["label", "label-2", "label-3"]]),
])  # fmt: skip
def test_each_round_labels_answers_of_the_newest_policy(load: Load, keys: str, starts: list, rows: list) -> None:
    recipe = load(f"{CHAIN}rounds: {{stages: [label, dpo], {keys}}}\nrm: {{data: builtin:preferences}}\n")
    assert wiring(recipe) == {
        "sft": (None, []), "rm": (None, []),
        "label": ("sft", []), "label-2": ("dpo", []), "label-3": ("dpo-2", []),
        **{name: (start, read) for name, start, read in zip(("dpo", "dpo-2", "dpo-3"), starts, rows, strict=True)},
    }  # fmt: skip
    assert recipe.order == ("sft", "label", "dpo", "label-2", "dpo-2", "label-3", "dpo-3", "rm")
    assert resolve(recipe, "dpo-3").run_dir == "runs/a/dpo-3"
    listed = load(f"{CHAIN}rounds: {{stages: [label, dpo], num: 2}}\nstages: [label, dpo, sft]\n")
    assert listed.order == ("label", "dpo", "label-2", "dpo-2", "sft")


def test_other_rows_stay_and_a_source_keeps_its_keys(load: Load) -> None:
    text = CHAIN.replace("data: label", "data: [{path: label, weight: 2}, builtin:preferences]")
    recipe = load(f"{text}rounds: {{stages: [label, dpo], num: 2, rows: all}}\n")
    found = [(it.path, it.weight) for it in resolve(recipe, "dpo-2").options.data]
    assert found == [("runs/a/label/rows.jsonl", 2), ("runs/a/label-2/rows.jsonl", 2), ("builtin:preferences", 1)]


def test_a_reward_model_and_ppo_take_turns(load: Load) -> None:
    text = CHAIN.replace("dpo: {start_from: sft, data: label}\n", "rm: {start_from: sft, data: label}\n"
                         "ppo: {start_from: sft, reward: rm, data: builtin:prompts}\n")  # fmt: skip
    recipe = load(f"{text}rounds: {{stages: [label, rm, ppo], num: 2}}\n")
    assert wiring(recipe)["label-2"] == ("ppo", []) and wiring(recipe)["rm-2"] == ("rm", ["label-2"])
    stage = resolve(recipe, "ppo-2")
    assert stage.start_stage == "ppo" and [*stage.reward_stages.values()] == ["rm-2"]


@pytest.mark.parametrize("rounds", ["3", "{num: 3, rows: all, restart: true}"])
def test_a_section_of_rlaif_has_rounds(load: Load, rounds: str) -> None:
    recipe = load(f"{RLAIF}rounds: {rounds}}}\n")
    again = rounds != "3"
    assert recipe.groups["rlaif"] == recipe.order[1:]
    assert wiring(recipe) == {
        "sft": (None, []), "rlaif-label": ("sft", []), "rlaif-dpo": ("sft", ["rlaif-label"]),
        "rlaif-label-2": ("rlaif-dpo", []),
        "rlaif-dpo-2": ("sft" if again else "rlaif-dpo", ["rlaif-label"] * again + ["rlaif-label-2"]),
        "rlaif-label-3": ("rlaif-dpo-2", []),
        "rlaif-dpo-3": ("sft" if again else "rlaif-dpo-2",
                        ["rlaif-label", "rlaif-label-2"] * again + ["rlaif-label-3"]),
    }  # fmt: skip
    assert resolve(recipe, "rlaif-label-3").options.judge.model == "runs/a/sft/model"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("text", "message"), [
    (CHAIN + "rounds: {stages: [label, dop], num: 2}\n",
     "a.yaml:5: rounds names dop, which is not a stage; did you mean dpo?"),
    (CHAIN + "rounds: {stages: [sft, dpo], num: 2}\n",
     "a.yaml:5: rounds needs a label stage and a policy that learns from it"),
    (CHAIN + "rounds: {stages: [label, dpo], num: 1}\n", "a.yaml:5: rounds.num is 1; it must be at least 2 and at most "
     "99"),
    (CHAIN + "rounds: {num: 2}\n", "a.yaml:5: rounds.stages is missing; the stages of a round in their order: label, "
     "and what learns from it"),
    (CHAIN + "dpo-2: {method: dpo, data: label}\nrounds: {stages: [label, dpo], num: 2}\n",
     "a.yaml:6: rounds makes a stage dpo-2, and so has the recipe; rename that"),
    (CHAIN + "rounds: {stages: [label, dpo], num: 2}\nsweep: {dpo.beta: [0.1, 0.2]}\n",
     "a.yaml:5: rounds and sweep do not go together; take one of them out"),
    (CHAIN.replace("data: label", "data: label, beta: -1") + "rounds: {stages: [label, dpo], num: 3}\n",
     "a.yaml:4: dpo.beta is -1; it must be greater than 0 (typical: 0.05 to 0.5)"),
    (RLAIF + "train: ppo, rounds: 2}\n", "a.yaml:3: rounds needs a label stage and a policy that learns from it"),
    (CHAIN.replace("reward:", "best_of: true, reward:"), "a.yaml:4: dpo.data is label, which keeps the best answers "
     "alone (best_of); dpo compares: take best_of out"),
])  # fmt: skip
def test_what_is_no_chain_is_said_once(complain: Complain, text: str, message: str) -> None:
    assert complain(text) == [message]
