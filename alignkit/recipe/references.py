"""What a recipe names: files, models, and stages that it starts from, is scored, judged or fed by."""

import glob
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Literal

from alignkit.errors import Problem, suggest
from alignkit.recipe.check import show
from alignkit.recipe.schema import BUILTIN_REWARD, EVALUATED, FEEDBACK, TASKS
from alignkit.recipe.sections import Section
from alignkit.recipe.words import TABLES
from alignkit.recipe.yaml import Node, expand

RUNS = "runs"
ROWS = "rows.jsonl"  # what a critique or label stage writes
SOURCE_KEYS = ("data", "eval", "normalize_data", "mix", "check")
REWARD_KEYS = ("reward", "gold")
_LOCAL_SUFFIXES = tuple(TABLES["suffixes of local files"])

Kind = Literal["start", "weights", "rows", "reward", "writer", "file"]
# Where names stand: the keys that lead there, through lists or not, and the entry of a mapping that another value than
# a mapping is short for.
_NAMES = [(key, entry, kind) for keys, entry, kind in TABLES["what names what"] for key in keys.split()]


@dataclass(frozen=True)
class Name:
    """A text of a section that names a file, a model or another stage."""

    key: str  # as written below the section: data.path, reward.judge
    node: Node
    kind: Kind

    @property
    def first(self) -> str:
        return self.key.split(".")[0]


def find_names(section: Node) -> list[Name]:
    """List what a stage, `evaluate:` or the top level names; the values may be wrong in any way."""
    found = []
    for key, entry, kind in _NAMES:
        for node in _find(section, key.split(".")):
            is_mapping = isinstance(node.value, dict)
            named = node.value.get(entry) if entry and is_mapping else node
            # none and builtin are words of `examples:`, beside files
            if named and isinstance(named.value, str) and not (kind == "file" and named.value in ("none", "builtin")):
                found.append(Name(f"{key}.path" if entry == "path" and is_mapping else key, named, kind))
    return found


def _find(node: Node, keys: Sequence[str]) -> Iterator[Node]:
    if isinstance(node.value, list):
        for item in node.value:
            yield from _find(item, keys)
    elif not keys:
        yield node
    elif isinstance(node.value, dict) and keys[0] in node.value:
        yield from _find(node.value[keys[0]], keys[1:])


def find_needs(section: Section, stages: Collection[str]) -> dict[str, Name]:
    """Find the stages that a stage takes something from, each with one name that says so."""
    names = [name for name in find_names(section.node) if name.kind not in ("file", "weights")]
    return {name.node.value: name for name in names if name.node.value in stages}


def resolve_paths(tops: Sequence[Section], stages: Sequence[Section], stage_names: Collection[str]) -> list[Problem]:
    """Make every path absolute, in place and once, and say which cannot be; names of stages are left alone."""
    found: dict[int, tuple[str, Name]] = {}
    for top in tops:
        for key in ("path", "tokenizer", "chat_template"):
            for node in _find(top.node, ("model", key)):
                # A template that is no file is one of ours, by name.
                if isinstance(node.value, str) and (key != "chat_template" or node.value.endswith(".jinja")):
                    found.setdefault(id(node), (f"model.{key}", Name("model", node, "rows")))
        for name in find_names(top.node):
            if name.first in SOURCE_KEYS:
                found.setdefault(id(name.node), (name.key, name))
        if evaluate := top.node.value.get("evaluate"):
            found |= {id(name.node): (f"evaluate.{name.key}", name) for name in find_names(evaluate)}
    for stage in stages:
        for name in find_names(stage.node):
            found.setdefault(id(name.node), (f"{stage.label}.{name.key}", name))
    problems = []
    for key, name in found.values():
        node = name.node
        is_stage = node.value in stage_names and name.key != "model"
        if is_stage or node.value.startswith(("builtin:", "pypi:")) or "://" in node.value:
            continue
        try:
            text, here = expand(node.value), Path.cwd()
        except ValueError as error:
            problems.append(Problem(f"{key}: {error}", node.place))
            continue
        paths = [os.path.join(folder, text) for folder in (node.origin.folder, here)]
        there = [path for path in paths if os.path.exists(path) or ("*" in text and glob.glob(path, recursive=True))]
        # A hub id (`name` or `owner/name`) is told from a file or directory that is not there by its looks.
        is_local = text.startswith((".", "/")) or text.lower().endswith(_LOCAL_SUFFIXES) or "*" in text
        if there:
            node.value = os.path.abspath(there[0])
        elif name.kind == "file" or is_local or text.count("/") > 1:
            # Runs and models that are yet to come are below the working directory, files beside the recipe.
            node.value = os.path.abspath((node.origin.folder if name.kind in ("rows", "file") else here) / text)
    return problems


