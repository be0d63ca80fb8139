"""What `sweep:` makes of a recipe: a run of each stage for every combination of the values that matter to it.

The swept values are laid on the recipe, and the whole recipe is split into its stages again. A value matters to a stage
that holds it, reads it from the top level, or takes something from a stage to which it matters; choices that differ in
other values only are one run. So two sweeps that never meet in one stage are not multiplied.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from alignkit.errors import Problem, RecipeError
from alignkit.recipe.check import accepted_keys, describe_unknown, describe_unknown_in_stage, show, show_key
from alignkit.recipe.nearest import suggest
from alignkit.recipe.references import find_needs
from alignkit.recipe.rlaif import Group, list_steps, stage_name
from alignkit.recipe.schema import FEEDBACK, RLAIF, STEPS, SWEEP, LoraOptions, ModelOptions
from alignkit.recipe.sections import Run, Section, Whole
from alignkit.recipe.stage import HARMLESS
from alignkit.recipe.yaml import FLAG, Node, lay_value

TOP = ("seed", "model", "lora", "data", "eval")  # keys of the top level that stages read
_REFUSED = {
    "name": "it is the directory of all runs",
    "stages": "it is what `alignkit run` runs; sweep keys of those stages",
    "sweep": "a sweep holds no other",
    "evaluate": "it says what is measured, not what is trained; give it to `alignkit eval` as options",
    "launch": "it says where stages run, not what is trained",
    "extends": "it is read before all else; write one recipe for each",
}
_CHANGES_STAGES = "decides which stages there are; a sweep changes values only: write a section for each"
_LONGEST_LABEL = 40
MAX_RUNS = 256
MAX_NAME = 200  # characters; a file name holds 255, and a job's name or a file of the run adds some

Point = tuple[tuple[int, int], ...]  # sorted positions of axes, each with the position of one of its values


@dataclass(frozen=True)
class Axis:
    """One swept key: its path in the tree, its values, and what names and tables call them."""

    path: tuple[str, ...]
    values: tuple[Node, ...]
    labels: tuple[str, ...]
    plain: tuple[Any, ...]  # as written, before paths are resolved
    place: str

    @property
    def key(self) -> str:
        return ".".join(self.path)

    def lay(self, tree: Node, value: int) -> Node:
        """Put one of the values into the tree; raises RecipeError when the key leads nowhere."""
        keys, node = list(self.path), self.values[value]
        if len(keys) > 2 and keys[1] in STEPS:  # `critique: true` is short for an empty mapping
            step = tree.value[keys[0]].value.get(keys[1])
            if step is not None and step.value is True:
                tree = lay_value(tree, keys[:2], Node({}, step.origin, step.line), key=self.key, where=self.place)
        laid = lay_value(tree, keys, node, key=f"{SWEEP}.{self.key}", where=self.place)
        if keys == ["lora"] and node.value is None:  # no adapters, whether or not the recipe has a lora: section
            laid.value.pop("lora", None)
        return laid


@dataclass
class Swept:
    """The runs of a recipe; the top level, and each rlaif section, with every combination of values."""

    runs: list[Run] = field(default_factory=list)
    tops: list[Section] = field(default_factory=list)  # the first has the first value of every key
    groups: list[Group] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def spread(whole: Whole, split: Callable[[Node], Whole]) -> Swept:
    """Find the runs of a recipe; `whole` is the recipe without its sweep, `split` makes one of a tree.

    With a problem of the sweep as a whole there are problems alone.
    """
    axes, problems = read_axes(whole)
    try:
        swept = _Spreader(whole, axes, split).spread() if axes else Swept()
    except RecipeError as error:
        swept = Swept(problems=[*error.problems])
    swept.problems[:0] = problems
    return swept


# Which keys are swept


def read_axes(whole: Whole) -> tuple[list[Axis], list[Problem]]:
    """Read the swept keys in the order in which they are written, and say what is wrong with others."""
    node = whole.top.node.value[SWEEP]
    if node.value is None:
        return [], []
    if not isinstance(node.value, dict):
        what = f"{SWEEP} is {show(node)}; it must be a mapping, such as {{dpo.beta: [0.05, 0.1, 0.5]}}"
        return [], [Problem(what, node.place)]
    axes: list[Axis] = []
    problems: list[Problem] = []
    entries = list(_flatten(node, (), whole, problems))
    off = [path for path, child in entries if child.value is None]
    replaced = [path for path, child in entries if child.place == FLAG]  # dpo.beta or dpo: {beta: ...} in the file
    for path, child in entries:
        if any(path[: len(other)] == other for other in off) or (child.place != FLAG and path in replaced):
            continue
        labels, plain = _label(child.value), tuple(item.plain() for item in child.value)
        axis = Axis(path, tuple(child.value), labels, plain, child.place)
        if found := _find_problem(axis, axes, whole):
            problems.append(found)
        else:
            axes.append(axis)
    return axes, problems


def _flatten(
    node: Node, above: tuple[str, ...], whole: Whole, problems: list[Problem]
) -> Iterator[tuple[tuple[str, ...], Node]]:
    """Yield path and node of each list, and of each null that the command line puts in a list's place."""
    for name, child in node.value.items():
        path = (*above, *name.split("."))
        shown = show_key(".".join((SWEEP, *path)))
        if not all(path):
            problems.append(Problem(f"{shown} is not a dotted key, such as dpo.beta", child.place))
        elif isinstance(child.value, dict):
            yield from _flatten(child, path, whole, problems)
        elif (isinstance(child.value, list) and child.value) or (child.value is None and child.place == FLAG):
            steps = [(group, step) for group in whole.groups for step in STEPS if path[0] == stage_name(group, step)]
            in_group = steps and path[0] not in whole.top.node.value  # rlaif-dpo.beta is rlaif.dpo.beta
            yield (*steps[0], *path[1:]) if in_group else path, child
        elif child.value == []:
            problems.append(Problem(f"{shown} is empty; give at least one value, or take it out", child.place))
        else:
            again = f"[{show(child)}]" if child.value is not None else "[0.1, 0.5]"
            what = f"{shown} is {show(child)}; it must be a list of values, such as {again}"
            problems.append(Problem(what, child.place))


