"""The sections of a recipe: its stages, one for each variant of a swept one, its own top level, and rlaif."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from alignkit.errors import Problem
from alignkit.recipe.check import check_keys, quote_help
from alignkit.recipe.schema import FEEDBACK, PRESETS, RLAIF, STEPS, RlaifOptions
from alignkit.recipe.yaml import Node, merge

Finding = tuple[str, str]  # key, what is wrong with it


class UnreadableError(Exception):
    """A rule asked for a value that has a problem of its own."""


@dataclass(eq=False)
class Section:
    """A stage with what it takes from the recipe, or the recipe's top level (`top` is None).

    `broken` are keys whose value cannot be relied on, `options` what pydantic made of the values.
    """

    name: str
    method: str
    node: Node
    top: Section | None = None
    group: str | None = None  # the rlaif section it is a step of
    shared: frozenset[str] = frozenset()  # keys that it has from there
    inherited: frozenset[str] = frozenset()  # keys that it has from the top level
    preset: frozenset[str] = frozenset()  # keys that it has from its preset
    broken: set[str] = field(default_factory=set)
    options: Any = None  # StageOptions or RecipeOptions, once the values are found to be right
    run: str = ""  # the name of its run: of a swept stage, with the values that tell it from the others
    first: str = ""  # of a later round: the stage of the first
    names: Mapping[str, str] = field(default_factory=dict)  # which run of a swept stage it means by the stage's name
    point: Mapping[str, Any] = field(default_factory=dict)  # its values of what is swept, as written

    @property
    def trainer(self) -> dict[str, Any]:
        """TRL's fields where they are given."""
        fields = type(self.options).model_fields
        given = {key: child.plain() for key, child in self.node.value.items() if key not in fields}
        if self.method == "dpo" and isinstance(given.get("loss_type"), str):
            given["loss_type"] = [given["loss_type"]]
        return given

    @property
    def label(self) -> str:
        """What messages call the section: as it stands in the file."""
        return (self.first or self.name) if self.group is None else f"{self.group}.{self.method}"

    def say(self, key: str) -> str:
        """What messages call a key of it."""
        first = key.split(".")[0]
        if self.top is None or first in self.inherited:
            return key
        return f"{self.group if first in self.shared else self.label}.{key}"

    def get(self, key: str, default: Any = None) -> Any:
        """A value as given, else the default; `key` may be dotted. Raises when the value given is wrong."""
        first, *rest = key.split(".")
        if first in self.broken:
            raise UnreadableError
        child = self.node.value.get(first)
        for part in rest:
            child = child.value.get(part) if child is not None and isinstance(child.value, dict) else None
        return default if child is None else child.plain()

    def has(self, key: str) -> bool:
        return self.get(key) is not None

    def place(self, key: str) -> str:
        """The place of a dotted key; of the section when it is not given."""
        node = self.node
        for part in key.split("."):
            if not isinstance(node.value, dict) or part not in node.value:
                break
            node = node.value[part]
        return node.place

    def is_switched_off(self, key: str, *, by: str) -> bool:
        """Tell whether a key lost its effect to a value from another file or the command line, which is no mistake."""
        own, other = (self.place(name).rpartition(":")[0] or self.place(name) for name in (key, by))
        return own != other and not own.startswith("--")


def make_stage(
    name: str, method: str, node: Node, top: Section, *, group: str | None = None, shared: frozenset[str] = frozenset()
) -> Section:
    """Make a stage's section, with the recipe's rows where it has none; published chains (replay) are rows already."""
    keys = () if method == "critique" and "replay" in node.value else find_inherited(top.node, method)
    taken = {key: top.node.value[key] for key in keys if key not in node.value}
    preset = node.value.get("preset") if method == "ppo" else None
    values = PRESETS.get(preset.value, {}) if preset is not None and isinstance(preset.value, str) else {}
    whole = Node({**taken, **node.value}, node.origin, node.line)

    def place(value: Any, at: Node) -> Node:
        """A value of the preset as if it stood where that is named."""
        inner = {key: place(item, at) for key, item in value.items()} if isinstance(value, dict) else value
        return Node(inner, at.origin, at.line)

    whole = merge(place(values, preset), whole) if preset is not None else whole
    filled = frozenset(values.keys() - node.value.keys())
    return Section(name, method, whole, top, group, shared, frozenset(taken), filled, run=name)


