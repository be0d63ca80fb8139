"""What `sweep:` makes of a recipe: a run of each stage for every combination of the values that matter to it.

The swept values are laid on the recipe, and the whole recipe is split into its stages again. A value matters to a stage
that holds it, reads it from the top level, or takes something from a stage to which it matters; choices that differ in
other values only are one run. So two sweeps that never meet in one stage are not multiplied.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from alignkit.errors import Problem, RecipeError, suggest
from alignkit.recipe.check import accepted_keys, describe_unknown, describe_unknown_in_stage, show, show_key
from alignkit.recipe.methods import FEEDBACK, RLAIF, STEPS
from alignkit.recipe.schema import SWEEP, LoraOptions, ModelOptions
from alignkit.recipe.sections import Section, Whole, find_needs, list_steps
from alignkit.recipe.stage import HARMLESS
from alignkit.recipe.words import TABLES
from alignkit.recipe.yaml import FLAG, Node, lay_value

TOP = ("seed", "model", "lora", "data", "eval")  # keys of the top level that stages read
_REFUSED = TABLES["not swept"]
_CHANGES_STAGES = "decides which stages there are; a sweep changes values only: write a section for each"
_LONGEST_LABEL = 40
MAX_RUNS = 256
MAX_NAME = 200  # characters; a file name holds 255, and a job's name or a file of the run adds some

Path = tuple[str, ...]  # of keys in the tree
Point = tuple[tuple[int, int], ...]  # sorted positions of axes, each with the position of one of its values


@dataclass(frozen=True)
class Axis:
    """One swept key with its values, and what names and tables call them."""

    path: Path
    values: list[Node]
    labels: list[str]
    plain: list[Any]  # as written, before paths are resolved
    place: str

    @property
    def key(self) -> str:
        return ".".join(self.path)

    def lay(self, tree: Node, value: int) -> Node:
        """Put one of the values into the tree; raises RecipeError when the key leads nowhere."""
        keys, node = list(self.path), self.values[value]
        step = tree.value[keys[0]].value.get(keys[1]) if len(keys) > 2 and keys[1] in STEPS else None
        if step is not None and step.value is True:  # `critique: true` is short for an empty mapping
            tree = lay_value(tree, keys[:2], Node({}, step.origin, step.line), key=self.key, where=self.place)
        laid = lay_value(tree, keys, node, key=f"{SWEEP}.{self.key}", where=self.place)
        if keys == ["lora"] and node.value is None:  # no adapters, whether or not the recipe has a lora: section
            laid.value.pop("lora", None)
        return laid


def spread(base: Whole, split: Callable[[Node], Whole]) -> tuple[list[Section], list[Whole], list[Problem]]:
    """Find the runs, and the recipe with each choice of values, the first ones first; none if the sweep is wrong."""
    node, axes, problems = base.top.node.value[SWEEP], list[Axis](), list[Problem]()
    if not isinstance(node.value, dict | None):
        what = f"{SWEEP} is {show(node)}; it must be a mapping, such as {{dpo.beta: [0.05, 0.1, 0.5]}}"
        return [], [], [Problem(what, node.place)]
    entries = list(_flatten(node, (), base, problems)) if node.value else []
    off = [path for path, child in entries if child.value is None]
    replaced = [path for path, child in entries if child.place == FLAG]  # dpo.beta or dpo: {beta: ...} in the file
    for path, child in entries:
        if any(path[: len(other)] == other for other in off) or (child.place != FLAG and path in replaced):
            continue
        axis = Axis(path, child.value, _label(child.value), child.plain(), child.place)
        if found := _find_problem(axis, axes, base):
            problems.append(found)
        else:
            axes.append(axis)
    try:
        return (*_Spreader(base, axes, split).spread(), problems) if axes else ([], [], problems)
    except RecipeError as error:
        return [], [], [*problems, *error.problems]


def _flatten(node: Node, above: Path, whole: Whole, problems: list[Problem]) -> Iterator[tuple[Path, Node]]:
    """Yield path and node of each list, and of each null that the command line puts in a list's place."""
    for name, child in node.value.items():
        path = (*above, *name.split("."))
        shown, what = show_key(".".join((SWEEP, *path))), ""
        if not all(path):
            what = "is not a dotted key, such as dpo.beta"
        elif isinstance(child.value, dict):
            yield from _flatten(child, path, whole, problems)
        elif (isinstance(child.value, list) and child.value) or (child.value is None and child.place == FLAG):
            steps = [(group, step) for group in whole.groups for step in STEPS if path[0] == f"{group}-{step}"]
            in_group = steps and path[0] not in whole.top.node.value  # rlaif-dpo.beta is rlaif.dpo.beta
            yield (*steps[0], *path[1:]) if in_group else path, child
        elif child.value == []:
            what = "is empty; give at least one value, or take it out"
        else:
            again = f"[{show(child)}]" if child.value is not None else "[0.1, 0.5]"
            what = f"is {show(child)}; it must be a list of values, such as {again}"
        if what:
            problems.append(Problem(f"{shown} {what}", child.place))


