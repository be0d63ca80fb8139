"""The recipe file, the fragments it extends and the --set values as one tree with places, and from it a Recipe.

Nothing here knows a key beyond `extends`; what the keys mean is checked in `validate`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from alignkit.errors import Problem, RecipeError
from alignkit.recipe.nearest import find_nearest
from alignkit.recipe.overrides import apply_override
from alignkit.recipe.paths import expand
from alignkit.recipe.recipe import Recipe
from alignkit.recipe.tree import Node, Origin, parse_yaml
from alignkit.recipe.validate import build_recipe

MAX_BYTES = 256 * 1024  # some 5,000 lines; the parser needs a second per 100 KB
MAX_FILES = 32


def load_recipe(path: Path | str, *, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge and validate a recipe; `overrides` are KEY.PATH=VALUE texts.

    Raises RecipeError with every problem found, each with file and line.
    """
    path = Path(path)
    tree = load_tree(path)
    problems: list[Problem] = []
    for override in overrides:
        try:
            tree = apply_override(tree, override)
        except RecipeError as error:
            problems += error.problems
    return build_recipe(tree, path=path, label=_label(path), problems=problems)


def load_tree(path: Path, *, above: tuple[Path, ...] = (), read: list[Path] | None = None) -> Node:
    """Return the merged tree of a file and all it extends; `above` are the files that led here."""
    read = [] if read is None else read
    read.append(path)
    origin = Origin(_label(path), path.parent)
    tree = parse_yaml(_read_text(path), origin)
    if tree is None or tree.value is None:
        raise RecipeError("the file is empty; a recipe needs at least `model:` and one stage", where=origin.place(1))
    if not isinstance(tree.value, dict):
        kind = "a list" if isinstance(tree.value, list) else "one value"
        raise RecipeError(f"the file holds {kind}; a recipe is a mapping of `key: value` lines", where=tree.place)
    extends = tree.value.pop("extends", None)
    if extends is None:
        return tree
    merged: Node | None = None
    for node in extends.value if isinstance(extends.value, list) else [extends]:
        fragment = load_tree(_find_fragment(node, (*above, path), read), above=(*above, path), read=read)
        merged = fragment if merged is None else merge(merged, fragment)
    return merge(merged, tree) if merged else tree


def merge(base: Node, over: Node) -> Node:
    """Return `over` laid on `base`: mappings are merged, all else is replaced, null takes a mapping away."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = dict(base.value)
    for key, node in over.value.items():
        before = merged.get(key)
        if before is not None and node.value is None and isinstance(before.value, dict):
            del merged[key]
        else:
            merged[key] = merge(before, node) if before is not None else node
    return Node(merged, over.origin, over.line)


def _find_fragment(node: Node, above: tuple[Path, ...], read: list[Path]) -> Path:
    """Return the file an `extends:` entry names; refuses a chain that comes back to itself."""
    if not isinstance(node.value, str) or not node.value.strip():
        raise RecipeError("extends must be a file name or a list of file names", where=node.place)
    try:
        fragment = node.origin.folder / expand(node.value)
    except ValueError as error:
        raise RecipeError(f"extends: {error}", where=node.place) from None
    if any(_same_file(fragment, other) for other in above):
        chain = " -> ".join(_label(file) for file in (*above, fragment))
        raise RecipeError(f"extends goes round in a circle: {chain}", where=node.place)
    if len(read) >= MAX_FILES:
        raise RecipeError(f"extends reads more than {MAX_FILES} files", where=node.place)
    if not fragment.is_file():
        raise RecipeError(f"extends names {node.value}, {_describe_missing(fragment)}", where=node.place)
    return fragment


def _read_text(path: Path) -> str:
    """Return the file's text; refuses what cannot be a recipe before anything parses it."""
    label = _label(path)
    try:
        if not path.is_file():
            raise RecipeError(f"recipe {label} is {_describe_missing(path)}" if path.is_dir() else
                              f"recipe {label} {_describe_missing(path)}")  # fmt: skip
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=label) from None
    if len(data) > MAX_BYTES:
        raise RecipeError(f"larger than {MAX_BYTES // 1024} KB; this is not a recipe", where=f"{label}:1")
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        raise RecipeError("a NUL byte; a recipe is plain UTF-8 text", where=f"{label}:{line}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError("a byte that is not UTF-8; save the file as UTF-8", where=f"{label}:{line}") from None


def _describe_missing(path: Path) -> str:
    """Say that a file is not there, with the nearest name that is."""
    if path.is_dir():
        recipes = sorted(file.name for file in path.glob("*.y*ml"))
        return "a directory; name a file" + (f" in it, such as {recipes[0]}" if recipes else "")
    folder = path.parent
    if not folder.is_dir():
        return f"does not exist; there is no directory {_label(folder)}"
    names = [file.name for file in folder.iterdir() if file.suffix in (".yaml", ".yml")]
    nearest = find_nearest(path.name, names) or find_nearest(path.stem, [Path(name).stem for name in names])
    if nearest:
        nearest = next(name for name in names if nearest in (name, Path(name).stem))
        return f"does not exist; did you mean {_label(folder / nearest)}?"
    return "does not exist" + (f"; {_label(folder)} has {', '.join(sorted(names)[:8])}" if names else "")


def _label(path: Path) -> str:
    """Return the path as messages show it: relative to the working directory when it is below it."""
    absolute = os.path.abspath(path)
    relative = os.path.relpath(absolute)
    return absolute if relative.startswith("..") else relative


def _same_file(a: Path, b: Path) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)
