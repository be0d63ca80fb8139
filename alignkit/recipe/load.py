"""Load a recipe: read, merge and check everything it may say, and make a Recipe of it.

Rounds are a chain of label and training stages again and again, each time on answers of the newest policy. The stages
of later ones are ordinary, named NAME-2, NAME-3, ...: each has its run directory and resumes by itself.
"""

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from alignkit.errors import Problem, RecipeError, suggest
from alignkit.recipe import sections
from alignkit.recipe.check import check_keys, describe_unknown_top, quote_help, show, show_key, validate
from alignkit.recipe.methods import FEEDBACK, OPTIONS, RLAIF
from alignkit.recipe.rules import audit_recipe, audit_stage
from alignkit.recipe.schema import EVALUATED, SWEEP, RecipeOptions
from alignkit.recipe.sections import Section, Whole
from alignkit.recipe.stage import Recipe
from alignkit.recipe.words import find_method
from alignkit.recipe.yaml import Node, apply_override, expand, find_recipe, label_path, load_tree, take_secrets

SECTIONS = (*OPTIONS, RLAIF)  # names that need no `method:`
METHODS = ", ".join(SECTIONS)


def load_recipe(path: Path | str, *, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge and check a file or `builtin:NAME`, with KEY.PATH=VALUE; raises RecipeError with every problem."""
    path = find_recipe(path)
    tree = load_tree(path)
    problems: list[Problem] = []
    for override in overrides:
        try:
            tree = apply_override(tree, override)
        except RecipeError as error:
            problems += error.problems
    wholes, runs, found = find_problems(tree)
    problems += found

    def rank(problem: Problem) -> tuple[bool, bool, str, int]:
        """The recipe itself first, other files by name, by line in each; the command line is last."""
        where = problem.where or ""
        file, _, line = where.rpartition(":")
        return where.startswith("--"), file != label_path(path), file, int(line) if line.isdecimal() else 0

    if problems:
        raise RecipeError(sorted(dict.fromkeys(problems), key=rank))
    return construct(wholes[0], runs, path)


def find_problems(tree: Node) -> tuple[list[Whole], list[Section], list[Problem]]:
    """Check a recipe's tree: its sections, one whole for each choice of swept values, its runs, and what is wrong."""
    problems = take_secrets(tree)
    whole, found = split(tree)
    problems += found
    wholes, runs = [whole], [*whole.stages.values()]
    if SWEEP in tree.value:
        from alignkit.recipe.sweep import spread

        swept, choices, found = spread(whole, lambda tree: split(tree)[0])
        wholes, runs = choices or wholes, swept or runs
        problems += found
    return wholes, runs, problems + check_values(wholes, runs)


def split(tree: Node) -> tuple[Whole, list[Problem]]:
    """Tell stage sections from the recipe's own keys."""
    if (model := tree.value.get("model")) is not None and isinstance(model.value, str) and model.value:
        short = Node({"path": model}, model.origin, model.line)  # `model: PATH` is short for it
        tree = Node({**tree.value, "model": short}, tree.origin, tree.line)
    whole, problems = Whole(Section("", "", tree)), []
    for name, node in tree.value.items():
        if name in RecipeOptions.model_fields:
            continue
        if problem := describe_not_a_stage(name, node):
            problems.append(Problem(problem, node.place))
            continue
        method = str(node.value["method"].value) if "method" in node.value else name
        if method != RLAIF:
            whole.stages[name] = sections.make_stage(name, method, node, whole.top)
            continue
        group = whole.groups[name] = sections.split_group(name, node, whole.top)
        for stage in group.stages:
            if stage.name not in tree.value:
                whole.stages[stage.name] = stage
            else:
                what = f"{name} has a stage {stage.name}, and so has the recipe; rename one of the two sections"
                problems.append(Problem(what, node.place))
    problems += add_rounds(whole)
    if not whole.stages and not problems:
        problems.append(Problem(f"there is no stage; add a section such as {METHODS}", tree.place))
    return whole, problems


def describe_not_a_stage(name: str, node: Node) -> str | None:
    """Say why a section that is no key of a recipe is no stage either; None when it is one."""
    method = node.value.get("method") if isinstance(node.value, dict) else None
    if name in SECTIONS and not isinstance(node.value, dict):
        needed = "it is a mapping with at least `constitution:`"
        return f"{name} is {show(node)}; {needed if name == RLAIF else 'a stage is a mapping with at least `data:`'}"
    if name in SECTIONS and method is not None and method.value != name:
        what = f"a section named {name} is {'a' if name in ('dpo', 'critique', 'label') else 'an'} {name} stage"
        return f"{name}.method is {show(method)}; {what}: take method out, or rename the section"
    if name in SECTIONS or (method is not None and method.value in list(SECTIONS)):
        good = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name)
        return None if good else f"stage {show_key(name)}: use letters, digits, '_' and '-' in a stage's name only"
    if method is not None:
        known = find_method(method.value)
        nearest = f"; {known.said}" if known else suggest(str(method.value), SECTIONS)
        return f"{show_key(name)}.method is {show(method)}; it must be one of {METHODS}{nearest}"
    return describe_unknown_top(name, node)