def _find_problem(axis: Axis, others: Collection[Axis], whole: Whole) -> Problem | None:
    tree, path = whole.top.node, axis.path
    what = _describe_key(path, whole)
    # 1e-1 and 0.1 are one value, and so are 1 and 1.0; true and 1 are two.
    same = [json.dumps(float(one) if type(one) is int else one) for one in axis.plain]
    if not what and (at := next((at for at, one in enumerate(same) if one in same[:at]), None)) is not None:
        what = f"has {show(axis.values[at])} twice; keep one"
    for other in () if what else others:
        if all(mine == theirs for mine, theirs in zip(path, other.path, strict=False)):
            set_too = f"and {SWEEP}.{other.key} set the same value; keep one"
            what = f"is here twice, first at {other.place}; keep one" if other.path == path else set_too
            break
    if what:
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
        return Problem(what, FLAG)
    try:
        laid = [axis.lay(tree, value) for value in range(len(axis.values))]
    except RecipeError as error:
        return error.problems[0]
    if path[0] in whole.groups and len({list_steps(one.value[path[0]].value) for one in (tree, *laid)}) > 1:
        return Problem(f"{SWEEP}.{axis.key} {_CHANGES_STAGES}", axis.place)
    return None


def _describe_key(path: Path, whole: Whole) -> str | None:
    first, *rest = path
    in_group = first in whole.groups
    if first in _REFUSED:
        return f"cannot be swept: {_REFUSED[first]}"
    if first in TOP:
        known = {"model": ModelOptions.model_fields, "lora": LoraOptions.model_fields}.get(first, {})
        is_wrong = rest and known and rest[0] not in known
        return f"leads nowhere: {describe_unknown(rest[0], first, known)}" if is_wrong else None
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


