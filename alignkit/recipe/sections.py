"""The sections of a recipe: its stages, one for each variant of a swept one, and its own top level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alignkit.recipe.schema import FEEDBACK, RLAIF
from alignkit.recipe.yaml import Node

Finding = tuple[str, str]  # key, what is wrong with it


class UnreadableError(Exception):
    """A rule asked for a value that has a problem of its own."""


@dataclass(eq=False)
class Section:
    """A stage with what it takes from the recipe, or the recipe's top level (`top` is None).

    `broken` are keys whose value cannot be relied on, `options` what pydantic made of the values.
    """

    name: str
    method: str
    node: Node
    top: Section | None = None
    group: str | None = None  # the rlaif section it is a step of
    shared: frozenset[str] = frozenset()  # keys that it has from there
    inherited: frozenset[str] = frozenset()  # keys that it has from the top level
    broken: set[str] = field(default_factory=set)
    options: Any = None  # StageOptions or RecipeOptions, once the values are found to be right
    run: str = ""  # the name of its run: of a swept stage, with the values that tell it from the others
    names: Mapping[str, str] = field(default_factory=dict)  # which run of a swept stage it means by the stage's name
    point: Mapping[str, Any] = field(default_factory=dict)  # its values of what is swept, as written

    @property
    def trainer(self) -> dict[str, Any]:
        """TRL's fields where they are given."""
        fields = type(self.options).model_fields
        given = {key: child.plain() for key, child in self.node.value.items() if key not in fields}
        if self.method == "dpo" and isinstance(given.get("loss_type"), str):
            given["loss_type"] = [given["loss_type"]]
        return given

    @property
    def label(self) -> str:
        """What messages call the section: as it stands in the file."""
        return self.name if self.group is None else f"{self.group}.{self.method}"

    def say(self, key: str) -> str:
        """What messages call a key of it."""
        first = key.split(".")[0]
        if self.top is None or first in self.inherited:
            return key
        return f"{self.group if first in self.shared else self.label}.{key}"

    def get(self, key: str, default: Any = None) -> Any:
        """A value as given, else the default; `key` may be dotted. Raises when the value given is wrong."""
        first, *rest = key.split(".")
        if first in self.broken:
            raise UnreadableError
        child = self.node.value.get(first)
        for part in rest:
            child = child.value.get(part) if child is not None and isinstance(child.value, dict) else None
        return default if child is None else child.plain()

    def has(self, key: str) -> bool:
        return self.get(key) is not None

    def place(self, key: str) -> str:
        """The place of a key, which may be dotted; of the section when it is not given."""
        node = self.node
        for part in key.split("."):
            if not isinstance(node.value, dict) or part not in node.value:
                break
            node = node.value[part]
        return node.place

    def is_switched_off(self, key: str, *, by: str) -> bool:
        """Tell whether a key lost its effect to a value from another file or the command line, which is no mistake."""
        own, other = (self.place(name).rpartition(":")[0] or self.place(name) for name in (key, by))
        return own != other and not own.startswith("--")


def make_stage(
    name: str, method: str, node: Node, top: Section, *, group: str | None = None, shared: frozenset[str] = frozenset()
) -> Section:
    """Make a stage's section, with the recipe's rows where it has none; published chains (replay) are rows already."""
    keys = () if method == "critique" and "replay" in node.value else find_inherited(top.node, method)
    taken = {key: top.node.value[key] for key in keys if key not in node.value}
    filled = Node({**taken, **node.value}, node.origin, node.line)
    return Section(name, method, filled, top, group, shared, frozenset(taken), run=name)


def find_inherited(tree: Node, method: str) -> tuple[str, ...]:
    """List what a stage of a method takes from the recipe when it gives none of its own."""
    keys = ("data",) if method in (*FEEDBACK, RLAIF) else ("data", "eval")
    return tuple(key for key in keys if key in tree.value and tree.value[key].value is not None)


@dataclass(eq=False)
class Whole:
    """All sections of a recipe; of one with a sweep, with one choice of the swept values."""

    top: Section
    stages: dict[str, Section] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)  # an rlaif section each
