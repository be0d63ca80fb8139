"""Values held against pydantic's models and TRL's fields; pydantic's findings become messages about the file."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from alignkit.errors import Problem, suggest
from alignkit.recipe.methods import OPTIONS, RLAIF, RlaifOptions
from alignkit.recipe.schema import LoraOptions, ModelOptions, RecipeOptions
from alignkit.recipe.words import (
    BOUNDS,
    TABLES,
    Fragment,
    Word,
    controlled_fields,
    find_method,
    find_word,
    make_type,
    method_fields,
)
from alignkit.recipe.yaml import Node, parse_yaml, read_scalar, shorten

_Error = tuple[tuple[str | int, ...], str]  # where pydantic found something wrong, below a node, and its type

_KINDS = {
    bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array", type(None): "null",
}  # fmt: skip
# pydantic's errors about the kind of a value: what else may stand there is said, or another member of a union fits.
_KIND_ERRORS = frozenset(TABLES["pydantic's errors of a kind"])
_MANY = 20


_Model = TypeVar("_Model", bound=BaseModel)


def check_keys(
    model: type[_Model], node: Node, method: str, label: str, say: Callable[[str], str]
) -> tuple[_Model | None, dict[str, list[Problem]]]:
    """Check the keys of a section: the problems by key, and without any what pydantic made of alignkit's own keys."""
    own = {key: child for key, child in node.value.items() if key in model.model_fields}
    made, found = validate(model, own, say)
    fields = method_fields(method)
    for key, child in node.value.items():
        if key in fields:
            if problems := check_field(child, method, key, say(key)):
                found[key] = problems
        elif key not in own:
            found[key] = [Problem(describe_unknown_in_stage(key, child, stage=label, method=method), child.place)]
    return made, found


def validate(
    model: type[_Model], values: Mapping[str, Node], say: Callable[[str], str]
) -> tuple[_Model | None, dict[str, list[Problem]]]:
    """Make a model of values, or find their problems by key; messages say `say(key)`, missing keys are no problem."""
    try:
        return model.model_validate({key: node.plain() for key, node in values.items()}), {}
    except ValidationError as error:
        errors: dict[str, list[_Error]] = {}
        for (key, *below), kind in _list_errors(error):
            errors.setdefault(str(key), []).append((tuple(below), kind))
        schema = _schema(model)
        return None, {
            key: list(_explain(values[key], schema["properties"][key], schema.get("$defs", {}), say(key), found))
            for key, found in errors.items()
            if key in values
        }


def check_field(node: Node, method: str, name: str, key: str) -> list[Problem]:
    """Check a value of one of TRL's fields, which messages call `key`."""
    try:
        _adapter(method, name).validate_python(node.plain())
        return []
    except ValidationError as error:
        return list(_explain(node, method_fields(method)[name], {}, key, _list_errors(error)))


@cache
def _schema(model: type[BaseModel]) -> Fragment:
    return model.model_json_schema()


@cache
def _adapter(method: str, name: str) -> TypeAdapter[Any]:
    config = ConfigDict(strict=True, allow_inf_nan=False)
    return TypeAdapter(make_type(method_fields(method)[name]), config=config)


def _list_errors(error: ValidationError) -> list[_Error]:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    # A default that is made of other keys' values is not made where those are wrong, which is told already.
    return [(problem["loc"], problem["type"]) for problem in found if problem["type"] != "default_factory_not_called"]


