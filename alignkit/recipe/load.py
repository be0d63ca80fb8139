"""Load a recipe: read, merge and check everything it may say, and make a Recipe of it.

All problems are collected before anything is raised; nothing here looks at data, models or devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.errors import Problem, RecipeError
from alignkit.recipe.check import check_field, check_section, describe_unknown_in_stage, quote_help, show
from alignkit.recipe.nearest import suggest
from alignkit.recipe.references import REWARD_KEYS, SOURCE_KEYS, check_evaluated, check_references, resolve_paths
from alignkit.recipe.rules import audit_evaluation, audit_recipe, audit_stage
from alignkit.recipe.schema import FEEDBACK, OPTIONS, RLAIF, SWEEP, RecipeOptions, RlaifOptions
from alignkit.recipe.sections import (
    METHODS,
    Group,
    Section,
    StageTree,
    Sweep,
    Variant,
    describe_not_a_stage,
    find_inherited,
    read_method,
)
from alignkit.recipe.stage import Recipe, StageSection
from alignkit.recipe.trl_fields import method_fields
from alignkit.recipe.yaml import Node, apply_override, find_secrets, label_path, load_tree


def load_recipe(path: Path | str, *, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge and validate a recipe; `overrides` are KEY.PATH=VALUE texts.

    Raises RecipeError with every problem found, each with file and line.
    """
    path = Path(path)
    tree = load_tree(path)
    problems: list[Problem] = []
    for override in overrides:
        try:
            tree = apply_override(tree, override)
        except RecipeError as error:
            problems += error.problems
    return build_recipe(tree, path=path, label=label_path(path), problems=problems)


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
        known = RecipeOptions.model_fields
        taken = self.tree.value.keys()
        for name, node in self.tree.value.items():
            if name in known:
                continue
            if problem := describe_not_a_stage(name, node):
                self.problems.append(Problem(problem, node.place))
                self.broken.add(name)
            elif read_method(name, node) == RLAIF:
                from alignkit.recipe.rlaif import split_group

                group = self.groups[name] = split_group(name, node, self.tree)
                self.problems += [Problem(what, node.place) for what in group.find_clashes(taken)]
                self.stages |= {stage.name: stage for stage in group.stages if stage.name not in taken}
            else:
                self.stages[name] = StageTree(name, read_method(name, node), node, self.tree)
        if not self.stages and not self.problems:
            self.problems.append(Problem(f"there is no stage; add a section such as {METHODS}", self.tree.place))

    def sweep(self) -> Sweep:
        """Return the variants of the stages; keys under `sweep:` that cannot be swept are left out."""
        if SWEEP not in self.tree.value:
            plain = {name: [Variant(name, stage, {}, {})] for name, stage in self.stages.items()}
            return Sweep([self.tree], [*self.groups.values()], [*self.stages.values()], plain)
        from alignkit.recipe.sweep import read_axes, spread

        axes, problems = read_axes(self.tree, self.stages, self.groups)
        swept = spread(self.tree, self.stages, self.groups, axes)
        self.problems += [*problems, *swept.problems]
        return swept

    def check_top(self, top: Node) -> None:
        found = check_section(RecipeOptions, {key: node for key, node in top.value.items() if key != SWEEP})
        if (lora := top.value.get("lora")) is not None and lora.value is None:
            found["lora"] = [Problem("lora is empty; write {} for its defaults, or take the key out", lora.place)]
        if "model" not in top.value:
            found["model"] = [Problem("model is missing; add `model: {path: ...}`", top.place)]
        for key, problems in found.items():
            self.problems += problems
            self.broken.add(key)

    def check_group(self, group: Group, top: Node) -> None:
        """Check the keys of an rlaif section itself; those of its steps are checked with their stages."""
        from alignkit.recipe.rlaif import find_unused

        own = RlaifOptions.model_fields
        found = check_section(RlaifOptions, group.node.value, lambda key: f"{group.name}.{key}")
        required = {key for key, field in own.items() if field.is_required()}
        for key in sorted(group.find_missing(required - find_inherited(top, RLAIF).keys())):
            what = f"{group.name}.{key} is missing; {quote_help(own[key].description)}"
            found[key] = [Problem(what, group.node.place)]
        for key, problems in found.items():
            self.problems += problems
            group.mark_broken(key)
        for key, node in group.node.value.items():
            if key not in own:
                what = describe_unknown_in_stage(key, stage=group.name, method=RLAIF, accepted=[*own])
                self.problems.append(Problem(what, node.place))
        for key, what in find_unused(group.node.value):
            self.problems.append(Problem(f"{group.name}.{key} {what}", group.place(key)))

    def check_stage(self, stage: StageTree) -> None:
        own, fields = OPTIONS[stage.method].model_fields, method_fields(stage.method)
        found = check_section(OPTIONS[stage.method], stage.node.value, stage.say)
        for key, node in stage.node.value.items():
            if key in fields:
                found[key] = check_field(node, stage.method, key, stage.say(key))
            elif key not in own:
                accepted = [*own, *fields]
                what = describe_unknown_in_stage(key, stage=stage.label, method=stage.method, accepted=accepted)
                found[key] = [Problem(what, node.place)]
        given = {*stage.node.value, *find_inherited(stage.top, stage.method), *stage.broken}
        missing = {key for key, field in own.items() if field.is_required() and key != "data"}
        for key in [*(["data"] if stage.needs_data else []), *sorted(missing)]:
            if key not in given:
                work = "work" if stage.method in FEEDBACK else "train"
                rows = f"add the rows to {work} on, here or as the recipe's own `data:`"
                what = f"{stage.say(key)} is missing; {rows if key == 'data' else quote_help(own[key].description)}"
                found[key] = [Problem(what, stage.node.place)]
        for key, problems in found.items():
            self.problems += problems
            if problems:
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


