"""What stages of a recipe say of each other: that they start from, are scored, judged or fed by what is there.

Only names are looked at; whether a run of that name exists is found out when it is needed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Protocol

from alignkit.errors import Problem
from alignkit.recipe.check import show
from alignkit.recipe.nearest import suggest
from alignkit.recipe.paths import REWARD_KEYS, SOURCE_KEYS, list_feedback, list_models, list_source_paths
from alignkit.recipe.schema import BUILTIN_REWARD, EVALUATED, FEEDBACK
from alignkit.recipe.tree import Node


class StageLike(Protocol):
    """What is needed of a stage: `broken` are keys whose value cannot be relied on."""

    name: str
    method: str
    node: Node
    broken: set[str]

    def say(self, key: str) -> str: ...


def check_references(
    checked: Iterable[StageLike], stages: Mapping[str, StageLike], groups: Mapping[str, object]
) -> Iterator[Problem]:
    """Yield what is wrong with the names by which stages call others; the keys are marked as broken."""
    sound: set[str] = set()
    for stage in checked:
        for key, node, found in _find_problems(stage, stages, groups, sound):
            stage.broken.add(key.split(".")[0])
            yield Problem(found, node.place)


def check_evaluated(evaluate: Node, stages: Collection[str]) -> Iterator[Problem]:
    """Yield what is wrong with the models that `evaluate:` names; `stages` holds the names of swept ones too."""
    for key in EVALUATED:
        node = evaluate.value.get(key)
        if node is not None and isinstance(node.value, dict):
            node = node.value.get("model")
        if node is None or not isinstance(node.value, str):
            continue
        if node.value not in stages and not {"/", ":"} & set(node.value):
            hint = suggest(node.value, stages) or f"; the stages are {', '.join(stages)}"
            what = f"evaluate.{key} is {show(node)}, which is neither a stage nor a path that exists{hint}"
            yield Problem(what, node.place)


def _find_problems(
    stage: StageLike, stages: Mapping[str, StageLike], groups: Mapping[str, object], sound: set[str]
) -> Iterator[tuple[str, Node, str]]:
    """Yield what is wrong with the names in a stage; `sound` are those from which no start_from leads in a circle."""
    for key in REWARD_KEYS if stage.method == "ppo" else ():
        for model in list_models(stage.node.value.get(key)) if key not in stage.broken else ():
            if found := _describe_reward(stage.say(key), model, stages):
                yield key, model, found
    for key, model in list_feedback(stage.node):
        if key.split(".")[0] not in stage.broken and (found := _describe_feedback(stage, key, model, stages)):
            yield key, model, found
    for key in SOURCE_KEYS:
        for path, _ in list_source_paths(stage.node.value.get(key)) if key not in stage.broken else ():
            if path.value in stages and (found := _describe_rows(stage, key, path, stages)):
                yield key, path, found
    for key, node in list_names(stage.node):
        if key != "start_from" and key not in stage.broken and (chain := _find_way(node.value, stage.name, stages)):
            yield key, node, f"{stage.say(key)} goes round in a circle: {' -> '.join((stage.name, *chain))}"
    start = stage.node.value.get("start_from")
    if start is None or "start_from" in stage.broken or not isinstance(start.value, str):
        return
    if start.value in groups:
        yield "start_from", start, _describe_group(stage.say("start_from"), start.value, stages)
    elif found := _describe_start(stage, start, stages, sound):
        yield "start_from", start, found


def list_names(section: Node) -> list[tuple[str, Node]]:
    """Return every node of a stage's section that may name another stage, with its first key."""
    values = section.value
    named = [("start_from", values["start_from"])] if "start_from" in values else []
    named += [(key, path) for key in SOURCE_KEYS for path, _ in list_source_paths(values.get(key))]
    for key in ("ptx", "helpful"):
        part = values.get(key)
        if part is not None and isinstance(part.value, dict):
            named += [(key, path) for path, _ in list_source_paths(part.value.get("data"))]
    named += [(key, model) for key in REWARD_KEYS for model in list_models(values.get(key))]
    return named + [(key.split(".")[0], model) for key, model in list_feedback(section)]


