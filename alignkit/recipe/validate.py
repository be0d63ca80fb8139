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
from alignkit.recipe.audit import Section, audit_evaluation, audit_recipe, audit_stage
from alignkit.recipe.axes import KEY as SWEEP
from alignkit.recipe.axes import read_axes
from alignkit.recipe.check import check, quote_help, show
from alignkit.recipe.construct import construct
from alignkit.recipe.fields import method_fields
from alignkit.recipe.nearest import suggest
from alignkit.recipe.paths import resolve_paths
from alignkit.recipe.recipe import Recipe
from alignkit.recipe.references import check_evaluated, check_references
from alignkit.recipe.rlaif import METHOD as RLAIF
from alignkit.recipe.schema import FEEDBACK, option_fragments, recipe_fragments
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
from alignkit.recipe.sweep import Sweep, spread
from alignkit.recipe.tree import Node


def build_recipe(tree: Node, *, path: Path, label: str, problems: Sequence[Problem] = ()) -> Recipe:
    """Return the validated recipe; raises RecipeError with these and all further problems, sorted by place."""
    if (model := tree.value.get("model")) is not None and isinstance(model.value, str) and model.value:
        tree.value["model"] = Node({"path": model}, model.origin, model.line)  # `model: PATH` is short for it
    build = _Build(tree, list(problems))
    build.refuse_secrets()
    build.split()
    swept = build.sweep()
    names = {*build.stages, *(name for variants in swept.names.values() for name in variants)}
    build.problems += resolve_paths(swept.tops, [(stage.label, stage.node) for stage in swept.stages], names)
    for top in swept.tops:
        build.check_top(top)
    for group in swept.groups:
        build.check_group(group, swept.tops[0])
    for stage in swept.stages:
        build.check_stage(stage)
    build.check_references(swept)
    build.audit(swept)
    if build.problems:
        raise RecipeError(_sort(build.problems, label))
    return construct(swept, name=path.stem, label=label)


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
                group = self.groups[name] = split_group(name, node, self.tree)
                self.problems += [Problem(what, node.place) for what in group.find_clashes(taken)]
                self.stages |= {stage.name: stage for stage in group.stages if stage.name not in taken}
            else:
                self.stages[name] = StageTree(name, read_method(name, node), node, self.tree)
        if not self.stages and not self.problems:
            self.problems.append(Problem(f"there is no stage; add a section such as {METHODS}", self.tree.place))

    def sweep(self) -> Sweep:
        """Return the variants of the stages; keys under `sweep:` that cannot be swept are left out."""
        axes, problems = read_axes(self.tree, self.stages, self.groups)
        swept = spread(self.tree, self.stages, self.groups, axes)
        self.problems += [*problems, *swept.problems]
        return swept

    def check_top(self, top: Node) -> None:
        fragments = recipe_fragments()
        for name, fragment in fragments["properties"].items():
            if name in top.value and name != SWEEP:
                node = top.value[name]
                if name == "lora" and node.value is None:
                    found = [Problem("lora is empty; write {} for its defaults, or take the key out", node.place)]
                else:
                    found = [explain_moved(problem) for problem in check(node, fragment, name, fragments["$defs"])]
                self.problems += found
                if found:
                    self.broken.add(name)
        if "model" not in top.value:
            self.problems.append(Problem("model is missing; add `model: {path: ...}`", top.place))
            self.broken.add("model")

    def check_group(self, group: Group, top: Node) -> None:
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
        inherited = find_inherited(top, RLAIF)
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
        given = {*stage.node.value, *find_inherited(stage.top, stage.method), *stage.broken}
        if stage.needs_data and "data" not in given:
            work = "work" if stage.method in FEEDBACK else "train"
            help_text = f"add the rows to {work} on, here or as the recipe's own `data:`"
            self.problems.append(Problem(f"{stage.say('data')} is missing; {help_text}", stage.node.place))
            stage.broken.add("data")
        for key in sorted({*fragments.get("required", ())} - {"data", "method", *stage.node.value, *stage.broken}):
            self.problems.append(Problem(f"{stage.say(key)} is missing; {quote_help(own[key])}", stage.node.place))
            stage.broken.add(key)

    def check_references(self, swept: Sweep) -> None:
        """Check that whatever names a stage names one that is there, and that nothing goes in circles."""
        listed = self.tree.value.get("stages")
        variants = {made.name: made.stage for all_made in swept.variants.values() for made in all_made}
        names = (*self.groups, *dict.fromkeys((*self.stages, *variants)))
        for item in listed.value or () if listed is not None and "stages" not in self.broken else ():
            if item.value not in names:
                hint = suggest(str(item.value), names) or f"; there are {', '.join((*self.groups, *self.stages))}"
                self.problems.append(Problem(f"stages names {show(item)}, which is not a stage here{hint}", item.place))
        self.problems += check_references(swept.stages, {**self.stages, **variants}, self.groups)
        evaluate = self.tree.value.get("evaluate")
        if evaluate is not None and "evaluate" not in self.broken:
            self.problems += check_evaluated(evaluate, names)

    def audit(self, swept: Sweep) -> None:
        """Hold every stage against the top level that it reads, and each model and adapter against its stages."""
        broken = frozenset(self.broken)
        tops = {id(top): Section("", "", _plain_without(top, self.broken), broken, top) for top in swept.tops}
        shapes: dict[str, list[tuple[Section, Section]]] = {}
        for stage in swept.stages:
            section, top = stage.section(), tops[id(stage.top)]
            self.problems += audit_stage(section, top)
            if stage.method not in FEEDBACK or not swept.names:  # they read no lora: and so have not every shape
                shapes.setdefault(repr([top.values.get(key) for key in ("model", "lora")]), []).append((section, top))
        self.problems += audit_evaluation(tops[id(swept.tops[0])])
        for pairs in shapes.values():
            self.problems += audit_recipe(pairs[0][1], [section for section, _ in pairs])
        if not shapes:
            self.problems += audit_recipe(tops[id(swept.tops[0])], ())


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
