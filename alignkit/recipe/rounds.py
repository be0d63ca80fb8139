"""Rounds: a chain of label and training stages again and again, each time on answers of the newest policy.

The stages of later rounds are ordinary ones, named NAME-2, NAME-3, ...: each has its run directory and resumes by
itself, and more rounds leave the earlier ones alone.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

from alignkit.errors import Problem, suggest
from alignkit.recipe.references import find_names
from alignkit.recipe.schema import FEEDBACK, SWEEP
from alignkit.recipe.sections import Section, Whole
from alignkit.recipe.yaml import Node


def add_rounds(whole: Whole) -> Iterator[Problem]:
    """Put the stages of later rounds behind those of the first; yields what is wrong with a chain."""
    top = whole.top.node.value
    asked = [
        (group.node.value["rounds"], [stage.name for stage in group.stages if stage.method not in ("critique", "sft")])
        for group in whole.groups.values()
        if "rounds" in group.node.value
    ]
    own = top.get("rounds")
    if own is not None and isinstance(own.value, dict) and "stages" in own.value:
        listed = own.value["stages"].plain()
        asked.append((own, listed if isinstance(listed, list) else []))
    for node, chain in asked:
        given = node.plain() if isinstance(node.value, dict) else {"num": node.value}
        strange = [name for name in chain if name not in whole.stages]
        methods = [whole.stages[name].method for name in chain if name not in strange]
        if strange:
            yield Problem(
                f"rounds names {strange[0]}, which is not a stage{suggest(strange[0], whole.stages)}", node.place
            )
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
        for name in find_names(node):
            if name.node.value in made:
                starts_inside |= name.kind == "start"
                name.node.value = _in_round(name.node.value, number)
        if keeps and (data := node.value.get("data")) is not None:
            sources = data.value if isinstance(data.value, list) else [data]
            node.value["data"] = replace(
                data, value=[one for source in sources for one in _spread(source, made, number)]
            )
        start = policy if stage.method in FEEDBACK else None if restart or starts_inside else stage.name
        if start is not None:
            node.value["start_from"] = Node(_in_round(start, number - 1), node.origin, node.line)
        made.add(stage.name)
        run, shared = _in_round(stage.name, number), stage.shared - {"start_from"}
        yield replace(stage, name=run, run=run, first=stage.name, node=node, shared=shared, broken=set())


def _spread(source: Node, made: set[str], number: int) -> list[Node]:
    """The rows of a stage of the chain, with those of the rounds before; other sources as they are."""
    path = source.value.get("path", source) if isinstance(source.value, dict) else source
    name = str(path.value).removesuffix(f"-{number}")
    if name not in made:
        return [source]
    paths = [replace(path, value=_in_round(name, turn)) for turn in range(1, number + 1)]
    return paths if path is source else [replace(source, value={**source.value, "path": each}) for each in paths]