def _explain(node: Node, fragment: Fragment, defs: Fragment, key: str, errors: list[_Error]) -> Iterator[Problem]:
    """Yield a message for each thing that pydantic found wrong with a value or below it.
    pydantic names the member of a union in the path of an error, and a position or key where the schema wraps a value
    (one source in a list, its path in a mapping); neither is in the file."""

    def follow(fragment: Fragment) -> Fragment:
        return defs[fragment["$ref"].removeprefix("#/$defs/")] if "$ref" in fragment else fragment

    options = [follow(option) for option in follow(fragment).get("anyOf", [fragment])]
    is_list = isinstance(node.value, list)
    below: dict[str | int, list[_Error]] = {}
    members: dict[str | int, list[_Error]] = {}
    for loc, kind in errors:
        if not loc or (len(loc) == 1 and kind in ("extra_forbidden", "missing")):
            yield Problem(*_describe(node, fragment, options, key, kind, str(loc[0]) if loc else ""))
        elif is_list if isinstance(loc[0], int) else isinstance(node.value, dict) and loc[0] in node.value:
            below.setdefault(loc[0], []).append((loc[1:], kind))
        else:
            members.setdefault(loc[0], []).append((loc[1:], kind))
    for part, found in below.items():
        child = f"{key}[{part}]" if isinstance(part, int) else f"{key}.{part}"
        parts = [option.get("items") for option in options]
        if isinstance(part, str):
            parts = [one.get("properties", {}).get(part) or one.get("additionalProperties") for one in options]
        inner = next((inner for inner in parts if isinstance(inner, dict)), {})
        yield from _explain(node.value[part], inner, defs, child, found)
    if not members:
        return
    of_kind = _KIND_ERRORS - ({"literal_error"} if _is_choice(node, options) else set())
    fitting = []  # members of a union that take a value of this kind
    for found in members.values():
        places = [loc for loc, kind in found if kind in of_kind]
        if not any(not loc or (not is_list and all(isinstance(part, int) for part in loc)) for loc in places):
            fitting.append(found)
    if fitting:
        yield from _explain(node, fragment, defs, key, min(fitting, key=len))
    else:
        yield Problem(*_describe(node, fragment, options, key, "kind", ""))


def _is_choice(node: Node, options: list[Fragment]) -> bool:
    """Whether a value is a wrong word where one of several is expected, and nothing of another kind."""
    if _hint(node, options).endswith("quotes off"):  # a number or a switch in quotes beside words
        return False
    return any(_choices(option) and _kind_fits(node.value, option) for option in options)


def _describe(
    node: Node, fragment: Fragment, options: list[Fragment], key: str, kind: str, name: str
) -> tuple[str, str]:
    """Say what is wrong with a value, or with the entry `name` of it, and where it is."""
    found = f"{show_key(key)} is {show(node)}"
    option = next((option for option in options if _kind_fits(node.value, option)), fragment)
    typical = f" (typical: {fragment['typical']})" if "typical" in fragment else ""
    match kind:
        case "extra_forbidden":
            what = describe_unknown(name, key, option["properties"])
            if word := find_word(name):
                said = _say(word, node.value[name] if word.key.split(".")[0] == key else None)
                what = f"{key}.{name}{'' if word.tool == 'trl' else f' is not a key of {key}'}: {said}"
            return what, node.value[name].place
        case "missing":
            found = f"{key}.{name} is missing; {quote_help(option['properties'][name].get('description'))}"
        case "string_pattern_mismatch" if option.get("pattern", r"\S") == r"\S":
            found = f"{show_key(key)} is empty text"
        case "sign":
            found += "; write +NAME where higher is better, -NAME where lower is"
        case "finite_number":
            found += f"; it must be a finite number{typical}"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            found += f"; it must be {_name_bounds(option)}{typical}"
        case "string_pattern_mismatch":
            rule = "use letters, digits, '.', '_' and '-' only" if "._-]" in option["pattern"] else ""
            found += f"; {rule or quote_help(fragment.get('description'))}"
        case "too_short" if not node.value:
            found = f"{show_key(key)} is an empty list; give at least one entry"
        case "too_short" | "too_long":
            least, most = option.get("minItems", 0), option.get("maxItems")
            count = least if least == most else f"{least} or more" if most is None else f"{least} to {most}"
            found += f"; it must have {count} entries"
        case "literal_error" if _is_choice(node, options):
            choices = [choice for option in options for choice in _choices(option)]
            choices += [True, False] if any(option.get("type") == "boolean" for option in options) else []
            words, several = _name_choices(choices)
            hint = suggest(node.value, words) if isinstance(node.value, str) else ""
            if known := find_method(node.value):  # another method, no slip of the pen
                hint = f"; {known.said}"
            listed = " (`alignkit schema` lists them)" if len(words) > _MANY and not hint else ""
            found += f"; it must be {'one of ' if len(words) > 1 else ''}{several}{hint}{listed}"
        case _:
            names = []
            for option in (one for one in options if one.get("type") != "null"):
                words, several = _name_choices(_choices(option))
                limits = _name_bounds(option)
                name = TABLES["kinds of a JSON schema"].get(option.get("type"))
                name = f"{name} {'of ' * limits.startswith('at ')}{limits}".rstrip()
                names.append(f"{'one of ' * (len(words) > 1)}{several}" if words else name)
            found += f"; it must be {' or '.join(dict.fromkeys(names))}{typical}{_hint(node, options)}"
    return found, node.place


