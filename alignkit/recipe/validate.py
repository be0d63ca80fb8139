"""A merged tree held against everything a recipe may say, and turned into a Recipe.

All problems are collected before anything is raised. Rules between options are in `audit`; nothing here looks at
data, models or devices.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.errors import Problem, RecipeError
from alignkit.recipe.advice import describe_unknown_in_stage, describe_unknown_top, explain_moved
from alignkit.recipe.audit import Section, audit_recipe, audit_stage
from alignkit.recipe.check import check, quote_help, show, show_key
from alignkit.recipe.fields import method_fields
from alignkit.recipe.nearest import suggest
from alignkit.recipe.paths import REWARD_KEYS, SOURCE_KEYS, list_models, resolve_paths
from alignkit.recipe.recipe import Recipe, StageSection
from alignkit.recipe.schema import BUILTIN_REWARD, OPTIONS, RecipeOptions, option_fragments, recipe_fragments
from alignkit.recipe.secrecy import find_secrets
from alignkit.recipe.tree import Node

INHERITED = ("data", "eval")  # a stage that gives none takes the recipe's
_METHODS = ", ".join(OPTIONS)


def build_recipe(tree: Node, *, path: Path, label: str, problems: Sequence[Problem] = ()) -> Recipe:
    """Return the validated recipe; raises RecipeError with these and all further problems, sorted by place."""
    build = _Build(tree, list(problems))
    build.refuse_secrets()
    build.split()
    build.problems += resolve_paths(tree, {name: stage.node for name, stage in build.stages.items()})
    build.check_top()
    for stage in build.stages.values():
        build.check_stage(stage)
    build.check_references()
    sections = {name: stage.section(tree) for name, stage in build.stages.items()}
    top = Section("", "", _plain_without(tree, build.broken), frozenset(build.broken), tree)
    for section in sections.values():
        build.problems += audit_stage(section, top)
    build.problems += audit_recipe(top, sections)
    if build.problems:
        raise RecipeError(_sort(build.problems, label))
    return _construct(tree, build, name=path.stem, label=label)


@dataclass
class _StageTree:
    """A stage section while it is checked; `broken` are keys whose value cannot be relied on."""

    name: str
    method: str
    node: Node
    broken: set[str] = field(default_factory=set)

    def section(self, tree: Node) -> Section:
        node = Node({**_find_inherited(tree), **self.node.value}, self.node.origin, self.node.line)
        return Section(self.name, self.method, _plain_without(node, self.broken), frozenset(self.broken), node)


@dataclass
class _Build:
    tree: Node
    problems: list[Problem]
    stages: dict[str, _StageTree] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)

    def refuse_secrets(self) -> None:
        """Report secrets and take them out, so that no other message shows them."""
        found = find_secrets(self.tree)
        self.problems += [problem for _, problem in found]
        _remove(self.tree, {id(node) for node, _ in found})

    def split(self) -> None:
        """Tell stage sections from the recipe's own keys; report keys that are neither."""
        known = recipe_fragments()["properties"]
        for name, node in self.tree.value.items():
            if name in known:
                continue
            problem = self._describe_not_a_stage(name, node)
            if problem:
                self.problems.append(Problem(problem, node.place))
                self.broken.add(name)
            else:
                method = node.value.get("method")
                self.stages[name] = _StageTree(name, method.value if method else name, node)
        if not self.stages and not self.problems:
            self.problems.append(Problem(f"there is no stage; add a section such as {_METHODS}", self.tree.place))

    def _describe_not_a_stage(self, name: str, node: Node) -> str | None:
        is_mapping = isinstance(node.value, dict)
        method = node.value.get("method") if is_mapping else None
        if name in OPTIONS and not is_mapping:
            return f"{name} is {show(node)}; a stage is a mapping with at least `data:`"
        if name in OPTIONS and method is not None and method.value != name:
            article = "a" if name == "dpo" else "an"
            return (
                f"{name}.method is {show(method)}; a section named {name} is {article} {name} stage: "
                "take method out, or rename the section"
            )
        if name in OPTIONS or (method is not None and method.value in list(OPTIONS)):
            good = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) and "." not in name
            return None if good else f"stage {show_key(name)}: use letters, digits, '_' and '-' in a stage's name only"
        if method is not None:
            nearest = suggest(method.value, OPTIONS) if isinstance(method.value, str) else ""
            return f"{show_key(name)}.method is {show(method)}; it must be one of {_METHODS}{nearest}"
        return describe_unknown_top(name, is_mapping=is_mapping)

    def check_top(self) -> None:
        fragments = recipe_fragments()
        for name, fragment in fragments["properties"].items():
            if name in self.tree.value:
                node = self.tree.value[name]
                if name == "lora" and node.value is None:
                    found = [Problem("lora is empty; write {} for its defaults, or take the key out", node.place)]
                else:
                    found = [explain_moved(problem) for problem in check(node, fragment, name, fragments["$defs"])]
                self.problems += found
                if found:
                    self.broken.add(name)
        if "model" not in self.tree.value:
            self.problems.append(Problem("model is missing; add `model: {path: ...}`", self.tree.place))
            self.broken.add("model")

    def check_stage(self, stage: _StageTree) -> None:
        fragments = option_fragments(stage.method)
        own, fields = fragments["properties"], method_fields(stage.method)
        for key, node in stage.node.value.items():
            name = f"{stage.name}.{key}"
            if key in own:
                found = list(check(node, own[key], name, fragments.get("$defs", {})))
            elif key in fields:
                found = list(check(node, fields[key], name, {}))
            else:
                found = [
                    Problem(
                        describe_unknown_in_stage(key, stage=stage.name, method=stage.method, accepted=[*own, *fields]),
                        node.place,
                    )
                ]
            self.problems += found
            if found:
                stage.broken.add(key)
        if "data" not in stage.node.value and "data" not in _find_inherited(self.tree):
            help_text = "add the rows to train on, here or as the recipe's own `data:`"
            self.problems.append(Problem(f"{stage.name}.data is missing; {help_text}", stage.node.place))
            stage.broken.add("data")
        for key in sorted({*fragments.get("required", ())} - {"data", "method", *stage.node.value}):
            self.problems.append(Problem(f"{stage.name}.{key} is missing; {quote_help(own[key])}", stage.node.place))
            stage.broken.add(key)

    def check_references(self) -> None:
        """Check that `stages:` and every `start_from` name what is there, and that nothing starts from itself."""
        listed = self.tree.value.get("stages")
        for item in listed.value or () if listed is not None and "stages" not in self.broken else ():
            if item.value not in self.stages:
                hint = suggest(str(item.value), self.stages) or f"; there are {', '.join(self.stages)}"
                self.problems.append(Problem(f"stages names {show(item)}, which is not a stage here{hint}", item.place))
        for stage in self.stages.values():
            for key in REWARD_KEYS:
                self._check_rewards(stage, key)
            start = stage.node.value.get("start_from")
            if start is None or "start_from" in stage.broken or start.value is None:
                continue
            problem = _describe_start(stage, start, self.stages)
            if problem:
                self.problems.append(Problem(problem, start.place))
                stage.broken.add("start_from")

    def _check_rewards(self, stage: _StageTree, key: str) -> None:
        """Check that `reward:` and `gold:` name rm stages, or something that can only be a path or a hub id."""
        if key in stage.broken or stage.method != "ppo":
            return
        for model in list_models(stage.node.value.get(key)):
            problem = _describe_reward(f"{stage.name}.{key}", model, self.stages)
            if problem:
                self.problems.append(Problem(problem, model.place))
                stage.broken.add(key)


