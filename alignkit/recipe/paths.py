"""The one place where ~, environment variables and relative paths of a recipe are resolved.

It asks the file system only whether a name exists; a hub id stays as it is, and nothing is downloaded.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from alignkit.errors import Problem
from alignkit.recipe.secrecy import names_secret
from alignkit.recipe.tree import Node

_VARIABLE = re.compile(r"\$\{([^}]*)\}|\$([A-Za-z_][A-Za-z0-9_]*)")
_LOCAL_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".arrow", ".jinja")
# Sections and keys that hold paths; all else is taken literally.
_MODEL_PATHS = ("path", "tokenizer")
SOURCE_KEYS = ("data", "eval", "normalize_data")
REWARD_KEYS = ("reward", "gold")


def expand(text: str) -> str:
    """Return the text with ~ and environment variables replaced; raises ValueError saying what is wrong."""

    def replace(match: re.Match[str]) -> str:
        name = match[1] if match[1] is not None else match[2]
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"{match[0]} is not an environment variable; write ${{NAME}}")
        if names_secret(name):
            raise ValueError(f"{match[0]} is a secret; a path cannot hold one")
        if name not in os.environ:
            raise ValueError(f"the environment variable {name} is not set")
        return os.environ[name]

    return os.path.expanduser(_VARIABLE.sub(replace, text))


def resolve_paths(tree: Node, stages: dict[str, Node]) -> list[Problem]:
    """Resolve every path of the tree in place and return what could not be resolved."""
    problems: list[Problem] = []
    model = tree.value.get("model")
    if model and isinstance(model.value, dict):
        for key in _MODEL_PATHS:
            _resolve(model.value.get(key), f"model.{key}", problems)
        template = model.value.get("chat_template")
        if template and str(template.value).endswith(".jinja"):  # else one of ours, by name
            _resolve(template, "model.chat_template", problems)
    for name, section in (("", tree), *stages.items()):
        prefix = f"{name}." if name else ""
        for key in SOURCE_KEYS:
            _resolve_sources(section.value.get(key), f"{prefix}{key}", problems)
    evaluate = tree.value.get("evaluate")
    if evaluate is not None and isinstance(evaluate.value, dict):
        _resolve_sources(evaluate.value.get("data"), "evaluate.data", problems)
    for name, section in stages.items():
        ptx = section.value.get("ptx")
        if ptx is not None and isinstance(ptx.value, dict):
            _resolve_sources(ptx.value.get("data"), f"{name}.ptx.data", problems)
        for key in REWARD_KEYS:
            for model in list_models(section.value.get(key)):
                if model.value not in stages:
                    _resolve(model, f"{name}.{key}", problems, missing_from=Path.cwd())
        start = section.value.get("start_from")
        if start is not None and isinstance(start.value, str) and start.value not in stages:
            _resolve(start, f"{name}.start_from", problems, missing_from=Path.cwd())
    return problems


def list_models(node: Node | None) -> list[Node]:
    """Return the nodes of `reward:` or `gold:`, in any of its shapes, that name a model or a stage."""
    if node is None:
        return []
    items = [item.value.get("model") if isinstance(item.value, dict) else item
             for item in (node.value if isinstance(node.value, list) else [node])]  # fmt: skip
    return [item for item in items if item is not None and isinstance(item.value, str)]


def _resolve_sources(node: Node | None, key: str, problems: list[Problem]) -> None:
    """Resolve the path of each source of `data:` or `eval:` in any of its shapes."""
    if node is None:
        return
    for item in node.value if isinstance(node.value, list) else [node]:
        if isinstance(item.value, dict):
            _resolve(item.value.get("path"), f"{key}.path", problems)
        else:
            _resolve(item, key, problems)


def _resolve(node: Node | None, key: str, problems: list[Problem], *, missing_from: Path | None = None) -> None:
    if node is None or not isinstance(node.value, str) or node.value.startswith("builtin:") or "://" in node.value:
        return
    try:
        text = expand(node.value)
    except ValueError as error:
        problems.append(Problem(f"{key}: {error}", node.place))
        return
    for folder in (node.origin.folder, Path.cwd()):
        if os.path.exists(folder / text):
            node.value = os.path.abspath(folder / text)
            return
    if _looks_local(text):
        node.value = os.path.abspath((missing_from or node.origin.folder) / text)


def _looks_local(text: str) -> bool:
    """Tell a file or directory that is not there from a hub id (`name` or `owner/name`)."""
    return text.startswith((".", "/")) or text.lower().endswith(_LOCAL_SUFFIXES) or text.count("/") > 1
