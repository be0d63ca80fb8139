"""Values held against a JSON Schema, with messages that name the place, the value and what is accepted."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from alignkit.console import redact
from alignkit.errors import Problem
from alignkit.recipe.nearest import suggest
from alignkit.recipe.schema import OPTIONS, RLAIF, LoraOptions, ModelOptions, option_fragments, recipe_fragments
from alignkit.recipe.trl_fields import CONTROLLED, ELSEWHERE, MOVED, controlled_fields, method_fields, moved_names
from alignkit.recipe.yaml import Node, read_scalar

Fragment = dict[str, Any]

_NAMES = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "array": "a list",
    "object": "a mapping",
}
_BOUNDS = {
    "exclusiveMinimum": ("greater than", lambda value, bound: value > bound),
    "minimum": ("at least", lambda value, bound: value >= bound),
    "exclusiveMaximum": ("less than", lambda value, bound: value < bound),
    "maximum": ("at most", lambda value, bound: value <= bound),
}
_YAML_11_BOOLEANS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
_MANY = 20


def check(node: Node, fragment: Fragment, key: str, defs: Fragment) -> Iterator[Problem]:
    """Yield every problem of a value; `key` is its dotted name and `defs` what `$ref` points into."""
    options = [_follow(option, defs) for option in _list_options(fragment, defs)]
    fitting = [option for option in options if _kind_fits(node.value, option)]
    if not fitting:
        yield Problem(_describe_wrong_kind(node, key, options, fragment), node.place)
        return
    attempts = [list(_check_option(node, option, key, defs, fragment)) for option in fitting]
    yield from min(attempts, key=len)


def check_mapping(node: Node, fragment: Fragment, key: str, defs: Fragment) -> Iterator[Problem]:
    """Yield the problems of a mapping's entries, unknown and missing keys included."""
    properties: Fragment = fragment.get("properties", {})
    others = fragment.get("additionalProperties", True)
    for name, child in node.value.items():
        if name in properties:
            yield from check(child, properties[name], f"{key}.{name}", defs)
        elif isinstance(others, dict):
            yield from check(child, others, f"{key}.{name}", defs)
        elif not others:
            yield Problem(describe_unknown(name, key, properties), child.place)
    for name in fragment.get("required", ()):
        if name not in node.value:
            yield Problem(f"{key}.{name} is missing; {quote_help(properties[name])}", node.place)


def describe_unknown(name: str, section: str, accepted: Iterable[str]) -> str:
    """Say that a section has no such key and which is nearest."""
    known = list(accepted)
    hint = suggest(name, known)
    if not hint:
        hint = f"; it has {', '.join(known)}" if len(known) <= _MANY else "; `alignkit schema` lists its keys"
    return f"{show_key(f'{section}.{name}' if section else name)} is not a key of {section or 'a recipe'}{hint}"


def show(node: Node) -> str:
    """Return a value as a message shows it: in one line, shortened, without secrets."""
    if node.value is None:
        return "empty"
    if isinstance(node.value, str):
        plain = not node.quoted and node.value and not re.search(r"[\s,;]", node.value)
        text = node.value if plain else json.dumps(node.value, ensure_ascii=False)
    elif isinstance(node.value, (dict, list)):
        text = json.dumps(node.plain(), ensure_ascii=False)
    else:
        text = json.dumps(node.value).replace("Infinity", ".inf").replace("NaN", ".nan")
    text = redact(text)
    return text if len(text) <= 60 else f"{text[:57]}..."


def show_key(key: str) -> str:
    """Return a key as a message shows it: shortened, without secrets or line breaks."""
    text = redact(key)
    text = text if text.isprintable() else json.dumps(text, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _list_options(fragment: Fragment, defs: Fragment) -> list[Fragment]:
    fragment = _follow(fragment, defs)
    options: list[Fragment] = fragment.get("anyOf", [fragment])
    return options


def _follow(fragment: Fragment, defs: Fragment) -> Fragment:
    reference = fragment.get("$ref")
    return defs[reference.removeprefix("#/$defs/")] if reference else fragment


def _kind_fits(value: Any, option: Fragment) -> bool:
    return _kind(value) in _kinds(option) or (_kind(value) == "integer" and "number" in _kinds(option))


def _kind(value: Any) -> str:
    for kind, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (dict, "object")):
        if isinstance(value, kind):
            return name
    return "array" if isinstance(value, list) else "null"


def _kinds(option: Fragment) -> set[str]:
    if "type" in option:
        return {option["type"]}
    return {_kind(choice) for choice in _choices(option)}


def _choices(option: Fragment) -> list[Any]:
    return [option["const"]] if "const" in option else list(option.get("enum", ()))