def _describe_reward(key: str, model: Node, stages: dict[str, _StageTree]) -> str | None:
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


def _describe_start(stage: _StageTree, start: Node, stages: dict[str, _StageTree]) -> str | None:
    key, value = f"{stage.name}.start_from", start.value
    if value in stages:
        chain = [stage.name]
        while value in stages:
            chain.append(value)
            if value in chain[:-1]:
                return f"{key} goes round in a circle: {' -> '.join(chain)}" if value == stage.name else None
            following = stages[value].node.value.get("start_from")
            value = following.value if following is not None and isinstance(following.value, str) else None
        if stages[start.value].method == "rm" and stage.method != "rm":
            return f"{key} is {start.value}, a reward model; a {stage.method} stage starts from a language model"
        return None
    if "/" in value or value.startswith("builtin:"):
        return None
    hint = suggest(value, stages) or f"; it must be a stage ({', '.join(stages)}), a run directory or a model"
    return f"{key} is {show(start)}, which is neither a stage nor a path that exists{hint}"


def _find_inherited(tree: Node) -> dict[str, Node]:
    return {key: tree.value[key] for key in INHERITED if key in tree.value and tree.value[key].value is not None}


def _remove(node: Node, ids: set[int]) -> None:
    if isinstance(node.value, dict):
        node.value = {key: child for key, child in node.value.items() if id(child) not in ids}
        children: Iterator[Node] = iter(node.value.values())
    else:
        children = iter(node.value if isinstance(node.value, list) else ())
    for child in children:
        _remove(child, ids)