def check_references(stage: Section, stages: Mapping[str, Section], groups: Collection[str]) -> Iterator[Problem]:
    """Yield what is wrong with the names by which a stage calls others; the keys are marked as broken."""
    for name in find_names(stage.node):
        value, key = name.node.value, stage.say(name.key.removesuffix(".path"))
        if name.first in stage.broken or name.kind in ("file", "weights"):
            continue
        found: str | None
        if name.kind == "start" and value in groups:
            trained = [other.name for other in stages.values() if other.group == value and other.method not in FEEDBACK]
            found = f", which stands for several stages; name one of them: {', '.join(trained)}"
        elif value not in stages:
            found = _describe_stranger(name, stages)
        elif value == stage.name and name.kind != "start":
            found = ", the stage itself"
        else:
            own, other = _kind_of(stage), _kind_of(stages[value])
            fitting = (what for uses, others, of, what in TABLES["misfits"]
                       if name.kind in uses.split() and other in others.split() and own in of.split())  # fmt: skip
            found = next(fitting, "").replace("{method}", stage.method)
        if found:
            stage.broken.add(name.first)
            yield Problem(f"{key} is {show(name.node)}{found}", name.node.place)


def _kind_of(stage: Section) -> str:
    given = stage.node.value
    if "objective" in given and given["objective"].value in TASKS:
        return "classifier"
    return "best_of" if "best_of" in given and given["best_of"].value is True else stage.method


def _describe_stranger(name: Name, stages: Mapping[str, Section]) -> str | None:
    value = name.node.value
    if name.kind == "reward" and value.startswith("builtin:") and value != BUILTIN_REWARD:
        return f", a builtin reward that is not there; the only one is {BUILTIN_REWARD}"
    if name.kind == "rows" or "/" in value or value.startswith(("builtin:", "pypi:")):
        return None
    hint = suggest(value, stages)
    if not hint and name.kind == "reward" and re.fullmatch(r"[\w.]+:\w+", value):
        hint = f"; a function is written {{function: {value}}}"
    writers = [other.name for other in stages.values() if other.method not in (*FEEDBACK, "rm")]
    accepted = {
        "start": f"a stage ({', '.join(stages)}), a run directory or a model",
        "writer": f"a stage ({', '.join(writers)}), a run, a model, or {{url: ...}}",
        "reward": "an rm stage, a run, a directory, a hub id (owner/name) or {function: pkg.module:name}",
    }[name.kind]
    return f", which is neither a stage nor a path that exists{hint or f'; it must be {accepted}'}"


def check_circles(runs: Mapping[str, Section]) -> Iterator[Problem]:
    """Yield each stage that needs itself, through others or at once; the keys are marked as broken."""
    known = {*runs, *(run.name for run in runs.values())}
    needs = {
        name: {run.names.get(need, need): named for need, named in find_needs(run, known).items()}
        for name, run in runs.items()
    }
    while True:
        try:
            TopologicalSorter(needs).prepare()
            return
        except CycleError as error:
            _, *circle = reversed(error.args[1])  # each needs the next one, the last the first
            for place, name in enumerate(circle):
                way = [*circle[place:], *circle[:place], name]
                run, named = runs[name], needs[name].pop(way[1])
                if named.first not in run.broken:
                    run.broken.add(named.first)
                    chain = " -> ".join(runs[other].name for other in way)
                    yield Problem(f"{run.say(named.first)} goes round in a circle: {chain}", named.node.place)


def check_evaluated(evaluate: Node, stages: Collection[str]) -> Iterator[Problem]:
    """Yield what is wrong with the models that `evaluate:` names; `stages` holds the names of swept ones too."""
    for name in find_names(evaluate):
        value = name.node.value
        if name.key in EVALUATED and value not in stages and not {"/", ":"} & set(value):
            hint = suggest(value, stages) or f"; the stages are {', '.join(stages)}"
            what = f"evaluate.{name.key} is {show(name.node)}, which is neither a stage nor a path that exists{hint}"
            yield Problem(what, name.node.place)


def find_origins(parts: Mapping[str, Node]) -> dict[str, str]:
    """Find the place of every dotted key; one source under `data:` is also `data.0`, and one reward `reward.0`."""
    origins = {"name": "default", "seed": "default"}
    for path, child in (leaf for name, node in parts.items() for leaf in node.leaves((name,))):
        origins[".".join(path)] = child.place
        if path[-1] in (*SOURCE_KEYS, *REWARD_KEYS) and not isinstance(child.value, list):
            origins |= {".".join((*path, "0", *below)): leaf.place for below, leaf in child.leaves()}
    return origins
