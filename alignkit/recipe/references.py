"""What a recipe names: files, models, and stages that it starts from, is scored, judged or fed by.

Only names are looked at, and whether a path exists; nothing is downloaded, and a run is looked for when it is needed.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel

from alignkit.errors import Problem
from alignkit.recipe.check import show
from alignkit.recipe.nearest import suggest
from alignkit.recipe.schema import (
    BUILTIN_REWARD,
    EVALUATED,
    FEEDBACK,
    DataSource,
    FeedbackModel,
    RewardSource,
    StageOptions,
)
from alignkit.recipe.stage import Recipe
from alignkit.recipe.yaml import Node, expand

_LOCAL_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".ndjson", ".gz", ".zst", ".arrow", ".jinja")
# Sections and keys that hold paths; all else is taken literally.
_MODEL_PATHS = ("path", "tokenizer", "chat_template")
SOURCE_KEYS = ("data", "eval", "normalize_data", "mix", "check")
REWARD_KEYS = ("reward", "gold")
WRITER_KEYS = ("judge", "generator")
_FILE_KEYS = ("constitution", "examples", "replay")
_WORDS = ("none", "builtin")  # of `examples:`, beside files


@dataclass(frozen=True)
class Name:
    """A text of a section that names a file, a model or another stage."""

    key: str  # as written below the section: data.path, reward.judge
    node: Node
    kind: Literal["start", "weights", "rows", "reward", "writer", "file"]


def find_names(section: Node) -> list[Name]:
    """List what a stage, or `evaluate:`, names; the values may be wrong in any way."""
    values = section.value
    found: list[tuple[str, Node | None, Any]] = [("start_from", values.get("start_from"), "start")]
    found += [(key, values.get(key), "weights") for key in ("reference", "against")]
    for key in SOURCE_KEYS:
        found += _find_sources(key, values.get(key))
    for key in ("ptx", "helpful"):
        found += _find_sources(f"{key}.data", _entry(values.get(key), "data"))
    for key in REWARD_KEYS:
        for part in _items(values.get(key)):
            found.append((key, _entry(part, "model", short=True), "reward"))
            if judge := _entry(part, "judge"):
                found += [(f"{key}.judge", _entry(judge, "model", short=True), "writer"), *_find_files(f"{key}.", part)]
    for key in WRITER_KEYS:
        found.append((key, _entry(values.get(key), "model", short=True), "writer"))
        found += _find_files(f"{key}.", values.get(key))
    found += _find_files("", section)
    return [Name(key, node, kind) for key, node, kind in found if node is not None and isinstance(node.value, str)]


def _items(node: Node | None) -> list[Node]:
    """List the parts of a value that may be one or several."""
    return [] if node is None else node.value if isinstance(node.value, list) else [node]


def _entry(node: Node | None, key: str, *, short: bool = False) -> Node | None:
    """Find an entry of a mapping; with `short`, another value stands for that entry itself."""
    if node is None or not isinstance(node.value, dict):
        return node if short else None
    return node.value.get(key)


def _find_sources(key: str, node: Node | None) -> Iterator[tuple[str, Node | None, str]]:
    for item in _items(node):
        yield f"{key}.path" if isinstance(item.value, dict) else key, _entry(item, "path", short=True), "rows"


def _find_files(prefix: str, part: Node | None) -> Iterator[tuple[str, Node | None, str]]:
    """Yield what can only be files: constitutions, examples, replays."""
    for key in _FILE_KEYS:
        for item in _items(_entry(part, key)):
            if item.value not in _WORDS:
                yield f"{prefix}{key}", item, "file"


def resolve_paths(trees: Iterable[Node], stages: Iterable[tuple[str, Node]], names: Collection[str]) -> list[Problem]:
    """Make every path absolute, in place, and return what could not be resolved.

    `trees` are the recipe, once for each way in which its top level is swept; `stages` are sections with what messages
    call them; `names` are those of stages, which are left alone. Stages of one rlaif section share nodes: each is
    resolved once.
    """
    found: list[Name] = []
    for tree in trees:
        model = tree.value.get("model")
        found += [
            Name(f"model.{key}", node, "rows")
            for key in _MODEL_PATHS
            # a template that is no file is one of ours, by name
            if (node := _entry(model, key)) and (key != "chat_template" or str(node.value).endswith(".jinja"))
        ]
        found += [Name(*named) for key in SOURCE_KEYS for named in _find_sources(key, tree.value.get(key))]  # type: ignore[arg-type]
        stages = [*stages, ("evaluate", tree.value["evaluate"])] if "evaluate" in tree.value else stages
    for label, section in stages:
        if isinstance(section.value, dict):
            found += [Name(f"{label}.{name.key}", name.node, name.kind) for name in find_names(section)]
    problems = []
    for name in {id(name.node): name for name in reversed(found)}.values():
        is_name = name.node is not None and isinstance(name.node.value, str)
        if is_name and (name.node.value not in names or name.key.startswith("model.")):
            try:
                _resolve(name)
            except ValueError as error:
                problems.append(Problem(f"{name.key}: {error}", name.node.place))
    return problems


def _resolve(name: Name) -> None:
    """Make a path absolute; raises ValueError for a variable that cannot be used."""
    node = name.node
    if node.value.startswith("builtin:") or "://" in node.value:
        return
    text, here = expand(node.value), Path.cwd()
    for folder in (node.origin.folder, here):
        if os.path.exists(folder / text) or ("*" in text and glob.glob(str(folder / text), recursive=True)):
            node.value = os.path.abspath(folder / text)
            return
    # Runs and models that are not there yet are looked for below the working directory, files beside the recipe.
    if name.kind == "file" or _looks_local(text):
        node.value = os.path.abspath((node.origin.folder if name.kind in ("rows", "file") else here) / text)


def _looks_local(text: str) -> bool:
    """Tell a file or directory that is not there from a hub id (`name` or `owner/name`)."""
    return text.startswith((".", "/")) or text.lower().endswith(_LOCAL_SUFFIXES) or text.count("/") > 1 or "*" in text


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
            stage.broken.add(key)
            yield Problem(found, node.place)


def check_evaluated(evaluate: Node, stages: Collection[str]) -> Iterator[Problem]:
    """Yield what is wrong with the models that `evaluate:` names; `stages` holds the names of swept ones too."""
    for name in find_names(evaluate):
        value = name.node.value
        if name.key in EVALUATED and value not in stages and not {"/", ":"} & set(value):
            hint = suggest(value, stages) or f"; the stages are {', '.join(stages)}"
            what = f"evaluate.{name.key} is {show(name.node)}, which is neither a stage nor a path that exists{hint}"
            yield Problem(what, name.node.place)


def _find_problems(
    stage: StageLike, stages: Mapping[str, StageLike], groups: Mapping[str, object], sound: set[str]
) -> Iterator[tuple[str, Node, str]]:
    """Yield what is wrong with the names in a stage; `sound` are those from which no start_from leads in a circle."""
    for name in find_names(stage.node):
        node, first = name.node, name.key.split(".")[0]
        key = stage.say(name.key.removesuffix(".path"))
        if first in stage.broken or name.kind in ("file", "weights"):
            continue
        if name.kind == "start":
            in_group = node.value in groups
            found = (
                _describe_group(key, node.value, stages) if in_group else _describe_start(stage, node, stages, sound)
            )
        elif chain := _find_way(node.value, stage.name, stages):
            found = f"{stage.say(first)} goes round in a circle: {' -> '.join((stage.name, *chain))}"
        elif name.kind == "rows":
            found = _describe_rows(stage, key, node, stages) if node.value in stages else None
        else:
            found = (_describe_reward if name.kind == "reward" else _describe_feedback)(stage, key, node, stages)
        if found:
            yield first, node, found


def list_names(section: Node) -> list[tuple[str, Node]]:
    """List every node of a stage's section that may name another stage, with its first key."""
    return [(name.key.split(".")[0], name.node) for name in find_names(section) if name.kind not in ("file", "weights")]


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
    value = model.value
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
    source = stages[path.value]
    if source.name == stage.name:
        return f"{key} is {path.value}, the stage itself"
    if source.method not in FEEDBACK:
        return f"{key} is {path.value}, which trains a model and makes no rows; critique and label stages do"
    if source.method == "critique" and stage.method in ("rm", "dpo"):
        return (
            f"{key} is {path.value}, which makes prompts with one answer; {stage.method} compares: name a label stage"
        )
    return None