def describe_unknown(name: str, section: str, accepted: Iterable[str]) -> str:
    """Say that a section has no such key and which is nearest."""
    known = list(accepted)
    hint = suggest(name, known)
    if not hint:
        hint = f"; it has {', '.join(known)}" if len(known) <= _MANY else "; `alignkit schema` lists its keys"
    return f"{show_key(f'{section}.{name}' if section else name)} is not a key of {section or 'a recipe'}{hint}"


def show(node: Node) -> str:
    """A value as a message shows it: in one line, shortened, without secrets."""
    if node.value is None:
        return "empty"
    if isinstance(node.value, str):
        plain = not node.quoted and node.value and not re.search(r"[\s,;]", node.value)
        text = node.value if plain else json.dumps(node.value, ensure_ascii=False)
    elif isinstance(node.value, (dict, list)):
        text = json.dumps(node.plain(), ensure_ascii=False)
    else:
        text = json.dumps(node.value).replace("Infinity", ".inf").replace("NaN", ".nan")
    return shorten(text)


def show_key(key: str) -> str:
    """A key as a message shows it."""
    return shorten(key, 80)


def _choices(option: Fragment) -> list[Any]:
    return [option["const"]] if "const" in option else list(option.get("enum", ()))


def _kinds(option: Fragment) -> set[str]:
    return {option["type"]} if "type" in option else {_KINDS[type(choice)] for choice in _choices(option)}


def _kind_fits(value: Any, option: Fragment) -> bool:
    kinds = _kinds(option)
    return _KINDS[type(value)] in kinds or (type(value) is int and "number" in kinds)


def _name_choices(choices: list[Any]) -> tuple[list[str], str]:
    words = [choice if isinstance(choice, str) else json.dumps(choice) for choice in choices]
    return words, ", ".join(words) if len(words) <= _MANY else f"{len(words)} names"


def _name_bounds(option: Fragment) -> str:
    return " and ".join(f"{words} {option[name]}" for name, (_, words) in BOUNDS.items() if words and name in option)


def _hint(node: Node, options: list[Fragment]) -> str:
    kinds, value = set().union(*(_kinds(option) for option in options)), node.value
    if isinstance(value, float) and "integer" in kinds and value.is_integer() and abs(value) < 1e15:
        return f"; write {int(value)}"
    if not isinstance(value, str):
        return ""
    if "boolean" in kinds and (meant := TABLES["booleans of YAML 1.1"].get(value.lower())):
        return f"; write {meant}"
    unquoted, digits = read_scalar(value), value.replace("_", "").replace(",", "")
    if node.quoted and not isinstance(unquoted, str) and any(_kind_fits(unquoted, option) for option in options):
        return "; take the quotes off"
    return f"; write {digits}" if kinds & {"integer", "number"} and digits.isdecimal() and digits != value else ""


def quote_help(description: str | None) -> str:
    """Turn the description of a key into the end of a sentence."""
    text = description or "give it a value"
    return text[:1].lower() + text[1:].rstrip(".")


def accepted_keys(method: str) -> list[str]:
    """List what a stage or an rlaif section may say: alignkit's own keys, then TRL's."""
    return [*(OPTIONS.get(method, RlaifOptions)).model_fields, *method_fields(method)]