class _Spreader:
    def __init__(self, base: Whole, axes: list[Axis], split: Callable[[Node], Whole]) -> None:
        self._base, self._axes, self._split = base, axes, split
        self._place = base.top.node.value[SWEEP].place
        self._wholes: dict[Point, Whole] = {}

    def spread(self) -> tuple[list[Section], list[Whole]]:
        axes, points = self._axes, {name: self._find_points(name) for name in self._base.stages}
        self._require_few(sum(map(len, points.values())))
        used = {number for found in points.values() for point in found for number, _ in point}
        for axis in (axis for number, axis in enumerate(axes) if number not in used):
            in_top = f"every stage has {axis.path[0]} of its own, or needs none"
            why = in_top if axis.path[0] in TOP else "no stage reads it"
            raise RecipeError(f"{SWEEP}.{axis.key} has no effect: {why}", where=axis.place)
        names: dict[str, dict[Point, str]] = {}  # after the values that differ: dpo-learning_rate-2e-4-beta-0.1
        for name, found in points.items():
            paths, short = {number: axes[number].path for point in found for number, _ in point}, dict[int, str]()
            for number, path in paths.items():  # the shortest end of the dotted key that no other has
                others = [other for key, other in paths.items() if key != number]
                own = (path[-n:] for n in range(1, len(path) + 1) if all(o[-n:] != path[-n:] for o in others))
                short[number] = re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(next(own, path)))
            parts = {point: [f"{short[number]}-{axes[number].labels[at]}" for number, at in point] for point in found}
            names[name] = {point: "-".join([name, *parts[point]]) for point in found}
        # On some file systems `A` is `a`, and a name may be too long for a file.
        taken = {name.lower(): name for name in (*self._base.top.node.value, *names)}
        for name, made in ((name, made) for name, of in names.items() for made in of.values() if [*of] != [()]):
            other, what = taken.setdefault(made.lower(), name), ""
            if len(made) > MAX_NAME:
                what = f"a run {made[:60]}..., longer than {MAX_NAME} characters; sweep fewer keys"
            elif other != name or made == name:
                what = f"a run of {name} {made}, which {other} has already; rename one of them"
            if what:
                raise RecipeError(f"sweep names {what}", where=self._place)
        wholes = [self._lay(tuple((number, 0) for number in range(len(axes))))]
        runs = []
        for name, point in ((name, point) for name, found in points.items() for point in found):
            run = self._lay(point).stages[name]
            run.run = names[name][point]
            run.point = {axes[number].key: axes[number].plain[at] for number, at in point}
            needs = {need: self._find_reached(need, point) for need in find_needs(run, self._base.stages)}
            run.names = {need: names[need][tuple(item for item in point if item[0] in reached)]
                         for need, reached in needs.items()}  # fmt: skip
            runs.append(run)
            wholes.append(self._lay(point))
        return runs, list(dict.fromkeys(wholes))

    def _lay(self, point: Point) -> Whole:
        """Lay these values on the recipe, and the first ones of other keys; only lora: is left as the recipe has it."""
        if point not in self._wholes:
            tree = self._base.top.node
            first = {number: 0 for number, axis in enumerate(self._axes) if axis.path[0] != "lora"}
            for number, value in sorted((first | dict(point)).items()):
                tree = self._axes[number].lay(tree, value)
            self._wholes[point] = self._split(tree)
        return self._wholes[point]

    def _find_points(self, name: str) -> list[Point]:
        """Find the combinations of values that matter to a stage, in order.
        Each choice decides what else matters: a start_from may be swept, and so the keys of the stage it names."""
        found: list[Point] = []
        waiting: list[Point] = [()]
        while waiting:
            point = waiting.pop()
            reached = self._find_reached(name, point)
            missing = next((number for number in reached if number not in dict(point)), None)
            if missing is None:
                found.append(tuple(item for item in point if item[0] in reached))
            else:
                values = range(len(self._axes[missing].values))
                waiting += [tuple(sorted((*point, (missing, value)))) for value in values]
            self._require_few(len(found) + len(waiting))
        return sorted(set(found))

    def _require_few(self, count: int) -> None:
        if count > MAX_RUNS:
            raise RecipeError(f"{SWEEP} makes more than {MAX_RUNS} runs; give fewer keys or values", where=self._place)

    def _find_reached(self, name: str, point: Point) -> list[int]:
        """Find the axes that matter to a stage when these values are chosen, by itself or through what it needs."""
        stages, waiting = {name}, [name]
        while waiting:
            needs = find_needs(self._lay(point).stages[waiting.pop()], self._base.stages).keys() - stages
            waiting += needs
            stages |= needs
        # A value that is null may take its key away, so another one is laid to see whether a stage reads the key.
        laid = dict(point)
        for number, axis in enumerate(self._axes):
            if number not in laid or axis.values[laid[number]].value is None:
                laid[number] = next((at for at, node in enumerate(axis.values) if node.value is not None), 0)
        probed = self._lay(tuple(sorted(laid.items())))
        read: set[int] = set()
        for stage in map(probed.stages.__getitem__, stages):
            keys = ("seed", "model") if stage.method in FEEDBACK else ("seed", "model", "lora")
            nodes = [stage.node, *(node for key in keys if (node := probed.top.node.value.get(key)))]
            read |= {id(leaf) for node in nodes for _, leaf in node.leaves()}
        return [number for number, axis in enumerate(self._axes) if id(axis.values[laid[number]]) in read]


def _label(values: Collection[Node]) -> list[str]:
    """Say what names call the values: 2e-4, Llama-3.1-8B for meta-llama/Llama-3.1-8B; 1, 2, ... where two are alike."""
    labels, positions = [], [str(position) for position in range(1, len(values) + 1)]
    for position, node in zip(positions, values, strict=True):
        if isinstance(node.value, str):
            last = re.split(r"[/:]", node.value.rstrip("/:"))[-1]
            label = re.sub(r"[^A-Za-z0-9_.-]+", "-", last).strip("-.")[:_LONGEST_LABEL].rstrip("-.")
        elif isinstance(node.value, dict | list):
            label = ""
        else:
            label = "none" if node.value is None else (node.text or json.dumps(node.value)).strip().replace("+", "")
        labels.append(label or position)
    # some file systems do not tell a from A
    return labels if len({label.lower() for label in labels}) == len(labels) else positions