def _describe_reward(stage: StageLike, key: str, model: Node, stages: Mapping[str, StageLike]) -> str | None:
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


RUNS = "runs"
ROWS = "rows.jsonl"  # what a critique or label stage writes
_Options = TypeVar("_Options", bound=StageOptions)


@dataclass
class Pointed:
    """Options with every name of a stage replaced, and which path stands for which stage."""

    options: StageOptions
    rewards: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)


def point(recipe: Recipe, options: StageOptions) -> Pointed:
    """Return the options with stages of the recipe as the directories and files they make."""
    pointed = Pointed(options)

    def point_model(model: FeedbackModel) -> FeedbackModel:
        if model.model is None:
            return model
        return model.model_copy(update={"model": find_model(recipe, model.model, pointed.sources)})

    def point_source(source: DataSource) -> DataSource:
        section = recipe.stages.get(source.path)
        if section is None or section.options.method not in FEEDBACK:
            return source
        path = f"{RUNS}/{recipe.name}/{source.path}/{ROWS}"
        pointed.sources[path] = source.path
        return source.model_copy(update={"path": path})

    def point_reward(reward: RewardSource) -> RewardSource:
        if reward.model is None:
            return reward
        return reward.model_copy(update={"model": find_model(recipe, reward.model, pointed.rewards)})

    options = _replace(options, FeedbackModel, point_model)
    options = _replace(options, DataSource, point_source)
    options = _replace(options, RewardSource, point_reward)
    pointed.options = options
    return pointed


def find_model(recipe: Recipe, name: str, found: dict[str, str] | None = None) -> str:
    """Return the model directory of a stage or a run, anything else as it is; note in `found` what is a stage's."""
    if name not in recipe.stages:
        return find_weights(name)
    directory = f"{RUNS}/{recipe.name}/{name}/model"
    if found is not None:
        found[directory] = name
    return directory


def find_weights(path: str) -> str:
    """Return the model/ of a run directory; anything else is a model itself."""
    return os.path.join(path, "model") if os.path.isfile(os.path.join(path, "stage.json")) else path


_Model = TypeVar("_Model", bound=BaseModel)
_Part = TypeVar("_Part", bound=BaseModel)


def _replace(model: _Model, kind: type[_Part], change: Callable[[_Part], _Part]) -> _Model:
    """Return a copy with `change` done to every part of a kind, at whatever depth."""
    update = {}
    for key in type(model).model_fields:
        value = getattr(model, key)
        changed = _change(value, kind, change)
        if changed is not value:
            update[key] = changed
    return model.model_copy(update=update) if update else model


def _change(value: object, kind: type[_Part], change: Callable[[_Part], _Part]) -> object:
    if isinstance(value, kind):
        value = change(value)
    if isinstance(value, BaseModel):
        return _replace(value, kind, change)
    if isinstance(value, list):
        items = [_change(item, kind, change) for item in value]
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return value
