"""An rlaif section spread out into the ordinary stages that it stands for; values keep their places."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from alignkit.errors import Problem
from alignkit.recipe.check import check_keys, quote_help
from alignkit.recipe.schema import RLAIF, STEPS, RlaifOptions
from alignkit.recipe.sections import Section, find_inherited, make_stage
from alignkit.recipe.yaml import Node

_TRAINED = {"dpo": ("label", "dpo"), "rm+ppo": ("label", "rm", "ppo"), "ppo": ("ppo",), "none": ()}


@dataclass
class Group:
    """An rlaif section with its stages, each with the values of the section that it takes."""

    name: str
    node: Node
    top: Section
    stages: list[Section]


def stage_name(section: str, step: str) -> str:
    """Name a step's stage: rlaif-label."""
    return f"{section}-{step}"


def list_steps(values: Mapping[str, Node]) -> tuple[str, ...]:
    """List the steps that a section has, in order."""
    critique, train = values.get("critique"), values.get("train")
    first = () if critique is not None and critique.value is False else ("critique", "sft")
    return (*first, *_TRAINED.get(train.value if train is not None and isinstance(train.value, str) else "dpo", ()))


def split_group(name: str, node: Node, top: Section) -> Group:
    """Make the stages of a section; what a step's own keys do not say is taken from the section.

    critique makes rows for sft; label has answers of the sft model judged; dpo, or rm and ppo, learn from the labels;
    with train: ppo the judge itself is the reward. Without critique the section's own start_from takes the sft
    model's place.
    """
    values: dict[str, Node] = node.value
    steps = list_steps(values)

    def take(*keys: str) -> dict[str, Node]:
        return {key: values[key] for key in keys if key in values}

    def stage(step: str) -> Node:
        return Node(stage_name(name, step), node.origin, node.line)

    policy = {"start_from": stage("sft")} if "sft" in steps else take("start_from")
    asked = take("start_from", "constitution", "data", "generator")
    reward = stage("rm") if "rm" in steps else Node(take("judge", "constitution"), node.origin, node.line)
    filled: dict[str, dict[str, Node]] = {
        "critique": {} if "replay" in _own(values, "critique") else asked,  # with published chains nothing is sampled
        "sft": {**take("start_from"), "data": stage("critique")},
        "label": {**asked, **policy, **take("judge")},
        "dpo": {**policy, "data": stage("label")},
        "rm": {**policy, "data": stage("label")},
        "ppo": {**policy, **take("data"), "reward": reward},
    }
    stages = []
    for step in steps:
        own = values[step] if isinstance(_own(values, step), dict) and step in values else node
        whole = Node({**filled[step], **_own(values, step)}, own.origin, own.line)
        shared = frozenset(key for key, child in whole.value.items() if child is values.get(key))
        stages.append(make_stage(stage_name(name, step), step, whole, top, group=name, shared=shared))
    return Group(name, node, top, stages)


def _own(values: Mapping[str, Node], step: str) -> dict[str, Node]:
    own = values.get(step)
    return own.value if own is not None and isinstance(own.value, dict) else {}


def check_group(group: Group) -> Iterator[Problem]:
    """Yield what is wrong with the section's own keys; those of its steps are checked with their stages.

    No stage can rely on a key that is wrong, so it is taken out of those that have it from the section.
    """
    name, values, place = group.name, group.node.value, group.node.place
    own = RlaifOptions.model_fields
    _, found = check_keys(RlaifOptions, group.node, RLAIF, name, lambda key: f"{name}.{key}")
    inherited = find_inherited(group.top.node, RLAIF)
    missing = {key for key, field in own.items() if field.is_required() and key not in (*values, *inherited)}
    if "judge" not in values and any(_lacks_judge(group, stage) for stage in group.stages):
        missing.add("judge")
    for key in sorted(missing):
        found[key] = [Problem(f"{name}.{key} is missing; {quote_help(own[key].description)}", place)]
    for key, problems in found.items():
        yield from problems
        for stage in group.stages if key in own else ():
            if key in stage.shared:
                del stage.node.value[key]
                stage.shared -= {key}
            if key not in stage.node.value:
                stage.broken.add(key)
            if key in ("judge", "constitution") and "reward" not in _own(values, stage.method):
                stage.broken.add("reward")
    for key, what in _find_unused(values):
        yield Problem(f"{name}.{key} {what}", values[key].place if key in values else place)


def _lacks_judge(group: Group, stage: Section) -> bool:
    if stage.method == "label":
        return "judge" not in stage.node.value
    with_rm = any(other.method == "rm" for other in group.stages)
    return stage.method == "ppo" and not with_rm and "reward" not in _own(group.node.value, "ppo")


def _find_unused(values: Mapping[str, Node]) -> Iterator[tuple[str, str]]:
    """Yield the keys of a section that have no effect, and why."""
    steps: Collection[str] = list_steps(values)
    train = values["train"].value if "train" in values else "dpo"
    if train not in list(_TRAINED):
        return  # it has a message of its own
    for key in ("sft", *STEPS[2:]):
        if key in values and key not in steps:
            yield key, f"has no effect with {'critique: false' if key == 'sft' else f'train: {train}'}"
    if "judge" in values and not {"label", "ppo"} & {*steps}:
        yield "judge", f"has no effect with train: {train}"
    if not steps:
        yield "train", "is none and critique is false, so nothing is left to do"