def _plain_without(node: Node, broken: set[str]) -> dict[str, Any]:
    return {key: child.plain() for key, child in node.value.items() if key not in broken}


def _sort(problems: list[Problem], label: str) -> list[Problem]:
    """Order by file (the recipe itself first) and line; what came from the command line is last."""

    def rank(problem: Problem) -> tuple[bool, bool, str, int]:
        where = problem.where or ""
        file, _, line = where.rpartition(":")
        return where.startswith("--"), file != label, file, int(line) if line.isdecimal() else 0

    return sorted(dict.fromkeys(problems), key=rank)


def _construct(tree: Node, build: _Build, *, name: str, label: str) -> Recipe:
    top = RecipeOptions.model_validate(_plain_without(tree, set(build.stages)))
    order = [*(top.stages or ()), *build.stages]
    origins = {"name": "default", "seed": "default"}
    for key, node in tree.value.items():
        if key not in build.stages:
            origins |= _find_origins(node, key)
    sections = {}
    for stage_name in dict.fromkeys(order):
        stage = build.stages[stage_name]
        section = stage.section(tree)
        options = {key: value for key, value in section.values.items() if key in OPTIONS[stage.method].model_fields}
        trainer = {key: value for key, value in section.values.items() if key not in options}
        if stage.method == "dpo" and isinstance(trainer.get("loss_type"), str):
            trainer["loss_type"] = [trainer["loss_type"]]
        made = OPTIONS[stage.method].model_validate({**options, "method": stage.method})
        sections[stage_name] = StageSection(stage_name, made, trainer)
        origins |= _find_origins(section.node, stage_name)
    return Recipe(
        name=top.name or name,
        path=label,
        seed=top.seed,
        model=top.model,
        lora=top.lora,
        launch=top.launch,
        evaluate=top.evaluate,
        stages=sections,
        order=tuple(dict.fromkeys(top.stages or build.stages)),
        origins=origins,
    )


def _find_origins(node: Node, key: str) -> dict[str, str]:
    """Return the place of every dotted key; one source under `data:` is also `data.0`, as in the options, and one
    reward `reward.0`."""
    origins = {}
    for path, child in node.leaves((key,)):
        origins[".".join(path)] = child.place
        if path[-1] in (*SOURCE_KEYS, *REWARD_KEYS) and not isinstance(child.value, list):
            origins |= {".".join((*path, "0", *below)): leaf.place for below, leaf in child.leaves()}
    return origins