def _find_problem(axis: Axis, others: Collection[Axis], whole: Whole) -> Problem | None:
    """Say why a key cannot be swept."""
    tree, path = whole.top.node, axis.path
    if what := _describe_key(path, whole) or _describe_values(axis) or _describe_conflict(axis, others):
        return Problem(f"{SWEEP}.{show_key(axis.key)} {what}", axis.place)
    if path[0] not in TOP:  # then it is a key of a stage, of an rlaif section, or of one of its steps
        step = path[1] if path[0] in whole.groups and path[1] in STEPS else None
        method = step or (RLAIF if path[0] in whole.groups else whole.stages[path[0]].method)
        label, key = (f"{path[0]}.{step}", path[2]) if step else (path[0], path[1])
        if key not in accepted_keys(method):
            return Problem(f"{SWEEP}: {describe_unknown_in_stage(key, stage=label, method=method)}", axis.place)
    given: Node | None = tree
    for part in path:
        given = given.value.get(part) if given is not None and isinstance(given.value, dict) else None
    if given is not None and given.place == FLAG:
        what = f"{axis.key} is swept, so one value of it has no effect; add `{FLAG} {SWEEP}.{axis.key}=null`"
        return Problem(what, given.place)
    try:
        changed = [axis.lay(tree, value) for value in range(len(axis.values))]
    except RecipeError as error:
        return error.problems[0]
    if path[0] in whole.groups and any(
        list_steps(laid.value[path[0]].value) != list_steps(tree.value[path[0]].value) for laid in changed
    ):
        return Problem(f"{SWEEP}.{axis.key} {_CHANGES_STAGES}", axis.place)
    return None


def _describe_key(path: tuple[str, ...], whole: Whole) -> str | None:
    first, *rest = path
    in_group = first in whole.groups
    if first in _REFUSED:
        return f"cannot be swept: {_REFUSED[first]}"
    if first in TOP:
        known = {"model": ModelOptions.model_fields, "lora": LoraOptions.model_fields}.get(first)
        wrong = rest and known is not None and rest[0] not in known
        return f"leads nowhere: {describe_unknown(rest[0], first, known)}" if wrong and known else None
    if first not in whole.stages and not in_group:
        names = [*(name for name, stage in whole.stages.items() if stage.group is None), *whole.groups]
        hint = suggest(first, [*names, *TOP]) or f"; there are {', '.join(names)}"
        return f"leads nowhere: {show_key(first)} is neither a stage nor one of {', '.join(TOP)}{hint}"
    if not rest or (in_group and len(rest) == 1 and rest[0] in STEPS and rest[0] != "critique"):
        return f"is a whole section; name a key of it, such as {SWEEP}.{'.'.join(path)}.KEY"
    if "method" in rest[:2] or (in_group and rest in (["train"], ["critique"])):
        return _CHANGES_STAGES
    if rest[-1] in HARMLESS and len(rest) == (2 if rest[0] in STEPS else 1):
        return "changes nothing in what is trained, so every run would be the same"
    return None