def find_inherited(tree: Node, method: str) -> tuple[str, ...]:
    """List what a stage of a method takes from the recipe when it gives none of its own."""
    keys = ("data",) if method in (*FEEDBACK, RLAIF) else ("data", "eval")
    return tuple(key for key in keys if key in tree.value and tree.value[key].value is not None)


_TRAINED = {"dpo": ("label", "dpo"), "rm+ppo": ("label", "rm", "ppo"), "ppo": ("ppo",), "none": ()}


@dataclass(eq=False)
class Group:
    """An rlaif section with its stages, each with the values of the section that it takes."""

    name: str
    node: Node
    top: Section
    stages: list[Section]


def list_steps(values: Mapping[str, Node]) -> tuple[str, ...]:
    """List the steps that a section has, in order."""
    critique, train = values.get("critique"), values.get("train")
    first = () if critique is not None and critique.value is False else ("critique", "sft")
    return (*first, *_TRAINED.get(train.value if train is not None and isinstance(train.value, str) else "dpo", ()))


def split_group(name: str, node: Node, top: Section) -> Group:
    """Make the stages that an rlaif section stands for; what a step's own keys do not say comes from the section.

    With train: ppo the judge itself is the reward; without critique the section's start_from replaces the sft model.
    """
    values: dict[str, Node] = node.value
    steps = list_steps(values)

    def take(*keys: str) -> dict[str, Node]:
        return {key: values[key] for key in keys if key in values}

    def stage(step: str) -> Node:
        return Node(f"{name}-{step}", node.origin, node.line)

    policy = {"start_from": stage("sft")} if "sft" in steps else take("start_from")
    asked = take("start_from", "constitution", "data", "generator")
    labelled = {**policy, "data": stage("label")}
    reward = stage("rm") if "rm" in steps else Node(take("judge", "constitution"), node.origin, node.line)
    filled: dict[str, dict[str, Node]] = {
        "critique": {} if "replay" in _own(values, "critique") else asked,  # with published chains nothing is sampled
        "sft": {**take("start_from"), "data": stage("critique")},
        "label": {**asked, **policy, **take("judge")}, "dpo": labelled, "rm": labelled,
        "ppo": {**policy, **take("data"), "reward": reward},
    }  # fmt: skip
    stages = []
    for step in steps:
        own = values[step] if isinstance(_own(values, step), dict) and step in values else node
        whole = Node({**filled[step], **_own(values, step)}, own.origin, own.line)
        shared = frozenset(key for key, child in whole.value.items() if child is values.get(key))
        stages.append(make_stage(f"{name}-{step}", step, whole, top, group=name, shared=shared))
    return Group(name, node, top, stages)


def _own(values: Mapping[str, Node], step: str) -> dict[str, Node]:
    own = values.get(step)
    return own.value if own is not None and isinstance(own.value, dict) else {}


def check_group(group: Group) -> Iterator[Problem]:
    """Yield what is wrong with a section's own keys, and take those out of the stages that have them from it."""
    name, values, place = group.name, group.node.value, group.node.place
    own = RlaifOptions.model_fields
    _, found = check_keys(RlaifOptions, group.node, RLAIF, name, lambda key: f"{name}.{key}")
    steps, train = list_steps(values), values["train"].value if "train" in values else "dpo"
    inherited = find_inherited(group.top.node, RLAIF)
    missing = {key for key, field in own.items() if field.is_required() and key not in (*values, *inherited)}
    asks = "label" in steps and "judge" not in _own(values, "label")
    asks |= "ppo" in steps and "rm" not in steps and "reward" not in _own(values, "ppo")
    for key in sorted(missing | ({"judge"} if asks and "judge" not in values else set())):
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
    if train not in list(_TRAINED):
        return  # it has a message of its own
    idle = [key for key in ("sft", *STEPS[2:]) if key in values and key not in steps]
    idle += ["judge"] if "judge" in values and not {"label", "ppo"} & {*steps} else []
    for key in idle:
        reason = "critique: false" if key == "sft" else f"train: {train}"
        yield Problem(f"{name}.{key} has no effect with {reason}", values[key].place)
    if not steps:
        what = f"{name}.train is none and critique is false, so nothing is left to do"
        yield Problem(what, values["train"].place)


@dataclass(eq=False)
class Whole:
    """All sections of a recipe; of one with a sweep, with one choice of the swept values."""

    top: Section
    stages: dict[str, Section] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    rounds: dict[str, tuple[str, ...]] = field(default_factory=dict)  # stages of later rounds, by the last of the first
