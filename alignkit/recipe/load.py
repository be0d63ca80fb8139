"""Load a recipe: read, merge and check everything it may say, and make a Recipe of it.

All problems are collected before anything is raised; nothing here looks at data, models or devices.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from alignkit.errors import Problem, RecipeError
from alignkit.recipe.check import check_keys, describe_unknown_top, quote_help, show, show_key, validate
from alignkit.recipe.nearest import suggest
from alignkit.recipe.references import (
    REWARD_KEYS,
    SOURCE_KEYS,
    check_circles,
    check_evaluated,
    check_references,
    resolve_paths,
)
from alignkit.recipe.rules import audit_recipe, audit_stage
from alignkit.recipe.schema import FEEDBACK, OPTIONS, RLAIF, SWEEP, RecipeOptions
from alignkit.recipe.sections import Run, Section, Whole, make_stage
from alignkit.recipe.stage import Recipe, StageSection
from alignkit.recipe.trl_fields import ELSEWHERE
from alignkit.recipe.yaml import Node, apply_override, label_path, load_tree, take_secrets

SECTIONS = (*OPTIONS, RLAIF)  # names that need no `method:`
METHODS = ", ".join(SECTIONS)


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
    problems += take_secrets(tree)
    whole, found = split(tree, set())
    problems += found
    runs, tops = [Run(name, stage, whole) for name, stage in whole.stages.items()], [whole.top]
    groups = [*whole.groups.values()]
    if SWEEP in tree.value:
        from alignkit.recipe.sweep import spread

        swept = spread(whole, lambda tree: split(tree, whole.top.broken)[0])
        runs, tops, groups = swept.runs or runs, swept.tops or tops, swept.groups or groups
        problems += swept.problems
    problems += check_values(whole, runs, tops, groups)
    if problems:
        label = label_path(path)

        def rank(problem: Problem) -> tuple[bool, bool, str, int]:
            """The recipe itself first, other files by name, by line in each; the command line is last."""
            where = problem.where or ""
            file, _, line = where.rpartition(":")
            return where.startswith("--"), file != label, file, int(line) if line.isdecimal() else 0

        raise RecipeError(sorted(dict.fromkeys(problems), key=rank))
    return construct(whole, runs, tops[0], path)


def split(tree: Node, broken: set[str]) -> tuple[Whole, list[Problem]]:
    """Tell stage sections from the recipe's own keys; `broken` is where wrong keys of the top level are noted."""
    if (model := tree.value.get("model")) is not None and isinstance(model.value, str) and model.value:
        short = Node({"path": model}, model.origin, model.line)  # `model: PATH` is short for it
        tree = Node({**tree.value, "model": short}, tree.origin, tree.line)
    whole = Whole(Section("", "", tree, broken), {}, {})
    problems: list[Problem] = []
    for name, node in tree.value.items():
        if name in RecipeOptions.model_fields:
            continue
        if problem := describe_not_a_stage(name, node):
            problems.append(Problem(problem, node.place))
            broken.add(name)
            continue
        method = str(node.value["method"].value) if "method" in node.value else name
        if method != RLAIF:
            whole.stages[name] = make_stage(name, method, node, whole.top)
            continue
        from alignkit.recipe.rlaif import split_group

        group = whole.groups[name] = split_group(name, node, whole.top)
        for stage in group.stages:
            if stage.name not in tree.value:
                whole.stages[stage.name] = stage
            else:
                what = f"{name} has a stage {stage.name}, and so has the recipe; rename one of the two sections"
                problems.append(Problem(what, node.place))
    if not whole.stages and not problems:
        problems.append(Problem(f"there is no stage; add a section such as {METHODS}", tree.place))
    return whole, problems


def describe_not_a_stage(name: str, node: Node) -> str | None:
    """Say why a section that is no key of a recipe is no stage either; None when it is one."""
    is_mapping = isinstance(node.value, dict)
    method = node.value.get("method") if is_mapping else None
    if name in SECTIONS and not is_mapping:
        needed = "it is a mapping with at least `constitution:`"
        return f"{name} is {show(node)}; {needed if name == RLAIF else 'a stage is a mapping with at least `data:`'}"
    if name in SECTIONS and method is not None and method.value != name:
        article = "a" if name in ("dpo", "critique", "label") else "an"
        return (
            f"{name}.method is {show(method)}; a section named {name} is {article} {name} stage: "
            "take method out, or rename the section"
        )
    if name in SECTIONS or (method is not None and method.value in list(SECTIONS)):
        good = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name)
        return None if good else f"stage {show_key(name)}: use letters, digits, '_' and '-' in a stage's name only"
    if method is not None:
        known = ELSEWHERE.get(str(method.value).lower())
        nearest = f"; {known}" if known else suggest(method.value, SECTIONS) if isinstance(method.value, str) else ""
        return f"{show_key(name)}.method is {show(method)}; it must be one of {METHODS}{nearest}"
    return describe_unknown_top(name, is_mapping=is_mapping)


