"""The sections of a recipe (stages, variants of swept ones, its own top level, rlaif) and what they name."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Literal

from alignkit.errors import Problem, suggest
from alignkit.recipe.check import check_keys, quote_help, show
from alignkit.recipe.methods import FEEDBACK, PRESETS, RLAIF, STEPS, TASKS, RlaifOptions
from alignkit.recipe.schema import BUILTIN_REWARD
from alignkit.recipe.words import TABLES
from alignkit.recipe.yaml import Node, expand, merge

RUNS = "runs"
ROWS = "rows.jsonl"  # what a critique or label stage writes
SOURCE_KEYS = ("data", "eval", "normalize_data", "mix", "check")
REWARD_KEYS = ("reward", "gold")
_LOCAL_SUFFIXES = tuple(TABLES["suffixes of local files"])

Kind = Literal["start", "weights", "rows", "reward", "writer", "file"]
# Where names stand: the keys that lead there, through lists or not, and the entry of a mapping that another value than
# a mapping is short for.
_NAMES = [(key, entry, kind) for keys, entry, kind in TABLES["what names what"] for key in keys.split()]
Finding = tuple[str, str]  # key, what is wrong with it


class UnreadableError(Exception):
    """A rule asked for a value that has a problem of its own."""


@dataclass(eq=False)
class Section:
    """A stage with what it takes from the recipe, or the recipe's top level (`top` is None).
    `broken` are keys whose value cannot be relied on, `options` what pydantic made of the values."""

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
    With train: ppo the judge itself is the reward; without critique the section's start_from replaces the sft model."""
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


@dataclass(frozen=True)
class Name:
    """A text of a section that names a file, a model or another stage."""

    key: str  # as written below the section: data.path, reward.judge
    node: Node
    kind: Kind

    @property
    def first(self) -> str:
        return self.key.split(".")[0]


def find_names(section: Node) -> list[Name]:
    """List what a stage, `evaluate:` or the top level names; the values may be wrong in any way."""
    found = []
    for key, entry, kind in _NAMES:
        for node in _find(section, key.split(".")):
            is_mapping = isinstance(node.value, dict)
            named = node.value.get(entry) if entry and is_mapping else node
            # none and builtin are words of `examples:`, beside files
            if named and isinstance(named.value, str) and not (kind == "file" and named.value in ("none", "builtin")):
                found.append(Name(f"{key}.path" if entry == "path" and is_mapping else key, named, kind))
    return found


def _find(node: Node, keys: Sequence[str]) -> Iterator[Node]:
    if isinstance(node.value, list):
        for item in node.value:
            yield from _find(item, keys)
    elif not keys:
        yield node
    elif isinstance(node.value, dict) and keys[0] in node.value:
        yield from _find(node.value[keys[0]], keys[1:])


def find_needs(section: Section, stages: Collection[str]) -> dict[str, Name]:
    """Find the stages that a stage takes something from, each with one name that says so."""
    names = [name for name in find_names(section.node) if name.kind not in ("file", "weights")]
    return {name.node.value: name for name in names if name.node.value in stages}


def resolve_paths(tops: Sequence[Section], stages: Sequence[Section], stage_names: Collection[str]) -> list[Problem]:
    """Make every path absolute, in place and once, and say which cannot be; names of stages are left alone."""
    found: dict[int, tuple[str, Name]] = {}
    for top in tops:
        for key in ("path", "tokenizer", "chat_template"):
            for node in _find(top.node, ("model", key)):
                # A template that is no file is one of ours, by name.
                if isinstance(node.value, str) and (key != "chat_template" or node.value.endswith(".jinja")):
                    found.setdefault(id(node), (f"model.{key}", Name("model", node, "rows")))
        for name in find_names(top.node):
            if name.first in SOURCE_KEYS:
                found.setdefault(id(name.node), (name.key, name))
        if evaluate := top.node.value.get("evaluate"):
            found |= {id(name.node): (f"evaluate.{name.key}", name) for name in find_names(evaluate)}
    for stage in stages:
        for name in find_names(stage.node):
            found.setdefault(id(name.node), (f"{stage.label}.{name.key}", name))
    problems = []
    for key, name in found.values():
        node = name.node
        is_stage = node.value in stage_names and name.key != "model"
        if is_stage or node.value.startswith(("builtin:", "pypi:")) or "://" in node.value:
            continue
        try:
            text, here = expand(node.value), Path.cwd()
        except ValueError as error:
            problems.append(Problem(f"{key}: {error}", node.place))
            continue
        paths = [os.path.join(folder, text) for folder in (node.origin.folder, here)]
        there = [path for path in paths if os.path.exists(path) or ("*" in text and glob.glob(path, recursive=True))]
        # A hub id (`name` or `owner/name`) is told from a file or directory that is not there by its looks.
        is_local = text.startswith((".", "/")) or text.lower().endswith(_LOCAL_SUFFIXES) or "*" in text
        if there:
            node.value = os.path.abspath(there[0])
        elif name.kind == "file" or is_local or text.count("/") > 1:
            # Runs and models that are yet to come are below the working directory, files beside the recipe.
            node.value = os.path.abspath((node.origin.folder if name.kind in ("rows", "file") else here) / text)
    return problems


