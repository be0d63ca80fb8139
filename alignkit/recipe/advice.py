"""Where a key that is not known in its place belongs, or what it is called now.

Knows names only, never values; the nearest spelling is the last resort, after meaning.
"""

from __future__ import annotations

import re

from alignkit.errors import Problem
from alignkit.recipe.check import describe_unknown, show_key
from alignkit.recipe.fields import CONTROLLED, ELSEWHERE, MOVED, controlled_fields, method_fields, moved_names
from alignkit.recipe.nearest import suggest
from alignkit.recipe.rlaif import METHOD as RLAIF
from alignkit.recipe.schema import OPTIONS, LoraOptions, ModelOptions, option_fragments, recipe_fragments


def describe_unknown_top(name: str, *, is_mapping: bool) -> str:
    """Say that a recipe has no such key at its top level, and where it belongs."""
    known, sections = recipe_fragments()["properties"], [*OPTIONS, RLAIF]
    if name == "trust_remote_code":
        return f"{name}: {CONTROLLED[name]}"
    if name == "extends":
        return "extends cannot be set from the command line; write it in the file"
    if name.lower() in ELSEWHERE:
        return f"{name} is not a section here: {ELSEWHERE[name.lower()]}"
    owner = _find_section(name)
    if owner:
        return f"{name} is not a key at the top level; it belongs in {owner}"
    if name in MOVED or name in CONTROLLED:
        return f"{name} is not a key here: {MOVED.get(name) or CONTROLLED[name]}"
    hint = suggest(name, [*known, *sections])
    if is_mapping and not hint:
        return f"{show_key(name)} is not a section; a stage of this name needs `method:` ({', '.join(sections)})"
    return describe_unknown(name, "", [*known, *sections])


def describe_unknown_in_stage(key: str, *, stage: str, method: str, accepted: list[str]) -> str:
    """Say that a stage has no such key, and where it belongs."""
    where = f"{stage}.{key}"
    refused, moved = controlled_fields(method), moved_names(method)
    if key in refused:
        return f"{where} cannot be set: {refused[key]}"
    if key in recipe_fragments()["properties"] and key not in option_fragments("sft")["properties"]:
        return f"{where} is not a key of a stage; {key} belongs at the top level of the recipe"
    if key in moved:
        return f"{where} is not a key of a stage: {moved[key]}"
    owner = _find_section(key)
    if owner:
        return f"{where} is not a key of {method}; it belongs in {owner}"
    return describe_unknown(key, stage, accepted)


def _find_section(key: str) -> str | None:
    """Return where a key would be right: "a dpo stage", "model:", "lora:"."""
    methods = [name for name in OPTIONS if key in method_fields(name) or key in option_fragments(name)["properties"]]
    if methods and key != "method":
        return f"a stage, such as {methods[0]}" if len(methods) > 2 else f"the {' or '.join(methods)} stage"
    for section, model in (("model:", ModelOptions), ("lora:", LoraOptions)):
        if key in model.model_fields and key not in ("path", "config"):
            return section
    return None


def explain_moved(problem: Problem) -> Problem:
    """Give the new name of an old key instead of the nearest spelling."""
    match = re.match(r"(\w+)\.(\w+) is not a key of \w+(?=[;\[.])", problem.what)
    name = match[2] if match else ""
    if name == "trust_remote_code":
        return Problem(f"{match[1] if match else ''}.{name}: {CONTROLLED[name]}", problem.where)
    moved = MOVED.get(name)
    return Problem(f"{match[0]}: {moved}", problem.where) if match and moved else problem