def check_values(whole: Whole, runs: Sequence[Run], tops: Sequence[Section], groups: Sequence[Any]) -> list[Problem]:
    """Check everything in a recipe; with a sweep, every section with each of its values."""
    stages = list({id(run.stage): run.stage for run in runs}.values())
    runs_by_name = {run.name: run.stage for run in runs}
    names = [*whole.groups, *dict.fromkeys((*whole.stages, *runs_by_name))]
    problems = resolve_paths(tops, stages, names)
    for top in tops:
        problems += check_top(top)
    for group in groups:
        from alignkit.recipe.rlaif import check_group

        problems += check_group(group)
    for stage in stages:
        problems += check_stage(stage)
    listed = whole.top.node.value.get("stages")
    for item in listed.value or () if listed is not None and "stages" not in whole.top.broken else ():
        if item.value not in names:
            hint = suggest(str(item.value), names) or f"; there are {', '.join((*whole.groups, *whole.stages))}"
            problems.append(Problem(f"stages names {show(item)}, which is not a stage here{hint}", item.place))
    for run in runs:
        problems += check_references(run.stage, {**run.whole.stages, **runs_by_name}, run.whole.groups)
    problems += check_circles({run.name: run for run in runs})
    evaluate = whole.top.node.value.get("evaluate")
    if evaluate is not None and "evaluate" not in whole.top.broken:
        problems += check_evaluated(evaluate, names)
    for stage in stages:
        problems += audit_stage(stage)
    shapes: dict[str, list[Section]] = {}  # stages that read one model and one lora: section
    for stage in stages:
        if stage.top and (stage.method not in FEEDBACK or stages == [*whole.stages.values()]):  # they read no lora
            read = [child.plain() for key in ("model", "lora") if (child := stage.top.node.value.get(key))]
            shapes.setdefault(repr(read), []).append(stage)
    for alike in shapes.values() or [[]]:
        problems += audit_recipe((alike[0].top if alike else None) or whole.top, alike)
    return problems


def check_top(top: Section) -> Iterator[Problem]:
    values = {key: node for key, node in top.node.value.items() if key in RecipeOptions.model_fields and key != SWEEP}
    top.options, found = validate(RecipeOptions, values, str)
    if (lora := values.get("lora")) is not None and lora.value is None:
        found["lora"] = [Problem("lora is empty; write {} for its defaults, or take the key out", lora.place)]
    if "model" not in values:
        found["model"] = [Problem("model is missing; add `model: {path: ...}`", top.node.place)]
    for key, problems in found.items():
        yield from problems
        top.broken.add(key)


def check_stage(stage: Section) -> Iterator[Problem]:
    """Yield what is wrong with the keys of a stage, one by one; what it has from the top level is checked there."""
    model, given = OPTIONS[stage.method], {*stage.node.value, *stage.broken}
    stage.options, found = check_keys(model, stage.node, stage.method, stage.label, stage.say)
    required = [key for key, field in model.model_fields.items() if field.is_required()]
    if stage.method == "critique" and "replay" not in given:
        required.append("data")
    for key in required:
        if key not in given:
            work = "work" if stage.method in FEEDBACK else "train"
            rows = f"add the rows to {work} on, here or as the recipe's own `data:`"
            help = rows if key == "data" else quote_help(model.model_fields[key].description)
            found[key] = [Problem(f"{stage.say(key)} is missing; {help}", stage.node.place)]
    stage.broken |= found.keys()
    for key, problems in found.items():
        yield from problems if key not in stage.inherited else ()


def construct(whole: Whole, runs: Sequence[Run], top: Section, path: Path) -> Recipe:
    """Make the recipe of sections that are right; `top` has the first value of each swept key."""
    options: RecipeOptions = top.options
    variants: dict[str, list[str]] = {}
    for run in runs:
        variants.setdefault(run.stage.name, []).append(run.name)
    groups = {name: _join(variants[stage.name] for stage in group.stages) for name, group in whole.groups.items()}
    listed = _join(groups.get(item) or variants.get(item) or (item,) for item in options.stages or ())
    by_name = {run.name: run for run in runs}
    ordered = _join([listed, by_name])
    sections = {name: _make_section(by_name[name]) for name in ordered}
    origins = {"name": "default", "seed": "default"}
    for key, node in top.node.value.items():
        if key in RecipeOptions.model_fields and key != SWEEP:
            origins |= _find_origins(node, key)
    for run in runs:
        origins |= _find_origins(run.stage.node, run.name)
    return Recipe(
        name=options.name or path.stem,
        path=label_path(path),
        seed=options.seed,
        model=options.model,
        lora=options.lora,
        launch=options.launch,
        evaluate=options.evaluate,
        evaluates="evaluate" in top.node.value,
        stages=sections,
        order=listed or ordered,
        origins=origins,
        groups=groups,
        sweeps={name: tuple(made) for name, made in variants.items() if made != [name]},
    )


def _join(parts: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for part in parts for name in part))


def _make_section(run: Run) -> StageSection:
    stage, top = run.stage, run.stage.top
    assert top is not None
    values = stage.node.value
    trainer = {key: child.plain() for key, child in values.items() if key not in type(stage.options).model_fields}
    if stage.method == "dpo" and isinstance(trainer.get("loss_type"), str):
        trainer["loss_type"] = [trainer["loss_type"]]
    origins = {"name": "default", "seed": "default"}
    for key in ("name", "seed", "model", "lora", "launch"):
        if key in top.node.value:
            origins |= _find_origins(top.node.value[key], key)
    origins |= _find_origins(stage.node, run.name)
    return StageSection(run.name, stage.options, trainer, top.options, origins, run.names, stage.group, run.point)


def _find_origins(node: Node, key: str) -> dict[str, str]:
    """Find the place of every dotted key; one source under `data:` is also `data.0`, and one reward `reward.0`."""
    origins = {}
    for path, child in node.leaves((key,)):
        origins[".".join(path)] = child.place
        if path[-1] in (*SOURCE_KEYS, *REWARD_KEYS) and not isinstance(child.value, list):
            origins |= {".".join((*path, "0", *below)): leaf.place for below, leaf in child.leaves()}
    return origins
