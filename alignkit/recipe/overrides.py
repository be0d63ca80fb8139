"""A --set KEY.PATH=VALUE, or any value by its dotted key, laid on the tree.

It does not know which keys exist; an unknown one is found by the validation, as if the file had it.
"""

from __future__ import annotations

from pathlib import Path

from alignkit.console import redact
from alignkit.errors import RecipeError
from alignkit.recipe.secrecy import leads_to_secret
from alignkit.recipe.tree import Node, Origin, parse_yaml

FLAG = "--set"


def apply_override(tree: Node, override: str) -> Node:
    """Return the tree with one value set; null takes a section away. Raises RecipeError when it cannot be laid on."""
    key, separator, text = override.partition("=")
    keys = key.strip().split(".")
    if not separator or not all(keys):
        raise RecipeError(f"{_show(override)} is not KEY.PATH=VALUE, such as dpo.beta=0.2", where=FLAG)
    if leads_to_secret(keys):
        raise RecipeError(f"{key} is the name of a secret; set it in the environment instead (HF_TOKEN)", where=FLAG)
    origin = Origin(FLAG, Path.cwd())
    try:
        value = parse_yaml(text, origin) or Node(None, origin)
    except RecipeError as error:
        raise RecipeError(f"{_show(override)}: {error.problems[0].what}", where=FLAG) from None
    return lay_value(tree, keys, value, key=key, where=FLAG)


def lay_value(node: Node, keys: list[str], value: Node, *, key: str, where: str) -> Node:
    """Return the tree with a value at the end of these keys; null takes a section away.

    Raises RecipeError at `where` when they lead through a single value or past a list; `key` is what it calls them.
    """
    if not keys:
        return value
    first, *rest = keys
    if isinstance(node.value, list):
        if not first.isdecimal() or len(first) > 6 or int(first) >= len(node.value):
            raise RecipeError(f"{key}: {first} is not a position in a list of {len(node.value)}", where=where)
        items = list(node.value)
        items[int(first)] = lay_value(items[int(first)], rest, value, key=key, where=where)
        return Node(items, node.origin, node.line)
    if node.value is not None and not isinstance(node.value, dict):
        raise RecipeError(f"{key}: what stands before .{first} is a single value, not a section", where=where)
    entries = dict(node.value or {})
    if not rest and value.value is None and first in entries and isinstance(entries[first].value, dict):
        del entries[first]
    else:
        before = entries.get(first, Node({}, value.origin, value.line))
        entries[first] = lay_value(before, rest, value, key=key, where=where)
    return Node(entries, node.origin, node.line)


def _show(override: str) -> str:
    text = redact(override)
    return text if len(text) <= 80 else text[:77] + "..."