def describe_unknown_top(name: str, node: Node) -> str:
    """Say that a recipe has no such key at its top level, and where it belongs."""
    known, sections = RecipeOptions.model_fields, [*OPTIONS, RLAIF]
    word = find_word(name) or find_word(name, "ppo")
    if name == "extends":
        return "extends cannot be set from the command line; write it in the file"
    if method := find_method(name):
        return f"{name} is not a section here: {method.said}"
    if word and word.tool == "trl" and word.method == "":
        return f"{name}{'' if name == 'trust_remote_code' else ' is not a key here'}: {_say(word, node)}"
    last = name if word else name.rpartition(".")[2]
    if owner := _find_section(last):
        return f"{name} is not a key at the top level; {'it' if name == last else last} belongs in {owner}"
    hint = suggest(name, [*known, *sections])
    if not hint and (told := _describe_below(name, node, "", word)):
        return f"{show_key(name)} is not a section: {told}"
    if word:
        return f"{show_key(name)} is not a key here: {_say(word, node)}"
    if isinstance(node.value, dict) and not hint:
        return f"{show_key(name)} is not a section; a stage of this name needs `method:` ({', '.join(sections)})"
    return describe_unknown(name, "", [*known, *sections])


def describe_unknown_in_stage(key: str, node: Node | None = None, *, stage: str, method: str) -> str:
    """Say that a stage has no such key, and where it belongs; with its value, if there is one."""
    where, word, last = f"{stage}.{key}", find_word(key, method), key.rpartition(".")[2]
    if word and key in controlled_fields(method):
        return f"{where} cannot be set: {_say(word, node)}"
    if key != last and last in accepted_keys(method) and (word is None or key not in word.names.split()):
        word = Word(key, "", method, "renamed", last, "", "")  # of a section of another tool
    if key in RecipeOptions.model_fields and key not in OPTIONS["sft"].model_fields:
        return f"{where} is not a key of a stage; {key} belongs at the top level of the recipe"
    if told := _describe_below(key, node, method, word) or (word and _say(word, node)):
        return f"{where} is not a key of a stage: {told}"
    if owner := _find_section(last):
        return f"{where} is not a key of {method}; {'it' if key == last else last} belongs in {owner}"
    if word := find_word(key, "ppo"):
        return f"{where} is not a key of {method}: {_say(word, node)}, in a ppo stage"
    return describe_unknown(key, stage, accepted_keys(method))


def _describe_below(key: str, node: Node | None, method: str, word: Word | None = None) -> str:
    """Say what the keys below another tool's section (`actor: {adam: {lr: ...}}`) are here, if it is not told yet."""
    is_told = word is not None and word.action not in ("renamed", "converted")
    if is_told or node is None or not isinstance(node.value, dict):
        return ""
    told, is_theirs = [], False
    for name, child in node.value.items():
        path = f"{key}.{name}"
        word, what, owner = find_word(path, method), _describe_below(path, child, method), _find_section(name)
        is_theirs = is_theirs or bool(what or word)
        if what or word or owner:
            told.append(what or f"{show_key(path)}: {_say(word, child) if word else f'it belongs in {owner}'}")
    return "; ".join(told) if is_theirs else ""


def _say(word: Word, node: Node | None) -> str:
    """Where another tool's key lives, and how to write its value there."""
    value = node.plain() if node else None
    if word.key == "method" and (known := find_method(value)):
        return known.said
    new = word.convert(value)
    if node is None or new is None:
        return word.say()
    first, *rest = word.key.split(".")
    for part in reversed(rest):
        new = {part: new}
    whole = {"path": "x", **new} if first in ("model", "data") and isinstance(new, dict) else new
    made, shown = (parse_yaml(json.dumps(one), node.origin) or node for one in (whole, new))
    methods = [name for name in OPTIONS if first in method_fields(name)]
    sections: tuple[type[BaseModel], ...] = (RecipeOptions, *OPTIONS.values())
    owner = next(one for one in sections if methods or first in one.model_fields)
    wrong = check_field(made, methods[0], first, first) if methods else validate(owner, {first: made}, str)[1]
    flow = re.sub(r'"([\w./-]+)"', r"\1", show(shown))  # as one writes it by hand
    return word.say() if wrong else f"{word.say()}; write {first}: {flow}"


def _find_section(key: str) -> str | None:
    """Find where a key would be right: "a dpo stage", "model:", "lora:"."""
    methods = [name for name, options in OPTIONS.items() if key in method_fields(name) or key in options.model_fields]
    if methods and key != "method":
        return f"a stage, such as {methods[0]}" if len(methods) > 2 else f"the {' or '.join(methods)} stage"
    for section, model in (("model:", ModelOptions), ("lora:", LoraOptions)):
        if key in model.model_fields and key not in ("path", "config"):
            return section
    return None