def _check_option(node: Node, option: Fragment, key: str, defs: Fragment, whole: Fragment) -> Iterator[Problem]:
    """Yield the problems of a value that has the kind of this option."""
    value = node.value
    found = f"{show_key(key)} is {show(node)}"
    choices = _choices(option)
    if choices and value not in choices:
        if any(other.get("type") == "boolean" for other in whole.get("anyOf", ())):
            choices = [*choices, True, False]
        yield Problem(f"{found}; {_describe_choices(value, choices)}", node.place)
    elif isinstance(value, float) and not math.isfinite(value):
        yield Problem(f"{found}; it must be a finite number{_typical(whole)}", node.place)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        bounds = [(words, bound) for name, (words, _) in _BOUNDS.items() if (bound := option.get(name)) is not None]
        if not all(holds(value, option[name]) for name, (_, holds) in _BOUNDS.items() if name in option):
            accepted = " and ".join(f"{words} {bound}" for words, bound in bounds)
            yield Problem(f"{found}; it must be {accepted}{_typical(whole)}", node.place)
    elif isinstance(value, str):
        # fullmatch: in Python, unlike in pydantic, `$` alone would also stand before a newline at the end.
        if "pattern" in option and not re.fullmatch(option["pattern"], value):
            is_name = "._-]" in option["pattern"]
            rule = "use letters, digits, '.', '_' and '-' only" if is_name else quote_help(whole)
            yield Problem(f"{found}; {rule}", node.place)
        elif not value.strip() and not choices and str(whole.get("default") or "-").strip():  # `separator` may be blank
            yield Problem(f"{show_key(key)} is empty text", node.place)
    elif isinstance(value, dict):
        yield from check_mapping(node, option, key, defs)
    elif isinstance(value, list):
        if len(value) < option.get("minItems", 0):
            yield Problem(f"{show_key(key)} is an empty list; give at least one entry", node.place)
        for position, item in enumerate(value):
            yield from check(item, option.get("items", {}), f"{key}[{position}]", defs)


def _describe_choices(value: Any, choices: list[Any]) -> str:
    words = [json.dumps(choice) if not isinstance(choice, str) else choice for choice in choices]
    hint = suggest(value, words) if isinstance(value, str) else ""
    if isinstance(value, str) and value.lower() in ELSEWHERE:  # a method of its own, not a slip of the pen
        hint = f"; {ELSEWHERE[value.lower()]}"
    if len(words) > _MANY:
        return f"it must be one of {len(words)} names{hint or ' (`alignkit schema` lists them)'}"
    return (f"it must be one of {', '.join(words)}" if len(words) > 1 else f"it must be {words[0]}") + hint


def _describe_wrong_kind(node: Node, key: str, options: list[Fragment], whole: Fragment) -> str:
    accepted = " or ".join(dict.fromkeys(_name_option(option) for option in options if option.get("type") != "null"))
    return f"{show_key(key)} is {show(node)}; it must be {accepted}{_typical(whole)}{_hint(node, options)}"


def _name_option(option: Fragment) -> str:
    choices = _choices(option)
    if choices:
        words = [json.dumps(choice) if not isinstance(choice, str) else choice for choice in choices]
        return words[0] if len(words) == 1 else "one of " + ", ".join(words[:_MANY])
    name = _NAMES[option["type"]]
    bounds = [f"{words} {option[bound]}" for bound, (words, _) in _BOUNDS.items() if bound in option]
    joined = " and ".join(bounds)
    return f"{name} of {joined}" if joined.startswith("at ") else f"{name} {joined}".rstrip()


def _hint(node: Node, options: list[Fragment]) -> str:
    """Say what somebody who wrote this probably meant."""
    kinds = set().union(*(_kinds(option) for option in options))
    value = node.value
    if isinstance(value, str):
        meant = _YAML_11_BOOLEANS.get(value.lower())
        if "boolean" in kinds and meant:
            return f"; write {meant}"
        unquoted = read_scalar(value)
        if node.quoted and not isinstance(unquoted, str) and any(_kind_fits(unquoted, option) for option in options):
            return "; take the quotes off"
        digits = value.replace("_", "").replace(",", "")
        if kinds & {"integer", "number"} and digits.isdecimal() and digits != value:
            return f"; write {digits}"
    if isinstance(value, float) and "integer" in kinds and math.isfinite(value):
        return f"; write {int(value)}" if value == int(value) and abs(value) < 1e15 else ""
    return ""


def _typical(fragment: Fragment) -> str:
    return f" (typical: {fragment['typical']})" if "typical" in fragment else ""


def quote_help(fragment: Fragment) -> str:
    """Return the description of a key as the end of a sentence."""
    text: str = fragment.get("description", "give it a value")
    return text[:1].lower() + text[1:].rstrip(".")


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
