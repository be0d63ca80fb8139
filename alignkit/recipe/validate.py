"""A merged tree held against everything a recipe may say, and turned into a Recipe.

All problems are collected before anything is raised. Rules between options are in `audit`; nothing here looks at
data, models or devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.errors import Problem, RecipeError
from alignkit.recipe.advice import describe_unknown_in_stage, explain_moved
from alignkit.recipe.audit import Section, audit_recipe, audit_stage
from alignkit.recipe.check import check, quote_help, show
from alignkit.recipe.fields import method_fields
from alignkit.recipe.nearest import suggest
from alignkit.recipe.paths import REWARD_KEYS, SOURCE_KEYS, resolve_paths
from alignkit.recipe.recipe import Recipe, StageSection
from alignkit.recipe.references import check_references
from alignkit.recipe.rlaif import METHOD as RLAIF
from alignkit.recipe.schema import FEEDBACK, OPTIONS, RecipeOptions, option_fragments, recipe_fragments
from alignkit.recipe.secrecy import find_secrets
from alignkit.recipe.sections import (
    METHODS,
    Group,
    StageTree,
    describe_not_a_stage,
    find_inherited,
    read_method,
    split_group,
)
from alignkit.recipe.tree import Node


def build_recipe(tree: Node, *, path: Path, label: str, problems: Sequence[Problem] = ()) -> Recipe:
    """Return the validated recipe; raises RecipeError with these and all further problems, sorted by place."""
    build = _Build(tree, list(problems))
    build.refuse_secrets()
    build.split()
    nodes = {name: stage.node for name, stage in build.stages.items()}
    build.problems += resolve_paths(tree, nodes, {name: stage.label for name, stage in build.stages.items()})
    build.check_top()
    for group in build.groups.values():
        build.check_group(group)
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
class _Build:
    tree: Node
    problems: list[Problem]
    stages: dict[str, StageTree] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)

    def refuse_secrets(self) -> None:
        """Report secrets and take them out, so that no other message shows them."""
        found = find_secrets(self.tree)
        self.problems += [problem for _, problem in found]
        _remove(self.tree, {id(node) for node, _ in found})

    def split(self) -> None:
        """Tell stage sections from the recipe's own keys; report keys that are neither."""
        known = recipe_fragments()["properties"]
        taken = self.tree.value.keys()
        for name, node in self.tree.value.items():
            if name in known:
                continue
            if problem := describe_not_a_stage(name, node):
                self.problems.append(Problem(problem, node.place))
                self.broken.add(name)
            elif read_method(name, node) == RLAIF:
                group = self.groups[name] = split_group(name, node)
                self.problems += [Problem(what, node.place) for what in group.find_clashes(taken)]
                self.stages |= {stage.name: stage for stage in group.stages if stage.name not in taken}
            else:
                self.stages[name] = StageTree(name, read_method(name, node), node)
        if not self.stages and not self.problems:
            self.problems.append(Problem(f"there is no stage; add a section such as {METHODS}", self.tree.place))

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

    def check_group(self, group: Group) -> None:
        """Check the keys of an rlaif section itself; those of its steps are checked with their stages."""
        fragments = option_fragments(RLAIF)
        own = fragments["properties"]
        for key, node in group.node.value.items():
            if key not in own:
                accepted = [*own]
                what = describe_unknown_in_stage(key, stage=group.name, method=RLAIF, accepted=accepted)
                self.problems.append(Problem(what, node.place))
            else:
                found = list(check(node, own[key], f"{group.name}.{key}", fragments["$defs"]))
                self.problems += found
                if found:
                    group.mark_broken(key)
        inherited = find_inherited(self.tree, RLAIF)
        for key in sorted(group.find_missing({*fragments["required"]} - inherited.keys())):
            self.problems.append(Problem(f"{group.name}.{key} is missing; {quote_help(own[key])}", group.node.place))
            group.mark_broken(key)
        for key, what in group.find_unused():
            self.problems.append(Problem(f"{group.name}.{key} {what}", group.place(key)))

    def check_stage(self, stage: StageTree) -> None:
        fragments = option_fragments(stage.method)
        own, fields = fragments["properties"], method_fields(stage.method)
        for key, node in stage.node.value.items():
            if key in own:
                found = list(check(node, own[key], stage.say(key), fragments.get("$defs", {})))
            elif key in fields:
                found = list(check(node, fields[key], stage.say(key), {}))
            else:
                accepted = [*own, *fields]
                what = describe_unknown_in_stage(key, stage=stage.label, method=stage.method, accepted=accepted)
                found = [Problem(what, node.place)]
            self.problems += found
            if found:
                stage.broken.add(key)
        given = {*stage.node.value, *find_inherited(self.tree, stage.method), *stage.broken}
        if stage.needs_data and "data" not in given:
            work = "work" if stage.method in FEEDBACK else "train"
            help_text = f"add the rows to {work} on, here or as the recipe's own `data:`"
            self.problems.append(Problem(f"{stage.say('data')} is missing; {help_text}", stage.node.place))
            stage.broken.add("data")
        for key in sorted({*fragments.get("required", ())} - {"data", "method", *stage.node.value, *stage.broken}):
            self.problems.append(Problem(f"{stage.say(key)} is missing; {quote_help(own[key])}", stage.node.place))
            stage.broken.add(key)

    def check_references(self) -> None:
        """Check that `stages:` and whatever names a stage name one that is there, and that nothing goes in circles."""
        listed = self.tree.value.get("stages")
        names = (*self.groups, *self.stages)
        for item in listed.value or () if listed is not None and "stages" not in self.broken else ():
            if item.value not in names:
                hint = suggest(str(item.value), names) or f"; there are {', '.join(names)}"
                self.problems.append(Problem(f"stages names {show(item)}, which is not a stage here{hint}", item.place))
        self.problems += check_references(self.stages, self.groups)


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
    top = RecipeOptions.model_validate(_plain_without(tree, {*build.stages, *build.groups}))
    groups = {key: tuple(stage.name for stage in group.stages) for key, group in build.groups.items()}
    listed = [name for item in top.stages or () for name in groups.get(item, (item,))]
    origins = {"name": "default", "seed": "default"}
    for key, node in tree.value.items():
        if key not in build.stages and key not in groups:
            origins |= _find_origins(node, key)
    sections = {}
    for stage_name in dict.fromkeys((*listed, *build.stages)):
        stage = build.stages[stage_name]
        section = stage.section(tree)
        options = {key: value for key, value in section.values.items() if key in OPTIONS[stage.method].model_fields}
        trainer = {key: value for key, value in section.values.items() if key not in options}
        if stage.method == "dpo" and isinstance(trainer.get("loss_type"), str):
            trainer["loss_type"] = [trainer["loss_type"]]
        made = OPTIONS[stage.method].model_validate({**options, "method": stage.method})
        sections[stage_name] = StageSection(stage_name, made, trainer, stage.group)
        origins |= _find_origins(section.node, stage_name)
    return Recipe(
        name=top.name or name,
        path=label,
        seed=top.seed,
        model=top.model,
        lora=top.lora,
        launch=top.launch,
        evaluate=top.evaluate,
        evaluates="evaluate" in tree.value,
        stages=sections,
        order=tuple(dict.fromkeys(listed or build.stages)),
        origins=origins,
        groups=groups,
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
