"""The rlaif section spread out into the ordinary stages it stands for; a pure function of the tree.

It checks nothing beyond what decides which stages there are: each of them is validated like any other, and a value
keeps the place where it was written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from alignkit.recipe.schema import STEPS
from alignkit.recipe.sections import Group, StageTree
from alignkit.recipe.yaml import Node

_TRAINED = {"dpo": ("label", "dpo"), "rm+ppo": ("label", "rm", "ppo"), "ppo": ("ppo",), "none": ()}


@dataclass(frozen=True)
class Step:
    """One stage of the expansion; its method is its name."""

    name: str
    node: Node


def stage_name(section: str, step: str) -> str:
    """Return the name of a step's stage: rlaif-label."""
    return f"{section}-{step}"


def list_steps(values: Mapping[str, Node]) -> tuple[str, ...]:
    """Return the steps that a section has, in order."""
    critique = values.get("critique")
    first = () if critique is not None and critique.value is False else ("critique", "sft")
    train = values.get("train")
    trained = _TRAINED.get(train.value if train is not None and isinstance(train.value, str) else "dpo", ())
    return (*first, *trained)


def find_unused(values: Mapping[str, Node]) -> Iterator[tuple[str, str]]:
    """Yield the keys of a section that would have no effect, and why."""
    steps = list_steps(values)
    train = values["train"].value if "train" in values else "dpo"
    if train not in list(_TRAINED):
        return  # it has a message of its own
    for key in ("sft", *STEPS[2:]):
        if key in values and key not in steps:
            yield key, "has no effect with critique: false" if key == "sft" else f"has no effect with train: {train}"
    if "judge" in values and not {"label", "ppo"} & {*steps}:
        yield "judge", f"has no effect with train: {train}"
    if not steps:
        yield "train", "is none and critique is false, so nothing is left to do"


def expand(section: str, node: Node) -> list[Step]:
    """Return the stages of a section; what a step's own keys do not say is taken from the section.

    critique makes rows for sft; label has answers of the sft model judged; dpo, or rm and ppo, learn from the labels;
    with train: ppo the judge itself is the reward. Without critique the section's own start_from takes the sft
    model's place.
    """
    values: dict[str, Node] = node.value
    steps = list_steps(values)

    def new(value: object) -> Node:
        return Node(value, node.origin, node.line)

    def stage(step: str) -> Node:
        return new(stage_name(section, step))

    shared: dict[str, Node] = {
        key: values[key] for key in ("start_from", "constitution", "data", "generator") if key in values
    }
    judge = {"judge": values["judge"]} if "judge" in values else {}
    policy = {"start_from": stage("sft")} if "sft" in steps else _take(shared, "start_from")
    reward = stage("rm") if "rm" in steps else new({**judge, **_take(shared, "constitution")})
    filled: dict[str, dict[str, Node]] = {
        "critique": _without_replayed(shared, values.get("critique")),
        "sft": {**_take(shared, "start_from"), "data": stage("critique")},
        "label": {**shared, **policy, **judge},
        "dpo": {**policy, "data": stage("label")},
        "rm": {**policy, "data": stage("label")},
        "ppo": {**policy, **_take(shared, "data"), "reward": reward},
    }
    return [Step(step, _lay(filled[step], values.get(step), node)) for step in steps]


def _take(values: Mapping[str, Node], *keys: str) -> dict[str, Node]:
    return {key: values[key] for key in keys if key in values}


def _without_replayed(shared: dict[str, Node], own: Node | None) -> dict[str, Node]:
    """Leave everything out with published chains: nothing is sampled."""
    given = own.value if own is not None and isinstance(own.value, dict) else {}
    return {} if "replay" in given else shared


def _lay(filled: dict[str, Node], own: Node | None, section: Node) -> Node:
    if own is not None and isinstance(own.value, dict):
        return Node({**filled, **own.value}, own.origin, own.line)
    return Node(filled, section.origin, section.line)


def split_group(name: str, node: Node, top: Node) -> Group:
    """Return an rlaif section with the stages it stands for."""
    stages = []
    for step in expand(name, node):
        shared = {key for key, child in step.node.value.items() if child is node.value.get(key)}
        full = stage_name(name, step.name)
        stages.append(StageTree(full, step.name, step.node, top, group=name, shared=frozenset(shared)))
    return Group(name, node, stages)