def check_values(wholes: Sequence[Whole], runs: Sequence[Section]) -> list[Problem]:
    """Check everything in a recipe; with a sweep, every section with each of its values."""
    whole, tops = wholes[0], [one.top for one in wholes]
    by_name = {run.run: run for run in runs}
    names = [*whole.groups, *dict.fromkeys((*whole.stages, *by_name))]
    problems = sections.resolve_paths(tops, runs, names)
    for top in tops:
        given = top.node.value
        values = {key: given[key] for key in given if key in RecipeOptions.model_fields and key != SWEEP}
        top.options, found = validate(RecipeOptions, values, str)
        if (lora := values.get("lora")) is not None and lora.value is None:
            found["lora"] = [Problem("lora is empty; write {} for its defaults, or take the key out", lora.place)]
        if "model" not in values:
            found["model"] = [Problem("model is missing; add `model: {path: ...}`", top.node.place)]
        problems += [problem for several in found.values() for problem in several]
        top.broken |= found.keys()
    for group in (group for one in wholes for group in one.groups.values()):
        problems += sections.check_group(group)
    for run in runs:
        problems += check_stage(run)
    listed = whole.top.node.value.get("stages")
    for item in listed.value or () if listed is not None and "stages" not in whole.top.broken else ():
        if item.value not in names:
            hint = suggest(str(item.value), names) or f"; there are {', '.join((*whole.groups, *whole.stages))}"
            problems.append(Problem(f"stages names {show(item)}, which is not a stage here{hint}", item.place))
    for run in runs:
        problems += sections.check_references(run, whole.stages | by_name, whole.groups)
    problems += sections.check_circles(by_name)
    evaluate = whole.top.node.value.get("evaluate")
    for name in sections.find_names(evaluate) if evaluate is not None and "evaluate" not in whole.top.broken else ():
        value = name.node.value
        if name.key in EVALUATED and value not in names and not {"/", ":"} & set(value):
            hint = suggest(value, names) or f"; the stages are {', '.join(names)}"
            what = f"evaluate.{name.key} is {show(name.node)}, which is neither a stage nor a path that exists{hint}"
            problems.append(Problem(what, name.node.place))
    for run in runs:
        problems += audit_stage(run)
    shapes: dict[str, list[Section]] = {}  # stages that read one model and one lora: section
    for run in runs:
        if run.top and run.method not in FEEDBACK:  # those train no adapters
            read = [child.plain() for key in ("model", "lora") if (child := run.top.node.value.get(key))]
            shapes.setdefault(repr(read), []).append(run)
    for alike in shapes.values() or [[]]:
        problems += audit_recipe((alike[0].top if alike else None) or whole.top, alike)
    return problems


def check_stage(stage: Section) -> Iterator[Problem]:
    """Yield what is wrong with the keys of a stage, one by one; what it has from the top level is checked there."""
    model, given = OPTIONS[stage.method], {*stage.node.value, *stage.broken}
    stage.options, found = check_keys(model, stage.node, stage.method, stage.label, stage.say)
    required = {key for key, field in model.model_fields.items() if field.is_required()}
    required |= {"data"} if stage.method == "critique" and "replay" not in given else set()
    for key in sorted(required - given):
        help = quote_help(model.model_fields[key].description)
        if key == "data":
            work = "work" if stage.method in FEEDBACK else "train"
            help = f"add the rows to {work} on, here or as the recipe's own `data:`"
        found[key] = [Problem(f"{stage.say(key)} is missing; {help}", stage.node.place)]
    stage.broken |= found.keys()
    for key, problems in found.items():
        yield from problems if key not in stage.inherited else ()


