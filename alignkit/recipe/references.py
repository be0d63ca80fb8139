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
from typing import Protocol, TypeVar

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
    PpoOptions,
    RewardSource,
    StageOptions,
)
from alignkit.recipe.stage import Recipe
from alignkit.recipe.yaml import Node, expand

_LOCAL_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".ndjson", ".gz", ".zst", ".arrow", ".jinja")
# Sections and keys that hold paths; all else is taken literally.
_MODEL_PATHS = ("path", "tokenizer")
SOURCE_KEYS = ("data", "eval", "normalize_data", "mix", "check")
REWARD_KEYS = ("reward", "gold")
FEEDBACK_KEYS = ("judge", "generator")
_FILE_KEYS = ("constitution", "examples", "replay")
_WORDS = ("none", "builtin")  # of `examples:`, beside files


def resolve_paths(trees: Iterable[Node], stages: Iterable[tuple[str, Node]], names: Collection[str]) -> list[Problem]:
    """Resolve every path in place and return what could not be resolved.

    `trees` are the recipe, once for each way in which its top level is swept; `stages` are sections with what messages
    call them; `names` are those of stages, which are left alone.
    """
    resolver = _Resolver(names)
    for tree in trees:
        _resolve_top(resolver, tree)
    for label, section in stages:
        if isinstance(section.value, dict):
            resolver.resolve_stage(section, label)
    return resolver.problems


def _resolve_top(resolver: _Resolver, tree: Node) -> None:
    model = tree.value.get("model")
    if model and isinstance(model.value, dict):
        for key in _MODEL_PATHS:
            resolver.resolve(model.value.get(key), f"model.{key}")
        template = model.value.get("chat_template")
        if template and str(template.value).endswith(".jinja"):  # else one of ours, by name
            resolver.resolve(template, "model.chat_template")
    for key in SOURCE_KEYS:
        resolver.resolve_sources(tree.value.get(key), key)
    evaluate = tree.value.get("evaluate")
    if evaluate is not None and isinstance(evaluate.value, dict):
        resolver.resolve_evaluation(evaluate)


class _Resolver:
    """Resolves nodes, each once: stages of one rlaif section share what the section says."""

    def __init__(self, stages: Collection[str]) -> None:
        self.problems: list[Problem] = []
        self._stages = stages
        self._done: set[int] = set()

    def resolve_stage(self, section: Node, name: str) -> None:
        values = section.value
        for key in SOURCE_KEYS:
            self.resolve_sources(values.get(key), f"{name}.{key}")
        for key in ("ptx", "helpful"):
            part = values.get(key)
            if part is not None and isinstance(part.value, dict):
                self.resolve_sources(part.value.get("data"), f"{name}.{key}.data")
        for key in REWARD_KEYS:
            for model in list_models(values.get(key)):
                self.resolve_weights(model, f"{name}.{key}")
            for reward in list_judged(values.get(key)):
                self.resolve_files(reward, f"{name}.{key}")
        for key, model in list_feedback(section):
            self.resolve_weights(model, f"{name}.{key}")
        for key in FEEDBACK_KEYS:
            self.resolve_files(values.get(key), f"{name}.{key}")
        self.resolve_files(section, name)
        self.resolve_weights(values.get("start_from"), f"{name}.start_from")

    def resolve_evaluation(self, section: Node) -> None:
        values = section.value
        self.resolve_sources(values.get("data"), "evaluate.data")
        for key in ("reference", "reward", "against"):
            self.resolve_weights(values.get(key), f"evaluate.{key}")
        for key, model in list_feedback(section):
            self.resolve_weights(model, f"evaluate.{key}")
        self.resolve_files(section, "evaluate")

    def resolve_weights(self, node: Node | None, key: str) -> None:
        """Resolve what names a stage, a directory or a hub id; runs are looked for below the working directory."""
        if node is not None and isinstance(node.value, str) and node.value not in self._stages:
            self.resolve(node, key, missing_from=Path.cwd())

    def resolve_sources(self, node: Node | None, key: str) -> None:
        """Resolve the path of each source of `data:` or `eval:` in any of its shapes."""
        for path, at_path in list_source_paths(node):
            if path.value not in self._stages:
                self.resolve(path, f"{key}.path" if at_path else key)

    def resolve_files(self, part: Node | None, key: str) -> None:
        """Resolve the keys of a mapping that can only be files: constitutions, examples, replays."""
        if part is None or not isinstance(part.value, dict):
            return
        for name in _FILE_KEYS:
            node = part.value.get(name)
            for item in node.value if node is not None and isinstance(node.value, list) else [node]:
                if item is not None and item.value not in _WORDS:
                    self.resolve(item, f"{key}.{name}", only_file=True)

    def resolve(
        self, node: Node | None, key: str, *, missing_from: Path | None = None, only_file: bool = False
    ) -> None:
        if node is None or not isinstance(node.value, str) or node.value.startswith("builtin:") or "://" in node.value:
            return
        if id(node) in self._done:
            return
        self._done.add(id(node))
        try:
            text = expand(node.value)
        except ValueError as error:
            self.problems.append(Problem(f"{key}: {error}", node.place))
            return
        for folder in (node.origin.folder, Path.cwd()):
            if os.path.exists(folder / text) or ("*" in text and glob.glob(str(folder / text), recursive=True)):
                node.value = os.path.abspath(folder / text)
                return
        if only_file or _looks_local(text):
            node.value = os.path.abspath((missing_from or node.origin.folder) / text)


def list_source_paths(node: Node | None) -> list[tuple[Node, bool]]:
    """Return the nodes of `data:`, in any of its shapes, that name a source, and whether each is under `path:`."""
    if node is None:
        return []
    items = [
        (item.value.get("path"), True) if isinstance(item.value, dict) else (item, False)
        for item in (node.value if isinstance(node.value, list) else [node])
    ]
    return [(item, at_path) for item, at_path in items if item is not None and isinstance(item.value, str)]


def list_feedback(section: Node) -> list[tuple[str, Node]]:
    """Return key and node of each model that a section names as judge or generator, those of rewards included."""
    named = [(key, section.value.get(key)) for key in FEEDBACK_KEYS]
    for key in REWARD_KEYS:
        named += [(f"{key}.judge", reward.value.get("judge")) for reward in list_judged(section.value.get(key))]
    models = [(key, _read_model(node)) for key, node in named if node is not None]
    return [(key, model) for key, model in models if model is not None and isinstance(model.value, str)]


def list_judged(node: Node | None) -> list[Node]:
    """Return the parts of `reward:` or `gold:` that are mappings with a judge."""
    items = [] if node is None else node.value if isinstance(node.value, list) else [node]
    return [item for item in items if isinstance(item.value, dict) and "judge" in item.value]


def _read_model(node: Node) -> Node | None:
    return node.value.get("model") if isinstance(node.value, dict) else node


def list_models(node: Node | None) -> list[Node]:
    """Return the nodes of `reward:` or `gold:`, in any of its shapes, that name a model or a stage."""
    if node is None:
        return []
    items = [item.value.get("model") if isinstance(item.value, dict) else item
             for item in (node.value if isinstance(node.value, list) else [node])]  # fmt: skip
    return [item for item in items if item is not None and isinstance(item.value, str)]


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
    for key in REWARD_KEYS if stage.method in ("ppo", "label") else ():
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
    if isinstance(options, PpoOptions):
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