def _find_way(start: str, end: str, stages: Mapping[str, StageLike]) -> list[str]:
    """Return the stages on a way from one that needs others to one of these, both ends included; [] when none is."""
    ways, seen = [[start]], {start}
    while ways:
        way = ways.pop()
        if way[-1] == end and len(way) > 1:
            return way
        for _, node in list_names(stages[way[-1]].node) if way[-1] in stages else ():
            if isinstance(node.value, str) and (node.value not in seen or node.value == end):
                seen.add(node.value)
                ways.append([*way, node.value])
    return []


def _describe_group(key: str, group: str, stages: Mapping[str, StageLike]) -> str:
    named = [name for name, stage in stages.items() if name.startswith(f"{group}-") and stage.method not in FEEDBACK]
    return f"{key} is {group}, which stands for several stages; name one of them: {', '.join(named)}"


def _describe_feedback(stage: StageLike, key: str, model: Node, stages: Mapping[str, StageLike]) -> str | None:
    key, value = stage.say(key), model.value
    if value in stages:
        if stages[value].method == "rm":
            return f"{key} is {value}, a reward model, which cannot write or choose; name a language model"
        if stages[value].method in FEEDBACK:
            return f"{key} is {value}, which trains no model; name a stage that does"
        if value == stage.name:
            return f"{key} is {value}, the stage itself"
        return None
    if "/" in value or value.startswith("builtin:"):
        return None
    hint = suggest(value, stages) or f"; it must be a stage ({_list(stages)}), a run, a model, or {{url: ...}}"
    return f"{key} is {show(model)}, which is neither a stage nor a path that exists{hint}"


def _list(stages: Mapping[str, StageLike]) -> str:
    return ", ".join(name for name, stage in stages.items() if stage.method not in (*FEEDBACK, "rm"))


def _describe_rows(stage: StageLike, key: str, path: Node, stages: Mapping[str, StageLike]) -> str | None:
    key, source = stage.say(key), stages[path.value]
    if source.name == stage.name:
        return f"{key} is {path.value}, the stage itself"
    if source.method not in FEEDBACK:
        return f"{key} is {path.value}, which trains a model and makes no rows; critique and label stages do"
    if source.method == "critique" and stage.method in ("rm", "dpo"):
        return (
            f"{key} is {path.value}, which makes prompts with one answer; {stage.method} compares: name a label stage"
        )
    return None


def _describe_reward(key: str, model: Node, stages: Mapping[str, StageLike]) -> str | None:
    value = model.value
    if value in stages:
        return None if stages[value].method == "rm" else f"{key} is {value}, which is not an rm stage; name one"
    if value.startswith("builtin:"):
        known = f"; the only one is {BUILTIN_REWARD}"
        return None if value == BUILTIN_REWARD else f"{key} is {show(model)}, a builtin reward that is not there{known}"
    if "/" in value:
        return None
    hint = suggest(value, stages)
    if not hint and re.fullmatch(r"[\w.]+:\w+", value):
        hint = f"; a function is written {{function: {value}}}"
    hint = hint or "; it must be an rm stage, a run, a directory, a hub id (owner/name) or {function: pkg.module:name}"
    return f"{key} is {show(model)}, which is neither a stage nor a path that exists{hint}"


def _describe_start(stage: StageLike, start: Node, stages: Mapping[str, StageLike], sound: set[str]) -> str | None:
    key, value = stage.say("start_from"), start.value
    if value in stages:
        chain = {stage.name: None}
        while value in stages and value not in sound:
            if value in chain:
                way = " -> ".join((*chain, value))
                return f"{key} goes round in a circle: {way}" if value == stage.name else None
            chain[value] = None
            following = stages[value].node.value.get("start_from")
            value = following.value if following is not None and isinstance(following.value, str) else None
        sound.update(chain)
        if stages[start.value].method in FEEDBACK:
            return f"{key} is {start.value}, which trains no model; name a stage that does"
        if stages[start.value].method == "rm" and stage.method != "rm":
            return f"{key} is {start.value}, a reward model; a {stage.method} stage starts from a language model"
        return None
    if "/" in value or value.startswith("builtin:"):
        return None
    hint = suggest(value, stages) or f"; it must be a stage ({', '.join(stages)}), a run directory or a model"
    return f"{key} is {show(start)}, which is neither a stage nor a path that exists{hint}"