def _describe_values(axis: Axis) -> str | None:
    seen: set[str] = set()
    for node, plain in zip(axis.values, axis.plain, strict=True):
        # 1e-1 and 0.1 are one value, and so are 1 and 1.0; true and 1 are two.
        same = json.dumps(float(plain) if isinstance(plain, int) and not isinstance(plain, bool) else plain)
        if same in seen:
            return f"has {show(node)} twice; keep one"
        seen.add(same)
    return None


def _describe_conflict(axis: Axis, others: Collection[Axis]) -> str | None:
    for other in others:
        if other.path == axis.path:
            return f"is here twice, first at {other.place}; keep one"
        shorter = min(len(axis.path), len(other.path))
        if axis.path[:shorter] == other.path[:shorter]:
            return f"and {SWEEP}.{other.key} set the same value; keep one"
    return None


# Which runs there are


class _Spreader:
    def __init__(self, whole: Whole, axes: list[Axis], split: Callable[[Node], Whole]) -> None:
        self._base, self._axes, self._split = whole, axes, split
        self._wholes: dict[Point, Whole] = {}
        self._tops: dict[Point, Section] = {}
        self._read: dict[int, set[int]] = {}
        # Laid on the recipe to see whether a stage reads a key: null may take the key away instead.
        self._probe = {
            number: next((at for at, node in enumerate(axis.values) if node.value is not None), 0)
            for number, axis in enumerate(axes)
        }

    def spread(self) -> Swept:
        points = {name: self._find_points(name) for name in self._base.stages}
        place = self._base.top.node.value[SWEEP].place
        if sum(map(len, points.values())) > MAX_RUNS:
            self._refuse_many(place)
        used = {number for found in points.values() for point in found for number, _ in point}
        for number, axis in enumerate(self._axes):
            if number not in used:
                in_top = f"every stage has {axis.path[0]} of its own, or needs none"
                why = in_top if axis.path[0] in TOP else "no stage reads it"
                raise RecipeError(f"{SWEEP}.{axis.key} has no effect: {why}", where=axis.place)
        names = {name: self._name_runs(name, found) for name, found in points.items()}
        self._require_names(names, place)
        first = self._look(tuple((number, 0) for number in range(len(self._axes)))).top
        runs: list[Run] = []
        groups: dict[int, Group] = {}
        for name, found in points.items():
            for point in found:
                chosen = dict(point)
                alone = tuple((number, chosen[number]) for number in self._find_reached(name, point, alone=True))
                edition = self._look(alone)
                groups |= {id(edition.groups[group]): edition.groups[group] for group in edition.groups}
                runs.append(self._make_run(name, point, edition.stages[name], names))
        tops = dict.fromkeys([first, *(run.stage.top for run in runs if run.stage.top is not None)])
        return Swept(runs, list(tops), list(groups.values()))

    def _find_points(self, name: str) -> list[Point]:
        """Find the combinations of values that matter to a stage, in order.

        Each choice decides what else matters: a start_from may be swept, and so the keys of the stage it names.
        """
        found: dict[Point, None] = {}
        waiting: list[Point] = [()]
        while waiting:
            point = waiting.pop()
            chosen = dict(point)
            reached = self._find_reached(name, point)
            missing = next((number for number in reached if number not in chosen), None)
            if missing is None:
                found[tuple((number, chosen[number]) for number in reached)] = None
            else:
                values = range(len(self._axes[missing].values))
                waiting += [tuple(sorted((*point, (missing, value)))) for value in values]
            if len(found) + len(waiting) > MAX_RUNS:
                self._refuse_many(self._base.top.node.value[SWEEP].place)
        return sorted(found)

    def _refuse_many(self, place: str) -> None:
        raise RecipeError(f"{SWEEP} makes more than {MAX_RUNS} runs; give fewer keys or values", where=place)

    def _find_reached(self, name: str, point: Point, *, alone: bool = False) -> list[int]:
        """Find the axes that matter to a stage when these values are chosen; `alone`: not through other stages."""
        stages, waiting = {name}, [name]
        while waiting and not alone:
            needs = find_needs(self._look(point).stages[waiting.pop()], self._base.stages)
            waiting += needs.keys() - stages
            stages |= needs.keys()
        given = {number: at for number, at in point if self._axes[number].values[at].value is not None}
        laid = self._probe | given
        probed = self._look(tuple(sorted(laid.items())))
        read = set().union(*(self._list_read(probed.stages[stage]) for stage in stages))
        return [number for number, axis in enumerate(self._axes) if id(axis.values[laid[number]]) in read]

    def _list_read(self, stage: Section) -> set[int]:
        """List the nodes that a stage reads; who makes rows reads no lora."""
        if id(stage) not in self._read:
            assert stage.top is not None
            keys = ("seed", "model") if stage.method in FEEDBACK else ("seed", "model", "lora")
            nodes = [stage.node, *(stage.top.node.value[key] for key in keys if key in stage.top.node.value)]
            self._read[id(stage)] = {id(leaf) for node in nodes for _, leaf in node.leaves()}
        return self._read[id(stage)]

    def _look(self, point: Point) -> Whole:
        """Lay these values on the recipe, and the first ones of other keys; only lora: is left as the recipe has it."""
        if point not in self._wholes:
            tree, chosen = self._base.top.node, dict(point)
            laid = {number: 0 for number, axis in enumerate(self._axes) if axis.path[0] != "lora"} | chosen
            for number, value in sorted(laid.items()):
                tree = self._axes[number].lay(tree, value)
            whole = self._wholes[point] = self._split(tree)
            at_top = tuple(item for item in sorted(laid.items()) if self._axes[item[0]].path[0] in TOP)
            whole.top = self._tops.setdefault(at_top, whole.top)
            for stage in whole.stages.values():
                stage.top = whole.top
        return self._wholes[point]

    def _make_run(self, name: str, point: Point, stage: Section, names: Mapping[str, Mapping[Point, str]]) -> Run:
        whole, chosen = self._look(point), dict(point)
        needed = {}
        for need in find_needs(whole.stages[name], self._base.stages):
            at = tuple((number, chosen[number]) for number in self._find_reached(need, point))
            needed[need] = names[need][at]
        values = {self._axes[number].key: self._axes[number].plain[value] for number, value in point}
        return Run(names[name][point], stage, whole, needed, values)

    def _name_runs(self, name: str, points: Collection[Point]) -> dict[Point, str]:
        """Name each run after the values that tell it from the others: dpo-learning_rate-2e-4-beta-0.1."""
        short = _shorten_keys({number: self._axes[number].path for point in points for number, _ in point})
        return {
            point: "-".join([name, *(f"{short[number]}-{self._axes[number].labels[at]}" for number, at in point)])
            for point in points
        }

    def _require_names(self, names: Mapping[str, Mapping[Point, str]], place: str) -> None:
        """Refuse names that two runs would have (on some file systems `A` is `a`), or that are too long for a file."""
        taken = {name.lower(): name for name in (*self._base.top.node.value, *names)}
        for name, made in names.items():
            for run in made.values() if [*made.values()] != [name] else ():
                if len(run) > MAX_NAME:
                    shown = f"{run[:60]}..., longer than {MAX_NAME} characters"
                    raise RecipeError(f"sweep names a run {shown}; sweep fewer keys", where=place)
                other = taken.setdefault(run.lower(), name)
                if other != name or run == name:
                    what = f"sweep names a run of {name} {run}, which {other} has already; rename one of them"
                    raise RecipeError(what, where=place)