def check_references(stage: Section, stages: Mapping[str, Section], groups: Collection[str]) -> Iterator[Problem]:
    """Yield what is wrong with the names by which a stage calls others; the keys are marked as broken."""
    for name in find_names(stage.node):
        value, key = name.node.value, stage.say(name.key.removesuffix(".path"))
        if name.first in stage.broken or name.kind in ("file", "weights"):
            continue
        found: str | None
        if name.kind == "start" and value in groups:
            trained = [other.name for other in stages.values() if other.group == value and other.method not in FEEDBACK]
            found = f", which stands for several stages; name one of them: {', '.join(trained)}"
        elif value not in stages:
            found = _describe_stranger(name, stages)
        elif value == stage.name and name.kind != "start":
            found = ", the stage itself"
        else:
            own, other = _kind_of(stage), _kind_of(stages[value])
            fitting = (what for uses, others, of, what in TABLES["misfits"]
                       if name.kind in uses.split() and other in others.split() and own in of.split())  # fmt: skip
            found = next(fitting, "").replace("{method}", stage.method)
        if found:
            stage.broken.add(name.first)
            yield Problem(f"{key} is {show(name.node)}{found}", name.node.place)


def _kind_of(stage: Section) -> str:
    given = stage.node.value
    if "objective" in given and given["objective"].value in TASKS:
        return "classifier"
    return "best_of" if "best_of" in given and given["best_of"].value is True else stage.method


def _describe_stranger(name: Name, stages: Mapping[str, Section]) -> str | None:
    value = name.node.value
    if name.kind == "reward" and value.startswith("builtin:") and value != BUILTIN_REWARD:
        return f", a builtin reward that is not there; the only one is {BUILTIN_REWARD}"
    if name.kind == "rows" or "/" in value or value.startswith(("builtin:", "pypi:")):
        return None
    hint = suggest(value, stages)
    if not hint and name.kind == "reward" and re.fullmatch(r"[\w.]+:\w+", value):
        hint = f"; a function is written {{function: {value.replace('.py:', ':')}}}"
    writers = [other.name for other in stages.values() if other.method not in (*FEEDBACK, "rm")]
    accepted = {
        "start": f"a stage ({', '.join(stages)}), a run directory or a model",
        "writer": f"a stage ({', '.join(writers)}), a run, a model, or {{url: ...}}",
        "reward": "an rm stage, a run, a directory, a hub id (owner/name) or {function: pkg.module:name}",
    }[name.kind]
    return f", which is neither a stage nor a path that exists{hint or f'; it must be {accepted}'}"


def check_circles(runs: Mapping[str, Section]) -> Iterator[Problem]:
    """Yield each stage that needs itself, through others or at once; the keys are marked as broken."""
    known = {*runs, *(run.name for run in runs.values())}
    needs = {
        name: {run.names.get(need, need): named for need, named in find_needs(run, known).items()}
        for name, run in runs.items()
    }
    while True:
        try:
            TopologicalSorter(needs).prepare()
            return
        except CycleError as error:
            _, *circle = reversed(error.args[1])  # each needs the next one, the last the first
            for place, name in enumerate(circle):
                way = [*circle[place:], *circle[:place], name]
                run, named = runs[name], needs[name].pop(way[1])
                if named.first not in run.broken:
                    run.broken.add(named.first)
                    chain = " -> ".join(runs[other].name for other in way)
                    yield Problem(f"{run.say(named.first)} goes round in a circle: {chain}", named.node.place)


def find_origins(parts: Mapping[str, Node]) -> dict[str, str]:
    """Find the place of every dotted key; one source under `data:` is also `data.0`, and one reward `reward.0`."""
    origins = {"name": "default", "seed": "default"}
    for path, child in (leaf for name, node in parts.items() for leaf in node.leaves((name,))):
        origins[".".join(path)] = child.place
        if path[-1] in (*SOURCE_KEYS, *REWARD_KEYS) and not isinstance(child.value, list):
            origins |= {".".join((*path, "0", *below)): leaf.place for below, leaf in child.leaves()}
    return origins
