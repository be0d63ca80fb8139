"""A --set KEY.PATH=VALUE laid on the tree.

It does not know which keys exist; an unknown one is found by the validation, as if the file had it.
"""

from __future__ import annotations

from pathlib import Path

from alignkit.errors import RecipeError
from alignkit.recipe.secrecy import leads_to_secret, redact
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
    return _place(tree, keys, value, key)


def _place(node: Node, keys: list[str], value: Node, whole: str) -> Node:
    if not keys:
        return value
    key, *rest = keys
    if isinstance(node.value, list):
        if not key.isdecimal() or len(key) > 6 or int(key) >= len(node.value):
            raise RecipeError(f"{whole}: {key} is not a position in a list of {len(node.value)}", where=FLAG)
        items = list(node.value)
        items[int(key)] = _place(items[int(key)], rest, value, whole)
        return Node(items, node.origin, node.line)
    if node.value is not None and not isinstance(node.value, dict):
        raise RecipeError(f"{whole}: what stands before .{key} is a single value, not a section", where=FLAG)
    entries = dict(node.value or {})
    if not rest and value.value is None and key in entries and isinstance(entries[key].value, dict):
        del entries[key]
    else:
        entries[key] = _place(entries.get(key, Node({}, value.origin)), rest, value, whole)
    return Node(entries, node.origin, node.line)


def _show(override: str) -> str:
    text = redact(override)
    return text if len(text) <= 80 else text[:77] + "..."