def construct(whole: Whole, runs: Sequence[Section], path: Path) -> Recipe:
    """Make the recipe of sections that are right; `whole` has the first value of each swept key."""
    options: RecipeOptions = whole.top.options
    variants: dict[str, list[str]] = {}
    for run in runs:
        variants.setdefault(run.name, []).append(run.run)
    groups = {name: _join(variants[stage.name] for stage in group.stages) for name, group in whole.groups.items()}
    made = (groups.get(item) or variants.get(item) or (item,) for item in options.stages or ())
    listed = _join((*names, *whole.rounds.get(names[-1], ())) for names in made)
    by_name = {run.run: run for run in runs}
    ordered = _join([listed, by_name])
    known = RecipeOptions.model_fields.keys() - {SWEEP}
    top = {key: node for key, node in whole.top.node.value.items() if key in known}
    name, home = options.name or path.stem, Path(sections.RUNS)
    if options.runs_dir is not None:
        node = top["runs_dir"]
        try:
            home = node.origin.folder / expand(node.value)
        except ValueError as error:
            raise RecipeError(f"runs_dir: {error}", where=node.place) from None
    elif not (home / name).is_dir() and (path.parent / home / name).is_dir():
        home = path.parent / home
    return Recipe(
        name=name, runs=label_path(home), path=label_path(path), seed=options.seed, model=options.model,
        lora=options.lora, launch=options.launch, evaluate=options.evaluate, evaluates="evaluate" in top,
        stages={name: by_name[name] for name in ordered}, order=listed or ordered, groups=groups,
        origins=sections.find_origins(top | {run.run: run.node for run in runs}),
        sweeps={name: tuple(made) for name, made in variants.items() if made != [name]},
    )  # fmt: skip


def _join(parts: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for part in parts for name in part))


def add_rounds(whole: Whole) -> Iterator[Problem]:
    """Put the stages of later rounds behind those of the first; yields what is wrong with a chain."""
    top = whole.top.node.value
    asked: list[tuple[Node, list[str]]] = []
    for group in whole.groups.values():
        if (rounds := group.node.value.get("rounds")) is not None:
            asked.append((rounds, [stage.name for stage in group.stages if stage.method not in ("critique", "sft")]))
    own = top.get("rounds")
    if own is not None and isinstance(own.value, dict) and "stages" in own.value:
        listed = own.value["stages"].plain()
        asked.append((own, listed if isinstance(listed, list) else []))
    for node, chain in asked:
        given = node.plain() if isinstance(node.value, dict) else {"num": node.value}
        strange = [name for name in chain if name not in whole.stages]
        methods = [whole.stages[name].method for name in chain if name not in strange]
        if strange:
            hint = suggest(strange[0], whole.stages)
            yield Problem(f"rounds names {strange[0]}, which is not a stage{hint}", node.place)
        elif "label" not in methods or not {"sft", "dpo", "ppo"} & {*methods}:
            yield Problem("rounds needs a label stage and a policy that learns from it", node.place)
        elif SWEEP in top:
            yield Problem("rounds and sweep do not go together; take one of them out", node.place)
        elif type(num := given.get("num")) is int and 1 < num < 100:  # else it has a message of its own
            stages, later = [whole.stages[name] for name in chain], list[Section]()
            for number in range(2, num + 1):
                later += _repeat(stages, number, keeps=given.get("rows") == "all", restart=given.get("restart") is True)
            taken = [stage.name for stage in later if stage.name in whole.stages]
            if taken:
                yield Problem(f"rounds makes a stage {taken[0]}, and so has the recipe; rename that", node.place)
            if stages[-1].group is not None:
                whole.groups[stages[-1].group].stages += later
            whole.rounds[chain[-1]] = tuple(stage.name for stage in later)
            items = [*whole.stages.items()]
            after = [*whole.stages].index(chain[-1]) + 1
            whole.stages = dict([*items[:after], *((stage.name, stage) for stage in later), *items[after:]])


def _in_round(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def _repeat(stages: Sequence[Section], number: int, *, keeps: bool, restart: bool) -> Iterator[Section]:
    """Make the stages of a round; training goes on from the round before it, or starts where the first round did."""
    policy = [stage.name for stage in stages if stage.method not in (*FEEDBACK, "rm")][-1]
    made: set[str] = set()  # the chain's stages before this one
    for stage in stages:
        node = copy.deepcopy(stage.node)
        starts_inside = False
        for named in sections.find_names(node):
            if named.node.value in made:
                starts_inside |= named.kind == "start"
                named.node.value = _in_round(named.node.value, number)
        data, rows = node.value.get("data") if keeps else None, list[Node]()
        sources: list[Node] = [] if data is None else data.value if isinstance(data.value, list) else [data]
        for source in sources:
            path: Node = source.value.get("path", source) if isinstance(source.value, dict) else source
            name = str(path.value).removesuffix(f"-{number}")
            for turn in range(1, number + 1) if name in made else ():  # those of the rounds before too
                one = replace(path, value=_in_round(name, turn))
                rows.append(one if path is source else replace(source, value={**source.value, "path": one}))
            rows += [source] if name not in made else []
        if data is not None:
            node.value["data"] = replace(data, value=rows)
        start = policy if stage.method in FEEDBACK else None if restart or starts_inside else stage.name
        if start is not None:
            node.value["start_from"] = Node(_in_round(start, number - 1), node.origin, node.line)
        made.add(stage.name)
        run, shared = _in_round(stage.name, number), stage.shared - {"start_from"}
        yield replace(stage, name=run, run=run, first=stage.name, node=node, shared=shared, broken=set())