def _shorten_keys(paths: Mapping[int, tuple[str, ...]]) -> dict[int, str]:
    """Find the shortest end of each dotted key that no other has, as a part of a file name."""
    short = {}
    for number, path in paths.items():
        others = [other for key, other in paths.items() if key != number]
        length = next(n for n in range(1, len(path) + 2) if n > len(path) or all(o[-n:] != path[-n:] for o in others))
        short[number] = re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(path[-length:]))
    return short


def _label(values: Collection[Node]) -> tuple[str, ...]:
    """Say what names call the values: as they are written where those are distinct file names, else 1, 2, ..."""
    labels = [_shorten(node) or str(position) for position, node in enumerate(values, 1)]
    if len({label.lower() for label in labels}) < len(labels):  # some file systems do not tell a from A
        labels = [str(position) for position in range(1, len(labels) + 1)]
    return tuple(labels)


def _shorten(node: Node) -> str:
    """A value as a part of a file name: 2e-4, true, Llama-3.1-8B for meta-llama/Llama-3.1-8B; "" for a list."""
    if isinstance(node.value, (dict, list)):
        return ""
    if node.value is None:
        return "none"
    if not isinstance(node.value, str):
        return (node.text or json.dumps(node.value)).strip().replace("+", "")
    last = re.split(r"[/:]", node.value.rstrip("/:"))[-1]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", last).strip("-.")[:_LONGEST_LABEL].rstrip("-.")