_READ_BY_STAGES = ("seed", "model", "lora")  # data and eval are among a stage's own values by now


def construct(swept: Sweep, *, name: str, label: str) -> Recipe:
    """Return the recipe; `name` is its name where it gives none, `label` the file as messages show it."""
    tops = {id(tree): _read_top(tree) for tree in swept.tops}
    tree, top = swept.tops[0], tops[id(swept.tops[0])]
    variants = {plain: tuple(variant.name for variant in made) for plain, made in swept.variants.items()}
    groups: dict[str, tuple[str, ...]] = {}
    for group in swept.groups:
        steps = dict.fromkeys(stage.name for stage in group.stages)
        groups[group.name] = tuple(variant for step in steps for variant in variants[step])
    listed = [made for item in top.stages or () for made in groups.get(item, variants.get(item, (item,)))]
    by_name = {variant.name: variant for made in swept.variants.values() for variant in made}
    origins = {"name": "default", "seed": "default"}
    for key, node in tree.value.items():
        if key in RecipeOptions.model_fields and key != SWEEP:
            origins |= _find_origins(node, key)
    sections = {}
    for variant_name in dict.fromkeys((*listed, *by_name)):
        sections[variant_name], found = _make_section(by_name[variant_name], tops)
        origins |= found
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
        order=tuple(dict.fromkeys(listed or by_name)),
        origins=origins,
        groups=groups,
        sweeps=swept.names,
    )


def _read_top(tree: Node) -> RecipeOptions:
    known = RecipeOptions.model_fields.keys() - {SWEEP}
    return RecipeOptions.model_validate({key: node.plain() for key, node in tree.value.items() if key in known})


def _make_section(variant: Variant, tops: Mapping[int, RecipeOptions]) -> tuple[StageSection, dict[str, str]]:
    """Return a stage and the places of its values."""
    stage, node = variant.stage, None
    if variant.names:
        from alignkit.recipe.sweep import rename_stages

        node = rename_stages(variant)
    section = stage.section(node)
    options = {key: value for key, value in section.values.items() if key in OPTIONS[stage.method].model_fields}
    trainer = {key: value for key, value in section.values.items() if key not in options}
    if stage.method == "dpo" and isinstance(trainer.get("loss_type"), str):
        trainer["loss_type"] = [trainer["loss_type"]]
    made = OPTIONS[stage.method].model_validate({**options, "method": stage.method})
    origins = {"seed": "default"}
    for key in _READ_BY_STAGES:
        if key in stage.top.value:
            origins |= _find_origins(stage.top.value[key], key)
    top = tops[id(stage.top)]
    return (
        StageSection(variant.name, made, trainer, top, origins, stage.group, variant.values),
        _find_origins(section.node, variant.name),
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
