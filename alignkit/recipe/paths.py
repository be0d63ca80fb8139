"""The one place where ~, environment variables and relative paths of a recipe are resolved.

It asks the file system only whether a name exists; a hub id stays as it is, and nothing is downloaded.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from alignkit.errors import Problem
from alignkit.recipe.secrecy import names_secret
from alignkit.recipe.tree import Node

_VARIABLE = re.compile(r"\$\{([^}]*)\}|\$([A-Za-z_][A-Za-z0-9_]*)")
_LOCAL_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".ndjson", ".gz", ".zst", ".arrow", ".jinja")
# Sections and keys that hold paths; all else is taken literally.
_MODEL_PATHS = ("path", "tokenizer")
SOURCE_KEYS = ("data", "eval", "normalize_data", "mix", "check")
REWARD_KEYS = ("reward", "gold")
FEEDBACK_KEYS = ("judge", "generator")
_FILE_KEYS = ("constitution", "examples", "replay")
_WORDS = ("none", "builtin")  # of `examples:`, beside files


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


def resolve_paths(trees: Iterable[Node], stages: Iterable[tuple[str, Node]], names: Collection[str]) -> list[Problem]:
    """Resolve every path in place and return what could not be resolved.

    `trees` are the recipe, once for each way in which its top level is swept; `stages` are sections with what messages
    call them; `names` are those of stages, which are left alone.
    """
    resolver = _Resolver(names)
    for tree in trees:
        _resolve_top(resolver, tree)
    for label, section in stages:
        if isinstance(section.value, dict):
            resolver.resolve_stage(section, label)
    return resolver.problems


def _resolve_top(resolver: _Resolver, tree: Node) -> None:
    model = tree.value.get("model")
    if model and isinstance(model.value, dict):
        for key in _MODEL_PATHS:
            resolver.resolve(model.value.get(key), f"model.{key}")
        template = model.value.get("chat_template")
        if template and str(template.value).endswith(".jinja"):  # else one of ours, by name
            resolver.resolve(template, "model.chat_template")
    for key in SOURCE_KEYS:
        resolver.resolve_sources(tree.value.get(key), key)
    evaluate = tree.value.get("evaluate")
    if evaluate is not None and isinstance(evaluate.value, dict):
        resolver.resolve_evaluation(evaluate)


class _Resolver:
    """Resolves nodes, each once: stages of one rlaif section share what the section says."""

    def __init__(self, stages: Collection[str]) -> None:
        self.problems: list[Problem] = []
        self._stages = stages
        self._done: set[int] = set()

    def resolve_stage(self, section: Node, name: str) -> None:
        values = section.value
        for key in SOURCE_KEYS:
            self.resolve_sources(values.get(key), f"{name}.{key}")
        for key in ("ptx", "helpful"):
            part = values.get(key)
            if part is not None and isinstance(part.value, dict):
                self.resolve_sources(part.value.get("data"), f"{name}.{key}.data")
        for key in REWARD_KEYS:
            for model in list_models(values.get(key)):
                self.resolve_weights(model, f"{name}.{key}")
            for reward in list_judged(values.get(key)):
                self.resolve_files(reward, f"{name}.{key}")
        for key, model in list_feedback(section):
            self.resolve_weights(model, f"{name}.{key}")
        for key in FEEDBACK_KEYS:
            self.resolve_files(values.get(key), f"{name}.{key}")
        self.resolve_files(section, name)
        self.resolve_weights(values.get("start_from"), f"{name}.start_from")

    def resolve_evaluation(self, section: Node) -> None:
        values = section.value
        self.resolve_sources(values.get("data"), "evaluate.data")
        for key in ("reference", "reward", "against"):
            self.resolve_weights(values.get(key), f"evaluate.{key}")
        for key, model in list_feedback(section):
            self.resolve_weights(model, f"evaluate.{key}")
        self.resolve_files(section, "evaluate")

    def resolve_weights(self, node: Node | None, key: str) -> None:
        """Resolve what names a stage, a directory or a hub id; runs are looked for below the working directory."""
        if node is not None and isinstance(node.value, str) and node.value not in self._stages:
            self.resolve(node, key, missing_from=Path.cwd())

    def resolve_sources(self, node: Node | None, key: str) -> None:
        """Resolve the path of each source of `data:` or `eval:` in any of its shapes."""
        for path, at_path in list_source_paths(node):
            if path.value not in self._stages:
                self.resolve(path, f"{key}.path" if at_path else key)

    def resolve_files(self, part: Node | None, key: str) -> None:
        """Resolve the keys of a mapping that can only be files: constitutions, examples, replays."""
        if part is None or not isinstance(part.value, dict):
            return
        for name in _FILE_KEYS:
            node = part.value.get(name)
            for item in node.value if node is not None and isinstance(node.value, list) else [node]:
                if item is not None and item.value not in _WORDS:
                    self.resolve(item, f"{key}.{name}", only_file=True)

    def resolve(
        self, node: Node | None, key: str, *, missing_from: Path | None = None, only_file: bool = False
    ) -> None:
        if node is None or not isinstance(node.value, str) or node.value.startswith("builtin:") or "://" in node.value:
            return
        if id(node) in self._done:
            return
        self._done.add(id(node))
        try:
            text = expand(node.value)
        except ValueError as error:
            self.problems.append(Problem(f"{key}: {error}", node.place))
            return
        for folder in (node.origin.folder, Path.cwd()):
            if os.path.exists(folder / text) or ("*" in text and glob.glob(str(folder / text), recursive=True)):
                node.value = os.path.abspath(folder / text)
                return
        if only_file or _looks_local(text):
            node.value = os.path.abspath((missing_from or node.origin.folder) / text)


def list_source_paths(node: Node | None) -> list[tuple[Node, bool]]:
    """Return the nodes of `data:`, in any of its shapes, that name a source, and whether each is under `path:`."""
    if node is None:
        return []
    items = [
        (item.value.get("path"), True) if isinstance(item.value, dict) else (item, False)
        for item in (node.value if isinstance(node.value, list) else [node])
    ]
    return [(item, at_path) for item, at_path in items if item is not None and isinstance(item.value, str)]


def list_feedback(section: Node) -> list[tuple[str, Node]]:
    """Return key and node of each model that a section names as judge or generator, those of rewards included."""
    named = [(key, section.value.get(key)) for key in FEEDBACK_KEYS]
    for key in REWARD_KEYS:
        named += [(f"{key}.judge", reward.value.get("judge")) for reward in list_judged(section.value.get(key))]
    models = [(key, _read_model(node)) for key, node in named if node is not None]
    return [(key, model) for key, model in models if model is not None and isinstance(model.value, str)]


def list_judged(node: Node | None) -> list[Node]:
    """Return the parts of `reward:` or `gold:` that are mappings with a judge."""
    items = [] if node is None else node.value if isinstance(node.value, list) else [node]
    return [item for item in items if isinstance(item.value, dict) and "judge" in item.value]


def _read_model(node: Node) -> Node | None:
    return node.value.get("model") if isinstance(node.value, dict) else node


def list_models(node: Node | None) -> list[Node]:
    """Return the nodes of `reward:` or `gold:`, in any of its shapes, that name a model or a stage."""
    if node is None:
        return []
    items = [item.value.get("model") if isinstance(item.value, dict) else item
             for item in (node.value if isinstance(node.value, list) else [node])]  # fmt: skip
    return [item for item in items if item is not None and isinstance(item.value, str)]


def _looks_local(text: str) -> bool:
    """Tell a file or directory that is not there from a hub id (`name` or `owner/name`)."""
    return text.startswith((".", "/")) or text.lower().endswith(_LOCAL_SUFFIXES) or text.count("/") > 1 or "*" in text
